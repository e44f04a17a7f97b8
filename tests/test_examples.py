"""The examples run as a reader would run them, at their smallest size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


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


# One test, for one run: fixtures are not shared among the processes that run the tests.
def test_digits_trains_every_network_with_every_optimizer(tmp_path):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path / "out" / "digits.png"

    header, *rows, last = run_example("digits.py", "--smoke", "--output", str(picture)).splitlines()

    assert header.split()[:3] == ["model", "framework", "optimizer"]
    assert str(picture) in last
    rows = [row.split() for row in rows]
    assert [tuple(row[:3]) for row in rows] == [
        (*network, optimizer)
        for network in [("MLP", "nnx"), ("CNN", "linen")]
        for optimizer in ["Adam", "AdaHesScale", "AdaHesScaleGN"]
    ]
    for *run, first_loss, final_loss, accuracy, _, _ in rows:
        # Two epochs take it from 2.4 to 0.3 or less, and the accuracy from 10 % to more than 90 %.
        assert float(final_loss) < 0.5 * float(first_loss), run
        assert float(accuracy.removesuffix("%")) > 70, run
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_kernel_raises_and_then_has_curvature():
    printed = run_example("kernel.py")
    assert "'custom_vjp_call[bias_gelu]': hesscale_jax.rules.defined_by(function)" in printed
    rows = [line.split() for line in printed.splitlines()[-3:]]
    assert [name for name, *_ in rows] == ["in", "bias", "out"]
    assert all(float(grad) > 0 and float(curvature) > 0 for _, grad, curvature in rows)


def test_large_batches_take_the_same_step_every_way():
    rows = run_example("large_batches.py").splitlines()
    assert len(rows) == 4
    for row in rows:
        _, step, _, apart = row.rsplit(maxsplit=3)
        assert float(step) > 1e-2
        assert float(apart) < 1e-6  # float32, other orders of summation
