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

A loop belongs to a block if its body is one, in which the carries start and end at the same spans,
what is read at every step lies along them, and nothing that a step hands on takes in a sum over
either. What is scanned over enters step by step, and has no place in the frame.
"""

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Equation, Program, Value, dimension, is_inexact, size
from hesscale_jax.rules.control_flow import ControlFlow, scan
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import Join, PiecewiseConstant, Reduction, View

__all__ = ["Block", "Loop", "Plan", "Through", "loop", "moved", "plan"]

Span = tuple[int, int]
Spans = tuple[Span, ...]  # one per dimension of a value

NOTHING: Span = (1, 1)


class DoesNotFit(Exception):
    """An equation cannot join a block; it starts a new one."""


class Block:
    """One function made of pointwise equations, reductions over one set of axes, and views.

    Attributes:
      spans: Where each value that the block reads or makes lies in the frame.
      scanned: What its loops scan over, each only one of them. Nothing else of it reads that.
    """

    def __init__(self, entries: int) -> None:
        self.spans: dict[Value, Spans] = {}
        self.scanned: frozenset[Value] = frozenset()
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

    def along(self, spans: Spans) -> Spans:
        """The axes of the frame that ``spans`` consist of."""
        return tuple(axis for axis in self._axes() if _inside(axis, spans))

    def _axes(self) -> Iterator[Span]:
        return zip(self._bounds, self._bounds[1:], strict=False)

    # Growing a block: everything is checked before anything is changed

    def place(
        self,
        placed: dict[Value, Spans],
        reduced: tuple[Span, ...] | None = None,
        bounds: Iterable[int] = (),
        scanned: frozenset[Value] = frozenset(),
    ) -> None:
        """Add values at their spans, the spans that a reduction runs over, and other bounds.

        Or what a loop scans over.
        """
        if any(self.spans.get(value, spans) != spans for value, spans in placed.items()):
            raise DoesNotFit
        if self.scanned & scanned or not (self.scanned | scanned).isdisjoint(placed):
            raise DoesNotFit
        if not scanned.isdisjoint(self.spans):
            raise DoesNotFit
        if reduced is not None and self._reduced not in (None, reduced):
            raise DoesNotFit
        found = [span for spans in (*placed.values(), reduced or ()) for span in spans]
        self._bounds = _refined(self._bounds, {*bounds, *itertools.chain(*found)})
        self._reduced = self._reduced if reduced is None else reduced
        self.scanned |= scanned
        self.spans.update(placed)
        for value, spans in placed.items():
            self._of_shape.setdefault(value.sizes, {})[spans] = None

    def places(self, shape: tuple[int, ...]) -> Iterable[Spans]:
        """Where the values of a shape lie, the first one's place first."""
        return self._of_shape.get(shape, ())

    def fill(self, value: Value) -> bool:
        """Whether the value has as many entries as the frame."""
        return size(value.sizes) == self.entries

    def absorb(self, other: "Block", move: Callable[[Span], Span]) -> None:
        """Take over another block, each span of whose frame is moved to one of this one's."""
        spans = {v: tuple(map(move, s)) for v, s in other.spans.items()}
        reduced = None if other._reduced is None else merged(map(move, other._reduced))
        bounds = itertools.chain(*map(move, other._axes()))
        self.place(spans, reduced, bounds, other.scanned)


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
      loops: How a block leads through the loops among them.
    """

    active: frozenset[Value]
    rules: dict[Equation, Any]
    blocks: dict[Equation, Block]
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
    found = {eqn: _through(eqn, active, find) for eqn, rule in rules.items() if rule is scan}
    loops = {eqn: through for eqn, through in found.items() if through is not None}
    return Plan(active, rules, _Grouping(active, loops).run(rules), loops)


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
    """

    plan: Plan
    block: Block
    guide: int
    axes: Spans
    operands: dict[Value, Spans]
    carries: dict[int, Spans]
    scanned: frozenset[Value]
    depends: dict[int, frozenset[Value]]
    fed: frozenset[int]


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
    if block is None:
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
    axes = block.along(block.spans[outputs[guide]])
    operands = {x: block.spans[inputs[i]] for i, x in moving.items()}
    if any(operands[x] != block.spans[inputs[i]] for i, x in moving.items()):
        return None
    if any(axis not in axes for v in lying for axis in block.along(block.spans[v])):
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
            i: frozenset(moving[j] for j in (found | {first + i}) & moving.keys())
            for i, found in reach.items()
        },
        fed=frozenset(i for i, found in reach.items() if not found.isdisjoint(xs)),
    )


def _one(steps: Plan) -> Block | None:
    """One block of all of a program's blocks, if all equations on a path are in one."""
    blocks = dict.fromkeys(steps.blocks.get(eqn) for eqn in steps.rules)
    if not blocks or None in blocks:
        return None
    one, *others = sorted(filter(None, blocks), key=lambda block: -block.entries)
    try:
        for other in others:
            if other.entries not in (1, one.entries):
                raise DoesNotFit
            one.absorb(other, lambda span: span)
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


class _Grouping:
    """Walks the equations in program order and puts each into a block, if it belongs in one."""

    def __init__(self, active: frozenset[Value], loops: dict[Equation, Through]) -> None:
        self._active = active
        self._loops = loops
        self._level: dict[Value, int] = {}
        self._home: dict[Value, Block] = {}  # the block that makes a value
        self._into: dict[Block, Block] = {}  # absorbed blocks

    def run(self, rules: dict[Equation, Any]) -> dict[Equation, Block]:
        member = {}
        for eqn, rule in rules.items():
            operands = [v for v in eqn.inputs if v in self._active]
            level = max(self._level.get(v, 0) for v in operands)
            block = None
            if isinstance(rule, Pointwise | Reduction | View | Join) or eqn in self._loops:
                try:
                    block = self._join(eqn, rule, operands, level)
                except DoesNotFit:
                    level += 1
                    if isinstance(rule, Pointwise | Reduction) or eqn in self._loops:
                        block = self._join(eqn, rule, operands, level)
            else:
                level += 1
            outside = [v for i, v in enumerate(eqn.outputs) if self._is_handed_out(eqn, i)]
            for value in eqn.outputs:
                self._level[value] = level + (value in outside and block is not None)
                if block is not None and value not in outside:
                    self._home[value] = block
            if block is not None:
                member[eqn] = block
        return {eqn: self._current(block) for eqn, block in member.items()}

    def _join(self, eqn: Equation, rule: Any, operands: list[Value], level: int) -> Block:
        """Put an equation into the block of its operands, or raise ``DoesNotFit``."""
        if eqn in self._loops:
            return self._join_loop(eqn, self._loops[eqn], level)
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

    def _join_loop(self, eqn: Equation, through: Through, level: int) -> Block:
        """Put a loop into the block of what it carries, or raise ``DoesNotFit``."""
        if any(self._is_made_at(v, level) for v in through.scanned):
            raise DoesNotFit
        made = [v for v in through.operands if self._is_made_at(v, level)]
        homes = {v: self._current(self._home[v]) for v in made}
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
        bounds = itertools.chain(*map(move, through.axes))
        block.place(results, bounds=bounds, scanned=through.scanned)
        return block

    def _is_handed_out(self, eqn: Equation, position: int) -> bool:
        """Whether a result of a loop has no place in the frame: it has one for each step."""
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
        for home, move in moves.items():
            if home is not block:
                block.absorb(home, move or (lambda span: span))
                self._into[home] = block
        block.place(placed | {result: spans})
        return block

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
    move = moved(home.spans[full], placed[full])
    if any(tuple(map(move, home.spans[v])) != placed[v] for v in values):
        raise DoesNotFit
    return move


def moved(old: Spans, new: Spans) -> Callable[[Span], Span]:
    """Where the spans of a frame come to lie if those of a value in it move."""

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

    return move
