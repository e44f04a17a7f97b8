"""Primitives that hold a jaxpr and compute what it computes: moments are pushed through it."""

from collections.abc import Callable, Sequence
from typing import Any

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments
from hesscale_jax.rules.selection import push

__all__ = ["body", "linear_call"]


def body(parameter: str) -> Callable[..., list[Moments]]:
    """The rule of a call of the jaxpr in this parameter of the equation."""

    def through(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        """The moments that the jaxpr the equation holds gives."""
        return recurse(eqn.params[parameter], operands)

    return through


def linear_call(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx)``, with the transpose that came with ``f``; ``vy`` as ``f``'s own body gives it."""
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    scattered = recurse(eqn.params["callee"], [x._replace(shift=None) for x in operands])
    return [Moments(y, dy, z.spread) for y, dy, z in zip(results, shifts, scattered, strict=True)]
