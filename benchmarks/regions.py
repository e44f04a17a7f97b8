"""What exact and sampled regions buy in a transformer, and at what price.

A GPT of two layers at initialisation, in float64, whose parts are regions, mapped over the
examples. The error of a leaf is sum |estimate - exact| / sum |exact|; the cost is arithmetic as the
compiler counts it, with the value and the gradient, over that of `jax.value_and_grad`.

    python benchmarks/regions.py                    about a quarter of an hour on two cores
    python benchmarks/regions.py --seeds 1 --only HesScale core
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from models import Params, cross_entropy
from quality import EXACT, exact_diagonal
from table import Table, console, output_path, write

import hesscale_jax as hs
from hesscale_jax.testing import compare

BATCH, LENGTH, WIDTH, WORDS, LAYERS = 8, 6, 8, 10, 2
Function = Callable[..., Any]
Part = Callable[[str, Function], Function]


def draw(seed: int) -> tuple[Params, jax.Array, jax.Array]:
    """Parameters, of 1,776 entries, tokens and the next ones."""
    keys = iter(jax.random.split(jax.random.key(seed), 99))

    def array(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float64) / shape[0] ** 0.5

    def layer() -> Params:
        scales = {"attention_norm": jnp.ones(WIDTH), "mlp_norm": jnp.ones(WIDTH)}
        weights = {"qkv": array(WIDTH, 3 * WIDTH), "project": array(WIDTH, WIDTH)}
        return scales | weights | {"up": array(WIDTH, 4 * WIDTH), "down": array(4 * WIDTH, WIDTH)}

    params = {"token": array(WORDS, WIDTH), "position": array(LENGTH, WIDTH)}
    params |= {"layers": [layer() for _ in range(LAYERS)], "head": array(WIDTH, WORDS)}
    text = jax.random.randint(next(keys), (BATCH, LENGTH + 1), 0, WORDS)
    return params, text[:, :-1], text[:, 1:]


def normalised(x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def loss_with(part: Part) -> Function:
    """The loss, each part of whose layers is what ``part`` makes of its name and its function."""

    def core(qkv: jax.Array) -> jax.Array:
        q, k, v = jnp.split(qkv, 3, -1)
        past = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        return jax.nn.softmax(jnp.where(past, q @ k.T / WIDTH**0.5, -jnp.inf)) @ v

    def attention(p: Params, x: jax.Array) -> jax.Array:
        x = normalised(x) * p["attention_norm"][None]
        return part("core", core)(x @ p["qkv"]) @ p["project"]

    def mlp(p: Params, x: jax.Array) -> jax.Array:
        return jax.nn.gelu((normalised(x) * p["mlp_norm"][None]) @ p["up"]) @ p["down"]

    def residual(name: str, branch: Function) -> Function:
        branch = part(name, branch)
        return part(f"x + {name}", lambda p, x: x + branch(p, x))

    def layer(p: Params, x: jax.Array) -> jax.Array:
        return residual("mlp", mlp)(p, residual("attention", attention)(p, x))

    def logits(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["token"][tokens] + params["position"]
        for p in params["layers"]:
            x = part("layer", layer)(p, x)
        return normalised(x) @ params["head"]

    return lambda params, tokens, labels: cross_entropy(
        jax.vmap(logits, (None, 0))(params, tokens), labels
    )


def regions(make: Function, *names: str) -> Function:
    """HesScale with the parts of these names as regions."""
    return hs.value_and_hesscale(loss_with(lambda n, fun: make(fun) if n in names else fun))


def exact(fun: Function) -> Function:
    return hs.exact(fun, max_entries=2**24)


def methods(loss: Function) -> dict[str, Function]:
    found: dict[str, Any] = {"HesScale": hs.value_and_hesscale(loss)}
    found |= {f"exact {name}": regions(exact, name) for name in ("core", "attention", "mlp")}
    found["exact x + attention, x + mlp"] = regions(exact, "x + attention", "x + mlp")
    found["exact layer"] = regions(exact, "layer")
    for count in (1, 4):
        for name in ("core", "layer"):

            def sampled(fun: Function, samples: int = count) -> Function:
                return hs.sampled(fun, samples=samples)

            found[f"sampled {name}, {count}"] = regions(sampled, name)
        found[f"Hutchinson {count}"] = hs.value_and_hesscale(hs.sampled(loss, samples=count))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose names contain one")
    parser.add_argument("--output", type=output_path, help="a .md or .json file to write")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    loss = loss_with(lambda name, fun: fun)
    draws = [draw(seed) for seed in range(options.seeds)]
    flops = jax.jit(jax.value_and_grad(loss)).lower(*draws[0]).compile().cost_analysis()["flops"]
    truths = [jax.jit(lambda *args: exact_diagonal(loss, *args)[EXACT])(*args) for args in draws]
    results: dict[str, list[float]] = {}
    for name, method in methods(loss).items():
        if not any(part in name for part in options.only):
            continue
        compiled = jax.jit(method).lower(*draws[0]).compile()
        reports = [
            compare(compiled(*args)[1][1], truth) for args, truth in zip(draws, truths, strict=True)
        ]
        by_leaf = [[leaf.error for leaf in report.leaves] for report in reports]
        results[name] = [
            compiled.cost_analysis()["flops"] / flops,
            float(np.mean(np.median(by_leaf, -1))),
            float(np.mean(np.max(by_leaf, -1))),
            float(np.mean([report.total.error for report in reports])),
        ]
        console.print(name, *(f"{x:.2g}" for x in results[name]))
    columns = ["", "cost", "median leaf", "worst leaf", "total"]
    rows = [[name, *(f"{x:.2g}" for x in found)] for name, found in results.items()]
    table = Table(f"Regions in a GPT, mean of {options.seeds} seeds", columns, rows)
    table.show()
    if options.output:
        write(options.output, [table], results)


if __name__ == "__main__":
    main()
