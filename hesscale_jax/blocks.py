"""Which equations form a block: pure graph analysis, no arithmetic.

A block is a set of pointwise equations, with the reductions and the changes of view between them
(reshapes, broadcasts, stacks), that is treated as one function: the library is exact inside a block
and drops off-diagonal terms only between blocks. Blocks follow from the program's structure alone:

    level(input) = 0
    level(y) = max level(operands)        y made by a pointwise equation, a reduction or a view
    level(y) = max level(operands) + 1    y made by any other equation, or by one that does not fit

Equations that feed each other at one level are one block. Levels keep a residual stream from
growing into a single block: in ``x + f(x)`` the sum starts anew, because ``f(x)`` is later.

A block has one *frame*, a shape in row-major order in which every value of the block has its place.
A dimension of a value occupies a *span* ``(lo, hi)`` of it: ``lo`` entries of the frame's shape
multiplied before the dimension, ``hi`` with it. A dimension of size 1 occupies nothing, ``(1, 1)``.
So reshapes, reduced values and implicit broadcasts are all read off the spans, and a block is at
odds with itself when two equations put one value at different spans, or when two spans overlap.

What has an entry for each segment of :mod:`hesscale_jax.segments`, instead of one for each id, lies
at the span of the ids ``by`` segments, and a sum by segments is a reduction of that span. A block
has one such span at most.
"""

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax._jaxpr import Body, Equation, Program, Value, dimension, is_inexact, size
from hesscale_jax.along import Along
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import (
    Join,
    PiecewiseConstant,
    Reduction,
    Scatter,
    Take,
    View,
)
from hesscale_jax.segments import Ids, Segmented, segmented

__all__ = ["Block", "Loop", "Plan", "loop", "plan"]


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


class DoesNotFit(Exception):
    """An equation cannot join a block; it starts a new one."""


class Block:
    """One function made of pointwise equations, reductions over one set of axes, and views.

    Attributes:
      spans: Where each value that the block reads or makes lies in the frame.
    """

    def __init__(self, entries: int) -> None:
        self.spans: dict[Value, Spans] = {}
        self._of_shape: dict[tuple[int, ...], dict[Spans, None]] = {}
        self._reduced: tuple[Span, ...] | None = None
        self._segments: Span | None = None
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

    def view(self, spans: Spans) -> tuple[int, ...]:
        """The shape in the frame of an array whose dimensions lie at ``spans``."""
        return tuple(
            dimension(axis.hi // axis.lo) if _inside(axis, spans) else 1 for axis in self._axes()
        )

    def _axes(self) -> Iterator[Span]:
        return map(Span, self._bounds, self._bounds[1:])

    # Growing a block: everything is checked before anything is changed

    def place(
        self,
        placed: dict[Value, Spans],
        reduced: tuple[Span, ...] | None = None,
        bounds: Iterable[int] = (),
    ) -> None:
        """Add values at their spans, the spans that a reduction runs over, and other bounds."""
        if any(self.spans.get(value, spans) != spans for value, spans in placed.items()):
            raise DoesNotFit
        if reduced is not None and self._reduced not in (None, reduced):
            raise DoesNotFit
        found = [span for spans in (*placed.values(), reduced or ()) for span in spans]
        reduced = self._reduced if reduced is None else reduced
        segments = self._one_by_segments(found, reduced)
        refined = _refined(self._bounds, {*bounds, *_ends(found)})
        if segments is not None and any(segments.lo < b < segments.hi for b in refined):
            raise DoesNotFit
        self._bounds, self._reduced, self._segments = refined, reduced, segments
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

    def absorb(self, other: "Block", move: Callable[[Span], Span]) -> None:
        """Take over another block, each span of whose frame is moved to one of this one's."""
        spans = {v: tuple(map(move, s)) for v, s in other.spans.items()}
        reduced = None if other._reduced is None else merged(map(move, other._reduced))
        self.place(spans, reduced, _ends(map(move, other._axes())))


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
    """

    active: frozenset[Value]
    rules: dict[Equation, Any]
    blocks: dict[Equation, Block]
    segments: dict[Equation, Segmented]


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
    return Plan(active, rules, _Grouping(active, segments).run(rules), segments)


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


class _Grouping:
    """Walks the equations in program order and puts each into a block, if it belongs in one."""

    def __init__(self, active: frozenset[Value], segments: dict[Equation, Segmented]) -> None:
        self._active = active
        self._segments = segments
        self._level: dict[Value, int] = {}
        self._home: dict[Value, Block] = {}  # the block that makes a value
        self._into: dict[Block, Block] = {}  # absorbed blocks
        self._waiting: set[Value] = set()  # taken by ids, alone in a block that nothing reads yet

    def run(self, rules: dict[Equation, Any]) -> dict[Equation, Block]:
        member = {}
        for eqn, rule in rules.items():
            operands = [v for v in eqn.inputs if v in self._active]
            level = max(self._level.get(v, 0) for v in operands)
            block = None
            if isinstance(rule, Pointwise | Reduction | View | Join) or eqn in self._segments:
                for value in self._waiting.intersection(operands):
                    self._waiting.remove(value)
                    self._level[value] = level
                try:
                    block = self._join(eqn, rule, operands, level)
                except DoesNotFit:
                    level += 1
                    if not isinstance(rule, View | Join):
                        block = self._join(eqn, rule, operands, level)
            else:
                level += 1
            ends = eqn in self._segments and self._segments[eqn].ends
            for value in eqn.outputs:
                self._level[value] = level + ends
                if block is not None:
                    self._home[value] = block
            if block is not None:
                member[eqn] = block
                if isinstance(rule, Take) and self._is_new(block):
                    self._waiting.update(eqn.outputs)
        return {eqn: self._current(block) for eqn, block in member.items()}

    def _join(self, eqn: Equation, rule: Any, operands: list[Value], level: int) -> Block:
        """Put an equation into the block of its operands, or raise ``DoesNotFit``."""
        homes = {v: self._current(self._home[v]) for v in operands if self._is_made_at(v, level)}
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
        for home, move in moves.items():
            if home is not block:
                block.absorb(home, move or (lambda span: span))
                self._into[home] = block
        block.place(placed | {result: spans})
        return block

    def _is_new(self, block: Block) -> bool:
        """Whether a block has a single equation."""
        return len(block.spans) == 2

    def _is_made_at(self, value: Value, level: int) -> bool:
        return value in self._home and self._level[value] == level

    def _current(self, block: Block) -> Block:
        while block in self._into:
            block = self._into[block]
        return block


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
    old, new = home.spans[full], placed[full]

    def move(span: Span) -> Span:
        parts = [
            Span(at.lo * max(span.lo, was.lo) // was.lo, at.lo * min(span.hi, was.hi) // was.lo)
            for was, at in zip(old, new, strict=True)
            if max(span.lo, was.lo) < min(span.hi, was.hi)
        ]
        stretches = merged(parts)
        if len(stretches) > 1:
            raise DoesNotFit
        moved = stretches[0] if stretches else NOTHING
        if span.by is None:
            return moved
        return moved._replace(by=span.by._replace(rest=tuple(map(move, span.by.rest))))

    if any(tuple(map(move, home.spans[v])) != placed[v] for v in values):
        raise DoesNotFit
    return move
