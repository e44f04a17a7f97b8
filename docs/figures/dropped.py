"""What HesScale drops of the Hessian of a hidden layer, and what that costs with depth.

    make figures                      every figure
    python docs/figures/dropped.py    dropped.png

Left, one example in an MLP of three tanh layers of 8 units: the exact Hessian with respect to the
activations of each layer, above what HesScale hands to the layer before it: a diagonal. Right, the
error of the whole diagonal of the parameters' Hessian, `sum |estimate - exact| / sum |exact|`, in
MLPs of width 8 of so many hidden layers, batch 8, 10 classes, mean of 5 seeds; and for scale
Hutchinson's estimate of the tanh network with 1 and 50 samples.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _style import GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, PINK, options
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from models import Activation, cross_entropy, mlp_task
from quality import WHOLE, exact_diagonals, measure

import hesscale_jax as hs

WIDTH, LAYERS, CLASSES = 8, 3, 10
DEPTHS = (1, 2, 4, 8)
VARIANTS: dict[str, tuple[Activation, bool, str]] = {
    "tanh": (jnp.tanh, False, HESSCALE),
    "ReLU": (jax.nn.relu, False, GAUSS_NEWTON),
    "ReLU, residual": (jax.nn.relu, True, PINK),
}


def hidden_hessians() -> list[tuple[jax.Array, jax.Array]]:
    """Of each layer's activations, the exact Hessian and HesScale's diagonal."""
    keys = jax.random.split(jax.random.key(0), LAYERS + 2)
    normal = functools.partial(jax.random.normal, dtype=jnp.float64)
    kernels = [normal(k, (WIDTH, WIDTH)) / np.sqrt(WIDTH) for k in keys[:LAYERS]]
    last = normal(keys[-2], (WIDTH, CLASSES)) / np.sqrt(WIDTH)
    x = normal(keys[-1], (WIDTH,))

    def rest(activations: jax.Array, layer: int) -> jax.Array:
        """The loss from the activations of a layer on."""
        for kernel in kernels[layer:]:
            activations = jnp.tanh(activations @ kernel)
        return cross_entropy(activations @ last, 0)

    @jax.jit
    def hessians(x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        found = []
        for layer, kernel in enumerate(kernels, 1):
            x = jnp.tanh(x @ kernel)
            _, diagonal = hs.hesscale(rest)(x, layer)
            found.append((jax.hessian(rest)(x, layer), diagonal))
        return found

    return hessians(x)


def errors(
    activation: Activation, residual: bool, depth: int, counts: tuple[int, ...], seeds: int
) -> dict[str, float]:
    widths = [WIDTH] * (depth + 1)
    task = mlp_task(8, *widths, CLASSES, activation=activation, residual=residual)
    exact = functools.partial(exact_diagonals, task)
    return measure(task, exact, counts, seeds, lambda: None)[WHOLE]


def by_depth(ax: Axes, depths: tuple[int, ...], seeds: int) -> None:
    hutchinson = {1: ("s--", 1.35), 50: ("s:", 1.35)}
    for name, (activation, residual, colour) in VARIANTS.items():
        found = [errors(activation, residual, depth, tuple(hutchinson), seeds) for depth in depths]
        y = [each["HesScale"] for each in found]
        ax.plot(depths, y, "o-", color=colour, markersize=4, label=name)
        print(f"{name:20}", *(f"{each:.2g}" for each in y))
        if name != "tanh":
            continue
        for count, (line, away) in hutchinson.items():
            y = [each[f"Hutchinson {count}"] for each in found]
            ax.plot(depths, y, line, color=HUTCHINSON, markersize=4)
            label = f"Hutchinson {count}, tanh"
            place = (depths[-1], y[-1] * away)
            ax.text(*place, label, color=HUTCHINSON, fontsize=8, ha="right", va="center")
            print(f"{label:20}", *(f"{each:.2g}" for each in y))
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(yscale="log", xlabel="hidden layers", ylabel="error of the diagonal", ylim=(0.02, 25))
    ax.set_xticks(depths)
    ax.set_yticks(ticks := [0.1, 1, 10], ticks)
    ax.legend(loc="lower right", fontsize=8)


def main(options: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    figure = Figure(figsize=(8.5, 3.5))
    left, right = figure.subfigures(1, 2, width_ratios=[1.4, 1])
    axes = left.subplots(2, LAYERS)
    hessians = hidden_hessians()
    largest = float(max(jnp.abs(exact).max() for exact, _ in hessians))
    norm = SymLogNorm(largest / 10, vmin=-largest, vmax=largest)
    for layer, (column, (exact, diagonal)) in enumerate(zip(axes.T, hessians, strict=True), 1):
        kept = np.where(np.eye(WIDTH, dtype=bool), diagonal, np.nan)
        for ax, matrix in zip(column, (exact, kept), strict=True):
            ax.imshow(matrix, norm=norm, cmap="RdBu_r", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
        column[0].set_title(f"layer {layer}", fontsize=10)
        error = np.abs(diagonal - np.diag(exact)).sum() / np.abs(np.diag(exact)).sum()
        column[1].set_xlabel(f"error {error:.2f}")
        print(f"layer {layer}: error of the activations' diagonal {error:.3f}")
    axes[0, 0].set_ylabel("exact")
    axes[1, 0].set_ylabel("HesScale keeps")
    by_depth(right.subplots(), *((1,), 1) if options.smoke else (DEPTHS, 5))
    figure.savefig(options.output / "dropped.png")


if __name__ == "__main__":
    main(options(__doc__))
