"""What blocks are: the program of an MLP in blocks, and the error without them.

    make figures                     every figure
    python docs/figures/blocks.py    blocks_program.png, blocks_error.png

blocks_program.png: the steps that `hs.explain` reports of a GELU layer, LayerNorm and softmax
cross-entropy, with the primitives of each.
blocks_error.png: `sum |estimate - exact| / sum |exact|` for small models of random parameters, mean
of 5 seeds, with the rules as they are, and with a table of rules in which every pointwise
primitive and reduction stands alone: `hs.rules.dense`, exact for one equation, so that what is
dropped is dropped between primitives.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _style import GREY, HESSCALE, LIGHT_BLUE, YELLOW, options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from models import QUALITY_TASKS, Task, gpt_task
from quality import EXACT, absolute_sums, exact_diagonals

import hesscale_jax as hs

ALONE = dict(hs.RULES) | {
    name: hs.rules.dense
    for name, rule in hs.RULES.items()
    if isinstance(rule, hs.rules.Pointwise | hs.rules.Reduction)
}
TASKS = {
    "MLP, tanh": QUALITY_TASKS["MLP, 3 hidden, tanh"],
    "MLP, GELU": QUALITY_TASKS["MLP, 3 hidden, gelu"],
    "+ LayerNorm": QUALITY_TASKS["+ LayerNorm, gelu"],
    "GPT, 1 layer": gpt_task(2, vocabulary=10, length=4, width=8, heads=2, layers=1),
}


STEPS = ("linear", "GELU, LayerNorm", "linear", "cross-entropy", "mean")  # of `loss`

ARROW = {"arrowstyle": "-|>", "color": "black"}
LABEL = {
    "boxstyle": "round,pad=0.2",
    "facecolor": "white",
    "edgecolor": "0.6",
    "linewidth": 0.6,
}


def layer_norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def loss(params: dict[str, jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = layer_norm(jax.nn.gelu(x @ params["hidden"]))
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def program(path: Path) -> None:
    """The steps of `loss`, one above the other; lengths are in points."""
    params = {"hidden": jnp.ones((8, 16)), "out": jnp.ones((16, 5))}
    report = hs.explain(loss)(params, jnp.ones((32, 8)), jnp.zeros(32, int))
    width, height, line = 576, 262, 17
    figure = Figure(figsize=(width / 72, height / 72), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(-height, 0))
    ax.set_axis_off()
    top = 0
    for index, (step, what) in enumerate(zip(report.steps, STEPS, strict=True)):
        tall = flow(ax, step.primitives, 142, top - 19, 460, line) + 26
        colour = LIGHT_BLUE if step.rule == "block" else YELLOW
        corner = (130, top - 6 - tall)
        look = {"facecolor": colour, "alpha": 0.3, "edgecolor": "black"}
        rounded = "round,pad=0,rounding_size=5"
        ax.add_patch(FancyBboxPatch(corner, 340, tall, boxstyle=rounded, **look))
        middle = top - 6 - tall / 2
        ax.text(122, middle, what, ha="right")
        ax.text(122, middle - 2, step.rule, ha="right", va="top", color=GREY, fontsize=9)
        ax.text(478, middle, step.results[0], va="center", family="monospace", fontsize=9)
        top -= tall + 6
        if index + 1 < len(report.steps):
            ax.annotate("", (300, top - 19), (300, top), arrowprops=ARROW)
        if index in report.mixing:
            dropped = "off-diagonal terms dropped"
            ax.text(310, top - 9, dropped, color=HESSCALE, fontsize=9, va="center")
        top -= 13
    figure.savefig(path)


def flow(
    ax: Axes, words: tuple[str, ...], left: float, top: float, right: float, line: float
) -> float:
    """Writes words in lines, and returns the height of all lines but the first."""
    x, y = left, top
    for word in words:
        length = 4.8 * len(word) + 9  # of monospaced characters of size 8
        if x + length > right:
            x, y = left, y - line
        ax.text(x, y, word, family="monospace", fontsize=8, va="center", bbox=LABEL)
        x += length
    return top - y


def errors(task: Task, seeds: int) -> np.ndarray:
    """With blocks, and primitive by primitive."""

    @jax.jit
    def of(params: object, *batch: object) -> jax.Array:
        exact = exact_diagonals(task, params, *batch)[EXACT]
        estimates = [hs.hesscale(task.loss, rules=r)(params, *batch)[1] for r in (hs.RULES, ALONE)]
        differences = [jax.tree.map(jnp.subtract, each, exact) for each in estimates]
        return jnp.stack([absolute_sums(d)[0] for d in differences]) / absolute_sums(exact)[0]

    draws = (task.draw(seed, jnp.float64) for seed in range(seeds))
    return np.mean([of(params, *batch) for params, batch in draws], axis=0)


def main(options: argparse.Namespace) -> None:
    program(options.output / "blocks_program.png")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    names, seeds = (["MLP, GELU"], 1) if options.smoke else (list(TASKS), 5)
    figure = Figure(figsize=(7, 2.8))
    ax = figure.subplots()
    for place, name in enumerate(names):
        found = errors(TASKS[name], seeds)
        for error, colour, above in zip(found, (HESSCALE, GREY), (0.2, -0.2), strict=True):
            ax.barh(place - above, error, 0.36, color=colour)
            ax.text(error + 0.02, place - above, f"{error:.2f}", va="center", color=colour)
        print(f"{name:14} blocks {found[0]:.3f}, primitive by primitive {found[1]:.3f}")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("error of the diagonal")
    for text, colour, above in ("in blocks", HESSCALE, 0.2), ("primitive by primitive", GREY, -0.2):
        ax.text(0.35, -above, text, color=colour, va="center")
    figure.savefig(options.output / "blocks_error.png")


if __name__ == "__main__":
    main(options(__doc__))
