"""HesScale's diagonal against the exact one, a point for each parameter.

    make figures                      every figure
    python docs/figures/scatter.py    scatter.png

Three of the small models of `make benchmark-quality`, with their random parameters and a random
batch of 8, in float64. The error is `sum |HesScale - exact| / sum |exact|`, the rank correlation
Spearman's. Both axes are linear near 0 and logarithmic beyond.
"""

import argparse
import functools
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from _style import GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, LIGHT_BLUE, PINK, YELLOW, options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import QUALITY_TASKS, Task
from quality import EXACT, exact_diagonal, parameter_names
from scipy.stats import spearmanr

import hesscale_jax as hs

TITLES = {
    "MLP, 3 hidden, tanh": "MLP, 3 hidden layers, tanh",
    "CNN, max-pool relu": "CNN, max-pooling, ReLU",
    "GPT, 2 layers": "GPT, 2 layers",
}


SMOKE = {"MLP, 1 hidden, tanh": "MLP"}
COLOURS = [HUTCHINSON, YELLOW, GAUSS_NEWTON, PINK, HESSCALE, LIGHT_BLUE]


def diagonals(task: Task) -> dict[str, np.ndarray]:
    """By layer: the exact diagonal and HesScale's, [2, parameters]."""
    params, batch = task.draw(0, jnp.float64)
    exact = jax.jit(functools.partial(exact_diagonal, task.loss))(params, *batch)[EXACT]
    _, estimate = jax.jit(hs.hesscale(task.loss))(params, *batch)
    by_layer = defaultdict(list)
    leaves = zip(parameter_names(params), *map(jax.tree.leaves, (exact, estimate)), strict=True)
    for name, *pair in leaves:
        by_layer[re.match(r"[a-z]+(\.\d+)?", name)[0]].append(np.stack(list(map(np.ravel, pair))))
    return {layer: np.concatenate(pairs, axis=1) for layer, pairs in by_layer.items()}


def draw(ax: Axes, title: str, by_layer: dict[str, np.ndarray]) -> str:
    exact, estimate = np.concatenate(list(by_layer.values()), axis=1)
    error = np.abs(estimate - exact).sum() / np.abs(exact).sum()
    rank = spearmanr(exact, estimate).statistic
    largest = 1.5 * np.abs(exact).max()
    ax.plot([-largest, largest], [-largest, largest], color=GREY, linewidth=0.8)
    for colour, (layer, points) in zip(COLOURS, by_layer.items(), strict=False):
        ax.scatter(*points, s=4, color=colour, label=layer, linewidths=0, alpha=0.7)
    top = 10 ** np.floor(np.log10(largest))
    for axis in "x", "y":
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=1e-3 * top, linscale=0.5)
    ticks = [-top, -1e-2 * top, 0, 1e-2 * top, top]
    ax.set(xlim=(-largest, largest), ylim=(-largest, largest), xticks=ticks, yticks=ticks, aspect=1)
    ax.minorticks_off()
    ax.tick_params(labelsize=8)
    ax.set_title(title, fontsize=10)
    ax.text(0.97, 0.03, f"error {error:.2f}\nrank {rank:.2f}", ha="right", transform=ax.transAxes)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
    ax.legend(**below, fontsize=8, markerscale=3, handletextpad=0, columnspacing=1)
    return f"{title:28} error {error:.3f}, rank {rank:.3f}, {exact.size} parameters"


def main(options: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    titles = SMOKE if options.smoke else TITLES
    figure = Figure(figsize=(8.5, 3.7))
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        print(draw(ax, title, diagonals(QUALITY_TASKS[name])))
        ax.set_xlabel("exact")
    axes[0].set_ylabel("HesScale")
    figure.savefig(options.output / "scatter.png")


if __name__ == "__main__":
    main(options(__doc__))
