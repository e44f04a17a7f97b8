"""Optimizers side by side on real data: which loss after how many steps, and how many seconds.

Three tasks: an MLP and a CNN on scikit-learn's handwritten digits (the loss on all training
images), and a small transformer on the source code of Python's standard library, character by
character (the loss on text that was held out). Learning rates are constant. Every optimizer is
trained with each learning rate of a grid over three decades, from the same starts on the same
batches.

    at its best   with the learning rate of the lowest final loss on the task, mean over the seeds
    one for all   with the one that is best on all tasks together, by the mean logarithm of the loss
    to Adam's     steps and seconds until the loss, mean over the seeds, is as low as Adam's at its
                  best ever is; a dash if it never is

Seconds are steps times the time of one step, measured with all optimizers taking turns, and so
without compilation and evaluation.

    python benchmarks/training.py                    everything, about half an hour on two cores
    python benchmarks/training.py --tasks "digits MLP"
    python benchmarks/training.py --tasks            only draws what was measured before
    python benchmarks/training.py --methods Adam AdaHesScale --eps 1e-8 --output out
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hutchinson import value_and_hutchinson
from matplotlib.figure import Figure
from rich.progress import Progress
from table import Table, console, write

import hesscale_jax as hs

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import char_lm
import digits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "data"
INTERVAL = 10  # Sophia looks at every tenth diagonal.
BASELINE = "Adam"


def three_decades(lowest: float) -> tuple[float, ...]:
    return tuple(lowest * 10 ** (i / 2) for i in range(7))


class Method(NamedTuple):
    """An optimizer, and where its curvature comes from."""

    tx: Callable[[Any], optax.GradientTransformation]
    derivatives: Callable[..., Any]  # (loss, step, params, *batch) -> (grad, extra arguments)
    rates: Sequence[float] = three_decades(1e-4)
    interval: int = 1  # At other steps than each so many-th, there is no new diagonal.


def gradient(loss: Callable[..., Any], step: Any, *args: Any) -> Any:
    return jax.grad(loss)(*args), {}


def hesscale(loss: Callable[..., Any], step: Any, *args: Any) -> Any:
    grad, hess_diag = hs.hesscale(loss)(*args)
    return grad, {"hess_diag": hess_diag}


def gauss_newton(loss: Callable[..., Any], step: Any, *args: Any) -> Any:
    grad, hess_diag = hs.hesscale(loss, curvature="gauss_newton")(*args)
    return grad, {"hess_diag": hess_diag}


def hutchinson(loss: Callable[..., Any], step: Any, *args: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(0), step)
    _, (grad, hess_diag) = value_and_hutchinson(loss)(key, *args)
    return grad, {"hess_diag": hess_diag}


def no_diagonal(loss: Callable[..., Any], step: Any, *args: Any) -> Any:
    grad = jax.grad(loss)(*args)
    return grad, {"hess_diag": jax.tree.map(jnp.zeros_like, grad), "refreshed": False}


def sophia(learning_rate: Any) -> optax.GradientTransformation:
    return optax.contrib.sophia(
        learning_rate,
        weight_decay=0.0,
        update_interval=INTERVAL,
        hessian_diagonal_fn=hs.hess_diag_as_estimator(),
    )


def methods(eps: float) -> dict[str, Method]:
    adahesscale = functools.partial(hs.adahesscale, eps=eps)
    momentum = functools.partial(optax.sgd, momentum=0.9)
    return {
        BASELINE: Method(optax.adam, gradient),
        "AdaHesScale": Method(adahesscale, hesscale),
        "AdaHesScaleGN": Method(adahesscale, gauss_newton),
        "Sophia, by HesScaleGN": Method(sophia, gauss_newton, interval=INTERVAL),
        "AdaHessian, by Hutchinson": Method(adahesscale, hutchinson, three_decades(1e-3)),
        "SGD with momentum": Method(momentum, gradient, three_decades(1e-3)),
    }


class Task(NamedTuple):
    """A network, data and a budget."""

    params: Callable[[int], Any]  # seed -> params
    loss: Callable[..., jax.Array]  # (params, *batch) -> loss
    batch: Callable[[int, int], tuple[np.ndarray, ...]]  # (seed, step) -> batch
    evaluation: tuple[np.ndarray, ...]  # The batch whose loss is reported.
    steps: int
    evaluate_every: int


def digits_task(index: int) -> Task:
    train, _ = digits.load()
    apply = digits.networks(0)[index].apply

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return digits.cross_entropy(apply(params, images), labels)

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, step])
        rows = rng.integers(len(train.labels), size=digits.BATCH_SIZE)
        images = train.images[rows]
        noise = rng.standard_normal(images.shape, np.float32)
        return images + digits.NOISE * noise, train.labels[rows]

    return Task(lambda seed: digits.networks(seed)[index].params, loss, batch, train, 880, 44)


def char_lm_task() -> Task:
    length, batch_size = 64, 16
    train, validation = char_lm.load()

    def split(seed: int) -> tuple[Any, Any]:
        model = char_lm.Transformer(length, 64, 2, 4, jnp.float32, nnx.Rngs(seed))
        return nnx.split(model)

    graphdef, _ = split(0)

    def loss(params: Any, text: jax.Array) -> jax.Array:
        return char_lm.cross_entropy(nnx.merge(graphdef, params), text)

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(len(train) - length - 1, size=batch_size)
        return (char_lm.batch(train, starts, length + 1),)

    held_out = np.linspace(0, len(validation) - length - 1, 64, dtype=int)
    evaluation = (char_lm.batch(validation, held_out, length + 1),)
    return Task(lambda seed: split(seed)[1], loss, batch, evaluation, 300, 30)


TASKS: dict[str, Callable[[], Task]] = {
    "digits MLP": lambda: digits_task(0),
    "digits CNN": lambda: digits_task(2),
    "character LM": char_lm_task,
}

# Training


def train_step(task: Task, method: Method) -> Callable[..., Any]:
    def step_fun(
        derivatives: Callable[..., Any], step: Any, rate: Any, params: Any, state: Any, *batch: Any
    ) -> Any:
        grad, extra = derivatives(task.loss, step, params, *batch)
        updates, state = method.tx(rate).update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    fresh = jax.jit(functools.partial(step_fun, method.derivatives))
    stale = jax.jit(functools.partial(step_fun, no_diagonal))
    # Not one program with a branch, in which convolutions on a CPU are slow: jax-ml/jax#12868.
    return lambda step, rate, *args: (stale if step % method.interval else fresh)(
        np.int32(step), np.float32(rate), *args
    )


def curves(
    task: Task, method: Method, step_fun: Callable[..., Any], seeds: Sequence[int], done: Any
) -> dict[str, list[list[float]]]:
    """By learning rate, for each seed, the loss after every so many steps."""
    evaluate = jax.jit(task.loss)
    evaluation = jax.device_put(task.evaluation)
    found: dict[str, list[list[float]]] = {f"{rate:.3g}": [] for rate in method.rates}
    for seed in seeds:
        params = task.params(seed)
        batches = jax.device_put([task.batch(seed, step) for step in range(task.steps)])
        for rate in method.rates:
            p, state, losses = params, method.tx(rate).init(params), []
            for step, batch in enumerate(batches):
                p, state = step_fun(step, rate, p, state, *batch)
                if (step + 1) % task.evaluate_every == 0:
                    losses.append(float(evaluate(p, *evaluation)))
            found[f"{rate:.3g}"].append(losses)
            done()
    return found


def milliseconds(
    task: Task, every: dict[str, Method], step_funs: dict[str, Callable[..., Any]], rounds: int
) -> dict[str, float]:
    """The median time of a step, the methods taking turns of ten steps."""
    params = task.params(0)
    batches = jax.device_put([task.batch(0, step) for step in range(INTERVAL)])
    states = {name: method.tx(1e-3).init(params) for name, method in every.items()}
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, step_fun in step_funs.items():
            p, state = params, states[name]
            start = time.perf_counter()
            for step, batch in enumerate(batches):
                p, state = step_fun(step, 1e-3, p, state, *batch)
            jax.block_until_ready(p)
            times[name].append((time.perf_counter() - start) / len(batches))
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def measure(
    name: str, chosen: Sequence[str], eps: float, seeds: int, progress: Progress
) -> dict[str, Any]:
    task, every = TASKS[name](), methods(eps)
    step_funs = {key: train_step(task, method) for key, method in every.items()}
    bar = progress.add_task(name, total=seeds * sum(len(every[key].rates) for key in chosen))
    losses = {}
    for key in chosen:
        method = every[key]
        progress.update(bar, description=f"{name}, {key}")
        done = functools.partial(progress.advance, bar)
        losses[key] = curves(task, method, step_funs[key], range(seeds), done)
    progress.update(bar, description=f"{name}, timing")
    return {
        "steps": task.steps,
        "evaluate_every": task.evaluate_every,
        "eps": eps,
        "losses": losses,
        "milliseconds": milliseconds(task, every, step_funs, rounds=20),
    }


# What is reported


def final(losses: list[list[float]]) -> float:
    """The mean final loss; infinite if one of the runs diverged."""
    last = [run[-1] for run in losses]
    return statistics.mean(last) if all(map(math.isfinite, last)) else math.inf


def best_rate(by_rate: dict[str, list[list[float]]]) -> str:
    return min(by_rate, key=lambda rate: final(by_rate[rate]))


def one_for_all(results: dict[str, Any], method: str) -> str:
    tried = [r["losses"][method] for r in results.values()]
    return min(
        (rate for rate in tried[0] if all(rate in by_rate for by_rate in tried)),
        key=lambda rate: sum(math.log(final(r["losses"][method][rate])) for r in results.values()),
    )


def steps_to(losses: list[list[float]], target: float, every: int) -> float:
    """How many steps until the mean loss is as low as the target; infinite if it never is."""
    means = map(statistics.mean, zip(*losses, strict=True))
    return next((every * (i + 1) for i, loss in enumerate(means) if loss <= target), math.inf)


def tables(results: dict[str, Any]) -> Iterator[Table]:
    columns = ["", "ms/step", "at its best", "loss", "steps to Adam's", "seconds to Adam's"]
    columns += ["one for all", "loss", "steps to Adam's"]
    for name, result in results.items():
        by_method, every = result["losses"], result["evaluate_every"]
        best_runs = by_method[BASELINE][best_rate(by_method[BASELINE])]
        target = min(map(statistics.mean, zip(*best_runs, strict=True)))
        rows = []
        for method, by_rate in by_method.items():
            best, common = best_rate(by_rate), one_for_all(results, method)
            ms = result["milliseconds"][method]
            steps, common_steps = (steps_to(by_rate[r], target, every) for r in (best, common))
            rows.append(
                [
                    method,
                    f"{ms:.2f}",
                    best,
                    f"{final(by_rate[best]):.4f}",
                    f"{steps:.0f}" if steps < math.inf else "-",
                    f"{1e-3 * ms * steps:.2f}" if steps < math.inf else "-",
                    common,
                    f"{final(by_rate[common]):.4f}",
                    f"{common_steps:.0f}" if common_steps < math.inf else "-",
                ]
            )
        yield Table(f"{name}, {result['steps']} steps, eps {result['eps']:g}", columns, rows)


# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = ["black", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(results), 4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for ax, (name, result) in zip(axes, results.items(), strict=True):
        for colour, (method, by_rate) in zip(COLOURS, result["losses"].items(), strict=False):
            rates = [float(rate) for rate in by_rate]
            last = np.array([[run[-1] for run in runs] for runs in by_rate.values()])
            last = np.where(np.isfinite(last), last, np.inf)
            ax.plot(rates, last.mean(1), "o-", color=colour, label=method, markersize=3)
            ax.fill_between(rates, last.min(1), last.max(1), color=colour, alpha=0.15)
        first = max(run[0] for run in result["losses"][BASELINE]["0.0001"])
        ax.set(xscale="log", yscale="log", title=name, xlabel="learning rate")
        ax.set_ylim(top=1.5 * first)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final loss: mean, lowest and highest of the seeds")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[""],
        help="whose names contain one; others stay as measured",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eps", type=float, default=1e-3, help="of AdaHesScale and AdaHessian")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "training.json"
    results = json.loads(data.read_text()) if data.exists() else {}
    every = methods(options.eps)
    chosen = [name for name in every if any(part in name for part in options.methods)]
    with Progress(console=console) as progress:
        for name in options.tasks:
            before = results.get(name, {}).get("losses", {})
            results[name] = measure(name, chosen, options.eps, options.seeds, progress)
            losses = before | results[name]["losses"]
            results[name]["losses"] = {key: losses[key] for key in every if key in losses}
            data.write_text(json.dumps(results) + "\n")
    results = {name: results[name] for name in TASKS if name in results}
    made = list(tables(results))
    for table in made:
        table.show()
    write(options.output / "training.md", made, results)
    draw(results, options.output / "training.png")


if __name__ == "__main__":
    main()
