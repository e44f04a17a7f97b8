"""The examples run as a reader would run them, at their smallest size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def run_example(name: str, *arguments: str) -> str:
    """Runs an example with warnings as errors, and returns what it prints."""
    # A process of its own: the tests' float64 and strict promotion are not what a reader has.
    process = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}", *arguments],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "PYTHONPATH": str(REPOSITORY),  # The package need not be installed.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Nearly all of the time is compilation.
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The rows of the table that examples/digits.py prints, and the picture that it draws."""
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path_factory.mktemp("examples") / "out" / "digits.png"
    printed = run_example("digits.py", "--smoke", "--output", str(picture))
    header, *rows, _ = printed.splitlines()
    assert header.split()[:3] == ["model", "framework", "optimizer"]
    return [row.split() for row in rows], picture


def test_digits_trains_both_models_in_either_framework_with_every_optimizer(digits):
    rows, _ = digits
    optimizers = ("Adam", "AdaHesScale", "AdaHesScaleGN")
    assert [tuple(row[:3]) for row in rows] == [
        *(("MLP", "nnx", optimizer) for optimizer in optimizers),
        *(("CNN", "linen", optimizer) for optimizer in optimizers),
    ]


def test_digits_loss_falls_with_every_optimizer(digits):
    rows, _ = digits
    for _, _, optimizer, first_loss, final_loss, accuracy, *_ in rows:
        # Two epochs take it from 2.4 to about 0.2.
        assert float(final_loss) < 0.5 * float(first_loss), optimizer
        assert float(accuracy.removesuffix("%")) > 70, optimizer


def test_digits_draws_a_picture(digits):
    _, picture = digits
    assert picture.read_bytes().startswith(PNG)
