"""Seconds to trace and to compile, and how the analysis grows with the program.

The first table is of a GPT with 24 layers, not scanned: seconds to trace and to compile it, and
those of the first call without ``jit``, which traces it and compiles one operation after another,
and of a later one, of the same loss as a new function. The second is of chains of matrix products,
LayerNorm, GELU and tanh: seconds to trace, and microseconds for each equation of the loss, which do
not grow if the analysis is linear. All are medians of 3, with JAX's caches cleared before.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from models import gpt_task
from rich.progress import track
from table import Table, console, save
from timing import BASELINE, HESSCALE, build, describe, machine, trace

import hesscale_jax as hs

REPEATS = 3
LENGTHS = (11, 45, 180, 714)  # of 28 equations each


def methods(loss: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    return {BASELINE: jax.value_and_grad(loss)} | {
        name: hs.value_and_hesscale(loss, **options) for name, options in HESSCALE.items()
    }


def run(stem: Path) -> None:
    where = machine()
    deep, chains = deep_gpt(), {}
    for length in track(LENGTHS, "chains", console=console):
        count, seconds = chain(length)
        chains[count] = seconds
    tables = [
        gpt_table(deep, describe(where)),
        chain_table(chains, describe(where)),
    ]
    for each in tables:
        each.show()
    save(stem, tables, {"machine": where, "gpt": deep, "chains": chains})


def deep_gpt() -> dict[str, dict[str, float]]:
    task = gpt_task(2, vocabulary=64, length=16, width=32, heads=2, layers=24)
    params, batch = task.draw(0, jnp.float32)
    results = {}
    for name, method in track(methods(task.loss).items(), "GPT, 24 layers", console=console):
        costs = [build(method, (params, *batch)).cost for _ in range(REPEATS)]
        calls = [without_jit(name, task.loss, (params, *batch)) for _ in range(REPEATS)]
        first, later = zip(*calls, strict=True)
        results[name] = {
            "trace_seconds": statistics.median(cost.trace_seconds for cost in costs),
            "compile_seconds": statistics.median(cost.compile_seconds for cost in costs),
            "first_call_seconds": statistics.median(first),
            "later_call_seconds": statistics.median(later),
        }
    return results


def without_jit(name: str, loss: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float]:
    """Seconds of a first call and of a second, each of the loss as a new function."""

    def call() -> float:
        method = methods(lambda *args: loss(*args))[name]
        start = time.perf_counter()
        jax.block_until_ready(method(*args))
        return time.perf_counter() - start

    jax.clear_caches()
    return call(), call()


def chain(length: int) -> tuple[int, dict[str, float]]:
    """How many equations the loss has, and the seconds to trace each method of it."""

    def loss(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        for w in params:
            x = jax.nn.gelu(jax.nn.standardize(x @ w))
            x = x + jnp.tanh(x)
        return jnp.mean(x**2)

    args = ([jnp.eye(4)] * length, jnp.ones((2, 4)))
    seconds = {
        name: statistics.median(trace(method, *args)[1] for _ in range(REPEATS))
        for name, method in methods(loss).items()
    }
    return equations(jax.make_jaxpr(loss)(*args)), seconds


def equations(jaxpr: Any) -> int:
    """Those of jaxprs within it included."""
    return sum(1 + sum(map(equations, jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


def gpt_table(results: dict[str, dict[str, float]], where: str) -> Table:
    headings = ("trace s", "compile s", "first call without jit s", "later call s")
    columns = ["", *(column for heading in headings for column in (heading, "ratio"))]
    return Table("GPT, 24 layers, width 32", columns, beside_baseline(results), [where])


def beside_baseline(results: dict[str, dict[str, float]]) -> list[list[str]]:
    baseline = results[BASELINE]
    return [
        [
            name,
            *(
                cell
                for key in baseline
                for cell in (f"{r[key]:.2f}", f"{r[key] / baseline[key]:.2f}")
            ),
        ]
        for name, r in results.items()
    ]


def chain_table(results: dict[int, dict[str, float]], where: str) -> Table:
    names = [BASELINE, *HESSCALE]
    rows = [
        [
            f"{count:,}",
            *(
                cell
                for name in names
                for cell in (f"{seconds[name]:.2f}", f"{1e6 * seconds[name] / count:.0f}")
            ),
        ]
        for count, seconds in results.items()
    ]
    columns = ["equations", *(cell for name in names for cell in (f"{name}, s", "us/equation"))]
    return Table("Tracing a chain of layers", columns, rows, [where])
