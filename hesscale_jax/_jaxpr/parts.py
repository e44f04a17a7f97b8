"""Equations on complex values as equations on their real and imaginary parts."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core

from hesscale_jax import _complex
from hesscale_jax._complex import Complex, is_complex
from hesscale_jax._jaxpr.binding import listed
from hesscale_jax._jaxpr.program import Equation, Value, as_closed, scan_groups

__all__ = ["of_shape", "real_aval", "with_parts"]


def real_aval(aval: Any) -> Any:
    """The type of a part of a complex value, or of a real one."""
    return aval.update(dtype=_complex.real_dtype(aval)) if is_complex(aval) else aval


def of_shape(x: Any, value: Value) -> Any:
    """A result with each part that is no float in the shape of the value."""
    if not isinstance(x, Complex):
        return x
    parts = zip(x, _complex.filled(x, value), strict=True)
    return Complex(*(part if isinstance(part, float) else array for part, array in parts))


def with_parts(eqn: Any) -> Any:
    """How to run a program on the parts of complex operands, and hand out those of results."""
    match eqn.primitive.name:
        case "scan":
            return _scan_in_parts
        case "cond":
            return _cond_in_parts
        case "custom_jvp_call":
            return _custom_jvp_in_parts
        case "custom_vjp_call":
            return _custom_vjp_in_parts
    return None


def _on_parts(jaxpr: Any) -> Callable[..., list[Any]]:
    """A program as a function of operands, each real or in parts, that returns such results."""
    run = core.jaxpr_as_fun(as_closed(jaxpr))
    return lambda *operands: [_complex.apart(y) for y in run(*map(_complex.together, operands))]


def _scan_in_parts(eqn: Equation, bind: Any, *operands: Any) -> list[Any]:
    step = _on_parts(eqn.params["jaxpr"])
    operands = tuple(map(_complex.filled, operands, eqn.inputs))
    consts, carry, xs = ([operands[i] for i in group] for group in scan_groups(eqn))

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = step(*consts, *carry, *xs)
        return results[: len(carry)], results[len(carry) :]

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, xs, **how)
    results = [*carry, *ys]
    return results if len(results) > 1 else results[0]


def _cond_in_parts(eqn: Equation, bind: Any, which: Any, *operands: Any) -> list[Any]:
    operands = tuple(map(_complex.filled, operands, eqn.inputs[1:]))
    results = lax.switch(which, list(map(_on_parts, eqn.params["branches"])), *operands)
    return results if len(results) > 1 else results[0]


def _custom_jvp_in_parts(eqn: Equation, bind: Any, *operands: Any) -> Any:
    leaves, tree = jax.tree.flatten(list(map(_complex.filled, operands, eqn.inputs)))
    definition, rule = _of_leaves(eqn, bind, tree)
    function = jax.custom_jvp(definition)
    function.defjvp(lambda primals, tangents: jax.jvp(rule, primals, tangents))
    results = function(*leaves)
    return results if len(results) > 1 else results[0]


def _custom_vjp_in_parts(eqn: Equation, bind: Any, *operands: Any) -> Any:
    leaves, tree = jax.tree.flatten(list(map(_complex.filled, operands, eqn.inputs)))
    definition, rule = _of_leaves(eqn, bind, tree)
    function = jax.custom_vjp(definition)
    function.defvjp(lambda *leaves: jax.vjp(rule, *leaves), lambda pullback, g: pullback(g))
    results = function(*leaves)
    return results if len(results) > 1 else results[0]


def _of_leaves(eqn: Equation, bind: Any, tree: Any) -> tuple[Any, Any]:
    """A function with a derivative rule, by its definition and by its rule, of operands' parts."""
    run = _on_parts(eqn.params["call_jaxpr"])

    def definition(*leaves: Any) -> list[Any]:
        return run(*jax.tree.unflatten(tree, leaves))

    def rule(*leaves: Any) -> list[Any]:
        results = bind(*map(_complex.together, jax.tree.unflatten(tree, leaves)))
        return list(map(_complex.apart, listed(results, eqn)))

    definition.__name__ = eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
    return definition, rule
