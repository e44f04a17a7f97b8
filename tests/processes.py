"""One of two processes that train with some of the optimizers, for `test_processes.py`.

    python processes.py ADDRESS NUMBER FOLDER OPTIMIZER ...

In the folder it leaves checkpoints and the collectives of the compiled programs. Both processes
have four devices; one of the mesh's axes goes across the processes, the other stays within.
"""

import collections
import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax, nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hesscale_jax as hs

MESH, AXES = (2, 4), ("across", "within")
STEPS, HALF, EVERY = 20, 10, 5
BATCH, WIDTH, HIDDEN, CLASSES = 16, 8, 12, 6
DRAW = np.random.default_rng(0)
PARAMS = {
    "scale": 1 + DRAW.normal(size=WIDTH) / 10,
    "into": DRAW.normal(size=(WIDTH, HIDDEN)) / 3,
    "bias": DRAW.normal(size=HIDDEN) / 3,
    "back": DRAW.normal(size=(HIDDEN, CLASSES)) / 5,
}
INPUTS, LABELS = DRAW.normal(size=(BATCH, WIDTH)), np.arange(BATCH) % CLASSES


def loss(params, x, labels):
    hidden = nn.gelu((x * params["scale"][None]) @ params["into"] + params["bias"][None])
    logits = hidden @ params["back"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gathered_loss(params, x, labels):
    return loss(lax.with_sharding_constraint(params, P()), x, labels)


LAYOUTS = {  # the loss, and the partition of its parameters and of the batch
    "fully sharded": (gathered_loss, dict.fromkeys(PARAMS, P("across")), P(AXES)),
    "tensor parallel": (
        loss,
        {"scale": P(), "into": P(None, "across"), "bias": P("across"), "back": P("across")},
        P("within"),
    ),
}


def optimizers():
    """All, by name. They call JAX, which has to wait for `jax.distributed`."""
    layouts, estimator = hs.layouts(loss)(PARAMS, INPUTS, LABELS), hs.hess_diag_as_estimator()
    return {
        "adahesscale": hs.adahesscale(1e-2),
        "diagonal_newton": hs.diagonal_newton(1e-2, damping=1e-2),
        "hess_diag_as_estimator": optax.contrib.sophia(1e-2, hessian_diagonal_fn=estimator),
        "orthogonal_newton": hs.orthogonal_newton(1e-2, layouts),
        "scaled_adahesscale": hs.scaled_adahesscale(1e-2, delta=1e-4),
        "scaled_adam": hs.scaled_adam(1e-2, delta=1e-4),
    }


def trainer(loss, places):
    """`train(trained, batch, steps)`: each optimizer's parameters and state after these steps.

    They stay in their places, so that the program is compiled once.
    """
    chosen = optimizers()

    def step(number, trained, batch):
        found = {}
        for name, (params, state) in trained.items():
            if name == "orthogonal_newton":
                transform = hs.value_and_factors_every(EVERY)(loss)
                _, (grad, factors), refreshed = transform(number, params, *batch)
                curvature = {"factors": factors, "refreshed": refreshed}
            else:
                _, (grad, hess_diag) = hs.value_and_hesscale(loss)(params, *batch)
                curvature = {"hess_diag": hess_diag}
            updates, state = chosen[name].update(grad, state, params, **curvature)
            found[name] = optax.apply_updates(params, updates), state
        return found

    compiled = jax.jit(step, out_shardings=places)

    def train(trained, batch, steps):
        for number in steps:
            # One by one: of several programs under way, virtual devices may wait for ever.
            trained = jax.block_until_ready(compiled(np.int32(number), trained, batch))
        return trained

    return train


def start(names, params, everywhere):
    """Each optimizer's parameters and first state, whose averages lie where the parameters do."""
    chosen = optimizers()

    def place(x):
        return x if x.ndim else jax.device_put(np.asarray(x), everywhere)

    return {name: (params, jax.tree.map(place, chosen[name].init(params))) for name in names}


def collectives(fun, args):
    """How many the compiled program has, by kind and by the entries of what a device gets."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    text = jax.jit(fun).lower(*args).compile().as_text()
    for results, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\[([\d,]*)\]", results):
            found[f"{kind} of {math.prod(int(n) for n in shape.split(',') if n)}"] += 1
    return found


def main(address, number, folder, names):
    jax.distributed.initialize(address, 2, number, initialization_timeout=60)
    assert jax.device_count() == math.prod(MESH)
    mesh = jax.make_mesh(MESH, AXES, axis_types=(AxisType.Auto,) * 2)
    counts = {}
    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        for layout, (fun, specs, spec) in LAYOUTS.items():

            def put(x, spec):
                return jax.device_put(x, NamedSharding(mesh, spec))

            params = jax.tree.map(put, PARAMS, specs)
            batch = put(INPUTS, spec), put(LABELS, spec)
            counts[layout] = [
                collectives(transform(fun), (params, *batch))
                for transform in (jax.value_and_grad, hs.value_and_hesscale)
            ]
            trained = start(names, params, NamedSharding(mesh, P()))
            train = trainer(fun, jax.tree.map(lambda x: x.sharding, trained))
            for steps in (range(HALF), range(HALF, STEPS)):
                trained = train(trained, batch, steps)
                checkpointer.save(folder / layout / str(steps.stop), trained)
    (folder / f"{number}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    address, number, folder, *names = sys.argv[1:]
    main(address, int(number), Path(folder), names)
