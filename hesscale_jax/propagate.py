"""The interpreter: one walk over a program in program order, moments in, moments out."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import jax

from hesscale_jax import _jaxpr
from hesscale_jax._complex import is_complex
from hesscale_jax._jaxpr import Body, Constant, Equation, Program, Region, Value
from hesscale_jax._mesh import at_mesh_of, lying, on_mesh
from hesscale_jax.arrays import Reader
from hesscale_jax.blocks import Block, Plan
from hesscale_jax.covariances import variance
from hesscale_jax.factored import Factored
from hesscale_jax.head import LossHead, check_regions, names_output
from hesscale_jax.images import Needs, Part, images_of
from hesscale_jax.layout import arrivals, reads
from hesscale_jax.loops import LoopArithmetic
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.paths import Loop, loop
from hesscale_jax.planning import plan
from hesscale_jax.pointwise import BlockArithmetic
from hesscale_jax.rules.control_flow import filled, run_steps
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.fourier import fourier
from hesscale_jax.rules.multilinear import Multilinear, met, multilinear
from hesscale_jax.rules.selection import Join, Reduction, Scatter, Selection, View
from hesscale_jax.rules.table import Unsupported, find

__all__ = ["Kept", "affine_in", "propagate"]

# Besides what is pointwise or a view: primitives as cheap to compute again as to read.
CHEAP = frozenset({"concatenate", "iota", "pad", "slice", "split", "transpose", "unstack"})
CHEAP |= {"and", "eq", "ge", "gt", "le", "lt", "ne", "not", "or", "custom_jvp_call"}
CHEAP |= {"complex", "fft"}  # the results are complex


@dataclasses.dataclass(frozen=True)
class Kept:
    """The equations at which second derivatives are kept, with all that is inside of them."""

    equations: frozenset[Equation]

    def inside(self, eqn: Equation, *_: Any) -> "Kept | None":
        """Where they are kept in a program that an equation runs; everywhere if ``None``."""
        return None if eqn in self.equations else Kept(frozenset())


def propagate(
    program: Program,
    operands: Sequence[Moments],
    rules: Mapping[Any, Any],
    curvature: str | Kept = "hessian",
    spreads: bool = False,
) -> list[Moments]:
    """Push moments through a program.

    Args:
      program: The program.
      operands: One per input.
      rules: The rule of each primitive, by the primitive or its name.
      curvature: ``"hessian"``, or ``"gauss_newton"`` to keep second derivatives in the head alone,
        or the equations to keep them at.
      spreads: Whether the loss's spread is asked for too.

    Returns:
      One per output. Of all but the first, the loss, only the primal is asked for.
    """
    moving = _moving(program, operands)
    steps = plan(program, moving, program.outputs[:1], lambda eqn: find(rules, eqn))
    head: LossHead | Kept | None = curvature if isinstance(curvature, Kept) else None
    if curvature == "gauss_newton":
        check_regions(program)
        named = names_output(program)
        head = LossHead(program, steps.rules, affine_in(steps), moving, named=named)
    last = program.outputs[:1]
    return _Walk(program, operands, steps, rules, head, spreads, moving, last).run()


class _Walk:
    """One program, in program order.

    Second derivatives are kept in the ``head`` alone, everywhere if it is ``None``.
    """

    def __init__(
        self,
        program: Program,
        operands: Sequence[Moments],
        steps: Plan,
        rules: Mapping[Any, Any],
        head: LossHead | Kept | None,
        spreads: bool,
        leaves: Iterable[Value],
        last: Iterable[Value],
    ) -> None:
        self._program = program
        self.plan = steps
        self.rules = rules
        self.head = head
        self._spreads = spreads
        self._moments = dict(zip(program.inputs, operands, strict=True))
        factored = [v for v, x in self._moments.items() if isinstance(x.spread, Factored)]
        self.images = images_of(steps, leaves, last, factored)
        self._arriving = self._routed(factored)
        self._blocks: dict[Block, BlockArithmetic] = {}
        self._made_in: dict[Value, BlockArithmetic] = {}
        self._constrained: dict[Value, Equation] = {}  # what says where a block's value lies
        self._kept: Container[Value] = ()  # what is read, in its block, when all has run
        self._computing: dict[Any, Reader] = {}  # by dtype, in this trace
        self.place: tuple[int, ...] = ()  # of the equation that runs the program

    def run(self) -> list[Moments]:
        self._run(self._program.equations, None)
        read = self._collapsed if self._spreads else self._read
        return list(map(read, self._program.outputs))

    def _routed(self, factored: Sequence[Value]) -> dict[Equation, dict[int, Factored]]:
        """The structured spreads of inputs, taken to the operands that they are meant for."""
        arriving: dict[Equation, dict[int, Factored]] = defaultdict(dict)
        readers = reads(self.plan) if factored else {}
        for value in factored:
            x = self._moments[value]
            self._moments[value] = x._replace(spread=None)
            for eqn, position, axes in arrivals(readers, value, x.spread.axes):
                arriving[eqn][position] = dataclasses.replace(x.spread, axes=axes)
        return arriving

    def number(self, eqn: Equation) -> int:
        """Where an equation stands in the program."""
        return self._program.equations.index(eqn)

    def curved(self, eqn: Equation) -> bool:
        """Whether second derivatives are kept at an equation."""
        return self.head is None or eqn in self.head.equations

    def _run(self, equations: Iterable[Equation], region: Region | None) -> None:
        for inner, group in itertools.groupby(equations, lambda eqn: _within(eqn, region)):
            if inner is not None:
                self._rematerialised(inner, list(group))
                continue
            for eqn in group:
                with _jaxpr.context(eqn):
                    results = self._step(eqn)
                self._moments.update(zip(eqn.outputs, results, strict=True))

    def _step(self, eqn: Equation) -> list[Moments]:
        if eqn not in self.plan.rules:
            return list(map(Moments, _jaxpr.run(eqn, *(self._read(v).primal for v in eqn.inputs))))
        rule = self.plan.rules[eqn]
        if eqn in self.plan.loops:
            return self._loop_in_block(eqn)
        if eqn in self.plan.blocks:
            return [self._in_block(eqn, rule)]
        operands = [self._collapsed(v) for v in eqn.inputs]
        for i, spread in self._arriving.get(eqn, {}).items():
            operands[i] = operands[i]._replace(spread=spread)
        results = _one_per_output(eqn, rule(eqn, operands, Recursion(self, eqn)))
        if eqn in self.images.products:
            forms = self.images.products[eqn]
            results = [met(eqn, results[0], forms, self._varies, self._reader_in, self.curved(eqn))]
        return results

    def _in_block(self, eqn: Equation, rule: Any) -> Moments:
        arithmetic = self._arithmetic(self.plan.blocks[eqn])
        operands = [self._read(v) for v in eqn.inputs]
        (value,) = eqn.outputs
        self._made_in[value] = arithmetic
        if eqn.name == "sharding_constraint":
            self._constrained[value] = eqn
        if isinstance(rule, Pointwise | Join):
            active = [i for i, v in enumerate(eqn.inputs) if v in self.plan.active]
            phi = rule if isinstance(rule, Pointwise) else rule.inside
            return arithmetic.pointwise(eqn, phi, operands, active, self.curved(eqn))
        if isinstance(rule, Reduction):
            return arithmetic.reduction(eqn, rule, operands)
        if eqn in self.plan.segments:
            how = self.plan.segments[eqn]
            if isinstance(rule, Scatter):
                return arithmetic.scatter(eqn, rule, operands, how)
            return arithmetic.take(eqn, operands, how)
        return arithmetic.view(eqn, operands)

    def _loop_in_block(self, eqn: Equation) -> list[Moments]:
        """A loop that a block leads through: the body is part of the block."""
        (body,), through = eqn.bodies, self.plan.loops[eqn]
        around = self._arithmetic(self.plan.blocks[eqn])
        arithmetic = LoopArithmetic(eqn, through, around)
        head = self.head and self.head.inside(
            eqn, body, through.plan.rules, affine_in(through.plan)
        )
        groups = _jaxpr.scan_groups(eqn)
        consts, carry = ([self._read(eqn.inputs[i]) for i in group] for group in groups[:2])
        # A step may ignore what it is handed: the same value may be in the block then.
        xs = [
            self._collapsed(v) if v in through.scanned else self._read(v)
            for v in (eqn.inputs[i] for i in groups[2])
        ]
        moving = [i in through.carries for i in range(len(carry))]

        def handed_on(carry: Sequence[Moments]) -> list[Moments]:
            return [x._replace(spread=None) for x in filled(carry, moving)]

        def step(state: Any, xs: list[Moments]) -> Any:
            carry, carried = state
            operands = [*consts, *carry, *xs]
            steps = through.plan
            walk = _Walk(body.program, operands, steps, self.rules, head, True, (), ())
            walk._kept = frozenset(arithmetic.handed_on)
            inside = walk._arithmetic(through.block)
            walk._made_in.update(dict.fromkeys(arithmetic.enter(carried, inside), inside))
            walk._run(body.program.equations, None)
            carry = handed_on(list(map(walk._read, arithmetic.handed_on)))
            ys = list(map(walk._collapsed, body.program.outputs[len(carry) :]))
            return (carry, arithmetic.leave(inside)), ys

        read = [x.primal for x in (*consts, *carry, *xs)]

        def varying(x: Any) -> Any:
            return functools.reduce(_jaxpr.varying_as, read, x)

        start = handed_on(carry), jax.tree.map(varying, arithmetic.start())
        (carry, carried), ys = run_steps(eqn, step, start, xs, Recursion(self, eqn).policy)
        arithmetic.finish(carried)
        self._made_in.update((eqn.outputs[i], around) for i in through.carries)
        return [*carry, *ys]

    def _arithmetic(self, block: Block) -> BlockArithmetic:
        if block not in self._blocks:
            forms = self.images.blocks.get(block, {})
            self._blocks[block] = BlockArithmetic(block, forms, self._varies, self._reader_in)
        return self._blocks[block]

    def _varies(self, source: Value | Part) -> Any:
        """The spread of a source of forms."""
        if isinstance(source, Value):
            return self._collapsed(source).spread
        reader = self._reader_in(spread_dtype(source.value.dtype))
        return variance(source.form, self._varies, reader)

    def _reader_in(self, dtype: Any) -> Reader:
        """What factors of forms are computed from, in a dtype: once for all that read them."""
        key = dtype, jax.sharding.get_abstract_mesh()
        if key not in self._computing:
            rule = self.rules.get("dot_general")
            products = rule if isinstance(rule, Multilinear) else multilinear
            self._computing[key] = Reader(self._primal, dtype, products.within)
        return self._computing[key]

    def _primal(self, value: Value) -> Any:
        return self._moments[value].primal

    def _read(self, atom: Value | Constant) -> Moments:
        """Without the spread, if the value was made in a block."""
        if isinstance(atom, Constant):
            return Moments(on_mesh(atom.value))
        moments = self._moments[atom]
        return moments if atom in self.plan.active else Moments(moments.primal)

    def _collapsed(self, atom: Value | Constant) -> Moments:
        """With the spread with which the value leaves its block."""
        if isinstance(atom, Value) and atom in self._made_in:
            with at_mesh_of(atom.aval):
                spread = self._made_in.pop(atom).spread(atom)
                spread = spread if spread is None else lying(spread, atom.aval)
            if spread is not None and atom in self._constrained:
                spread = _jaxpr.bind(self._constrained[atom], spread)
            self._moments[atom] = self._moments[atom]._replace(spread=spread)
        return self._read(atom)

    def _rematerialised(self, region: Region, equations: list[Equation]) -> None:
        """Run equations under ``jax.checkpoint``, handing out what is read after them.

        A block may cross the border. What its values on this side are computed from is handed out
        then, so that nothing depends on where the border is.
        """
        made = dict.fromkeys(v for eqn in equations for v in eqn.outputs)
        inside = set(equations)
        entering = [(v, eqn) for eqn in equations for v in eqn.inputs if v not in made]
        reading = [(v, eqn) for v in made for eqn in self._readers[v] if eqn not in inside]
        handed = dict.fromkeys(v for v, _ in reading)
        handed.update((v, None) for v in self._program.outputs if v in made)
        shared = dict.fromkeys(v for v, eqn in reading if self._stays(v, eqn))
        read_here, read_after = self._read_by_forms(inside)
        handed.update((v, None) for v in made if v in read_after.values | read_after.sources)
        shared.update((v, None) for v in made if v in self._kept and v in self._home)
        spread = [v for v, eqn in reading if eqn in self.plan.rules and not self._stays(v, eqn)]
        spread += [v for v in self._program.outputs if v in made and self._spreads]
        spread += [v for v in made if v in read_after.sources]

        for value, eqn in entering:
            if eqn in self.plan.rules and not self._stays(value, eqn):
                self._collapsed(value)
        for value in [v for v in self._moments if v in read_here.sources - made.keys()]:
            self._collapsed(value)
        before = [v for v, eqn in entering if self._stays(v, eqn)]
        known = {(id(holder), key): holder[key] for holder, key in self._held(before)}
        held: list[tuple[dict[Any, Any], Any]] = []
        blocks = {self.plan.blocks[eqn] for eqn in equations if eqn in self.plan.blocks}
        sources = {block: self._arithmetic(block).sources for block in blocks}

        def run() -> Any:
            computing, self._computing = self._computing, {}
            self._run(equations, region)
            for value in spread:
                self._collapsed(value)
            held.extend(
                (h, key) for h, key in self._held(shared) if known.get((id(h), key)) is not h[key]
            )
            results = [self._moments[v] for v in handed], [h[key] for h, key in held]
            self._leave(made, shared, held, sources)
            self._computing = computing
            return results

        moments, arrays = jax.checkpoint(run, **region.options)()
        self._moments.update(zip(handed, moments, strict=True))
        for (holder, key), array in zip(held, arrays, strict=True):
            holder[key] = array

    def _leave(
        self,
        made: Iterable[Value],
        shared: Container[Value],
        held: list[tuple[dict[Any, Any], Any]],
        sources: dict[Block, frozenset[Value]],
    ) -> None:
        """Forget what was made inside of a region: it belongs to a trace that ends."""
        for value in made:
            self._moments.pop(value, None)  # An inner region may have forgotten it.
        for holder, key in held:
            holder[key] = None
        handed_over = {key for _, key in held}
        for block, before in sources.items():
            arithmetic = self._blocks[block]
            inside = [v for v in made if v not in shared and self._home.get(v) is block]
            arithmetic.forget(arithmetic.sources - before - handed_over, inside)

    def _read_by_forms(self, inside: set[Equation]) -> tuple[Needs, Needs]:
        """What the forms that are used at these equations need, and those used elsewhere."""
        here, elsewhere = Needs(set(), set()), Needs(set(), set())
        for eqn, needs in self.images.needs:
            among = here if eqn in inside else elsewhere
            among.values.update(needs.values)
            among.sources.update(needs.sources)
        return here, elsewhere

    def _stays(self, value: Any, reader: Equation) -> bool:
        """Whether a value is read in the block that makes it."""
        block = self.plan.blocks.get(reader)
        return block is not None and self._home.get(value) is block

    def _held(self, values: Iterable[Value]) -> list[tuple[dict[Any, Any], Any]]:
        """The arrays that the derivatives of blocks' values consist of, by holder and key."""
        found = {
            (id(holder), key): (holder, key)
            for value in values
            for holder, key in self._blocks[self._home[value]].held(value)
        }
        return list(found.values())

    @functools.cached_property
    def _home(self) -> dict[Value, Block]:
        """The block that makes a value; what a loop stacks leaves it, though it may come back."""
        home: dict[Value, Block] = {}
        for eqn, block in self.plan.blocks.items():
            through = self.plan.loops.get(eqn)
            made = eqn.outputs if through is None else [eqn.outputs[i] for i in through.carries]
            home.update((v, block) for v in made if v in block.spans)
        return home

    @functools.cached_property
    def _readers(self) -> dict[Value, list[Equation]]:
        readers = defaultdict(list)
        for eqn in self._program.equations:
            for value in eqn.inputs:
                readers[value].append(eqn)
        return readers


@dataclasses.dataclass(frozen=True)
class KeepsCostly:
    """A policy of ``jax.checkpoint``, which JAX's caches hold: it refers to nothing else.

    Attributes:
      cheap: The primitives of which nothing is kept, unless they call the host.

    Nor is what has complex values: JAX rounds what is kept by an operation that takes none.
    """

    cheap: frozenset[str]

    def __call__(self, primitive: Any, *operands: Any, **params: Any) -> bool:
        kept = primitive.name not in self.cheap and not any(map(is_complex, operands))
        return kept or _jaxpr.holds_callback(params)


class Recursion:
    """What a rule pushes moments through the programs of its equation with.

    Attributes:
      curved: Whether second derivatives are to be kept: always, or in the loss's head.
      wanted: For each output, whether its shift and spread are asked for.
    """

    def __init__(self, walk: _Walk, eqn: Equation) -> None:
        self._walk = walk
        self._eqn = eqn
        self.curved = walk.curved(eqn)
        self.wanted = [v in walk.plan.active for v in eqn.outputs]

    def __call__(self, within: Any, operands: Sequence[Moments]) -> list[Moments]:
        """Push moments through a body of the equation, or a jaxpr with the same outputs."""
        body = within if isinstance(within, Body) else _jaxpr.body(within, self._eqn)
        walk, program = self._walk, body.program
        if self._eqn.name in _jaxpr.CUSTOM:
            _check_pure(program)
        moving = _moving(program, operands)
        asked = self._loop(body).wanted
        steps = plan(program, moving, [program.outputs[i] for i in asked], self._find)
        head = walk.head and walk.head.inside(self._eqn, body, steps.rules, affine_in(steps))
        leaves = walk.images.leaves_within(self._eqn, body)
        last = walk.images.last_within(self._eqn, body, steps)
        inner = _Walk(program, operands, steps, walk.rules, head, True, leaves, last)
        inner.place = self.place
        return inner.run()

    def through(self, program: Program, operands: Sequence[Moments]) -> list[Moments]:
        """Push moments through any program, all of whose outputs' spreads are asked for."""
        steps = plan(program, _moving(program, operands), program.outputs, self._find)
        return _Walk(program, operands, steps, self._walk.rules, None, True, (), ()).run()

    @property
    def place(self) -> tuple[int, ...]:
        """The equation's number in its program, after those of the equations that run that."""
        return (*self._walk.place, self._walk.number(self._eqn))

    @property
    def policy(self) -> "KeepsCostly":
        """A policy of ``jax.checkpoint``: keep what takes more than a pass over its entries."""
        cheap = (
            name
            for name, rule in self._walk.rules.items()
            if isinstance(name, str) and isinstance(rule, Pointwise | View | Join)
        )
        return KeepsCostly(CHEAP.union(cheap))

    def moving(self, body: Body) -> list[bool]:
        """Which inputs of a body have a shift and a spread: in a loop, at any step."""
        moving = self._loop(body).moving
        return [v in moving for v in body.program.inputs]

    def _loop(self, body: Body) -> Loop:
        active = self._walk.plan.active
        return loop(self._eqn, body, active, active, self._find)

    def _find(self, eqn: Equation) -> Any:
        return find(self._walk.rules, eqn)


def _check_pure(program: Program) -> None:
    """Raise if running what a function computes besides its own derivative repeats an effect."""
    for eqn in program.equations:
        if eqn.sources[0].effects:
            Unsupported(
                "its effect would take place twice, for the gradient and for the curvature"
            )(eqn, (), None)


def _one_per_output(eqn: Equation, results: Any) -> list[Moments]:
    """What a rule returns, which may be written by somebody who is new to it."""
    if isinstance(results, list | tuple) and all(isinstance(y, Moments) for y in results):
        if len(results) == len(eqn.outputs):
            return list(results)
        got = f"{len(results)} of them"
    else:
        got = type(results).__name__
    raise TypeError(
        f"the rule of {_jaxpr.label(eqn)!r} must return a list with one Moments for each output, "
        f"of which there are {len(eqn.outputs)}, but returned {got}"
    )


def _moving(program: Program, operands: Sequence[Moments]) -> list[Value]:
    return [v for v, x in zip(program.inputs, operands, strict=True) if x.active]


def _within(eqn: Equation, region: Region | None) -> Region | None:
    """The outermost region inside ``region`` that an equation is in."""
    inner = eqn.region
    while inner is not None and inner.parent is not region:
        inner = inner.parent
    return inner


def affine_in(steps: Plan) -> Callable[[Equation], bool]:
    """Whether the result of an equation on a path is affine in its active operands together."""
    return lambda eqn: _is_affine(eqn, steps)


def _is_affine(eqn: Equation, steps: Plan) -> bool:
    rule = steps.rules[eqn]
    positions = [i for i, v in enumerate(eqn.inputs) if v in steps.active]
    if isinstance(rule, Pointwise):
        return rule.affine(positions)
    if isinstance(rule, Multilinear):
        return len(positions) == 1
    return isinstance(rule, Selection) or rule is fourier
