"""Adam, AdaHesScale and AdaHesScaleGN on handwritten digits, in flax.nnx and in flax.linen.

    python examples/digits.py

Trains a multi-layer perceptron and a convolutional network, each written in both frameworks, on
scikit-learn's 8x8 digits. Prints a table, and draws the loss against steps and against seconds.

The lines that matter are in `train_step`: what a HesScale optimizer changes in a training loop.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import linen, nnx
from jax import Array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hesscale_jax as hs

Params = Any  # A pytree of arrays: linen's dict, or nnx's State.
Curvature = Literal["hessian", "gauss_newton"]

BATCH_SIZE = 32
NOISE = 0.5  # Added to the training images, anew in every epoch, lest they be learnt by heart.
OUTPUT = Path(__file__).parent / "out" / "digits.png"


def train_step(
    apply: Callable[[Params, Array], Array],
    tx: optax.GradientTransformation,
    curvature: Curvature | None,
    params: Params,
    opt_state: optax.OptState,
    images: Array,
    labels: Array,
) -> tuple[Params, optax.OptState, Array]:
    def loss(params: Params) -> Array:
        return cross_entropy(apply(params, images), labels)

    if curvature is None:
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
    else:
        value, (grads, hess_diag) = hs.value_and_hesscale(loss, curvature=curvature)(params)
        updates, opt_state = tx.update(grads, opt_state, params, hess_diag=hess_diag)
    return optax.apply_updates(params, updates), opt_state, value


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizers(steps: int) -> dict[str, tuple[optax.GradientTransformation, Curvature | None]]:
    """Maps a name to an optimizer and the curvature it is fed, for a run of so many steps.

    One setting each for every network, chosen on training images held out for it. `eps` is in units
    of curvature: much below the 1e-3 here, and at the default of 1e-8 above all, a weight that has
    hardly mattered so far is thrown far away by the first batch in which it does.
    """
    adam = optax.cosine_decay_schedule(1e-2, steps)
    hesscale = optax.cosine_decay_schedule(5e-3, steps)
    return {
        "Adam": (optax.adam(adam), None),
        "AdaHesScale": (hs.adahesscale(hesscale, eps=1e-3), "hessian"),
        "AdaHesScaleGN": (hs.adahesscale(hesscale, eps=1e-3), "gauss_newton"),
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


class Batch(NamedTuple):
    images: np.ndarray  # (n, 8, 8, 1), float32
    labels: np.ndarray  # (n,), int32


def load() -> tuple[Batch, Batch]:
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
        Batch((train_images - mean) / std, train_labels),
        Batch((test_images - mean) / std, test_labels),
    )


class Epoch(NamedTuple):
    loss: float  # The mean over its batches.
    seconds: float  # Of training alone, without compilation.


@dataclass
class Run:
    """One network under one optimizer."""

    network: Network
    optimizer: str
    step: Callable[..., tuple[Params, optax.OptState, Array]]
    params: Params
    opt_state: optax.OptState
    epochs: list[Epoch]
    test_accuracy: float = 0.0

    def train(self, batches: Sequence[Batch]) -> None:
        """Trains for an epoch."""
        losses = []
        start = time.perf_counter()
        # Not a lax.scan: inside of one, XLA's convolutions are several times slower on a CPU.
        for batch in batches:
            self.params, self.opt_state, loss = self.step(self.params, self.opt_state, *batch)
            losses.append(loss)
        jax.block_until_ready(self.params)
        seconds = time.perf_counter() - start
        self.epochs.append(Epoch(float(np.mean(losses)), seconds))


def compare(
    network: Network, train_set: Batch, test_set: Batch, epochs: int, seed: int, progress: tqdm
) -> list[Run]:
    """Trains a network under each optimizer, from the same start, on the same batches.

    The optimizers take turns, an epoch each, so that whatever else the machine is doing slows
    down all of them alike; and take turns at going first.
    """
    name = f"{network.model} in {network.framework}"
    size = len(train_set.labels) // BATCH_SIZE * BATCH_SIZE
    first_batch = Batch(*(part[:BATCH_SIZE] for part in train_set))
    runs = []
    for optimizer, (tx, curvature) in optimizers(epochs * size // BATCH_SIZE).items():
        progress.set_description(f"{name}, compiling {optimizer}")
        step = jax.jit(partial(train_step, network.apply, tx, curvature))
        opt_state = tx.init(network.params)
        jax.block_until_ready(step(network.params, opt_state, *first_batch))
        runs.append(Run(network, optimizer, step, network.params, opt_state, []))

    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        noisy = train_set.images + NOISE * rng.standard_normal(train_set.images.shape, np.float32)
        order = rng.permutation(len(noisy))[:size].reshape(-1, BATCH_SIZE)
        batches = jax.device_put([Batch(noisy[rows], train_set.labels[rows]) for rows in order])
        first = epoch % len(runs)
        for run in runs[first:] + runs[:first]:
            progress.set_description(f"{name}, {run.optimizer}")
            run.train(batches)
            progress.update()

    for run in runs:
        logits = network.apply(run.params, test_set.images)
        run.test_accuracy = float((logits.argmax(-1) == test_set.labels).mean())
    return runs


def table(runs: Sequence[Run]) -> str:
    row = "{:5}  {:9}  {:13}  {:>10}  {:>10}  {:>13}  {:>7}  {:>13}".format
    columns = ("model", "framework", "optimizer", "first loss", "final loss", "test accuracy")
    lines = [row(*columns, "s/epoch", "ratio to Adam")]
    adam = 0.0
    for run in runs:
        seconds = statistics.median(epoch.seconds for epoch in run.epochs)
        adam = seconds if run.optimizer == "Adam" else adam  # Each network's first.
        lines.append(
            row(
                run.network.model,
                run.network.framework,
                run.optimizer,
                f"{run.epochs[0].loss:.4f}",
                f"{run.epochs[-1].loss:.4f}",
                f"{run.test_accuracy:.2%}",
                f"{seconds:.4f}",
                f"{seconds / adam:.2f}",
            )
        )
    return "\n".join(lines)


# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = {"Adam": "#7F7F7F", "AdaHesScale": "#0072B2", "AdaHesScaleGN": "#D55E00"}
LINE_STYLES = {"nnx": "-", "linen": "--"}


def draw(runs: Sequence[Run], path: Path) -> None:
    models = sorted({run.network.model for run in runs}, reverse=True)
    figure = Figure(figsize=(10, 7), layout="constrained")
    rows = figure.subplots(len(models), 2, sharey=True)
    for model, (by_steps, by_seconds) in zip(models, rows, strict=True):
        for run in (run for run in runs if run.network.model == model):
            losses, seconds = zip(*run.epochs, strict=True)
            style = {
                "color": COLOURS[run.optimizer],
                "linestyle": LINE_STYLES[run.network.framework],
            }
            by_steps.semilogy(1 + np.arange(len(losses)), losses, **style)
            by_seconds.semilogy(np.cumsum(seconds), losses, **style)
        by_steps.set(title=f"{model}, by steps", xlabel="steps", ylabel="training loss")
        by_seconds.set(
            title=f"{model}, by seconds", xlabel="seconds of training, after compilation"
        )
    for axes in rows.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[Line2D([], [], color=c, label=name) for name, c in COLOURS.items()]
        + [Line2D([], [], color="black", linestyle=s, label=f) for f, s in LINE_STYLES.items()],
        loc="outside upper center",
        ncols=len(COLOURS) + len(LINE_STYLES),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
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
