"""What the diagonal costs: HesScale beside `jax.value_and_grad` of the same loss, in float32.

Every method is compiled before anything is timed. The rounds then alternate between the methods in
one process, so that a change of the machine's speed meets all of them alike. Columns:

    ms            median time of one call
    ratio         median over the rounds of (time of the method) / (time of value_and_grad), then
                  the quartiles
    FLOPs, temp   XLA's count of the compiled program's operations, and of its temporary memory,
                  both relative to value_and_grad
    trace, compile   seconds, once, with JAX's caches cleared before

A gradient takes three matrix products a layer and HesScale two more, so that 5/3 is the floor (a
little less, as the first layer needs no gradient of its input). Hutchinson is one sample, with the
value and the gradient; drawing it is part of the call. "every 10" is the mean over ten steps of
`value_and_hesscale_every(10)`, of which one computes the diagonal: in one program with a branch,
which fills `hess_diag` with zeros at the other nine; or in two, of which the second leaves it out,
as the compiler does where it goes into an optimizer with `refreshed=False`.

    python benchmarks/cost.py
    python benchmarks/cost.py --models gpt-256 3c3d-relu --rounds 50 --output cost.md
    python benchmarks/cost.py --curvature gauss_newton
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hutchinson import value_and_hutchinson
from models import COST_TASKS, Task
from rich.progress import Progress
from table import Table, console, output_path, write

import hesscale_jax as hs

BASELINE = "value_and_grad"
HESSCALE = {"hessian": "HesScale", "gauss_newton": "HesScaleGN"}
EVERY = 10  # steps that one diagonal serves
MINIMUM_SECONDS = 0.02  # a shorter function is called several times for one measurement


class Program(NamedTuple):
    """A compiled method, and what the compiler says of it."""

    calls: Sequence[Callable[[], Any]]  # What is timed is their mean.
    flops: float
    temporary_bytes: int
    trace_seconds: float
    compile_seconds: float


def build(method: Callable[..., Any], *cases: tuple[Any, ...]) -> Program:
    """Compiles a method for arguments that differ in value alone."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(method).trace(*cases[0])
    trace_seconds = time.perf_counter() - start
    start = time.perf_counter()
    compiled = traced.lower().compile()
    compile_seconds = time.perf_counter() - start
    return Program(
        [functools.partial(compiled, *args) for args in cases],
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        trace_seconds,
        compile_seconds,
    )


def programs_for(task: Task, curvatures: list[str]) -> dict[str, Program]:
    params, batch = task.draw(0, jnp.float32)
    args = (params, *batch)
    every = hs.value_and_hesscale_every(EVERY)(task.loss)
    return {
        BASELINE: build(jax.value_and_grad(task.loss), args),
        **{
            HESSCALE[curvature]: build(hs.value_and_hesscale(task.loss, curvature=curvature), args)
            for curvature in curvatures
        },
        f"every {EVERY}, a branch": build(
            every, *((jnp.asarray(step), *args) for step in range(EVERY))
        ),
        f"every {EVERY}, two programs": taking_turns(
            build(functools.partial(every, 0), args),
            build(lambda *args: without_diagonal(every(1, *args)), args),
        ),
        "Hutchinson 1": build(value_and_hutchinson(task.loss), (jax.random.key(0), *args)),
    }


def without_diagonal(result: Any) -> Any:
    value, (grad, _), _ = result
    return value, grad


def taking_turns(fresh: Program, stale: Program) -> Program:
    """Ten steps, the first by the one program and the others by the other."""
    return Program(
        [*fresh.calls, *stale.calls * (EVERY - 1)],
        (fresh.flops + (EVERY - 1) * stale.flops) / EVERY,
        max(fresh.temporary_bytes, stale.temporary_bytes),
        fresh.trace_seconds + stale.trace_seconds,
        fresh.compile_seconds + stale.compile_seconds,
    )


def seconds_per_call(program: Program, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        for call in program.calls:
            result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / (repeats * len(program.calls))


def interleave(programs: Mapping[str, Program], rounds: int) -> Iterator[dict[str, float]]:
    """Seconds per call of every program, round by round; every other round in reverse order."""
    for program in programs.values():
        seconds_per_call(program, repeats=2)
    once = seconds_per_call(programs[BASELINE], repeats=3)
    repeats = math.ceil(MINIMUM_SECONDS / once)
    order = list(programs)
    for _ in range(rounds):
        yield {name: seconds_per_call(programs[name], repeats) for name in order}
        order.reverse()


def summarise(
    programs: Mapping[str, Program], times: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    baseline = programs[BASELINE]
    results = {}
    for name, program in programs.items():
        low, median, high = statistics.quantiles([t[name] / t[BASELINE] for t in times], n=4)
        results[name] = {
            "ms": 1e3 * statistics.median(t[name] for t in times),
            "ratio": median,
            "ratio_lower_quartile": low,
            "ratio_upper_quartile": high,
            "flops_ratio": program.flops / baseline.flops,
            "temporary_memory_ratio": program.temporary_bytes / baseline.temporary_bytes,
            "trace_seconds": program.trace_seconds,
            "compile_seconds": program.compile_seconds,
        }
    return results


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    columns = ["", "ms", "ratio", "quartiles", "FLOPs", "temp", "trace s", "compile s"]
    rows = [
        [
            name,
            f"{r['ms']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_lower_quartile']:.2f} to {r['ratio_upper_quartile']:.2f}",
            f"{r['flops_ratio']:.2f}",
            f"{r['temporary_memory_ratio']:.2f}",
            f"{r['trace_seconds']:.2f}",
            f"{r['compile_seconds']:.2f}",
        ]
        for name, r in results.items()
    ]
    return Table(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=COST_TASKS,
        default=list(COST_TASKS),
        metavar="MODEL",
        help=", ".join(COST_TASKS),
    )
    parser.add_argument("--curvature", nargs="+", choices=HESSCALE, default=list(HESSCALE))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=output_path, help="a .md or .json file to write")
    options = parser.parse_args()

    jax.block_until_ready(jax.jit(jax.grad(jnp.sin))(1.0))  # start JAX up before it is timed
    results, tables = {}, []
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(options.models) * options.rounds)
        for name in options.models:
            progress.update(bar, description=f"{name}: compiling")
            programs = programs_for(COST_TASKS[name], options.curvature)
            progress.update(bar, description=f"{name}: timing")
            times = []
            for seconds in interleave(programs, options.rounds):
                times.append(seconds)
                progress.advance(bar)
            results[name] = summarise(programs, times)
            tables.append(table(name, results[name]))
            tables[-1].show()

    if options.output:
        machine = {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "rounds": options.rounds,
        }
        write(options.output, tables, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
