"""First and second derivatives of pointwise primitives, entry by entry.

For ``y = phi(a, b, ...)`` a block needs the slopes ``phi_a`` and the curvatures ``phi_ab``. The
common primitives have closed forms; the rest are differentiated by nested ``jax.jvp``. A derivative
that is zero everywhere is left out, and one that is the same everywhere is a Python float, so that
nothing is computed for either. They are in the operands' dtype: that of the gradient, as
``jax.grad``'s are, or that of spreads, because squares leave half precision.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.moments import spread_dtype

__all__ = ["Pointwise", "binary", "linear", "nested", "unary"]

# A derivative: a float if it is the same for every entry, a Boolean array if it is 0 or 1.
Coefficient = Any
Slopes = dict[int, Coefficient]  # by operand
Curvatures = dict[tuple[int, int], Coefficient]  # by pair of operands, the smaller first


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """The family of primitives whose Jacobian is diagonal: ``y = phi(a, b, ...)``, entrywise.

    Attributes:
      derivatives: ``(eqn, y, operands, positions) -> (slopes, curvatures)`` in the operands at
        ``positions``.
      affine: Whether ``y`` is affine in the operands at the given positions together.
      own_jvp: Whether the shift is taken with the primitive's own ``jvp`` rather than with the
        slopes. The former keeps JAX's conventions at kinks where there is no closed form.
      cuts: Whether a slope of 0 stands for a choice, as that of a relu does: it discards whatever
        it is multiplied by, infinities among it.
      slopes: The slopes in all operands, if they are the same for every entry.
    """

    derivatives: Callable[[Equation, Any, Sequence[Any], Sequence[int]], tuple[Slopes, Curvatures]]
    affine: Callable[[Sequence[int]], bool] = lambda positions: False
    own_jvp: bool = False
    cuts: bool = False
    slopes: tuple[float, ...] | None = None


def widened(x: Any) -> Any:
    """A floating-point array in the dtype of its spreads, any other array as it is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    wide = spread_dtype(x.dtype)
    return x if x.dtype == wide else lax.convert_element_type(x, wide)


def unary(derivatives: Callable[[Any, Any], tuple[Coefficient, Coefficient]]) -> Pointwise:
    """``y = f(x)`` from ``derivatives(x, y) -> (f'(x), f''(x))``; ``None`` where it is zero."""

    def closed(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
        first, second = derivatives(operands[0], y)
        return {0: first}, {} if second is None else {(0, 0): second}

    return Pointwise(closed)


def binary(
    first: Callable[..., Sequence[Coefficient]],
    second: Callable[..., Curvatures] = lambda a, b, y: {},
    affine: Callable[[Sequence[int]], bool] = lambda positions: False,
) -> Pointwise:
    """``y = f(a, b)`` from ``first(a, b, y) -> (f_a, f_b)`` and ``second(a, b, y) -> f_ab``."""

    def closed(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
        slopes = first(*operands, y)
        curvatures = second(*operands, y)
        return (
            {i: slopes[i] for i in positions},
            {(i, j): c for (i, j), c in curvatures.items() if i in positions and j in positions},
        )

    return Pointwise(closed, affine)


def linear(*slopes: float) -> Pointwise:
    """``y = c_0 a + c_1 b + ...`` with the same coefficients for every entry."""

    def closed(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
        return {i: slopes[i] for i in positions}, {}

    return Pointwise(closed, affine=lambda positions: True, slopes=slopes)


def _select(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """``y = cases[which]``: the slope in a case is 1 where it was chosen, else 0."""
    which = operands[0]
    if which.dtype == jnp.bool_:
        chosen = {1: lax.bitwise_not(which), 2: which}
    else:
        chosen = {i: lax.eq(which, lax.full_like(which, i - 1)) for i in positions}
    return {i: chosen[i] for i in positions}, {}


def _integer_pow(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """``y = x^n``: n x^(n-1) and n (n-1) x^(n-2)."""
    (x,), n = operands, eqn.params["y"]
    if n in (0, 1):
        return {0: float(n)}, {}
    if n == 2:
        return {0: 2 * x}, {(0, 0): 2.0}
    return {0: n * lax.integer_pow(x, n - 1)}, {(0, 0): n * (n - 1) * lax.integer_pow(x, n - 2)}


def _nested(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """Any primitive, by ``jax.jvp`` along ones, twice.

    A function's own rule may leave an operand out, as that of a root does with what the solver
    closes over, and yet have a slope in another one that varies with it: mixed derivatives are the
    means of both orders.
    """
    fun = _jaxpr.along(eqn, operands, positions)
    several = range(len(positions))
    pairs = list(itertools.combinations_with_replacement(several, 2))
    swapped = [(j, i) for i, j in pairs if i != j and eqn.name in _jaxpr.CUSTOM]

    def derivatives(*xs: Any) -> Any:
        first = [_partial(fun, i) for i in several]
        second = {(i, j): _partial(first[i], j)(*xs) for i, j in (*pairs, *swapped)}
        second |= {(i, j): (second[i, j] + second[j, i]) / 2 for j, i in swapped}
        return [*(slope(*xs) for slope in first), *(second[pair] for pair in pairs)]

    xs = [operands[i] for i in positions]
    try:
        traced, found = _jaxpr.pure(derivatives, *xs)
    except (TypeError, jax.errors.UnexpectedTracerError) as error:
        reason = "JAX cannot differentiate its derivative rule"
        raise UnsupportedPrimitiveError(_jaxpr.label(eqn), _jaxpr.location(eqn), reason) from error
    keys = [*positions, *((positions[i], positions[j]) for i, j in pairs)]
    zero = _jaxpr.zero_outputs(traced)
    kept = {k: c for k, c, null in zip(keys, found, zero, strict=True) if not null}
    slopes = {k: c for k, c in kept.items() if isinstance(k, int)}
    return slopes, {k: c for k, c in kept.items() if isinstance(k, tuple)}


def _partial(fun: Callable[..., Any], i: int) -> Callable[..., Any]:
    """The derivative of an entrywise function in its operand ``i``."""

    def derivative(*xs: Any) -> Any:
        def along_i(x: Any) -> Any:
            return fun(*xs[:i], x, *xs[i + 1 :])

        return jax.jvp(along_i, (xs[i],), (lax.full_like(xs[i], 1),))[1]

    return derivative


def _erf(x: Any, y: Any) -> tuple[Any, Any]:
    slope = 2 / math.sqrt(math.pi) * lax.exp(-x * x)
    return slope, -2 * x * slope


def _extremum(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    precedes = operator.gt if eqn.name == "max" else operator.lt
    return {i: share(operands[i], operands[1 - i], y, precedes) for i in positions}, {}


def share(a: Any, b: Any, y: Any, precedes: Callable[[Any, Any], Any]) -> Any:
    """The slope of ``y = max(a, b)`` or ``min`` in ``a``: 1 where it precedes, 1/2 in a tie.

    The operands are compared with each other: that one is the result does not always hold where
    XLA computes it twice, in two fusions that round in different ways.
    """
    zero, half, one = (lax.full_like(y, x) for x in (0, 0.5, 1))
    return lax.select(precedes(a, b), one, lax.select(a == b, half, zero))


def _clamp(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """``y = min(max(x, low), high)``: the slope is 1 in what was taken, 0 in ``x`` at a bound."""
    low, x, high = operands
    taken = {0: (low > x) & (low < high), 1: (x > low) & (x < high), 2: x > high}
    return {i: taken[i] for i in positions}, {}


def _div(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """``y = a / b``: 1 / b and -y / b; -1 / b^2 in both, and 2 y / b^2."""
    b = operands[1]
    inverse = 1 / b  # infinite at smaller numbers than those that -y / b is
    slopes, curvatures = {0: inverse}, {}
    if 1 in positions:
        slopes[1] = -y / b
        curvatures[1, 1] = -2 * slopes[1] / b
    if len(positions) == 2:
        curvatures[0, 1] = -inverse * inverse
    return {i: slopes[i] for i in positions}, curvatures


nested = Pointwise(_nested, own_jvp=True, cuts=True)
select = Pointwise(_select, affine=lambda positions: True)
clamp = Pointwise(_clamp, cuts=True)
integer_pow = Pointwise(_integer_pow)

exp = unary(lambda x, y: (y, y))
expm1 = unary(lambda x, y: (y + 1, y + 1))
log = unary(lambda x, y: (1 / x, -1 / (x * x)))
log1p = unary(lambda x, y: ((d := 1 / (1 + x)), -d * d))
tanh = unary(lambda x, y: ((d := (1 - y) * (1 + y)), -2 * y * d))
logistic = unary(lambda x, y: ((d := y * (1 - y)), d * (1 - 2 * y)))
sin = unary(lambda x, y: (lax.cos(x), -y))
cos = unary(lambda x, y: (-lax.sin(x), -y))
sqrt = unary(lambda x, y: ((d := 0.5 / y), -0.5 * d / x))
rsqrt = unary(lambda x, y: ((d := -0.5 * (y / x)), -1.5 * d / x))
square = unary(lambda x, y: (2 * x, 2.0))
erf = unary(_erf)

mul = binary(lambda a, b, y: (b, a), lambda a, b, y: {(0, 1): 1.0}, lambda at: len(at) == 1)
div = Pointwise(_div, affine=lambda at: tuple(at) == (0,))
extremum = Pointwise(_extremum, cuts=True)
