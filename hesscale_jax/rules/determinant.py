"""The logarithm of a determinant, by the inverse matrix."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax._mesh import automatically, on_mesh
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push

__all__ = ["log_determinant"]


def log_determinant(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = sum_ij b_ij dx_ij - sum_ij b_ij^2 vx_ij, vy = sum_ij b_ij^2 vx_ij``, ``b = x^-T``.

    The domain is ``jnp.linalg.slogdet`` of real matrices, with any axes in front of them; the sign
    is constant. The rule is exact for independent entries, at the cost of one inverse.
    """
    (x,) = operands
    sign, y = _jaxpr.run(eqn, x.primal)
    _, shift = push(eqn, [x.primal], [x.shift])
    spread = None
    if x.spread is not None:
        inverse = automatically(lambda: jnp.linalg.inv(on_mesh(x.primal)), x.primal)
        square = inverse.swapaxes(-1, -2) ** 2
        spread = jnp.sum(square.astype(spread_dtype(y.dtype)) * x.spread, (-2, -1))
        if recurse.curved:
            shift = total(shift, lax.convert_element_type(-spread, y.dtype))
    return [Moments(sign), Moments(y, shift, spread)]
