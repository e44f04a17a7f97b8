"""PPO on a MuJoCo task, with steps that HesScale's curvature keeps short enough.

    python examples/ppo.py
    python examples/ppo.py --optimizer adam --output examples/out/ppo-adam

Proximal policy optimization (Schulman et al., arXiv 1707.06347) in the setting of Elsayed et al.
(ICML 2024, arXiv 2406.03276): an actor and a critic, each with an optimizer that shortens its steps
until the curvature along them is within bounds. Learning rates may then be large. At the default of
0.01, Scaled Adam has balanced the pole to the end of an episode after 27,000 steps with each of the
seeds 0, 1 and 2; Adam never does with two of them, and needs 3e-4.

The lines that matter are in `PPO.descend`. Flax's modules are pytrees, differentiated as they are.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gymnasium.vector import AutoresetMode, VectorEnv
from jax import Array, lax
from jax.scipy.stats import norm
from runs import OPTIMIZERS, Curvature, Run, optimizer
from tqdm import tqdm

import hesscale_jax as hs

Network = TypeVar("Network", "Actor", "Critic")

OUTPUT = Path(__file__).parent / "out" / "ppo"
SMOKE = {"steps": 1280, "horizon": 64, "epochs": 2, "minibatches": 4, "checkpoint_every": 2}


class MLP(nnx.Module):
    def __init__(self, inputs: int, outputs: int, scale: float, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int, scale: float) -> nnx.Linear:
            orthogonal = nnx.initializers.orthogonal(scale)
            return nnx.Linear(inputs, outputs, kernel_init=orthogonal, rngs=rngs)

        self.hidden1 = linear(inputs, 64, np.sqrt(2))
        self.hidden2 = linear(64, 64, np.sqrt(2))
        self.out = linear(64, outputs, scale)

    def __call__(self, x: Array) -> Array:
        x = jnp.tanh(self.hidden1(x))
        x = jnp.tanh(self.hidden2(x))
        return self.out(x)


class Actor(nnx.Module):
    """A Gaussian policy, whose standard deviation does not depend on the observation."""

    def __init__(self, observations: int, actions: int, rngs: nnx.Rngs) -> None:
        self.mean = MLP(observations, actions, scale=0.01, rngs=rngs)
        self.log_std = nnx.Param(jnp.zeros(actions))

    def log_prob(self, observations: Array, actions: Array) -> Array:
        std = jnp.exp(self.log_std[...])
        return norm.logpdf(actions, self.mean(observations), std).sum(axis=-1)


class Critic(nnx.Module):
    def __init__(self, observations: int, rngs: nnx.Rngs) -> None:
        self.value = MLP(observations, 1, scale=1.0, rngs=rngs)

    def __call__(self, observations: Array) -> Array:
        return self.value(observations).squeeze(axis=-1)


class Statistics(NamedTuple):
    """Of all observations so far, which are normalised with them."""

    count: Array
    mean: Array
    variance: Array

    def normalise(self, observations: Array) -> Array:
        return jnp.clip((observations - self.mean) / jnp.sqrt(self.variance + 1e-8), -10, 10)

    def include(self, observations: Array) -> "Statistics":
        new = observations.reshape(-1, observations.shape[-1])
        count = self.count + len(new)
        share = len(new) / count
        shift = new.mean(axis=0) - self.mean
        within = (1 - share) * self.variance + share * new.var(axis=0)
        between = share * (1 - share) * shift**2
        return Statistics(count, self.mean + share * shift, within + between)


class Learner(NamedTuple):
    """What is learnt: all that a checkpoint holds."""

    actor: Actor
    critic: Critic
    actor_state: optax.OptState
    critic_state: optax.OptState
    observed: Statistics


class Trajectories(NamedTuple):
    """What the environments did: (horizon, environments, ...), in float32."""

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array  # Those in which an episode ends, not in which the next one starts.
    terminated: Array  # 1 if there is nothing to gain from there on.
    ended: Array  # 1 if terminated, or truncated by the time limit.


class Batch(NamedTuple):
    observations: Array
    actions: Array
    log_probs: Array
    advantages: Array
    returns: Array


def make_environments(name: str, count: int) -> VectorEnv:
    # By default an episode ends with a step that does nothing but reset, and would be learnt from.
    return gymnasium.make_vec(
        name,
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


def play(
    environments: VectorEnv, learner: Learner, horizon: int, rng: np.random.Generator
) -> tuple[Trajectories, list[np.ndarray]]:
    """Plays new episodes for so many steps of each environment.

    They are new, and seeded by `rng`, in order that a checkpoint need not hold the simulators'
    states. What is cut off at the horizon, the critic stands in for.

    Returns:
        What happened, and the return and length of each episode that ended.
    """
    space = environments.single_action_space
    std = np.exp(learner.actor.log_std[...])
    noise = std * rng.standard_normal([horizon, *environments.action_space.shape], np.float32)
    seeds = rng.integers(2**31, size=environments.num_envs)
    observations, _ = environments.reset(seed=seeds.tolist())
    steps, episodes = [], []
    so_far = np.zeros([environments.num_envs, 2])
    for step_noise in noise:
        mean = policy_mean(learner.actor, learner.observed, observations)
        actions = np.asarray(mean) + step_noise
        following, rewards, terminated, truncated, info = environments.step(
            np.clip(actions, space.low, space.high)
        )
        ended = terminated | truncated
        last = following.copy()
        if ended.any():
            last[ended] = np.stack(info["final_obs"][ended])
        steps.append(Trajectories(observations, actions, rewards, last, terminated, ended))
        so_far += np.stack([rewards, np.ones_like(rewards)], axis=-1)
        episodes.extend(so_far[ended])
        so_far[ended] = 0
        observations = following
    played = Trajectories(*(np.stack(x).astype(np.float32) for x in zip(*steps, strict=True)))
    return played, episodes


@jax.jit
def policy_mean(actor: Actor, observed: Statistics, observations: Array) -> Array:
    return actor.mean(observed.normalise(observations))


@dataclass(frozen=True)
class PPO:
    """How to learn from trajectories."""

    tx: optax.GradientTransformation
    curvature: Curvature | None
    gamma: float
    lambda_: float
    clip: float

    def learn(
        self, learner: Learner, played: Trajectories, minibatches: Array
    ) -> tuple[Learner, dict[str, Array]]:
        """A step of the actor and one of the critic on each minibatch, given by its rows."""
        normalise = learner.observed.normalise
        observations = normalise(played.observations)
        values = learner.critic(observations)
        advantages = self.advantages(
            played, values, learner.critic(normalise(played.next_observations))
        )
        data = Batch(
            observations,
            played.actions,
            learner.actor.log_prob(observations, played.actions),
            advantages,
            returns=advantages + values,
        )
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)

        def train_step(learner: Learner, rows: Array) -> tuple[Learner, tuple[Array, Array]]:
            actor, critic, actor_state, critic_state, observed = learner
            batch = jax.tree.map(lambda x: x[rows], data)
            actor, actor_state, actor_loss = self.descend(
                self.actor_loss, actor, actor_state, batch
            )
            critic, critic_state, critic_loss = self.descend(
                self.critic_loss, critic, critic_state, batch
            )
            learner = Learner(actor, critic, actor_state, critic_state, observed)
            return learner, (actor_loss, critic_loss)

        learner, (actor_losses, critic_losses) = lax.scan(train_step, learner, minibatches)
        log_ratio = learner.actor.log_prob(data.observations, data.actions) - data.log_probs
        learner = learner._replace(observed=learner.observed.include(played.observations))
        return learner, {
            "actor_loss": actor_losses.mean(),
            "critic_loss": critic_losses.mean(),
            # From the policy that played to the one that was learnt.
            "approx_kl": (jnp.exp(log_ratio) - 1 - log_ratio).mean(),
        }

    def descend(
        self,
        loss: Callable[[Network, Batch], Array],
        network: Network,
        state: optax.OptState,
        batch: Batch,
    ) -> tuple[Network, optax.OptState, Array]:
        if self.curvature is None:
            value, grads = jax.value_and_grad(loss)(network, batch)
            updates, state = self.tx.update(grads, state, network)
        else:
            value_and_hesscale = hs.value_and_hesscale(loss, curvature=self.curvature)
            value, (grads, hess_diag) = value_and_hesscale(network, batch)
            updates, state = self.tx.update(grads, state, network, hess_diag=hess_diag)
        return optax.apply_updates(network, updates), state, value

    def actor_loss(self, actor: Actor, batch: Batch) -> Array:
        ratio = jnp.exp(actor.log_prob(batch.observations, batch.actions) - batch.log_probs)
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        advantages = batch.advantages - batch.advantages.mean()
        advantages /= batch.advantages.std() + 1e-8
        return -jnp.minimum(ratio * advantages, clipped * advantages).mean()

    def critic_loss(self, critic: Critic, batch: Batch) -> Array:
        return 0.5 * jnp.mean((critic(batch.observations) - batch.returns) ** 2)

    def advantages(self, played: Trajectories, values: Array, next_values: Array) -> Array:
        """Generalized advantage estimation: Schulman et al., arXiv 1506.02438."""
        # In units in which a value, a discounted sum, is about as large as one reward.
        rewards = (1 - self.gamma) * played.rewards
        errors = rewards + self.gamma * (1 - played.terminated) * next_values - values

        def backwards(following: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
            error, ended = step
            advantage = error + self.gamma * self.lambda_ * (1 - ended) * following
            return advantage, advantage

        _, result = lax.scan(
            backwards, jnp.zeros_like(values[0]), (errors, played.ended), reverse=True
        )
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="InvertedPendulum-v5", help="with continuous actions")
    parser.add_argument("--steps", type=int, default=102_400, help="of all environments together")
    parser.add_argument("--environments", type=int, default=2)
    parser.add_argument(
        "--horizon",
        type=int,
        default=1024,
        help="steps of each environment in an iteration: more than an episode's time limit",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minibatches", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--lambda", type=float, default=0.95, dest="lambda_")
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="scaled-adam")
    parser.add_argument(
        "--delta",
        type=float,
        default=1e-8,
        help="what half the curvature along a scaled step may be",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="in iterations")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the directory of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="only try it: short iterations")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()
    batch_size = args.horizon * args.environments
    if batch_size % args.minibatches:
        parser.error(f"{batch_size} steps an iteration do not divide into {args.minibatches}")

    environments = make_environments(args.env, args.environments)
    (observations,) = environments.single_observation_space.shape
    (actions,) = environments.single_action_space.shape

    tx, curvature = optimizer(args.optimizer, args.learning_rate, delta=args.delta)
    learn = jax.jit(PPO(tx, curvature, args.gamma, args.lambda_, args.clip).learn)

    rngs = nnx.Rngs(args.seed)
    actor, critic = Actor(observations, actions, rngs), Critic(observations, rngs)
    observed = Statistics(jnp.zeros([]), jnp.zeros(observations), jnp.ones(observations))
    learner = Learner(actor, critic, tx.init(actor), tx.init(critic), observed)

    with (
        Run(args.output, args.resume) as run,
        tqdm(initial=run.step, total=args.steps, unit="step") as progress,
    ):
        learner = run.restore(learner)
        for start in range(run.step, args.steps, batch_size):
            # Of the step alone, so that a resumed run does what it would have done.
            rng = np.random.default_rng([args.seed, start])
            played, episodes = play(environments, learner, args.horizon, rng)
            orders = [rng.permutation(batch_size) for _ in range(args.epochs)]
            minibatches = np.reshape(orders, [args.epochs * args.minibatches, -1])
            learner, measured = learn(learner, played, minibatches)

            step = start + batch_size
            # Not a number if no episode ended.
            mean_return, mean_length = np.mean(episodes or [(np.nan, np.nan)], axis=0)
            run.record(
                step, mean_return=mean_return, mean_length=mean_length, **jax.device_get(measured)
            )
            if step // batch_size % args.checkpoint_every == 0 or step >= args.steps:
                run.save(step, learner)
            progress.set_postfix(mean_return=mean_return)
            progress.update(batch_size)
        run.draw()
        mean_return = float(run.rows()[-1]["mean_return"])
    print(f"mean return of the last iteration's episodes: {mean_return:.1f}")
    print(f"The curves and the checkpoints are in {args.output}")


if __name__ == "__main__":
    main()
