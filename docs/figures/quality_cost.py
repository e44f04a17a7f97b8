"""How far estimates of the Hessian's diagonal are from the exact one, against what they cost.

    make figures                              every figure
    python docs/figures/quality_cost.py       quality_cost.png, its numbers in quality_cost.json

Three models of random inputs, with the parameters that they start from, small enough for the exact
diagonal. The distance is `sum |estimate - exact| / sum |exact|` over all parameters, mean of the
seeds. The cost is the arithmetic (FLOPs, as the compiler counts them) of a function that returns
value, gradient and estimate over that of `jax.value_and_grad`, in float64: no machine's load and no
time to start a kernel counts.

    Hutchinson              mean of 1 to 100 samples `z * (H z)`, z random signs, of a gradient that
                            is linearised once
    BL89                    Becker and LeCun's: the softmax entry by entry; with a single output and
                            squared error it is HesScale
    squared gradient        of the batch, as in Adam
    exact                   one coordinate after another, each at the cost of one more sample
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _style import (
    GAUSS_NEWTON,
    GREY,
    HESSCALE,
    HUTCHINSON,
    LIGHT_BLUE,
    PINK,
    YELLOW,
    options,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import Task, gpt_task, mlp_task
from quality import EXACT, absolute_sums, becker_lecun, exact_diagonals
from table import Table, write
from timing import build, describe, machine

import hesscale_jax as hs

# The batches are so small that no method splits them: the compiler counts a loop's body once.
TASKS = {
    "critic: MLP, 3 hidden, tanh": mlp_task(128, 32, 32, 32, 32, 1, activation=jnp.tanh),
    "MLP, 3 hidden, tanh, 10 outputs": mlp_task(128, 32, 32, 32, 32, 10, activation=jnp.tanh),
    "GPT, 1 layer": gpt_task(8, vocabulary=16, length=8, width=16, heads=2, layers=1),
}
SMOKE = {"critic": mlp_task(8, 4, 3, 1), "MLP": mlp_task(8, 4, 3, 2)}
COUNTS = (1, 3, 10, 30, 100)
CURVATURES = {
    "HesScale": "hessian",
    "HesScaleGN": "gauss_newton",
    "exact Gauss-Newton": "exact_gauss_newton",
    "refined": "refined",
}
MARKS = {  # colour, marker, its size
    "squared gradient": (GREY, "s", 6),
    "HesScaleGN": (GAUSS_NEWTON, "o", 9),
    "BL89": (YELLOW, "^", 7),
    "exact Gauss-Newton": (LIGHT_BLUE, "D", 7),
    "refined": (PINK, "P", 10),
    "HesScale": (HESSCALE, "o", 9),
}
ZERO = 3e-3  # where a distance of zero is drawn

Method = Callable[..., Any]  # (key, params, *batch) -> (value, (grad, estimate))
Result = dict[str, float]  # "distance" and "cost"


def hesscale(task: Task, curvature: str) -> Method:
    method = hs.value_and_hesscale(task.loss, curvature=curvature)
    return lambda key, *args: method(*args)


def hutchinson(task: Task, count: int) -> Method:
    def method(key: jax.Array, params: Any, *batch: Any) -> Any:
        def value_and_grad(params: Any) -> Any:
            return jax.value_and_grad(task.loss)(params, *batch)

        (value, grad), derivative = jax.linearize(value_and_grad, params)

        def sample(key: jax.Array) -> Any:
            signs = optax.tree.random_like(key, params, jax.random.rademacher)
            _, product = derivative(signs)
            return optax.tree.mul(signs, product)

        samples = jax.vmap(sample)(jax.random.split(key, count))
        return value, (grad, jax.tree.map(lambda s: s.mean(axis=0), samples))

    return method


def squared_gradient(task: Task) -> Method:
    def method(key: jax.Array, *args: Any) -> Any:
        value, grad = jax.value_and_grad(task.loss)(*args)
        return value, (grad, jax.tree.map(jnp.square, grad))

    return method


def measure(task: Task, seeds: int, counts: Sequence[int]) -> dict[str, Any]:
    """The distance and the cost of every method, and the size of the model."""
    methods = {name: hesscale(task, curvature) for name, curvature in CURVATURES.items()}
    methods["squared gradient"] = squared_gradient(task)
    if task.classes > 1:
        methods["BL89"] = lambda key, *args: (task.loss(*args), becker_lecun(task, *args))
    methods |= {f"Hutchinson {count}": hutchinson(task, count) for count in counts}
    draws = [task.draw(seed, jnp.float64) for seed in range(seeds)]
    cases = [(jax.random.key(seed), params, *batch) for seed, (params, batch) in enumerate(draws)]
    gradient = build(jax.value_and_grad(task.loss), cases[0][1:]).cost.flops
    of_task = jax.jit(lambda *args: exact_diagonals(task, *args)[EXACT])
    exact = [of_task(*case[1:]) for case in cases]

    def result(method: Method) -> Result:
        program = build(method, *cases)
        distances = [
            float(absolute_sums(optax.tree.sub(call()[1][1], each))[0] / absolute_sums(each)[0])
            for call, each in zip(program.calls, exact, strict=True)
        ]
        cost = program.cost.flops / gradient
        return {"distance": statistics.mean(distances), "cost": cost}

    results = {name: result(method) for name, method in methods.items()}
    parameters = optax.tree.size(draws[0][0])
    first, last = (results[f"Hutchinson {count}"]["cost"] for count in (counts[0], counts[-1]))
    one_more = (last - first) / (counts[-1] - counts[0])
    results["exact"] = {"distance": 0, "cost": first + (parameters - 1) * one_more}
    return {"parameters": parameters, "methods": results}


def draw(ax: Axes, title: str, results: dict[str, Result], counts: Sequence[int]) -> None:
    samples = [results[f"Hutchinson {count}"] for count in counts]
    x, y = [r["cost"] for r in samples], [r["distance"] for r in samples]
    ax.plot(
        x, y, "o-", color=HUTCHINSON, markersize=4, label=f"Hutchinson, {counts[0]} to {counts[-1]}"
    )
    for name in [name for name in MARKS if name in results]:
        colour, marker, size = MARKS[name]
        height = max(results[name]["distance"], ZERO)
        ax.plot(
            *(results[name]["cost"], height, marker),
            color=colour,
            markersize=size,
            label=name,
            linestyle="none",
        )
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.plot(results["exact"]["cost"], ZERO, "k*", markersize=10, label="exact", clip_on=False)
    ax.set(xscale="log", yscale="log", xlabel="arithmetic, in gradients", ylim=(ZERO, 60))
    ax.set_title(title, fontsize=10)
    ax.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
    ax.set_yticks([ZERO, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])


def picture(results: dict[str, Any], counts: Sequence[int], path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.9))
    axes = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, found) in zip(axes, results.items(), strict=True):
        draw(ax, name, found["methods"], counts)
    axes[0].set_ylabel("distance from the exact diagonal")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(path)


def main(options: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    tasks, seeds, counts = (SMOKE, 1, (1, 2)) if options.smoke else (TASKS, 2, COUNTS)
    results = {}
    for name, task in tasks.items():
        found = results[name] = measure(task, seeds, counts)
        rows = [[m, *(f"{x:.3g}" for x in r.values())] for m, r in found["methods"].items()]
        title = f"{name}: {found['parameters']} parameters"
        Table(title, ["", "distance", "cost"], rows, [describe(machine())]).show()
    path = options.output / "quality_cost.json"
    write(path, [], {"machine": machine(), "results": results})
    picture(results, counts, path.with_suffix(".png"))


if __name__ == "__main__":
    main(options(__doc__))
