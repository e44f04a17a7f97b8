"""Ratios to the gradient's time over width, depth, batch, sequence length and number of outputs.

One thing varies at a time, in float32. HesScale's ratio must not grow with the number of outputs:
what the last layer costs, it costs the gradient too. The picture's dotted line is at 5/3.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from matplotlib.figure import Figure
from models import Task, gpt_task, mlp_task
from rich.progress import Progress
from table import Table, console, save
from timing import (
    BASELINE,
    HESSCALE,
    HUTCHINSON,
    basic_methods,
    describe,
    interleave,
    machine,
    summarise,
)

Sizes = dict[int, Task]


def gpt_of_length(length: int) -> Task:
    return gpt_task(4, vocabulary=256, length=length, width=128, heads=4, layers=2)


SWEEPS: dict[str, Sizes] = {
    "width": {n: mlp_task(256, *[n] * 5, 10) for n in (64, 256, 1024, 2048)},
    "depth": {n: mlp_task(128, *[512] * n, 10) for n in (1, 4, 16, 32)},
    "batch": {n: mlp_task(n, *[512] * 5, 10) for n in (4, 16, 64, 256, 1024)},
    "sequence length": {n: gpt_of_length(n) for n in (32, 128, 512)},
    "outputs": {n: mlp_task(64, 256, 256, 256, n) for n in (10, 100, 1000, 10_000, 50_000)},
}
ABOUT = {
    "width": "MLP, ReLU, 4 hidden layers and 10 outputs, batch 256",
    "depth": "MLP, ReLU, so many layers, width 512 and 10 outputs, batch 128",
    "batch": "MLP, ReLU, 4 hidden layers of 512 and 10 outputs",
    "sequence length": "GPT, 2 layers, width 128, 4 heads, 256 tokens, batch 4",
    "outputs": "MLP, ReLU, 2 hidden layers of 256, batch 64",
}
METHODS = [*HESSCALE, HUTCHINSON]
COLOURS = ["#D55E00", "#009E73", "#0072B2"]


def run(stem: Path, seconds: float, rounds: int) -> None:
    results: dict[str, dict[int, Any]] = {sweep: {} for sweep in SWEEPS}
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=sum(map(len, SWEEPS.values())))
        for sweep, sizes in SWEEPS.items():
            for size, task in sizes.items():
                progress.update(bar, description=f"{sweep} {size}")
                params, batch = task.draw(0, jnp.float32)
                methods = basic_methods(task.loss, (params, *batch))
                programs = {name: make() for name, make in methods.items()}
                times = list(interleave(programs, seconds, rounds))
                results[sweep][size] = summarise(programs, times)
                progress.advance(bar)
    where = machine()
    tables = [table(sweep, by_size, describe(where)) for sweep, by_size in results.items()]
    for each in tables:
        each.show()
    save(stem, tables, {"machine": where, "results": results})
    draw(results, stem.with_suffix(".png"))


def table(sweep: str, results: dict[int, Any], where: str) -> Table:
    columns = [sweep, "gradient, ms"]
    for name in METHODS:
        columns += [name, "quartiles", "FLOPs"]
    rows = []
    for size, by_method in results.items():
        row = [f"{size:,}", f"{by_method[BASELINE]['ms']:.2f}"]
        for r in map(by_method.get, METHODS):
            row += [
                f"{r['ratio']:.2f}",
                f"{r['ratio_lower_quartile']:.2f} to {r['ratio_upper_quartile']:.2f}",
                f"{r['flops_ratio']:.2f}",
            ]
        rows.append(row)
    return Table(ABOUT[sweep], columns, rows, [where])


def draw(results: dict[str, dict[int, Any]], path: Path) -> None:
    figure = Figure(figsize=(2.7 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    for ax, (sweep, by_size) in zip(axes, results.items(), strict=True):
        for colour, name in zip(COLOURS, METHODS, strict=True):
            summaries = [by_method[name] for by_method in by_size.values()]
            low, ratio, high = (
                [r[key] for r in summaries]
                for key in ("ratio_lower_quartile", "ratio", "ratio_upper_quartile")
            )
            ax.plot(list(by_size), ratio, "o-", color=colour, label=name, markersize=3)
            ax.fill_between(list(by_size), low, high, color=colour, alpha=0.2, linewidth=0)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.axhline(5 / 3, color="black", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel=sweep)
        ax.minorticks_off()
        labels = [f"{n // 1000}k" if n >= 10_000 else f"{n}" for n in by_size]
        ax.set_xticks(list(by_size), labels, fontsize=8)
        ax.set_yticks(ticks := [1, 2, 5, 10, 20], ticks)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time as a multiple of the gradient's")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=100)
