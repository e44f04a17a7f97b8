"""Elastic weight consolidation: learning a second task without forgetting the first.

    python examples/continual.py

An MLP learns the digits (task A), and then the same digits with their pixels permuted (task B),
without seeing A again. Kirkpatrick et al. (2017) hold each weight w near the value a that A left it
with, by a penalty of strength / 2 * h (w - a)^2. With the diagonal of the Hessian of A's loss for h
and a strength of 1, that is A's loss to second order, but for the off-diagonal terms. They use the
Fisher information, which for a cross-entropy is the Gauss-Newton diagonal. HesScaleGN approximates
it in one pass; it is compared with the exact one, the squared gradient, and h = 1, which is L2.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Digits, Params, load
from jax import Array
from matplotlib.figure import Figure
from pruning import accuracy, gauss_newton, hesscale, init, loss, noisy, squared_gradient, train
from tqdm import tqdm

STRENGTHS = tuple(10.0**k for k in range(-3, 4))
OUTPUT = Path(__file__).parent / "out" / "continual.png"


@partial(jax.jit, static_argnames="epochs")
def train_near(
    old: Params, importance: Params, strength: float, data: Digits, epochs: int, key: Array
) -> Params:
    def penalised(params: Params, images: Array, labels: Array) -> Array:
        moved = jax.tree.map(lambda h, w, a: h * (w - a) ** 2, importance, params, old)
        return loss(params, images, labels) + strength / 2 * optax.tree.sum(moved)

    return train(penalised, old, *data, epochs, key)


def importances(params: Params, images: Array, labels: Array) -> dict[str, Params]:
    """What the penalty weighs each parameter by, under the names in `STYLES`."""
    return {
        "L2": jax.tree.map(jnp.ones_like, params),
        "squared gradient": squared_gradient(params, images, labels),
        "exact Gauss-Newton": gauss_newton(params, images),
        "HesScaleGN": hesscale(params, images, labels, "gauss_newton"),
    }


def permuted(data: Digits, key: Array) -> Digits:
    pixels = data.images.reshape(len(data.labels), -1)
    pixels = jax.random.permutation(key, pixels, axis=1)
    return Digits(pixels.reshape(data.images.shape), data.labels)


def run(
    seed: int, epochs: int, train_a: Digits, test_a: Digits, progress: tqdm
) -> dict[str, np.ndarray]:
    """Trains on A, then on B: accuracies of each importance and strength on [train, test][A, B]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    train_b, test_b = permuted(train_a, keys[0]), permuted(test_a, keys[0])
    old = train(loss, init(keys[1]), *train_a, epochs, keys[2])

    def accuracies(importance: Params, strength: float) -> list[list[Array]]:
        params = train_near(old, importance, strength, train_b, epochs, keys[4])
        progress.update()
        sets = (train_a, train_b), (test_a, test_b)
        return [[accuracy(params, *data) for data in pair] for pair in sets]

    importance = importances(old, noisy(train_a.images, keys[3]), train_a.labels)
    return {"no penalty": np.array([accuracies(old, 0.0)])} | {
        name: np.array([accuracies(h, strength) for strength in STRENGTHS])
        for name, h in importance.items()
    }


def table(results: dict[str, np.ndarray]) -> str:
    """Test accuracies at the strength that is best on the training images of both tasks."""
    lines = [f"{'penalty':20}{'strength':>10}{'test accuracy, A':>18}{'B':>15}{'mean':>15}"]
    for name, runs in results.items():
        best = runs[:, :, 0].mean(axis=(0, 2)).argmax()
        strength = f"{STRENGTHS[best]:g}" if runs.shape[1] > 1 else "0"
        a, b = runs[:, best, 1].T
        cells = [f"{x.mean():7.3f} ± {x.std():.3f}" for x in (a, b, (a + b) / 2)]
        lines.append(f"{name:20}{strength:>10}   " + "".join(cells))
    return "\n".join(lines)


STYLES = {
    "no penalty": {"color": "0.6", "marker": "o", "zorder": 3},
    "L2": {"color": "black", "marker": "s"},
    "squared gradient": {"color": "#009E73", "marker": "v"},
    "exact Gauss-Newton": {"color": "#CC79A7", "marker": "^"},
    "HesScaleGN": {"color": "#E69F00", "marker": "D"},
}


def draw(results: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    trade, by_strength = figure.subplots(1, 2)
    for name, runs in results.items():
        style = {"label": name, "markersize": 4, "linewidth": 1.4, **STYLES[name]}
        error_a, error_b = 1 - runs[:, :, 1].mean(axis=0).T
        trade.loglog(error_b, error_a, **style)
        both = runs[:, :, 1].mean(axis=-1)
        mean, std = both.mean(axis=0), both.std(axis=0)
        if name == "no penalty":
            by_strength.axhline(mean, color=style["color"], linewidth=1.4)
        else:
            by_strength.semilogx(STRENGTHS, mean, **style)
            band = {"color": style["color"], "alpha": 0.1, "linewidth": 0}
            by_strength.fill_between(STRENGTHS, mean - std, mean + std, **band)
    trade.set(xlabel="test error on B, learnt last", ylabel="test error on A, learnt first")
    by_strength.set(xlabel="strength of the penalty", ylabel="test accuracy, mean of A and B")
    for ax in (trade, by_strength):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for axis in (trade.xaxis, trade.yaxis):
        ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
        axis.set_ticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axis.set_ticks([], minor=True)
    trade.set(xlim=(0.01, 1), ylim=(0.01, 1))
    by_strength.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    handles = trade.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(STYLES), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30, help="on each of the two tasks")
    parser.add_argument("--seeds", type=int, default=5, help="of networks and permutations")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to put the picture")
    parser.add_argument("--smoke", action="store_true", help="only try it: 1 seed, 3 epochs")
    args = parser.parse_args()
    seeds, epochs = (1, 3) if args.smoke else (args.seeds, args.epochs)

    train_set, test_set = (Digits(*map(jnp.asarray, data)) for data in load())
    with tqdm(total=seeds * (1 + (len(STYLES) - 1) * len(STRENGTHS)), unit="training") as progress:
        runs = [run(seed, epochs, train_set, test_set, progress) for seed in range(seeds)]
    results = {name: np.stack([run[name] for run in runs]) for name in STYLES}
    draw(results, args.output)
    print(table(results))
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()
