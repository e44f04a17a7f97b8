"""A2C and PPO on MuJoCo tasks, with and without step-size scaling, over learning rates.

    python benchmarks/reinforcement.py --only "PPO, Hopper-v5"      a quarter of an hour on one core
    python benchmarks/reinforcement.py                              everything: two hours

The setting of Elsayed et al. (ICML 2024, arXiv 2406.03276), but short: an actor and a
critic of `examples/ppo.py`, each with an optimizer of its own. All learning rates and seeds of an
algorithm, a task and an optimizer play and learn together, by `vmap`. What such a run has measured
is saved when it ends, and is not run again: remove it from the file to repeat it.

PPO learns ten epochs from 1024 steps of each of two environments, in minibatches of 64. A2C takes
one step on 32 steps of each of two environments, down the gradient of `-log_prob * advantage`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress
from table import Table, console, save

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "results" / "data"
sys.path.append(str(REPOSITORY / "examples"))

from ppo import PPO, Actor, Batch, Critic, Learner, Statistics, Trajectories, make_environments  # noqa: E402
from runs import optimizer  # noqa: E402

OPTIMIZERS = {"adam": "Adam", "scaled-adam": "Scaled Adam"}
MORE_OPTIMIZERS = {
    "adahesscale-gn": "AdaHesScaleGN",
    "scaled-adahesscale-gn": "Scaled AdaHesScaleGN",
}
TASKS = ("HalfCheetah-v5", "Hopper-v5")
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
SEEDS = 3
STEPS = 61_440  # Of a learner, in its environments together.
EVERY = 2048  # Steps from one point of a curve to the next.
ENVIRONMENTS = 2  # Of each learner.


class A2C(PPO):
    def actor_loss(self, actor: Actor, batch: Batch) -> jax.Array:
        advantages = batch.advantages - batch.advantages.mean()
        advantages /= batch.advantages.std() + 1e-8
        return -(actor.log_prob(batch.observations, batch.actions) * advantages).mean()


class Algorithm(NamedTuple):
    algorithm: type[PPO]
    horizon: int
    epochs: int
    minibatches: int


ALGORITHMS = {"PPO": Algorithm(PPO, 1024, 10, 32), "A2C": Algorithm(A2C, 32, 1, 1)}
Run = dict[str, Any]  # "returns", by learning rate, seed and point of the curve; None: no episode


class Population:
    """Learners that differ in learning rate and seed, and play and learn in step."""

    def __init__(self, algorithm: Algorithm, task: str, name: str, seeds: int) -> None:
        self._algorithm = algorithm
        self._members = [(rate, seed) for rate in RATES for seed in range(seeds)]
        self._world = make_environments(task, ENVIRONMENTS * len(self._members))
        (self._actions,) = self._world.single_action_space.shape
        self._observed, _ = self._world.reset(seed=0)
        self._rng = np.random.default_rng(0)
        self._so_far = np.zeros(self._world.num_envs)  # Returns of the episodes under way.
        rates = jnp.array([rate for rate, _ in self._members])
        self.learners = stacked([self._new(optimizer(name, 1.0)[0], s) for _, s in self._members])

        def learn(rate: jax.Array, *args: Any) -> Learner:
            tx, curvature = optimizer(name, rate, delta=1e-8)
            learner, _ = algorithm.algorithm(tx, curvature, 0.99, 0.95, 0.2).learn(*args)
            return learner

        self._learn = jax.jit(partial(jax.vmap(learn, in_axes=(0, 0, 0, None)), rates))

    def _new(self, tx: Any, seed: int) -> Learner:
        (observations,) = self._world.single_observation_space.shape
        rngs = nnx.Rngs(seed)
        actor, critic = Actor(observations, self._actions, rngs), Critic(observations, rngs)
        observed = Statistics(jnp.zeros([]), jnp.zeros(observations), jnp.ones(observations))
        return Learner(actor, critic, tx.init(actor), tx.init(critic), observed)

    def iterate(self) -> list[list[float]]:
        """Plays a horizon and learns from it; the returns of the episodes that ended, by member."""
        horizon, epochs, minibatches = self._algorithm[1:]
        steps, ended_returns = [], [[] for _ in self._members]
        noise = self._rng.standard_normal([horizon, *self._world.action_space.shape], np.float32)
        for step_noise in noise:
            before = self._observed
            actions = act(self.learners, self._by_member(before), self._by_member(step_noise))
            # A learner whose parameters have diverged stands still.
            actions = np.nan_to_num(np.asarray(actions)).reshape(step_noise.shape)
            space = self._world.single_action_space
            clipped = np.clip(actions, space.low, space.high)
            self._observed, rewards, terminated, truncated, info = self._world.step(clipped)
            ended = terminated | truncated
            last = self._observed.copy()
            if ended.any():
                last[ended] = np.stack(info["final_obs"][ended])
            self._so_far += rewards
            for i in np.flatnonzero(ended):
                ended_returns[i // ENVIRONMENTS].append(float(self._so_far[i]))
            self._so_far[ended] = 0
            steps.append((before, actions, rewards, last, terminated, ended))
        played = Trajectories(*map(self._by_horizon, zip(*steps, strict=True)))
        size = horizon * ENVIRONMENTS
        orders = [self._rng.permutation(size) for _ in range(epochs)]
        rows = np.reshape(orders, [epochs * minibatches, -1])
        self.learners = self._learn(self.learners, played, rows)
        return ended_returns

    def _by_member(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(self._members), ENVIRONMENTS, *x.shape[1:])

    def _by_horizon(self, steps: tuple[np.ndarray, ...]) -> np.ndarray:
        by_member = np.stack([self._by_member(x) for x in steps], axis=1)
        return by_member.astype(np.float32)


def stacked(learners: list[Learner]) -> Learner:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *learners)


@jax.jit
@jax.vmap
def act(learner: Learner, observations: jax.Array, noise: jax.Array) -> jax.Array:
    actor = learner.actor
    return (
        actor.mean(learner.observed.normalise(observations)) + jnp.exp(actor.log_std[...]) * noise
    )


def measure(
    algorithm: str, task: str, name: str, steps: int, advance: Callable[[int], None]
) -> Run:
    population = Population(ALGORITHMS[algorithm], task, name, SEEDS)
    size = ALGORITHMS[algorithm].horizon * ENVIRONMENTS
    curve = []
    for _ in range(0, steps, EVERY):
        returns: list[list[float]] = [[] for _ in range(len(RATES) * SEEDS)]
        for _ in range(0, EVERY, size):
            for ended, new in zip(returns, population.iterate(), strict=True):
                ended += new
            advance(size)
        curve.append([float(np.mean(ended)) if ended else None for ended in returns])
    finite = [
        all(
            bool(jnp.isfinite(leaf[i]).all()) for leaf in jax.tree.leaves(population.learners.actor)
        )
        for i in range(len(RATES) * SEEDS)
    ]
    shape = len(RATES), SEEDS
    curves = np.array(curve, dtype=float).T.reshape(*shape, -1)
    return {
        "rates": RATES,
        "every": EVERY,
        "returns": [[[None if np.isnan(x) else round(x, 2) for x in s] for s in r] for r in curves],
        "diverged": np.logical_not(finite).reshape(shape).tolist(),
    }


def returns(run: Run) -> np.ndarray:
    """By learning rate, seed and point; where no episode ended, that of the point before."""
    found = np.array(run["returns"], dtype=float)
    for i in range(1, found.shape[-1]):
        found[..., i] = np.where(np.isnan(found[..., i]), found[..., i - 1], found[..., i])
    return found


def final(run: Run) -> np.ndarray:
    """By learning rate and seed: the mean over the last fifth of the steps."""
    found = returns(run)
    return np.nanmean(found[..., -found.shape[-1] // 5 :], axis=-1)


# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = {
    "Adam": "black",
    "Scaled Adam": "#D55E00",
    "AdaHesScaleGN": "#0072B2",
    "Scaled AdaHesScaleGN": "#009E73",
}


def draw(results: dict[str, dict[str, Run]], path: Path) -> None:
    """Above by learning rate, below the curves at the best one, with the range of the seeds."""
    figure = Figure(figsize=(3.3 * len(results), 5.6), layout="constrained")
    for (title, runs), (by_rate, by_steps) in zip(
        results.items(), figure.subplots(2, len(results), squeeze=False).T, strict=True
    ):
        for name, run in runs.items():
            ends, curves, style = final(run), returns(run), {"color": COLOURS[name], "label": name}
            best = ends.mean(axis=1).argmax()
            steps = run["every"] * np.arange(1, curves.shape[-1] + 1)
            for ax, x, seeds in (
                (by_rate, run["rates"], ends),
                (by_steps, steps / 1000, curves[best].T),
            ):
                ax.plot(x, np.nanmean(seeds, axis=1), **style, linewidth=1.4)
                low, high = np.nanmin(seeds, axis=1), np.nanmax(seeds, axis=1)
                ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        by_rate.set(title=title, xscale="log", xlabel="learning rate")
        by_steps.set(xlabel="thousands of steps, at the best rate")
        for ax in (by_rate, by_steps):
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in figure.axes[:2]:
        ax.set_ylabel("return")
    widest = max(figure.axes, key=lambda ax: len(ax.get_lines()))
    handles = widest.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def table(title: str, runs: dict[str, Run]) -> Table:
    rows = [
        [name, *(f"{x.mean():.0f} ({x.min():.0f} to {x.max():.0f})" for x in final(run))]
        for name, run in runs.items()
    ]
    rates = next(iter(runs.values()))["rates"]
    return Table(f"{title}: return by learning rate", ["", *(f"{r:g}" for r in rates)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name contains one")
    parser.add_argument("--more", action="store_true", help="AdaHesScaleGN too, scaled and not")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each learner")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory")
    options = parser.parse_args()

    stem = options.output / "reinforcement"
    saved = stem.with_suffix(".json")
    results = json.loads(saved.read_text()) if saved.exists() else {}
    optimizers = OPTIMIZERS | (MORE_OPTIMIZERS if options.more else {})
    todo = [
        (algorithm, task, name)
        for algorithm in ALGORITHMS
        for task in TASKS
        for name in optimizers
        if any(part in f"{algorithm}, {task}, {optimizers[name]}" for part in options.only)
        and optimizers[name] not in results.get(f"{algorithm}, {task}", {})
    ]
    with Progress(console=console) as progress:
        for algorithm, task, name in todo:
            title = f"{algorithm}, {task}"
            bar = progress.add_task(f"{title}, {optimizers[name]}", total=options.steps)
            run = measure(algorithm, task, name, options.steps, partial(progress.advance, bar))
            results.setdefault(title, {})[optimizers[name]] = run
            save(stem, [table(*item) for item in results.items()], results)
            draw(results, stem.with_suffix(".png"))
    for item in results.items():
        table(*item).show()


if __name__ == "__main__":
    main()
