"""Coefficients of a block's derivatives: ``None`` is zero, 1.0 is one, and a path may be cut."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hesscale_jax import _jaxpr
from hesscale_jax.rules.derivatives import Coefficient
from hesscale_jax.rules.multilinear import total

__all__ = [
    "Cut",
    "add_to",
    "as_coefficient",
    "cut_where_zero",
    "plus",
    "quadratic",
    "scaled",
    "times",
    "uncut",
    "varies",
]


@dataclasses.dataclass(eq=False)
class Cut:
    """A coefficient of a path that is cut at some positions, as by a choice or by a relu.

    There it is zero whatever it is multiplied by, infinities and NaN among it.

    Attributes:
      where: Where the path is open, a Boolean array.
      number: The coefficient there, a float or an array that is 0 elsewhere.
    """

    where: Any
    number: Any = 1.0


def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """The product of two coefficients, cut where one of them is."""
    if a is None or b is None:
        return None
    for factor, other in ((a, b), (b, a)):
        if isinstance(factor, float) and factor == 1.0:
            return other
    if not (isinstance(a, Cut) or isinstance(b, Cut)):
        return _jaxpr.multiply(a, b)
    open_at = [x.where for x in (a, b) if isinstance(x, Cut)]
    number = times(*(x.number if isinstance(x, Cut) else x for x in (a, b)))
    if len(open_at) == 2 and open_at[0] is open_at[1]:
        return Cut(open_at[0], number)  # 0 times 0 elsewhere
    where = functools.reduce(jnp.logical_and, open_at)
    return Cut(where, number if isinstance(number, float) else _jaxpr.only_where(where, number))


def scaled(coefficient: Coefficient, x: Any) -> Any:
    """A coefficient times what is linear in shifts or spreads."""
    if coefficient is None or x is None:
        return None
    if isinstance(coefficient, Cut):
        return _jaxpr.only_where(coefficient.where, times(coefficient.number, x))
    return times(coefficient, x)


def quadratic(d: Coefficient, x: Any, y: Any = None) -> Any:
    """``d^2 x + d y``."""
    if isinstance(d, float):
        return total(scaled(d * d, x), scaled(d, y))
    return scaled(d, total(scaled(d.number if isinstance(d, Cut) else d, x), y))


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """The sum, cut where both are."""
    if a is None or b is None:
        return b if a is None else a
    number = _jaxpr.add(uncut(a), uncut(b))
    if isinstance(a, Cut) and isinstance(b, Cut):
        return Cut(jnp.logical_or(a.where, b.where), number)
    return number


def add_to(to: dict[Any, Coefficient], terms: dict[Any, Coefficient], factor: Coefficient) -> None:
    """``to += factor * terms``, key by key."""
    for key, term in terms.items():
        to[key] = plus(to.get(key), times(factor, term))


def as_coefficient(x: Any) -> Coefficient:
    """What a rule gives as a coefficient: a constant as a float, which has no dtype of its own."""
    if x is None or isinstance(x, float):
        return x
    if jnp.result_type(x) == jnp.bool_:
        return Cut(x)
    return x if isinstance(x, jax.Array) or np.ndim(x) else float(x)


def cut_where_zero(slope: Coefficient) -> Coefficient:
    """A slope with the path cut where it is 0."""
    return slope if isinstance(slope, float | Cut) else Cut(slope != 0, slope)


def varies(*derivatives: dict[Any, Any]) -> bool:
    """Whether a derivative is not the same, nor 0 or 1, at every position."""
    return any(
        not isinstance(as_coefficient(c), float | Cut)
        for each in derivatives
        for c in each.values()
    )


def uncut(x: Coefficient) -> Coefficient:
    """A coefficient without its cut."""
    if isinstance(x, Cut):
        return jnp.where(x.where, x.number, 0.0) if isinstance(x.number, float) else x.number
    return x
