"""What the Hessian and its diagonal are.

    make figures                      every figure
    python docs/figures/hessian.py    hessian_1d.png, hessian_2d.png, hessian_matrix.png

hessian_1d.png: two parabolas of curvature 4 and 0.5, with the slope before and after a step of 1;
and Newton's step on a loss, from where its curvature is positive and from where it is negative.
hessian_2d.png: steps on a quadratic with its valley along an axis, and with the valley turned. The
gradient's step is as long as lowers the loss most.
hessian_matrix.png: the Hessian of an MLP with 3 inputs, two tanh layers of 4 and 3 units and 3
classes, exact, by `jax.hessian`; and its diagonal in the shape of the layers, biases below.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _style import GAUSS_NEWTON, HESSCALE, HUTCHINSON, options
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from models import cross_entropy

WIDTHS = (3, 4, 3, 3)


def well(x: jax.Array) -> jax.Array:
    return 1 - jnp.exp(-(x**2) / 2)


def in_one_dimension(path: Path) -> None:
    figure = Figure(figsize=(8, 3.3))
    left, right = figure.subplots(1, 2)
    x = np.linspace(-2.2, 2.2, 200)
    for curvature, colour in (4, HESSCALE), (0.5, HUTCHINSON):
        left.plot(x, curvature * x**2 / 2, color=colour)
        for at in (0, 1):
            along = np.array([at - 0.45, at + 0.45])
            tangent = curvature * at**2 / 2 + curvature * at * (along - at)
            left.plot(along, tangent, color=colour, linewidth=3, alpha=0.4)
            left.plot(at, curvature * at**2 / 2, "o", color=colour, markersize=4)
    left.text(1.25, 2.2, "curvature 4:\nslope 0 to 4", color=HESSCALE)
    left.text(1.15, -0.35, "curvature 0.5: slope 0 to 0.5", color=HUTCHINSON, ha="center", va="top")
    left.set(xlim=(-2.2, 2.6), ylim=(-0.9, 4.2), xlabel="parameter", ylabel="loss")

    right.plot(x, well(x), color="black")
    for start, colour, place in (-0.5, GAUSS_NEWTON, "f'' > 0"), (1.35, HESSCALE, "f'' < 0"):
        value, slope, curvature = (
            f(start) for f in (well, jax.grad(well), jax.grad(jax.grad(well)))
        )
        step = -slope / curvature
        near = np.linspace(start - 0.9, start + 0.9, 50)
        model = value + slope * (near - start) + curvature * (near - start) ** 2 / 2
        right.plot(near, model, color=colour, linestyle="--", linewidth=1)
        right.plot(start, value, "o", color=colour)
        head = {"arrowstyle": "->", "color": colour, "linewidth": 1.8}
        right.annotate("", (start + step, value), (start, value), arrowprops=head)
        right.text(start - 0.12, value, place, color=colour, ha="right", va="center")
    right.text(3.5, 1.25, "dashed: quadratic model\narrow: Newton's step", ha="right", va="top")
    right.set(xlim=(-2.2, 3.6), ylim=(-0.25, 1.3), xlabel="parameter")
    for ax in (left, right):
        ax.set(xticks=[], yticks=[])
    figure.savefig(path)


def in_two_dimensions(path: Path) -> None:
    figure = Figure(figsize=(8, 3.9))
    start = np.array([-2.4, 1.2])
    for ax, angle in zip(figure.subplots(1, 2, sharey=True), (0, np.pi / 5), strict=True):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        hessian = turn @ np.diag([1, 8]) @ turn.T
        grid = np.stack(np.meshgrid(np.linspace(-3.2, 2, 100), np.linspace(-2, 2.2, 100)), axis=-1)
        heights = np.einsum("...i,ij,...j->...", grid, hessian, grid) / 2
        ax.contour(
            grid[..., 0],
            grid[..., 1],
            heights,
            np.geomspace(0.2, 30, 9),
            colors="0.8",
            linewidths=0.9,
        )
        gradient = hessian @ start
        steps = {
            "gradient": gradient * (gradient @ gradient) / (gradient @ hessian @ gradient),
            "gradient / diagonal": gradient / np.diag(hessian),
            "Newton": np.linalg.solve(hessian, gradient),
        }
        for (name, step), colour, width in zip(
            steps.items(), [HUTCHINSON, HESSCALE, "black"], [2, 4, 1.5], strict=True
        ):
            head = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0}
            ax.annotate("", start - step, start, arrowprops=head | {"shrinkB": 0})
            ax.plot([], [], color=colour, linewidth=width, label=name)
        ax.plot(0, 0, "*", color="black", markersize=11)
        ax.plot(*start, "o", color="black")
        ax.set(aspect="equal", xticks=[], yticks=[])
        rows = "\n".join(f"{a + 0:4.1f} {b + 0:4.1f}" for a, b in hessian)
        box = {"facecolor": "white", "edgecolor": "0.7"}
        ax.text(-3.05, -1.85, rows, family="monospace", bbox=box)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path)


def as_matrix(path: Path) -> None:
    keys = jax.random.split(jax.random.key(1), len(WIDTHS))
    params = [
        (jax.random.normal(key, (m, n)) / np.sqrt(m), jnp.zeros(n))
        for key, m, n in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    x = jax.random.normal(keys[-1], (16, WIDTHS[0]))
    labels = jnp.arange(16) % WIDTHS[-1]
    flat, unravel = ravel_pytree(params)

    def loss(flat: jax.Array) -> jax.Array:
        y = x
        *hidden, (kernel, bias) = unravel(flat)
        for k, b in hidden:
            y = jnp.tanh(y @ k + b)
        return cross_entropy(y @ kernel + bias, labels)

    hessian = jax.jit(jax.hessian(loss))(flat)
    norm = SymLogNorm(1e-2, vmin=-0.3, vmax=0.3)
    image = {"norm": norm, "cmap": "RdBu_r", "interpolation": "nearest"}
    figure = Figure(figsize=(8, 4.6))
    left, *right = figure.subplot_mosaic(
        [["all", "0"], ["all", "1"], ["all", "2"]], width_ratios=[3, 1]
    ).values()
    shown = left.imshow(hessian, **image)
    mark_layers(left, [(m + 1) * n for m, n in zip(WIDTHS, WIDTHS[1:], strict=False)])
    for index, (ax, (kernel, bias)) in enumerate(
        zip(right, unravel(jnp.diagonal(hessian)), strict=True), 1
    ):
        ax.imshow(np.vstack([kernel, bias]), **image)
        ax.axhline(len(kernel) - 0.5, color="black", linewidth=0.8)
        ax.set(xticks=[], yticks=[], ylabel=f"layer {index}")
    bar = figure.colorbar(shown, ax=right, ticks=[-0.1, -0.01, 0, 0.01, 0.1], format="%g")
    bar.ax.minorticks_off()
    left.set_xlabel("Hessian")
    right[-1].set_xlabel("its diagonal")
    figure.savefig(path)
    print(f"{flat.size} parameters, {flat.size**2} entries, ", end="")
    print(f"{jnp.abs(jnp.diagonal(hessian)).sum() / jnp.abs(hessian).sum():.2f} on the diagonal")


def mark_layers(ax: Axes, sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    for end in ends[:-1] - 0.5:
        ax.axhline(end, color="black", linewidth=0.8)
        ax.axvline(end, color="black", linewidth=0.8)
    names = [f"layer {i}" for i in range(1, len(sizes) + 1)]
    ax.set_yticks(ends - np.divide(sizes, 2), names)
    ax.set_xticks(ends - np.divide(sizes, 2), names)
    ax.tick_params(length=0)


def main(options: argparse.Namespace) -> None:
    in_one_dimension(options.output / "hessian_1d.png")
    in_two_dimensions(options.output / "hessian_2d.png")
    as_matrix(options.output / "hessian_matrix.png")


if __name__ == "__main__":
    main(options(__doc__))
