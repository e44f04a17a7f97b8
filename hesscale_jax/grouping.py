"""Which equations form a block: pure graph analysis, no arithmetic.

Blocks follow from the program's structure alone:

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
"""

import contextlib
import copy
import functools
import operator
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from hesscale_jax._jaxpr import Equation, Value, size
from hesscale_jax.blocks import (
    Block,
    ComesBeforeItself,
    DoesNotFit,
    Span,
    Spans,
    Through,
    broadcast,
    broadcast_like,
    by_segments,
    ends_of,
    merged,
    moved,
    reshaped,
    row_major,
)
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import Join, Reduction, Scatter, Selection, Take, View
from hesscale_jax.segments import Segmented

__all__ = ["Grouping", "is_affine"]


# The covariance of each pair of a block's reductions is written out. A block of more reductions
# that share a source than WHOLE is cut to parts of no more than PART.
WHOLE, PART = 8, 3


def _broadcast_dimensions(eqn: Equation, segments: Segmented | None) -> Sequence[int] | None:
    """The dimensions of the result of a broadcast, as that from a single segment is."""
    if eqn.name == "broadcast_in_dim":
        return tuple(eqn.params["broadcast_dimensions"])
    if eqn.name == "gather" and segments is not None and segments.ids.segments == 1:
        return range(len(eqn.outputs[0].shape))
    return None


Unit = Block | Equation


def is_affine(eqn: Equation, rule: Any, active: Container[Value]) -> bool:
    """Whether an equation is affine, entry by entry, in its operands on a path."""
    positions = [i for i, v in enumerate(eqn.inputs) if v in active]
    return isinstance(rule, View) or (isinstance(rule, Pointwise) and rule.affine(positions))


class Grouping:
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
        """The block of each equation that is in one."""
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
        bounds = ends_of(map(move, through.axes))
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
