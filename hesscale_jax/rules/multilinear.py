"""Products, linear in each operand: the squared Jacobian is that of the other operand squared.

dy = f(dx, w) + f(x, dw),   vy = f(vx, w*w) + f(x*x, vw)
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments, spread_dtype

__all__ = ["multilinear"]


def multilinear(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*x, vw)``.

    The domain is every bilinear primitive that leaves each product of two entries in one output
    with a coefficient of 0 or 1: ``dot_general``, ``conv_general_dilated``.
    """
    x, w = operands
    wide = spread_dtype(x.primal.dtype, w.primal.dtype)
    precise = {"preferred_element_type": wide}

    def square(factor: Any) -> Any:
        factor = lax.convert_element_type(factor, wide)
        return factor * factor

    def product(a: Any, b: Any) -> Any:
        return None if a is None or b is None else _jaxpr.bind(eqn, a, b)

    shift = total(product(x.shift, w.primal), product(x.primal, w.shift))
    spread = total(
        None if x.spread is None else _jaxpr.bind(eqn, x.spread, square(w.primal), **precise),
        None if w.spread is None else _jaxpr.bind(eqn, square(x.primal), w.spread, **precise),
    )
    return [Moments(product(x.primal, w.primal), shift, spread)]


def total(*terms: Any) -> Any:
    """The sum of the terms that are not ``None``; ``None`` if there are none."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None
