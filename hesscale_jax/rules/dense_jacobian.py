"""Any one equation, by its dense Jacobian: exact, and for small arrays only."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, is_inexact
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push

__all__ = ["dense"]


def dense(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + sum_i d2f/dx_i2 vx_i, vy = (J*J) vx``, with the derivatives written out.

    The domain is every primitive that JAX differentiates twice, with real operands and results. No
    primitive has this rule by default: for an operand of n entries and results of m it takes n
    evaluations of the equation's second derivative and n m numbers of memory, so it is offered
    for what has no cheap form (factorisations, solves) and for small arrays::

        hesscale(loss, rules=hesscale_jax.RULES | {"cholesky": hesscale_jax.rules.dense})
    """
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    spreads: list[Any] = [None] * len(results)
    carried = [k for k, v in enumerate(eqn.outputs) if is_inexact(v)]
    for i, x in enumerate(operands):
        if x.spread is None:
            continue
        for k, slopes, bends in zip(carried, *_derivatives(eqn, primals, i, carried), strict=True):
            spreads[k] = total(spreads[k], _weighted(slopes**2, x.spread, eqn.outputs[k]))
            if recurse.curved:
                bend = _weighted(bends, x.spread, eqn.outputs[k])
                shifts[k] = total(shifts[k], lax.convert_element_type(bend, results[k].dtype))
    return list(map(Moments, results, shifts, spreads))


def _derivatives(eqn: Equation, primals: Sequence[Any], i: int, carried: Sequence[int]) -> Any:
    """The first and the second derivative of the results in each entry of operand ``i``."""
    x = primals[i]
    equation = _jaxpr.along(eqn, primals, [i])

    def fun(x: Any) -> list[Any]:
        results = _jaxpr.listed(equation(x), eqn)
        return [results[k] for k in carried]

    def in_direction(e: Any) -> Any:
        return jax.jvp(lambda x: jax.jvp(fun, [x], [e])[1], [x], [e])

    return jax.vmap(in_direction)(jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape))


def _weighted(derivatives: Any, spread: Any, value: Any) -> Any:
    """``sum_i derivatives_i spread_i``, in the dtype of the result's spread."""
    sums = jnp.tensordot(spread.ravel(), derivatives.astype(spread.dtype), 1)
    return lax.convert_element_type(sums, spread_dtype(value.dtype))
