"""Products, linear in each factor: the squared Jacobian is that of the other factors squared.

dy = f(dx, w) + f(x, dw),   vy = f(vx, w*w) + f(x*x, vw)
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.factored import Factored
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.selection import in_wide_dtype, push

__all__ = ["multilinear", "product"]


def multilinear(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*x, vw)``.

    The domain is every bilinear primitive that leaves each product of two entries in one output
    with a coefficient of 0 or 1: ``dot_general``, ``conv_general_dilated``, ``ragged_dot_general``,
    or one of your own that takes operands of any floating-point dtype.
    The factors count as independent, even if both are one value; a product ``x^T x`` is exact.
    """
    x, w, *sizes = operands
    rest = [size.primal for size in sizes]  # of the groups of a ragged product
    wide = spread_dtype(x.primal.dtype, w.primal.dtype)
    result = spread_dtype(eqn.outputs[0].dtype)
    precise: dict[str, Any] = {}
    if "preferred_element_type" in eqn.params:
        precise["preferred_element_type"] = wide
    if isinstance(eqn.params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset):
        precise["precision"] = None  # an algorithm fixes the dtypes of its factors

    def square(factor: Any) -> Any:
        factor = lax.convert_element_type(factor, wide)
        return factor * factor

    def product(a: Any, b: Any) -> Any:
        return None if a is None or b is None else _bind(eqn, a, b, *rest)

    def spread(position: int) -> Any:
        """What one factor's spread gives the result's."""
        v, other = operands[position].spread, operands[1 - position].primal
        if v is None:
            return None
        if isinstance(v, Factored):
            y = v.spread(eqn, position, other)
        else:
            pair = (square(other), v) if position else (v, square(other))
            y = _bind(eqn, *pair, *rest, **precise)
        return y if wide == result else lax.convert_element_type(y, result)

    y = Moments(
        product(x.primal, w.primal),
        total(product(x.shift, w.primal), product(x.primal, w.shift)),
        total(spread(0), spread(1)),
    )
    return [_with_squares(eqn, x, y, recurse.curved) if _is_gram(eqn) else y]


def _bind(eqn: Equation, x: Any, w: Any, *rest: Any, **changes: Any) -> Any:
    """``f(x, w)``, in a ``dot_general`` with adjacent axes as one where they are treated alike.

    So ``x`` of shape ``(batch, length, n)`` is a matrix. The transpose of its product in ``w`` sums
    over two axes otherwise, for which XLA on the CPU copies an operand, and computes once more in
    the copy whatever made it. Elsewhere there is no copy, and the axes may be sharded.
    """
    if eqn.name != "dot_general" or not _jaxpr.is_on_one_cpu(eqn, x, w):
        return _jaxpr.bind(eqn, x, w, *rest, **changes)
    (of_x, of_w), (batch_x, batch_w) = eqn.params["dimension_numbers"]
    axes_x = _merged(x.ndim, dict(zip(of_x, of_w, strict=True)), batch_x)
    axes_w = _merged(w.ndim, dict(zip(of_w, of_x, strict=True)), batch_w)
    summed = [(i, j) for i, j in zip(of_x, of_w, strict=True) if i in axes_x]
    numbers = (
        ([axes_x.index(i) for i, _ in summed], [axes_w.index(j) for _, j in summed]),
        ([axes_x.index(i) for i in batch_x], [axes_w.index(i) for i in batch_w]),
    )
    y = _jaxpr.bind(
        eqn,
        _with_axes(x, axes_x),
        _with_axes(w, axes_w),
        **changes,
        dimension_numbers=tuple(tuple(map(tuple, sides)) for sides in numbers),
    )
    return lax.reshape(y, eqn.outputs[0].shape)


def _merged(rank: int, partner: dict[int, int], batch: Sequence[int]) -> list[int]:
    """The first axis of each run of a factor's axes that are free, or summed with such a run."""

    def joins(i: int) -> bool:
        if i == 0 or {i - 1, i} & {*batch}:
            return False
        if i in partner and i - 1 in partner:
            return partner[i] == partner[i - 1] + 1
        return i not in partner and i - 1 not in partner

    return [i for i in range(rank) if not joins(i)]


def _with_axes(factor: Any, first: list[int]) -> Any:
    bounds = itertools.pairwise([*first, factor.ndim])
    return lax.reshape(factor, [math.prod(factor.shape[lo:hi]) for lo, hi in bounds])


def _is_gram(eqn: Equation) -> bool:
    """Whether it multiplies a value with itself along the same axes: ``y_jk = sum_i x_ij x_ik``."""
    if eqn.name != "dot_general" or eqn.inputs[0] is not eqn.inputs[1]:
        return False
    return all(of_x == of_w for of_x, of_w in eqn.params["dimension_numbers"])


def _with_squares(eqn: Equation, x: Moments, y: Moments, curved: bool) -> Moments:
    """What the squares ``y_jj = sum_i x_ij^2`` add to the moments of products of two entries.

    ``dy_jj += 2 sum_i vx_ij``, and ``vy_jj += 2 sum_i x_ij^2 vx_ij`` makes it ``4 x^2 vx``.
    """
    if x.spread is None:
        return y
    (summed, _), (batch, _) = eqn.params["dimension_numbers"]
    free = [i for i in range(x.primal.ndim) if i not in (*summed, *batch)]

    def on_diagonal(terms: Any, dtype: Any) -> Any:
        rows = jnp.transpose(terms, (*batch, *free, *summed))
        rows = jnp.sum(rows, range(len(batch) + len(free), rows.ndim))
        shape = rows.shape[: len(batch)], rows.shape[len(batch) :]
        count = math.prod(shape[1])
        diagonal = jnp.eye(count, dtype=bool).reshape(*(1 for _ in shape[0]), count, count)
        square = jnp.where(diagonal, rows.reshape(*shape[0], count, 1), 0)
        return lax.convert_element_type(square.reshape(*shape[0], *shape[1], *shape[1]), dtype)

    bend = on_diagonal(2 * x.spread, y.primal.dtype) if curved else None
    squares = jnp.square(lax.convert_element_type(x.primal, x.spread.dtype))
    spread = on_diagonal(2 * squares * x.spread, spread_dtype(y.primal.dtype))
    return Moments(y.primal, total(y.shift, bend), total(y.spread, spread))


def product(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J(x) dx, vy = J(x*x) vx`` for products of entries, linear in each of them.

    The domain is ``reduce_prod``, ``cumprod`` and ``scatter-mul``, entries of 0 included.
    """
    primals = [x.primal for x in operands]
    squares = [x * x if jnp.issubdtype(x.dtype, jnp.floating) else x for x in map(widened, primals)]
    (shift,) = push(eqn, primals, [x.shift for x in operands])
    (spread,) = push(in_wide_dtype(eqn), squares, [x.spread for x in operands])
    return [Moments(_jaxpr.bind(eqn, *primals), shift, spread)]


def total(*terms: Any) -> Any:
    """The sum of the terms that are not ``None``; ``None`` if there are none."""
    present = [t for t in terms if t is not None]
    return functools.reduce(_jaxpr.add, present) if present else None
