"""Functions with a derivative rule of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from hesscale_jax import _complex
from hesscale_jax._complex import is_complex
from hesscale_jax._jaxpr.binding import bind, listed, trace
from hesscale_jax._jaxpr.inspection import WHOLE, same_parameter
from hesscale_jax._jaxpr.program import Constant, Equation, Value, is_inexact
from hesscale_jax._jaxpr.sources import ONE_RESULT, function_name

__all__ = [
    "along",
    "compute_the_same",
    "derivative_jaxpr",
    "expansion_by_rule",
    "is_own",
    "moved_results",
    "of_values",
    "one_by_one",
]


def compute_the_same(a: Equation, b: Equation) -> bool:
    """Whether two applications of a primitive to the same operands compute the same."""
    if a.name == "custom_jvp_call":
        # Its derivative rule is a new closure on every trace: compare what the rules compute.
        definitions = (eqn.params["call_jaxpr"] for eqn in (a, b))
        return same_parameter(*definitions) and same_parameter(
            derivative_jaxpr(a), derivative_jaxpr(b)
        )
    if a.name in WHOLE and is_complex(a.outputs[0].aval) and a.sources[0] is not b.sources[0]:
        return False  # each is there for the equation that reads it, and an error names that
    return a.params.keys() == b.params.keys() and all(
        same_parameter(value, b.params[key]) for key, value in a.params.items()
    )


def derivative_jaxpr(eqn: Equation) -> core.ClosedJaxpr:
    """The function and its derivative in every floating argument, as a jaxpr.

    In what it closes over, the leading operands, it has none: JAX raises where one is asked for.
    """
    values = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value)]
    arguments = range(eqn.params["num_consts"], len(eqn.inputs))
    moving = [i for i in values if i in arguments and is_inexact(eqn.inputs[i])]
    constants = [v.value if isinstance(v, Constant) else None for v in eqn.inputs]

    def with_derivative(primals: list[Any], tangents: list[Any]) -> Any:
        operands = list(constants)
        for i, primal in zip(values, primals, strict=True):
            operands[i] = primal
        start = [operands[i] for i in moving]
        return jax.jvp(along(eqn, operands, moving), start, tangents)

    primals, tangents = ([eqn.inputs[i].aval for i in at] for at in (values, moving))
    return trace(with_derivative, primals, tangents)


def moved_results(eqn: Equation, positions: Sequence[int]) -> list[bool]:
    """Which results of a custom_jvp function move with these operands, by its derivative rule."""
    jaxpr = derivative_jaxpr(eqn).jaxpr
    values = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value)]
    own = [i for i in values if i >= eqn.params["num_consts"] and is_inexact(eqn.inputs[i])]
    tangents = zip(own, jaxpr.invars[len(values) :], strict=True)
    reached = {v for i, v in tangents if i in positions}
    for inner in jaxpr.eqns:
        if not reached.isdisjoint(v for v in inner.invars if not hasattr(v, "val")):
            reached.update(inner.outvars)
    derivatives = jaxpr.outvars[len(eqn.outputs) :]
    return [not hasattr(v, "val") and v in reached for v in derivatives]


def along(eqn: Equation, primals: Sequence[Any], positions: Sequence[int]) -> Callable[..., Any]:
    """The equation as a function of the operands at ``positions`` alone."""

    def function(*operands: Any) -> Any:
        replaced = list(primals)
        for position, operand in zip(positions, operands, strict=True):
            replaced[position] = operand
        return bind(eqn, *replaced)

    return function


def of_values(
    eqn: Equation, primals: Sequence[Any], positions: Sequence[int]
) -> Callable[..., Any]:
    """The equation as a function of the values at ``positions``, wherever it takes them."""

    def function(*operands: Any) -> Any:
        given = dict(zip((eqn.inputs[i] for i in positions), operands, strict=True))
        return bind(eqn, *(given.get(v, x) for v, x in zip(eqn.inputs, primals, strict=True)))

    return function


def is_own(eqn: Equation) -> bool:
    """Whether it stands for a primitive on complex values, which is its body."""
    return function_name(eqn).startswith(_complex.own(""))


def one_by_one(eqn: Any) -> Callable[..., list[Any]]:
    """A function with a ``jvp`` rule of its own and several results, as a function for each.

    Integer results are left out.
    """

    def single(k: int) -> Any:
        def result(*operands: Any) -> Any:
            return bind(eqn, *operands)[k]

        result.__name__ = f"{ONE_RESULT}{function_name(eqn)}.{k}"
        function = jax.custom_jvp(result)
        function.defjvp(lambda primals, tangents: jax.jvp(result, primals, tangents))
        return function

    inexact = [k for k, v in enumerate(eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return lambda *operands: [single(k)(*operands) for k in inexact]


def expansion_by_rule(eqn: Equation, moving: Sequence[int], order: int) -> Callable[..., list[Any]]:
    """``f(x0) + f'(x0 + d/2) d`` for ``x0 + d`` at ``d = 0``: as ``f`` to second order.

    To first order, ``f(x0) + f'(x0) d``. What is infinite does not vary.
    """

    def function(*xs: Any) -> list[Any]:
        given = iter(xs)
        operands = [x.value if isinstance(x, Constant) else next(given) for x in eqn.inputs]
        start = [lax.stop_gradient(operands[i]) for i in moving]
        steps = [_if_finite(operands[i] - x) for i, x in zip(moving, start, strict=True)]
        middle = start if order == 1 else [x + d / 2 for x, d in zip(start, steps, strict=True)]
        fun = along(eqn, operands, moving)
        _, changes = jax.jvp(lambda *xs: listed(fun(*xs), eqn), middle, steps)
        ys = listed(fun(*start), eqn)
        return [y + _if_finite(dy) for y, dy in zip(ys, changes, strict=True)]

    return function


def _if_finite(x: Any) -> Any:
    return lax.select(lax.is_finite(x), x, lax.full_like(x, 0))
