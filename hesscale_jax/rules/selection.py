"""Primitives whose Jacobian holds only zeros and ones: they move entries, or add them up.

dy = J dx,   vy = J vx          since J*J = J

Some hold a -1, or shares of 1 where entries tie for an extremum: they differ in ``J*J`` alone.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import Pointwise, share, widened
from hesscale_jax.rules.table import ByEquation, PiecewiseConstant

__all__ = [
    "Join",
    "PiecewiseConstant",
    "Reduction",
    "Scatter",
    "Selection",
    "Take",
    "View",
    "concatenate",
    "constant",
    "gather",
    "join",
    "scatter_add",
    "selection",
    "view",
]


class Selection:
    """``dy = J dx, vy = J vx``: the primitive's own ``jvp`` along the shift and the spread.

    At ties (sort, window maxima) the entry that ``jax.grad`` picks is picked.
    """

    def __call__(self, eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        """The moments of the results."""
        primals = [x.primal for x in operands]
        results, shifts = jvp(eqn, primals, [x.shift for x in operands])
        wide = list(map(widened, primals))
        spreads = self.spreads(in_wide_dtype(eqn), wide, [x.spread for x in operands])
        return list(map(Moments, results, shifts, spreads))

    def spreads(self, eqn: Equation, primals: Sequence[Any], spreads: Sequence[Any]) -> list[Any]:
        """``vy = J vx``, all in the dtype of spreads."""
        return push(eqn, primals, spreads)


class Take(Selection):
    """``y_k = x_id(k)``: with a sum by the same ids, it may stand in a block."""


class Scatter(Selection):
    """``dy = J dx, vy = J vx``; with what takes it back by the same ids, a reduction in a block.

    There ``y_j = x_j + sum_{id(k) = j} c_k u_k``.
    """

    def weights(self, eqn: Equation, primals: Sequence[Any], y: Any) -> Any:
        """``c``, in the updates' shape, or a number: of those that are not dropped."""
        return 1.0


class ScatterSub(Scatter):
    """``dy = dx - J du, vy = vx + J vu``: the updates' entries of the Jacobian are 0 and -1."""

    def weights(self, eqn: Equation, primals: Sequence[Any], y: Any) -> Any:
        """``c = -1``."""
        return -1.0

    def spreads(self, eqn: Equation, primals: Sequence[Any], spreads: Sequence[Any]) -> list[Any]:
        """``vy = vx + J vu``."""
        x, indices, _ = primals
        vx, _, vu = spreads
        if vu is None:
            return [vx]
        return [_scatter_add(eqn, lax.full_like(x, 0) if vx is None else vx, indices, vu)]


class ScatterExtremum(Scatter):
    """``vy = J vx / n`` where ``n`` entries tie: they share the derivative, as in JAX."""

    def weights(self, eqn: Equation, primals: Sequence[Any], y: Any) -> Any:
        """``c = 1 / n`` for those that tie, else 0."""
        n, ties, taken = self._ties(eqn, primals, y)
        return ties * taken(1 / jnp.maximum(n, 1))

    def spreads(self, eqn: Equation, primals: Sequence[Any], spreads: Sequence[Any]) -> list[Any]:
        """``vy = J vx / n``."""
        n, _, _ = self._ties(eqn, primals, _jaxpr.bind(eqn, *primals))
        return [v if v is None else v / jnp.maximum(n, 1) for v in push(eqn, primals, spreads)]

    def _ties(self, eqn: Equation, primals: Sequence[Any], y: Any) -> tuple[Any, Any, Any]:
        """How many tie for each entry of the result, which updates do, and what each would be."""
        x, indices, u = primals

        def added(u: Any) -> Any:
            return _scatter_add(eqn, lax.full_like(x, 0), indices, u)

        def taken(y: Any) -> Any:
            return jax.linear_transpose(added, u)(y)[0]

        ties = (u == taken(y)).astype(x.dtype)
        return (x == y).astype(x.dtype) + added(ties), ties, taken


class CumulativeExtremum(Selection):
    """``vy = (J*J) vx``, where two entries that tie for the extremum take one half each."""

    def spreads(self, eqn: Equation, primals: Sequence[Any], spreads: Sequence[Any]) -> list[Any]:
        """``vy = (J*J) vx``."""
        largest = lax.max if eqn.name == "cummax" else lax.min
        precedes = operator.gt if eqn.name == "cummax" else operator.lt
        ((x,), (v,)) = primals, spreads
        weight = functools.partial(_share_squared, precedes)
        return [None if v is None else weighted_scan(eqn, x, v, largest, weight)]


class View(Selection):
    """A selection that only renames positions (reshape, broadcast): it may stand in a block."""


@dataclasses.dataclass(frozen=True)
class Reduction(Selection):
    """``s = sum_k c_k u_k`` along axes of the first operand: always part of a block.

    Attributes:
      weights: ``(eqn, primals, result) -> c``, in the operand's shape, or 1.0 for a plain sum.
      axes: The axes that an equation reduces.
    """

    weights: Callable[[Equation, Sequence[Any], Any], Any]
    axes: Callable[[Equation], Sequence[int]] = lambda eqn: eqn.params["axes"]


class Join(Selection):
    """Arrays side by side along an axis on which each is one wide (``jnp.stack``).

    ``y = sum_i [index on the axis = i] x_i``: inside a block it is pointwise.
    """

    inside = Pointwise(
        lambda eqn, y, operands, positions: _side_by_side(eqn, positions), own_jvp=True
    )

    def dimensions(self, eqn: Equation) -> Sequence[int]:
        """The dimensions of the result along which those of an operand run."""
        rank = len(eqn.outputs[0].shape)
        stacked = len(eqn.inputs[0].shape) < rank
        return [i for i in range(rank) if not (stacked and i == _joined_axis(eqn))]


def _joined_axis(eqn: Equation) -> int:
    return eqn.params["axis" if eqn.name == "stack" else "dimension"]


def _side_by_side(eqn: Equation, positions: Sequence[int]) -> Any:
    """Which entries of the result come from which operand: derivatives of 1 or 0."""
    shape = [1] * len(eqn.outputs[0].shape)
    shape[_joined_axis(eqn)] = count = len(eqn.inputs)
    return {i: (np.arange(count) == i).reshape(shape) for i in positions}, {}


def _concatenate(eqn: Equation, find: Any) -> Selection:
    """Arrays of one entry each side by side are a stack, others a selection."""
    one_wide = all(v.shape[_joined_axis(eqn)] == 1 for v in eqn.inputs)
    return join if one_wide else selection


def weighted_scan(
    eqn: Equation,
    x: Any,
    v: Any,
    combine: Callable[[Any, Any], Any],
    weight: Callable[[Any, Any, Any], Any],
) -> Any:
    """``sum_i W_ki v_i`` beside a running combination ``y = f(a, b)`` of the entries of ``x``.

    ``W_ki`` is the product of ``weight(a, b, y)`` along the one path from entry i to result k: the
    Jacobian for the slope ``f_a``, its square for ``f_a^2``.
    """

    def combined(left: Any, right: Any) -> Any:
        (a, va), (b, vb) = left, right
        y = combine(a, b)
        return y, weight(a, b, y) * va + weight(b, a, y) * vb

    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    return lax.associative_scan(combined, (x, v), reverse, axis)[1]


REDUCERS = {
    "scatter-add": lax.add,
    "scatter-max": lax.max,
    "scatter-min": lax.min,
    "scatter-mul": lax.mul,
}


def in_wide_dtype(eqn: Equation) -> Equation:
    """The equation for operands in the dtype of their spreads: a scatter's reducer has a dtype."""
    wide = spread_dtype(eqn.outputs[0].dtype)
    if eqn.name not in REDUCERS or eqn.outputs[0].dtype == wide:
        return eqn
    scalar = jax.ShapeDtypeStruct((), wide)
    reducer = _jaxpr.trace(REDUCERS[eqn.name], scalar, scalar).jaxpr
    return dataclasses.replace(eqn, params=eqn.params | {"update_jaxpr": reducer})


def _scatter_add(eqn: Equation, x: Any, indices: Any, updates: Any) -> Any:
    """The updates added where another scatter puts them."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    return lax.scatter_add(x, indices, updates, **{name: eqn.params[name] for name in names})


def push(eqn: Equation, primals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The primitive's derivative along the tangents that are not ``None``, one per output."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    return jvp(eqn, primals, tangents)[1] if moving else [None] * len(eqn.outputs)


def jvp(
    eqn: Equation, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The equation's results, run once, and its derivative as of :func:`push`."""
    moving = [i for i, t in enumerate(tangents) if t is not None]
    if not moving:
        return _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn), [None] * len(eqn.outputs)
    if rule := ad.primitive_jvps.get(eqn.primitive):
        # What jax.jvp calls, which takes several times as long to trace.
        results, pushed = rule(
            tuple(primals), tuple(map(_tangent, primals, tangents)), **eqn.params
        )
        if not eqn.primitive.multiple_results:
            results, pushed = [results], [pushed]
        pushed = map(ad.instantiate_zeros, pushed)
    else:
        fun = _jaxpr.along(eqn, primals, moving)
        try:
            both = jax.jvp(fun, [primals[i] for i in moving], [tangents[i] for i in moving])
        except jax.errors.UnexpectedTracerError as error:
            reason = "its derivative rule holds a value of another trace of JAX"
            where = _jaxpr.label(eqn), _jaxpr.location(eqn)
            raise UnsupportedPrimitiveError(*where, reason) from error
        results, pushed = (_jaxpr.listed(x, eqn) for x in both)
    moves = list(map(_jaxpr.is_inexact, eqn.outputs))
    if eqn.name == "custom_jvp_call" and len(eqn.inputs) > 1:
        # The derivative of a result that stays is zeros, an array like others to JAX: along one
        # that is known, it does not differentiate a custom_vjp function.
        moved = _jaxpr.moved_results(eqn, moving)
        moves = [a and b for a, b in zip(moves, moved, strict=True)]
    return list(results), [t if m else None for t, m in zip(pushed, moves, strict=True)]


def _tangent(primal: Any, tangent: Any) -> Any:
    return ad.Zero(jax.typeof(primal).to_tangent_aval()) if tangent is None else tangent


def _share_squared(precedes: Callable[[Any, Any], Any], a: Any, b: Any, y: Any) -> Any:
    return share(a, b, y, precedes) ** 2


def _largest(eqn: Equation, primals: Sequence[Any], y: Any) -> Any:
    """The extremum's one-hot; tied entries share the derivative evenly, as in JAX."""
    (x,), axes = primals, eqn.params["axes"]
    taken = (x == jnp.expand_dims(y, axes)).astype(x.dtype)
    return taken / taken.sum(axes, keepdims=True)


def _picked(eqn: Equation, primals: Sequence[Any], y: Any) -> Any:
    """The one-hot of the entries that a gather picks; none is picked by an index out of bounds."""
    x, indices = primals
    (axis,) = _picked_axis(eqn)
    paired = _paired(eqn)
    single = [i for i in range(indices.ndim) if i not in paired]
    index = lax.squeeze(indices, single)
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, x.shape[axis] - 1)
    along = [paired[i] for i in range(indices.ndim) if i in paired]
    index = lax.broadcast_in_dim(index, x.shape, along)
    # Small integers do not count up to any size.
    dtype = index.dtype if index.dtype.itemsize >= 4 else np.dtype("int32")
    positions = lax.broadcasted_iota(dtype, x.shape, axis)
    return lax.eq(positions, lax.convert_element_type(index, dtype))


def _paired(eqn: Equation) -> dict[int, int]:
    """The axis of a gather's operand for each axis of its indices that runs along one."""
    numbers = eqn.params["dimension_numbers"]
    return dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )


def _picked_axis(eqn: Equation) -> Sequence[int]:
    return eqn.params["dimension_numbers"].start_index_map


def _gather(eqn: Equation, find: Any) -> Selection:
    """A gather of one entry along one axis, as ``take_along_axis`` by label, is a reduction."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (v.shape for v in eqn.inputs)
    axis = numbers.start_index_map
    paired = _paired(eqn)
    whole = [i for i in range(len(operand)) if i not in (*axis, *numbers.operand_batching_dims)]
    if (
        len(axis) != 1
        or axis != numbers.collapsed_slice_dims
        or any(sizes[i] != operand[i] for i in whole)
        or any(n != 1 for i, n in enumerate(indices) if i not in paired)
    ):
        return take
    # Which axis of the operand each axis of the result runs along: they must come in order.
    from_indices, from_operand = iter(range(len(indices) - 1)), iter(whole)
    rank = len(eqn.outputs[0].shape)
    sources = [
        next(from_operand) if i in numbers.offset_dims else paired.get(next(from_indices))
        for i in range(rank)
    ]
    kept = [axis for axis in sources if axis is not None]
    return pick if kept == sorted(kept) else take


selection = Selection()
take = Take()
scatter_add = Scatter()
scatter_sub = ScatterSub()
scatter_extremum = ScatterExtremum()
cumulative_extremum = CumulativeExtremum()
view = View()
join = Join()
concatenate = ByEquation(_concatenate)
constant = PiecewiseConstant()
summation = Reduction(lambda eqn, primals, y: 1.0)
extremum = Reduction(_largest)
pick = Reduction(_picked, _picked_axis)
gather = ByEquation(_gather)
