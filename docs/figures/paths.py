"""Paths of five optimizers down the loss of a logistic regression with two weights.

    make figures                    every figure
    python docs/figures/paths.py    paths.png, and a table of the learning rates

One feature is ten times the other's size, and they are correlated: the valley is narrow and not
quite along an axis. HesScale's diagonal is the exact one here, as the model is linear. Each
optimizer has the learning rate that needs the fewest steps to be 99.9 % of the way down, and to
stay there, of a grid of eight a decade. All else is at its default, diagonal Newton's damping 1e-3.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _style import GAUSS_NEWTON, HESSCALE, HUTCHINSON, PINK, options
from matplotlib.figure import Figure

import hesscale_jax as hs

START = jnp.array([-1.1, 3.0])
RATES = 10 ** np.arange(-3, 2.01, 1 / 8)
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "gradient descent": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "Adam": optax.adam,
    "AdaHesScale": hs.adahesscale,
    "diagonal Newton": lambda rate: hs.diagonal_newton(rate, damping=1e-3),
}
COLOURS = ["black", HUTCHINSON, PINK, HESSCALE, GAUSS_NEWTON]


def data() -> tuple[jax.Array, jax.Array]:
    """Two correlated features, and labels that no weights get all right."""
    for_x, for_y = jax.random.split(jax.random.key(0))
    mix = jnp.array([[3.0, 0.1], [0.0, 0.3]])
    x = jax.random.normal(for_x, (200, 2)) @ mix
    return x, jax.random.bernoulli(for_y, jax.nn.sigmoid(x @ jnp.array([0.5, -2.0])))


X, Y = data()


def loss(weights: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(X @ weights, Y).mean()


def path(
    optimizer: Callable[[Any], optax.GradientTransformation], steps: int, rate: jax.Array
) -> jax.Array:
    """The weights before each step, [steps, 2]."""
    tx = optax.with_extra_args_support(optimizer(rate))

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        weights, state = carry
        grad, hess_diag = hs.hesscale(loss)(weights)
        updates, state = tx.update(grad, state, weights, hess_diag=hess_diag)
        return (optax.apply_updates(weights, updates), state), weights

    return jax.lax.scan(step, (START, tx.init(START)), length=steps)[1]


def best(
    optimizer: Callable[[Any], optax.GradientTransformation], target: float, most: int
) -> tuple[float, np.ndarray]:
    """The learning rate that is at the target first and stays there, and its path so far."""
    paths = jax.jit(jax.vmap(lambda rate: path(optimizer, most, rate)))(RATES)
    above = np.asarray(~(jax.vmap(jax.vmap(loss))(paths) <= target))
    steps = most - above[:, ::-1].argmax(axis=1)
    steps = np.where(above[:, -1], most, steps)
    first = int(steps.argmin())
    return float(RATES[first]), np.asarray(paths[first, : steps[first] + 1])


def minimum() -> jax.Array:
    """By Newton's method."""

    def step(_: int, weights: jax.Array) -> jax.Array:
        return weights - jnp.linalg.solve(jax.hessian(loss)(weights), jax.grad(loss)(weights))

    return jax.lax.fori_loop(0, 20, step, jnp.zeros(2))


def main(options: argparse.Namespace) -> None:
    most = 50 if options.smoke else 1000
    end = minimum()
    lowest = float(loss(end))
    target = lowest + 1e-3 * (float(loss(START)) - lowest)
    found = {name: best(optimizer, target, most) for name, optimizer in OPTIMIZERS.items()}
    for name, (rate, points) in found.items():
        print(f"{name:18} {len(points) - 1:5} steps at {rate:.3g}")
    print(f"Hessian at the minimum: {np.asarray(jax.hessian(loss)(end), float).round(3).tolist()}")

    figure = Figure(figsize=(8, 4.6))
    ax = figure.subplots()
    first, second = np.linspace(-1.5, 3, 120), np.linspace(-4.2, 3.6, 120)
    heights = jax.vmap(jax.vmap(loss))(jnp.stack(jnp.meshgrid(first, second), axis=-1)) - lowest
    ax.contour(first, second, heights, np.geomspace(0.002, 5, 14), colors="0.8", linewidths=0.8)
    for (name, (_, points)), colour in zip(found.items(), COLOURS, strict=True):
        label = f"{name}: {len(points) - 1} steps"
        ax.plot(*points.T, "o-", color=colour, markersize=2.5, linewidth=1.2, label=label)
    ax.plot(*end, "*", color="black", markersize=13)
    ax.set(xlabel="weight of the large feature", ylabel="weight of the small feature")
    ax.set(xlim=(first[0], first[-1]), ylim=(second[0], second[-1]))
    ax.legend(loc="lower right")
    figure.savefig(options.output / "paths.png")


if __name__ == "__main__":
    main(options(__doc__))
