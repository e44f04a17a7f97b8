"""Functions with a derivative rule of their own."""

from hesscale_jax._jaxpr import Equation, Value, flatten
from hesscale_jax.rules.derivatives import Pointwise, nested
from hesscale_jax.rules.selection import PiecewiseConstant
from hesscale_jax.rules.table import ByEquation, Find

__all__ = ["custom_jvp"]


def _custom_jvp(eqn: Equation, find: Find) -> Pointwise | None:
    """An activation: a function that acts entry by entry. Its slope is the one its rule gives."""
    return nested if _is_pointwise(eqn, find) else None


def _is_pointwise(eqn: Equation, find: Find) -> bool:
    """Whether the result has, at each position, what the operands have there."""
    if len(eqn.outputs) != 1:
        return False
    shape = eqn.outputs[0].shape
    body = flatten(eqn.params["call_jaxpr"])
    moving = set(body.inputs)
    for inner in body.equations:
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
