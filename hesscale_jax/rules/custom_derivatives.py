"""Functions with a derivative rule of their own: ``custom_jvp`` and ``custom_vjp``."""

from collections.abc import Callable, Sequence
from typing import Any

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Value
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.moments import Moments
from hesscale_jax.rules.derivatives import Pointwise, nested
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import PiecewiseConstant, jvp
from hesscale_jax.rules.table import ByEquation, Find

__all__ = ["custom_jvp", "custom_rule", "defined_by"]

Rule = Callable[[Equation, Sequence[Moments], Any], list[Moments]]


def custom_rule(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = rule(dx) + body(vx)'s shift, vy = body(vx)'s spread``.

    The gradient is that of the function's own rule, the curvature that of its definition.
    """
    (body,) = eqn.bodies
    try:
        return _bent(eqn, operands, body, recurse)
    except UnsupportedPrimitiveError as error:
        raise error.within(_jaxpr.label(eqn)) from error


def defined_by(function: Callable[..., Any]) -> Rule:
    """The rule of a call that computes what ``function`` does, which JAX can trace.

    It is for kernels and foreign functions with a gradient of their own. The gradient remains that;
    the curvature is that of ``function``, pushed through its equations:
    ``dy = J dx + function(vx)'s shift, vy = function(vx)'s spread``.

    Args:
      function: Takes the operands of the equation in order, and returns its results, in one array
        or a pytree.

    Examples:
      >>> import jax, jax.numpy as jnp, hesscale_jax as hs
      >>> @jax.custom_vjp
      ... def cube(x):  # stands for a kernel
      ...     return jax.pure_callback(lambda x: x**3, x, x)
      >>> cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))
      >>> rules = hs.RULES | {"custom_vjp_call[cube]": hs.rules.defined_by(lambda x: x**3)}
      >>> grad, hess_diag = hs.hesscale(lambda x: cube(x).sum(), rules=rules)(jnp.array([1.0, 2.0]))
      >>> print(grad, hess_diag)
      [ 3. 12.] [ 6. 12.]
    """

    def rule(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        traced = _jaxpr.trace(function, *(x.primal for x in operands))
        return _bent(eqn, operands, traced, recurse)

    rule.__name__ = f"defined_by({getattr(function, '__name__', 'function')})"
    return rule


def _bent(eqn: Equation, operands: Sequence[Moments], body: Any, recurse: Any) -> list[Moments]:
    """The equation's own derivative along the shifts, and what the spreads give in ``body``."""
    primals = [x.primal for x in operands]
    results, shifts = jvp(eqn, primals, [x.shift for x in operands])
    bends = recurse(body, [x._replace(shift=None) for x in operands])
    return [
        Moments(y, total(shift, bend.shift), bend.spread)
        for y, shift, bend in zip(results, shifts, bends, strict=True)
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
    return all(_broadcasts(v.shape, shape) for v in eqn.inputs if isinstance(v, Value))


def _broadcasts(operand: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an operand has an entry for each of the result's, at size 1 the same for several."""
    return operand == () or (
        len(operand) == len(shape) and all(n in (1, m) for n, m in zip(operand, shape, strict=True))
    )


custom_jvp = ByEquation(_custom_jvp)
