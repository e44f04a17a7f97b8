"""The examples run as a reader would run them, at their smallest size."""

import os
import re
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


def run_smoke(name: str, folder: Path) -> list[str]:
    """Runs an example at its smallest size and returns the lines of its table."""
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    picture = folder / "out" / "picture.png"
    *table, last = run_example(name, "--smoke", "--output", str(picture)).splitlines()
    assert str(picture) in last
    assert picture.read_bytes().startswith(b"\x89PNG")
    return table


def split(row: str) -> list[str]:
    """Splits a table's row, but not the name that it starts with."""
    name, cells = re.fullmatch(r"(.*?)  +(.*)", row).groups()
    return [name, *cells.split()]


# One test, for one run: fixtures are not shared among the processes that run the tests.
def test_digits_trains_every_network_with_every_optimizer(tmp_path):
    header, *rows = run_smoke("digits.py", tmp_path)

    assert header.split()[:3] == ["model", "framework", "optimizer"]
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


def test_pruning_by_curvature_keeps_more_than_by_magnitude(tmp_path):
    table = run_smoke("pruning.py", tmp_path)

    header = ["test", "accuracy", "100%", "50%", "20%", "10%", "5%", "2%", "1%"]
    assert table[0].split() == header
    half = len(table) // 2
    accuracy, loss = (
        {name: [float(mean) for mean in cells[::3]] for name, *cells in map(split, rows)}
        for rows in (table[1:half], table[half + 1 :])
    )
    assert len(accuracy) == len(loss) == 7
    assert {means[0] for means in accuracy.values()} == {accuracy["random"][0]}
    assert accuracy["random"][0] > 0.9
    left = header[2:].index("10%")
    for name in ("exact Gauss-Newton", "HesScale", "HesScaleGN"):
        # With 10 % of the weights: 0.12 at random, 0.59 by magnitude, 0.75 or more with curvature.
        assert accuracy[name][left] > accuracy["magnitude"][left] > accuracy["random"][left], name
        assert loss[name][left] < loss["magnitude"][left] < loss["random"][left], name


def test_elastic_weight_consolidation_forgets_less(tmp_path):
    _, *rows = run_smoke("continual.py", tmp_path)

    accuracy = {name: [float(x) for x in cells[1::3]] for name, *cells in map(split, rows)}
    assert len(accuracy) == 5
    forgotten, learnt, _ = accuracy["no penalty"]
    assert learnt > 0.9
    for name in ("exact Gauss-Newton", "HesScaleGN"):
        on_a, on_b, mean = accuracy[name]
        # 0.6 and 0.97 without a penalty: nearly all of A is kept, and B is learnt as well.
        assert on_a > forgotten + 0.1, name
        assert on_b > learnt - 0.05, name
        assert mean > accuracy["L2"][2], name


def test_kernel_raises_and_then_has_curvature():
    printed = run_example("kernel.py")
    assert "'custom_vjp_call[bias_gelu]': hesscale_jax.rules.defined_by(function)" in printed
    rows = [line.split() for line in printed.splitlines()[-3:]]
    assert [name for name, *_ in rows] == ["in", "bias", "out"]
    assert all(float(grad) > 0 and float(curvature) > 0 for _, grad, curvature in rows)
