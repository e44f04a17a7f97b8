"""The examples, run as a reader would run them: by themselves, at their smallest size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run_example(name: str, *arguments: str) -> str:
    """Runs an example with warnings as errors, and returns what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),  # The package may not be installed.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Nearly all of the time goes into compiling.
    }
    process = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path_factory.mktemp("digits") / "new" / "digits.png"
    header, *rows, last = run_example(
        "digits.py", "--smoke", "--output", str(picture)
    ).splitlines()
    ...
