"""The Python blocks of every page run, as a reader would paste them, and print what it says."""

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parents[1]
# A block of code, and what it prints if a block of text follows at once.
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    if BLOCK.search(page.read_text())
]


@pytest.fixture(autouse=True)
def as_a_reader_has_it():
    """The tests are stricter, see conftest.py."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what it writes
    text = page.read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                # The name of the file that `explain` and errors show; its lines are the block's.
                exec(compile(block["code"], "train.py", "exec"), names)
            except Exception as error:
                error.add_note(f"in the block at {page}:{line}")
                raise
        expected = block["output"]
        if expected is not None:
            check = doctest.OutputChecker()
            assert check.check_output(expected, printed.getvalue(), FLAGS), (
                f"{page}:{line} prints\n{printed.getvalue()}"
            )
