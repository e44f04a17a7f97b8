"""The notebook runs, its checks hold, and it is saved with what it prints and draws."""

import runpy
from pathlib import Path

import pytest

for package in ("ipykernel", "matplotlib", "nbclient"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
NOTEBOOK = runpy.run_path(str(ROOT / "docs" / "notebook.py"))


def outputs(notebook):
    """What each cell of code shows: texts, and for a picture its format."""
    return [
        [output.get("text") or sorted(output.data) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_notebook_runs_and_shows_what_it_was_saved_with(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # The package need not be installed.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # Most of the time is compilation.
    saved, executed = NOTEBOOK["load"](), NOTEBOOK["executed"]()

    # Of pictures that there is one: their bytes depend on the version of matplotlib. A warning
    # would be a text, too.
    assert outputs(executed) == outputs(saved)
    pictures = [output for shown in outputs(saved) for output in shown if "image/png" in output]
    assert len(pictures) == 7


def test_the_notebook_is_saved_without_what_changes_at_every_run():
    for cell in NOTEBOOK["load"]().cells:
        assert "execution" not in cell.metadata  # When it ran.
        # Each picture has a description, for those who do not see it.
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        assert drawn == ("alt" in cell.metadata)
