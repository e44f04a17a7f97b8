"""Loops within a block: what they carry besides primals and shifts, so that the block is exact.

What is carried depends, entry by entry, on the operands ``x`` that lie along it: where it starts
from, and what is read at every step. What is scanned over adds a rest, independent of them:

    c_i = sum_x D_ix x + r_i          D_ix = dc_i/dx at its own position

A step is handed the slopes ``D_ix`` and the covariances ``cov(r_i, r_k)``, so that it knows those
of all that it reads, and hands on the next ones. What comes out of the loop is to the block around
it as any other value. All this takes the same equations for any number of steps.
"""

import itertools
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Value
from hesscale_jax.blocks import Spans, Through, moved
from hesscale_jax.pointwise import BlockArithmetic

__all__ = ["Carried", "LoopArithmetic"]


class Carried(NamedTuple):
    """What a step hands to the next, in the frame of the body's block."""

    slopes: list[Any]  # D_ix
    rests: list[Any]  # cov(r_i, r_k)


class LoopArithmetic:
    """One loop, between the block around it and the block of its body.

    From one to the other, arrays have the axes along which the largest carry lies in the body's
    frame, some of them of size 1.

    Attributes:
      handed_on: The results of a step that are carried.
    """

    def __init__(self, eqn: Equation, through: Through, around: BlockArithmetic) -> None:
        (body,) = eqn.bodies
        _, carry, _ = _jaxpr.scan_groups(eqn)
        inputs = body.program.inputs
        self.handed_on = body.program.outputs[: len(carry)]
        self._through, self._around = through, around
        self._starts, self._ends = [eqn.inputs[i] for i in carry], eqn.outputs[: len(carry)]
        self._carries = [inputs[i] for i in carry]
        self._constants = list(zip(inputs[: carry.start], eqn.inputs, strict=False))
        self._slopes = [(i, x) for i, xs in through.depends.items() for x in xs]
        self._rests = list(itertools.combinations_with_replacement(sorted(through.fed), 2))
        guide = through.guide
        move = moved(through.carries[guide], around.block.spans[self._ends[guide]])
        self._outside = tuple(map(move, through.axes))
        self._frame = BlockArithmetic(through.block, {}, lambda value: None, around.reader_in)
        self._covariances = {}
        for x, y in itertools.combinations_with_replacement(through.operands, 2):
            axes = self._axes(through.operands[x], through.operands[y])
            covariance = around.leave_along(around.covariance(x, y), self._outside, axes)
            if covariance is not None:
                self._covariances[x, y] = self._frame.enter(covariance, through.axes)

    def start(self) -> Carried:
        """What the first step is handed."""
        return Carried(
            [self._full(1.0 if self._starts[i] is x else 0.0, i) for i, x in self._slopes],
            [self._full(0.0, i, k) for i, k in self._rests],
        )

    def enter(self, carried: Carried, step: BlockArithmetic) -> list[Value]:
        """Tell the block of a step what it reads; returns the values that it knows then."""
        rests = zip(self._rests, carried.rests, strict=True)
        step.take_in(self._covariances)
        step.take_in({(self._carries[i], self._carries[k]): c for (i, k), c in rests})
        known = {v: {x: 1.0} for v, x in self._constants}
        fed = self._through.fed
        known.update((v, {v: 1.0} if i in fed else {}) for i, v in enumerate(self._carries))
        for (i, x), slope in zip(self._slopes, carried.slopes, strict=True):
            known[self._carries[i]][x] = slope
        read = [v for v in known if v in self._through.plan.active]
        for value in read:
            lying = self._through.operands | {value: step.block.spans[value]}
            step.define(value, known[value], lying)
        return read

    def leave(self, step: BlockArithmetic) -> Carried:
        """What a step hands on."""
        values = {i: self.handed_on[i] for i in self._through.carries}
        split = step.split(list(values.values()), self._through.operands)
        parts = dict(zip(values, split, strict=True))
        return Carried(
            [self._full(parts[i].slopes.get(x), i) for i, x in self._slopes],
            [
                self._full(step.covariance(parts[i].rest, parts[k].rest), i, k)
                for i, k in self._rests
            ],
        )

    def finish(self, carried: Carried) -> None:
        """Tell the block around the loop what comes out of it."""
        rests = {i: Value(self._ends[i].aval) for i in self._through.fed}
        for (i, k), covariance in zip(self._rests, carried.rests, strict=True):
            self._around.take_in({(rests[i], rests[k]): self._left(covariance, i, k)})
        for i in self._through.carries:
            slopes = zip(self._slopes, carried.slopes, strict=True)
            derivatives: dict[Any, Any] = {x: self._left(d, i) for (k, x), d in slopes if k == i}
            self._around.derive(self._ends[i], derivatives, rests.get(i))

    def _full(self, x: Any, *carries: int) -> Any:
        """A coefficient or a covariance at every position of these carries, in the body's frame."""
        spans = itertools.chain(*(self._through.carries[i] for i in carries))
        return self._frame.full(x, tuple(spans))

    def _left(self, x: Any, *carries: int) -> Any:
        """The same taken to the frame of the block around."""
        axes = self._axes(*(self._through.carries[i] for i in carries))
        x = self._frame.leave_along(x, self._through.axes, axes)
        return self._around.enter(x, self._outside)

    def _axes(self, *values: Spans) -> list[int]:
        """Along which of the axes the values lie."""
        along = self._frame.block.axes_along(tuple(itertools.chain(*values)))
        return [i for i, axis in enumerate(self._through.axes) if axis in along]
