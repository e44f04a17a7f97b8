"""A pole on a cart, and the batches of double Q-learning on it.

The equations and limits are those of Barto, Sutton and Anderson (1983) as in Gymnasium's
CartPole-v1: a reward of 1 for each of at most 500 steps until the pole falls.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LIMIT, DISCOUNT = 500, 0.99
CARTS, MEMORY, BATCH = 16, 8192, 128
EXPLORED = 300  # Steps until one action in twenty is random; at first all are.
TARGET_EVERY = 50

Values = Callable[[Any, jax.Array], jax.Array]  # (params, states) -> value of each action


class Transitions(NamedTuple):
    state: jax.Array
    action: jax.Array
    after: jax.Array
    fallen: jax.Array


class World(NamedTuple):
    """What the next batch depends on, besides the parameters."""

    key: jax.Array
    state: jax.Array  # (CARTS, 4)
    age: jax.Array
    memory: Transitions  # (MEMORY, ...)
    target: Any  # Parameters of the target network.


def move(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next state, and whether the pole has fallen or the cart left the track."""
    _, speed, angle, spin = jnp.moveaxis(state, -1, 0)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pull = push - 0.05 * turn * cos / 1.1
    after = state + 0.02 * jnp.stack([speed, pull, spin, turn], -1)
    return after, (jnp.abs(after[..., 0]) > 2.4) | (jnp.abs(after[..., 2]) > jnp.pi / 15)


def starts(key: jax.Array, count: int) -> jax.Array:
    return jax.random.uniform(key, (count, 4), minval=-0.05, maxval=0.05)


def new_world(seed: int, params: Any) -> World:
    key, first = jax.random.split(jax.random.key(seed))
    states, numbers = jnp.zeros((MEMORY, 4)), jnp.zeros(MEMORY, int)
    memory = Transitions(states, numbers, states, numbers == 1)
    return World(key, starts(first, CARTS), jnp.zeros(CARTS, int), memory, params)


@functools.partial(jax.jit, static_argnums=0)
def advance(values: Values, world: World, params: Any, step: Any) -> tuple[World, Any]:
    """One step of each cart into the memory, and a batch out of it: (states, actions, targets)."""
    keys = jax.random.split(jax.random.fold_in(world.key, step), 4)
    random = jax.random.uniform(keys[0], (CARTS,)) < jnp.maximum(0.05, 1 - step / EXPLORED)
    best = jnp.argmax(values(params, world.state), -1)
    action = jnp.where(random, jax.random.randint(keys[1], (CARTS,), 0, 2), best)
    after, fallen = move(world.state, action)
    over = fallen | (world.age + 1 >= LIMIT)

    places = (step * CARTS + jnp.arange(CARTS)) % MEMORY
    seen = Transitions(world.state, action, after, fallen)
    memory = jax.tree.map(lambda old, new: old.at[places].set(new), world.memory, seen)
    target = jax.tree.map(
        lambda old, new: jnp.where(step % TARGET_EVERY == 0, new, old), world.target, params
    )
    state = jnp.where(over[:, None], starts(keys[2], CARTS), after)
    world = World(world.key, state, jnp.where(over, 0, world.age + 1), memory, target)

    rows = jax.random.randint(keys[3], (BATCH,), 0, jnp.minimum((step + 1) * CARTS, MEMORY))
    drawn = jax.tree.map(lambda x: x[rows], memory)
    next_action = jnp.argmax(values(params, drawn.after), -1)  # The double in double Q-learning.
    later = chosen(values(target, drawn.after), next_action)
    return world, (drawn.state, drawn.action, 1 + DISCOUNT * jnp.where(drawn.fallen, 0, later))


def chosen(values: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, action[:, None], axis=1)[:, 0]


def missing(values: Values, params: Any, states: jax.Array) -> jax.Array:
    """The share of the steps, of all that are allowed, at which the pole has fallen: 0 is best."""

    def step(held: Any, _: Any) -> Any:
        state, up = held
        state, fallen = move(state, jnp.argmax(values(params, state), -1))
        up = up & ~fallen
        return (state, up), jnp.mean(up)

    start = (states, jnp.ones(len(states), bool))
    return 1 - jnp.mean(jax.lax.scan(step, start, length=LIMIT)[1])
