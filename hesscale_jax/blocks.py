"""Which equations form a block: pure graph analysis, no arithmetic.

A block is a set of pointwise equations, with the reductions and the changes of view between them
(reshapes, broadcasts, stacks), that is treated as one function: the library is exact inside a block
and drops off-diagonal terms only between blocks. Blocks follow from the program's structure alone:

    level(input) = 0
    level(y) = max level(operands)        y made by a pointwise equation, a reduction or a view
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
"""

import copy
import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax._jaxpr import Body, Equation, Program, Value, dimension, is_inexact, size
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import Join, PiecewiseConstant, Reduction, View

__all__ = ["Block", "Loop", "Plan", "loop", "plan"]

Span = tuple[int, int]
Spans = tuple[Span, ...]  # one per dimension of a value

NOTHING: Span = (1, 1)

# The covariance of each pair of a block's reductions is written out. A block of more reductions
# that share a source than WHOLE is cut to parts of no more than PART.
WHOLE, PART = 8, 3


class DoesNotFit(Exception):
    """An equation cannot join a block; it starts a new one."""


class Block:
    """One function made of pointwise equations, reductions over one set of axes, and views.

    Attributes:
      spans: Where each value that the block reads or makes lies in the frame.
      cut: Whether it is part of what would be one block, but for its length.
    """

    cut = False

    def __init__(self, entries: int) -> None:
        self.spans: dict[Value, Spans] = {}
        self._of_shape: dict[tuple[int, ...], dict[Spans, None]] = {}
        self._reduced: tuple[Span, ...] | None = None
        self._bounds = sorted({1, entries})

    @property
    def entries(self) -> int:
        """The number of entries of the frame."""
        return self._bounds[-1]

    # Read off a finished block

    @property
    def frame(self) -> tuple[int, ...]:
        """The sizes of the frame's axes: the coarsest shape that every value is a view of."""
        return tuple(dimension(hi // lo) for lo, hi in self._axes())

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of the frame that the block's reductions run over."""
        return tuple(i for i, axis in enumerate(self._axes()) if _inside(axis, self._reduced or ()))

    def view(self, spans: Spans) -> tuple[int, ...]:
        """The shape in the frame of an array whose dimensions lie at ``spans``."""
        return tuple(
            dimension(hi // lo) if _inside((lo, hi), spans) else 1 for lo, hi in self._axes()
        )

    def _axes(self) -> Iterator[Span]:
        return zip(self._bounds, self._bounds[1:], strict=False)

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
        self._bounds = _refined(self._bounds, {*bounds, *itertools.chain(*found)})
        self._reduced = self._reduced if reduced is None else reduced
        self.spans.update(placed)
        for value, spans in placed.items():
            self._of_shape.setdefault(value.sizes, {})[spans] = None

    def places(self, shape: tuple[int, ...]) -> Iterable[Spans]:
        """Where the values of a shape lie, the first one's place first."""
        return self._of_shape.get(shape, ())

    def fill(self, value: Value) -> bool:
        """Whether the value has as many entries as the frame."""
        return size(value.sizes) == self.entries

    def leaves_clean(self, value: Value) -> bool:
        """Whether the reductions so far run over groups of which a value has one entry each."""
        return not any(
            max(lo, start) < min(hi, end)
            for lo, hi in self.spans[value]
            for start, end in self._reduced or ()
        )

    def absorb(
        self, others: dict["Block", Callable[[Span], Span]], placed: dict[Value, Spans]
    ) -> None:
        """Take over blocks, each span of whose frames is moved to one of this one's, and values."""
        placed, reduced, bounds = dict(placed), self._reduced, set[int]()
        for other, move in others.items():
            for value, spans in other.spans.items():
                moved = tuple(map(move, spans))
                if placed.setdefault(value, moved) != moved:
                    raise DoesNotFit
            if other._reduced is not None:
                found = merged(map(move, other._reduced))
                if reduced not in (None, found):
                    raise DoesNotFit
                reduced = found
            bounds.update(itertools.chain(*map(move, other._axes())))
        self.place(placed, reduced, bounds)


def _inside(axis: Span, spans: Iterable[Span]) -> bool:
    return any(lo <= axis[0] and axis[1] <= hi for lo, hi in spans)


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
        spans.append((lo, lo * n) if n > 1 else NOTHING)
        lo *= n
    return tuple(spans)


def broadcast(shape: tuple[int, ...], spans: Sequence[Span]) -> Spans:
    """The spans of an operand of this shape, entry by entry with a result at ``spans``."""
    return tuple(s if n > 1 else NOTHING for n, s in zip(shape, spans, strict=False))


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Adjacent spans as one, in order."""
    stretches: list[Span] = []
    for lo, hi in sorted(s for s in spans if s != NOTHING):
        if stretches and stretches[-1][1] == lo:
            stretches[-1] = (stretches[-1][0], hi)
        else:
            stretches.append((lo, hi))
    return tuple(stretches)


def reshaped(spans: Iterable[Span], shape: tuple[int, ...]) -> Spans:
    """The spans after a reshape: each new dimension takes the next part of what was occupied."""
    stretches = list(merged(spans))
    result = []
    for n in shape:
        if n == 1:
            result.append(NOTHING)
            continue
        lo, hi = stretches.pop(0)
        if (hi // lo) % n:
            raise DoesNotFit
        result.append((lo, lo * n))
        if lo * n < hi:
            stretches.insert(0, (lo * n, hi))
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
        lo, hi = kept.get(i, (behind, behind * n)) if n > 1 else NOTHING
        if n > 1 and lo < behind:
            raise DoesNotFit
        behind = max(behind, hi)
        result.append((lo, hi))
    return tuple(result)


# The analysis of a program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the interpreter needs to know about a program.

    Attributes:
      active: Values on a differentiable path from an active input to an output.
      rules: The rule of each equation on such a path.
      blocks: The block of each equation that is in one.
    """

    active: frozenset[Value]
    rules: dict[Equation, Any]
    blocks: dict[Equation, Block]


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
    return Plan(active, rules, _Grouping(active).run(rules))


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


Unit = Block | Equation


class _Grouping:
    """Walks the equations in program order and puts each into a block, if it belongs in one.

    A *unit* is a block, or an equation in none. No unit may come before itself.
    """

    def __init__(self, active: frozenset[Value]) -> None:
        self._active = active
        self._level: dict[Value, int] = {}
        self._maker: dict[Value, Unit] = {}
        self._reducing: set[Value] = set()  # values that depend on a reduction in their block
        self._into: dict[Unit, Block] = {}  # absorbed blocks
        self._before: dict[Unit, set[Unit]] = {}  # what made the values that a unit reads
        self._levels: dict[Unit, tuple[int, int]] = {}  # the lowest and the highest of its values
        self._lowest = sys.maxsize  # the lowest level in a block that has several

    def run(self, rules: dict[Equation, Any]) -> dict[Equation, Block]:
        for eqn, rule in rules.items():
            operands = [v for v in eqn.inputs if v in self._active]
            level = max(self._level.get(v, 0) for v in operands)
            block = None
            if isinstance(rule, Pointwise | Reduction | View | Join):
                block = self._joined(eqn, rule, operands, level)
                if block is None:
                    level += 1
                    if isinstance(rule, Pointwise | Reduction):
                        block = self._join(eqn, rule, operands, {})
            else:
                level += 1
            self._add(eqn, rule, operands, block or eqn, level)
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

    def _add(self, eqn: Equation, rule: Any, operands: list[Value], unit: Unit, level: int) -> None:
        """Take note of an equation in its unit."""
        makers = {v: self._made_by(v) for v in operands}
        before = {maker for maker in makers.values() if maker is not None} - {unit}
        self._before.setdefault(unit, set()).update(before)
        self._extend(unit, level, level)
        if isinstance(rule, Reduction) or any(
            v in self._reducing and makers[v] is unit for v in operands
        ):
            self._reducing.update(eqn.outputs)
        for value in eqn.outputs:
            self._level[value] = level
            self._maker[value] = unit

    def _extend(self, unit: Unit, low: int, high: int) -> None:
        """Let a unit have values of these levels too."""
        known = self._levels.get(unit, (low, high))
        self._levels[unit] = low, high = min(known[0], low), max(known[1], high)
        if low < high:
            self._lowest = min(self._lowest, low)

    def _joined(self, eqn: Equation, rule: Any, operands: list[Value], level: int) -> Block | None:
        """The block that an equation joins, one of the same level first."""
        made = {v: b for v in operands if isinstance(b := self._made_by(v), Block)}
        here = {v: block for v, block in made.items() if self._level[v] == level}
        # Whose entries share sources, by way of a reduction: cut off there, terms would be lost.
        bound = {v: b for v, b in made.items() if v in self._reducing and not b.leaves_clean(v)}
        choices = [here | bound, bound, here] if isinstance(rule, Pointwise) and bound else [here]
        for i, homes in enumerate(choices):
            if homes not in choices[:i]:
                try:
                    return self._join(eqn, rule, operands, homes)
                except DoesNotFit:
                    continue
        return None

    def _join(
        self, eqn: Equation, rule: Any, operands: list[Value], homes: dict[Value, Block]
    ) -> Block:
        """Put an equation into one block with those of some operands, or raise ``DoesNotFit``."""
        self._check_order(set(homes.values()), operands)
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
        if eqn.name == "broadcast_in_dim" and block.entries == size(operand.sizes):
            dimensions = eqn.params["broadcast_dimensions"]
            return self._fill_frame(result, {operand: dimensions}, homes)
        spans = block.spans.get(operand, row_major(operand.sizes))
        reduced = None
        if isinstance(rule, Reduction):
            axes = rule.axes(eqn)
            reduced = merged(spans[i] for i in axes) or None
            made = reshaped((s for i, s in enumerate(spans) if i not in axes), result.sizes)
        elif eqn.name == "broadcast_in_dim":
            made = broadcast_like(block, spans, operand, result, eqn.params["broadcast_dimensions"])
        else:
            made = reshaped(spans, result.sizes)
        block.place({operand: spans, result: made}, reduced)
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
        others = {home: move or (lambda span: span) for home, move in moves.items()}
        others.pop(block, None)
        block.absorb(others, placed | {result: spans})
        for home in others:
            self._into[home] = block
            self._before.setdefault(block, set()).update(self._before[home])
            self._extend(block, *self._levels[home])
        return block

    def _check_order(self, homes: set[Block], operands: list[Value]) -> None:
        """Raise if a block of these and of an equation with the operands came before itself."""
        lowest = min((self._levels[home][0] for home in homes), default=0)
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
                    raise DoesNotFit
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
    ends = _ends(equations, start, rules, active, WHOLE)
    if ends:
        last = {v: i for i, eqn in enumerate(equations) for v in eqn.inputs}
        while ends := _ends(equations, start, rules, active, PART):
            # Where the fewest values go on to the next run, which takes them as independent.
            end = min(reversed(ends), key=functools.partial(_crossing, equations, last, start))
            yield equations[start:end]
            start = end
    yield equations[start:]


def _ends(
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
        if isinstance(rules[eqn], Reduction):
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
    old, new = home.spans[full], placed[full]

    def move(span: Span) -> Span:
        parts = [
            (to * max(span[0], lo) // lo, to * min(span[1], hi) // lo)
            for (lo, hi), (to, _) in zip(old, new, strict=True)
            if max(span[0], lo) < min(span[1], hi)
        ]
        stretches = merged(parts)
        if len(stretches) > 1:
            raise DoesNotFit
        return stretches[0] if stretches else NOTHING

    if any(tuple(map(move, home.spans[v])) != placed[v] for v in values):
        raise DoesNotFit
    return move
