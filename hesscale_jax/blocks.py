"""Which equations form a block: pure graph analysis, no arithmetic.

A block is a set of pointwise equations, with the reductions and the changes of view between them
(reshapes, broadcasts, stacks), that is treated as one function: the library is exact inside a block
and drops off-diagonal terms only between blocks. Blocks follow from the program's structure alone:

    level(input) = 0
    level(y) = max level(operands)        y made by a pointwise equation, a reduction or a view,
                                          or selected from an affine image of what is read
    level(y) = max level(operands) + 1    y made by any other equation, or by one that does not fit

Equations that feed each other at one level are one block. Levels keep a residual stream from
growing into a single block: in ``x + f(x)`` the sum starts anew, because ``f(x)`` is later. A block
of many reductions, as an unrolled loop makes one, is cut into parts.

Operands from blocks that cannot be merged, for they reduce over other axes, are cut off where that
is free. Entries of a value are bound to one another by a reduction of its block over an axis that
they lie along; others leave the block clean. A result joins the blocks of its bound operands,
also of a lower level if nothing would come before itself, and reads the rest as sources.

A block has one *frame*, a shape in row-major order in which every value of the block has its place.
A dimension of a value occupies a *span* ``(lo, hi)`` of it: ``lo`` entries of the frame's shape
multiplied before the dimension, ``hi`` with it. A dimension of size 1 occupies nothing, ``(1, 1)``.
So reshapes, reduced values and implicit broadcasts are all read off the spans, and a block is at
odds with itself when two equations put one value at different spans, or when two spans overlap.

What has an entry for each segment of :mod:`hesscale_jax.segments`, instead of one for each id, lies
at the span of the ids ``by`` segments, and a sum by segments is a reduction of that span. A block
has one such span at most.

A loop belongs to a block if its body is one, in which the carries start and end at the same spans,
what is read at every step lies along them, and nothing that a step hands on takes in a sum over
either. What is scanned over enters step by step, and has no place in the frame.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Equation, Program, Value, dimension, is_inexact, size
from hesscale_jax.along import Along
from hesscale_jax.rules.control_flow import ControlFlow, scan
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import (
    Join,
    PiecewiseConstant,
    Reduction,
    Scatter,
    Selection,
    Take,
    View,
)
from hesscale_jax.segments import Ids, Segmented, segmented

__all__ = ["Block", "Loop", "Plan", "Through", "is_affine", "loop", "moved", "plan"]


class Segments(NamedTuple):
    """What lies at a span by segments.

    Attributes:
      ids: The segment of each entry of the span.
      rest: The other spans along which the ids differ.
    """

    ids: Ids
    rest: "Spans"


class Span(NamedTuple):
    """A stretch of the frame; by segments, if there are an entry for each of those instead."""

    lo: int
    hi: int
    by: Segments | None = None


Spans = tuple[Span, ...]  # one per dimension of a value

NOTHING = Span(1, 1)

# How often blocks are looked at again for where they are to end, and how many values are tried.
ROUNDS, TRIED = 8, 64

# The covariance of each pair of a block's reductions is written out. A block of more reductions
# that share a source than WHOLE is cut to parts of no more than PART.
WHOLE, PART = 8, 3


class DoesNotFit(Exception):
    """An equation cannot join a block; it starts a new one."""


class ComesBeforeItself(DoesNotFit):
    """A block would read what is computed of its results."""


class Block:
    """One function made of pointwise equations, reductions over one set of axes, and views.

    Attributes:
      spans: Where each value that the block reads or makes lies in the frame.
      cut: Whether it is part of what would be one block, but for its length.
      scanned: What its loops scan over, each only one of them. Nothing else of it reads that.
    """

    cut = False

    def __init__(self, entries: int) -> None:
        self.spans: dict[Value, Spans] = {}
        self.scanned: frozenset[Value] = frozenset()
        self._of_shape: dict[tuple[int, ...], dict[Spans, None]] = {}
        self._reduced: tuple[Span, ...] | None = None
        self._segments: Span | None = None
        self._loops = False
        self._bounds = sorted({1, entries})

    @property
    def entries(self) -> int:
        """The number of entries of the frame."""
        return self._bounds[-1]

    # Read off a finished block

    @property
    def frame(self) -> tuple[int, ...]:
        """The sizes of the frame's axes: the coarsest shape that every value is a view of."""
        return tuple(dimension(axis.hi // axis.lo) for axis in self._axes())

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of the frame that the block's reductions run over."""
        return tuple(i for i, axis in enumerate(self._axes()) if _inside(axis, self._reduced or ()))

    @property
    def along(self) -> Along | None:
        """The axis of the frame along which entries have segments, if there is one."""
        if self._segments is None or self._segments.by is None:
            return None
        axes = list(self._axes())
        (axis,) = (i for i, each in enumerate(axes) if _inside(each, [self._segments]))
        rest = self._segments.by.rest
        batch = tuple(i for i, each in enumerate(axes) if _inside(each, rest))
        return Along(axis, self.frame[axis], dimension(self._segments.by.ids.segments), batch)

    @property
    def ids(self) -> tuple[Ids, Spans]:
        """The ids by which the block has segments, and where they lie."""
        assert self._segments is not None
        assert self._segments.by is not None
        ids, rest = self._segments.by
        return ids, (*rest, self._segments._replace(by=None))

    def view(self, spans: Spans) -> tuple[int, ...]:
        """The shape in the frame of an array whose dimensions lie at ``spans``."""
        return tuple(
            dimension(axis.hi // axis.lo) if _inside(axis, spans) else 1 for axis in self._axes()
        )

    def axes_along(self, spans: Spans) -> Spans:
        """The axes of the frame that ``spans`` consist of."""
        return tuple(axis for axis in self._axes() if _inside(axis, spans))

    def _axes(self) -> Iterator[Span]:
        return map(Span, self._bounds, self._bounds[1:])

    # Growing a block: everything is checked before anything is changed

    def place(
        self,
        placed: dict[Value, Spans],
        reduced: tuple[Span, ...] | None = None,
        bounds: Iterable[int] = (),
        scanned: frozenset[Value] | None = None,
    ) -> None:
        """Add values at their spans, the spans that a reduction runs over, and other bounds.

        Or a loop, by what it scans over: it has no sums by segments beside it.
        """
        loops = self._loops or scanned is not None
        scanned = scanned or frozenset()
        if any(self.spans.get(value, spans) != spans for value, spans in placed.items()):
            raise DoesNotFit
        if self.scanned & scanned or not (self.scanned | scanned).isdisjoint(placed):
            raise DoesNotFit
        if not scanned.isdisjoint(self.spans):
            raise DoesNotFit
        if reduced is not None and self._reduced not in (None, reduced):
            raise DoesNotFit
        found = [span for spans in (*placed.values(), reduced or ()) for span in spans]
        reduced = self._reduced if reduced is None else reduced
        segments = self._one_by_segments(found, reduced)
        refined = _refined(self._bounds, {*bounds, *_ends(found)})
        if segments is not None and any(segments.lo < b < segments.hi for b in refined):
            raise DoesNotFit
        if segments is not None and loops:
            raise DoesNotFit
        self._bounds, self._reduced, self._segments = refined, reduced, segments
        self._loops = loops
        self.scanned |= scanned
        self.spans.update(placed)
        for value, spans in placed.items():
            self._of_shape.setdefault(value.sizes, {})[spans] = None

    def _one_by_segments(
        self, found: Iterable[Span], reduced: tuple[Span, ...] | None
    ) -> Span | None:
        """The span that is by segments, if there is one; what is reduced along it is, by them."""
        by = {span for span in (self._segments, *found) if span is not None and span.by}
        if len(by) > 1:
            raise DoesNotFit
        for span in by:
            if reduced and span not in reduced and _inside(span, reduced):
                raise DoesNotFit
            return span
        return None

    def places(self, shape: tuple[int, ...]) -> Iterable[Spans]:
        """Where the values of a shape lie, the first one's place first."""
        return self._of_shape.get(shape, ())

    def fill(self, value: Value) -> bool:
        """Whether the value has as many entries as the frame, each at its own place."""
        by = any(span.by for span in self.spans.get(value, ()))
        return size(value.sizes) == self.entries and not by

    def leaves_clean(self, value: Value) -> bool:
        """Whether the reductions so far run over groups of which a value has one entry each."""
        return not any(
            max(span.lo, over.lo) < min(span.hi, over.hi)
            for span in self.spans[value]
            for over in self._reduced or ()
        )

    def absorb(
        self, others: dict["Block", Callable[[Span], Span]], placed: dict[Value, Spans]
    ) -> None:
        """Take over blocks, each span of whose frames is moved to one of this one's, and values."""
        placed, bounds = dict(placed), set[int]()
        reduced: tuple[Span, ...] | None = None
        scanned: frozenset[Value] | None = None
        for other, move in others.items():
            over = None if other._reduced is None else merged(map(move, other._reduced))
            if other._segments is None and any(span.by for span in over or ()):
                raise DoesNotFit
            if over is not None and reduced not in (None, over):
                raise DoesNotFit
            reduced = over if reduced is None else reduced
            for value, spans in other.spans.items():
                at = tuple(map(move, spans))
                if placed.setdefault(value, at) != at:
                    raise DoesNotFit
            bounds.update(_ends(map(move, other._axes())))
            if other._loops:
                if scanned is not None and not scanned.isdisjoint(other.scanned):
                    raise DoesNotFit
                scanned = other.scanned.union(scanned or ())
        self.place(placed, reduced, bounds, scanned)


def _ends(spans: Iterable[Span]) -> Iterator[int]:
    return itertools.chain.from_iterable(span[:2] for span in spans)


def _inside(axis: Span, spans: Iterable[Span]) -> bool:
    return any(span.lo <= axis.lo and axis.hi <= span.hi for span in spans)


def _refined(bounds: list[int], others: Iterable[int]) -> list[int]:
    """The bounds with the others among them, each dividing the next."""
    new = set(others).difference(bounds)
    if not new:
        return bounds
    refined = sorted({*bounds, *new})
    if any(b % a for a, b in zip(refined, refined[1:], strict=False)):
        raise DoesNotFit
    return refined


# Spans of an equation's result


def row_major(shape: tuple[int, ...]) -> Spans:
    """The spans of a value that fills the frame."""
    spans, lo = [], 1
    for n in shape:
        spans.append(Span(lo, lo * n) if n > 1 else NOTHING)
        lo *= n
    return tuple(spans)


def broadcast(shape: tuple[int, ...], spans: Sequence[Span]) -> Spans:
    """The spans of an operand of this shape, entry by entry with a result at ``spans``."""
    return tuple(s if n > 1 else NOTHING for n, s in zip(shape, spans, strict=False))


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Adjacent spans as one, in order; not those by segments."""
    stretches: list[Span] = []
    for span in sorted((s for s in spans if s != NOTHING), key=lambda s: s[:2]):
        last = stretches[-1] if stretches else NOTHING
        if last != NOTHING and last.hi == span.lo and not (last.by or span.by):
            stretches[-1] = Span(last.lo, span.hi)
        else:
            stretches.append(span)
    return tuple(stretches)


def reshaped(spans: Iterable[Span], shape: tuple[int, ...]) -> Spans:
    """The spans after a reshape: each new dimension takes the next part of what was occupied."""
    stretches = list(merged(spans))
    result = []
    for n in shape:
        if n == 1:
            result.append(NOTHING)
            continue
        span = stretches.pop(0)
        lo, hi = span.lo, span.hi
        if span.by:
            if n != span.by.ids.segments:
                raise DoesNotFit
            result.append(span)
            continue
        if (hi // lo) % n:
            raise DoesNotFit
        result.append(Span(lo, lo * n))
        if lo * n < hi:
            stretches.insert(0, Span(lo * n, hi))
    return tuple(result)


def broadcast_like(
    block: Block, spans: Spans, old: Value, new: Value, dimensions: Sequence[int]
) -> Spans:
    """The spans after an explicit broadcast of a value that does not fill its frame.

    It is there to meet a value of its shape, and lies as one does; else a new dimension lies right
    behind the one before it.
    """
    kept = {i: spans[j] for j, i in enumerate(dimensions) if old.sizes[j] == new.sizes[i]}
    for placed in block.places(new.sizes):
        if all(placed[i] == span for i, span in kept.items()):
            return placed
    result, behind = [], 1
    for i, n in enumerate(new.sizes):
        span = kept.get(i, Span(behind, behind * n)) if n > 1 else NOTHING
        if n > 1 and span.lo < behind:
            raise DoesNotFit
        behind = max(behind, span.hi)
        result.append(span)
    return tuple(result)


def by_segments(spans: Spans, segments: Segmented) -> Spans:
    """The spans of what has an entry for each segment, from those of what has one for each id."""
    axis = segments.axis
    if spans[axis].by:
        raise DoesNotFit
    rest = tuple(spans[i] for i in segments.along if i != axis)
    at = spans[axis]._replace(by=Segments(segments.ids, rest))
    return (*spans[:axis], at if segments.ids.segments > 1 else NOTHING, *spans[axis + 1 :])


def _broadcast_dimensions(eqn: Equation, segments: Segmented | None) -> Sequence[int] | None:
    """The dimensions of the result of a broadcast, as that from a single segment is."""
    if eqn.name == "broadcast_in_dim":
        return tuple(eqn.params["broadcast_dimensions"])
    if eqn.name == "gather" and segments is not None and segments.ids.segments == 1:
        return range(len(eqn.outputs[0].shape))
    return None


# The analysis of a program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the interpreter needs to know about a program.

    Attributes:
      active: Values on a differentiable path from an active input to an output.
      rules: The rule of each equation on such a path.
      blocks: The block of each equation that is in one.
      segments: The scatters and gathers that undo each other.
      loops: How a block leads through the loops among them.
    """

    active: frozenset[Value]
    rules: dict[Equation, Any]
    blocks: dict[Equation, Block]
    segments: dict[Equation, Segmented]
    loops: "dict[Equation, Through]"


def plan(
    program: Program,
    moving: Iterable[Value],
    wanted: Iterable[Any],
    find: Callable[[Equation], Any],
) -> Plan:
    """Analyse a program.

    Args:
      program: The program.
      moving: The inputs that have a shift or a spread.
      wanted: The outputs whose moments are asked for.
      find: The rule of an equation, ``None`` if there is none.
    """
    active, rules = _paths(program, moving, wanted, find)
    segments = segmented(program, rules, active)
    found = {eqn: _through(eqn, active, find) for eqn, rule in rules.items() if rule is scan}
    loops = {eqn: through for eqn, through in found.items() if through is not None}
    ends: set[Value] = set()
    blocks = _Grouping(active, segments, loops, ends).run(rules)
    for _ in range(ROUNDS):
        more = set(_read_again(rules, blocks, active)) - ends
        if not more:
            break
        ends |= more
        blocks = _Grouping(active, segments, loops, ends).run(rules)
    return Plan(active, rules, blocks, segments, loops)


def _read_again(
    rules: dict[Equation, Any], blocks: dict[Equation, Block], active: frozenset[Value]
) -> Iterator[Value]:
    """The values that blocks are to end with, since another block reads them again.

    Two blocks that share a value do not know how what one makes of it varies with it. If all that
    the first makes for the other is made of one value with independent entries, nothing is lost
    where it begins anew after that; and there both know.
    """
    members: dict[Block, list[Equation]] = {}
    for eqn, block in blocks.items():
        members.setdefault(block, []).append(eqn)
    made = {v: block for eqn, block in blocks.items() for v in eqn.outputs}
    read: dict[Block, set[Value]] = {}  # from elsewhere
    for eqn, block in blocks.items():
        others = (v for v in active.intersection(eqn.inputs) if made.get(v) is not block)
        read.setdefault(block, set()).update(others)
    for block, equations in members.items():
        if not (block.cut or block.along):
            parted = _Parted(block, equations, rules, active)
            yield from parted.ends(read, made)


class _Parted(NamedTuple):
    """A block, if it ended with one of its values."""

    block: Block
    equations: list[Equation]
    rules: dict[Equation, Any]
    active: frozenset[Value]

    def ends(self, read: dict[Block, set[Value]], made: dict[Value, Block]) -> Iterator[Value]:
        """Where it is to end, for what each block reads from elsewhere, and what makes values."""
        own = {v for eqn in self.equations for v in eqn.outputs}
        later = [values for values in read.values() if not values.isdisjoint(own)]
        for handed_on in (values & own for values in later):
            if len(handed_on) > 1:
                yield from self._last(reversed(self.equations), handed_on)

        def origins(values: Iterable[Value]) -> set[Any]:
            return {made.get(v, v) for v in values}

        here = read[self.block]
        before = {made[v] for v in here if v in made}
        meets = len(before) > 1 or any(read[block] & here for block in before)
        if meets or any(origins(values) & origins(here) for values in later):
            first = (e for e in reversed(self.equations) if own.isdisjoint(e.inputs))
            sums = (e for e in first if isinstance(self.rules[e], Reduction))
            yield from self._last(sums, set())

    def _last(self, equations: Iterable[Equation], handed_on: set[Value]) -> Iterator[Value]:
        """The first of some equations' results after which it may end, if it is soon found."""
        results = (v for eqn in equations for v in eqn.outputs if v in self.block.spans)
        found = (v for v in itertools.islice(results, TRIED) if self.is_apart(v, handed_on))
        yield from itertools.islice(found, 1)

    def is_apart(self, end: Value, handed_on: set[Value]) -> bool:
        """Whether these are made of the value, and it of other sources than what is beside it."""
        before, first = {end}, [e for e in self.equations if end in e.outputs]
        for eqn in reversed(self.equations):
            if not before.isdisjoint(eqn.outputs):
                before |= self.active.intersection(eqn.inputs)
                first.append(eqn)
        own = {v for eqn in self.equations for v in eqn.outputs}
        if not self._is_independent(end, before - own, first):
            return False
        beside, after = before - {end}, {end}
        for eqn in self.equations:
            operands = self.active.intersection(eqn.inputs)
            if end in eqn.outputs:
                continue
            if after.isdisjoint(operands):
                if not beside.isdisjoint(operands):
                    beside.update(eqn.outputs)
                continue
            if not beside.isdisjoint(operands - after):
                return False
            after.update(eqn.outputs)
        return handed_on <= after

    def _is_independent(self, end: Value, sources: set[Value], equations: list[Equation]) -> bool:
        """Whether no two entries of the value are made of one entry of its sources.

        Those of a sum may be, as those of a product are.
        """
        if any(isinstance(self.rules[eqn], Reduction) for eqn in equations):
            return self.block.leaves_clean(end)
        spans, axes_along = self.block.spans, self.block.axes_along
        axes = set(axes_along(spans[end]))
        return all(x in spans and axes.issubset(axes_along(spans[x])) for x in sources)


# Paths


def _paths(
    program: Program,
    moving: Iterable[Value],
    wanted: Iterable[Any],
    find: Callable[[Equation], Any],
) -> tuple[frozenset[Value], dict[Equation, Any]]:
    """The values on a differentiable path, and the rules of the equations that make them."""
    reached, found = _reach(program, moving, find)
    needed = {v for v in wanted if v in reached}
    rules = {}
    for eqn in reversed(found):
        if not needed.isdisjoint(eqn.outputs):
            rules[eqn] = rule = found[eqn]
            read = [v for v in eqn.inputs if v in reached]
            if isinstance(rule, ControlFlow):
                inside = [loop(eqn, body, reached, needed, find) for body in eqn.bodies]
                read = [v for v in read if any(v in paths.read for paths in inside)]
            needed.update(read)
    return frozenset(needed), dict(reversed(rules.items()))


def _reach(
    program: Program, moving: Iterable[Value], find: Callable[[Equation], Any]
) -> tuple[set[Value], dict[Equation, Any]]:
    """The values that move with the inputs, and the rules of the equations that read them."""
    # An array without entries carries no derivative anywhere.
    reached = {v for v in moving if size(v.sizes)}
    found = {}
    for eqn in program.equations:
        if reached.isdisjoint(eqn.inputs):
            continue
        found[eqn] = rule = find(eqn)
        moved: Iterable[Value] = eqn.outputs
        if isinstance(rule, PiecewiseConstant):
            moved = ()
        elif isinstance(rule, ControlFlow):
            inside = [_moving(eqn, body, reached, find)[1] for body in eqn.bodies]
            moved = [v for i, v in enumerate(eqn.outputs) if any(i in m for m in inside)]
        reached.update(v for v in moved if is_inexact(v) and size(v.sizes))
    return reached, found


class Loop(NamedTuple):
    """The paths through a body, at any of its steps.

    Attributes:
      moving: The inputs of the body's program that move.
      wanted: The positions of its outputs whose moments are asked for.
      read: The operands of the equation on a path.
    """

    moving: set[Value]
    wanted: set[int]
    read: set[Any]


def loop(
    eqn: Equation,
    body: Body,
    moving: Container[Any],
    wanted: Container[Any],
    find: Callable[[Equation], Any],
) -> Loop:
    """The paths through a body whose operands move and whose results are wanted as given.

    What a step hands to the next moves if it does at any step, and is wanted if it is at any.
    """
    inputs, outputs = body.program.inputs, body.program.outputs
    moves, _ = _moving(eqn, body, moving, find)
    asked = {i for i, v in enumerate(eqn.outputs) if v in wanted}
    while True:
        active, _ = _paths(body.program, moves, [outputs[i] for i in asked], find)
        more = {i for i, j in body.carry.items() if inputs[j] in active}
        if more <= asked:
            read = {eqn.inputs[i] for i, v in zip(body.inputs, inputs, strict=True) if v in active}
            return Loop(moves, asked, read)
        asked |= more


def _moving(
    eqn: Equation, body: Body, moving: Container[Any], find: Callable[[Equation], Any]
) -> tuple[set[Value], set[int]]:
    """The inputs of the body's program that move at any step, and the positions of its outputs."""
    inputs, outputs = body.program.inputs, body.program.outputs
    moves = {v for v, i in zip(inputs, body.inputs, strict=True) if eqn.inputs[i] in moving}
    while True:
        reached, _ = _reach(body.program, moves, find)
        more = {inputs[j] for i, j in body.carry.items() if outputs[i] in reached}
        if more <= moves:
            return moves, {i for i, v in enumerate(outputs) if v in reached}
        moves |= more


# Loops within blocks


class Through(NamedTuple):
    """How a block leads through a loop.

    Attributes:
      plan: The analysis of the body, all of whose equations on a path are in one block.
      block: That block.
      guide: The largest of the carries on a path, by its number.
      axes: The axes of that frame along which the guide lies.
      operands: Where what is read at every step, or is carried first, lies in the frame.
      carries: Where each of the carries on a path does.
      scanned: What is scanned over.
      depends: The operands that each of the carries depends on at any step.
      fed: The carries that depend on what is scanned over.
      sums: Whether a step hands out what takes in a sum over entries of what it carries: they
        have to be independent.
    """

    plan: Plan
    block: Block
    guide: int
    axes: Spans
    operands: dict[Value, Spans]
    carries: dict[int, Spans]
    scanned: frozenset[Value]
    depends: dict[int, list[Value]]
    fed: frozenset[int]
    sums: bool


def _through(
    eqn: Equation, active: frozenset[Value], find: Callable[[Equation], Any]
) -> Through | None:
    """How a block leads through a loop; ``None`` if it does not."""
    (body,) = eqn.bodies
    consts, carry, xs = _jaxpr.scan_groups(eqn)
    length = eqn.params["length"]
    if eqn.sources[0].effects or not isinstance(length, int) or length == 0:
        return None
    inputs, outputs = body.program.inputs, body.program.outputs
    paths = loop(eqn, body, active, active, find)
    wanted = [outputs[i] for i in sorted(paths.wanted)]
    steps = plan(body.program, paths.moving, wanted, find)
    block = _one(steps)
    if block is None or block.along is not None:
        return None
    steps = dataclasses.replace(steps, blocks=dict.fromkeys(steps.rules, block))

    first = carry.start
    carries = [i for i in range(len(carry)) if outputs[i] in steps.active]
    read = [i for i in (*consts, *carry) if inputs[i] in steps.active]
    scanned = [eqn.inputs[i] for i in xs if inputs[i] in steps.active]
    lying = [*(inputs[i] for i in read), *(outputs[i] for i in carries)]
    moving = {i: eqn.inputs[i] for i in read if eqn.inputs[i] in active}
    if (
        not carries
        or any(v not in block.spans for v in lying)
        or any(i in carry and i - first not in carries for i in read)
        or any(
            block.spans[inputs[i]] != block.spans[outputs[i - first]] for i in read if i in carry
        )
        or len({*scanned, *moving.values()}) < len(scanned) + len({*moving.values()})
    ):
        return None
    guide = max(carries, key=lambda i: size(outputs[i].sizes))
    axes = block.axes_along(block.spans[outputs[guide]])
    operands = {x: block.spans[inputs[i]] for i, x in moving.items()}
    if any(operands[x] != block.spans[inputs[i]] for i, x in moving.items()):
        return None
    if any(axis not in axes for v in lying for axis in block.axes_along(block.spans[v])):
        return None
    scanned_in = {inputs[i]: i for i in xs if inputs[i] in steps.active}
    depends, summed = _dependencies(steps, {inputs[i]: i for i in read}, scanned_in)
    view = block.view(axes)
    across = any(view[axis] != 1 for axis in block.reduced)  # else no sum is over a carry
    if across and any(outputs[i] in summed for i in carries):
        return None
    reach = {i: depends[outputs[i]] for i in carries}
    while True:
        more = {
            i: found.union(*(reach[j - first] for j in found if j in carry))
            for i, found in reach.items()
        }
        if more == reach:
            break
        reach = more
    return Through(
        plan=steps,
        block=block,
        guide=guide,
        axes=axes,
        operands=operands,
        carries={i: block.spans[outputs[i]] for i in carries},
        scanned=frozenset(scanned),
        depends={
            i: list(dict.fromkeys(moving[j] for j in sorted(found | {first + i}) if j in moving))
            for i, found in reach.items()
        },
        fed=frozenset(i for i, found in reach.items() if not found.isdisjoint(xs)),
        sums=across and not summed.isdisjoint(wanted),
    )


def _one(steps: Plan) -> Block | None:
    """One block of all of a program's blocks, if all equations on a path are in one."""
    blocks = dict.fromkeys(steps.blocks.get(eqn) for eqn in steps.rules)
    if not blocks or any(block is None or block.cut for block in blocks):
        return None
    one, *others = sorted(filter(None, blocks), key=lambda block: -block.entries)
    try:
        for other in others:
            if other.entries not in (1, one.entries):
                raise DoesNotFit
            one.absorb({other: lambda span: span}, {})
    except DoesNotFit:
        return None
    return one


def _dependencies(
    steps: Plan, local: dict[Value, int], others: dict[Value, int]
) -> tuple[dict[Value, frozenset[int]], set[Value]]:
    """The sources that each value depends on, and the values that take in sums over local ones."""
    depends = {v: frozenset([i]) for v, i in (*local.items(), *others.items())}
    summed: set[Value] = set()
    for eqn, rule in steps.rules.items():
        operands = [v for v in eqn.inputs if v in steps.active]
        found = frozenset[int]().union(*(depends[v] for v in operands))
        depends.update(dict.fromkeys(eqn.outputs, found))
        sums = isinstance(rule, Reduction) and not found.isdisjoint(local.values())
        if sums or not summed.isdisjoint(operands):
            summed.update(eqn.outputs)
    return depends, summed


Unit = Block | Equation


def is_affine(eqn: Equation, rule: Any, active: Container[Value]) -> bool:
    """Whether an equation is affine, entry by entry, in its operands on a path."""
    positions = [i for i, v in enumerate(eqn.inputs) if v in active]
    return isinstance(rule, View) or (isinstance(rule, Pointwise) and rule.affine(positions))


class _Grouping:
    """Walks the equations in program order and puts each into a block, if it belongs in one.

    A *unit* is a block, or an equation in none. No unit may come before itself.
    """

    def __init__(
        self,
        active: frozenset[Value],
        segments: dict[Equation, Segmented],
        loops: dict[Equation, Through],
        ends: set[Value],
    ) -> None:
        self._active = active
        self._segments = segments
        self._loops = loops
        self._ends = ends  # what only other blocks read
        self._level: dict[Value, int] = {}
        self._placed: set[Value] = set()  # what lies in the block that makes it
        self._maker: dict[Value, Unit] = {}
        self._reducing: set[Value] = set()  # values that depend on a reduction in their block
        self._affine: set[Value] = set()  # affine in what their block reads
        self._into: dict[Unit, Block] = {}  # absorbed blocks
        self._seen: dict[Equation, tuple[Any, list[Value], int]] = {}  # rule, operands and level
        self._before: dict[Unit, set[Unit]] = {}  # what made the values that a unit reads
        self._levels: dict[Unit, tuple[int, int]] = {}  # the lowest and the highest of its values
        self._lowest = sys.maxsize  # the lowest level in a block that has several
        self._waiting: set[Value] = set()  # taken by ids, alone in a block that nothing reads yet

    def run(self, rules: dict[Equation, Any]) -> dict[Equation, Block]:
        for eqn, rule in rules.items():
            operands = [v for v in eqn.inputs if v in self._active]
            level = max(self._level.get(v, 0) for v in operands)
            block = None
            fits = isinstance(rule, Pointwise | Reduction | View | Join)
            fits = fits or eqn in self._segments or eqn in self._loops
            if fits:
                for value in self._waiting.intersection(operands):
                    self._waiting.remove(value)
                    self._level[value] = level
                    self._levels[self._maker[value]] = level, level
                block, level = self._joined(eqn, rule, operands, level)
            if block is None:
                starts = fits and not isinstance(rule, View | Join)
                moves = isinstance(rule, Selection) and not starts
                if not moves or self._leaves_a_block(operands, level):
                    level += 1
                if starts:
                    block = self._join(eqn, rule, operands, {})
            self._add(eqn, rule, operands, block or eqn, level)
            if block is not None and isinstance(rule, Take) and self._is_new(block):
                self._waiting.update(eqn.outputs)
        whole: dict[Block, list[Equation]] = {}
        for eqn in rules:
            if isinstance(unit := self._made_by(eqn.outputs[0]), Block):
                whole.setdefault(unit, []).append(eqn)
        return {
            eqn: part
            for block, equations in whole.items()
            for part, run in _cut(block, list(_parts(equations, rules, self._active)))
            for eqn in run
        }

    def _leaves_a_block(self, operands: list[Value], level: int) -> bool:
        """Whether blocks made operands of this level, by more than affine equations."""
        made = (v for v in operands if isinstance(self._made_by(v), Block))
        return any(self._level[v] == level and v not in self._affine for v in made)

    def _add(self, eqn: Equation, rule: Any, operands: list[Value], unit: Unit, level: int) -> None:
        """Take note of an equation in its unit."""
        self._seen[eqn] = rule, operands, level
        if isinstance(rule, Reduction | Scatter) or any(
            v in self._reducing and self._made_by(v) is unit for v in operands
        ):
            self._reducing.update(eqn.outputs)
        self._maker.update(dict.fromkeys(eqn.outputs, unit))
        if self._is_affine(eqn) and all(
            v in self._affine or self._made_by(v) is not unit for v in operands
        ):
            self._affine.update(eqn.outputs)
        self._link(eqn, unit)
        for i, value in enumerate(eqn.outputs):
            inside = isinstance(unit, Block) and not self._is_handed_out(eqn, i)
            self._level[value] = level + (isinstance(unit, Block) and not inside)
            if inside:
                self._placed.add(value)

    def _link(self, eqn: Equation, unit: Unit) -> None:
        """Take note of what comes before an equation's unit."""
        _, operands, level = self._seen[eqn]
        before = {maker for v in operands if (maker := self._made_by(v)) is not None}
        self._before.setdefault(unit, set()).update(before - {unit})
        self._extend(unit, level, level)

    def _extend(self, unit: Unit, low: int, high: int) -> None:
        """Let a unit have values of these levels too."""
        known = self._levels.get(unit, (low, high))
        self._levels[unit] = low, high = min(known[0], low), max(known[1], high)
        if low < high:
            self._lowest = min(self._lowest, low)

    def _joined(
        self, eqn: Equation, rule: Any, operands: list[Value], level: int
    ) -> tuple[Block | None, int]:
        """The block that an equation joins, one of the same level first, and the result's level."""
        placed = (v for v in operands if v in self._placed)
        made = {v: b for v in placed if isinstance(b := self._made_by(v), Block)}
        here = {v: block for v, block in made.items() if self._level[v] == level}
        choices = [here]
        if isinstance(rule, Pointwise):
            # Their entries share sources, by way of a reduction: cut off, terms would be lost.
            bound = {v: b for v, b in made.items() if v in self._reducing and not b.leaves_clean(v)}
            # Read by blocks that are here: before, it was not known where these lie.
            read = set[Unit]().union(*map(self._made_before, set(here.values())))
            near = {v: b for v, b in made.items() if b in read and v not in here}
            choices = [here | bound, bound, here] if bound else [here]
            if near:
                lower = max(self._level.get(v, 0) for v in operands if v not in here)
                with contextlib.suppress(DoesNotFit):
                    return self._join(eqn, rule, operands, here | near), lower
        for i, homes in enumerate(choices):
            if homes in choices[:i]:
                continue
            try:
                return self._join(eqn, rule, operands, homes), level
            except ComesBeforeItself:
                if self._part_off(set(homes.values()), operands):
                    return self._joined(eqn, rule, operands, level)
            except DoesNotFit:
                continue
        return None, level

    def _part_off(self, homes: set[Block], operands: list[Value]) -> bool:
        """Make a block of its own of what comes before one of these, by way of others.

        It has to be affine, so that its results are images of what it reads.

        Returns:
          Whether the operands can be read by one block of these now.
        """
        ahead = {unit for v in operands if (unit := self._made_by(v)) is not None}
        ahead = ahead.union(*map(self._made_before, homes)) - homes
        reached = set(ahead)
        while ahead:
            more = self._made_before(ahead.pop()) - homes - reached
            ahead |= more
            reached |= more
        made: dict[Value, Equation] = {}
        read: set[Value] = set()
        for eqn, (_, values, _) in self._seen.items():
            unit = self._made_by(eqn.outputs[0])
            if unit in homes:
                made.update(dict.fromkeys(eqn.outputs, eqn))
            elif unit in reached:
                read.update(values)
        parted = dict.fromkeys(v for v in made if v in read)
        for value in list(parted):
            for v in (waiting := [value]):
                parted[v] = None
                waiting += [x for x in self._seen[made[v]][1] if x in made and x not in waiting]
        equations = [eqn for eqn in self._seen if not parted.keys().isdisjoint(eqn.outputs)]
        if not equations or not all(self._is_affine(eqn) for eqn in equations):
            return False
        for home in homes:
            apart = [eqn for eqn in equations if self._made_by(eqn.outputs[0]) is home]
            block = Block(home.entries)
            members = {v for eqn in apart for v in (*eqn.outputs, *self._seen[eqn][1])}
            block.place({v: home.spans[v] for v in members})
            self._maker.update((v, block) for eqn in apart for v in eqn.outputs)
        self._placed.difference_update(parted)
        self._before, self._levels = {}, {}
        for eqn in self._seen:
            unit = self._made_by(eqn.outputs[0])
            assert unit is not None
            self._link(eqn, unit)
        return True

    def _is_affine(self, eqn: Equation) -> bool:
        rule, operands, _ = self._seen[eqn]
        return is_affine(eqn, rule, operands)

    def _join(
        self, eqn: Equation, rule: Any, operands: list[Value], homes: dict[Value, Block]
    ) -> Block:
        """Put an equation into one block with those of some operands, or raise ``DoesNotFit``."""
        self._check_order(set(homes.values()), operands)
        if eqn in self._loops:
            return self._join_loop(eqn, self._loops[eqn], homes)
        (result,) = eqn.outputs
        if isinstance(rule, Pointwise):
            # The result lies where the operands of its shape do; one of a single entry, nowhere.
            single = size(result.sizes) == 1
            alike = [v for v in homes if single or v.sizes == result.sizes]
            if not alike:
                return self._fill_frame(result, {v: range(len(v.sizes)) for v in operands}, homes)
            guide = max(alike, key=lambda v: homes[v].entries)
            spans = row_major(result.sizes) if single else homes[guide].spans[guide]
            placed = {v: broadcast(v.sizes, spans) for v in operands}
            return self._merge(result, spans, placed, homes, homes[guide].entries)
        if isinstance(rule, Join):
            if len(set(homes.values())) != 1 or homes.keys() != set(operands):
                raise DoesNotFit
            return self._fill_frame(result, {v: rule.dimensions(eqn) for v in operands}, homes)

        (operand,) = set(operands)
        block = homes.get(operand) or Block(size(operand.sizes))
        dimensions = _broadcast_dimensions(eqn, self._segments.get(eqn))
        if isinstance(rule, Take) and dimensions is None:
            return self._take(result, operand, self._segments[eqn], homes)
        if dimensions is not None and block.fill(operand):
            return self._fill_frame(result, {operand: dimensions}, homes)
        spans = block.spans.get(operand, row_major(operand.sizes))
        reduced: tuple[Span, ...] | None = None
        if isinstance(rule, Scatter):
            axis = self._segments[eqn].axis
            made = by_segments(spans, self._segments[eqn])
            reduced = (made[axis] if made[axis].by else spans[axis],)
        elif isinstance(rule, Reduction):
            axes = rule.axes(eqn)
            reduced = merged(spans[i] for i in axes) or None
            if any(span.by for span in reduced or ()):
                raise DoesNotFit
            made = reshaped((s for i, s in enumerate(spans) if i not in axes), result.sizes)
        elif dimensions is not None:
            made = broadcast_like(block, spans, operand, result, dimensions)
        else:
            made = reshaped(spans, result.sizes)
        block.place({operand: spans, result: made}, reduced)
        return block

    def _take(
        self, result: Value, operand: Value, segments: Segmented, homes: dict[Value, Block]
    ) -> Block:
        """The block of what is taken by ids: that of a sum by them, or a new one."""
        block = homes.get(operand) or Block(size(result.sizes))
        made = row_major(result.sizes)
        if operand in homes:
            made = tuple(Span(span.lo, span.hi) for span in block.spans[operand])
        block.place({operand: by_segments(made, segments), result: made})
        return block

    def _join_loop(self, eqn: Equation, through: Through, made: dict[Value, Block]) -> Block:
        """Put a loop into the block of what it carries, or raise ``DoesNotFit``."""
        if not through.scanned.isdisjoint(made):
            raise DoesNotFit
        homes = {v: made[v] for v in through.operands if v in made}
        if homes and through.sums:
            raise DoesNotFit
        result = eqn.outputs[through.guide]
        spans, entries = row_major(result.sizes), size(result.sizes)
        alike = [v for v in homes if v.sizes == result.sizes and entries > 1]
        if alike:
            guide = max(alike, key=lambda v: homes[v].entries)
            spans, entries = homes[guide].spans[guide], homes[guide].entries
        elif homes and entries == 1:
            entries = max(home.entries for home in homes.values())
        move = moved(through.carries[through.guide], spans)
        placed = {v: tuple(map(move, at)) for v, at in through.operands.items()}
        block = self._merge(result, spans, placed, homes, entries)
        results = {eqn.outputs[i]: tuple(map(move, at)) for i, at in through.carries.items()}
        bounds = _ends(map(move, through.axes))
        block.place(results, bounds=bounds, scanned=through.scanned)
        return block

    def _is_handed_out(self, eqn: Equation, position: int) -> bool:
        """Whether a result is read in other blocks alone.

        What a loop hands out at each step has no place in the frame. A sum by segments that nothing
        takes back has one, but what is computed of it is smaller outside.
        """
        if eqn in self._segments:
            return self._segments[eqn].ends
        if eqn.outputs[position] in self._ends:
            return True
        return eqn in self._loops and position not in self._loops[eqn].carries

    def _fill_frame(
        self, result: Value, dimensions: dict[Value, Sequence[int]], homes: dict[Value, Block]
    ) -> Block:
        """The block of a result that fills the frame, with the operands along its dimensions."""
        spans = row_major(result.sizes)
        placed = {v: broadcast(v.sizes, [spans[i] for i in at]) for v, at in dimensions.items()}
        return self._merge(result, spans, placed, homes, size(result.sizes))

    def _merge(
        self,
        result: Value,
        spans: Spans,
        placed: dict[Value, Spans],
        homes: dict[Value, Block],
        entries: int,
    ) -> Block:
        """One block of those of the operands, in a frame of this many entries."""
        parts: dict[Block, list[Value]] = {}
        for value, home in homes.items():
            parts.setdefault(home, []).append(value)
        moves = {home: _move(home, placed, values, entries) for home, values in parts.items()}
        in_place = [home for home, move in moves.items() if move is None]
        block = max(in_place, key=lambda home: len(home.spans), default=Block(entries))
        others = {home: move or (lambda span: span) for home, move in moves.items()}
        others.pop(block, None)
        block.absorb(others, placed | {result: spans})
        for home in others:
            self._into[home] = block
            self._before.setdefault(block, set()).update(self._before[home])
            self._extend(block, *self._levels[home])
        return block

    def _is_new(self, block: Block) -> bool:
        """Whether a block has a single equation."""
        return len(block.spans) == 2

    def _check_order(self, homes: set[Block], operands: list[Value]) -> None:
        """Raise if a block of these and of an equation with the operands came before itself."""
        if not homes:
            return  # of a new block, nothing is read yet
        lowest = min(self._levels[home][0] for home in homes)
        makers = map(self._made_by, operands)
        ahead: set[Unit] = {unit for unit in makers if unit is not None and unit not in homes}
        if len(homes) > 1:
            ahead.update(*(self._made_before(home) - homes for home in homes))
        seen: set[Unit] = set(homes)
        while ahead:
            unit = ahead.pop()
            seen.add(unit)
            # But for blocks of several levels, what is read is of no higher level.
            if self._levels[unit][-1] >= min(lowest, self._lowest):
                before = self._made_before(unit)
                if not homes.isdisjoint(before):
                    raise ComesBeforeItself
                ahead |= before - seen

    def _made_before(self, unit: Unit) -> set[Unit]:
        return set(map(self._current, self._before[unit])) - {unit}

    def _made_by(self, value: Value) -> Unit | None:
        return self._current(self._maker[value]) if value in self._maker else None

    def _current(self, unit: Unit) -> Unit:
        while unit in self._into:
            unit = self._into[unit]
        return unit


# Blocks that are too long


def _cut(block: Block, runs: list[list[Equation]]) -> Iterator[tuple[Block, list[Equation]]]:
    """A block for each run of its equations, all in one frame."""
    for run in runs:
        part = copy.copy(block)
        part.cut = len(runs) > 1
        yield part, run


def _parts(
    equations: list[Equation], rules: dict[Equation, Any], active: frozenset[Value]
) -> Iterator[list[Equation]]:
    """A block's equations in runs, if more than ``WHOLE`` of its reductions share a source."""
    start = 0
    ends = _run_ends(equations, start, rules, active, WHOLE)
    if ends:
        last = {v: i for i, eqn in enumerate(equations) for v in eqn.inputs}
        while ends := _run_ends(equations, start, rules, active, PART):
            # Where the fewest values go on to the next run, which takes them as independent.
            end = min(reversed(ends), key=functools.partial(_crossing, equations, last, start))
            yield equations[start:end]
            start = end
    yield equations[start:]


def _run_ends(
    equations: list[Equation],
    start: int,
    rules: dict[Equation, Any],
    active: frozenset[Value],
    most: int,
) -> range:
    """Where a run may end before it has more than so many reductions that share a source."""
    origins: dict[Value, int] = {}  # the sources that a value depends on, as bits
    taken: list[tuple[int, int]] = []  # where a reduction is, and its origins
    for i in range(start, len(equations)):
        eqn = equations[i]
        reads = (origins.setdefault(v, 1 << len(origins)) for v in eqn.inputs if v in active)
        origin = functools.reduce(operator.or_, reads)
        if isinstance(rules[eqn], Reduction | Scatter):
            related = [j for j, other in taken if other & origin]
            if len(related) >= most:
                return range(related[most // 2 - 1] + 1, i + 1)
            taken.append((i, origin))
        origins.update(dict.fromkeys(eqn.outputs, origin))
    return range(0)


def _crossing(equations: list[Equation], last: dict[Any, int], start: int, end: int) -> int:
    """How many values of a run are read after it."""
    return sum(last.get(v, 0) >= end for eqn in equations[start:end] for v in eqn.outputs)


def _move(
    home: Block, placed: dict[Value, Spans], values: list[Value], entries: int
) -> Callable[[Span], Span] | None:
    """How a block's frame moves to put its values where they are placed; ``None`` if it stays."""
    stays = all(home.spans[v] == placed[v] for v in values)
    if stays and home.entries == entries:
        return None
    full = next((v for v in values if home.fill(v)), None)
    if full is None:
        raise DoesNotFit
    if stays:
        return None
    move = moved(home.spans[full], placed[full])
    if any(tuple(map(move, home.spans[v])) != placed[v] for v in values):
        raise DoesNotFit
    return move


def moved(old: Spans, new: Spans) -> Callable[[Span], Span]:
    """Where the spans of a frame come to lie if those of a value in it move."""

    def move(span: Span) -> Span:
        parts = []
        for was, at in zip(old, new, strict=True):
            lo, hi = max(span.lo, was.lo), min(span.hi, was.hi)
            if at.by and lo < hi and ((lo, hi) != was[:2] or not at.by.ids.known):
                raise DoesNotFit
            if lo < hi:
                parts.append(at if at.by else Span(at.lo * lo // was.lo, at.lo * hi // was.lo))
        stretches = merged(parts)
        if len(stretches) > 1:
            raise DoesNotFit
        moved = stretches[0] if stretches else NOTHING
        if span.by is None:
            return moved
        if moved.by is not None:
            raise DoesNotFit
        return moved._replace(by=span.by._replace(rest=tuple(map(move, span.by.rest))))

    return move
