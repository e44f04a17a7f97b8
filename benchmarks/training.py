"""Optimizers side by side: which loss after how many steps, and how many seconds.

    digits MLP, CNN, ViT   scikit-learn's handwritten digits; the loss on all training images, and
                           on those held out
    autoencoder            the same, 64-48-32-16-32-48-64, tanh
    PINN                   u'' = f on an interval, two scales, 1-32-32-32-1, tanh
    TD learning            the value of a policy, the target by the network itself; 3-64-64-1, tanh
    character LM           a transformer on the source of Python's standard library; held-out text

and, only when asked for by name, with a few methods and rates:

    Q-learning             double DQN of a pole on a cart, 4-64-64-2, tanh; the missing share of
                           the return, over 64 starts
    character LM, 4 x 128  the character LM, wider and deeper
    3C3D, All-CNN          the networks of DeepOBS and of the papers, on digits enlarged to 32 x 32,
                           and the latter at a quarter of its width on 16 x 16

Learning rates warm up over a twentieth of the steps and decay by a cosine. Every optimizer is
trained with each rate of a grid over three decades, from the same starts on the same batches.

    at its best   with the rate of the lowest final loss on the task, mean over the seeds
    one for all   with the one that is best on all tasks together, by the mean logarithm of the loss
    to Adam's     steps until the loss, mean over the seeds, is as low as Adam's last at its best

The last line is orthogonal_newton's steps to that loss over Adam's, at the rate that needs the
fewest, and at the default of 0.02.

Seconds are steps times the time of one step, measured with all optimizers taking turns, and so
without compilation and evaluation.

    python benchmarks/training.py --quick            two tasks, two optimizers, one seed: minutes
    python benchmarks/training.py                    everything, hours on two cores
    python benchmarks/training.py --tasks "digits MLP" --methods Adam Muon
    python benchmarks/training.py --tasks Q-learning
    python benchmarks/training.py --tasks            only draws what was measured before
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cart_pole
import jax
import jax.numpy as jnp
import matrix_peers
import models
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
INTERVAL = 10  # Curvature and bases are renewed at every tenth step, where a method may.
BASELINE, OURS, DEFAULT = "Adam", "orthogonal_newton", 0.02
EPS = 1e-3  # Of AdaHesScale and AdaHessian.
QUICK = "digits MLP", "autoencoder"


def decades(lowest: float) -> tuple[float, ...]:
    return tuple(lowest * 10 ** (i / 2) for i in range(7))


class Method(NamedTuple):
    """An optimizer, and where its curvature comes from."""

    tx: Callable[[Any, Any], optax.GradientTransformation]  # (rate, layouts)
    derivatives: Callable[..., Any]  # (loss, fresh, step, params, *batch) -> (grad, extra)
    rates: Sequence[float]
    interval: int = 1  # At other steps than each so many-th, nothing is renewed.


def gradient(loss: Callable[..., Any], fresh: bool, step: Any, *args: Any) -> Any:
    return jax.grad(loss)(*args), {}


def renewing(loss: Callable[..., Any], fresh: bool, step: Any, *args: Any) -> Any:
    return jax.grad(loss)(*args), {"refreshed": fresh}


def diagonal(curvature: str) -> Callable[..., Any]:
    def derivatives(loss: Callable[..., Any], fresh: bool, step: Any, *args: Any) -> Any:
        transform = hs.value_and_hesscale_every(INTERVAL)(loss, curvature=curvature)
        _, (grad, hess_diag), refreshed = transform(0 if fresh else 1, *args)
        return grad, {"hess_diag": hess_diag, "refreshed": refreshed}

    return derivatives


def factors(weighted: bool) -> Callable[..., Any]:
    def derivatives(loss: Callable[..., Any], fresh: bool, step: Any, *args: Any) -> Any:
        transform = hs.value_and_factors_every(INTERVAL)(loss, weighted=weighted)
        _, (grad, found), refreshed = transform(0 if fresh else 1, *args)
        return grad, {"factors": found, "refreshed": refreshed}

    return derivatives


def hutchinson(loss: Callable[..., Any], fresh: bool, step: Any, *args: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(0), step)
    _, (grad, hess_diag) = value_and_hutchinson(loss)(key, *args)
    return grad, {"hess_diag": hess_diag}


def sophia(rate: Any, layouts: Any) -> optax.GradientTransformation:
    return optax.contrib.sophia(
        rate,
        weight_decay=0.0,
        update_interval=INTERVAL,
        hessian_diagonal_fn=hs.hess_diag_as_estimator(),
    )


def plain(tx: Callable[..., Any], **how: Any) -> Callable[[Any, Any], Any]:
    return lambda rate, layouts: tx(rate, **how)


ADAM, MATRIX = decades(1e-4), decades(DEFAULT / 10**1.5)

METHODS: dict[str, Method] = {
    OURS: Method(hs.orthogonal_newton, factors(weighted=True), MATRIX, INTERVAL),
    BASELINE: Method(plain(optax.adam), gradient, ADAM),
    "Adam, b2 .99": Method(plain(optax.adam, b2=0.99), gradient, ADAM),
    "SGD with momentum": Method(plain(optax.sgd, momentum=0.9), gradient, decades(1e-3)),
    "Muon": Method(matrix_peers.muon, gradient, MATRIX),
    "Newton-Muon": Method(matrix_peers.newton_muon, factors(weighted=False), MATRIX, INTERVAL),
    "SOAP": Method(matrix_peers.soap, renewing, decades(1e-4), INTERVAL),
    "SOAP-Muon": Method(matrix_peers.soap_muon, renewing, MATRIX, INTERVAL),
    "Sophia, by HesScaleGN": Method(sophia, diagonal("gauss_newton"), ADAM, INTERVAL),
    "AdaHessian, by Hutchinson": Method(plain(hs.adahesscale, eps=EPS), hutchinson, decades(1e-3)),
    "AdaHesScale": Method(plain(hs.adahesscale, eps=EPS), diagonal("hessian"), ADAM),
    "AdaHesScaleGN": Method(plain(hs.adahesscale, eps=EPS), diagonal("gauss_newton"), ADAM),
}


class Task(NamedTuple):
    """A network, data and a budget."""

    params: Callable[[int], Any]  # seed -> params
    loss: Callable[..., jax.Array]  # (params, *batch) -> loss
    batch: Callable[[int, int], tuple[np.ndarray, ...]]  # (seed, step) -> batch
    evaluation: tuple[np.ndarray, ...]  # The batch whose loss is reported.
    steps: int
    held_out: tuple[np.ndarray, ...] | None = None  # A second batch, whose last loss is.
    reported: Callable[..., jax.Array] | None = None  # The loss that is reported, if another.
    rates: dict[str, Sequence[float]] | None = None  # These methods alone, with these rates.
    # What batches depend on the parameters: seed -> (params, step) -> batch, in place of `batch`.
    stream: Callable[[int], Callable[[Any, int], Any]] | None = None


EVALUATE_EVERY = 20


class ViT(nnx.Module):
    """A transformer on patches of 2 x 2 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        width = 32
        self.patches = nnx.Linear(4, width, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 16, width)))
        self.blocks = nnx.List([char_lm.Block(width, 4, jnp.float32, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        cells = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        x = self.patches(cells) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x).mean(axis=1))


class Enlarged(nnx.Module):
    """A network for larger images, in three channels."""

    def __init__(self, network: nnx.Module, size: int) -> None:
        self.network, self.size = network, size

    def __call__(self, images: jax.Array) -> jax.Array:
        shape = (len(images), self.size, self.size, 1)
        return self.network(jnp.tile(jax.image.resize(images, shape, "linear"), 3))


class AllCNN(nnx.Module):
    """All-CNN-C (Springenberg et al., arXiv 1412.6806) without dropout: convolutions alone."""

    def __init__(self, width: int, classes: int, rngs: nnx.Rngs) -> None:
        layers = [(3, 1)] * 2 + [(3, 2)] + [(3, 1)] * 2 + [(3, 2), (3, 1), (1, 1), (1, 1)]
        widths = [3, *[width] * 3, *[2 * width] * 5, classes]
        self.layers = nnx.List(
            nnx.Conv(m, n, (size, size), strides=stride, rngs=rngs)
            for (size, stride), (m, n) in zip(layers, itertools.pairwise(widths), strict=True)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return nnx.relu(last(x)).mean(axis=(1, 2))


def enlarged_task(build: Callable[[nnx.Rngs], nnx.Module], size: int) -> Task:
    methods = BASELINE, "AdaHesScale", "AdaHesScaleGN"
    task = digits_task(lambda rngs: Enlarged(build(rngs), size), 200)
    return task._replace(rates=dict.fromkeys(methods, ADAM[1:4]))


def digits_task(build: Callable[[nnx.Rngs], nnx.Module], steps: int) -> Task:
    train, test = digits.load()
    graphdef, _ = nnx.split(build(nnx.Rngs(0)))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return digits.cross_entropy(nnx.merge(graphdef, params)(images), labels)

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([seed, step])
        rows = rng.integers(len(train.labels), size=digits.BATCH_SIZE)
        images = train.images[rows]
        noise = rng.standard_normal(images.shape, np.float32)
        return images + digits.NOISE * noise, train.labels[rows]

    return Task(
        lambda seed: nnx.split(build(nnx.Rngs(seed)))[1], loss, batch, train, steps, held_out=test
    )


def dense(sizes: Sequence[int], seed: int) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (n, m)) * n**-0.5, "b": jnp.zeros(m)}
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]


def forward(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def autoencoder_task() -> Task:
    train, test = digits.load()

    def loss(params: Any, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        return jnp.sum(jnp.square(forward(params, x) - x), axis=-1).mean() / 2

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        rows = np.random.default_rng([seed, step]).integers(len(train.labels), size=128)
        return (train.images[rows],)

    sizes = (64, 48, 32, 16, 32, 48, 64)
    evaluation, held_out = (train.images,), (test.images,)
    return Task(lambda s: dense(sizes, s), loss, batch, evaluation, 600, held_out=held_out)


def pinn_task() -> Task:
    """``u'' = f`` on [0, 1], ``u = sin(pi x) + .1 sin(4 pi x)``, with u = 0 at both ends."""

    def params(seed: int) -> Any:
        first, *rest = dense((1, 32, 32, 32, 1), seed)
        return [{"w": 3 * first["w"], "b": jnp.linspace(-1.0, 1.0, 32)}, *rest]

    def second_derivative(params: Any, x: jax.Array) -> jax.Array:
        def u(x: jax.Array) -> jax.Array:
            return forward(params, x[:, None])[:, 0] * x * (1 - x)

        def slope(x: jax.Array) -> jax.Array:
            return jax.jvp(u, (x,), (jnp.ones_like(x),))[1]

        return jax.jvp(slope, (x,), (jnp.ones_like(x),))[1]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        pi = math.pi
        f = -(pi**2) * jnp.sin(pi * x) - 0.1 * (4 * pi) ** 2 * jnp.sin(4 * pi * x)
        return jnp.mean(jnp.square(second_derivative(params, x) - f)) / 100

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        return (np.random.default_rng([seed, step]).random(64, np.float32),)

    return Task(params, loss, batch, (np.linspace(0, 1, 257, dtype=np.float32),), 600)


def char_lm_task(width: int, layers: int, steps: int, rates: Any = None) -> Task:
    length, batch_size = 64, 16
    train, validation = char_lm.load()

    def split(seed: int) -> tuple[Any, Any]:
        model = char_lm.Transformer(length, width, layers, 4, jnp.float32, nnx.Rngs(seed))
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
    return Task(lambda seed: split(seed)[1], loss, batch, evaluation, steps, rates=rates)


def td_task() -> Task:
    """The value of a policy that brings a pendulum up, by temporal differences, as DQN's updates.

    The target is the network's own value of the next state, held fixed; what is reported is the
    distance from the true values, by rolling out.
    """
    discount, dt = 0.95, 0.05

    def step(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle, speed = state[..., 0], state[..., 1]
        torque = np.clip(-4 * np.sin(angle) - speed, -2, 2)
        speed = np.clip(speed + dt * (5 * np.sin(angle) + 3 * torque), -8, 8)
        angle = angle + dt * speed
        return np.stack([angle, speed], -1), np.cos(angle) - 0.01 * speed**2

    def states(rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.uniform([-np.pi, -8], [np.pi, 8], (count, 2))

    def features(state: np.ndarray) -> np.ndarray:
        angle, speed = state[..., 0], state[..., 1]
        return np.stack([np.cos(angle), np.sin(angle), speed / 8], -1).astype(np.float32)

    def value(params: Any, x: jax.Array) -> jax.Array:
        return forward(params, x)[:, 0]

    def loss(params: Any, x: jax.Array, reward: jax.Array, after: jax.Array) -> jax.Array:
        target = jax.lax.stop_gradient(reward + discount * value(params, after))
        return jnp.mean(jnp.square(value(params, x) - target))

    def distance(params: Any, x: jax.Array, true: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(value(params, x) - true))

    def batch(seed: int, number: int) -> tuple[np.ndarray, ...]:
        state = states(np.random.default_rng([seed, number]), 64)
        after, reward = step(state)
        return features(state), reward.astype(np.float32), features(after)

    start = state = states(np.random.default_rng(0), 512)
    true = np.zeros(len(start))
    for t in range(300):
        state, reward = step(state)
        true += discount**t * reward
    evaluation = features(start), true.astype(np.float32), features(start)
    sizes = (3, 64, 64, 1)
    return Task(lambda s: dense(sizes, s), loss, batch, evaluation, 600, reported=distance)


def q_learning_task(rates: Any = None) -> Task:
    """Deep double Q-learning of a pole on a cart; what is reported is the return that is missing.

    With a memory, a target network and a share of random actions that falls.
    """

    def params(seed: int) -> Any:
        return dense((4, 64, 64, 2), seed)

    def loss(params: Any, state: jax.Array, action: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(cart_pole.chosen(forward(params, state), action) - target))

    def stream(seed: int) -> Callable[[Any, int], Any]:
        world = cart_pole.new_world(seed, params(seed))

        def draw(params: Any, step: int) -> Any:
            nonlocal world
            world, batch = cart_pole.advance(forward, world, params, np.int32(step))
            return batch

        return draw

    def batch(seed: int, step: int) -> tuple[np.ndarray, ...]:
        return jax.device_get(stream(seed)(params(seed), 0))

    evaluation = (np.asarray(cart_pole.starts(jax.random.key(1000), 64)),)
    reported = functools.partial(cart_pole.missing, forward)
    return Task(
        params, loss, batch, evaluation, 1000, reported=reported, rates=rates, stream=stream
    )


TASKS: dict[str, Callable[[], Task]] = {
    "digits MLP": lambda: digits_task(digits.NnxMLP, 600),
    "digits CNN": lambda: digits_task(digits.NnxCNN, 400),
    "digits ViT": lambda: digits_task(ViT, 400),
    "autoencoder": autoencoder_task,
    "PINN": pinn_task,
    "TD learning": td_task,
    "character LM": lambda: char_lm_task(64, 2, 300),
}

# Beside the table, for a few methods and rates: what takes too long for all, or is too noisy.
RATES = {OURS: MATRIX[2:5], BASELINE: ADAM[3:5]}
PEERS = "Muon", "Newton-Muon", "SOAP-Muon"
ASIDE: dict[str, Callable[[], Task]] = {
    "Q-learning": lambda: q_learning_task(RATES | dict.fromkeys(PEERS, MATRIX[2:4])),
    "character LM, 4 x 128": lambda: char_lm_task(
        128, 4, 200, RATES | dict.fromkeys(PEERS, MATRIX[3:4])
    ),
    "3C3D": lambda: enlarged_task(
        lambda rngs: models.ThreeConvThreeDense(10, jax.nn.relu, rngs=rngs), 32
    ),
    "All-CNN": lambda: enlarged_task(lambda rngs: AllCNN(24, 10, rngs), 16),
}

# Training


def schedule(step: Any, steps: int) -> Any:
    """Warm-up over a twentieth of the steps, then a cosine to 0."""
    return jnp.minimum((step + 1) * 20 / steps, 1) * (1 + jnp.cos(math.pi * step / steps)) / 2


class Training(NamedTuple):
    """A method on a task."""

    init: Callable[[float, Any], Any]  # (rate, params) -> state
    step: Callable[..., Any]  # (number, rate, params, state, *batch) -> (params, state)


def training(task: Task, method: Method) -> Training:
    layouts = hs.layouts(task.loss)(task.params(0), *task.batch(0, 0))

    def step_fun(fresh: bool, step: Any, rate: Any, params: Any, state: Any, *batch: Any) -> Any:
        grad, extra = method.derivatives(task.loss, fresh, step, params, *batch)
        tx = optax.with_extra_args_support(method.tx(rate * schedule(step, task.steps), layouts))
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    # Not one program with a branch, in which convolutions on a CPU are slow: jax-ml/jax#12868.
    fresh, stale = (jax.jit(functools.partial(step_fun, b)) for b in (True, False))

    def step(number: int, rate: float, *args: Any) -> Any:
        which = stale if number % method.interval else fresh
        return which(np.int32(number), np.float32(rate), *args)

    return Training(lambda rate, params: method.tx(rate, layouts).init(params), step)


def given(task: Task) -> Callable[[int], Callable[[Any, int], Any]]:
    """The batches of a task, where they do not depend on the parameters."""

    @functools.cache
    def stream(seed: int) -> Callable[[Any, int], Any]:
        batches = jax.device_put([task.batch(seed, step) for step in range(task.steps)])
        return lambda _, step: batches[step]

    return stream


def curves(
    task: Task, method: Method, run: Training, seeds: Sequence[int], done: Any
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """By learning rate, for each seed: the loss after every so many steps; the held-out loss."""
    evaluate = jax.jit(task.reported or task.loss)
    evaluation = jax.device_put(task.evaluation)
    found: dict[str, list[list[float]]] = {f"{rate:.3g}": [] for rate in method.rates}
    held_out: dict[str, list[float]] = {key: [] for key in found}
    stream = task.stream or given(task)
    for seed in seeds:
        params = task.params(seed)
        for rate in method.rates:
            p, state, losses, draw = params, run.init(rate, params), [], stream(seed)
            for step in range(task.steps):
                p, state = run.step(step, rate, p, state, *draw(p, step))
                if (step + 1) % EVALUATE_EVERY == 0:
                    losses.append(float(evaluate(p, *evaluation)))
            found[f"{rate:.3g}"].append(losses)
            if task.held_out is not None:
                held_out[f"{rate:.3g}"].append(float(evaluate(p, *task.held_out)))
            done()
    return found, held_out


def milliseconds(
    task: Task, every: Sequence[str], runs: dict[str, Training], rounds: int
) -> dict[str, float]:
    """The median time of a step, the methods taking turns of ten steps."""
    params = task.params(0)
    batches = jax.device_put([task.batch(0, step) for step in range(INTERVAL)])
    states = {name: runs[name].init(1e-3, params) for name in every}
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds + 1):  # The first one compiles.
        for name in every:
            p, state = params, states[name]
            start = time.perf_counter()
            for step, batch in enumerate(batches):
                p, state = runs[name].step(step, 1e-3, p, state, *batch)
            jax.block_until_ready(p)
            times[name].append((time.perf_counter() - start) / len(batches))
    return {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}


def measure(
    name: str, chosen: Sequence[str], seeds: int, before: dict[str, Any], progress: Progress
) -> Iterator[dict[str, Any]]:
    """The results of a task so far, after each method and after the timing."""
    task = (TASKS | ASIDE)[name]()
    methods = {key: METHODS[key] for key in chosen}
    if task.rates is not None:
        methods = {
            key: method._replace(rates=task.rates[key])
            for key, method in methods.items()
            if key in task.rates
        }
    runs = {key: training(task, method) for key, method in methods.items()}
    bar = progress.add_task(name, total=seeds * sum(len(m.rates) for m in methods.values()))
    result: dict[str, Any] = {
        "steps": task.steps,
        "losses": dict(before.get("losses", {})),
        "held_out": dict(before.get("held_out", {})),
        "milliseconds": dict(before.get("milliseconds", {})),
    }
    for key in methods if seeds else ():
        progress.update(bar, description=f"{name}, {key}")
        done = functools.partial(progress.advance, bar)
        losses, held_out = curves(task, methods[key], runs[key], range(seeds), done)
        result["losses"][key], result["held_out"][key] = losses, held_out
        yield result
    progress.update(bar, description=f"{name}, timing")
    result["milliseconds"] |= milliseconds(task, list(methods), runs, rounds=10)
    yield result


# What is reported


def final(losses: list[list[float]]) -> float:
    """The mean final loss; infinite if one of the runs diverged."""
    last = [run[-1] for run in losses]
    return statistics.mean(last) if all(map(math.isfinite, last)) else math.inf


def best_rate(by_rate: dict[str, list[list[float]]]) -> str:
    return min(by_rate, key=lambda rate: final(by_rate[rate]))


def one_for_all(results: dict[str, Any], method: str) -> str:
    tried = [r["losses"][method] for r in results.values() if method in r["losses"]]
    return min(
        (rate for rate in tried[0] if all(rate in by_rate for by_rate in tried)),
        key=lambda rate: sum(math.log(max(final(by_rate[rate]), 1e-30)) for by_rate in tried),
    )


def steps_to(losses: list[list[float]], target: float) -> float:
    """How many steps until the mean loss is as low as the target; infinite if it never is."""
    means = map(statistics.mean, zip(*losses, strict=True))
    return next((EVALUATE_EVERY * (i + 1) for i, y in enumerate(means) if y <= target), math.inf)


def targets(result: dict[str, Any]) -> tuple[float, float, str]:
    """The last loss of Adam and of the best other method, at their best, and its name."""
    last = {
        method: final(by_rate[best_rate(by_rate)]) for method, by_rate in result["losses"].items()
    }
    peers = {method: loss for method, loss in last.items() if method != OURS} or last
    best = min(peers, key=peers.__getitem__)
    return last.get(BASELINE, math.nan), peers[best], best


def number(x: float, digits: int = 0) -> str:
    return f"{x:.{digits}f}" if math.isfinite(x) else "-"


def tables(results: dict[str, Any]) -> Iterator[Table]:
    columns = ["", "ms/step", "at its best", "last loss", "spread", "held out", "to Adam's"]
    columns += ["seconds", "to the best peer's", "one for all", "last loss", "to Adam's"]
    for name, result in results.items():
        adam, peer, best_peer = targets(result)
        rows = []
        for method, by_rate in result["losses"].items():
            best, common = best_rate(by_rate), one_for_all(results, method)
            ms = result["milliseconds"].get(method, math.nan)
            last = [run[-1] for run in by_rate[best]]
            held_out = result["held_out"].get(method, {}).get(best) or [math.nan]
            steps = steps_to(by_rate[best], adam)
            rows.append(
                [
                    method,
                    number(ms, 2),
                    best,
                    f"{final(by_rate[best]):.4g}",
                    f"{max(last) - min(last):.2g}",
                    number(statistics.mean(held_out), 4),
                    number(steps),
                    number(1e-3 * ms * steps, 2),
                    number(steps_to(by_rate[best], peer)),
                    common,
                    f"{final(by_rate[common]):.4g}",
                    number(steps_to(by_rate[common], adam)),
                ]
            )
        seeds = len(next(iter(next(iter(result["losses"].values())).values())))
        title = f"{name}, {result['steps']} steps, {seeds} seeds; best peer: {best_peer}"
        yield Table(title, columns, rows)


def ratios(results: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Our steps to Adam's best final loss over Adam's, at our best rate and at the default."""
    tuned, default = [], []
    for result in results.values():
        if OURS not in result["losses"] or BASELINE not in result["losses"]:
            continue
        by_rate, adam = result["losses"][OURS], result["losses"][BASELINE]
        target = targets(result)[0]
        steps = steps_to(adam[best_rate(adam)], target)
        tuned.append(min(steps_to(runs, target) for runs in by_rate.values()) / steps)
        default.append(steps_to(by_rate[f"{DEFAULT:.3g}"], target) / steps)
    return tuned, default


def summary(results: dict[str, Any]) -> str:
    means = [
        number(math.exp(statistics.mean(map(math.log, each))) if each else math.inf, 2)
        for each in ratios(results)
    ]
    return (
        "steps to Adam's best final loss, geometric mean over tasks: "
        f"{means[0]} tuned, {means[1]} at the default rate"
    )


# Okabe and Ito's colours, which the colour-blind tell apart too; then others.
COLOURS = ["#D55E00", "black", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999"]
STYLES = ["-", "--"]


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss by steps, each method at its best; and beside it, the last loss by learning rate."""
    curves_of, rates_of = {}, {}
    for name, result in results.items():
        curves_of[name], rates_of[name] = {}, {}
        for method, by_rate in result["losses"].items():
            runs = np.array(by_rate[best_rate(by_rate)]).mean(0)
            curves_of[name][method] = EVALUATE_EVERY * (1 + np.arange(len(runs))), runs
            last = np.array([[run[-1] for run in runs] for runs in by_rate.values()]).mean(1)
            rates = [float(rate) for rate in by_rate]
            rates_of[name][method] = rates, np.where(np.isfinite(last), last, np.inf)
    panels(curves_of, path, "steps", "loss, at the best rate", "linear")
    rates_path = path.with_stem(path.stem + "-rates")
    panels(rates_of, rates_path, "learning rate", "last loss", "log")


def panels(lines: dict[str, Any], path: Path, x: str, y: str, scale: str) -> None:
    columns = min(4, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(lines) :]:
        ax.axis("off")
    handles: dict[str, Any] = {}
    for ax, (name, by_method) in zip(axes, lines.items(), strict=False):
        for method, (xs, ys) in by_method.items():
            i = list(METHODS).index(method)
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)]}
            look |= {"ls": STYLES[i // len(COLOURS)], "lw": 2.4 if method == OURS else 1.1}
            (handles[method],) = ax.plot(xs, ys, marker="." if scale == "log" else None, **look)
        ax.set(xscale=scale, yscale="log", title=name)
        start = max(ys[0] for _, ys in by_method.values() if math.isfinite(ys[0]))
        low = min(ys.min() for _, ys in by_method.values())
        ax.set_ylim(low / 1.3, 1.3 * start)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    shown = [method for method in METHODS if method in handles]
    figure.legend(
        [handles[method] for method in shown],
        shown,
        loc="outside upper center",
        ncols=6,
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", nargs="*", choices=TASKS | ASIDE)
    parser.add_argument(
        "--methods", nargs="+", help="whose names contain one; others stay as measured"
    )
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--timing", action="store_true", help="only time the steps of what was trained before"
    )
    parser.add_argument("--output", type=Path, help="a directory")
    options = parser.parse_args()
    tasks = options.tasks if options.tasks is not None else QUICK if options.quick else TASKS
    wanted = options.methods or ([OURS, BASELINE] if options.quick else [""])
    seeds = options.seeds or (1 if options.quick else 3)  # 0 where only steps are timed
    output = options.output or (Path("quick") if options.quick else RESULTS)
    exact = options.quick and not options.methods
    chosen = [
        name
        for name in METHODS
        if (name in wanted if exact else any(part in name for part in wanted))
    ]

    output.mkdir(parents=True, exist_ok=True)
    data = output / "training.json"
    results = json.loads(data.read_text()) if data.exists() else {}
    with Progress(console=console) as progress:
        for name in tasks:
            if options.timing:
                chosen, seeds = list(results[name]["losses"]), 0
            for result in measure(name, chosen, seeds, results.get(name, {}), progress):
                order = [key for key in METHODS if key in result["losses"]]
                losses = {key: result["losses"][key] for key in order}
                results[name] = result | {"losses": losses}
                data.write_text(json.dumps(results) + "\n")
    aside = {name: results[name] for name in ASIDE if name in results}
    results = {name: results[name] for name in TASKS if name in results}
    made = [*tables(results), *tables(aside)]
    for table in made:
        table.show()
    write(output / "training.md", made, results | aside)
    draw(results, output / "training.png")
    console.print(summary(results))


if __name__ == "__main__":
    main()
