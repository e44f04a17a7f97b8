"""Optimal brain damage: the weights that a network can do without.

    python examples/pruning.py

Setting a weight w to 0 changes the loss of a trained network by about h w^2 / 2, with h from the
diagonal of the Hessian. LeCun, Denker and Solla (1989) prune the weights of which this saliency is
least, and compute h with a backward pass that drops off-diagonal terms, as HesScale does. Here an
MLP loses up to 99 % of its weights at a stroke and is not trained again. What is left of its test
accuracy is set beside other rankings of the weights, random and by magnitude among them.

At a minimum no h is negative, but training stops short of one, and a third of HesScale's are: their
absolute value is taken. The Gauss-Newton diagonal, of HesScaleGN, has none. All saliencies are in
units of the loss, so that weights are ranked across layers. Biases are few, and stay.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import BATCH_SIZE, COLOURS, NOISE, Digits, LinenMLP, Params, cross_entropy, load
from jax import Array
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from tqdm import trange

import hesscale_jax as hs

MLP = LinenMLP()
LEFT = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # Fractions of the weights.
OUTPUT = Path(__file__).parent / "out" / "pruning.png"


@jax.jit
def init(key: Array) -> Params:
    return MLP.init(key, jnp.zeros([1, 8, 8, 1]))


@jax.jit
def loss(params: Params, images: Array, labels: Array) -> Array:
    return cross_entropy(MLP.apply(params, images), labels)


@jax.jit
def accuracy(params: Params, images: Array, labels: Array) -> Array:
    return (MLP.apply(params, images).argmax(-1) == labels).mean()


@partial(jax.jit, static_argnames=("loss", "epochs"))
def train(
    loss: Callable[[Params, Array, Array], Array],
    params: Params,
    images: Array,
    labels: Array,
    epochs: int,
    key: Array,
) -> Params:
    """Trains with Adam, on images with new noise at every step."""
    steps = epochs * len(labels) // BATCH_SIZE
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry: tuple[Params, optax.OptState], key: Array) -> tuple:
        params, opt_state = carry
        for_rows, for_noise = jax.random.split(key)
        rows = jax.random.randint(for_rows, [BATCH_SIZE], 0, len(labels))
        grads = jax.grad(loss)(params, noisy(images[rows], for_noise), labels[rows])
        updates, opt_state = adam.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), jax.random.split(key, steps))
    return params


def noisy(images: Array, key: Array) -> Array:
    return images + NOISE * jax.random.normal(key, images.shape)


@jax.jit
def squared_gradient(params: Params, images: Array, labels: Array) -> Params:
    """Mean over images of the squared gradient: the empirical Fisher information."""

    def of_one(example: tuple[Array, Array]) -> Params:
        image, label = example
        return jax.tree.map(jnp.square, jax.grad(loss)(params, image[None], label[None]))

    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(of_one, (images, labels)))


@jax.jit
def gauss_newton(params: Params, images: Array) -> Params:
    """The exact diagonal, and of a cross-entropy the Fisher information: 10 gradients an image."""

    def of_one(image: Array) -> Params:
        def log_probabilities(params: Params) -> Array:
            return jax.nn.log_softmax(MLP.apply(params, image[None])[0])

        probabilities = jnp.exp(log_probabilities(params))
        scores = jax.jacrev(log_probabilities)(params)
        return jax.tree.map(lambda s: jnp.tensordot(probabilities, s**2, axes=1), scores)

    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(of_one, images))


@partial(jax.jit, static_argnames="curvature")
def hesscale(params: Params, images: Array, labels: Array, curvature: str) -> Params:
    _, hess_diag = hs.hesscale(loss, curvature=curvature)(params, images, labels)
    return hess_diag


def saliencies(params: Params, images: Array, labels: Array, key: Array) -> dict[str, Params]:
    flat, unravel = ravel_pytree(params)
    diagonals = {
        "squared gradient": squared_gradient(params, images, labels),
        "exact Gauss-Newton": gauss_newton(params, images),
        "HesScale": hesscale(params, images, labels, "hessian"),
        "HesScaleGN": hesscale(params, images, labels, "gauss_newton"),
    }
    return {
        "random": unravel(jax.random.uniform(key, flat.shape)),
        "magnitude": jax.tree.map(jnp.abs, params),
        "magnitude, by layer": jax.tree.map(lambda w: ranks(jnp.abs(w)) / w.size, params),
    } | {
        name: jax.tree.map(lambda h, w: jnp.abs(h) * w**2 / 2, diagonal, params)
        for name, diagonal in diagonals.items()
    }


def ranks(x: Array) -> Array:
    return x.ravel().argsort().argsort().reshape(x.shape)


@jax.jit
def prune(params: Params, saliency: Params, left: float) -> Params:
    """Sets all but this fraction of the weights to 0, the least salient first."""
    count = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1)
    saliency = jax.tree.map(lambda s: s if s.ndim > 1 else jnp.full_like(s, jnp.inf), saliency)
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.where(ranks(ravel_pytree(saliency)[0]) < (1 - left) * count, 0, flat))


def run(seed: int, epochs: int, train_set: Digits, test_set: Digits) -> dict[str, np.ndarray]:
    """Trains and prunes: [len(LEFT), 2] test accuracies and training losses of each saliency."""
    for_init, for_training, for_noise, for_random = jax.random.split(jax.random.key(seed), 4)
    params = train(loss, init(for_init), *train_set, epochs, for_training)
    # The loss that was trained on is the one with noise. Without, it has 15 times less curvature.
    train_set = Digits(noisy(train_set.images, for_noise), train_set.labels)
    results = {}
    for name, saliency in saliencies(params, *train_set, for_random).items():
        pruned = [prune(params, saliency, left) for left in LEFT]
        results[name] = np.array([(accuracy(p, *test_set), loss(p, *train_set)) for p in pruned])
    return results


def table(results: dict[str, np.ndarray]) -> str:
    """Mean and standard deviation over seeds."""
    lines = []
    for measure, title in enumerate(["test accuracy", "training loss"]):
        lines.append(f"{title:20}" + "".join(f"{left:>15.0%}" for left in LEFT))
        for name, runs in results.items():
            mean, std = runs.mean(axis=0)[:, measure], runs.std(axis=0)[:, measure]
            cells = (f"{m:7.3f} ± {s:.3f}" for m, s in zip(mean, std, strict=True))
            lines.append(f"{name:20}" + "".join(cells))
    return "\n".join(lines)


STYLES = {
    "random": {"color": "0.6"},
    "magnitude": {"color": "black"},
    "magnitude, by layer": {"color": "black", "linestyle": "--"},
    "squared gradient": {"color": "#009E73"},
    "exact Gauss-Newton": {"color": "#CC79A7"},
    "HesScale": {"color": COLOURS["AdaHesScale"]},
    "HesScaleGN": {"color": "#E69F00"},
}


def draw(results: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for measure, ax in enumerate(axes):
        for name, runs in results.items():
            mean, std = runs.mean(axis=0)[:, measure], runs.std(axis=0)[:, measure]
            ax.plot(LEFT, mean, label=name, linewidth=1.4, **STYLES[name])
            band = {"color": STYLES[name]["color"], "alpha": 0.1, "linewidth": 0}
            ax.fill_between(LEFT, mean - std, mean + std, **band)
        ax.set(xscale="log", xlabel="weights left", xlim=(1, min(LEFT)))
        ax.set_xticks(LEFT, [f"{left:.0%}" for left in LEFT])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="test accuracy", ylim=(0, 1))
    axes[1].set(ylabel="training loss", ylim=(0, None))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5, help="how many networks to prune")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to put the picture")
    parser.add_argument("--smoke", action="store_true", help="only try it: 1 seed, 5 epochs")
    args = parser.parse_args()
    seeds, epochs = (1, 5) if args.smoke else (args.seeds, args.epochs)

    train_set, test_set = load()
    train_set = Digits(*map(jnp.asarray, train_set))
    runs = [run(seed, epochs, train_set, test_set) for seed in trange(seeds, unit="network")]
    results = {name: np.stack([run[name] for run in runs]) for name in STYLES}
    draw(results, args.output)
    print(table(results))
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()
