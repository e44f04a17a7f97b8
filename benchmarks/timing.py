"""Compiled methods, timed by turns: in every round each is called for a while.

A change of the machine's speed so meets all of them alike, and a method's ratio is the median over
the rounds of its time by that of its baseline in the same round.
"""

import functools
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hutchinson import value_and_hutchinson

import hesscale_jax as hs

BASELINE = "value_and_grad"
TORCH_BASELINE = "PyTorch gradient"
# By name, what `value_and_hesscale` is told: a row in each table.
HESSCALE: dict[str, dict[str, Any]] = {
    "HesScale": {},
    "HesScaleGN": {"curvature": "gauss_newton"},
    "HesScale, bf16 products": {"product_dtype": jnp.bfloat16},
}
HUTCHINSON = "Hutchinson 1"
PACKAGES = ("jax", "jaxlib", "optax", "python-somax", "torch", "backpack-for-pytorch")
MINIMUM_SECONDS = 0.02  # a shorter function is called several times for one measurement

Summary = dict[str, float]


class Cost(NamedTuple):
    """What the compiler says of a program."""

    flops: float
    bytes_accessed: float
    temporary_bytes: float
    trace_seconds: float
    compile_seconds: float


class Program(NamedTuple):
    """A method that is ready to be timed, and the name of the one that it is compared with."""

    calls: Sequence[Callable[[], Any]]  # What is timed is their mean.
    cost: Cost | None = None
    baseline: str = BASELINE
    wait: Callable[[Any], Any] = jax.block_until_ready  # for what a call returns


Maker = Callable[[], Program]


def build(method: Callable[..., Any], *cases: tuple[Any, ...]) -> Program:
    """Compiles a method for arguments that differ in value alone."""
    traced, trace_seconds = trace(method, *cases[0])
    start = time.perf_counter()
    compiled = traced.lower().compile()
    compile_seconds = time.perf_counter() - start
    analysis = compiled.cost_analysis()
    cost = Cost(
        analysis["flops"],
        analysis["bytes accessed"],
        compiled.memory_analysis().temp_size_in_bytes,
        trace_seconds,
        compile_seconds,
    )
    return Program([functools.partial(compiled, *args) for args in cases], cost)


def trace(method: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The traced method, and the seconds that it took from empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(method).trace(*args)
    return traced, time.perf_counter() - start


def basic_methods(loss: Callable[..., jax.Array], args: tuple[Any, ...]) -> dict[str, Maker]:
    """The gradient, both kinds of HesScale, and one sample of Hutchinson's estimate."""
    methods = {BASELINE: functools.partial(build, jax.value_and_grad(loss), args)}
    for name, options in HESSCALE.items():
        method = hs.value_and_hesscale(loss, **options)
        methods[name] = functools.partial(build, method, args)
    keyed = (jax.random.key(0), *args)
    methods[HUTCHINSON] = functools.partial(build, value_and_hutchinson(loss), keyed)
    return methods


def interleave(
    programs: Mapping[str, Program], seconds: float, rounds: int
) -> Iterator[dict[str, float]]:
    """Seconds per call of every program, round by round; every other round in reverse order.

    There are so many rounds at least, and more until the time is up.
    """
    for program in programs.values():
        _seconds_per_call(program, repeats=1)
    repeats = {
        name: math.ceil(MINIMUM_SECONDS / _seconds_per_call(program, repeats=1))
        for name, program in programs.items()
    }
    order = list(programs)
    start = time.perf_counter()
    while rounds > 0 or time.perf_counter() - start < seconds:
        yield {name: _seconds_per_call(programs[name], repeats[name]) for name in order}
        order.reverse()
        rounds -= 1


def _seconds_per_call(program: Program, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        for call in program.calls:
            result = call()
    program.wait(result)
    return (time.perf_counter() - start) / (repeats * len(program.calls))


def summarise(
    programs: Mapping[str, Program], times: Sequence[dict[str, float]]
) -> dict[str, Summary]:
    """By method: milliseconds and ratios to the baseline; if compiled, what the compiler says."""
    results = {}
    for name, program in programs.items():
        low, median, high = statistics.quantiles(
            [t[name] / t[program.baseline] for t in times], n=4, method="inclusive"
        )
        results[name] = {
            "ms": 1e3 * statistics.median(t[name] for t in times),
            "ratio": median,
            "ratio_lower_quartile": low,
            "ratio_upper_quartile": high,
        }
        cost, baseline = program.cost, programs[program.baseline].cost
        if cost and baseline:
            results[name] |= {
                "flops_ratio": cost.flops / baseline.flops,
                "bytes_ratio": cost.bytes_accessed / baseline.bytes_accessed,
                "temporary_memory_ratio": cost.temporary_bytes / baseline.temporary_bytes,
                "trace_seconds": cost.trace_seconds,
                "compile_seconds": cost.compile_seconds,
            }
    return results


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "cpus": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def describe(machine: dict[str, Any]) -> str:
    packages = " ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return f"{machine['device']}, {machine['cpus']} CPUs; {packages}"


def _processor() -> str:
    """Its name; on other systems than Linux just "cpu"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "cpu")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
