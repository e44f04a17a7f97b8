"""Functions with a derivative rule of their own: ``custom_jvp`` and ``custom_vjp``."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Constant, Equation, Program, Value, size
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.dense_jacobian import matrix_function, varying
from hesscale_jax.rules.derivatives import nested
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import PiecewiseConstant, jvp, push
from hesscale_jax.rules.table import ByEquation, Find, Unsupported
from hesscale_jax.rules.unsupported import OWN_TYPES

__all__ = [
    "custom_jvp",
    "custom_rule",
    "custom_vjp",
    "defined_by",
    "high",
    "own_derivatives",
    "own_jacobian",
]

# Where a value chooses between others, or picks some of them by their indices.
CHOICES = frozenset({"cond", "dynamic_slice", "dynamic_update_slice", "gather", "select_n"})
CHOICES |= {"scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"}

# How many entries of a second derivative are written out, each by a backward pass.
MOST_DERIVATIVES = 1024

# How many random signs an estimate is averaged over.
SIGNS = 4

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
        return _bent(eqn, operands, _jaxpr.body(traced, eqn, eqn.inputs), recurse)

    rule.__name__ = f"defined_by({getattr(function, '__name__', 'function')})"
    return rule


def _bent(eqn: Equation, operands: Sequence[Moments], body: Body, recurse: Any) -> list[Moments]:
    """The equation's own derivative along the shifts, and what the spreads give in ``body``."""
    primals = [x.primal for x in operands]
    results, shifts = jvp(eqn, primals, [x.shift for x in operands])
    bends = recurse(body, [x._replace(shift=None) for x in operands])
    return [
        Moments(y, total(shift, bend.shift), bend.spread)
        for y, shift, bend in zip(results, shifts, bends, strict=True)
    ]


def own_jacobian(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx, vy = (J*J) vx`` with the Jacobian of the function's own rule, taken as linear.

    It is for a ``custom_vjp`` function whose body has no derivative: rounding, a sign. The squares
    are those of the rule's backward program, pushed through its equations; if it holds a loop of
    unknown length, their estimate ``vy = z * J(J^T z * vx)``, averaged over random signs ``z``,
    without bias.
    """
    primals = [x.primal for x in operands]
    results, shifts = jvp(eqn, primals, [x.shift for x in operands])
    moving = [i for i, _ in varying(eqn, operands)]
    wanted = [k for k, asked in enumerate(recurse.wanted) if asked]
    spreads: list[Any] = [None] * len(results)
    if moving and wanted:
        along = _jaxpr.of_values(eqn, primals, moving)
        ys, back = jax.vjp(
            lambda *xs: [_jaxpr.listed(along(*xs), eqn)[k] for k in wanted],
            *(primals[i] for i in moving),
        )
        into = {i: operands[i].spread for i in moving}
        backward = _jaxpr.body(_jaxpr.trace(lambda *g: back(list(g)), *ys), eqn).program
        if _iterates(backward):
            found = _signed_squares(eqn, primals, back, dict(zip(wanted, ys, strict=True)), into)
        else:
            found = _squares(backward, recurse, ys, list(into.values()))
        for k, spread in zip(wanted, found, strict=True):
            spreads[k] = spread
    return list(map(Moments, results, shifts, spreads))


def own_derivatives(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + sum_i d2f/dx_i2 vx_i, vy = (J*J) vx``, both by the function's own rule.

    It is for a ``custom_vjp`` function that iterates until convergence: a root, an ODE solver. The
    second derivative is that of the backward pass, by a backward pass through it. The table has it
    for functions that act entry by entry, and for those of up to 1,024 entries of an operand times
    results; a larger one is taken as linear, as of ``own_jacobian``.
    """
    found = own_jacobian(eqn, operands, recurse)
    if not recurse.curved:
        return found
    for (i, x), k in itertools.product(varying(eqn, operands), range(len(found))):
        if found[k].spread is not None:
            bend = _own_bend(eqn, [x.primal for x in operands], i, k, x.spread)
            found[k] = found[k]._replace(shift=total(found[k].shift, bend))
    return found


def _own_bend(eqn: Equation, primals: Sequence[Any], i: int, k: int, spread: Any) -> Any:
    """``sum_i d2f_k/dx_i2 vx_i`` by the rule of the function."""
    x, y = primals[i], eqn.outputs[k]

    def turned(u: Any, g: Any) -> Any:
        return jax.vjp(lambda x: _slope(eqn, primals, i, k)(x, g), x)[1](u)[0]

    wide = lax.convert_element_type(spread, x.dtype)
    if _is_entrywise(eqn, i, k):
        bend = turned(jnp.ones_like(x), jnp.ones(y.shape, y.dtype)) * wide
    else:
        units, rows = (jnp.eye(size(v.shape), dtype=v.dtype).reshape(-1, *v.shape) for v in (x, y))
        bend = lax.map(
            lambda g: lax.map(lambda u: jnp.vdot(u, turned(u, g)), units) @ wide.ravel(), rows
        )
    return lax.convert_element_type(bend.reshape(y.shape), y.dtype)


def _slope(eqn: Equation, primals: Sequence[Any], i: int, k: int) -> Callable[[Any, Any], Any]:
    """The backward pass from result ``k`` to operand ``i``, as a function of the operand."""
    fun = _jaxpr.of_values(eqn, primals, [i])
    return lambda x, g: jax.vjp(lambda x: _jaxpr.listed(fun(x), eqn)[k], x)[1](g)[0]


def _backward(eqn: Equation, i: int, k: int) -> Program:
    return _jaxpr.body(_traced_slope(eqn, i, k), eqn).program


def _traced_slope(eqn: Equation, i: int, k: int) -> Any:
    def slope(primals: Sequence[Any], g: Any) -> Any:
        return _slope(eqn, primals, i, k)(primals[i], g)

    return _jaxpr.trace(slope, _avals(eqn), eqn.outputs[k].aval)


def _avals(eqn: Equation) -> list[Any]:
    return [x.value if isinstance(x, Constant) else x.aval for x in eqn.inputs]


def _turns(eqn: Equation, i: int, k: int) -> bool:
    """Whether JAX differentiates the backward pass: not one that keeps its tracers in a closure."""

    def bend(primals: Sequence[Any]) -> Any:
        return _own_bend(eqn, primals, i, k, primals[i])

    try:
        twice, once = _jaxpr.trace(bend, _avals(eqn)), _traced_slope(eqn, i, k)
    except TypeError:
        return False
    kept, given = (
        {id(x) for x in traced.consts if isinstance(x, jax.core.Tracer)} for traced in (twice, once)
    )
    return kept <= given


def _is_entrywise(eqn: Equation, i: int, k: int) -> bool:
    x, y = eqn.inputs[i], eqn.outputs[k]
    backward = _backward(eqn, i, k)
    return x.shape == y.shape and _jaxpr.passes_entrywise(backward, backward.inputs[-1:], y.shape)


def _has_own_derivatives(eqn: Equation) -> bool:
    """Whether JAX differentiates the backward pass in reverse, at a cost that is bounded."""
    moving = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value) and _jaxpr.is_inexact(v)]
    results = [k for k, v in enumerate(eqn.outputs) if _jaxpr.is_inexact(v)]
    return all(
        not _iterates(_backward(eqn, i, k), called=False)
        and (
            size(eqn.inputs[i].shape) * size(eqn.outputs[k].shape) <= MOST_DERIVATIVES
            or _is_entrywise(eqn, i, k)
        )
        and _turns(eqn, i, k)
        for i, k in itertools.product(moving, results)
    )


def _iterates(program: Program, called: bool = True) -> bool:
    """Whether a program holds a loop of unknown length on the way from its inputs.

    The backward pass of an ODE solver calls the solver: what is ``called`` counts too, or not.
    """
    reached = {v for v in program.inputs if _jaxpr.is_inexact(v)}
    for eqn in program.equations:
        if reached.isdisjoint(v for v in eqn.inputs if isinstance(v, Value)):
            continue
        inside = eqn.bodies if called or eqn.name not in _jaxpr.CUSTOM else ()
        if eqn.name == "while" or any(_iterates(body.program, called) for body in inside):
            return True
        reached.update(v for v in eqn.outputs if _jaxpr.is_inexact(v))
    return False


def _squares(backward: Program, recurse: Any, ys: Sequence[Any], into: Any) -> list[Any]:
    """``(J*J) v``: the transpose of the push of spreads through the backward program."""

    def pushed(*h: Any) -> list[Any]:
        found = recurse.through(backward, [Moments(y, None, h) for y, h in zip(ys, h, strict=True)])
        return [
            jnp.zeros_like(v) if x.spread is None else lax.convert_element_type(x.spread, v.dtype)
            for x, v in zip(found, into, strict=True)
        ]

    wide = [jnp.zeros(y.shape, spread_dtype(y.dtype)) for y in ys]
    return list(jax.linear_transpose(pushed, *wide)(list(into)))


def _signed_squares(
    eqn: Equation, primals: Sequence[Any], back: Any, ys: dict[int, Any], into: dict[int, Any]
) -> list[Any]:
    """``z * J(J^T z * v)`` for the results ``ys``, averaged over signs ``z``."""
    generator = np.random.default_rng(0)
    found: dict[int, Any] = dict.fromkeys(ys)
    for _ in range(SIGNS):
        z = [jnp.asarray(generator.choice([-1.0, 1.0], y.shape), y.dtype) for y in ys.values()]
        of_values = {
            eqn.inputs[i]: u * lax.convert_element_type(into[i], u.dtype)
            for i, u in zip(into, back(z), strict=True)
        }
        pushed = push(eqn, primals, list(map(of_values.get, eqn.inputs)))
        for k, sign in zip(ys, z, strict=True):
            dy = pushed[k]
            wide = lax.convert_element_type(sign * dy / SIGNS, spread_dtype(dy.dtype))
            found[k] = total(found[k], wide)
    return list(found.values())


def _custom_jvp(eqn: Equation, find: Find) -> Any:
    """An activation acts entry by entry: its slope and curvature are those its rule gives.

    Of another function without derivatives in its body, they are the rule's as well.
    """
    if eqn.entrywise:
        return nested
    if _loses_derivatives(eqn, find) or _lacks_a_rule(eqn, find):
        return of_any_function.choose(eqn, find)
    return custom_rule


def _lacks_a_rule(eqn: Equation, find: Find) -> bool:
    return any(
        isinstance(find(e), Unsupported) for body in eqn.bodies for e in body.program.equations
    )


def _custom_vjp(eqn: Equation, find: Find) -> Any:
    """The curvature is that of the body; where that has no derivative, the rule's.

    That is as of ``own_derivatives`` where the body iterates until convergence and is not too
    large, else as of ``own_jacobian``.
    """
    if not _loses_derivatives(eqn, find):
        return custom_rule
    iterates = any(_iterates(body.program) for body in eqn.bodies)
    return own_derivatives if iterates and _has_own_derivatives(eqn) else own_jacobian


def _loses_derivatives(eqn: Equation, find: Find) -> bool:
    """Whether a body depends on its operands in a way that has no derivative."""
    moving = [isinstance(v, Value) and _jaxpr.is_inexact(v) for v in eqn.inputs]
    return any(_loses(body.program, moving, find) for body in eqn.bodies)


def _loses(program: Program, moving: Sequence[bool], find: Find) -> bool:
    """Whether an output depends on what moves by way of a rounding, a comparison or a ``while``.

    What only chooses between values, or picks some by their indices, does not count.
    """
    reached = {v for v, moves in zip(program.inputs, moving, strict=True) if moves}
    lost: set[Any] = set()
    for eqn in program.equations:
        read = [v for v in eqn.inputs if isinstance(v, Value)]
        if eqn.name in CHOICES:
            read = [v for v in read if _jaxpr.is_inexact(v)]
        if eqn.name == "stop_gradient":
            continue
        if not lost.isdisjoint(read):
            lost.update(eqn.outputs)
        if reached.isdisjoint(read):
            continue
        if eqn.name == "while":
            return True
        rule = find(eqn)
        inner = () if eqn.name in _jaxpr.CUSTOM else eqn.bodies
        if isinstance(rule, PiecewiseConstant) or any(
            _loses(body.program, [_jaxpr.is_inexact(v) for v in body.program.inputs], find)
            for body in inner
        ):
            lost.update(eqn.outputs)
            continue
        reached.update(v for v in eqn.outputs if _jaxpr.is_inexact(v))
        lost.update(v for v in eqn.outputs if not _jaxpr.is_inexact(v))
    return any(v in lost for v in program.outputs if isinstance(v, Value) and _jaxpr.is_inexact(v))


def _high(eqn: Equation, find: Find) -> Any:
    """A primitive of arrays has the derivatives that it defines, as `custom_jvp` functions have."""
    if _jaxpr.has_own_types(eqn):
        return Unsupported(OWN_TYPES)
    return nested if eqn.entrywise else of_any_function.choose(eqn, find)


custom_vjp = ByEquation(_custom_vjp)
high = ByEquation(_high)
custom_jvp = ByEquation(_custom_jvp)
of_any_function = matrix_function()
