"""How close HesScale comes to the exact diagonal of the Hessian, and its alternatives do.

For small models with random parameters and a random batch of 8, in float64, the error of an
estimate is `sum |estimate - exact| / sum |exact|` over all parameters, averaged over seeds.
Estimating zero has error 1. Columns:

    HesScale, HesScaleGN     this library, `curvature="hessian"` and `"gauss_newton"`
    Hutchinson 1, 50         mean of 1 or 50 samples `z * (H z)`, z random signs
    exact GGN                diagonal of the generalised Gauss-Newton matrix, without approximation
    squared gradient         of the batch's mean loss, as in Adam
    zero

    python benchmarks/quality.py
    python benchmarks/quality.py --models GPT residual --seeds 3 --per-layer --output quality.md
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hutchinson import value_and_hutchinson
from jax.flatten_util import ravel_pytree
from models import QUALITY_TASKS, Params, Task, cross_entropy
from rich.progress import Progress
from table import Table, write

import hesscale_jax as hs

WHOLE = "whole diagonal"


def second_derivative(fun: Callable[[Any], jax.Array], at: Any, along: Any) -> jax.Array:
    """`v^T H v` of a scalar function, for a direction v."""

    def slope(point: Any) -> jax.Array:
        return jax.jvp(fun, (point,), (along,))[1]

    return jax.jvp(slope, (at,), (along,))[1]


def diagonal(quadratic_form: Callable[[Params], jax.Array], params: Params) -> Params:
    """`e_i^T A e_i` for every coordinate i, A given by `v -> v^T A v`."""
    flat, unravel = ravel_pytree(params)

    def entry(index: jax.Array) -> jax.Array:
        return quadratic_form(unravel(jnp.zeros_like(flat).at[index].set(1.0)))

    return unravel(jax.lax.map(entry, jnp.arange(flat.size)))


def exact_hessian(task: Task, params: Params, inputs: jax.Array, labels: jax.Array) -> Params:
    def loss(p: Params) -> jax.Array:
        return task.loss(p, inputs, labels)

    return diagonal(lambda v: second_derivative(loss, params, v), params)


def exact_gauss_newton(task: Task, params: Params, inputs: jax.Array, labels: jax.Array) -> Params:
    def predict(p: Params) -> jax.Array:
        return task.predict(p, inputs)

    def quadratic_form(v: Params) -> jax.Array:
        logits, shift = jax.jvp(predict, (params,), (v,))
        return second_derivative(lambda z: cross_entropy(z, labels), logits, shift)

    return diagonal(quadratic_form, params)


def estimates(
    task: Task, key: jax.Array, params: Params, inputs: jax.Array, labels: jax.Array
) -> dict[str, Params]:
    """Every column's estimate of the diagonal."""
    args = params, inputs, labels

    def sample(k: jax.Array) -> Params:
        return value_and_hutchinson(task.loss)(k, *args)[1][1]

    samples = jax.lax.map(sample, jax.random.split(key, 50))
    grad, hesscale = hs.hesscale(task.loss)(*args)
    _, hesscale_gn = hs.hesscale(task.loss, curvature="gauss_newton")(*args)
    return {
        "HesScale": hesscale,
        "HesScaleGN": hesscale_gn,
        "Hutchinson 1": jax.tree.map(lambda s: s[0], samples),
        "Hutchinson 50": jax.tree.map(lambda s: s.mean(axis=0), samples),
        "exact GGN": exact_gauss_newton(task, *args),
        "squared gradient": jax.tree.map(jnp.square, grad),
        "zero": jax.tree.map(jnp.zeros_like, params),
    }


def absolute_sums(tree: Params) -> jax.Array:
    """The sum of the absolute entries of every leaf, in the order of the leaves."""
    return jnp.stack([jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)])


def measure(task: Task, seeds: int, advance: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Errors by parameter (and of the whole diagonal), then by estimate; means over the seeds."""

    @jax.jit
    def sums(key: jax.Array, *args: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        exact = exact_hessian(task, *args)
        errors = {
            name: absolute_sums(jax.tree.map(jnp.subtract, estimate, exact))
            for name, estimate in estimates(task, key, *args).items()
        }
        return absolute_sums(exact), errors

    draws = []
    for seed in range(seeds):
        params, batch = task.draw(seed, jnp.float64)
        exact, errors = jax.device_get(sums(jax.random.key(seed), params, *batch))
        draws.append(
            {name: np.array([e.sum() / exact.sum(), *e / exact]) for name, e in errors.items()}
        )
        advance()

    leaves = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaf_paths(params)]
    means = {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}
    return {
        leaf: {name: float(mean[index]) for name, mean in means.items()}
        for index, leaf in enumerate([WHOLE, *leaves])
    }


def leaf_paths(params: Params) -> list[tuple[Any, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path(params)[0]


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    columns = next(iter(results.values()))
    rows = [[name, *[f"{e:.2g}" for e in errors.values()]] for name, errors in results.items()]
    return Table(title, ["", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[""], help="rows whose name contains one")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--per-layer", action="store_true", help="a table per model, by parameter")
    parser.add_argument("--output", type=Path, help="a .md or .json file to write")
    options = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    tasks = {
        name: task
        for name, task in QUALITY_TASKS.items()
        if any(part in name for part in options.models)
    }
    results = {}
    with Progress() as progress:
        bar = progress.add_task("models x seeds", total=len(tasks) * options.seeds)
        for name, task in tasks.items():
            progress.update(bar, description=name)
            results[name] = measure(task, options.seeds, lambda: progress.advance(bar))

    title = f"Relative L1 error of the Hessian diagonal, mean of {options.seeds} seeds"
    tables = [table(title, {name: errors[WHOLE] for name, errors in results.items()})]
    if options.per_layer:
        tables += [table(name, errors) for name, errors in results.items()]
    for t in tables:
        t.show()
    if options.output:
        write(options.output, tables, results)


if __name__ == "__main__":
    main()
