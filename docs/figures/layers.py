"""The curvature of a layer's weights, in its coordinates and in the basis of its inputs.

    make figures                     every figure
    python docs/figures/layers.py    layers.png

layers.png, left: a quadratic bowl whose axes are turned against the coordinates, and Newton's step
by its diagonal; middle: the same bowl in the basis of its axes, where the diagonal is all there is.
Right: of the curvature of an output's weights, block by block, the share of its Frobenius norm that
is off the diagonal, for the three layers of an MLP on handwritten digits, trained for 100 steps.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _style import GAUSS_NEWTON, GREY, HESSCALE, options
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hesscale_jax as hs

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import digits

SIZES = (64, 32, 32, 10)


def bowl(ax: Axes, hessian: np.ndarray, start: np.ndarray, names: tuple[str, str]) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-2.2, 2.2, 200)] * 2), -1)
    value = np.einsum("...i,ij,...j", grid, hessian, grid) / 2
    ax.contour(*np.moveaxis(grid, -1, 0), np.sqrt(value), levels=8, colors=GREY, linewidths=0.7)
    step = -(hessian @ start) / np.diag(hessian)
    head = {"arrowstyle": "->", "color": HESSCALE, "linewidth": 2}
    ax.annotate("", start + step, start, arrowprops=head)
    ax.plot(*start, "o", color=HESSCALE)
    ax.plot(0, 0, "+", color="black", markersize=10)
    ax.set(xlabel=names[0], ylabel=names[1], aspect="equal", xticks=[], yticks=[])


def loss(params: list[jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return optax.softmax_cross_entropy_with_integer_labels(x @ params[-1], labels).mean()


def trained(steps: int) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    train, _ = digits.load()
    x, labels = jnp.asarray(train.images).reshape(-1, 64), jnp.asarray(train.labels)
    keys = jax.random.split(jax.random.key(0), len(SIZES) - 1)
    params = [
        jax.random.normal(key, (n, m)) / n**0.5
        for key, n, m in zip(keys, SIZES, SIZES[1:], strict=False)
    ]
    solver = optax.adam(3e-3)
    state = solver.init(params)

    @jax.jit
    def step(
        params: list[jax.Array], state: optax.OptState
    ) -> tuple[list[jax.Array], optax.OptState]:
        updates, state = solver.update(jax.grad(loss)(params, x, labels), state)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, x, labels


def blocks_by_layer(
    params: list[jax.Array], x: jax.Array, labels: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """The curvature of each output's weights, (outputs, inputs, inputs), and the inputs' basis."""

    def with_offsets(offsets: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        h, inputs = x, []
        for i, (w, offset) in enumerate(zip(params, offsets, strict=True)):
            inputs.append(h)
            h = h @ w + offset
            h = h if i == len(params) - 1 else jnp.tanh(h)
        value = optax.softmax_cross_entropy_with_integer_labels(h, labels).mean()
        return value, inputs

    zeros = [jnp.zeros((len(x), w.shape[1])) for w in params]
    transform = hs.hesscale(with_offsets, has_aux=True, curvature="gauss_newton")
    (_, curvatures), inputs = transform(zeros)
    found = []
    for rows, h in zip(inputs, curvatures, strict=True):
        blocks = jnp.einsum("ni,nj,nk->kij", rows, rows, h)
        found.append((blocks, jnp.linalg.eigh(blocks.sum(0))[1]))
    return found


def off_the_diagonal(
    params: list[jax.Array], x: jax.Array, labels: jax.Array
) -> tuple[list[float], list[float]]:
    """The share in the coordinates and in the basis, for each layer; the mean over its outputs."""
    coordinates, basis = [], []
    for blocks, v in blocks_by_layer(params, x, labels):
        for found, each in ((coordinates, blocks), (basis, v.T @ blocks @ v)):
            whole = jnp.sum(each**2, (1, 2))
            diagonal = jnp.sum(jnp.diagonal(each, axis1=1, axis2=2) ** 2, 1)
            found.append(float(jnp.mean(jnp.sqrt(1 - diagonal / whole))))
    return coordinates, basis


def main() -> None:
    chosen = options(__doc__)
    figure = Figure(figsize=(9.6, 3.2))
    left, middle, right = figure.subplots(1, 3)
    angle = 0.6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bends, start = np.diag([8.0, 0.5]), np.array([-1.6, -1.4])
    bowl(left, turn @ bends @ turn.T, start, ("weight of input 1", "weight of input 2"))
    left.set_title("coordinates")
    bowl(middle, bends, turn.T @ start, ("along $V_1$", "along $V_2$"))
    middle.set_title("basis of the inputs")

    coordinates, basis = off_the_diagonal(*trained(3 if chosen.smoke else 100))
    places = np.arange(len(basis))
    right.bar(places - 0.2, coordinates, 0.4, color=GREY, label="coordinates")
    right.bar(places + 0.2, basis, 0.4, color=GAUSS_NEWTON, label="basis of the inputs")
    right.set(xticks=places, xticklabels=[f"layer {i + 1}" for i in places], ylim=(0, 1.25))
    right.set_title("off the diagonal")
    right.legend(loc="upper center", ncols=2, fontsize=8)
    figure.savefig(chosen.output / "layers.png")


if __name__ == "__main__":
    main()
