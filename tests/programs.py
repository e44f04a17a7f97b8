"""Random programs, by family, and what must hold for each.

A family draws a program with any ``random.Random``: one of hypothesis's, which shrinks, or one of
a fixed seed. A program is the source text of a JAX function, so that a failure can be read and run.
Many more than the tests draw are checked by

    python tests/programs.py --count 1000 [--family block] [--compiled]
"""

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import math
import random
import re
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import sparse

import hesscale_jax as hs
from hesscale_jax import _jaxpr, images, testing
from hesscale_jax.planning import plan
from hesscale_jax.rules.table import find
from hesscale_jax.transform import transposed

RTOL = 1e-9
FLOOR = 1e-3  # what counts as the size of derivatives that cancel
Shape = tuple[int, ...]

SHAPES = ((2, 3), (3, 2), (3, 3), (4,), (1, 3), (2, 1), (1,), (2, 3, 2), (2, 1, 3), ())
STEP = "step[...]"  # the number of a step of a loop, in a reference
FRAMES = ((4,), (2, 3), (3, 2), (3, 3), (1, 4), (4, 1), (2, 3, 2), (3, 1, 2), (2, 2, 2), (1, 1))

SMOOTH = (
    "jnp.tanh({0})",
    "jnp.sin({0})",
    "jnp.square({0})",
    "0.3 * {0}**3",
    "jnp.exp(-jnp.square({0}))",
    "jnp.sqrt(1.0 + {0} * {0})",
    "jnp.log1p({0}**2)",
    "1.0 / (2.0 + jnp.cos({0}))",
    "jax.lax.rsqrt(0.5 + {0}**2)",
    "jax.nn.sigmoid({0})",
    "jax.nn.softplus({0})",
    "jax.nn.silu({0})",
    "jax.nn.gelu({0}, approximate=False)",
    "0.7 - 0.5 * {0}",
    "{0} * jnp.arctan({0})",
    "jnp.ldexp({0}, 1)",
    "jnp.polyval(jnp.array([0.2, -0.3, 0.5]), {0})",
    "jax.scipy.special.sici({0})[0]",
    "jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y + 0.1 * {0}), {0})",
    "jnp.abs(jnp.exp(jax.lax.complex(0.1 * {0}, {0})) + 2.0)",
    "jnp.where(True, jnp.sin({0}), {0})",
    "jnp.frexp(1.5 + jnp.square({0}))[0]",
    "jax.scipy.stats.norm.ppf(0.1 + 0.8 * jax.nn.sigmoid({0}))",
    "root({0})",
)
# Where the derivatives do not cancel at 0, as those of the sine integral do.
ANY_DTYPE = tuple(x for x in SMOOTH if not re.search("array|complex|sici|root|ppf", x))
# JAX's second derivative of these in a loop is another than outside it, and wrong.
NOT_IN_LOOPS = {"jnp.ldexp": "jnp.multiply", "jnp.frexp": "jax.scipy.special.sici"}
KINKED = (
    "jax.nn.relu({0})",
    "jax.nn.elu({0})",
    "jnp.abs({0})",
    "jnp.clip({0}, -0.8, 0.9)",
    "jnp.where({0} > 0.1, {0}, jnp.square({0}))",
    "{0} - jax.lax.stop_gradient({0}) * {0}",
    "jnp.where({0} > 0.0, jnp.log(jnp.where({0} > 0.0, {0}**2, 0.0)), 0.3)",
    "where_positive(jnp.log, jax.nn.relu({0}))",
    "where_positive(jnp.sqrt, jnp.where({0} > 0.2, {0}, 0.0))",
    "where_positive(lambda x: x**-2, jnp.where({0} > 0.3, {0}, 0.0))",
)
# What forms go through: no loop, nor a choice between infinite slopes.
FOLLOWED = (*SMOOTH[:14], "jax.nn.relu({0})", "jnp.abs({0})")
BINARY = (
    "{0} + {1}",
    "{0} - {1}",
    "{0} * {1}",
    "{0} / (1.5 + {1}**2)",
    "jnp.maximum({0}, {1})",
    "jnp.logaddexp({0}, {1})",
    "jnp.arctan2({0}, 1.5 + {1}**2)",
    "(1.0 + {0}**2) ** jnp.tanh({1})",
    "jnp.where({0} > {1}, {0} * {1}, {1})",
)
SMOOTH_BINARY = tuple(x for x in BINARY if "max" not in x and "where" not in x)
REDUCTIONS = ("jnp.sum", "jnp.mean", "jnp.max", "jnp.min", "jax.nn.logsumexp", "jnp.var")


@jax.custom_jvp
def on_simplex(z: Any) -> Any:
    """The nearest point of the simplex, of each row."""
    u = -jnp.sort(-z, -1)
    count = 1.0 + jnp.arange(z.shape[-1], dtype=z.dtype)[None]
    excess = (jnp.cumsum(u, -1) - 1) / count
    last = jnp.sum(u > excess, -1, keepdims=True) - 1
    return jax.nn.relu(z - jnp.take_along_axis(excess, last, -1))


@on_simplex.defjvp
def on_simplex_jvp(primals: Any, tangents: Any) -> Any:
    y = on_simplex(*primals)
    inside = (y > 0).astype(y.dtype)
    mean = jnp.sum(inside * tangents[0], -1, keepdims=True) / jnp.sum(inside, -1, keepdims=True)
    return y, inside * (tangents[0] - mean)


def sparsemax(z: Any, t: Any) -> Any:
    p, label = on_simplex(z), jnp.argmax(t, -1, keepdims=True)
    scores = z - jnp.take_along_axis(z, label, -1)
    return jnp.mean(jnp.sum(p * scores, -1) - 0.5 * jnp.sum(p * p, -1))


HEADS = {
    "sparsemax": sparsemax,
    "cross_entropy": lambda z, t: optax.softmax_cross_entropy_with_integer_labels(
        z, jnp.arange(z.shape[0]) % z.shape[1]
    ).mean(),
    "soft_cross_entropy": lambda z, t: optax.softmax_cross_entropy(z, jax.nn.softmax(t)).mean(),
    "squared_error": lambda z, t: jnp.mean((z - t) ** 2),
    "logistic": lambda z, t: optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(t)).mean(),
    "huber": lambda z, t: optax.huber_loss(z, t, delta=0.7).mean(),
    "poisson": lambda z, t: jnp.sum(jnp.exp(z) - z * t**2),
}


def where_positive(fun: Callable[[Any], Any], x: Any) -> Any:
    """A function where it has a value and a derivative, 0 elsewhere."""
    return jnp.where(x > 0, fun(x), 0.0)


@jax.custom_jvp
def root(x: Any) -> Any:
    """The ``y`` of ``y + tanh(y) / 2 = x``, by Newton's method."""

    def step(state: Any) -> Any:
        y, _ = state
        excess = y + 0.5 * jnp.tanh(y) - x
        return y - excess / (1.5 - 0.5 * jnp.tanh(y) ** 2), jnp.max(jnp.abs(excess), initial=0.0)

    start = (x, jnp.ones((), x.dtype))
    return jax.lax.while_loop(lambda state: state[1] > 1e-13, step, start)[0]


@root.defjvp
def _(primals: Any, tangents: Any) -> Any:
    y = root(*primals)
    return y, tangents[0] / (1.5 - 0.5 * jnp.tanh(y) ** 2)


def sparse_product(entries: Any, dense: Any) -> Any:
    """A sparse matrix with these entries, of which some share a place, times a dense one."""
    at = np.arange(entries.size)
    matrix = sparse.BCOO(
        (entries, np.stack([at % 2, at % dense.shape[0]], 1)), shape=(2, dense.shape[0])
    )
    return matrix @ dense


class Node(NamedTuple):
    """A variable of a program."""

    name: str
    shape: Shape

    def __str__(self) -> str:
        return self.name


class Program:
    """The source of a function of several arrays, written line by line."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.inputs: dict[str, jax.Array] = {}
        self.constants: dict[str, jax.Array] = {}
        self.nodes: list[Node] = []
        self.exact: list[Node] = []  # the inputs in which the diagonal is exact
        self.moving: set[str] = set()  # what depends on an input
        self.read: set[str] = set()
        self.names = itertools.count()
        self.depth = 0  # of functions within functions
        self.closed = False  # whether it may read its own nodes alone

    def input(self, shape: Shape, exact: bool = False) -> Node:
        node = self._array(self.inputs, f"p{len(self.inputs)}", shape)
        self.exact += [node] if exact else []
        self.moving.add(node.name)
        return node

    def constant(self, shape: Shape) -> Node:
        return self._array(self.constants, f"c{len(self.constants)}", shape)

    def _array(self, arrays: dict[str, jax.Array], name: str, shape: Shape) -> Node:
        seed = [len(self.inputs), len(self.constants), len(arrays)]
        arrays[name] = jnp.asarray(np.random.default_rng(seed).normal(size=shape))
        self.nodes.append(Node(name, shape))
        return self.nodes[-1]

    def add(self, expression: str, shape: Sequence[int]) -> Node:
        node = Node(f"v{next(self.names)}", tuple(shape))
        self.lines.append(f"{node} = {expression}")
        operands = set(re.findall(r"\b[vpcar]\d+\b", expression))
        self.read |= operands
        if not self.moving.isdisjoint(operands):
            self.moving.add(node.name)
        self.nodes.append(node)
        return node

    def pick(self, fits: Callable[[Node], bool] = lambda node: True) -> Node | None:
        """A node that fits, more often one that moves, and a recent one."""
        fitting = list(filter(fits, self.nodes))
        if self.rng.random() < 0.8:
            fitting = [x for x in fitting if x.name in self.moving] or fitting
        recent = fitting[-3:] if self.rng.random() < 0.6 else fitting
        return self.rng.choice(recent) if recent else None

    def unread(self) -> list[Node]:
        """The nodes that move with an input and that no line reads."""
        return [x for x in self.nodes if x.name in self.moving - self.read]

    def choose(self, *options: Any) -> Any:
        return self.rng.choice(options)

    # Functions within the program

    def inner(self, closed: bool = False) -> "Program":
        """The body of a function, which reads this program's nodes too unless it is ``closed``."""
        body = copy.copy(self)
        body.lines, body.nodes = [], [] if closed else list(self.nodes)
        body.depth, body.closed = self.depth + 1, closed
        return body

    def argument(self, operand: Node, shape: Shape) -> Node:
        node = Node(f"a{next(self.names)}", shape)
        if operand.name in self.moving:
            self.moving.add(node.name)
        self.nodes.append(node)
        return node

    def define(self, body: "Program", parameters: str, result: str, decorator: str = "") -> str:
        """Write down the function; returns its name."""
        name = f"f{next(self.names)}"
        self.lines.append(f"{decorator}{definition(name, parameters, body.lines, result)}")
        return name

    def call(self, expression: str, results: Sequence[Node]) -> str:
        """Write down a call that moves if the function's results do; returns the result's name."""
        name = f"r{next(self.names)}"
        self.lines.append(f"{name} = {expression}")
        operands = {str(x) for x in results} | set(re.findall(r"\b[vpcar]\d+\b", expression))
        self.read |= operands
        if not self.moving.isdisjoint(operands):
            self.moving.add(name)
        return name

    def function(self, result: str) -> Callable[..., jax.Array]:
        """The program as a function of its inputs, with its text in ``__doc__``."""
        text = definition("f", ", ".join(self.inputs), self.lines, result)
        given = {
            "jax": jax,
            "jnp": jnp,
            "name": checkpoint_name,
            "where_positive": where_positive,
        }
        scope = given | HEADS | self.constants
        scope |= {"functools": functools, "with_jvp": with_jvp, "with_vjp": with_vjp}
        scope |= {"straight_through": straight_through_by, "root": root}
        scope |= {"sparse_product": sparse_product}
        exec(text, scope)
        shapes = {name: x.shape for name, x in (self.inputs | self.constants).items()}
        scope["f"].__doc__ = f"{text}\n{shapes}"
        return scope["f"]


def definition(name: str, parameters: str, lines: list[str], result: str) -> str:
    body = textwrap.indent("\n".join([*lines, f"return {result}"]), "    ")
    return f"def {name}({parameters}):\n{body}"


def with_jvp(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a derivative rule of its own, which is not its derivative."""

    def rule(primals: Any, tangents: Any) -> Any:
        _, dy = jax.jvp(fun, primals, tangents)
        return function(*primals), jax.tree.map(lambda x: 0.7 * x, dy)

    function = jax.custom_jvp(fun)
    function.defjvp(rule)
    return function


def with_vjp(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same in reverse mode."""

    def back(args: Any, g: Any) -> Any:
        return tuple(0.7 * x for x in jax.vjp(fun, *args)[1](g))

    function = jax.custom_vjp(fun)
    function.defvjp(lambda *args: (fun(*args), args), back)
    return function


def straight_through_by(fun: Callable[[Any], Any], slope: float) -> Callable[[Any], Any]:
    """A function whose rule says that it is linear."""
    function = jax.custom_vjp(fun)
    function.defvjp(lambda x: (fun(x), None), lambda _, g: (slope * g,))
    return function


class Case(NamedTuple):
    """A function and where to evaluate it."""

    fun: Callable[..., jax.Array]
    args: list[jax.Array]
    exact: list[int] = []  # noqa: RUF012
    twin: Callable[..., jax.Array] | None = None  # the same function, written in another way


def case(program: Program, result: str) -> Case:
    exact = [list(program.inputs).index(node.name) for node in program.exact]
    return Case(program.function(result), list(program.inputs.values()), exact)


# One operation on nodes of a program. Without operands that fit, nothing is added.


def broadcastable(a: Shape, b: Shape) -> bool:
    if not a or not b:
        return True
    return len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))


def subset(program: Program, axes: Sequence[int]) -> tuple[int, ...]:
    """Some of the axes, at least one."""
    return tuple(sorted(program.rng.sample(axes, program.rng.randint(1, len(axes)))))


def without(shape: Shape, axes: Sequence[int], keepdims: bool = False) -> Shape:
    """The shape of a reduction's result."""
    kept = [(i, 1 if i in axes else n) for i, n in enumerate(shape)]
    return tuple(n for i, n in kept if keepdims or i not in axes)


def unary(program: Program, x: Node | None = None) -> None:
    x = x or program.pick()
    program.add(program.choose(*SMOOTH, *KINKED).format(x), x.shape)


def binary(program: Program) -> None:
    x = program.pick()
    y = program.pick(lambda y: broadcastable(x.shape, y.shape))
    x, y = program.choose((x, y), (y, x))
    program.add(program.choose(*BINARY).format(x, y), np.broadcast_shapes(x.shape, y.shape))


def reduce(program: Program) -> None:
    if x := program.pick(lambda x: x.shape):
        axes = subset(program, range(len(x.shape)))
        reduction(program, x, axes)


def reduction(program: Program, x: Node, axes: tuple[int, ...]) -> None:
    keepdims = program.choose(True, False)
    text = f"{program.choose(*REDUCTIONS)}({x}, {axes}, keepdims={keepdims})"
    program.add(text, without(x.shape, axes, keepdims))


def reordered(program: Program, x: Node, shape: Sequence[int]) -> Node:
    """In one equation: the axes in another order, then another shape."""
    order = program.rng.sample(range(len(x.shape)), len(x.shape))
    return program.add(f"jax.lax.reshape({x}, {tuple(shape)}, {tuple(order)})", tuple(shape))


def view(program: Program) -> None:
    x = program.pick()
    axis = program.rng.randint(0, len(x.shape))
    wider = (*x.shape[:axis], 1, *x.shape[axis:])
    program.choose(
        lambda: program.add(f"{x}.reshape(-1)", (math.prod(x.shape),)),
        lambda: program.add(f"{x}.reshape({x.shape[::-1]})", x.shape[::-1]),
        lambda: reordered(program, x, x.shape),
        lambda: program.add(f"jnp.expand_dims({x}, {axis})", wider),
        lambda: program.add(f"jnp.squeeze({x})", [n for n in x.shape if n > 1]),
        lambda: program.add(
            f"jnp.broadcast_to({x}, {(2, *(3 if n == 1 else n for n in x.shape))})",
            (2, *(3 if n == 1 else n for n in x.shape)),
        ),
    )()


def selection(program: Program, x: Node | None = None) -> None:
    x = x or program.pick(lambda x: x.shape)
    if x is None or not x.shape:
        return
    order = program.rng.sample(range(len(x.shape)), len(x.shape))
    other = program.pick(lambda y: y.shape == x.shape)
    program.choose(
        lambda: program.add(f"jnp.transpose({x}, {order})", [x.shape[i] for i in order]),
        lambda: program.add(f"{x}[:1]", (1, *x.shape[1:])),
        lambda: program.add(f"{x}[::-1]", x.shape),
        lambda: program.add(f"jnp.roll({x}, 1, -1)", x.shape),
        lambda: program.add(f"{x}[0]", x.shape[1:]),
        lambda: program.add(f"jnp.take({x}, jnp.array([0, -1]), 0)", (2, *x.shape[1:])),
        lambda: program.add(f"jnp.concatenate([{x}, {other}])", (2 * x.shape[0], *x.shape[1:])),
        lambda: program.add(f"jnp.stack([{x}, {other}], 1)", (x.shape[0], 2, *x.shape[1:])),
        lambda: program.add(f"jnp.cumsum({x}, 0)", x.shape),
        lambda: program.add(f"jnp.sort({x}, 0)", x.shape),
        lambda: program.add(f"jnp.pad({x}, 1)", [n + 2 for n in x.shape]),
    )()


def product(program: Program) -> None:
    x = program.pick(lambda x: len(x.shape) in (2, 3))
    if x is None:
        return
    *batch, n, k = x.shape
    letters = "bij"[-len(x.shape) :]
    alike = program.pick(lambda y: y.shape == x.shape)
    fits = program.pick(lambda y: y.shape[:-1] == (*batch, k)) or program.input((*batch, k, 2))
    program.choose(
        lambda: program.add(f"{x} @ {fits}", (*batch, n, fits.shape[-1])),
        lambda: program.add(f"{x} @ {program.input((k,))}", (*batch, n)),
        lambda: program.add(
            f"jnp.einsum('{letters},{letters}->{letters[:-1]}', {x}, {alike})", x.shape[:-1]
        ),
        lambda: program.add(f"jnp.vdot({x}, {alike})", ()),
        lambda: program.add(f"{x} @ jnp.swapaxes({x}, -1, -2)", (*batch, n, n)),
    )()


def nothing(program: Program) -> None:
    """Operands without entries."""
    if x := program.pick(lambda x: x.shape):
        none, n = f"jnp.sin({x}[:0])", x.shape[0]
        program.choose(
            lambda: program.add(f"jnp.concatenate([{none}, {x}])", x.shape),
            lambda: program.add(f"{x} + jnp.sum({none}, 0, keepdims=True)", x.shape),
            lambda: program.add(f"{x} * jnp.prod({none}, 0, keepdims=True)", x.shape),
            lambda: program.add(f"{x} + jnp.vdot({none}, {none})", x.shape),
            lambda: program.add(f"{x} + jnp.tensordot(jnp.ones(({n}, 0)), {none}, 1)", x.shape),
        )()


def closed(program: Program) -> None:
    """An infinite slope, not taken, where a choice closes all that is added up."""
    if x := program.pick(lambda x: x.shape):
        n, *rest = x.shape
        c = program.choose(f"jax.nn.relu({x} - 0.4)", f"jnp.where({x} > 0.3, {x}, 0.0)")
        added_up, m = program.choose(
            (f"jnp.cumsum({c}, 0)", n),
            (f"{c} + 0.5 * {c}[::-1]", n),
            (f"jnp.sum({c}, 0, keepdims=True)", 1),
            (f"jax.ops.segment_sum({c}, jnp.arange({n}) // 2, {n})", n),
        )
        fun = program.choose("jnp.log", "jnp.sqrt", "lambda x: x**-2")
        program.add(f"where_positive({fun}, {added_up})", (m, *rest))


OPERATIONS = (unary, unary, binary, binary, reduce, view, selection, product, nothing, closed)


def grow(program: Program, count: int, operations: Sequence[Callable] = OPERATIONS) -> None:
    for _ in range(count):
        program.choose(*operations)(program)
        if math.prod(program.nodes[-1].shape) > 64:
            program.nodes.pop()


def loss_of(program: Program) -> str:
    """A scalar of all that nothing has read, or of the last value."""
    ends = ("jnp.sum({})", "jnp.mean({}**2)")
    values = program.unread() or program.nodes[-1:]
    return " + ".join(program.choose(*ends).format(x) for x in values)


# Operations of the family "control"


def rare(program: Program) -> None:
    """Primitives that are neither pointwise nor linear with coefficients of one."""
    x = program.pick(lambda x: x.shape)
    if x is None:
        return
    (n, *rest), axes = x.shape, subset(program, range(len(x.shape)))
    row = program.pick(lambda y: y.shape == (1, *rest)) or x
    index = f"jnp.argmax({x}.reshape(-1)) % {n}"
    program.choose(
        lambda: program.add(f"jnp.cumprod({x}, 0)", x.shape),
        lambda: program.add(f"jax.lax.cumlogsumexp({x}, 0)", x.shape),
        lambda: program.add(f"jnp.prod({x}, {axes})", without(x.shape, axes)),
        lambda: program.add(f"{x}.at[{n - 1}].add(jnp.sin({row}[0]))", x.shape),
        lambda: program.add(f"{x}.at[jnp.array([0])].set({row}[:1] ** 2)", x.shape),
        lambda: program.add(f"{x}.at[0].multiply({row}[0])", x.shape),
        lambda: program.add(f"{x}[jnp.array([{n - 1}, 0, 0])]", (3, *rest)),
        lambda: program.add(f"jax.lax.dynamic_slice_in_dim({x}, {index}, 1)", (1, *rest)),
        lambda: program.add(f"jax.ops.segment_sum({x}, jnp.arange({n}) % 2, 2)", (2, *rest)),
        lambda: program.add(f"jax.lax.top_k({x}, 1)[0]", (*x.shape[:-1], 1)),
        lambda: convolution(program),
        lambda: matrix_function(program),
        lambda: scaled_by_rank_0(program),
        lambda: derivative(program),
        lambda: sparse_matrix(program),
        lambda: program.add(f"jax.nn.softmax({x}, {axes}, where={x} > 0.1)", x.shape),
    )()


def matrix_function(program: Program) -> None:
    """Of a matrix that is well conditioned."""
    x = program.pick(lambda x: len(x.shape) == 2 and min(x.shape) >= 1)
    if x is None:
        return
    n, m = x.shape
    a = f"(jnp.tanh({x}) @ jnp.tanh({x}).T + jnp.diag(jnp.arange(2.0, 2.0 + {n})))"
    program.choose(
        lambda: program.add(f"jnp.linalg.inv({a})", (n, n)),
        lambda: program.add(f"jnp.linalg.solve({a}, {x})", (n, m)),
        lambda: program.add(f"jnp.linalg.cholesky({a})", (n, n)),
        lambda: program.add(f"jnp.linalg.slogdet({a})[1]", ()),
        lambda: program.add(f"jnp.linalg.eigvalsh({a})", (n,)),
        lambda: program.add(f"jnp.linalg.svd({a}, compute_uv=False)", (n,)),
        lambda: program.add(f"jnp.linalg.qr({a})[1]", (n, n)),
        lambda: program.add(f"jnp.linalg.det({a})", ()),
        lambda: program.add(f"jax.scipy.linalg.solve_triangular({a}, {x}, lower=True)", (n, m)),
        lambda: program.add(f"jnp.abs(jnp.fft.rfft({x}, axis=0) + 2.0)", (n // 2 + 1, m)),
        lambda: program.add(f"jnp.fft.fft({x}).imag", (n, m)),
        lambda: program.add(f"jnp.fft.irfft(jnp.fft.rfft({x}, axis=0) * 1j, {n}, axis=0)", (n, m)),
    )()


def scaled_by_rank_0(program: Program) -> None:
    """Products with an operand of rank 0."""
    if (s := program.pick(lambda x: not x.shape)) and (x := program.pick()):
        none = "((), ()), ((), ())"
        program.add(f"jax.lax.dot_general({s}, {x}, ({none}))", x.shape)


def sparse_matrix(program: Program) -> None:
    """Products of a sparse and a dense matrix."""
    if (x := program.pick(lambda x: x.shape)) and (y := program.pick(lambda y: len(y.shape) == 2)):
        program.add(f"sparse_product({x}.reshape(-1), {y})", (2, y.shape[1]))


def derivative(program: Program) -> None:
    """The derivative of a function of one value, in the program itself."""
    x = program.pick()
    function = program.choose(*SMOOTH).format("x")
    program.add(f"jax.grad(lambda x: jnp.sum({function}))({x})", x.shape)


def convolution(program: Program) -> None:
    if x := program.pick(lambda x: len(x.shape) == 2):
        channels, width = x.shape
        kernel = program.pick(lambda y: y.shape == (2, channels, 2))
        new = program.constant if program.closed else program.input
        kernel = kernel or new((2, channels, 2))
        text = f"jax.lax.conv_general_dilated({x}[None], {kernel}, (1,), 'SAME')[0]"
        program.add(text, (2, width))


def grow_inside(body: Program, count: int, operations: Sequence[Callable] | None = None) -> Node:
    """More nodes of a function's body; returns the last."""
    deeper = STATEMENTS if body.depth < 2 else ()
    grow(body, count, operations or (*OPERATIONS, rare, *deeper))
    return body.nodes[-1]


def like(body: Program, shape: Shape) -> Node:
    """A node of the body of this shape, bounded now and then."""
    x = body.pick(lambda x: x.shape == shape) or body.nodes[0]
    return body.add(body.choose("{}", "jnp.tanh({})", "0.5 * {}").format(x), shape)


def checkpoint(program: Program) -> None:
    x = program.pick()
    body = program.inner()
    a = body.argument(x, x.shape)
    y = grow_inside(body, program.rng.randint(1, 4))
    decorator = program.choose(
        "@jax.checkpoint\n",
        "@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)\n",
    )
    f = program.define(body, f"{a}", f"{y}", decorator)
    program.add(program.call(f"{f}({x})", [y]), y.shape)


def scan(program: Program) -> None:
    """A carry of one or two values, which may start as data, and perhaps something to scan over."""
    rng = program.rng
    starts = [start(program) for _ in range(rng.randint(1, 2))]
    xs = program.pick(lambda x: x.shape and x.shape[0] <= 3) if rng.random() < 0.7 else None
    body = program.inner()
    carry = [body.argument(x, x.shape) for x in starts]
    x = body.argument(xs, xs.shape[1:]) if xs else "_"
    y = grow_inside(body, rng.randint(1, 4))
    handed_on = [like(body, a.shape) for a in carry]
    result = f"({joined(handed_on)}), {y}"
    body.lines.insert(0, f"({joined(carry)}) = carry")
    f = program.define(body, f"carry, {x}", result)
    length = xs.shape[0] if xs else rng.randint(1, 3)
    how = f"length={length}, reverse={rng.choice((True, False))}"
    call = f"jax.lax.scan({f}, ({joined(starts)}), {xs}, {how})"
    r = program.call(call, [*handed_on, y])
    for i, a in enumerate(carry):
        program.add(f"{r}[0][{i}]", a.shape)
    program.add(f"{r}[1]", (length, *y.shape))


def start(program: Program) -> Node:
    """What a carry starts as: now and then it moves inside the loop alone."""
    still = program.pick(lambda x: x.name not in program.moving)
    return still if still and program.rng.random() < 0.3 else program.pick()


def joined(nodes: Sequence[Node]) -> str:
    return "".join(f"{x}, " for x in nodes)


def fori_loop(program: Program) -> None:
    x = start(program)
    xs = program.pick(lambda x: x.shape)
    body = program.inner()
    a = body.argument(x, x.shape)
    if xs:
        body.add(f"{xs}[i % {xs.shape[0]}]", xs.shape[1:])
    grow_inside(body, program.rng.randint(1, 3))
    y = like(body, a.shape)
    f = program.define(body, f"i, {a}", f"{y}")
    call = f"jax.lax.fori_loop(0, {program.rng.randint(1, 3)}, {f}, {x})"
    program.add(program.call(call, [y]), a.shape)


def branches(program: Program) -> None:
    x = program.pick()
    functions, results = [], []
    for _ in range(program.rng.randint(2, 3)):
        body = program.inner()
        a = body.argument(x, x.shape)
        grow_inside(body, program.rng.randint(0, 3))
        results.append(like(body, a.shape))
        functions.append(program.define(body, f"{a}", f"{results[-1]}"))
    sign = program.choose(*[f"jnp.sum({program.pick()}) > 0.1"] * 4, "True")
    if len(functions) == 2:
        call = f"jax.lax.cond({sign}, {', '.join(functions)}, {x})"
    else:
        call = f"jax.lax.switch(2 * jnp.asarray({sign}).astype(int), [{', '.join(functions)}], {x})"
    program.add(program.call(call, results), x.shape)


def own_rule(program: Program) -> None:
    """A function of one or two values with a derivative rule of its own."""
    operands = [program.pick() for _ in range(program.rng.randint(1, 2))]
    body = program.inner(closed=True)
    arguments = [body.argument(x, x.shape) for x in operands]
    y = grow_inside(body, program.rng.randint(1, 4), (unary, binary, reduce, view, selection, rare))
    results = [y] if program.rng.random() < 0.7 else [y, like(body, arguments[0].shape)]
    f = program.define(
        body,
        ", ".join(map(str, arguments)),
        f"[{joined(results)}]",
        program.choose("@with_jvp\n", "@with_vjp\n"),
    )
    r = program.call(f"{f}({', '.join(map(str, operands))})", results)
    for i, y in enumerate(results):
        program.add(f"{r}[{i}]", y.shape)


def straight_through(program: Program) -> None:
    """A function without a derivative, that has one by its own rule."""
    x = program.pick()
    function = program.choose(
        "jnp.round(2.0 * {0}) / 2.0",
        "jnp.sign({0})",
        "jnp.floor({0}) + 0.5",
        "jax.lax.while_loop(lambda y: jnp.sum(y**2) > 1.0, lambda y: 0.5 * y, {0})",
    )
    text = f"straight_through(lambda x: {function.format('x')}, {program.choose(1.0, 0.7)})({x})"
    program.add(text, x.shape)


def counted(program: Program) -> None:
    """A loop that counts its steps in a reference from outside; ``at`` is what it has counted."""
    x = start(program)
    body = program.inner()
    a = body.argument(x, x.shape)
    y = grow_inside(body, program.rng.randint(1, 2), (*OPERATIONS, own_rule))
    z = like(body, a.shape)
    w = body.add(f"{z} * {STEP}", z.shape)
    body.lines.insert(0, f"{STEP} = {STEP} + 0.5")
    f = program.define(body, f"{a}, at", f"{w}, {y}")
    program.lines.append("step = jax.new_ref(jnp.zeros(()))")
    length = program.rng.randint(1, 3)
    r = program.call(f"jax.lax.scan({f}, {x}, 0.5 * jnp.arange(1.0, {length + 1}))", [w, y])
    program.lines.append(f"at = {0.5 * length}")
    z = program.add(f"{r}[0]", a.shape)
    program.add(f"{r}[1]", (length, *y.shape))
    branch = f"jax.lax.cond(jnp.sum({z}) > 0.1, lambda z: z * {STEP}, jnp.sin, {z})"
    program.add(program.choose(branch, f"{z} * {STEP}"), a.shape)


STATEMENTS = (checkpoint, scan, fori_loop, branches, own_rule, straight_through)


# Families


def anything(rng: random.Random) -> Case:
    """Every operation on every value."""
    program = Program(rng)
    for _ in range(rng.randint(1, 3)):
        program.input(rng.choice(SHAPES))
    program.constant(rng.choice(SHAPES))
    grow(program, rng.randint(2, 12))
    return case(program, loss_of(program))


def control(rng: random.Random) -> Case:
    """Loops, branches, functions with a derivative rule of their own, and rarer primitives."""
    program = Program(rng)
    for _ in range(rng.randint(1, 3)):
        program.input(rng.choice(SHAPES))
    program.constant(rng.choice(SHAPES))
    grow(program, rng.randint(1, 3))
    grow(program, rng.randint(1, 3), (*STATEMENTS, rare))
    grow(program, rng.randint(0, 3))
    return case(program, loss_of(program))


def state(rng: random.Random) -> Case:
    """Loops that count in a reference, and their twins that read the number from the loop."""
    program = Program(rng)
    program.input(rng.choice(SHAPES))
    program.constant(rng.choice(SHAPES))
    for _ in range(rng.randint(1, 2)):
        grow(program, rng.randint(0, 2), (*OPERATIONS, rare))
        counted(program)
    result = loss_of(program)
    written = case(program, result)
    reads = re.compile(rf"\* {re.escape(STEP)}")
    program.lines = [reads.sub("* at", line) for line in program.lines]
    return written._replace(twin=program.function(result))


def half(rng: random.Random) -> Case:
    """Every entry along one path, through smooth functions, in float16 or bfloat16."""
    program = Program(rng)
    x = program.input(rng.choice(SHAPES), exact=True)
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.3:
            x = moved(program, x)
        elif rng.random() < 0.3:
            p = program.input(x.shape, exact=True)
            x = program.add(program.choose(*SMOOTH_BINARY).format(x, p), x.shape)
        else:
            x = program.add(program.choose(*ANY_DTYPE).format(x), x.shape)
    written = case(program, rng.choice(("jnp.sum({})", "jnp.mean({}**2)")).format(x))
    dtype = rng.choice((jnp.float16, jnp.bfloat16))
    return written._replace(args=[x.astype(dtype) for x in written.args])


def block(rng: random.Random) -> Case:
    """Pointwise equations, reductions of the whole frame over one set of axes, and views.

    Of the reduced axes an input has all or none.
    """
    program = Program(rng)
    frame = rng.choice(FRAMES)
    axes = subset(program, range(len(frame)))
    program.input(frame)
    for _ in range(rng.randint(0, 2)):
        array = program.choose(program.input, program.input, program.constant)
        kept = [1 if i in axes else rng.choice((1, n)) for i, n in enumerate(frame)]
        array(rng.choice((frame, tuple(kept), tuple(kept), ())))
    return case(program, str(grow_block(program, frame, axes)))


def grow_block(program: Program, frame: Shape, axes: tuple[int, ...]) -> Node:
    """More nodes of one block; a node of another rank than the frame's was reduced."""
    rank, small = len(frame), without(frame, axes)

    def reduce_axes() -> None:
        if x := program.pick(lambda x: x.shape == frame):
            y = program.pick(lambda y: y.shape == x.shape)
            letters = "ijk"[:rank]
            kept = "".join(without(tuple(letters), axes))
            program.choose(
                *[lambda: reduction(program, x, axes)] * 4,
                lambda: program.add(
                    f"jnp.einsum('{letters},{letters}->{kept}', {x}, {y})", without(x.shape, axes)
                ),
            )()

    def restore() -> None:
        if x := program.pick(lambda x: x.shape == small):
            wide = without(frame, axes, keepdims=True)
            program.choose(
                lambda: program.add(f"jnp.expand_dims({x}, {axes})", wide),
                lambda: program.add(f"{x}.reshape({wide})", wide),
                lambda: program.add(f"jnp.broadcast_to({x}.reshape({wide}), {frame})", frame),
            )()

    def through_a_view() -> None:
        if x := program.pick(lambda x: x.shape == frame):
            text = program.choose(*SMOOTH).format(f"{x}.reshape(-1)")
            program.add(f"({text}).reshape({frame})", frame)

    for _ in range(program.rng.randint(3, 10)):
        program.choose(
            *[lambda: unary(program), lambda: binary(program)] * 2,
            *[reduce_axes, restore] * 2,
            through_a_view,
        )()
    return meet(program, rank)


def meet(program: Program, rank: int) -> Node:
    """One node of all those of this rank that nothing has read yet, constants left out."""
    unread = [x for x in program.unread() if len(x.shape) == rank]
    z = unread.pop() if unread else program.nodes[-1]
    for x in unread:
        shape = np.broadcast_shapes(z.shape, x.shape)
        z = program.add(program.choose(*BINARY).format(*program.choose((x, z), (z, x))), shape)
    return z


def views(rng: random.Random) -> Case:
    """Pointwise equations, reductions over any axes and views, in shapes that are easy to confuse.

    Now and then it is all one block, now and then a value comes back at another place.
    """
    program = Program(rng)
    frame = rng.choice(((3, 3), (2, 2, 2), (2, 4), (2, 1, 2), (2, 3, 2), (3, 1, 3)))
    program.input(frame)
    if rng.random() < 0.4:
        program.input(tuple(rng.choice((1, n)) for n in frame))
    axes = subset(program, range(len(frame)))

    def reduce() -> None:
        if x := program.pick(lambda x: x.shape):
            usual = len(x.shape) == len(frame) and rng.random() < 0.8
            reduction(program, x, axes if usual else subset(program, range(len(x.shape))))

    def pick() -> None:
        if x := program.pick(lambda x: len(x.shape) >= 2):
            axis = rng.randrange(len(x.shape))
            labels = f"jnp.ones({without(x.shape, [axis], keepdims=True)}, int)"
            text = f"jnp.take_along_axis({x}, {labels} % {x.shape[axis]}, {axis})"
            program.add(text, without(x.shape, [axis], keepdims=True))

    def reshape() -> None:
        x = program.pick()
        factors = [n for n in x.shape if n > 1]
        shape = (x.shape[::-1], factors, (1, *factors), (*factors, 1), (math.prod(factors),), frame)
        shape = rng.choice([s for s in shape if math.prod(s) == math.prod(x.shape)])
        if rng.random() < 0.2:
            reordered(program, x, shape)
        else:
            program.add(f"{x}.reshape({tuple(shape)})", shape)

    def broadcast() -> None:
        x = program.pick()
        shape = rng.choice((frame, (2, *x.shape), (*frame, 2)))
        if len(shape) >= len(x.shape) and broadcastable(
            (1,) * (len(shape) - len(x.shape)) + x.shape, shape
        ):
            shape = np.broadcast_shapes(x.shape, shape)
            program.add(f"jnp.broadcast_to({x}, {shape})", shape)

    def stack() -> None:
        x = program.pick()
        y = program.pick(lambda y: y.shape == x.shape)
        axis = rng.randint(0, len(x.shape))
        shape = (*x.shape[:axis], 2, *x.shape[axis:])
        program.add(f"jnp.stack([{x}, {y}], {axis})", shape)

    operations = [lambda program, op=op: op() for op in (reduce, reduce, pick, reshape, broadcast)]
    grow(program, rng.randint(3, 9), (unary, binary, binary, *operations, lambda p: stack()))
    return case(program, str([*program.inputs, *program.unread()][-1]))


def segments(rng: random.Random) -> Case:
    """Values with an entry for each id or each segment, sums by the ids, and what takes them back.

    Segments may be empty, ids out of bounds, and there may be as many segments as ids.
    """
    program = Program(rng)
    n = rng.choice((4, 5))
    m = rng.choice((1, 2, 3, n, 7))
    batch = rng.choice(((), (), (2,)))
    wide = () if batch else rng.choice(((), (2,), (n,)))
    low, high = rng.choice(((0, m), (0, m), (-1, m + 1), (-m, m)))
    ids = [[rng.randrange(low, high) for _ in range(n)] for _ in range(math.prod(batch))]
    known = rng.choice(("ids = {}", "ids = jax.lax.optimization_barrier({})"))
    dtype = rng.choice(("int", "jnp.int8", "jnp.int32"))
    program.lines.append(known.format(f"jnp.array({ids if batch else ids[0]}, {dtype})"))
    entries, sums = (*batch, n, *wide), (*batch, m, *wide)
    program.input(entries)
    for _ in range(rng.randint(0, 2)):
        program.input(rng.choice((entries, sums, (*batch, 1, *wide), (1,) * len(sums), ())))

    def by_ids(text: str, x: Node, shape: Shape) -> None:
        each = f"jax.vmap(lambda x, ids: {text.format('x')})({x}, ids)"
        program.add(each if batch else text.format(x), shape)

    def reduce() -> None:
        base = (m, *wide)
        if x := program.pick(lambda x: x.shape == entries):
            text = rng.choice(
                (
                    *(f"jax.ops.segment_sum({{}}, ids, {m})",) * 3,
                    f"jnp.zeros({base}).at[ids].add({{}})",
                    f"jnp.full({base}, 0.7).at[ids].subtract({{}})",
                    f"jnp.full({base}, -0.3).at[ids].max({{}})",
                    f"jnp.maximum(jax.ops.segment_max({{}}, ids, {m}), -9.0)",
                )
            )
            by_ids(text, x, sums)

    def restore() -> None:
        # What an index out of bounds yields is not said, but where it is asked for.
        modes = ["mode='clip'", "mode='fill', fill_value=0.2"]
        takes = [f"jnp.take({{}}, ids, 0, {mode})" for mode in modes]
        if x := program.pick(lambda x: x.shape == sums):
            by_ids(rng.choice([*takes, *["{}[ids]"] * 3 * (high <= m)]), x, entries)

    by = [lambda program, op=op: op() for op in (reduce, reduce, restore, restore)]
    grow(program, rng.randint(4, 10), (unary, binary, binary, *by))
    return case(program, str([*program.inputs, *program.unread()][-1]))


def chain(rng: random.Random) -> Case:
    """Every entry reaches the loss along one path: entry by entry, moved about, mixed once."""
    program = Program(rng)
    x = program.input(rng.choice(SHAPES), exact=True)
    together = False  # whether entries of x share a parameter's entry: mixing would part and join
    for _ in range(rng.randint(1, 5)):
        step = rng.choice((own_function, with_parameter, moved, mixed))
        if step is moved or not (step is mixed and (together or len(x.shape) != 2)):
            x, together = step(program, x), together or step is mixed
        if step is moved and rng.random() < 0.3 and x.shape:
            x = program.add(f"jnp.concatenate([{x}, jnp.sin({x})])", double(x.shape))
            together = True
    return case(program, rng.choice(("jnp.sum({})", "jnp.mean({}**2)")).format(x))


def double(shape: Shape) -> Shape:
    return (2 * shape[0], *shape[1:])


def own_function(program: Program, x: Node) -> Node:
    y = program.add(program.choose(*SMOOTH, *KINKED).format(x), x.shape)
    if program.rng.random() < 0.5:
        return y
    return program.add(program.choose(*BINARY).format(*program.choose((x, y), (y, x))), x.shape)


def with_parameter(program: Program, x: Node) -> Node:
    p = program.input(x.shape, exact=True)
    return program.add(program.choose(*BINARY).format(*program.choose((x, p), (p, x))), x.shape)


def mixed(program: Program, x: Node) -> Node:
    return program.add(f"{x} @ {program.constant((x.shape[1], 3))}", (x.shape[0], 3))


def moved(program: Program, x: Node) -> Node:
    if not x.shape:
        return program.add(f"{x}[None]", (1,))
    order = program.rng.sample(range(len(x.shape)), len(x.shape))
    half = max(x.shape[0] // 2, 1)
    return program.add(
        *program.choose(
            (f"jnp.transpose({x}, {order})", [x.shape[i] for i in order]),
            (f"{x}[::-1]", x.shape),
            (f"{x}[:{half}]", (half, *x.shape[1:])),
            (f"{x}.reshape(-1)", (math.prod(x.shape),)),
            (f"jax.lax.reshape({x}, {x.shape}, {tuple(order)})", x.shape),
            (f"jnp.roll({x}, 1, 0)", x.shape),
            (f"{x}[jnp.array([{x.shape[0] - 1}])]", (1, *x.shape[1:])),
        )
    )


def last_layer(rng: random.Random, bent: bool = True) -> Case:
    """A last linear layer of a random model, and a head that is one block of each example.

    Its weight is a function of another entry by entry, now and then, if ``bent``.
    """
    program = Program(rng)
    batch, width, classes = rng.choice(((3, 2, 4), (2, 3, 3), (1, 4, 2), (4, 1, 3), (3, 3, 1)))
    x = hidden(program, (batch, width))
    logits = linear(program, x, classes, bent)
    program.nodes = [logits, program.constant((batch, classes)), program.constant(())]
    z = grow_block(program, logits.shape, (1,))
    z = weighted(program, z) if bent and batch > 1 else z
    return case(program, rng.choice(("jnp.sum({})", "jnp.mean({})")).format(z))


def weighted(program: Program, z: Node) -> Node:
    """Now and then, what shares a reduction, weighted by a vector that is trained too."""
    if z.shape[1:] in ((), (1,)) or program.rng.random() < 0.7:
        return z
    weights = program.input((z.shape[1],), exact=True)
    normalized = "{0} / jnp.sqrt(1.0 + jnp.mean({0}**2, 1, keepdims=True))"
    shared = program.choose("jax.nn.softmax({})", normalized)
    y = program.add(f"({shared.format(z)}) @ {weights}", z.shape[:1])
    return program.add(program.choose(*SMOOTH).format(y), y.shape)


def plain_last_layer(rng: random.Random) -> Case:
    """Here all curvature in the last layer is the head's."""
    return last_layer(rng, bent=False)


# The rows of an image chosen, moved, changed by constants, and what affine loops make of it.
ROWS = (
    "{0}[::-1]",
    "jnp.roll({0}, {1}, 0)",
    "jnp.broadcast_to({0}[{1}], {0}.shape)",
    "{0}.at[{1}].add(2.0)",
    "{0}.at[{1}].multiply(-0.5, unique_indices=True)",
    "{0}.at[{1}].set(0.4)",
    "{0}.at[{1}].subtract({0}[0])",
    "jnp.zeros({0}.shape).at[jnp.arange({0}.shape[0]) // 2].add({0})",
    "jax.lax.reduce_window({0}, 0.0, jax.lax.add, (2, 2), (1, 1), 'SAME')",
    "jax.lax.fori_loop(0, 3, lambda _, y: 0.5 * y + {0}, {0})",
    "jax.lax.fori_loop(0, 3, lambda _, y: 0.5 * y - {0}[{1}][None], jnp.zeros({0}.shape))",
    "jax.lax.map(lambda y: 2.0 * y + 1.0, {0})",
    "jnp.sort({0}, 0)",
    "jax.lax.top_k({0}.T, {0}.shape[0])[0].T",
)


def meeting(rng: random.Random) -> Case:
    """A block of some linear images of one layer's weights, and of those as ROWS have it."""
    program = Program(rng)
    batch, width, classes = rng.choice(((3, 2, 4), (2, 3, 3), (1, 4, 2), (4, 1, 3), (3, 3, 1)))
    weight = program.input((width, classes), exact=True)
    images = []
    for _ in range(rng.randint(1, 3)):
        x = program.constant((batch, width))
        images.append(program.add(f"{x} @ {weight}", (batch, classes)))
    for image in images[: rng.randint(0, 2)]:
        row = rng.randrange(batch)
        images.append(program.add(program.choose(*ROWS).format(image, row), image.shape))
    program.nodes = [*images, program.constant((batch, classes))]
    z = grow_block(program, images[0].shape, (1,))
    return case(program, program.choose("jnp.sum({})", "jnp.mean({})").format(z))


# What blocks make of an image one after the other, and quadratic forms of that.
NORMALIZED = (
    "jax.nn.softmax({0}, {1})",
    "{0} / jnp.sqrt(0.5 + jnp.sum({0}**2, {1}, keepdims=True))",
    "{0} - jax.nn.logsumexp({0}, {1}, keepdims=True)",
)
FORMS = (
    "jnp.sum({0} * ({1} @ {0}))",
    "jnp.sum(({0}.T @ {1} @ {0})**2)",
    "jnp.sum({0} @ {0}.T * {1})",
    "jnp.mean({0}**2)",
    "jnp.var({0})",
    "jnp.log(1.0 + jnp.sum(jnp.mean({0}, 0)**2))",
    "jnp.sum({0} * {1}[:, :1]) / jnp.sqrt(1.0 + jnp.sum({0}**2))",
)


def several(rng: random.Random) -> Case:
    """A parameter or its image, through several blocks and products with constants."""
    program = Program(rng)
    rows, width = rng.choice(((3, 2), (2, 3), (4, 1), (3, 3), (1, 4)))
    x = program.input((rows, width), exact=True)
    if rng.random() < 0.7:
        x = program.add(f"{program.constant((3, rows))} @ {x}", (3, width))
    for _ in range(rng.randint(1, 2)):
        for _ in range(rng.randint(0, 2)):
            x = rng.choice((entrywise, mixed, turned))(program, x)
        x = program.add(rng.choice(NORMALIZED).format(x, rng.randrange(2)), x.shape)
    return case(program, rng.choice(FORMS).format(x, program.constant(x.shape[:1] * 2)))


def entrywise(program: Program, x: Node) -> Node:
    return program.add(program.choose(*FOLLOWED).format(x), x.shape)


def turned(program: Program, x: Node) -> Node:
    return program.add(
        *program.choose(
            (f"{x}[::-1]", x.shape),
            (f"{x}.T", x.shape[::-1]),
            (f"jnp.cumsum({x}, 0)", x.shape),
            (f"{x}[:1] * {x}", x.shape),
        )
    )


def linear(program: Program, x: Node, classes: int, bent: bool = True) -> Node:
    """``x @ weight + bias``."""
    weight = program.input((x.shape[1], classes), exact=True)
    if bent and program.rng.random() < 0.3:
        weight = own_function(program, weight)
    logits = program.add(f"{x} @ {weight}", (x.shape[0], classes))
    if program.rng.random() < 0.7:
        bias = program.input((1, classes), exact=True)
        logits = program.add(f"{logits} + {bias}", logits.shape)
    return logits


def hidden(program: Program, shape: Shape) -> Node:
    """Data, or what a random model makes of data."""
    x = program.constant(shape)
    if program.rng.random() < 0.5:
        program.input(shape[1:])
        program.input((1, shape[1]))
        grow(program, program.rng.randint(1, 6))
        y = program.pick()
        program.add(f"{x} + jnp.tanh(jnp.resize({y}, {shape}))", shape)
    return program.nodes[-1]


def loop(rng: random.Random) -> Case:
    """Loops that act entry by entry on what they carry, and functions of what is around them."""
    program = Program(rng)
    frame = rng.choice(FRAMES)
    length = rng.randint(1, 4)

    def along() -> Shape:
        return tuple(rng.choice((1, n, n)) for n in frame)

    for shape in (frame, *(along() for _ in range(rng.randint(0, 2)))):
        program.input(shape, exact=True)
    program.constant(along())
    grow(program, rng.randint(0, 2), (unary, binary))
    for _ in range(rng.randint(1, 2)):
        step_by_step(program, frame, length)
        grow(program, rng.randint(1, 3), (unary, binary))
    ends = program.unread()[-2:] or list(program.inputs)[:1]
    return case(program, " + ".join(f"jnp.sum({x}**2)" for x in ends))


def handing_out(rng: random.Random) -> Case:
    """Loops that hand out something at each step too, which meets the rest."""
    program = Program(rng)
    frame = rng.choice(FRAMES)
    length = rng.randint(2, 4)
    for _ in range(rng.randint(1, 2)):
        program.input(tuple(rng.choice((1, n, n)) for n in frame))
    program.constant(frame)
    for _ in range(rng.randint(1, 2)):
        step_by_step(program, frame, length, hands_out=True)
        grow(program, rng.randint(0, 3), (unary, binary, reduce))
    ends = program.unread()[-2:] or list(program.inputs)[:1]
    terms = [program.choose("jnp.sum({}**2)", "jnp.sum({})").format(x) for x in ends]
    return case(program, program.choose(" + ", " * ").join(terms))


# What makes a vector of four entries of one, and a loss of two.
MAKERS = (
    "jnp.sin({0})",
    "{0}[::-1]",
    "{0}.at[0].set({0}[1])",
    "{0}.at[0].subtract({0}[0])",
    "jnp.sort({0})",
    "{0} * {0}[::-1]",
    "{0} + jnp.roll({0}, 1)",
    "jnp.full(4, {0}[0])",
    "jnp.full(4, {0}.mean())",
    "jax.nn.softmax({0})",
    "jnp.cumsum({0})",
    "c0 @ {0}",
    "jax.ops.segment_sum({0}, jnp.array([0, 0, 1, 1]), 2)[jnp.array([0, 0, 1, 1])]",
    "jnp.zeros(4).at[jnp.array([1, 0, 1, 3])].max({0})",
    "jax.lax.cond({0}[0] > -9.0, jnp.sin, jnp.cos, {0})",
    "jax.lax.cond({0}[0] > -9.0, lambda x: x * x[::-1], jnp.cos, {0})",
    "jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + {0}, {0})",
    "jax.lax.scan(lambda y, x: (y + x, y), 0.0, {0})[1]",
    "jax.lax.scan(lambda y, x: (jnp.sin(y) + x, y), {0}[0], {0})[1]",
    "jnp.full(4, jax.lax.scan(lambda y, x: (0.9 * y - x, None), {0}[0], {0})[0])",
    "jnp.full(4, jax.lax.scan(lambda y, x: (jnp.sin(y) + x, None), 0.0, {0})[0])",
    "jax.checkpoint(lambda x: jnp.tanh(x) * x[0])({0})",
)
USERS = (
    "jnp.sum({0} * {1})",
    "jnp.sum(({0} - {1}) ** 2)",
    "jnp.sum({0}) * jnp.sum({1})",
    "jnp.sum(jnp.exp(0.3 * ({0} + {1})))",
    "jax.nn.logsumexp({0}) + jnp.sum(jnp.sin({1}))",
    "jax.nn.logsumexp(jnp.concatenate([{0}, {1}]))",
    "jnp.concatenate([{0}, {1}]) @ jnp.concatenate([{1}, {0}])",
    "jnp.var({0} * {1})",
)


def pair(rng: random.Random) -> Case:
    """Two of a few values, each made of another, that meet."""
    program = Program(rng)
    p = program.input((4,))
    program.constant((4, 4))
    values = [p]
    for _ in range(rng.randint(1, 3)):
        made = program.choose(*MAKERS).format(rng.choice(values))
        values.append(program.add(made, p.shape))
    return case(program, program.choose(*USERS).format(rng.choice(values), values[-1]))


def step_by_step(program: Program, frame: Shape, length: int, hands_out: bool = False) -> None:
    """A loop with a carry or two of the frame's shape, or of size 1 along some of its axes."""
    rng = program.rng
    starts = [start(program) for _ in range(rng.randint(1, 2))]
    shapes = [(length, *frame), (length, *(rng.choice((1, n)) for n in frame))]
    fed = rng.random() < 0.6
    xs = None
    if fed:
        xs = program.input(rng.choice(shapes), exact=True) if rng.random() < 0.8 else None
        xs = xs or program.constant(shapes[0])
        program.nodes.remove(xs)
    body = program.inner()
    carry = [body.argument(x, x.shape) for x in starts]
    x = body.argument(xs, xs.shape[1:]) if xs else "_"
    grow(body, rng.randint(1, 4), (unary, binary))
    for name, other in NOT_IN_LOOPS.items():
        body.lines = [line.replace(name, other) for line in body.lines]
    bounded = program.choose("jnp.tanh({})", "0.5 * {}")  # a body without an equation is no block
    handed_on = [body.add(bounded.format(like(body, a.shape)), a.shape) for a in carry]
    body.lines.insert(0, f"({joined(carry)}) = carry")
    decorator = program.choose("", "", "@jax.checkpoint\n")
    out = rng.choice([*body.nodes[-3:], *handed_on]) if hands_out else None
    f = program.define(body, f"carry, {x}", f"({joined(handed_on)}), {out}", decorator)
    how = f"length={length}, reverse={rng.choice((True, False))}"
    made = handed_on if out is None else [*handed_on, out]
    r = program.call(f"jax.lax.scan({f}, ({joined(starts)}), {xs}, {how})", made)
    for i, a in enumerate(carry):
        program.add(f"{r}[0][{i}]", a.shape)
    if out is not None:
        program.add(f"{r}[1]", (length, *out.shape))


def units(rng: random.Random) -> Case:
    """Layers of one unit: ``h = f(w h + b)`` with ``f`` a random function of one value."""
    program = Program(rng)
    batch = rng.choice((1, 3, 4))
    h = program.constant((batch, 1))
    for _ in range(rng.randint(1, 4)):
        h = own_function(program, linear(program, h, 1))
    return case(program, rng.choice(("jnp.mean({})", "jnp.sum({}**2)")).format(h))


def penalized(rng: random.Random) -> Case:
    """An L2 penalty, added to a loss whose diagonal is exact."""
    fun, args, exact, _ = rng.choice((chain, last_layer, units))(rng)
    rate = rng.choice((0.1, 2.0))

    def f(*args: jax.Array) -> jax.Array:
        return fun(*args) + rate * sum(jnp.sum(x**2) for x in args)

    f.__doc__ = f"{fun.__doc__}\n+ {rate} * sum of squares"
    return Case(f, args, exact)


# Convex functions that are no sum of squares.
PENALTIES = (
    *("jax.nn.logsumexp({0})", "jnp.log(jnp.sum(jnp.exp({0})))", "jnp.sqrt(0.1 + jnp.sum({0}**2))"),
    *("jnp.sum(jnp.linalg.norm({0}, axis=-1))", "jnp.log(jnp.exp({0}).sum(0)).sum()"),
    *("jnp.sum(jnp.cosh({0}))", "jnp.sum(jnp.logaddexp({0}, 0.3 * {0}))"),
)


def convex(rng: random.Random) -> Case:
    """A convex loss of a random model's output, which is named or the last linear layer's.

    Or of parameters alone.
    """
    program = Program(rng)
    if rng.random() < 0.2:
        leaves = [program.input((3, 2), exact=True) for _ in range(rng.randint(1, 2))]
        return case(program, " + ".join(rng.choice(PENALTIES).format(x) for x in leaves))
    z = linear(program, hidden(program, (3, 2)), 4, bent=False)
    if rng.random() < 0.5:
        z = program.add(f"name({own_function(program, z)}, 'model_output')", z.shape)
    target = program.constant(z.shape)
    return case(program, f"{rng.choice(list(HEADS))}({z}, {target})")


# What must hold


def check_reference(test: Case) -> None:
    """The gradient is that of ``jax.grad``, the diagonal that of the dense reference."""
    oracle.check(test.fun, *test.args, rtol=RTOL, finite=False)


def check_diagonal(test: Case, curvature: str = "hessian") -> list[Any]:
    """The gradient is right everywhere, the diagonal where it is exact."""
    return check_in(test, range(len(test.args)), curvature)


def check_some(test: Case) -> None:
    """The same if some of the arguments are differentiated."""
    rng = random.Random(len(test.fun.__doc__ or ""))
    at = sorted(rng.sample(range(len(test.args)), rng.randint(1, len(test.args))))
    given = test.args
    kept = [i for i, k in enumerate(at) if k in test.exact]

    def fun(*xs: Any) -> Any:
        return test.fun(*(dict(enumerate(given)) | dict(zip(at, xs, strict=True))).values())

    check_diagonal(Case(fun, [given[i] for i in at], kept))


def check_respelled(test: Case) -> None:
    """The same if identities are put in."""
    check_diagonal(test._replace(fun=respelled(test.fun)))


IDENTITIES: tuple[Callable[[Any], Any], ...] = (
    lambda x: jax.lax.optimization_barrier(x),
    lambda x: x.reshape(-1).reshape(x.shape),
    lambda x: x.T.T,
    lambda x: jax.lax.reshape(x.T, x.shape, range(x.ndim)[::-1]),
    lambda x: jnp.pad(x, 1)[tuple(slice(1, -1) for _ in x.shape)] if x.ndim else x,
    lambda x: jnp.flip(jnp.flip(x)),
    lambda x: x[..., None][..., 0],
    lambda x: jnp.concatenate([x, x])[: len(x)] if x.ndim else x,
    lambda x: jax.checkpoint(lambda y: jnp.expand_dims(y, 0))(x)[0],
    lambda x: jnp.roll(jnp.roll(x, 1), -1) if x.size > 1 else x,
    lambda x: jnp.concatenate([x[:1], x[1:]]) if x.ndim else x,
    lambda x: jnp.stack(list(x)) if x.ndim and len(x) else x,
    lambda x: jnp.concatenate([jnp.stack(list(x))[:1], x[1:]]) if x.ndim and len(x) else x,
    lambda x: jnp.tile(x[None], (2,) + (1,) * x.ndim)[0],
    lambda x: x[np.arange(len(x))[::-1]][::-1] if x.ndim else x,
    lambda x: x[np.roll(np.arange(len(x)), 1)][np.roll(np.arange(len(x)), -1)] if x.ndim else x,
    lambda x: jax.device_put(checkpoint_name(x, "x")),
    lambda x: jax.lax.scan(lambda c, _: (c, None), x, None, length=3)[0],
    lambda x: jnp.swapaxes(x[None], 0, -1).reshape(x.shape) if x.ndim == 1 else x,
    lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=0)[0],
    lambda x: jax.lax.cond(True, lambda y: y, jnp.sin, x),
    lambda x: jax.lax.map(lambda y: y.reshape(-1).reshape(y.shape), x) if x.ndim else x,
    lambda x: x.at[:1].multiply(2.0).at[:1].multiply(0.5) if x.ndim else x,
    lambda x: x.at[:1].add(2.0).at[:1].add(-2.0) if x.ndim else x,
)


def respelled(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A program with identities between its lines, some of which are under ``jax.checkpoint``."""
    text = (fun.__doc__ or "").split("\n{")[0]
    rng = random.Random(len(text))

    def same(match: re.Match[str]) -> str:
        line, indent, name = match.groups()
        k = rng.randrange(2 * len(IDENTITIES))
        return line + f"\n{indent}{name} = IDENTITIES[{k}]({name})" * (k < len(IDENTITIES))

    text = re.sub(r"^(( *)(v\d+) = .*)$", same, text, flags=re.MULTILINE)
    text = under_checkpoint(text, rng)
    scope = {**fun.__globals__, "IDENTITIES": IDENTITIES}
    exec(text, scope)
    scope["f"].__doc__ = text
    return scope["f"]


def under_checkpoint(text: str, rng: random.Random) -> str:
    """A program with some of its statements, one after the other, under ``jax.checkpoint``."""
    head, *body = text.split("\n")
    found = re.findall(r"(?:^ {4}@.*\n)*^ {4}[^ @].*(?:\n {5,}.*)*", "\n".join(body), re.MULTILINE)
    i, j = sorted(rng.randrange(len(found)) for _ in range(2))
    before, part = ("\n".join(found[at]) for at in (slice(0, i), slice(i, j)))
    made, old = (re.findall(r"^ {4}(v\d+) = ", lines, re.MULTILINE) for lines in (part, before))
    if not made:
        return text
    results, given = ", ".join(dict.fromkeys(made)), ", ".join(sorted({*made} & {*old}))
    inside = f"    @jax.checkpoint\n    def part({given}):\n{textwrap.indent(part, '    ')}"
    inside += f"\n        return [{results}]\n    [{results}] = part({given})"
    return "\n".join([head, *found[:i], inside, *found[j:]])


def check_in(test: Case, everywhere: Sequence[int], curvature: str) -> list[Any]:
    fun, args, exact, _ = test
    grads, diagonals = oracle.computed(hs.hesscale(fun, everywhere, curvature=curvature), *args)
    expected, hessians = hessian_diagonals(fun, args, exact)
    if not (oracle.is_finite(expected) and oracle.is_finite(hessians)):
        return []
    scale = max(FLOOR, *(np.abs(g).max() for g in expected))
    for i, (grad, want) in enumerate(zip(grads, expected, strict=True)):
        if not np.isfinite(diagonals[i]).all():
            assert not oracle.is_finite([jax.hessian(fun, i)(*args)]), f"hess_diag {i}"
            return []
        np.testing.assert_allclose(grad, want, rtol=0, atol=RTOL * scale, err_msg=f"gradient {i}")
    for i, hessian in zip(exact, hessians, strict=True):
        scale = max(FLOOR, np.abs(hessian).max())
        np.testing.assert_allclose(
            diagonals[i], hessian, rtol=0, atol=RTOL * scale, err_msg=f"diag {i}"
        )
    return list(diagonals)


def hessian_diagonals(
    fun: Callable[..., jax.Array], args: Sequence[Any], chosen: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """The gradient in all arguments, and the Hessian's diagonal in the chosen ones."""
    at = [interpreter.Series(np.asarray(x)) for x in args]
    directions = interpreter.basis([at[i].x for i in chosen])
    for i, x in zip(chosen, directions, strict=True):
        at[i] = x
    grads = interpreter.expand(jax.make_jaxpr(jax.grad(fun, range(len(args))))(*args), at)
    diagonals, first = [], 0
    for i in chosen:
        size, d = at[i].x.size, grads[i].d
        d = np.zeros((*grads[i].x.shape, directions[0].d.shape[-1])) if d is None else d
        diagonal = np.diag(d.reshape(size, -1)[:, first : first + size])
        diagonals.append(diagonal.reshape(at[i].x.shape))
        first += size
    return [x.x for x in grads], diagonals


def check_deep(test: Case) -> None:
    """The diagonal is exact if forms may go through as many blocks as there are, respelled too."""
    with limits(MOST_TERMS=32, MOST_DEEP=math.inf, DEEP=images.SHALLOW):
        check_diagonal(test)
        check_respelled(test)


def check_gauss_newton(test: Case) -> None:
    """Gauss-Newton is exact too."""
    check_diagonal(test, "gauss_newton")


def check_block(test: Case) -> None:
    """The whole is one block: gradient and diagonal are those of dense algebra."""
    fun, args = test.fun, list(map(np.asarray, test.args))
    closed = _jaxpr.trace(fun, *args)
    with np.errstate(all="ignore"):
        (y,) = interpreter.expand(closed, interpreter.basis(args))
    rng = np.random.default_rng(1)
    g, h = rng.normal(size=(2, *y.x.shape))

    def received(*args: Any) -> Any:
        program = _jaxpr.flatten(closed)
        (value,), transpose = transposed(program, args, hs.RULES, "hessian", spreads=True)
        return value, *transpose(g, h)

    value, grads, diagonals = oracle.computed(received, *args)
    testing.assert_close(value, y.x[None], RTOL, "value")
    jacobian, bends = (
        np.zeros((y.x.size, sum(x.size for x in args)))
        if part is None
        else part.reshape(y.x.size, -1)
        for part in (y.d, y.dd)
    )
    g, h = g.reshape(-1, 1), h.reshape(-1, 1)
    ends = np.cumsum([x.size for x in args])[:-1]
    terms = g * jacobian, np.concatenate([h * jacobian**2, g * bends + 0 * jacobian])
    pieces = zip(*(np.split(x, ends, 1) for x in terms), strict=True)
    for i, (of_grad, of_diagonal) in enumerate(pieces):
        testing.assert_close(grads[i].ravel(), of_grad, RTOL, f"gradient in argument {i}")
        testing.assert_close(diagonals[i].ravel(), of_diagonal, RTOL, f"hess_diag in argument {i}")


def check_views(test: Case) -> None:
    """The diagonal of the sum of squares is that of the reference."""
    check_if_one_block(test)
    check_reference(test._replace(fun=lambda *args: jnp.sum(test.fun(*args) ** 2)))


def check_if_one_block(test: Case) -> None:
    """Where the analysis finds one block, it may: the whole is exact."""
    if is_one_block(test):
        check_block(test)


def is_one_block(test: Case) -> bool:
    program = _jaxpr.flatten(_jaxpr.trace(test.fun, *test.args))
    found = plan(program, program.inputs, program.outputs, lambda eqn: find(hs.RULES, eqn))
    return found.rules.keys() == found.blocks.keys() and len(set(found.blocks.values())) == 1


def check_loop(test: Case) -> None:
    """The diagonal is exact, unless carries that do not meet have a block each."""
    (check_diagonal if is_one_block(test) else check_reference)(test)


def check_claim(test: Case) -> None:
    """The diagonal is exact if ``explain`` says that nothing is dropped.

    But for derivative rules that are not those of what the function computes.
    """
    everywhere = range(len(test.args))
    own = re.search("straight_through|with_jvp|with_vjp", test.fun.__doc__ or "")
    claimed = not own and hs.explain(test.fun, everywhere)(*test.args).is_exact
    check_diagonal(test._replace(exact=list(everywhere) if claimed else []))


def check_twin(test: Case) -> None:
    """The gradient is that of ``jax.grad``, and both results those of the twin."""
    everywhere = range(len(test.args))

    def all_three(*args: jax.Array) -> Any:
        both = [hs.hesscale(fun, everywhere)(*args) for fun in (test.fun, test.twin)]
        return *both, jax.grad(test.fun, everywhere)(*args)

    results = oracle.computed(all_three, *test.args)
    (grads, diagonals), (_, expected_diagonals), expected = results
    if oracle.is_finite(expected):
        oracle.assert_close(grads, expected, RTOL, "gradient")
        oracle.assert_close(diagonals, expected_diagonals, RTOL, "hess_diag")


def check_half(test: Case) -> None:
    """The gradient is that of ``jax.grad``, the diagonal that of float64, but for rounding."""
    everywhere = range(len(test.args))
    grads, diagonals = oracle.computed(hs.hesscale(test.fun, everywhere), *test.args)
    expected = oracle.computed(jax.grad(test.fun, everywhere), *test.args)
    _, exact = hessian_diagonals(test.fun, [x.astype(float) for x in test.args], everywhere)
    if oracle.is_finite(expected) and oracle.is_finite(exact):
        rtol = 64 * float(jnp.finfo(test.args[0].dtype).eps)  # four functions one in another
        wide = [[x.astype(float) for x in found] for found in (grads, expected, diagonals)]
        oracle.assert_close(wide[0], wide[1], rtol, "gradient")
        # Terms of this size may cancel.
        oracle.assert_close(wide[2], exact, rtol, "hess_diag", floor=0.1)


def check_convex(test: Case) -> None:
    """Gauss-Newton is not negative, but for what rounding leaves of terms that cancel."""
    diagonals = check_diagonal(test._replace(exact=[]), "gauss_newton")
    scale = max(1.0, *(np.abs(h).max() for h in diagonals))
    for i, h in enumerate(diagonals):
        assert np.min(h) >= -1e-12 * scale, f"negative hess_diag {i}"


# A diagonal does not depend on what else is differentiated, nor on how the program is written.
EXACT = {"chain": chain, "last_layer": last_layer, "meeting": meeting, "units": units}
# Of these, some are exact.
MIXED = {"anything": anything, "control": control, "loop": loop, "several": several}
MIXED |= {"handing_out": handing_out, "pair": pair}


FAMILIES: dict[str, tuple[Callable[[random.Random], Case], Callable[[Case], None]]] = {
    "anything": (anything, check_reference),
    "control": (control, check_reference),
    "state": (state, check_twin),
    "half": (half, check_half),
    "block": (block, check_block),
    "views": (views, check_views),
    "segments": (segments, check_views),
    "chain": (chain, check_diagonal),
    "loop": (loop, check_loop),
    "last_layer": (last_layer, check_diagonal),
    "meeting": (meeting, check_diagonal),
    "plain_last_layer": (plain_last_layer, check_gauss_newton),
    "units": (units, check_diagonal),
    "several": (several, check_deep),
    "penalized": (penalized, check_diagonal),
    "convex": (convex, check_convex),
    **{f"{name}, some": (draw, check_some) for name, draw in EXACT.items()},
    **{f"{name}, respelled": (draw, check_respelled) for name, draw in EXACT.items()},
    **{f"{name}, claimed": (draw, check_claim) for name, draw in MIXED.items()},
}


BLOCK = 100  # programs of a family before the next family's turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="programs of each family")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--compiled", action="store_true", help="run as XLA optimizes it: slower")
    options = parser.parse_args()
    oracle.COMPILED = options.compiled
    jax.config.update("jax_disable_most_optimizations", not options.compiled)
    gc.disable()  # what tracing leaves is collected with the caches
    end = options.start + options.count
    for start in range(options.start, end, BLOCK):
        for family in options.family or FAMILIES:
            seeds = range(start, min(start + BLOCK, end))
            began = time.process_time()
            failed = [seed for seed in seeds if fails(family, seed)]
            gc.collect()
            cost = (time.process_time() - began) / len(seeds)
            print(f"{family} {seeds}: {len(failed)} failed, {cost:.3f} s each", failed, flush=True)
        jax.clear_caches()


@contextlib.contextmanager
def limits(**values: Any) -> Iterator[None]:
    """What is followed, limited otherwise."""
    before = {name: getattr(images, name) for name in values}
    vars(images).update(values)
    try:
        yield
    finally:
        vars(images).update(before)


def whole() -> contextlib.AbstractContextManager[None]:
    """Nothing is left out of long programs, of which the checks know nothing."""
    return limits(SHORT=math.inf)


def fails(family: str, seed: int) -> bool:
    draw, check = FAMILIES[family]
    test = draw(random.Random(seed))
    try:
        with whole():
            check(test)
    except Exception:
        print(f"--- {family} {seed}\n{test.fun.__doc__}\n{traceback.format_exc(limit=-2)}")
        return True
    return False


if __name__ == "__main__":
    import conftest  # noqa: F401

    main()
