"""Products, linear in each factor: the squared Jacobian is that of the other factors squared.

dy = f(dx, w) + f(x, dw),   vy = f(vx, w*w) + f(x*x, vw)
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.selection import in_wide_dtype, push

__all__ = ["multilinear", "product"]


def multilinear(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*x, vw)``.

    The domain is every bilinear primitive that leaves each product of two entries in one output
    with a coefficient of 0 or 1: ``dot_general``, ``conv_general_dilated``, ``ragged_dot_general``.
    """
    x, w, *sizes = operands
    rest = [size.primal for size in sizes]  # of the groups of a ragged product
    wide = spread_dtype(x.primal.dtype, w.primal.dtype)
    result = spread_dtype(eqn.outputs[0].dtype)
    precise: dict[str, Any] = {"preferred_element_type": wide}
    if isinstance(eqn.params["precision"], lax.DotAlgorithm | lax.DotAlgorithmPreset):
        precise["precision"] = None  # an algorithm fixes the dtypes of its factors

    def square(factor: Any) -> Any:
        factor = lax.convert_element_type(factor, wide)
        return factor * factor

    def product(a: Any, b: Any) -> Any:
        return None if a is None or b is None else _jaxpr.bind(eqn, a, b, *rest)

    def spread(a: Any, b: Any) -> Any:
        y = _jaxpr.bind(eqn, a, b, *rest, **precise)
        return y if wide == result else lax.convert_element_type(y, result)

    return [
        Moments(
            product(x.primal, w.primal),
            total(product(x.shift, w.primal), product(x.primal, w.shift)),
            total(
                None if x.spread is None else spread(x.spread, square(w.primal)),
                None if w.spread is None else spread(square(x.primal), w.spread),
            ),
        )
    ]


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
    return sum(present[1:], present[0]) if present else None
