"""What the diagonal costs: HesScale and its peers beside the gradient of the same loss.

Every method is compiled before anything is timed. The rounds then alternate between the methods in
one process, so that a change of the machine's speed meets all of them alike. Columns:

    ms            median time of one call
    ratio         median over the rounds of (time of the method) / (time of the gradient), then the
                  quartiles
    FLOPs, bytes, temp   XLA's count of the compiled program's operations, of the bytes that they
                  access, and of its temporary memory, relative to those of the gradient
    trace, compile   seconds, once, with JAX's caches cleared before

The gradient is `jax.value_and_grad`; for PyTorch's methods, PyTorch's own. It takes three matrix
products a layer and HesScale two more, so that 5/3 is the floor (a little less, as the first layer
needs no gradient of its input). Every method returns the value and the gradient too:

    HesScale, HesScaleGN   this library, `curvature="hessian"` and `"gauss_newton"`
    HesScale, bf16 products   with `product_dtype=jnp.bfloat16`
    Hutchinson 1           one sample `z * (H z)`; drawing it is part of the call
    every 10               the mean over ten steps of `value_and_hesscale_every(10)`, of which one
                           computes the diagonal: in one program with a branch, which fills
                           `hess_diag` with zeros at the other nine; or in two, of which the second
                           leaves it out, as the compiler does where it goes into an optimizer with
                           `refreshed=False`
    factors                `value_and_factors`: the diagonal, and of each layer the inputs' second
                           moment and the outputs' curvature; also at every tenth step alone
    ... optax, somax       estimators of Sophia and AdaHessian, and the exact diagonal: `peers.py`
    ... BackPACK           in PyTorch, of the networks that it can do: `peers_torch.py`

What it leaves in `docs/results/data` is `cost.json`, `cost.md` and `cost.png`. Models that were
measured before on the same machine stay in them.

    python benchmarks/cost.py                    everything, about a quarter of an hour on two cores
    python benchmarks/cost.py --models gpt-256 3c3d-relu --methods HesScale --output /tmp/cost
    python benchmarks/cost.py --models           only draws what was measured before
    python benchmarks/cost.py --gpu              large models in float32 and bfloat16: cost-gpu.*
    python benchmarks/cost.py --gpu --quick      HesScale alone, at most 6 minutes: cost-gpu-quick.*
    python benchmarks/cost.py --gpu --quick --small --output /tmp/cost    on a CPU, to see it run
    python benchmarks/cost.py --scaling          over width, depth, batch, ...: `scaling.py`
    python benchmarks/cost.py --tracing          time to trace and to compile: `tracing.py`
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import peers
import scaling
import tracing
from matplotlib.figure import Figure
from models import COST_TASKS, GPU_TASKS, SMALL_GPU_TASKS, Task
from rich.progress import Progress
from table import Table, console, save
from timing import (
    BASELINE,
    TORCH_BASELINE,
    Cost,
    Maker,
    Program,
    basic_methods,
    build,
    describe,
    interleave,
    machine,
    summarise,
)

import hesscale_jax as hs

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "data"
EVERY = 10  # steps that one diagonal serves
FLOOR = 5 / 3
TASKS = COST_TASKS | GPU_TASKS
DTYPES = ("float32", "bfloat16")
# What one GPU measures in 6 minutes. Convolutions are as fast in both types, so one will do.
QUICK = [
    *itertools.product(("mlp-4096-relu", "gpt2-small-scanned"), DTYPES),
    ("resnet-18-256", "bfloat16"),
]

Result = dict[str, Any]  # "methods": by name, their summaries; "unavailable": by name, the reason


def methods_for(task: Task, dtype: str, every: bool) -> dict[str, Maker]:
    params, batch = task.draw(0, dtype)
    keyed = (jax.random.key(0), params, *batch)
    methods = basic_methods(task.loss, (params, *batch))
    if every:
        methods |= every_so_often(task, (params, *batch))
    for name, method in peers.methods(task, params).items():
        methods[name] = functools.partial(build, method, keyed)
    if importlib.util.find_spec("backpack"):
        import peers_torch

        methods |= peers_torch.methods(task, dtype)
    return methods


def every_so_often(task: Task, args: tuple[Any, ...]) -> dict[str, Maker]:
    every = hs.value_and_hesscale_every(EVERY)(task.loss)
    factors = hs.value_and_factors_every(EVERY)(task.loss)
    steps = [(jnp.asarray(step), *args) for step in range(EVERY)]
    return {
        f"every {EVERY}, a branch": functools.partial(build, every, *steps),
        f"every {EVERY}, two programs": functools.partial(two_programs, every, args),
        "factors": functools.partial(build, hs.value_and_factors(task.loss), args),
        f"factors every {EVERY}, two programs": functools.partial(two_programs, factors, args),
    }


def two_programs(method: Any, args: tuple[Any, ...]) -> Program:
    def without_curvature(*args: Any) -> Any:
        value, (grad, _), _ = method(1, *args)
        return value, grad

    return taking_turns(build(functools.partial(method, 0), args), build(without_curvature, args))


def taking_turns(fresh: Program, stale: Program) -> Program:
    """Ten steps, the first by the one program and the others by the other."""

    assert fresh.cost
    assert stale.cost
    one, other = fresh.cost, stale.cost
    cost = Cost(
        (one.flops + (EVERY - 1) * other.flops) / EVERY,
        (one.bytes_accessed + (EVERY - 1) * other.bytes_accessed) / EVERY,
        max(one.temporary_bytes, other.temporary_bytes),
        one.trace_seconds + other.trace_seconds,
        one.compile_seconds + other.compile_seconds,
    )
    return Program([*fresh.calls, *stale.calls * (EVERY - 1)], cost)


def measure(
    title: str, task: Task, dtype: str, options: argparse.Namespace, progress: Progress
) -> Result:
    bar = progress.add_task(title, total=None)
    programs, unavailable = {}, {}
    methods = methods_for(task, dtype, every=title in options.every)
    for name, make in methods.items():
        if name in (BASELINE, TORCH_BASELINE) or any(part in name for part in options.methods):
            progress.update(bar, description=f"{title}: compiling {name}")
            try:
                programs[name] = make()
            except NotImplementedError as error:
                unavailable[name] = str(error)
    progress.update(bar, description=f"{title}: timing")
    times = list(interleave(programs, options.seconds or 30, options.rounds))
    progress.remove_task(bar)
    return {
        "rounds": len(times),
        "methods": summarise(programs, times),
        "unavailable": unavailable,
    }


# What is reported

COLUMNS = {
    "FLOPs": "flops_ratio",
    "bytes": "bytes_ratio",
    "temp": "temporary_memory_ratio",
    "trace s": "trace_seconds",
    "compile s": "compile_seconds",
}


def table(title: str, result: Result) -> Table:
    rows = [
        [
            name,
            f"{r['ms']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_lower_quartile']:.2f} to {r['ratio_upper_quartile']:.2f}",
            *(f"{r[key]:.2f}" if key in r else "-" for key in COLUMNS.values()),
        ]
        for name, r in result["methods"].items()
    ]
    columns = ["", "ms", "ratio", "quartiles", *COLUMNS]
    rows += [[name, *"-" * (len(columns) - 1)] for name in result["unavailable"]]
    notes = [f"{name}: {reason}" for name, reason in result["unavailable"].items()]
    return Table(f"{title}, {result['rounds']} rounds", columns, rows, notes)


def tables(data: dict[str, Any]) -> list[Table]:
    results = data["results"]
    return [
        ratios(results, describe(data["machine"])),
        *(table(title, result) for title, result in results.items()),
    ]


def ratios(results: dict[str, Result], where: str) -> Table:
    names = method_names(results)
    rows = [
        [title, *(f"{r[name]['ratio']:.2f}" if name in r else "-" for name in names)]
        for title, r in ((title, result["methods"]) for title, result in results.items())
    ]
    return Table("Time as a multiple of the gradient's", ["", *names], rows, [where])


def method_names(results: dict[str, Result]) -> list[str]:
    """Those that are compared with a gradient, in the order of a task that has them all."""
    names = dict.fromkeys(
        name
        for result in sorted(results.values(), key=lambda result: -len(result["methods"]))
        for name in result["methods"]
    )
    return [name for name in names if name not in (BASELINE, TORCH_BASELINE)]


# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = {"HesScale": "#D55E00", "every": "#D55E00", "BackPACK": "#009E73", "": "#0072B2"}
WIDEST = 30  # ratios beyond it are drawn there


def draw(results: dict[str, Result], path: Path) -> None:
    names = method_names(results)
    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(
        figsize=(2 + 2.4 * columns, rows * (0.5 + 0.19 * len(names)) + 0.4), layout="constrained"
    )
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax, (title, result) in zip(axes, results.items(), strict=False):
        ax.set_title(title, fontsize=9)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.axvline(FLOOR, color="black", linewidth=0.8, linestyle=":")
        for y, name in enumerate(names):
            if name in result["methods"]:
                draw_ratio(ax, y, name, result["methods"][name])
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    axes[0].set(xscale="log", xlim=(0.85, 4 * WIDEST), ylim=(len(names) - 0.5, -0.5))
    axes[0].set_xticks(ticks := [1, 2, 5, 10, 30], ticks)
    axes[0].set_yticks(range(len(names)), names)
    for ax in axes:
        ax.minorticks_off()
        ax.tick_params(labelsize=8, labelbottom=True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "time as a multiple of the gradient's: median and quartiles; the dotted line is at 5/3",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)


def draw_ratio(ax: Any, y: int, name: str, summary: dict[str, float]) -> None:
    colour = next(colour for part, colour in COLOURS.items() if part in name)
    low, ratio, high = (
        min(summary[key], WIDEST)
        for key in ("ratio_lower_quartile", "ratio", "ratio_upper_quartile")
    )
    ax.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.4)
    ax.plot(ratio, y, "o" if ratio < WIDEST else ">", color=colour, markersize=4)
    ax.annotate(
        f"{summary['ratio']:,.{2 if summary['ratio'] < 10 else 0}f}",
        (high, y),
        (5, 0),
        textcoords="offset points",
        verticalalignment="center",
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", choices=TASKS, metavar="MODEL", help=", ".join(TASKS)
    )
    parser.add_argument("--methods", nargs="+", help="whose names contain one")
    parser.add_argument("--every", nargs="*", default=["mlp-1024-relu"], metavar="MODEL")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--seconds", type=float, help="of timing a model, 30, quick 10, or a size, 3"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--output", type=Path, help="where, without a suffix")
    parser.add_argument("--quick", action="store_true", help="with --gpu")
    parser.add_argument("--small", action="store_true", help="with --gpu, at sizes for a CPU")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--gpu", action="store_true")
    modes.add_argument("--scaling", action="store_true")
    modes.add_argument("--tracing", action="store_true")
    options = parser.parse_args()
    if (options.quick or options.small) and not options.gpu:
        parser.error("--quick and --small go with --gpu")

    options.methods = options.methods or (["HesScale"] if options.quick else [""])
    options.seconds = options.seconds or (10 if options.quick else None)
    if missing := [name for name in ("somax", "backpack") if not importlib.util.find_spec(name)]:
        print(
            f"Without {' and '.join(missing)}. To install what is missing: pip install '.[peers]'"
        )
    jax.block_until_ready(jax.jit(jax.grad(jnp.sin))(1.0))  # start JAX up before it is timed
    if options.scaling:
        scaling.run(options.output or RESULTS / "scaling", options.seconds or 3, options.rounds)
    elif options.tracing:
        tracing.run(options.output or RESULTS / "tracing")
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    if options.quick:
        cases, name = QUICK, "cost-gpu-quick"
    elif options.gpu:
        cases, name = [*itertools.product(GPU_TASKS, DTYPES)], "cost-gpu"
    else:
        cases, name = [(model, "float32") for model in COST_TASKS], "cost"
    if options.models is not None or options.dtype:
        models, dtypes = (dict.fromkeys(column) for column in zip(*cases, strict=True))
        chosen = models if options.models is None else options.models
        cases = [*itertools.product(chosen, options.dtype or dtypes)]
    tasks = TASKS | (SMALL_GPU_TASKS if options.small else {})

    stem = options.output or RESULTS / name
    path = stem.with_suffix(".json")
    data = json.loads(path.read_text()) if path.exists() else {"machine": None}
    if cases and data["machine"] != machine():
        data = {"machine": machine(), "results": {}}
    with Progress(console=console) as progress:
        for model, dtype in cases:
            title = model if dtype == "float32" else f"{model}, {dtype}"
            result = measure(title, tasks[model], dtype, options, progress)
            data["results"][title] = result
            table(title, result).show()
            save(stem, tables(data), data)
    for each in tables(data)[:1]:
        each.show()
    draw(data["results"], stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
