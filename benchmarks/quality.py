"""How close HesScale comes to the exact diagonal of the Hessian, and its alternatives do.

For small models with random parameters and a random batch of 8, in float64, the error of an
estimate is `sum |estimate - exact| / sum |exact|` over all parameters, averaged over seeds.
Estimating zero has error 1. Columns:

    HesScale, HesScaleGN     this library, `curvature="hessian"` and `"gauss_newton"`
    Hutchinson 1, 50         mean of 1 or 50 samples `z * (H z)`, z random signs
    exact GGN                diagonal of the generalised Gauss-Newton matrix, without approximation
    grad squared             the square of the batch's gradient, as in Adam
    zero

    python benchmarks/quality.py
    python benchmarks/quality.py --models GPT residual --seeds 3 --per-layer --output quality.md
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hutchinson import value_and_hutchinson
from jax.flatten_util import ravel_pytree
from models import QUALITY_TASKS, Params, Task, cross_entropy
from rich.progress import Progress
from table import Table, console, output_path, write

import hesscale_jax as hs

WHOLE = "whole diagonal"
SAMPLES = 50


def second_derivatives(fun: Callable[[Any], jax.Array], at: Any, along: Any) -> tuple[Any, ...]:
    """`fun` at a point, and its first and second derivative along a direction."""

    def value_and_slope(point: Any) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(fun, (point,), (along,))

    (value, slope), (_, bend) = jax.jvp(value_and_slope, (at,), (along,))
    return value, slope, bend


def exact_diagonals(
    task: Task, params: Params, inputs: jax.Array, labels: jax.Array
) -> tuple[Params, Params]:
    """Of the Hessian, and of the generalised Gauss-Newton matrix, one coordinate after another.

    With logits `z(p)` and loss `L(z)`, along a coordinate: `d2L/dp2 = L'' (dz/dp)^2 + L' d2z/dp2`,
    whose first term is the Gauss-Newton matrix's.
    """
    flat, unravel = ravel_pytree(params)

    def loss(logits: jax.Array) -> jax.Array:
        return cross_entropy(logits, labels)

    def entries(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        coordinate = unravel(jnp.zeros_like(flat).at[index].set(1.0))
        logits, slope, bend = second_derivatives(
            lambda p: task.predict(p, inputs), params, coordinate
        )
        *_, gauss_newton = second_derivatives(loss, logits, slope)
        return gauss_newton + jnp.vdot(jax.grad(loss)(logits), bend), gauss_newton

    hessian, gauss_newton = jax.lax.map(entries, jnp.arange(flat.size))
    return unravel(hessian), unravel(gauss_newton)


def estimates(
    task: Task, key: jax.Array, params: Params, inputs: jax.Array, labels: jax.Array
) -> dict[str, Params]:
    """The diagonal by every method whose cost does not grow with the number of parameters."""
    args = params, inputs, labels

    def sample(key: jax.Array) -> Params:
        _, (_, estimate) = value_and_hutchinson(task.loss)(key, *args)
        return estimate

    samples = jax.lax.map(sample, jax.random.split(key, SAMPLES))
    grad, hesscale = hs.hesscale(task.loss)(*args)
    _, hesscale_gn = hs.hesscale(task.loss, curvature="gauss_newton")(*args)
    return {
        "HesScale": hesscale,
        "HesScaleGN": hesscale_gn,
        "Hutchinson 1": jax.tree.map(lambda s: s[0], samples),
        f"Hutchinson {SAMPLES}": jax.tree.map(lambda s: s.mean(axis=0), samples),
        "grad squared": jax.tree.map(jnp.square, grad),
        "zero": jax.tree.map(jnp.zeros_like, params),
    }


def absolute_sums(tree: Params) -> jax.Array:
    """The sum of the absolute entries of the whole tree, then of every leaf."""
    sums = jnp.stack([jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)])
    return jnp.concatenate([sums.sum(keepdims=True), sums])


def measure(task: Task, seeds: int, advance: Callable[[], None]) -> dict[str, dict[str, float]]:
    """The mean errors over the seeds: of the whole diagonal and of each parameter, by method."""

    @jax.jit
    def errors(key: jax.Array, params: Params, *batch: jax.Array) -> dict[str, jax.Array]:
        exact, gauss_newton = exact_diagonals(task, params, *batch)
        by_method = estimates(task, key, params, *batch) | {"exact GGN": gauss_newton}
        return {
            name: absolute_sums(jax.tree.map(jnp.subtract, estimate, exact)) / absolute_sums(exact)
            for name, estimate in by_method.items()
        }

    draws = []
    for seed in range(seeds):
        params, batch = task.draw(seed, jnp.float64)
        draws.append(jax.device_get(errors(jax.random.key(seed), params, *batch)))
        advance()

    means = jax.tree.map(lambda *draw: np.mean(draw, axis=0).tolist(), *draws)
    return {
        part: {method: mean[index] for method, mean in means.items()}
        for index, part in enumerate([WHOLE, *parameter_names(params)])
    }


def parameter_names(params: Params) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def rounded(error: float) -> str:
    return "0" if error < 1e-12 else f"{error:.2g}"


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    columns = next(iter(results.values()))
    rows = [[name, *map(rounded, errors.values())] for name, errors in results.items()]
    return Table(title, ["", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[""], help="rows whose name contains one")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--per-layer", action="store_true", help="a table per model, by parameter")
    parser.add_argument("--output", type=output_path, help="a .md or .json file to write")
    options = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    tasks = {
        name: task
        for name, task in QUALITY_TASKS.items()
        if any(part in name for part in options.models)
    }
    with Progress(console=console) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = progress.add_task("models x seeds", total=len(tasks) * options.seeds)
        measured = pool.map(
            lambda task: measure(task, options.seeds, lambda: progress.advance(bar)), tasks.values()
        )
        results = dict(zip(tasks, measured, strict=True))

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
