"""Random programs, by family, and what must hold for each.

A family draws a program with any ``random.Random``: one of hypothesis's, which shrinks, or one of
a fixed seed. A program is the source text of a JAX function, so that a failure can be read and run.
Many more than the tests draw are checked by

    python tests/programs.py --count 1000 [--family block]
"""

import argparse
import math
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

import hesscale_jax as hs
from hesscale_jax import testing

RTOL = 1e-9
FLOOR = 1e-3  # what counts as the size of derivatives that cancel
Shape = tuple[int, ...]

SHAPES = ((2, 3), (3, 2), (3, 3), (4,), (1, 3), (2, 1), (1,), (2, 3, 2), (2, 1, 3), ())
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
)
KINKED = (
    "jax.nn.relu({0})",
    "jax.nn.elu({0})",
    "jnp.abs({0})",
    "jnp.clip({0}, -0.8, 0.9)",
    "jnp.where({0} > 0.1, {0}, jnp.square({0}))",
    "{0} - jax.lax.stop_gradient({0}) * {0}",
)
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
REDUCTIONS = ("jnp.sum", "jnp.mean", "jnp.max", "jnp.min", "jax.nn.logsumexp", "jnp.var")
HEADS = {
    "cross_entropy": lambda z, t: optax.softmax_cross_entropy_with_integer_labels(
        z, jnp.arange(z.shape[0]) % z.shape[1]
    ).mean(),
    "soft_cross_entropy": lambda z, t: optax.softmax_cross_entropy(z, jax.nn.softmax(t)).mean(),
    "squared_error": lambda z, t: jnp.mean((z - t) ** 2),
    "logistic": lambda z, t: optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(t)).mean(),
    "huber": lambda z, t: optax.huber_loss(z, t, delta=0.7).mean(),
    "poisson": lambda z, t: jnp.sum(jnp.exp(z) - z * t**2),
}


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

    def input(self, shape: Shape, exact: bool = False) -> Node:
        node = self._array(self.inputs, f"p{len(self.inputs)}", shape)
        self.exact += [node] if exact else []
        return node

    def constant(self, shape: Shape) -> Node:
        return self._array(self.constants, f"c{len(self.constants)}", shape)

    def _array(self, arrays: dict[str, jax.Array], name: str, shape: Shape) -> Node:
        seed = [len(self.inputs), len(self.constants), len(arrays)]
        arrays[name] = jnp.asarray(np.random.default_rng(seed).normal(size=shape))
        self.nodes.append(Node(name, shape))
        return self.nodes[-1]

    def add(self, expression: str, shape: Sequence[int]) -> Node:
        node = Node(f"v{len(self.lines)}", tuple(shape))
        self.lines.append(f"{node} = {expression}")
        self.nodes.append(node)
        return node

    def pick(self, fits: Callable[[Node], bool] = lambda node: True) -> Node | None:
        """A node that fits, more often a recent one."""
        fitting = list(filter(fits, self.nodes))
        recent = fitting[-3:] if self.rng.random() < 0.6 else fitting
        return self.rng.choice(recent) if recent else None

    def choose(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def function(self, result: str) -> Callable[..., jax.Array]:
        """The program as a function of its inputs, with its text in ``__doc__``."""
        body = [f"def f({', '.join(self.inputs)}):", *self.lines, f"return {result}"]
        text = "\n    ".join(body)
        scope = {"jax": jax, "jnp": jnp, "name": checkpoint_name, **HEADS, **self.constants}
        exec(text, scope)  # noqa: S102
        shapes = {name: x.shape for name, x in (self.inputs | self.constants).items()}
        scope["f"].__doc__ = f"{text}\n{shapes}"
        return scope["f"]


class Case(NamedTuple):
    """A function and where to evaluate it."""

    fun: Callable[..., jax.Array]
    args: list[jax.Array]
    exact: list[int] = []  # noqa: RUF012


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


def view(program: Program) -> None:
    x = program.pick()
    axis = program.rng.randint(0, len(x.shape))
    wider = (*x.shape[:axis], 1, *x.shape[axis:])
    program.choose(
        lambda: program.add(f"{x}.reshape(-1)", (math.prod(x.shape),)),
        lambda: program.add(f"{x}.reshape({x.shape[::-1]})", x.shape[::-1]),
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


OPERATIONS = (unary, unary, binary, binary, reduce, view, selection, product)


def grow(program: Program, count: int, operations: Sequence[Callable] = OPERATIONS) -> None:
    for _ in range(count):
        program.choose(*operations)(program)
        if math.prod(program.nodes[-1].shape) > 64:
            program.nodes.pop()


def loss_of(program: Program) -> str:
    """A scalar of the last nodes."""
    ends = program.nodes[-program.rng.randint(1, 3) :]
    return " + ".join(program.choose("jnp.sum({})", "jnp.mean({}**2)").format(x) for x in ends)


# Families


def anything(rng: random.Random) -> Case:
    """Every operation on every value: the gradient is right, the diagonal is finite."""
    program = Program(rng)
    for _ in range(rng.randint(1, 3)):
        program.input(rng.choice(SHAPES))
    program.constant(rng.choice(SHAPES))
    grow(program, rng.randint(2, 12))
    return case(program, loss_of(program))


def block(rng: random.Random) -> Case:
    """Pointwise equations, reductions over one set of axes and views, of several inputs."""
    program = Program(rng)
    frame = rng.choice(FRAMES)
    program.input(frame)
    for _ in range(rng.randint(0, 2)):
        array = program.choose(program.input, program.input, program.constant)
        array(rng.choice([(), tuple(rng.choice((1, n)) for n in frame)]))
    return case(program, str(grow_block(program, frame, subset(program, range(len(frame))))))


def grow_block(program: Program, frame: Shape, axes: tuple[int, ...]) -> Node:
    """More nodes of one block; a node of another rank than the frame's was reduced."""
    rank, small = len(frame), without(frame, axes)

    def reduce_axes() -> None:
        whole = [n for i, n in enumerate(frame) if i in axes]
        fits = lambda x: len(x.shape) == rank and [x.shape[i] for i in axes] == whole  # noqa: E731
        if x := program.pick(fits):
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

    for _ in range(program.rng.randint(2, 9)):
        program.choose(
            *[lambda: unary(program), lambda: binary(program)] * 2,
            *[reduce_axes, restore] * 2,
            through_a_view,
        )()
    return program.nodes[-1]


def chain(rng: random.Random) -> Case:
    """Every entry reaches the loss along one path: entry by entry, moved about, mixed once."""
    program = Program(rng)
    x = program.input(rng.choice(SHAPES), exact=True)
    mixed = False
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(("entrywise", "selection", "parameter", "linear"))
        before = len(program.nodes)
        if kind == "entrywise":
            x = program.add(rng.choice(SMOOTH + KINKED).format(x), x.shape)
            if rng.random() < 0.5:
                y = program.nodes[before - 1]
                text = rng.choice(BINARY).format(x, y) if y.shape == x.shape else f"jnp.sin({x})"
                x = program.add(text, x.shape) if y.name in program.lines[-1] else x
        elif kind == "parameter":
            p = program.input(x.shape, exact=True)
            x = program.add(rng.choice(BINARY).format(*rng.sample([x, p], 2)), x.shape)
        elif kind == "linear" and not mixed and len(x.shape) == 2:
            w = program.constant((x.shape[1], 3))
            x = program.add(f"{x} @ {w}", (x.shape[0], 3))
            mixed = True
        elif kind == "selection" and x.shape:
            order = rng.sample(range(len(x.shape)), len(x.shape))
            text, shape = rng.choice(
                [
                    (f"jnp.transpose({x}, {order})", tuple(x.shape[i] for i in order)),
                    (f"{x}[::-1]", x.shape),
                    (f"{x}[1:]" if x.shape[0] > 1 else f"{x}[:1]", (max(x.shape[0] - 1, 1),)
                     + x.shape[1:]),
                    (f"jnp.concatenate([{x}, jnp.square({x})])", (2 * x.shape[0], *x.shape[1:])),
                    (f"{x}.reshape(-1)", (math.prod(x.shape),)),
                    (f"{x}[jnp.array([0, -1])]", (2, *x.shape[1:])),
                ]
            )
            x = program.add(text, shape)
    return case(program, rng.choice(("jnp.sum({})", "jnp.mean({}**2)")).format(x))


FAMILIES: dict[str, Callable[[random.Random], Case]] = {}


if __name__ == "__main__":
    pass
