"""What a training step of a large GPT takes of each of many devices, from the compiled program.

Nothing is executed: the step is compiled for so many virtual CPU devices, which are "data" times
"model". Parameters are float32, sharded over both; a layer's are cast to bfloat16, gathered over
"data" where they are used, and computed with by tensor parallelism over "model". Layers are scanned
and checkpointed. A device has one sequence of 2048 tokens. The two steps compared are Adam's with
`jax.value_and_grad` and AdaHesScale's with `value_and_hesscale`. By device:

    TFLOP       operations of a step
    GB touched  what the compiled program reads and writes, by XLA's count
    GB sent     what a ring over each collective's group sends: an all-gather or a reduce-scatter
                sends its whole array but for the device's own part, an all-reduce twice as much
    GB held     parameters and optimizer's state, then with what the step needs beside them

XLA counts a loop's body once. All but the memory is therefore counted in programs of one layer and
of two that are written out, and goes on from them in proportion; memory is that of the whole model,
scanned.

    python benchmarks/on_paper.py                  all sizes, about 20 minutes on two cores
    python benchmarks/on_paper.py --models 1B --devices 8 --output /tmp/on-paper
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax, nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track
from table import Table, console, save

import hesscale_jax as hs

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "data"
DEVICES = (8, 128, 1024)


@dataclasses.dataclass(frozen=True)
class GPT:
    """A decoder-only transformer, and over how many devices each of its matrices is split.

    Attributes:
        parallel: devices of the axis "model".
    """

    layers: int
    width: int
    heads: int
    parallel: int
    vocabulary: int = 51200
    length: int = 2048

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        width, heads, head = self.width, self.heads, self.width // self.heads
        layer = {
            "norms": (2, width),
            "query_key_value": (width, 3, heads, head),
            "project": (heads, head, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        ends = {
            "token": (self.vocabulary, width),
            "position": (self.length, width),
            "head": (width, self.vocabulary),
        }
        return {"ends": ends, "layers": {k: (self.layers, *shape) for k, shape in layer.items()}}


MODELS = {
    "1B": GPT(layers=16, width=2048, heads=16, parallel=2),
    "8B": GPT(layers=38, width=4096, heads=32, parallel=4),
    "70B": GPT(layers=86, width=8192, heads=64, parallel=8),
}

# How a matrix lies, and once gathered.
SHARDED = {
    "norms": P(None, "data"),
    "query_key_value": P("data", None, "model"),
    "project": P("model", None, "data"),
    "up": P("data", "model"),
    "down": P("model", "data"),
    "token": P("data", "model"),
    "position": P("data"),
    "head": P("data", "model"),
}
GATHERED = {
    name: P(*(None if axis == "data" else axis for axis in spec)) for name, spec in SHARDED.items()
}
BY_EXAMPLE = P("data")


def gathered(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In bfloat16, as which they are sent."""
    narrow = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    for specs in (SHARDED, GATHERED):
        of_these = {name: specs[name] for name in narrow}
        narrow = jax.tree.map(lax.with_sharding_constraint, narrow, of_these)
    return narrow


def standardised(x: jax.Array, scale: jax.Array) -> jax.Array:
    normal = nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
    return lax.with_sharding_constraint(normal * scale, BY_EXAMPLE)


def layer(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    p = gathered(params)
    length, size = x.shape[1], p["project"].shape[1]
    normal = standardised(x, p["norms"][0])
    query, key, value = jnp.einsum("btw,wchd->cbhtd", normal, p["query_key_value"])
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key).astype(jnp.float32) / size**0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = nn.softmax(jnp.where(seen, scores, -1e9)).astype(x.dtype)
    mixed = jnp.einsum("bhts,bhsd->bhtd", weights, value)
    x = lax.with_sharding_constraint(
        x + jnp.einsum("bhtd,hdw->btw", mixed, p["project"]), BY_EXAMPLE
    )
    up = nn.gelu(standardised(x, p["norms"][1]) @ p["up"])
    return lax.with_sharding_constraint(x + up @ p["down"], BY_EXAMPLE)


def loss(params: Any, tokens: jax.Array, labels: jax.Array, *, scan: bool = True) -> jax.Array:
    ends = gathered(params["ends"])
    x = lax.with_sharding_constraint(ends["token"][tokens] + ends["position"], BY_EXAMPLE)
    apply = jax.checkpoint(layer)
    if scan:
        x, _ = lax.scan(lambda x, p: (apply(x, p), None), x, params["layers"])
    else:
        for index in range(len(params["layers"]["up"])):
            x = apply(x, jax.tree.map(lambda p, i=index: p[i], params["layers"]))
    logits = (standardised(x, jnp.ones((), x.dtype)) @ ends["head"]).astype(jnp.float32)
    # Not by index, for which the compiler would gather them.
    picked = jnp.sum(logits * nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), -1)
    return jnp.mean(nn.logsumexp(logits, -1) - picked)


def adam(scan: bool) -> Any:
    optimizer = optax.adam(1e-3)

    def step(params: Any, state: Any, *batch: jax.Array) -> Any:
        value, grad = jax.value_and_grad(functools.partial(loss, scan=scan))(params, *batch)
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


# What the loss says of where a value lies then holds for its curvature inside of blocks, too.
SHARDED_CURVATURE = hs.RULES | {"sharding_constraint": hs.rules.selection}


def adahesscale(scan: bool) -> Any:
    optimizer = hs.adahesscale(1e-3)

    def step(params: Any, state: Any, *batch: jax.Array) -> Any:
        transform = hs.value_and_hesscale(
            functools.partial(loss, scan=scan), rules=SHARDED_CURVATURE
        )
        value, (grad, hess_diag) = transform(params, *batch)
        updates, state = optimizer.update(grad, state, params, hess_diag=hess_diag)
        return optax.apply_updates(params, updates), state, value

    return optimizer, step


METHODS = {"Adam": adam, "AdaHesScale": adahesscale}


def compiled(model: GPT, method: str, *, scan: bool) -> Any:
    """The step for all devices there are."""
    data = jax.device_count() // model.parallel
    mesh = jax.make_mesh((data, model.parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer, step = METHODS[method](scan)

    def spec_of(path: Any) -> P:
        spec = SHARDED[path[-1].key]
        return P(None, *spec) if path[0].key == "layers" else spec

    def place(path: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec_of(path))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(
        place, model.shapes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    everywhere = NamedSharding(mesh, P())
    state = optax.tree.map_params(
        optimizer,
        lambda _, p: p,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    sharding = NamedSharding(mesh, BY_EXAMPLE)
    shape = (jax.device_count(), model.length)
    batch = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)] * 2
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, everywhere))
        return jitted.lower(params, state, *batch).compile()


def counted(model: GPT, method: str, *, scan: bool, dumps: Path) -> dict[str, float]:
    """What XLA counts of a program for one device. `dumps` is where it leaves the program."""
    program = compiled(model, method, scan=scan)
    cost, memory = program.cost_analysis(), program.memory_analysis()
    # As partitioned. Later passes for the CPU widen what is sent from bfloat16 to float32.
    *_, partitioned = sorted(dumps.glob("*jit_step*after_spmd-partitioning*"))
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        **sent(partitioned.read_text(), jax.device_count() // model.parallel),
        "held": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }


KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(?:-start)?\((?:.*replica_groups=(.*))?")


def sent(text: str, data: int) -> dict[str, float]:
    """Bytes that a device sends, over each axis of the mesh."""
    found = {"sent_data": 0.0, "sent_model": 0.0}
    for results, kind, groups in COLLECTIVE.findall(text):
        size = sum(
            jnp.dtype(DTYPES[dtype]).itemsize * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results)
        )
        count = group_size(groups) if groups else 0
        over_data = count == data
        if kind == "all-reduce" and not over_data:
            size *= 2
        share = (count - 1) / count if count else 1.0  # All of it where pairs exchange.
        found["sent_data" if over_data else "sent_model"] += size * share
    return found


DTYPES = {"f32": "float32", "bf16": "bfloat16", "s32": "int32", "u32": "uint32", "pred": "bool"}


def group_size(groups: str) -> int:
    """Of ``mesh['a'=4,'b'=2] {'a'}``, of ``[2,4]<=[8]``, of ``{{0,4},{1,5}}``."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.search(r"\{('.*?)\}", groups)[1]
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", axes))
    if groups.startswith("["):
        return int(re.match(r"\[\d+,(\d+)\]", groups)[1])
    return re.match(r"\{\{([\d,]*)\}", groups)[1].count(",") + 1


def of_whole(model: GPT, method: str, dumps: Path) -> dict[str, float]:
    """In proportion to the layers: one more layer is what two have more than one."""
    count = functools.partial(counted, method=method, dumps=dumps)
    one, two = (count(dataclasses.replace(model, layers=layers), scan=False) for layers in (1, 2))
    whole = count(model, scan=True)
    return {
        key: whole[key]
        if key in ("held", "temporary")
        else one[key] + (model.layers - 1) * (two[key] - one[key])
        for key in one
    }


def on_devices(name: str, devices: int) -> dict[str, dict[str, float]]:
    """Both steps, in a process that has so many virtual devices."""
    with tempfile.TemporaryDirectory() as dumps:
        command = [sys.executable, __file__, "--one", name, dumps]
        environment = environment_of(devices, dumps)
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(printed.stdout)


def environment_of(devices: int, dumps: str) -> dict[str, str]:
    """Of a process that has so many devices and leaves its partitioned programs there."""
    flags = {
        "force_host_platform_device_count": devices,
        "dump_to": dumps,
        "dump_hlo_module_re": "jit_step",
        "dump_hlo_pass_re": "spmd-partitioning",
        "backend_optimization_level": 0,  # For what is not to run, no machine code that is fast.
        "llvm_disable_expensive_passes": "true",
    }
    given = " ".join(f"--xla_{flag}={value}" for flag, value in flags.items())
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given}


def table(results: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name in filter(results.get, MODELS):
        for devices, by_method in sorted(results[name].items(), key=lambda item: int(item[0])):
            data = int(devices) // MODELS[name].parallel
            row = [f"{name}, {devices} = {data} x {MODELS[name].parallel}"]
            for quantity, unit in (
                (lambda r: r["flops"], 1e12),
                (lambda r: r["bytes_accessed"], 1e9),
                (lambda r: r["sent_data"], 1e9),
                (lambda r: r["sent_model"], 1e9),
                (lambda r: r["held"], 1e9),
                (lambda r: r["held"] + r["temporary"], 1e9),
            ):
                ours, theirs = (quantity(by_method[m]) / unit for m in ("AdaHesScale", "Adam"))
                row.append(f"{theirs:.3g}, {ours:.3g}")
            ours, theirs = (by_method[m]["flops"] for m in ("AdaHesScale", "Adam"))
            rows.append([*row, f"{ours / theirs:.2f}"])
    columns = [
        "model, devices = data x model",
        "TFLOP",
        "GB touched",
        "GB sent over data",
        "GB sent over model",
        "GB held",
        "GB held in a step",
        "FLOP, ratio",
    ]
    notes = [f"By device and step: Adam's, then AdaHesScale's. JAX {jax.__version__}."]
    return Table("GPT on paper", columns, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    parser.add_argument("--output", type=Path, default=RESULTS / "on-paper", help="no suffix")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "DUMPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, dumps = options.one
        print(json.dumps({m: of_whole(MODELS[name], m, Path(dumps)) for m in METHODS}))
        return
    path = options.output.with_suffix(".json")
    data = json.loads(path.read_text()) if path.exists() else {"results": {}}
    data["jax"] = jax.__version__
    todo = [(name, devices) for name in options.models for devices in options.devices]
    for name, devices in track(todo, "compiling", console=console):
        data["results"].setdefault(name, {})[str(devices)] = on_devices(name, devices)
        save(options.output, [table(data["results"])], data)
    table(data["results"]).show()


if __name__ == "__main__":
    main()
