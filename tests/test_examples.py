"""The examples run as a reader would run them, at their smallest size."""

import csv
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import pytest

REPOSITORY = Path(__file__).parents[1]


def start_example(name: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts an example with warnings as errors."""
    # A process of its own: the tests' float64 and strict promotion are not what a reader has.
    return subprocess.Popen(
        [sys.executable, "-W", "error", f"examples/{name}", *arguments],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "PYTHONPATH": str(REPOSITORY),  # The package need not be installed.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Nearly all of the time is compilation.
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_example(name: str, *arguments: str) -> str:
    """Runs an example to its end, and returns what it prints."""
    process = start_example(name, *arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout


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
        for optimizer in ["Adam", "AdaHesScale", "orthogonal_newton"]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_second_order_methods_gain_from_the_diagonal(tmp_path):
    _, _, *rows = run_smoke("second_order.py", tmp_path)

    def number(cell: str) -> float:
        return math.inf if cell == "-" else float(cell)

    # Settings; iterations and gradients to 1e-2, 1e-4 and 1e-8; what is left of the loss at last.
    results = {name: [number(cell) for cell in cells] for name, *cells in map(split, rows)}
    assert len(results) == 10
    left = {name: cells[-1] for name, cells in results.items()}
    # Curvature, or none: 4e-3 and 5e-4, of 1e-1 and 1e-2.
    for name in ("AdaHesScaleGN", "diagonal Newton"):
        assert left[name] < left["Adam"] < left["gradient descent"], name
    # 16 gradients to 1e-2; without the diagonal, 500 do not suffice.
    assert results["L-BFGS from diagonal"][2] < 50 < results["L-BFGS"][2]
    # 14 iterations of 30 products to 1e-8; without the diagonal, more than the budget allows.
    products = {
        name: results[name][0] * results[name][5]
        for name in ("Hessian-free", "Hessian-free, diagonal")
    }
    assert products["Hessian-free, diagonal"] < products["Hessian-free"]


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


@pytest.mark.slow
def test_char_lm_learns(tmp_path):
    for package in ("matplotlib", "orbax.checkpoint", "tqdm"):
        pytest.importorskip(package)

    printed = run_example(
        "char_lm.py", "--smoke", "--optimizer", "adahesscale-gn", "--output", str(tmp_path)
    )

    assert "bits per character" in printed
    losses = [float(row["validation_loss"]) for row in curves(tmp_path)]
    # All characters alike would be 4.85; as frequent as they are, and no more known, 3.12.
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 3.5
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("char_lm.py", ["matplotlib", "orbax.checkpoint", "tqdm"]),
        ("ppo.py", ["gymnasium", "matplotlib", "mujoco", "orbax.checkpoint", "tqdm"]),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, name, packages):
    for package in packages:
        pytest.importorskip(package)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    printed = run_example(name, "--smoke", "--output", str(whole))
    assert str(whole) in printed
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(float(x)) for row in curves(whole) for x in row.values())

    process = start_example(name, "--smoke", "--output", str(killed))
    while not checkpoints(killed):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert max(checkpoints(killed)) < max(checkpoints(whole)), "it was not killed in time"
    run_example(name, "--smoke", "--output", str(killed), "--resume")

    assert without_seconds(curves(killed)) == without_seconds(curves(whole))
    chex.assert_trees_all_equal(last_checkpoint(killed), last_checkpoint(whole))


def curves(run: Path) -> list[dict[str, str]]:
    with (run / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def checkpoints(run: Path) -> list[int]:
    """The steps of those that are complete: until then they have longer names."""
    return [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal()]


def last_checkpoint(run: Path) -> Any:
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(run / "checkpoints") as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
