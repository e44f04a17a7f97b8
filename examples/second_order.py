"""The family of second-order methods, side by side on one small problem.

    python examples/second_order.py
    python examples/second_order.py --problem mlp

Every method minimises the same loss from the same start, in float64 and without noise, and pays
for what it computes. The unit is a gradient on all of the data. The loss alone, a pass of HesScale
and a product with the Gauss-Newton matrix cost what XLA counts in them, relative to it. What is
compared is how much each method spends to come near the optimum, and what HesScale's diagonal does
for it: as an optimizer's curvature, as the start of L-BFGS, as the preconditioner of conjugate
gradients.

`centred` is softmax regression on scikit-learn's breast-cancer data, with hardly a penalty: convex,
and badly conditioned as data often are, with features in units from 1e-3 to 1e3. In `raw` they keep
their means, and so are coupled to each other and to the bias. `mlp` is a network on the digits.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.sparse.linalg import cg
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from tqdm import tqdm

import hesscale_jax as hs

Params = Any  # A pytree of arrays.
Update = tuple[Params, optax.OptState]

OUTPUT = Path(__file__).parent / "out" / "second_order.png"
ROUND = 10  # Iterations from one look at the budget to the next.


class Problem(NamedTuple):
    """To minimise: the cross-entropy of a model's logits, plus penalty / 2 * |params|^2."""

    model: Callable[[Array, Params], Array]
    start: Params
    inputs: Array
    labels: Array
    penalty: float
    damping: float  # Of Newton's steps: added to the matrix, to keep them short.
    accuracies: tuple[float, ...]  # How near to the optimum, relative to the start.

    def loss(self, params: Params, rows: Array | slice = slice(None)) -> Array:
        logits = self.model(self.inputs[rows], params)
        return self.head(logits, rows) + self.penalty / 2 * optax.tree.norm(params, squared=True)

    def head(self, logits: Array, rows: Array | slice = slice(None)) -> Array:
        labels = self.labels[rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def value_and_hesscale(self, params: Params) -> tuple[Array, tuple[Params, Params]]:
        return hs.value_and_hesscale(self.loss, curvature="gauss_newton")(params)

    def product(self, params: Params) -> Callable[[Params], Params]:
        """Multiplies with the Gauss-Newton matrix, which for a linear model is the Hessian.

        It is J^T H J + penalty, with the Jacobian J of the model and the Hessian H of the head.
        """
        logits, jvp = jax.linearize(partial(self.model, self.inputs), params)
        _, hvp = jax.linearize(jax.grad(self.head), logits)
        vjp = jax.linear_transpose(jvp, params)
        return lambda v: optax.tree.add_scale(vjp(hvp(jvp(v)))[0], self.penalty, v)


def regression(*, centred: bool) -> Problem:
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = np.c_[inputs - centred * inputs.mean(axis=0), np.ones(len(inputs))]
    start = jnp.zeros([inputs.shape[1], 2])
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    return Problem(
        jnp.matmul, start, inputs, labels, penalty=1e-6, damping=0, accuracies=(1e-2, 1e-4, 1e-8)
    )


def mlp() -> Problem:
    images, labels = (jnp.asarray(part[:600]) for part in load_digits(return_X_y=True))
    for_hidden, for_out = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(for_hidden, [64, 16]) / 8
    out = jax.random.normal(for_out, [16, 10]) / 4

    def model(inputs: Array, params: Params) -> Array:
        return jnp.tanh(inputs @ params["hidden"]) @ params["out"]

    return Problem(
        model,
        {"hidden": hidden, "out": out},
        images / 16,
        labels,
        penalty=1e-3,
        damping=3e-3,
        accuracies=(1e-1, 1e-2, 1e-3),
    )


PROBLEMS = {
    "centred": partial(regression, centred=True),
    "raw": partial(regression, centred=False),
    "mlp": mlp,
}


class Work(NamedTuple):
    """How often something is computed on all of the data, or what it costs in gradients."""

    gradient: Any = 0
    hesscale: Any = 0  # The gradient comes with it.
    product: Any = 0
    loss: Any = 0


def prices(problem: Problem) -> Work:
    def flops(function: Callable[[Params], Any]) -> float:
        return jax.jit(function).lower(problem.start).compile().cost_analysis()["flops"]

    # A product without what depends on the parameters alone, and is the same for all of a step's.
    product = problem.product(problem.start)
    work = Work(jax.grad(problem.loss), problem.value_and_hesscale, product, problem.loss)
    return Work(*(flops(function) / flops(work.gradient) for function in work))


class Method(NamedTuple):
    """A method as an Optax transformation, and what a step of it costs."""

    update: Callable[[Problem, float], optax.GradientTransformation]
    settings: tuple[float, ...]  # To choose the best of, whatever `update` takes them for.
    work: Callable[[float, float], Work]  # Of a setting, and of so many trials by `search`.
    search: optax.GradientTransformation = optax.identity()  # Chooses the length of a step.
    hess_diag: bool = False  # Whether `update` takes one.
    before: Work = Work()  # What is computed once, at the start.


def svrg(problem: Problem, learning_rate: float) -> optax.GradientTransformation:
    """An epoch of SGD, with each batch's noise reduced by what it was at the epoch's start."""
    batch_size, rows = 32, len(problem.labels)

    def update(grad: Params, key: Array, params: Params) -> Update:
        def step(now: Params, batch: Array) -> tuple[Params, None]:
            here, there = (jax.grad(problem.loss)(p, batch) for p in (now, params))
            corrected = jax.tree.map(lambda h, t, g: h - t + g, here, there, grad)
            return optax.tree.add_scale(now, -learning_rate, corrected), None

        key, for_order = jax.random.split(key)
        order = jax.random.permutation(for_order, rows)[: rows - rows % batch_size]
        end, _ = jax.lax.scan(step, params, order.reshape(-1, batch_size))
        return optax.tree.sub(end, params), key

    return optax.GradientTransformation(lambda _: jax.random.key(0), update)


def truncated_newton(problem: Problem, products: float) -> optax.GradientTransformation:
    """Solves (G + damping) u = -gradient with so many products, preconditioned by `hess_diag`."""

    def update(
        grad: Params, state: optax.OptState, params: Params, *, hess_diag: Params | None = None
    ) -> Update:
        product, damping = problem.product(params), problem.damping

        def damped(v: Params) -> Params:
            return optax.tree.add_scale(product(v), damping, v)

        def jacobi(residual: Params) -> Params:
            return jax.tree.map(lambda r, h: r / (h + damping), residual, hess_diag)

        rhs, preconditioner = optax.tree.scale(-1, grad), None if hess_diag is None else jacobi
        u, _ = cg(damped, rhs, maxiter=products, tol=1e-12, M=preconditioner)
        return u, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def in_units_of_curvature(
    problem: Problem, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Runs a method on y = sqrt(h) x, with the diagonal h at the start.

    L-BFGS then builds its matrix on a multiple of 1 / h in place of the identity's, for which
    `optax.scale_by_lbfgs` has no argument: the gradient by y is the one by x over sqrt(h), and so
    is the update of x the one of y. No diagonal is 0 or less here: the penalty is part of it.
    """

    def init(params: Params) -> optax.OptState:
        _, (_, hess_diag) = problem.value_and_hesscale(params)
        root = jax.tree.map(jnp.sqrt, hess_diag)
        return root, inner.init(optax.tree.mul(root, params))

    def update(grad: Params, state: optax.OptState, params: Params) -> Update:
        root, state = state
        u, state = inner.update(optax.tree.div(grad, root), state, optax.tree.mul(root, params))
        return optax.tree.div(u, root), (root, state)

    return optax.GradientTransformation(init, update)


RATES = tuple(10 ** (k / 2) for k in range(-10, 3))
PRODUCTS = (3.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0)
LBFGS = optax.lbfgs(linesearch=None)
# The last trial's gradient is that of the next step.
ZOOM = {
    "settings": (1.0,),
    "work": lambda _, trials: Work(gradient=trials),
    "search": optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one"),
}
# From Newton's own step of 1 on.
BACKTRACK = optax.scale_by_backtracking_linesearch(30, increase_factor=math.inf)


def first_order(optimizer: Callable[[float], optax.GradientTransformation]) -> Method:
    return Method(lambda _, rate: optimizer(rate), RATES, lambda *_: Work(gradient=1))


def diagonal(update: Callable[[Problem, float], optax.GradientTransformation]) -> Method:
    return Method(update, RATES, lambda *_: Work(hesscale=1), hess_diag=True)


def hessian_free(step: Work, *, hess_diag: bool) -> Method:
    def work(products: float, trials: float) -> Work:
        return step._replace(product=products, loss=trials)

    return Method(truncated_newton, PRODUCTS, work, BACKTRACK, hess_diag)


METHODS = {
    "gradient descent": first_order(optax.sgd),
    "momentum": first_order(partial(optax.sgd, momentum=0.9)),
    "Adam": first_order(optax.adam),
    "SVRG": Method(svrg, RATES, lambda *_: Work(gradient=3)),  # Two of them in batches.
    "AdaHesScaleGN": diagonal(lambda _, rate: hs.adahesscale(rate, eps=1e-8)),
    "diagonal Newton": diagonal(lambda p, rate: hs.diagonal_newton(rate, p.damping)),
    "L-BFGS": Method(lambda *_: LBFGS, **ZOOM, before=Work(gradient=1)),
    "L-BFGS from diagonal": Method(
        lambda problem, _: in_units_of_curvature(problem, LBFGS), **ZOOM, before=Work(hesscale=1)
    ),
    "Hessian-free": hessian_free(Work(gradient=1), hess_diag=False),
    "Hessian-free, diagonal": hessian_free(Work(hesscale=1), hess_diag=True),
}


class Run(NamedTuple):
    """A method at one of its settings: before each iteration, and after the last."""

    setting: float
    spent: np.ndarray  # Gradients.
    left: np.ndarray  # The loss; or what is above the optimum, relative to the start.

    def reaches(self, accuracy: float) -> tuple[float, float]:
        """Iterations and gradients that it takes."""
        (below,) = np.nonzero(self.left <= accuracy)
        return (below[0], self.spent[below[0]]) if len(below) else (math.inf, math.inf)


def runner(problem: Problem, method: Method, price: Work) -> Callable[[float, float], Run]:
    """Compiles a method, to run at any setting, with any budget."""
    search = optax.with_extra_args_support(method.search)

    def cost(work: Work) -> Array:
        return jnp.asarray(sum(n * each for n, each in zip(work, price, strict=True)), float)

    def step(setting: Array, carry: tuple, _: None) -> tuple[tuple, tuple[Array, Array]]:
        params, state, search_state, spent = carry
        curvature = {}
        if method.hess_diag:
            value, (grad, curvature["hess_diag"]) = problem.value_and_hesscale(params)
        else:
            value, grad = jax.value_and_grad(problem.loss)(params)
        update, state = method.update(problem, setting).update(grad, state, params, **curvature)
        update, search_state = search.update(
            update, search_state, params, value=value, grad=grad, value_fn=problem.loss
        )
        params = optax.apply_updates(params, update)
        trials = optax.tree.get(search_state, "num_linesearch_steps", 0)
        spent += cost(method.work(setting, trials))
        return (params, state, search_state, spent), (spent, problem.loss(params))

    @jax.jit
    def iterate(setting: Array, carry: tuple) -> tuple[tuple, tuple[Array, Array]]:
        return jax.lax.scan(partial(step, setting), carry, length=ROUND)

    def run(setting: float, budget: float) -> Run:
        state = method.update(problem, setting).init(problem.start)
        carry = problem.start, state, search.init(problem.start), cost(method.before)
        history = [np.array([[carry[-1]], [problem.loss(problem.start)]])]
        while history[-1][0, -1] < budget and np.isfinite(history[-1][1, -1]):
            carry, record = iterate(jnp.asarray(setting), carry)
            history.append(np.array(record))
        spent, losses = np.concatenate(history, axis=1)
        return Run(setting, spent[spent <= budget], losses[spent <= budget])

    return run


def compare(problem: Problem, price: Work, budget: float, every: int) -> dict[str, Run]:
    """Runs each method at every so many-th of its settings, and keeps the best."""
    runs: dict[str, list[Run]] = {}
    with tqdm(METHODS.items(), unit="method") as progress:
        for name, method in progress:
            progress.set_description(name)
            run = runner(problem, method, price)
            runs[name] = [run(setting, budget) for setting in method.settings[::every]]
    # The optimum by Newton's method, for long; of a network, unless another finds a lower minimum.
    optimum = np.nanmin(run(40.0, 5 * budget).left)
    optimum = min(optimum, *(np.nanmin(run.left) for tried in runs.values() for run in tried))

    def relative(run: Run) -> Run:
        return run._replace(left=(run.left - optimum) / (run.left[0] - optimum))

    def rank(run: Run) -> list[float]:
        """The first to the last accuracy; or if none is, to the one before it, and so on."""
        return [run.reaches(a)[1] for a in reversed(problem.accuracies)] + [np.nanmin(run.left)]

    return {name: min(map(relative, tried), key=rank) for name, tried in runs.items()}


def table(results: dict[str, Run], accuracies: tuple[float, ...]) -> str:
    """Iterations and gradients to each accuracy."""
    titles = "".join(f"{f'to {accuracy:.0e}':>16}" for accuracy in accuracies)
    lines = [f"{'method':24}  {'setting':>7}{titles}  {'left':>7}"]
    for name, run in results.items():
        reached = [x for accuracy in accuracies for x in run.reaches(accuracy)]
        cells = "".join(f"{x:8.0f}" if x < math.inf else f"{'-':>8}" for x in reached)
        lines.append(f"{name:24}  {run.setting:7.2g}{cells}  {np.nanmin(run.left):7.0e}")
    return "\n".join(lines)


# Okabe and Ito's colours; dashed without the diagonal, where there is a solid line with it.
STYLES = {
    "gradient descent": {"color": "0.65"},
    "momentum": {"color": "0.4"},
    "Adam": {"color": "black"},
    "SVRG": {"color": "#CC79A7"},
    "AdaHesScaleGN": {"color": "#E69F00"},
    "diagonal Newton": {"color": "#56B4E9"},
    "L-BFGS": {"color": "#009E73", "linestyle": "--"},
    "L-BFGS from diagonal": {"color": "#009E73"},
    "Hessian-free": {"color": "#D55E00", "linestyle": "--"},
    "Hessian-free, diagonal": {"color": "#D55E00"},
}


def draw(results: dict[str, Run], floor: float, budget: float, path: Path) -> None:
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    ax = figure.subplots()
    ax.set(yscale="log", xlim=(0, budget), ylim=(floor, 1), xlabel="gradients, or as much work")
    ax.set_ylabel("loss above the optimum, relative to the start")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    least = {name: np.fmin.accumulate(run.left) for name, run in results.items()}
    for name, left in least.items():
        ax.plot(results[name].spent, left.clip(floor / 10), linewidth=1.5, **STYLES[name])

    # Names: at the bottom, where lines leave there; else on the right, far enough apart to be read.
    def where(name: str) -> tuple[float, float]:
        return results[name].reaches(floor)[1], least[name][-1]

    first, height = True, -1.0
    for name in sorted(results, key=where):
        color, (leaves, left) = STYLES[name]["color"], where(name)
        if leaves < math.inf:
            # The first to the left of its line, clear of it up to ten times the floor.
            at, side = (
                (results[name].reaches(10 * floor)[1], "right") if first else (leaves, "left")
            )
            shift = (-6 if first else 6, 8)
            ax.annotate(name, (at, floor), shift, textcoords="offset points", ha=side, color=color)
            first = False
        else:
            height = max(1 - math.log(left, floor), height + 0.05)
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": color, "relpos": (0, 0.5)}
            style = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
            end = results[name].spent[-1], left
            ax.annotate(name, end, (1.03, height), color=color, arrowprops=line, **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="centred")
    parser.add_argument("--budget", type=float, default=1000, help="gradients a run may spend")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to put the picture")
    parser.add_argument("--smoke", action="store_true", help="only try it: fewer settings")
    args = parser.parse_args()
    budget, every = (500, 4) if args.smoke else (args.budget, 1)
    jax.config.update("jax_enable_x64", True)

    problem = PROBLEMS[args.problem]()
    price = prices(problem)
    results = compare(problem, price, budget, every)
    draw(results, problem.accuracies[-1] / 10, budget, args.output)
    print(*(f"{name} {cost:.2f}" for name, cost in price._asdict().items()), sep=", ")
    print(table(results, problem.accuracies))
    print(f"Drawn in {args.output}")


if __name__ == "__main__":
    main()
