"""Products, linear in each factor: the squared Jacobian is that of the other factors squared.

dy = f(dx, w) + f(x, dw),   vy = f(vx, w*w) + f(x*x, vw)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.arrays import Reader, of_atom, placed
from hesscale_jax.covariances import covariance, variance
from hesscale_jax.factored import Factored
from hesscale_jax.forms import Form
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.selection import in_wide_dtype, push

__all__ = ["Multilinear", "met", "multilinear", "product", "product_frame", "products_in"]


@dataclasses.dataclass(frozen=True)
class Multilinear:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*x, vw)``.

    The domain is every bilinear primitive that leaves each product of two entries in one output
    with a coefficient of 0 or 1: ``dot_general``, ``conv_general_dilated``, ``ragged_dot_general``,
    or one of your own that takes operands of any floating-point dtype.
    The factors count as independent; of those that are not, :func:`met` gives the moments.

    Attributes:
      dtype: What spreads and squares are rounded to where they are multiplied, and their products
        with them: ``bfloat16``, or ``float32``. None is ``bfloat16`` where both factors are in half
        precision and the platform is no CPU, where that gains nothing; else ``float32``. Products
        of float64 stay in float64.
    """

    dtype: Any = None

    __name__ = "multilinear"

    def __call__(self, eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        """The moments of the result."""
        x, w, *sizes = operands
        rest = [size.primal for size in sizes]  # of the groups of a ragged product
        numbers, *shapes = _matrices(eqn, x.primal, w.primal)
        factors = [lax.reshape(f.primal, shape) for f, shape in zip((x, w), shapes, strict=True)]
        wide = spread_dtype(x.primal.dtype, w.primal.dtype)
        result = spread_dtype(eqn.outputs[0].dtype)
        within = self.within(x.primal.dtype, w.primal.dtype)
        precise: dict[str, Any] = {}
        if "preferred_element_type" in eqn.params:
            precise["preferred_element_type"] = within
        if isinstance(eqn.params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset):
            precise["precision"] = None  # an algorithm fixes the dtypes of its factors

        def square(factor: Any) -> Any:
            factor = lax.convert_element_type(factor, wide)
            return _jaxpr.multiply(factor, factor)

        def product(a: Any, b: Any, **changes: Any) -> Any:
            y = _jaxpr.bind(eqn, a, b, *rest, **numbers, **changes)
            return lax.reshape(y, eqn.outputs[0].shape)

        def shift(position: int) -> Any:
            """What one factor's shift gives the result's."""
            moved = operands[position].shift
            if moved is None:
                return None
            moved, other = lax.reshape(moved, shapes[position]), factors[1 - position]
            return product(other, moved) if position else product(moved, other)

        def spread(position: int) -> Any:
            """What one factor's spread gives the result's."""
            v = operands[position].spread
            if v is None:
                return None
            if isinstance(v, Factored):
                y = v.spread(eqn, position, operands[1 - position].primal)
            else:
                v, other = lax.reshape(v, shapes[position]), square(factors[1 - position])
                v, other = rounded(v, within), rounded(other, within)
                y = product(other, v, **precise) if position else product(v, other, **precise)
            return rounded(y, result)

        y = product(*factors)
        return [Moments(y, total(shift(0), shift(1)), total(spread(0), spread(1)))]

    def within(self, *factors: Any) -> Any:
        """The dtype in which products of spreads and squares are taken, by the factors' dtypes."""
        wide = spread_dtype(*factors)
        if wide == jnp.float64:
            return wide
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        half = all(jnp.dtype(dtype).itemsize <= 2 for dtype in factors)
        return jnp.dtype(jnp.bfloat16) if half and not _jaxpr.is_on_cpu() else wide


multilinear = Multilinear()


def products_in(rules: Mapping[Any, Any], dtype: Any) -> Mapping[Any, Any]:
    """The rules, with products of spreads and squares in a dtype; None leaves them as they are."""
    if dtype is None:
        return rules
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("bfloat16", "float32"):
        # float16 overflows at 65504, which squares reach, and curvatures underflow at 6e-8.
        raise ValueError(f"product_dtype must be None, jnp.bfloat16 or jnp.float32, got {name}")
    found = {p: rule for p, rule in rules.items() if isinstance(rule, Multilinear)}
    return {**rules, **dict.fromkeys(found, Multilinear(jnp.dtype(dtype)))}


def rounded(x: Any, dtype: Any) -> Any:
    """``x`` in a dtype, as it is if that is its own."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def _matrices(eqn: Equation, x: Any, w: Any) -> tuple[dict[str, Any], Any, Any]:
    """The factors of a ``dot_general`` with adjacent axes as one where they are treated alike.

    So ``x`` of shape ``(batch, length, n)`` is a matrix. The transpose of its product in ``w`` sums
    over two axes otherwise, for which XLA on the CPU copies an operand, and computes once more in
    the copy whatever made it. Elsewhere there is no copy, and the axes may be sharded.

    Returns:
      Changes to the equation's parameters, and the shapes of its factors.
    """
    if eqn.name != "dot_general" or not _jaxpr.is_on_one_cpu(eqn, x, w):
        return {}, x.shape, w.shape
    (of_x, of_w), (batch_x, batch_w) = eqn.params["dimension_numbers"]
    axes_x = _merged(x.ndim, dict(zip(of_x, of_w, strict=True)), batch_x)
    axes_w = _merged(w.ndim, dict(zip(of_w, of_x, strict=True)), batch_w)
    summed = [(i, j) for i, j in zip(of_x, of_w, strict=True) if i in axes_x]
    numbers = (
        ([axes_x.index(i) for i, _ in summed], [axes_w.index(j) for _, j in summed]),
        ([axes_x.index(i) for i in batch_x], [axes_w.index(i) for i in batch_w]),
    )
    changes = {"dimension_numbers": tuple(tuple(map(tuple, sides)) for sides in numbers)}
    return changes, _with_axes(x.shape, axes_x), _with_axes(w.shape, axes_w)


def _merged(rank: int, partner: dict[int, int], batch: Sequence[int]) -> list[int]:
    """The first axis of each run of a factor's axes that are free, or summed with such a run."""

    def joins(i: int) -> bool:
        if i == 0 or {i - 1, i} & {*batch}:
            return False
        if i in partner and i - 1 in partner:
            return partner[i] == partner[i - 1] + 1
        return i not in partner and i - 1 not in partner

    return [i for i in range(rank) if not joins(i)]


def _with_axes(shape: Sequence[int], first: list[int]) -> list[int]:
    """The shape with the axes from each of the first to the next as one."""
    return [math.prod(shape[lo:hi]) for lo, hi in itertools.pairwise([*first, len(shape)])]


def met(
    eqn: Equation,
    y: Moments,
    forms: tuple[Form, Form],
    vary: Callable[[Any], Any],
    reader_in: Callable[[Any], Reader],
    curved: bool,
) -> Moments:
    """The moments of a product of two images of one value, as ``x^T x`` and ``x^T A x``.

    Before it is summed, ``y_t = sum_c a_tc b_tc`` has ``dy_t += 2 sum_c cov(a_tc, b_tc)``, and the
    form ``sum_c (b_tc da_tc + a_tc db_tc)``.
    """
    frame, places, summed = product_frame(eqn)
    factors = [placed(of_atom(v), len(frame), at) for v, at in zip(eqn.inputs, places, strict=True)]
    form = Form(tuple(frame), {})
    for k, of_factor in enumerate(forms):
        form = form.plus(of_factor.times(factors[1 - k]))
    shape = eqn.outputs[0].shape
    array = reader_in(spread_dtype(y.primal.dtype))
    spread = variance(form.summed(summed).reshaped(shape), vary, array)
    shift = y.shift
    if curved:
        a, b = forms
        bends = (
            covariance(a.of[x], b.of[x], vary(x), frame, array, summed) for x in a.of if x in b.of
        )
        bend = total(*bends)
        if bend is not None:
            kept = [1 if i in summed else n for i, n in enumerate(frame)]
            bend = jnp.broadcast_to(2 * bend, kept).reshape(shape)
            shift = total(shift, lax.convert_element_type(bend, y.primal.dtype))
    return Moments(y.primal, shift, spread)


def product_frame(eqn: Equation) -> tuple[list[int], list[list[int]], list[int]]:
    """The axes of a ``dot_general`` before it sums: its result's, then those that it sums over.

    Returns:
      Their sizes, where those of each factor are among them, and which it sums over.
    """
    contract, batch = eqn.params["dimension_numbers"]
    shapes = [v.shape for v in eqn.inputs]
    free = [
        [i for i in range(len(s)) if i not in (*contract[k], *batch[k])]
        for k, s in enumerate(shapes)
    ]
    order = [[*batch[k], *free[k], *contract[k]] for k in range(2)]
    first = len(batch[0]) + len(free[0]) + len(free[1])
    summed = list(range(first, first + len(contract[0])))
    frame = [shapes[0][i] for i in (*batch[0], *free[0])]
    frame += [shapes[1][i] for i in free[1]]
    frame += [shapes[0][i] for i in contract[0]]
    of_batch = range(len(batch[0]))
    of_free = range(len(batch[0]), first - len(free[1])), range(first - len(free[1]), first)
    places = [dict(zip(order[k], (*of_batch, *of_free[k], *summed), strict=True)) for k in range(2)]
    return frame, [[at[i] for i in range(len(at))] for at in places], summed


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
