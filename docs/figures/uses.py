"""Four uses of the diagonal that are not training, on an MLP for handwritten digits.

    make figures                   every figure
    python docs/figures/uses.py    laplace.png, bits.png, sharpness.png, conditioning.png

laplace.png: held-out loss and calibration error of a network that was trained on 300 images, and of
its Laplace approximation with each diagonal, by the variance of the weights' prior.
bits.png: test accuracy and training loss of a network by the bits that a weight has in the mean,
the same for all or handed out by how much the loss rises.
sharpness.png: trace and largest eigenvalue of the Gauss-Newton matrix along training, and the trace
by HesScaleGN.
conditioning.png: condition number of the curvature of an output's weights, divided by its diagonal
in the coordinates and in the basis of the layer's inputs.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
from _style import GAUSS_NEWTON, GREY, HESSCALE, PINK, YELLOW, options
from jax import Array
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import digits
import pruning

Params = digits.Params
BITS = (2, 2.5, 3, 3.5, 4, 5)


def load(smoke: bool) -> tuple[digits.Digits, digits.Digits]:
    train, test = (digits.Digits(*map(jnp.asarray, data)) for data in digits.load())
    return (digits.Digits(*(x[:40] for x in train)), test) if smoke else (train, test)


# Laplace's approximation


def calibration_error(probabilities: Array, labels: Array, bins: int = 10) -> float:
    """The mean distance of accuracy and confidence, over predictions of about equal confidence."""
    confidence = np.asarray(probabilities.max(-1))
    right = np.asarray(probabilities.argmax(-1) == labels)
    parts = np.array_split(np.argsort(confidence), bins)
    return float(sum(abs((confidence - right)[part].sum()) for part in parts) / len(labels))


@jax.jit
def predictive(params: Params, variances: Params, images: Array) -> Array:
    """Probabilities where the logits are linear in the weights: MacKay's, of a normal variable."""

    def of_one(image: Array) -> Array:
        def logits(params: Params) -> Array:
            return pruning.MLP.apply(params, image[None])[0]

        rows = jax.jacrev(logits)(params)
        spread = optax.tree.sum(
            jax.tree.map(lambda j, v: jnp.tensordot(j**2, v, v.ndim), rows, variances)
        )
        return jax.nn.softmax(logits(params) / jnp.sqrt(1 + jnp.pi / 8 * spread))

    return jax.lax.map(of_one, images)


def laplace(path: Path, smoke: bool) -> None:
    train, test = load(smoke)
    few = digits.Digits(*(part[:300] for part in train))
    rest = [part[300:] for part in train]
    held_out = digits.Digits(*map(jnp.concatenate, zip(rest, test, strict=True)))
    if smoke:
        held_out = few
    init, training, noise = jax.random.split(jax.random.key(0), 3)
    params = pruning.train(pruning.loss, pruning.init(init), *few, 2 if smoke else 60, training)
    noisy = pruning.noisy(few.images, noise)  # As it was trained.
    diagonals = {
        "HesScaleGN": (
            GAUSS_NEWTON,
            pruning.hesscale(params, noisy, few.labels, "gauss_newton"),
        ),
        "exact Gauss-Newton": (PINK, pruning.gauss_newton(params, noisy)),
        "squared gradient": (GREY, pruning.squared_gradient(params, noisy, few.labels)),
        "prior alone": (YELLOW, optax.tree.zeros_like(params)),
    }
    priors = np.logspace(-5, 0, 2 if smoke else 11)
    figure = Figure(figsize=(8.4, 3.2))
    axes = figure.subplots(1, 2)
    for name, (colour, diagonal) in diagonals.items():
        found = []
        for prior in priors:
            precision = jax.tree.map(lambda h, p=prior: len(few.labels) * h + 1 / p, diagonal)
            p = predictive(params, jax.tree.map(jnp.reciprocal, precision), held_out.images)
            found.append((log_loss(p, held_out.labels), calibration_error(p, held_out.labels)))
        best = min(found)
        print(f"{name:20} loss {best[0]:.3f}, calibration error {best[1]:.3f}")
        for ax, values in zip(axes, zip(*found, strict=True), strict=True):
            ax.loglog(priors, values, color=colour, label=name)
    without = jax.nn.softmax(pruning.MLP.apply(params, held_out.images))
    plain = log_loss(without, held_out.labels), calibration_error(without, held_out.labels)
    print(f"{'the weights alone':20} loss {plain[0]:.3f}, calibration error {plain[1]:.3f}")
    for ax, value, label in zip(axes, plain, ("held-out loss", "calibration error"), strict=True):
        ax.axhline(value, color="black", linestyle=":", label="the weights alone")
        ax.set(xlabel="variance of the prior", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.savefig(path)


def log_loss(probabilities: Array, labels: Array) -> float:
    return -float(jnp.log(jnp.take_along_axis(probabilities, labels[:, None], 1)).mean())


# Bits


def rounded(w: Array, bits: Array) -> Array:
    """Each output's weights on a grid of `2**bits - 1` values, as far as the largest of them."""
    step = 2 * jnp.abs(w).max(0) / (2.0**bits - 2)
    return step * jnp.round(w / step)


def handed_out(weights: list[Array], curvatures: list[Array], mean: float) -> list[np.ndarray]:
    """Bits for each output of each layer, the next one to where the loss falls most per bit.

    Rounding to a grid of step `d` adds `d**2 / 12` to a weight in the mean square, and so to the
    loss `h d**2 / 24`.
    """
    sizes = np.concatenate([np.full(w.shape[1], w.shape[0]) for w in weights])
    ranges = np.concatenate([np.asarray(jnp.abs(w).max(0)) for w in weights])
    bends = np.concatenate([np.asarray(h.sum(0)) for h in curvatures])
    bits = np.full(len(sizes), 2)

    def rise(bits: np.ndarray) -> np.ndarray:
        return bends * (2 * ranges / (2.0**bits - 2)) ** 2 / 24

    while (bits * sizes).sum() < mean * sizes.sum():
        bits[np.argmax((rise(bits) - rise(bits + 1)) / sizes)] += 1
    return np.split(bits, np.cumsum([w.shape[1] for w in weights])[:-1])


def bits(path: Path, smoke: bool) -> None:
    train, test = load(smoke)
    init, training, noise = jax.random.split(jax.random.key(0), 3)
    params = pruning.train(pruning.loss, pruning.init(init), *train, 2 if smoke else 60, training)
    noisy = pruning.noisy(train.images, noise), train.labels
    is_kernel = jax.tree.map(lambda w: w.ndim > 1, params)
    kernels, structure = jax.tree.flatten(params)
    which = [i for i, kernel in enumerate(jax.tree.leaves(is_kernel)) if kernel]
    weights = [kernels[i] for i in which]

    def of_kernels(diagonal: Params) -> list[Array]:
        return [jax.tree.leaves(diagonal)[i] for i in which]

    kinds = {
        "the same for all": (GREY, None),
        "by range alone": (YELLOW, [jnp.ones_like(w) for w in weights]),
        "squared gradient": (PINK, of_kernels(pruning.squared_gradient(params, *noisy))),
        "HesScaleGN": (GAUSS_NEWTON, of_kernels(pruning.hesscale(params, *noisy, "gauss_newton"))),
    }
    figure = Figure(figsize=(8.4, 3.2))
    axes = figure.subplots(1, 2)
    for name, (colour, curvatures) in kinds.items():
        found = []
        for mean in BITS:
            if curvatures is not None:
                each = handed_out(weights, curvatures, mean)
            elif mean % 1:
                continue
            else:
                each = [mean] * len(weights)
            leaves = list(kernels)
            for i, w, b in zip(which, weights, each, strict=True):
                leaves[i] = rounded(w, jnp.asarray(b))
            less = jax.tree.unflatten(structure, leaves)
            found.append((mean, pruning.accuracy(less, *test), pruning.loss(less, *noisy)))
        means, accuracies, losses = np.array(found).T
        print(f"{name:18}", *(f"{m:g}: {a:.1%} {v:.3f}," for m, a, v in found))
        axes[0].plot(means, accuracies, "o-", color=colour, label=name)
        axes[1].semilogy(means, losses, "o-", color=colour)
    axes[0].axhline(pruning.accuracy(params, *test), color="black", linestyle=":", label="float32")
    axes[1].axhline(pruning.loss(params, *noisy), color="black", linestyle=":")
    axes[0].set(xlabel="bits a weight", ylabel="test accuracy", xticks=range(2, 6))
    axes[1].set(xlabel="bits a weight", ylabel="training loss", xticks=range(2, 6))
    axes[0].legend(fontsize=8)
    figure.savefig(path)


# Sharpness


@jax.jit
def largest(params: Params, images: Array) -> Array:
    """The Gauss-Newton matrix's largest eigenvalue, by 30 steps of power iteration."""
    logits, jvp = jax.linearize(lambda p: pruning.MLP.apply(p, images), params)
    vjp = jax.linear_transpose(jvp, params)
    p = jax.nn.softmax(logits)

    def product(v: Params) -> Params:
        z = jvp(v)
        return vjp((p * z - p * (p * z).sum(-1, keepdims=True)) / len(images))[0]

    def step(carry: tuple[Params, Array], _: None) -> tuple[tuple[Params, Array], None]:
        product_of_v = product(carry[0])
        norm = optax.tree.norm(product_of_v)
        return (optax.tree.scale(1 / norm, product_of_v), norm), None

    flat, unravel = ravel_pytree(params)
    start = unravel(jax.random.normal(jax.random.key(0), flat.shape))
    (_, norm), _ = jax.lax.scan(step, (start, 0.0), length=30)
    return norm


def sharpness(path: Path, smoke: bool) -> None:
    (images, labels), _ = load(smoke)
    params = pruning.init(jax.random.key(0))
    solver = optax.sgd(0.1, momentum=0.9)
    state = solver.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState) -> tuple[Params, optax.OptState]:
        updates, state = solver.update(jax.grad(pruning.loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    count, every = (4, 2) if smoke else (300, 10)
    steps, found = [], []
    for number in range(count):
        if number % every == 0:
            diagonal = pruning.hesscale(params, images, labels, "gauss_newton")
            exact = pruning.gauss_newton(params, images[:200])
            steps.append(number)
            found.append(
                [float(optax.tree.sum(diagonal)), float(optax.tree.sum(exact)),
                 float(largest(params, images)), float(pruning.loss(params, images, labels))]
            )  # fmt: skip
        params, state = step(params, state)
    trace, exact_trace, eigenvalue, loss = np.array(found).T
    rank = np.corrcoef(trace.argsort().argsort(), eigenvalue.argsort().argsort())[0, 1]
    apart = np.abs(np.log(trace / exact_trace)).max()
    print(f"rank correlation with the largest {rank:.2f}; traces apart by {np.expm1(apart):.0%}")
    figure = Figure(figsize=(5.6, 3.4))
    ax = figure.subplots()
    ax.semilogy(steps, trace, color=GAUSS_NEWTON, label="trace, HesScaleGN")
    ax.semilogy(steps, exact_trace, "--", color=PINK, label="trace, exact, of 200 images")
    ax.semilogy(steps, eigenvalue, color=HESSCALE, label="largest eigenvalue")
    ax.semilogy(steps, loss, ":", color="black", label="loss")
    ax.set(xlabel="steps of gradient descent with momentum")
    ax.legend(fontsize=8)
    figure.savefig(path)


# Conditioning


def conditioning(path: Path, smoke: bool) -> None:
    found = layers.blocks_by_layer(*layers.trained(3 if smoke else 100))

    def condition(blocks: Array, divided_by: Array | None) -> float:
        """The median over outputs; directions without curvature count a thousandth of the mean."""
        if divided_by is not None:
            scale = jnp.sqrt(divided_by + 1e-3 * divided_by.mean(-1, keepdims=True))
            blocks = blocks / scale[:, :, None] / scale[:, None, :]
        eigenvalues = jnp.linalg.eigvalsh(blocks).clip(0)
        eigenvalues += 1e-3 * eigenvalues.mean(-1, keepdims=True)
        return float(jnp.median(eigenvalues[:, -1] / eigenvalues[:, 0]))

    bars: dict[str, tuple[str, list[float]]] = {
        "as it is": ("0.75", []),
        "diagonal in the coordinates": (GREY, []),
        "diagonal in the basis of the inputs": (GAUSS_NEWTON, []),
    }
    for blocks, v in found:
        turned = v.T @ blocks @ v
        for (_, values), (matrix, diagonal) in zip(
            bars.values(), ((blocks, False), (blocks, True), (turned, True)), strict=True
        ):
            along = jnp.diagonal(matrix, axis1=1, axis2=2) if diagonal else None
            values.append(condition(matrix, along))
    figure = Figure(figsize=(5.6, 3.2))
    ax = figure.subplots()
    for i, (name, (colour, values)) in enumerate(bars.items()):
        print(f"{name:36}", *(f"{x:8.0f}" for x in values))
        ax.bar(np.arange(len(values)) + 0.27 * (i - 1), values, 0.27, color=colour, label=name)
    places = np.arange(len(found))
    ax.set(yscale="log", xticks=places, xticklabels=[f"layer {i + 1}" for i in places])
    ax.set(ylabel="condition number", ylim=(1, None))
    ax.legend(fontsize=8, loc="upper right")
    figure.savefig(path)


def main() -> None:
    chosen = options(__doc__)
    for draw in (laplace, bits, sharpness, conditioning):  # In the order of the page.
        print(draw.__name__)
        draw(chosen.output / f"{draw.__name__}.png", chosen.smoke)


if __name__ == "__main__":
    main()
