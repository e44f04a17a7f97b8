"""The contract in dense algebra: exact inside a block, off-diagonal terms dropped only between.

A slow reference for whole programs. Which equations are on the path, and which of them form a
block, is what ``hesscale_jax.blocks`` says; a *unit* is a block, or any other equation on the path.
Back through the units, from ``g = 1`` and ``h = 0`` at the loss, for each ``y = f(x)`` with its
Jacobian ``J`` and second derivatives ``H``

    g_x += J^T g_y
    h_x += (J*J)^T h_y + sum_j g_j H_jii

A block, or a product, in which images of one source meet is a function of their sources, as
``hesscale_jax.images`` says which; what comes back to the shift goes the way of the gradient.

Loops, branches and functions with a derivative rule of their own do the same with the programs that
they run; the entries of what a step of a loop hands to the next count as independent, as do the
operands of any other equation outside of blocks, also where a value stands twice.
No rule of the library is used, nor its arithmetic inside blocks.
"""

import graphlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
from interpreter import Series

import hesscale_jax as hs
from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Constant, Equation, Program, Value
from hesscale_jax.blocks import Plan
from hesscale_jax.images import Images, Part, images_of
from hesscale_jax.paths import Loop, loop
from hesscale_jax.planning import plan
from hesscale_jax.rules.custom_derivatives import custom_rule
from hesscale_jax.rules.table import find

FLOOR = 1e-3  # what counts as the size of derivatives that cancel
COMPILED = False  # whether XLA runs what is under test
Unit = list[Equation]


class Cotangents(NamedTuple):
    """What comes back to a value: of its shift, of its spread."""

    g: Any
    h: Any


def check(
    fun: Callable[..., Any], *args: jax.Array, rtol: float = 1e-9, finite: bool = True
) -> None:
    """Compare the library with ``jax.grad`` and with :func:`hesscale`.

    An entry may be off by ``rtol`` times the largest one, of all arguments together. Unless it has
    to be ``finite``, nothing is compared where ``jax.grad`` is not.
    """
    everywhere = range(len(args))

    expected = computed(jax.grad(fun, everywhere), *args)
    grads, diagonals = computed(hs.hesscale(fun, everywhere), *args)
    if not (finite or is_finite(expected)):
        return
    oracle_grads, oracle_diagonals = hesscale(fun, *args)
    assert_close(grads, expected, rtol, "gradient")
    assert_close(oracle_grads, expected, rtol, "gradient of the oracle")
    if not (finite or is_finite(oracle_diagonals)):
        hessians = [jax.hessian(fun, i)(*args) for i in everywhere]
        if not is_finite(hessians):
            return
    assert_close(diagonals, oracle_diagonals, rtol, "hess_diag")


def computed(fun: Callable[..., Any], *args: Any) -> Any:
    """What is under test: by NumPy, which takes less time, or compiled."""
    return jax.jit(fun)(*args) if COMPILED else interpreter.traced(fun, *args)


def is_finite(grads: Sequence[Any]) -> bool:
    """Whether there is something to compare with.

    A random program may overflow. And XLA may compute a value twice and round it differently: then
    no entry equals the maximum, and its derivative is 0 / 0.
    """
    return all(np.isfinite(x).all() for x in grads)


def assert_close(
    received: Sequence[Any],
    expected: Sequence[Any],
    rtol: float,
    what: str,
    floor: float = FLOOR,
) -> None:
    scale = max(floor, *(np.max(np.abs(x), initial=0) for x in expected))
    for i, (got, want) in enumerate(zip(received, expected, strict=True)):
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale, err_msg=f"{what} {i}")
        assert np.isfinite(got).all(), f"{what} {i} is not finite"


def hesscale(fun: Callable[..., Any], *args: jax.Array) -> tuple[list[Any], list[Any]]:
    """The gradient and HesScale's diagonal of a loss, for each argument."""
    program = _jaxpr.flatten(_jaxpr.trace(fun, *args))
    args = tuple(map(interpreter.array, args))
    with np.errstate(all="ignore"):
        top = [Cotangents(np.ones(()), np.zeros(()))]
        found = backward(program, args, program.inputs, top, program.inputs, program.outputs)
    return [x.g for x in found], [x.h for x in found]


def backward(
    program: Program,
    primals: Sequence[Any],
    moving: Iterable[Value],
    cotangents: Sequence[Cotangents | None],
    leaves: Iterable[Value],
    last: Iterable[Value],
) -> list[Cotangents]:
    """The cotangents of a program's inputs from those of its outputs."""
    wanted = [v for v, x in zip(program.outputs, cotangents, strict=True) if x is not None]
    steps = plan(program, moving, wanted, find_rule)
    images = images_of(steps, leaves, last)
    env = evaluate(program, primals)
    came_back: dict[Value, Cotangents] = {}

    def add(value: Any, x: Cotangents | None) -> None:
        if x is not None and value in steps.active:
            came_back[value] = plus(came_back.get(value, zero(value.shape)), x)

    for value, x in zip(program.outputs, cotangents, strict=True):
        add(value, x)
    for unit in reversed(units(steps)):
        made = [v for eqn in unit for v in eqn.outputs]
        block = steps.blocks.get(unit[0])
        if block or unit[0] in images.products:
            read = [v for eqn in unit for v in eqn.inputs if v in steps.active and v not in made]
            sources = list(dict.fromkeys(read))
            outputs = [v for v in made if v in came_back]
            function = block_function(unit, env, sources, outputs, steps)
            cotangents = [came_back[v] for v in outputs]
            found = back_through(function, [env[v] for v in sources], cotangents)
            forms = images.blocks.get(block, {})
            if not block:
                forms = dict(zip(unit[0].inputs, images.products[unit[0]], strict=True))
            if forms:
                found = [
                    Cotangents(x.g, np.zeros_like(x.h)) if v in forms else x
                    for v, x in zip(sources, found, strict=True)
                ]
                met = Met(images, steps, env, forms)
                for value, h in met.back(function, sources, cotangents):
                    add(value, Cotangents(np.zeros(value.shape), h))
        else:
            (eqn,) = unit
            positions = [i for i, v in enumerate(eqn.inputs) if v in steps.active]
            sources = [eqn.inputs[i] for i in positions]
            # A function that stands for a primitive on complex values runs no program, and one
            # whose body has no derivative has those of its own rule.
            back = INSIDE[eqn.name] if eqn.bodies else back_through_equation
            if eqn.name in _jaxpr.CUSTOM and steps.rules[eqn] is not custom_rule:
                reverse = eqn.name == "custom_vjp_call"
                back = back_through_own_rule if reverse else back_through_equation
            paths = [loop(eqn, body, steps.active, steps.active, find_rule) for body in eqn.bodies]
            within = [
                images_within(images, eqn, body, path)
                for body, path in zip(eqn.bodies, paths, strict=True)
            ]
            at = At(eqn, [operand(env, v) for v in eqn.inputs], positions, paths, within)
            found = back(at, [came_back.get(v) for v in made])
        for value, x in zip(sources, found, strict=True):
            add(value, x)
    return [came_back.get(v, zero(v.shape)) for v in program.inputs]


def images_within(
    images: Images, eqn: Equation, body: Body, paths: Loop
) -> tuple[set[Value], set[Value]]:
    """The inputs of a body that are leaves, and the outputs after which nothing mixes entries."""
    wanted = [body.program.outputs[i] for i in sorted(paths.wanted)]
    steps = plan(body.program, paths.moving, wanted, find_rule)
    return images.leaves_within(eqn, body), images.last_within(eqn, body, steps)


class Met(NamedTuple):
    """What a unit reads that is not independent."""

    images: Images
    steps: Plan
    env: dict[Value, Any]
    forms: dict[Value, Any]

    def back(
        self,
        function: Callable[[list[Series]], list[Series]],
        sources: Sequence[Value],
        cotangents: Sequence[Cotangents],
    ) -> list[tuple[Value, Any]]:
        """What comes back to the spreads of the forms' sources."""
        origins = list(dict.fromkeys(x for form in self.forms.values() for x in form.of))

        def of_origins(xs: list[Series]) -> list[Series]:
            moved = dict(zip(origins, xs, strict=True))
            return function(
                [
                    self.linearised(v, moved) if v in self.forms else Series(self.env[v])
                    for v in sources
                ]
            )

        found = back_through(of_origins, list(map(self.at, origins)), cotangents)
        return [
            each for x, c in zip(origins, found, strict=True) for each in self.spread_back(x, c.h)
        ]

    def spread_back(self, source: Any, h: Any) -> list[tuple[Value, Any]]:
        if not isinstance(source, Part):
            return [(source, h)]
        back = []
        for x in source.form.of:
            (found,) = back_through(
                lambda at, x=x: [self.affine(source.value, {x: at[0]})],
                [self.at(x)],
                [Cotangents(np.zeros(source.shape), h)],
            )
            back += self.spread_back(x, found.h)
        return back

    def at(self, origin: Any) -> Any:
        return np.zeros(origin.shape) if isinstance(origin, Part) else self.env[origin]

    def linearised(self, value: Value, moved: dict[Any, Series]) -> Series:
        return self.affine(value, self.origins(value, moved))

    def origins(self, value: Value, moved: dict[Any, Series]) -> dict[Any, Series]:
        """Of what may have moved, what a value's form is of: a part of it hides its own."""
        form = self.images.of(value).of
        return {x: y for x, y in moved.items() if x is value or x in form}

    def affine(self, value: Value, moved: dict[Any, Series]) -> Series:
        """A value as an affine function of its origins: a form is of first order."""
        y = self.image(value, moved)
        return Series(y.x, y.d)

    def image(self, value: Value, moved: dict[Any, Series], stop: bool = False) -> Series:
        """A value, of other sources."""
        if value in moved:
            return moved[value]
        makers = {v: eqn for eqn in self.steps.rules for v in eqn.outputs}
        if stop or list(self.images.of(value).of) == [value]:
            return Series(self.env[value])
        eqn = makers[value]
        active = [v for v in eqn.inputs if v in self.steps.active]
        apart = len(active) == 2 and eqn not in self.images.products
        operands = [
            self.image(v, self.origins(v, moved), apart and is_mixed(eqn, self.images.of(v)))
            if v in active
            else Series(operand(self.env, v))
            for v in eqn.inputs
        ]
        results = interpreter.Expansions().apply(eqn, operands)
        y = results[eqn.outputs.index(value)]
        for part in (x for x in moved if isinstance(x, Part) and x.value is value):
            d = moved[part].d
            y = Series(y.x, d if y.d is None else y.d + d)
        return y


def is_mixed(eqn: Equation, form: Any) -> bool:
    """Whether a product takes a factor that has a form as a value by itself."""
    summed = any(term.summed for terms in form.of.values() for term in terms)
    return eqn.name == "dot_general" and summed


def find_rule(eqn: Equation) -> Any:
    return find(hs.RULES, eqn)


def zero(shape: tuple[int, ...]) -> Cotangents:
    return Cotangents(*np.zeros((2, *shape)))


def plus(x: Cotangents, y: Cotangents) -> Cotangents:
    return Cotangents(x.g + y.g.astype(x.g.dtype), x.h + y.h.astype(x.h.dtype))


def evaluate(program: Program, primals: Sequence[Any]) -> dict[Value, Any]:
    """The primal of every value."""
    env = dict(zip(program.inputs, primals, strict=True))
    for eqn in program.equations:
        run(eqn, env)
    return env


def run(eqn: Equation, env: dict[Value, Any]) -> None:
    results = interpreter.Numbers().apply(eqn, [operand(env, v) for v in eqn.inputs])
    env.update(zip(eqn.outputs, results, strict=True))


def operand(env: dict[Value, Any], atom: Value | Constant) -> Any:
    return interpreter.array(atom.value) if isinstance(atom, Constant) else env[atom]


def units(steps: Plan) -> list[Unit]:
    """Each block, and each equation on the path that is in none, in topological order."""
    unit_of = {}  # by equation, what stands for its unit
    members: dict[Any, Unit] = {}
    for eqn in steps.rules:
        unit_of[eqn] = steps.blocks.get(eqn, eqn)
        members.setdefault(unit_of[eqn], []).append(eqn)
    makers = {v: unit_of[eqn] for eqn in steps.rules for v in eqn.outputs if v in steps.active}

    def read(eqn: Equation) -> Iterable[Value]:
        if eqn not in steps.loops:
            return eqn.inputs
        through = steps.loops[eqn]  # What no step's results depend on does not come before it.
        handed_out = [v for i, v in enumerate(eqn.outputs) if i not in through.carries]
        if not steps.active.isdisjoint(handed_out):
            return eqn.inputs
        return {*through.scanned, *(v for values in through.depends.values() for v in values)}

    graph = {
        unit: {makers[v] for eqn in eqns for v in read(eqn) if v in makers} - {unit}
        for unit, eqns in members.items()
    }
    return [members[unit] for unit in graphlib.TopologicalSorter(graph).static_order()]


def block_function(
    unit: Unit,
    env: dict[Value, Any],
    sources: Sequence[Value],
    outputs: Sequence[Value],
    steps: Plan,
) -> Callable[[list[Series]], list[Series]]:
    """A block as a function of what it reads."""

    def function(xs: list[Series]) -> list[Series]:
        inside = {v: Series(x) for v, x in env.items()} | dict(zip(sources, xs, strict=True))
        for eqn in unit:
            run_in_block(eqn, inside, steps)
        return [inside[v] for v in outputs]

    return function


def run_in_block(eqn: Equation, env: dict[Value, Series], steps: Plan) -> None:
    """Run an equation, a loop step by step; no derivative flows through what is on no path."""
    expansions = interpreter.Expansions()

    def read(atom: Value | Constant) -> Series:
        return env[atom] if isinstance(atom, Value) else Series(operand({}, atom))

    operands = list(map(read, eqn.inputs))
    if eqn not in steps.rules:
        operands = [Series(x.x) for x in operands]
    if eqn not in steps.loops:
        env.update(zip(eqn.outputs, expansions.apply(eqn, operands), strict=True))
        return
    (body,), inner = eqn.bodies, steps.loops[eqn].plan

    def step(read: list[Series]) -> list[Series]:
        inside = dict(zip(body.program.inputs, read, strict=True))
        for each in body.program.equations:
            run_in_block(each, inside, inner)
        results = body.program.outputs
        return [inside[v] if isinstance(v, Value) else Series(operand({}, v)) for v in results]

    env.update(zip(eqn.outputs, interpreter.scanned(expansions, eqn, operands, step), strict=True))


class At(NamedTuple):
    """An equation outside of blocks, as a function of the operands at ``positions``."""

    eqn: Equation
    primals: list[Any]
    positions: list[int]
    paths: list[Loop]  # through the programs that it runs
    images: list[Any]  # what is known of theirs

    def function(self, results: Sequence[int]) -> Callable[..., list[Any]]:
        def function(*xs: Any) -> list[Any]:
            along = _jaxpr.along(self.eqn, self.primals, self.positions)
            found = _jaxpr.listed(along(*xs), self.eqn)
            return [found[i] for i in results]

        return function

    def expansion(self, results: Sequence[int]) -> Callable[[list[Series]], list[Series]]:
        def function(xs: list[Series]) -> list[Series]:
            operands = list(map(Series, self.primals))
            for i, x in zip(self.positions, xs, strict=True):
                operands[i] = x
            found = interpreter.Expansions().apply(self.eqn, operands)
            return [found[i] for i in results]

        return function

    @property
    def xs(self) -> list[Any]:
        return [self.primals[i] for i in self.positions]


def back_through_equation(at: At, cotangents: Sequence[Cotangents | None]) -> list[Cotangents]:
    wanted = [i for i, x in enumerate(cotangents) if x is not None]
    return back_through(at.expansion(wanted), at.xs, [cotangents[i] for i in wanted])


def back_through_scan(at: At, cotangents: Sequence[Cotangents | None]) -> list[Cotangents]:
    """Step by step, from the last."""
    (body,), (paths,), (images,) = at.eqn.bodies, at.paths, at.images
    consts, carry, xs = _jaxpr.scan_groups(at.eqn)
    times = range(at.eqn.params["length"])
    steps, state = [], [at.primals[i] for i in carry]
    for t in reversed(times) if at.eqn.params["reverse"] else times:
        here = [at.primals[i][t] for i in xs]
        read = [*(at.primals[i] for i in consts), *state, *here]
        env = evaluate(body.program, read)
        state = [operand(env, v) for v in body.program.outputs[: len(carry)]]
        steps.append((t, read))

    found = {i: zero(jnp.shape(x)) for i, x in enumerate(at.primals)}
    handed_on, outputs = list(cotangents[: len(carry)]), cotangents[len(carry) :]
    for t, read in reversed(steps):
        here = [x and Cotangents(x.g[t], x.h[t]) for x in outputs]
        back = back_through_body(body.program, read, paths, [*handed_on, *here], images)
        handed_on = [back[i] for i in carry]
        for i in consts:
            found[i] = plus(found[i], back[i])
        for i in xs:
            found[i].g[t], found[i].h[t] = back[i]
    found.update(zip(carry, handed_on, strict=True))
    return [found[i] for i in at.positions]


def back_through_cond(at: At, cotangents: Sequence[Cotangents | None]) -> list[Cotangents]:
    """The branch that is taken."""
    which, *operands = at.primals
    branches = [
        back_through_body(body.program, operands, paths, cotangents, images)
        for body, paths, images in zip(at.eqn.bodies, at.paths, at.images, strict=True)
    ]
    found = branches[np.clip(int(which), 0, len(branches) - 1)]
    return [found[i - 1] for i in at.positions]


def back_through_custom(at: At, cotangents: Sequence[Cotangents | None]) -> list[Cotangents]:
    """The gradient by the function's own rule, the curvature by its definition."""
    (body,), (paths,), (images,) = at.eqn.bodies, at.paths, at.images
    wanted = [i for i, x in enumerate(cotangents) if x is not None]

    def pull_back(xs: Any, grads: list[Any]) -> Any:
        results, transpose = jax.vjp(at.function(wanted), *xs)
        return transpose([g.astype(y.dtype) for g, y in zip(grads, results, strict=True)])

    grads = interpreter.traced(pull_back, at.xs, [cotangents[i].g for i in wanted])
    back = back_through_body(body.program, at.primals, paths, cotangents, images)
    return [Cotangents(g, back[i].h) for i, g in zip(at.positions, grads, strict=True)]


def back_through_own_rule(at: At, cotangents: Sequence[Cotangents | None]) -> list[Cotangents]:
    """As if linear, with the Jacobian of the function's own rule in reverse."""
    wanted = [i for i, x in enumerate(cotangents) if x is not None]

    def rows(*xs: Any) -> Any:
        results, transpose = jax.vjp(at.function(wanted), *xs)
        return jax.vmap(transpose)(basis(results))

    g, h = (np.concatenate([getattr(cotangents[i], name).ravel() for i in wanted]) for name in "gh")
    jacobian = interpreter.traced(rows, *at.xs)
    return [Cotangents(np.tensordot(g, j, 1), np.tensordot(h, j * j, 1)) for j in jacobian]


def back_through_body(
    program: Program,
    primals: Sequence[Any],
    paths: Loop,
    cotangents: Sequence[Cotangents | None],
    images: tuple[set[Value], set[Value]],
) -> list[Cotangents]:
    wanted = [
        (x or zero(v.shape)) if i in paths.wanted else None
        for i, (v, x) in enumerate(zip(program.outputs, cotangents, strict=True))
    ]
    return backward(program, primals, paths.moving, wanted, *images)


INSIDE = {
    "scan": back_through_scan,
    "cond": back_through_cond,
    "custom_jvp_call": back_through_custom,
    "custom_vjp_call": back_through_custom,
}


def back_through(
    function: Callable[[list[Series]], list[Series]],
    xs: Sequence[Any],
    cotangents: Sequence[Cotangents],
) -> list[Cotangents]:
    """``g_x = J^T g_y`` and ``h_x = (J*J)^T h_y + sum_j g_j H_jii``."""
    xs = list(xs)
    ends = list(itertools.accumulate((x.size for x in xs), initial=0))
    g, h = np.zeros((2, ends[-1]))  # what comes back to each entry
    for y, c in zip(function(interpreter.basis(xs)), cotangents, strict=True):
        column, bend = (0.0 if part is None else part.reshape(y.x.size, -1) for part in (y.d, y.dd))
        g += np.sum(c.g.reshape(-1, 1) * column, 0)
        h += np.sum(c.h.reshape(-1, 1) * column**2 + c.g.reshape(-1, 1) * bend, 0)
    return [
        Cotangents(g[lo:hi].reshape(x.shape), h[lo:hi].reshape(x.shape))
        for x, (lo, hi) in zip(xs, itertools.pairwise(ends), strict=True)
    ]


def basis(xs: Sequence[jax.Array]) -> list[jax.Array]:
    """One direction for each entry of the arrays, along the first axis."""
    sizes = [x.size for x in xs]
    rows = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    return [jnp.asarray(r.reshape(-1, *x.shape), x.dtype) for x, r in zip(xs, rows, strict=True)]
