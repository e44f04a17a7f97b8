"""The Hessian's diagonal and the Gauss-Newton matrix's, exact and by HesScale, sorted.

    make figures                           every figure
    python docs/figures/gauss_newton.py    gauss_newton.png

An MLP of two tanh layers of 16 units on 256 of scikit-learn's handwritten digits, with
cross-entropy, in float64: as it is initialised, and after 300 steps of Adam on all of them. The
entries of each diagonal are sorted by themselves, so that a line is a distribution.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _style import GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, PINK, options
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import Task, mlp_task
from quality import EXACT, exact_diagonals
from sklearn.datasets import load_digits

import hesscale_jax as hs

STYLES = {
    "Hessian": (HUTCHINSON, "-"),
    "HesScale": (HESSCALE, "--"),
    "Gauss-Newton": (PINK, "-"),
    "HesScaleGN": (GAUSS_NEWTON, "--"),
}


def train(task: Task, params: Any, batch: tuple[Any, ...], steps: int) -> Any:
    adam = optax.adam(1e-2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(task.loss)(params, *batch), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return run((params, adam.init(params)))[0]


@functools.partial(jax.jit, static_argnums=0)
def diagonals(task: Task, params: Any, batch: tuple[Any, ...]) -> dict[str, jax.Array]:
    exact = exact_diagonals(task, params, *batch)
    trees = {
        "Hessian": exact[EXACT],
        "HesScale": hs.hesscale(task.loss)(params, *batch)[1],
        "Gauss-Newton": exact["exact GGN"],
        "HesScaleGN": hs.hesscale(task.loss, curvature="gauss_newton")(params, *batch)[1],
    }
    return {name: ravel_pytree(tree)[0] for name, tree in trees.items()}


def draw(ax: Axes, title: str, found: dict[str, np.ndarray]) -> None:
    for name, (colour, line) in STYLES.items():
        entries = np.sort(found[name])
        ax.plot(np.linspace(0, 1, entries.size), entries, line, color=colour, label=name)
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yscale("symlog", linthresh=1e-4)
    ax.set_yticks([-1e-2, -1e-3, -1e-4, 0, 1e-4, 1e-3, 1e-2, 1e-1])
    ax.minorticks_off()
    ax.set(xlabel="fraction of the parameters")
    ax.set_title(title, fontsize=10)


def error(estimate: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(estimate - exact).sum() / np.abs(exact).sum())


def main(options: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    examples, width, steps = (16, 4, 3) if options.smoke else (256, 16, 300)
    task = mlp_task(examples, 64, width, width, 10, activation=jnp.tanh)
    images, labels = load_digits(return_X_y=True)
    params, (rest, *_) = task.draw(0, jnp.float64)
    batch = (rest, jnp.asarray(images[:examples] / 16), jnp.asarray(labels[:examples]))

    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    stages = {"at initialisation": params, "trained": train(task, params, batch, steps)}
    for ax, (stage, params) in zip(axes, stages.items(), strict=True):
        found = jax.device_get(diagonals(task, params, batch))
        draw(ax, stage, found)
        print(f"{stage}: loss {task.loss(params, *batch):.3g}")
        for name, entries in found.items():
            against = (error(entries, found[exact]) for exact in ("Hessian", "Gauss-Newton"))
            print(f"  {name:12} negative {np.mean(entries < 0):.3f}, error against", end=" ")
            print("Hessian {:.3f}, Gauss-Newton {:.3f}".format(*against))
    axes[0].set_ylabel("entry of the diagonal")
    axes[0].legend(loc="lower right")
    figure.savefig(options.output / "gauss_newton.png")


if __name__ == "__main__":
    main(options(__doc__))
