"""The regularised incomplete gamma functions ``P(a, x)`` and ``Q = 1 - P``, in both operands."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hesscale_jax._jaxpr import Equation
from hesscale_jax.rules.derivatives import Pointwise, widened

__all__ = ["incomplete_gamma"]


def _derivatives(eqn: Equation, y: Any, operands: Sequence[Any], positions: Sequence[int]) -> Any:
    """``P_x = p = exp(-x) x^(a-1) / Gamma(a)``, ``P_ax = p (log x - digamma(a))``.

    JAX has the slope ``P_a``, and no derivative of it: ``P_aa`` is a difference of slopes, that
    is right to the power 4/5 of rounding.
    """
    sign = -1 if eqn.name == "igammac" else 1
    a, x = map(widened, operands)
    density = jnp.exp((a - 1) * jnp.log(x) - x - lax.lgamma(a))
    slopes = {1: density.astype(operands[1].dtype)}
    curvatures = {
        (0, 1): density * (jnp.log(x) - lax.digamma(a)),
        (1, 1): density * ((a - 1) / x - 1),
    }
    if 0 in positions:
        slopes[0] = lax.igamma_grad_a(a, x).astype(operands[0].dtype)
        curvatures[0, 0] = _in_a(a, x)
    return (
        {i: sign * slopes[i] for i in positions},
        {at: sign * c for at, c in curvatures.items() if {*at} <= {*positions}},
    )


def _in_a(a: Any, x: Any) -> Any:
    """``P_aa``, by a difference of fourth order."""
    step = a * jnp.finfo(a.dtype).eps ** 0.2

    def change(steps: int) -> Any:
        return lax.igamma_grad_a(a + steps * step, x) - lax.igamma_grad_a(a - steps * step, x)

    return (8 * change(1) - change(2)) / (12 * step)


incomplete_gamma = Pointwise(_derivatives, own_jvp=True)
