"""Primitives that hold a jaxpr and compute what it computes: moments are pushed through it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments
from hesscale_jax.rules.selection import push
from hesscale_jax.rules.table import ByEquation, Find

__all__ = ["call", "linear_call", "vectorised"]


def call(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """The moments that the jaxpr the equation holds gives."""
    (held,) = (p for p in eqn.params.values() if isinstance(p, core.ClosedJaxpr))
    return recurse(_jaxpr.body(held, eqn, eqn.inputs), operands)


def linear_call(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx)``, with the transpose that came with ``f``; ``vy`` as its own body gives it."""
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    body = _jaxpr.body(eqn.params["callee"], eqn, eqn.inputs)
    scattered = recurse(body, [x._replace(shift=None) for x in operands])
    return [Moments(y, dy, z.spread) for y, dy, z in zip(results, shifts, scattered, strict=True)]


def _vectorised(eqn: Equation, find: Find) -> Any:
    """The rule of the primitive that it vectorises."""
    return find(dataclasses.replace(eqn, primitive=eqn.params["prim"]))


vectorised = ByEquation(_vectorised)
