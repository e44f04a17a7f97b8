"""Blocks: sets of equations that are treated as one function, and where their values lie.

A block is a set of pointwise equations, with the reductions and the changes of view between them
(reshapes, broadcasts, stacks), that is treated as one function: the library is exact inside a block
and drops off-diagonal terms only between blocks. :mod:`hesscale_jax.grouping` says which they are.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax._jaxpr import Equation, Value, dimension, size
from hesscale_jax.along import Along
from hesscale_jax.segments import Ids, Segmented

__all__ = [
    "Block",
    "ComesBeforeItself",
    "DoesNotFit",
    "Plan",
    "Span",
    "Spans",
    "Through",
    "broadcast",
    "broadcast_like",
    "by_segments",
    "ends_of",
    "merged",
    "moved",
    "reshaped",
    "row_major",
]


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
        refined = _refined(self._bounds, {*bounds, *ends_of(found)})
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
            bounds.update(ends_of(map(move, other._axes())))
            if other._loops:
                if scanned is not None and not scanned.isdisjoint(other.scanned):
                    raise DoesNotFit
                scanned = other.scanned.union(scanned or ())
        self.place(placed, reduced, bounds, scanned)


def ends_of(spans: Iterable[Span]) -> Iterator[int]:
    """Where spans start and stop."""
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
