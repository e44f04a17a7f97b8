"""Running sums on a log scale."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push, scan_squared

__all__ = ["cumlogsumexp"]


def cumlogsumexp(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + (J - J*J) vx, vy = (J*J) vx`` with ``J_ki = exp(x_i - y_k)``.

    Entries of ``-inf`` take no part.
    """
    (x,) = operands
    y = _jaxpr.bind(eqn, x.primal)
    (shift,) = push(eqn, [x.primal], [x.shift])
    if x.spread is None:
        return [Moments(y, shift)]
    wide = widened(x.primal)
    spread = scan_squared(eqn, wide, x.spread, jnp.logaddexp, _weight)
    if recurse.curved:
        (pushed,) = push(eqn, [wide], [x.spread])
        shift = total(shift, lax.convert_element_type(pushed - spread, y.dtype))
    return [Moments(y, shift, spread)]


def _weight(a: Any, b: Any, y: Any) -> Any:
    """``exp(a - y)``, the slope of ``logaddexp``; 0 where neither entry takes part."""
    return lax.exp(a - jnp.where(jnp.isinf(y), 0.0, y))
