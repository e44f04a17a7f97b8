"""One training step on a batch too large for one device: in micro-batches, or over several devices.

The gradient and the diagonal of a mean over examples are means over examples too, so that both are
averaged alike, over micro-batches in turn or over devices. All ways below do the same update.

    python examples/large_batches.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hesscale_jax as hs

Params = dict[str, Array]
Derivatives = Callable[[Params, Array, Array], Any]  # -> (value, (grad, hess_diag))

BATCH_SIZE, FEATURES, CLASSES, WIDTH = 512, 64, 10, 128
EVERYWHERE, BY_EXAMPLE = PartitionSpec(), PartitionSpec("data")

optimizer = hs.adahesscale(5e-3, eps=1e-3)


def loss(params: Params, x: Array, labels: Array) -> Array:
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


at_once = hs.value_and_hesscale(loss)


def in_micro_batches(params: Params, x: Array, labels: Array) -> Any:
    """In turn, 64 examples at a time, in the memory that 64 need.

    Not with `optax.MultiSteps`: it averages the gradients, but hands on only the last micro-batch's
    `hess_diag`.
    """
    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatch(at_once, argnums=(1, 2), microbatch_size=64, accumulator=mean)(
        params, x, labels
    )


def on_each_device(params: Params, x: Array, labels: Array) -> Any:
    """Inside `shard_map`, where each device sees its own examples: `pmean` of all results.

    The parameters are marked as varying first: of those that do not, `jax.grad` and `hesscale` sum
    the derivatives over the devices themselves.
    """
    params = lax.pcast(params, "data", to="varying")
    return lax.pmean(at_once(params, x, labels), "data")


def train_step(derivatives: Derivatives, params: Params, state: Any, x: Array, y: Array) -> Any:
    value, (grad, hess_diag) = derivatives(params, x, y)
    updates, state = optimizer.update(grad, state, params, hess_diag=hess_diag)
    return optax.apply_updates(params, updates), state, value


def main() -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, BY_EXAMPLE)
    over_devices = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(EVERYWHERE, BY_EXAMPLE, BY_EXAMPLE),
        out_specs=EVERYWHERE,
    )

    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.standard_normal((FEATURES, WIDTH), np.float32) / FEATURES**0.5,
        "out": rng.standard_normal((WIDTH, CLASSES), np.float32) / WIDTH**0.5,
    }
    x = rng.standard_normal((BATCH_SIZE, FEATURES), np.float32)
    labels = rng.integers(CLASSES, size=BATCH_SIZE)

    ways = {
        "at once": (at_once, None, None),
        "micro-batches": (in_micro_batches, None, None),
        "sharded arrays": (at_once, whole, split),  # The compiler does the rest.
        "shard_map": (over_devices, whole, split),
    }
    expected = None
    for name, (derivatives, replicated, sharded) in ways.items():
        step = jax.jit(lambda *args, d=derivatives: train_step(d, *args))
        p = jax.device_put(params, replicated)
        batch = jax.device_put((x, labels), sharded)
        trained, _, value = step(p, optimizer.init(p), *batch)
        expected = expected or trained
        moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), trained, params)
        apart = jax.tree.map(lambda a, b: np.max(np.abs(np.subtract(a, b))), trained, expected)
        print(
            f"{name:15} loss {value:.6f}  devices {len(value.devices())}  "
            f"largest step {max(moved.values()):.1e}  apart {max(apart.values()):.0e}"
        )


if __name__ == "__main__":
    main()
