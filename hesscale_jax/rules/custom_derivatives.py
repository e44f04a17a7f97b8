"""Functions with a derivative rule of their own: ``custom_jvp`` and ``custom_vjp``."""

from collections.abc import Sequence
from typing import Any

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Value
from hesscale_jax.moments import Moments
from hesscale_jax.rules.derivatives import Pointwise, nested
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import PiecewiseConstant, push
from hesscale_jax.rules.table import ByEquation, Find

__all__ = ["custom_jvp", "custom_rule"]


def custom_rule(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = rule(dx) + body(vx)'s shift, vy = body(vx)'s spread``.

    The gradient is that of the function's own rule, the curvature that of its definition.
    """
    (body,) = eqn.bodies
    return bent(eqn, operands, recurse(body, [Moments(x.primal, None, x.spread) for x in operands]))


def bent(eqn: Equation, operands: Sequence[Moments], curved: Sequence[Moments]) -> list[Moments]:
    """The equation's own derivative along the shifts, with the second order of ``curved``."""
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    return [
        Moments(y, total(shift, of_spread.shift), of_spread.spread)
        for y, shift, of_spread in zip(results, shifts, curved, strict=True)
    ]


def _custom_jvp(eqn: Equation, find: Find) -> Any:
    """An activation acts entry by entry: its slope and curvature are those its rule gives."""
    return nested if _is_pointwise(eqn, find) else custom_rule


def _is_pointwise(eqn: Equation, find: Find) -> bool:
    """Whether the result has, at each position, what the operands have there."""
    if len(eqn.outputs) != 1:
        return False
    shape = eqn.outputs[0].shape
    (body,) = eqn.bodies
    moving = set(body.program.inputs)
    for inner in body.program.equations:
        if moving.isdisjoint(inner.inputs):
            continue
        from_scalars = all(not v.shape for v in inner.inputs)
        if not (isinstance(find(inner), Pointwise | PiecewiseConstant) or from_scalars):
            return False
        moving.update(inner.outputs)
    return all(
        v.shape in ((), shape) or len(v.shape) == len(shape)
        for v in eqn.inputs
        if isinstance(v, Value)
    )


custom_jvp = ByEquation(_custom_jvp)
