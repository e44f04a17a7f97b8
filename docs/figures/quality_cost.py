"""How far estimates of the Hessian's diagonal are from the exact one, against what they cost.

    make figures                              every figure
    python docs/figures/quality_cost.py       quality_cost.png, its numbers in quality_cost.json

Three classifiers of random inputs, with the parameters that they start from: small enough for the
exact diagonal, large enough for a gradient to take half a millisecond or more. The distance is
`sum |estimate - exact| / sum |exact|` over all parameters, mean of the seeds. The cost is the time
of a compiled function that returns value, gradient and estimate over that of `jax.value_and_grad`,
in float32, median of rounds in which all take turns.

    Hutchinson              mean of 1 to 100 samples `z * (H z)`, z random signs, of a gradient that
                            is linearised once; in a loop, or all at once where that is faster
    per-example gradients   mean of the examples' squared gradients, by `vmap`: the empirical Fisher
    sampled labels          one sample of the Gauss-Newton diagonal, as in Sophia-G: n times the
                            squared gradient with n labels drawn from the model's own distribution
    exact                   one coordinate after another, in forward mode; the fastest of one call
                            for each seed
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _style import GAUSS_NEWTON, GREY, HESSCALE, HUTCHINSON, PINK, YELLOW, options
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import Task, cnn_task, cross_entropy, gpt_task, mlp_task
from quality import EXACT, absolute_sums, exact_diagonals
from table import Table, write
from timing import BASELINE, build, describe, interleave, machine, summarise

import hesscale_jax as hs

TASKS = {
    "MLP, 3 hidden layers, GELU": mlp_task(1024, 64, 32, 32, 32, 10, activation=jax.nn.gelu),
    "CNN, max-pooling, ReLU": cnn_task(128, jax.nn.relu, nnx.max_pool),
    "GPT, 2 layers": gpt_task(8, vocabulary=32, length=32, width=16, heads=2, layers=2),
}
SMOKE = {"MLP": mlp_task(8, 4, 3, 2)}
COUNTS = (1, 3, 10, 30, 100)
MARKS = {  # colour, marker, its size
    "squared gradient": (GREY, "s", 6),
    "per-example gradients": (PINK, "D", 6),
    "sampled labels": (YELLOW, "^", 7),
    "HesScaleGN": (GAUSS_NEWTON, "o", 12),
    "HesScale": (HESSCALE, "o", 9),
}

Method = Callable[..., Any]  # (key, params, *batch) -> (value, (grad, estimate))
Result = dict[str, float]  # "distance" and "cost"


def hesscale(task: Task, curvature: str) -> Method:
    method = hs.value_and_hesscale(task.loss, curvature=curvature)
    return lambda key, *args: method(*args)


def hutchinson(task: Task, count: int, at_once: bool) -> Method:
    def method(key: jax.Array, params: Any, *batch: Any) -> Any:
        def value_and_grad(params: Any) -> Any:
            return jax.value_and_grad(task.loss)(params, *batch)

        (value, grad), derivative = jax.linearize(value_and_grad, params)

        def sample(key: jax.Array) -> Any:
            signs = optax.tree.random_like(key, params, jax.random.rademacher)
            _, product = derivative(signs)
            return optax.tree.mul(signs, product)

        keys = jax.random.split(key, count)
        samples = jax.vmap(sample)(keys) if at_once else jax.lax.map(sample, keys)
        return value, (grad, jax.tree.map(lambda s: s.mean(axis=0), samples))

    return method


def squared_gradient(task: Task) -> Method:
    def method(key: jax.Array, *args: Any) -> Any:
        value, grad = jax.value_and_grad(task.loss)(*args)
        return value, (grad, jax.tree.map(jnp.square, grad))

    return method


def per_example_gradients(task: Task) -> Method:
    def method(key: jax.Array, params: Any, rest: Any, *batch: Any) -> Any:
        def of_one(*example: Any) -> Any:
            return jax.value_and_grad(task.loss)(params, rest, *(x[None] for x in example))

        values, grads = jax.vmap(of_one)(*batch)
        grad = jax.tree.map(lambda g: g.mean(axis=0), grads)
        return values.mean(), (grad, jax.tree.map(lambda g: jnp.square(g).mean(axis=0), grads))

    return method


def sampled_labels(task: Task) -> Method:
    def method(key: jax.Array, params: Any, rest: Any, inputs: Any, labels: jax.Array) -> Any:
        logits, pull_back = jax.vjp(lambda p: task.predict(p, rest, inputs), params)
        value, error = jax.value_and_grad(cross_entropy)(logits, labels)
        (grad,) = pull_back(error)
        drawn = jax.random.categorical(key, logits)
        (other,) = pull_back(jax.grad(cross_entropy)(logits, drawn))
        return value, (grad, jax.tree.map(lambda g: labels.size * g**2, other))

    return method


def measure(task: Task, seeds: int, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """The distance and the cost of every method; the size of the model and of its gradient."""
    at_once = task is TASKS["CNN, max-pooling, ReLU"]  # Convolutions in a loop are slow on a CPU.
    methods = {
        "HesScale": hesscale(task, "hessian"),
        "HesScaleGN": hesscale(task, "gauss_newton"),
        "squared gradient": squared_gradient(task),
        "per-example gradients": per_example_gradients(task),
        "sampled labels": sampled_labels(task),
    }
    for count in counts:
        methods[f"Hutchinson {count}"] = hutchinson(task, count, at_once)
    cases = []
    for seed in range(seeds):
        params, batch = task.draw(seed, jnp.float32)
        cases.append((jax.random.key(seed), params, *batch))
    programs = {BASELINE: build(jax.value_and_grad(task.loss), cases[0][1:])}
    programs |= {name: build(method, *cases) for name, method in methods.items()}
    diagonals = build(functools.partial(exact_diagonals, task), *(case[1:] for case in cases))
    exact, exact_seconds = zip(*map(timed, diagonals.calls), strict=True)

    def distance(name: str) -> float:
        errors = [
            absolute_sums(optax.tree.sub(call()[1][1], each[EXACT]))[0]
            / absolute_sums(each[EXACT])[0]
            for call, each in zip(programs[name].calls, exact, strict=True)
        ]
        return float(statistics.mean(map(float, errors)))

    distances = {name: distance(name) for name in methods}
    one_case = {name: p._replace(calls=p.calls[:1]) for name, p in programs.items()}
    summaries = summarise(one_case, list(interleave(one_case, 0, rounds)))
    costs = {name: summary["ratio"] for name, summary in summaries.items()}
    results = {name: {"distance": each, "cost": costs[name]} for name, each in distances.items()}
    gradient_ms = summaries[BASELINE]["ms"]
    results["exact"] = {"distance": 0, "cost": 1e3 * min(exact_seconds) / gradient_ms}
    return {"parameters": optax.tree.size(params), "gradient_ms": gradient_ms, "methods": results}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def draw(ax: Axes, title: str, results: dict[str, Result], counts: Sequence[int]) -> None:
    samples = [results[f"Hutchinson {count}"] for count in counts]
    x, y = [r["cost"] for r in samples], [r["distance"] for r in samples]
    ax.plot(x, y, "o-", color=HUTCHINSON, markersize=4, label="Hutchinson")
    for i, where in (0, (6, 5)), (-1, (-2, -12)):
        text = "1 sample" if counts[i] == 1 else f"{counts[i]} samples"
        side = {"textcoords": "offset points", "ha": "left" if i == 0 else "right"}
        ax.annotate(text, (x[i], y[i]), where, color=HUTCHINSON, fontsize=8, **side)
    for name, (colour, marker, size) in MARKS.items():
        r = results[name]
        ax.plot(
            r["cost"],
            r["distance"],
            marker,
            color=colour,
            markersize=size,
            label=name,
            linestyle="none",
        )
    ours = results["HesScale"]["cost"], results["HesScale"]["distance"]
    ax.annotate(
        "HesScale", ours, (8, -3), textcoords="offset points", color=HESSCALE, weight="bold"
    )
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(
        xscale="log", yscale="log", xlabel="cost, in gradients", ylim=(0.07, 20), xlim=(0.8, 500)
    )
    ax.set_title(title, fontsize=10)
    ax.set_xticks(ticks := [1, 10, 100], ticks)
    ax.set_yticks(ticks := [0.1, 1, 10], ticks)
    ax.annotate(
        f"exact: 0, at {round(results['exact']['cost'], -2):,.0f} gradients",
        (1, 0.03),
        (0.9, 0.03),
        xycoords="axes fraction",
        ha="right",
        va="center",
        fontsize=8,
        arrowprops={"arrowstyle": "->"},
    )


def picture(results: dict[str, Any], counts: Sequence[int], path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.9))
    axes = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, found) in zip(axes, results.items(), strict=True):
        draw(ax, name, found["methods"], counts)
    axes[0].text(480, 1.06, "predicting zero", color=GREY, fontsize=8, ha="right")
    axes[0].set_ylabel("distance from the exact diagonal")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:-1], labels[:-1], loc="outside upper center", ncols=5, fontsize=9)
    figure.savefig(path)


def main(options: argparse.Namespace) -> None:
    tasks, seeds, counts, rounds = (SMOKE, 1, (1,), 2) if options.smoke else (TASKS, 3, COUNTS, 15)
    results = {}
    for name, task in tasks.items():
        found = results[name] = measure(task, seeds, counts, rounds)
        rows = [[m, *(f"{x:.3g}" for x in r.values())] for m, r in found["methods"].items()]
        title = f"{name}: {found['parameters']} parameters, gradient {found['gradient_ms']:.2f} ms"
        Table(title, ["", "distance", "cost"], rows, [describe(machine())]).show()
    path = options.output / "quality_cost.json"
    write(path, [], {"machine": machine(), "results": results})
    picture(results, counts, path.with_suffix(".png"))


if __name__ == "__main__":
    main(options(__doc__))
