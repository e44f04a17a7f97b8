"""AdaHesScale with its default, a clip, beside the authors' form with two values of eps.

The tasks of `training.py`, one seed, four learning rates; the MLP also with the loss multiplied by
1e-3 and 1e3, which leaves the problem as it is but not the units of `eps`.

    python benchmarks/defaults.py        ten minutes on one core
"""

import argparse
from functools import partial
from pathlib import Path

import optax
import training
from rich.progress import Progress
from table import Table, console, save

import hesscale_jax as hs

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EPS = {"eps 1e-8": 1e-8, "eps 1e-3": 1e-3, "default": None}
SCALED = [("digits MLP", 1e-3), ("digits MLP", 1.0), ("digits MLP", 1e3)]
RUNS = [*SCALED, ("digits CNN", 1.0), ("character LM", 1.0)]


def methods() -> dict[str, training.Method]:
    found = {"Adam": training.Method(training.plain(optax.adam), training.gradient, RATES)}
    curvatures = {"AdaHesScale": "hessian", "AdaHesScaleGN": "gauss_newton"}
    for name, curvature in curvatures.items():
        for form, eps in EPS.items():
            tx = training.plain(hs.adahesscale, eps=eps)
            derivatives = training.diagonal(curvature)
            found[f"{name}, {form}"] = training.Method(tx, derivatives, RATES)
    return found


def losses(name: str, scale: float, progress: Progress) -> dict[str, list[float]]:
    """By method, the final loss at each learning rate."""
    task, every = training.TASKS[name](), methods()
    scaled = task._replace(loss=lambda params, *batch: scale * task.loss(params, *batch))
    bar = progress.add_task(f"{name}, {scale:g}", total=len(every) * len(RATES))
    found = {}
    for key, method in every.items():
        run = training.training(scaled, method)
        curves, _ = training.curves(task, method, run, [0], partial(progress.advance, bar))
        found[key] = [training.final(runs) for runs in curves.values()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=training.RESULTS, help="a directory")
    options = parser.parse_args()

    made, data = [], {}
    columns = ["", *(f"{rate:g}" for rate in RATES)]
    with Progress(console=console) as progress:
        for name, scale in RUNS:
            title = name if scale == 1 else f"{name}, loss times {scale:g}"
            data[title] = losses(name, scale, progress)
            rows = [[key, *(f"{loss:.4f}" for loss in row)] for key, row in data[title].items()]
            made.append(Table(f"{title}: final loss by learning rate", columns, rows))
            save(options.output / "defaults", made, data)
    for table in made:
        table.show()


if __name__ == "__main__":
    main()
