"""The scripts in docs/figures draw the pictures that they name, here at their smallest size."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FIGURES = REPOSITORY / "docs" / "figures"
SCRIPTS = sorted(FIGURES.glob("[a-z]*.py"))


SLOW = {"dropped", "gauss_newton", "hessian", "layers", "paths", "scatter", "uses"}


def marks(script: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if script.stem in SLOW else []


@pytest.mark.parametrize(
    "script", [pytest.param(path, id=path.stem, marks=marks(path)) for path in SCRIPTS]
)
def test_a_script_draws_the_pictures_that_it_names(script, tmp_path):
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    subprocess.run(
        [sys.executable, "-W", "error", script, "--smoke", "--output", tmp_path],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    named = set(re.findall(r"\w+\.png", ast.get_docstring(ast.parse(script.read_text()))))
    assert {path.name for path in tmp_path.glob("*.png")} == named
    assert named <= {path.name for path in FIGURES.glob("*.png")}
