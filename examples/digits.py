"""Adam, AdaHesScale and orthogonal_newton on handwritten digits, in flax.nnx and in flax.linen.

    python examples/digits.py

Trains a multi-layer perceptron and a convolutional network, each written in both frameworks, on
scikit-learn's 8x8 digits. Prints a table, and draws the loss against steps and against seconds.

The lines that matter are `gradient`, `diagonal` and `factors`, what each optimizer is fed, and
`train_step`, where it is.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen, nnx
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hesscale_jax as hs

Params = Any  # A pytree of arrays: linen's dict, or nnx's State.
Loss = Callable[[Params], Array]
Curvature = dict[str, Any]  # For the optimizer's `update`, by keyword.

BATCH_SIZE = 32
EVERY = 10  # Steps for which a layer's factors serve.
NOISE = 0.5  # Added to the training images, anew in every epoch, lest they be learnt by heart.
OUTPUT = Path(__file__).parent / "out" / "digits.png"


def gradient(loss: Loss, step: int, params: Params) -> tuple[Array, Params, Curvature]:
    value, grads = jax.value_and_grad(loss)(params)
    return value, grads, {}


def diagonal(loss: Loss, step: int, params: Params) -> tuple[Array, Params, Curvature]:
    value, (grads, hess_diag) = hs.value_and_hesscale(loss)(params)
    return value, grads, {"hess_diag": hess_diag}


def factors(loss: Loss, step: int, params: Params) -> tuple[Array, Params, Curvature]:
    """Of each layer, renewed at every tenth step."""
    value, (grads, found), refreshed = hs.value_and_factors_every(EVERY)(loss)(step, params)
    return value, grads, {"factors": found, "refreshed": refreshed}


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    derivatives: Callable[[Loss, int, Params], tuple[Array, Params, Curvature]]
    every: int = 1  # Steps from one that is compiled in another way to the next.


def train_step(
    apply: Callable[[Params, Array], Array],
    optimizer: Optimizer,
    step: int,
    params: Params,
    opt_state: optax.OptState,
    images: Array,
    labels: Array,
) -> tuple[Params, optax.OptState, Array]:
    def loss(params: Params) -> Array:
        return cross_entropy(apply(params, images), labels)

    value, grads, curvature = optimizer.derivatives(loss, step, params)
    updates, opt_state = optimizer.tx.update(grads, opt_state, params, **curvature)
    return optax.apply_updates(params, updates), opt_state, value


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizers(network: "Network", images: Array, steps: int) -> dict[str, Optimizer]:
    """The optimizers by name, for a run of so many steps.

    Each has one setting for all networks: orthogonal_newton its default rate, the others one that
    was chosen on training images that were held out. `eps` is in units of curvature, and larger
    than the paper's 1e-8, with which a weight that has hardly mattered so far may be thrown far
    away by the first batch in which it does.
    """
    layouts = hs.layouts(lambda params: network.apply(params, images).mean())(network.params)
    newton = optax.warmup_cosine_decay_schedule(0.0, 2e-2, max(1, steps // 20), steps)
    return {
        "Adam": Optimizer(optax.adam(optax.cosine_decay_schedule(1e-2, steps)), gradient),
        "AdaHesScale": Optimizer(
            hs.adahesscale(optax.cosine_decay_schedule(5e-3, steps), eps=1e-3), diagonal
        ),
        "orthogonal_newton": Optimizer(hs.orthogonal_newton(newton, layouts), factors, EVERY),
    }


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        x = images.reshape(len(images), -1)
        x = nnx.gelu(self.hidden1(x))
        x = nnx.gelu(self.hidden2(x))
        return self.logits(x)


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, images: Array) -> Array:
        x = images.reshape(len(images), -1)
        x = linen.gelu(linen.Dense(128)(x))
        x = linen.gelu(linen.Dense(64)(x))
        return linen.Dense(10)(x)


class NnxCNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.logits = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        x = nnx.max_pool(nnx.gelu(self.conv1(images)), (2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.gelu(self.conv2(x)), (2, 2), strides=(2, 2))
        return self.logits(x.reshape(len(x), -1))


class LinenCNN(linen.Module):
    @linen.compact
    def __call__(self, images: Array) -> Array:
        x = linen.gelu(linen.Conv(16, kernel_size=(3, 3))(images))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = linen.gelu(linen.Conv(32, kernel_size=(3, 3))(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        return linen.Dense(10)(x.reshape(len(x), -1))


class Network(NamedTuple):
    """A network as a pure function: all that the training below sees of either framework."""

    model: str
    framework: str
    params: Params
    apply: Callable[[Params, Array], Array]  # (params, images) -> logits

    @property
    def name(self) -> str:
        return f"{self.model} in {self.framework}"


def networks(seed: int) -> list[Network]:
    def from_nnx(model: str, module: nnx.Module) -> Network:
        graphdef, params = nnx.split(module, nnx.Param)
        return Network(model, "nnx", params, lambda p, x: nnx.merge(graphdef, p)(x))

    def from_linen(model: str, module: linen.Module) -> Network:
        params = module.init(jax.random.key(seed), np.zeros([1, 8, 8, 1], np.float32))
        return Network(model, "linen", params, module.apply)

    return [
        from_nnx("MLP", NnxMLP(nnx.Rngs(seed))),
        from_linen("MLP", LinenMLP()),
        from_nnx("CNN", NnxCNN(nnx.Rngs(seed))),
        from_linen("CNN", LinenCNN()),
    ]


class Digits(NamedTuple):
    images: np.ndarray  # (n, 8, 8, 1), float32
    labels: np.ndarray  # (n,), int32


def load() -> tuple[Digits, Digits]:
    """Returns 1437 images to train on and 360 to test on, the same ones every time.

    One mean and one scale for all pixels: scaled each by its own, the pixels in the corners, which
    are nearly always blank, would be the largest.
    """
    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.float32), digits.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    mean, std = train_images.mean(), train_images.std()
    return (
        Digits((train_images - mean) / std, train_labels),
        Digits((test_images - mean) / std, test_labels),
    )


class Point(NamedTuple):
    """Where a run is after so many steps."""

    steps: int
    seconds: float  # Of training alone, without compilation.
    loss: float  # On all training images, without noise.


@dataclass
class Run:
    """One network under one optimizer."""

    network: Network
    optimizer: str
    every: int
    step: Callable[..., tuple[Params, optax.OptState, Array]]
    params: Params
    opt_state: optax.OptState
    history: list[Point]  # After each epoch, and before the first.
    test_accuracy: float = 0.0

    def train(self, batches: Sequence[Digits]) -> float:
        """Trains for an epoch, and returns the seconds that it took."""
        start = time.perf_counter()
        # Not a lax.scan, in which convolutions on a CPU are several times slower: jax-ml/jax#12868.
        for step, batch in enumerate(batches, start=self.history[-1].steps):
            kind = min(step % self.every, 1)  # Static: one program for each.
            self.params, self.opt_state, _ = self.step(kind, self.params, self.opt_state, *batch)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    @property
    def seconds_per_epoch(self) -> float:
        return statistics.median(b.seconds - a.seconds for a, b in pairwise(self.history))


def compare(
    network: Network, train_set: Digits, test_set: Digits, epochs: int, seed: int, progress: tqdm
) -> list[Run]:
    """Trains a network under each optimizer, from the same start, on the same batches.

    The optimizers take turns, an epoch each, so that whatever else the machine is doing slows
    down all of them alike; and take turns at going first.
    """

    @jax.jit
    def evaluate(params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        logits = network.apply(params, images)
        return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean()

    epoch_steps = len(train_set.labels) // BATCH_SIZE
    first_batch = jax.device_put(Digits(*(part[:BATCH_SIZE] for part in train_set)))
    first_loss, _ = evaluate(network.params, *train_set)

    runs = []
    for name, optimizer in optimizers(network, first_batch.images, epochs * epoch_steps).items():
        progress.set_description(f"{network.name}, compiling {name}")
        step = jax.jit(partial(train_step, network.apply, optimizer), static_argnums=0)
        opt_state = optimizer.tx.init(network.params)
        for kind in range(min(optimizer.every, 2)):
            jax.block_until_ready(step(kind, network.params, opt_state, *first_batch))
        history = [Point(0, 0.0, float(first_loss))]
        runs.append(Run(network, name, optimizer.every, step, network.params, opt_state, history))

    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        noisy = train_set.images + NOISE * rng.standard_normal(train_set.images.shape, np.float32)
        order = rng.permutation(len(noisy))[: epoch_steps * BATCH_SIZE]
        batches = jax.device_put(
            [Digits(noisy[rows], train_set.labels[rows]) for rows in order.reshape(epoch_steps, -1)]
        )
        first = epoch % len(runs)
        for run in runs[first:] + runs[:first]:
            progress.set_description(f"{network.name}, {run.optimizer}")
            steps, seconds, _ = run.history[-1]
            seconds += run.train(batches)
            loss, _ = evaluate(run.params, *train_set)
            run.history.append(Point(steps + epoch_steps, seconds, float(loss)))
            progress.update()

    for run in runs:
        _, accuracy = evaluate(run.params, *test_set)
        run.test_accuracy = float(accuracy)
    return runs


def table(runs: Sequence[Run]) -> str:
    row = "{:5}  {:9}  {:17}  {:>10}  {:>10}  {:>13}  {:>7}  {:>13}".format
    columns = ("model", "framework", "optimizer", "first loss", "final loss", "test accuracy")
    lines = [row(*columns, "s/epoch", "ratio to Adam")]
    adam = {run.network.name: run.seconds_per_epoch for run in runs if run.optimizer == "Adam"}
    for run in runs:
        lines.append(
            row(
                run.network.model,
                run.network.framework,
                run.optimizer,
                f"{run.history[0].loss:.2f}",
                f"{run.history[-1].loss:.1e}",
                f"{run.test_accuracy:.2%}",
                f"{run.seconds_per_epoch:.4f}",
                f"{run.seconds_per_epoch / adam[run.network.name]:.2f}",
            )
        )
    return "\n".join(lines)


# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = {"Adam": "black", "AdaHesScale": "#0072B2", "orthogonal_newton": "#D55E00"}


def draw(runs: Sequence[Run], path: Path) -> None:
    names = list(dict.fromkeys(run.network.name for run in runs))
    figure = Figure(figsize=(3.5 * len(names), 6.5), layout="constrained")
    axes = figure.subplots(2, len(names), sharey=True)
    for name, (by_steps, by_seconds) in zip(names, axes.T, strict=True):
        for run in (run for run in runs if run.network.name == name):
            steps, seconds, losses = zip(*run.history, strict=True)
            style = {"color": COLOURS[run.optimizer], "label": run.optimizer, "linewidth": 1.2}
            by_steps.semilogy(steps, losses, **style)
            by_seconds.semilogy(seconds, losses, **style)
        by_steps.set(title=name, xlabel="steps")
        by_seconds.set(xlabel="seconds, without compilation")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss on all training images")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(COLOURS),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the networks and of the batches")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to put the picture")
    parser.add_argument("--smoke", action="store_true", help="only try it: 2 networks, 2 epochs")
    args = parser.parse_args()
    epochs = 2 if args.smoke else args.epochs
    chosen = networks(args.seed)[:: 3 if args.smoke else 1]  # Still every model and framework.

    train_set, test_set = load()
    runs: list[Run] = []
    with tqdm(total=len(chosen) * len(COLOURS) * epochs, unit="epoch") as progress:
        for network in chosen:
            runs += compare(network, train_set, test_set, epochs, args.seed, progress)
    draw(runs, args.output)
    print(table(runs))
    print(f"The losses are drawn in {args.output}")


if __name__ == "__main__":
    main()
