"""How close HesScale comes to the exact diagonal of the Hessian, and its alternatives do.

For small models with random parameters and a random batch, in float64, the error of an estimate is
`sum |estimate - exact| / sum |exact|` over all parameters, averaged over seeds. Estimating zero has
error 1. A table each has the error of the whole, that of the median and of the worst array of
parameters ("leaf"), and the median of Spearman's rank correlation and of the agreement of signs
over the leaves. The models are classifiers and a critic of random inputs (`models.py`), or with
`--models` whole models as they are found in the field (`zoo.py`). Columns:

    HesScale, HesScaleGN     this library, `curvature="hessian"` and `"gauss_newton"`
    refined                  this library, `curvature="refined"`; not with `--models`
    Hutchinson 1, 8, 50      mean of so many samples `z * (H z)`, z random signs
    exact GGN                diagonal of the generalised Gauss-Newton matrix, without approximation
    grad squared             the square of the batch's gradient, as in Adam
    zero

With `--paper`, the methods of the papers besides, on one example at a time:

    BL89                     Becker and LeCun's: the softmax as one more activation, entry by entry
    GGN-MC 1, 50             mean of so many squared gradients, of labels drawn from the model
    absolute exact           the absolute value of the exact diagonal: what its signs are worth

A model with a primitive that has no rule is in the table as `raises: <primitive>`, and the exit
status is 1.

    python benchmarks/quality.py
    python benchmarks/quality.py --only GPT residual --seeds 3 --per-layer --output quality.md
    python benchmarks/quality.py --models --only GPT
    python benchmarks/quality.py --paper --seeds 40
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hutchinson import value_and_hutchinson
from jax.flatten_util import ravel_pytree
from models import PAPER_TASKS, QUALITY_TASKS, Params, Task
from rich.progress import Progress
from table import Table, console, output_path, write
from zoo import ZOO, Model

import hesscale_jax as hs
from hesscale_jax.testing import Report, compare

WHOLE = "whole diagonal"
MEDIAN, WORST = "median leaf", "worst leaf"
RANK, SIGN = "rank correlation, median leaf", "sign agreement, median leaf"
EXACT = "exact"
ABSOLUTE = "absolute exact"
HESSCALE = {"HesScale": "hessian", "HesScaleGN": "gauss_newton", "refined": "refined"}
COLUMNS = (
    *HESSCALE,
    *("BL89", "GGN-MC 1", "GGN-MC 50"),
    *(f"Hutchinson {count}" for count in (1, 8, 50)),
    *("exact GGN", "grad squared", ABSOLUTE, "zero"),
)

# By method; in place of a figure why there is none, or None where it is not defined.
Errors = dict[str, float | str | None]
Diagonals = dict[str, Params]


def second_derivatives(fun: Callable[[Any], jax.Array], at: Any, along: Any) -> tuple[Any, ...]:
    """`fun` at a point, and its first and second derivative along a direction."""

    def value_and_slope(point: Any) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(fun, (point,), (along,))

    (value, slope), (_, bend) = jax.jvp(value_and_slope, (at,), (along,))
    return value, slope, bend


def exact_diagonals(task: Task, params: Params, *batch: Any) -> Diagonals:
    """Of the Hessian, and of the generalised Gauss-Newton matrix, one coordinate after another.

    With logits `z(p)` and loss `L(z)`, along a coordinate: `d2L/dp2 = L'' (dz/dp)^2 + L' d2z/dp2`,
    whose first term is the Gauss-Newton matrix's.
    """

    *inputs, labels = batch

    def loss(logits: jax.Array) -> jax.Array:
        return task.criterion(logits, labels)

    def entries(coordinate: Params) -> tuple[jax.Array, jax.Array]:
        logits, slope, bend = second_derivatives(
            lambda p: task.predict(p, *inputs), params, coordinate
        )
        *_, gauss_newton = second_derivatives(loss, logits, slope)
        return gauss_newton + jnp.vdot(jax.grad(loss)(logits), bend), gauss_newton

    hessian, gauss_newton = for_each_coordinate(entries, params)
    return {EXACT: hessian, "exact GGN": gauss_newton}


def exact_diagonal(loss: Callable[..., jax.Array], params: Params, *batch: Any) -> Diagonals:
    """Of the Hessian, by Hessian-vector products."""

    def entry(coordinate: Params) -> tuple[jax.Array]:
        _, column = jax.jvp(lambda p: jax.grad(loss)(p, *batch), (params,), (coordinate,))
        return (optax.tree.vdot(coordinate, column),)

    (hessian,) = for_each_coordinate(entry, params)
    return {EXACT: hessian}


def for_each_coordinate(
    entries: Callable[[Params], tuple[jax.Array, ...]], params: Params
) -> list[Params]:
    """What `entries` returns of each unit vector, each as a tree like the parameters."""
    flat, unravel = ravel_pytree(params)

    def at(index: jax.Array) -> tuple[jax.Array, ...]:
        return entries(unravel(jnp.zeros_like(flat).at[index].set(1.0)))

    return list(map(unravel, jax.lax.map(at, jnp.arange(flat.size))))


def by_sampling(
    loss: Callable[..., jax.Array], counts: Sequence[int], key: jax.Array, *args: Any
) -> Diagonals:
    """Hutchinson's estimate, with each number of samples."""

    def sample(key: jax.Array) -> Params:
        _, (_, estimate) = value_and_hutchinson(loss)(key, *args)
        return estimate

    samples = jax.lax.map(sample, jax.random.split(key, max(counts)))
    return {
        f"Hutchinson {count}": jax.tree.map(lambda s, n=count: s[:n].mean(axis=0), samples)
        for count in counts
    }


def by_gradient(loss: Callable[..., jax.Array], params: Params, *batch: Any) -> Diagonals:
    """What costs no more than a gradient."""
    return {
        "grad squared": jax.tree.map(jnp.square, jax.grad(loss)(params, *batch)),
        "zero": jax.tree.map(jnp.zeros_like, params),
    }


def becker_lecun(task: Task, params: Params, *batch: Any) -> tuple[Params, Params]:
    """The gradient, and Becker and LeCun's diagonal, of a classifier."""
    *inputs, labels = batch
    logits = task.predict(params, *inputs)
    gradient = jax.grad(task.criterion)(logits, labels)
    # Of a softmax taken entry by entry, the loss is curved along the label's logit alone.
    p, label = jax.nn.softmax(logits), jax.nn.one_hot(labels, logits.shape[-1])
    curvature = label * p * (1 - p) / labels.size

    def loss(params: Params) -> jax.Array:
        shift = task.predict(params, *inputs) - logits
        return jnp.sum(gradient * shift + curvature * shift**2 / 2)

    return hs.hesscale(loss)(params)


def of_the_papers(
    task: Task, counts: Sequence[int], key: jax.Array, params: Params, *batch: Any
) -> Diagonals:
    """Becker and LeCun's diagonal, and the Gauss-Newton diagonal by labels that are drawn."""
    *inputs, labels = batch
    logits = task.predict(params, *inputs)

    def sample(key: jax.Array) -> Params:
        drawn = jax.random.categorical(key, logits)
        return jax.tree.map(
            lambda g: labels.size * g**2, jax.grad(task.loss)(params, *inputs, drawn)
        )

    samples = jax.lax.map(sample, jax.random.split(key, max(counts)))
    _, diagonal = becker_lecun(task, params, *batch)
    return {"BL89": diagonal} | {
        f"GGN-MC {count}": jax.tree.map(lambda s, n=count: s[:n].mean(axis=0), samples)
        for count in counts
    }


def absolute_sums(tree: Params) -> jax.Array:
    """The sum of the absolute entries of the whole tree, then of every leaf."""
    sums = jnp.stack([jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)])
    return jnp.concatenate([sums.sum(keepdims=True), sums])


def measure(
    subject: Task | Model,
    exact: Callable[..., Diagonals],
    counts: Sequence[int],
    seeds: int,
    advance: Callable[[], None],
    paper: bool = False,
) -> dict[str, Errors]:
    """The means over the seeds, by method.

    Errors of the whole diagonal, of the median and the worst leaf, the median leaf's correlation
    and agreement of signs, and errors of each leaf.
    """
    params, batch = subject.draw(0, jnp.float64)
    methods, raised = {}, {}
    for name, curvature in HESSCALE.items():
        if name == "refined" and not isinstance(subject, Task):
            continue  # Many have more outputs than it takes.
        method = hs.hesscale(subject.loss, curvature=curvature)
        try:
            jax.eval_shape(method, params, *batch)
        except hs.UnsupportedPrimitiveError as error:
            raised[name] = f"raises: {error.primitive}"
        else:
            methods[name] = method

    @jax.jit
    def diagonals(key: jax.Array, *args: Any) -> Diagonals:
        by_method = {name: method(*args)[1] for name, method in methods.items()}
        by_method |= by_sampling(subject.loss, counts, key, *args)
        by_method |= exact(*args)
        by_method |= by_gradient(subject.loss, *args)
        if paper:
            by_method |= of_the_papers(subject, counts, key, *args)
            by_method[ABSOLUTE] = jax.tree.map(jnp.abs, by_method[EXACT])
        return by_method

    draws: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        params, batch = subject.draw(seed, jnp.float64)
        found = jax.device_get(diagonals(jax.random.key(seed), params, *batch))
        exact_one = found.pop(EXACT)
        draws.append({name: figures(compare(each, exact_one)) for name, each in found.items()})
        advance()

    def mean(name: str, part: str) -> float | None:
        known = [draw[name][part] for draw in draws if not np.isnan(draw[name][part])]
        return float(np.mean(known)) if known else None

    columns = [name for name in COLUMNS if name in draws[0] or name in raised]
    return {
        part: {name: raised.get(name) or mean(name, part) for name in columns}
        for part in draws[0]["zero"]
    }


def figures(report: Report) -> dict[str, float]:
    errors = {leaf.path: leaf.error for leaf in report.leaves}
    ranks = [leaf.rank_correlation for leaf in report.leaves]
    return {
        WHOLE: report.total.error,
        MEDIAN: float(np.median(list(errors.values()))),
        WORST: report.worst_first[0].error,
        RANK: float(np.median([r for r in ranks if not np.isnan(r)] or [np.nan])),
        SIGN: float(np.median([leaf.sign_agreement for leaf in report.leaves])),
        **errors,
    }


def parameter_names(params: Params) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return [name.removesuffix(".value") for name in names]  # of a variable of Flax


def cell(error: float | str | None) -> str:
    if error is None or isinstance(error, str):
        return error or ""
    return "0" if abs(error) < 1e-12 else f"{error:.2g}"


def table(title: str, results: dict[str, Errors]) -> Table:
    columns = next(iter(results.values()))
    rows = [[name, *map(cell, errors.values())] for name, errors in results.items()]
    return Table(title, ["", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--models", action="store_true", help="whole models")
    chosen.add_argument("--paper", action="store_true", help="the papers' networks and methods")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one")
    parser.add_argument("--seeds", type=int, help="10, or 3 of whole models")
    parser.add_argument("--per-layer", action="store_true", help="a table per model, by parameter")
    parser.add_argument("--output", type=output_path, help="a .md or .json file to write")
    options = parser.parse_args()
    seeds = options.seeds or (3 if options.models else 10)

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    tasks = PAPER_TASKS if options.paper else QUALITY_TASKS
    names = [
        name
        for name in (ZOO if options.models else tasks)
        if any(part in name for part in options.only)
    ]
    if not names:
        parser.error(f"no model's name contains any of {options.only}")
    with Progress(console=console) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = progress.add_task("models x seeds", total=len(names) * seeds)

        def measured(name: str) -> dict[str, Errors]:
            if options.models:
                subject = ZOO[name]()
                exact, counts = functools.partial(exact_diagonal, subject.loss), (1, 8, 50)
            else:
                subject = tasks[name]
                exact, counts = functools.partial(exact_diagonals, subject), (1, 50)
            return measure(
                subject, exact, counts, seeds, lambda: progress.advance(bar), options.paper
            )

        results = dict(zip(names, pool.map(measured, names), strict=True))

    tables = [
        table(
            f"{title}: {part}, mean of {seeds} seeds",
            {name: errors[part] for name, errors in results.items()},
        )
        for title, parts in (
            ("Relative L1 error of the Hessian diagonal", (WHOLE, MEDIAN, WORST)),
            ("Order and signs of the Hessian diagonal", (RANK, SIGN)),
        )
        for part in parts
    ]
    if options.per_layer:
        tables += [table(name, errors) for name, errors in results.items()]
    for t in tables:
        t.show()
    if options.output:
        write(options.output, tables, results)
    if any(
        isinstance(error, str) for errors in results.values() for error in errors[WHOLE].values()
    ):
        sys.exit("A model was not measured: a primitive has no rule.")


if __name__ == "__main__":
    main()
