"""What the jaxprs of equations hold, and whether two are the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core

from hesscale_jax._complex import is_complex
from hesscale_jax._jaxpr.program import Equation, Value
from hesscale_jax._jaxpr.sources import label
from hesscale_jax._mesh import varying_axes

__all__ = [
    "WHOLE",
    "complex_primitive",
    "has_own_types",
    "holds_callback",
    "holds_custom_vjp",
    "holds_float16",
    "holds_name",
    "inner_equations",
    "same_parameter",
    "structure",
    "transform",
    "varies",
    "zero_outputs",
]


# What makes a complex value of its parts.
WHOLE = frozenset({"complex", "convert_element_type"})


def holds_callback(params: dict[str, Any]) -> bool:
    """Whether Python is called anywhere within the jaxprs of an equation."""
    return any("callback" in eqn.primitive.name for eqn in inner_equations(params))


def holds_custom_vjp(params: dict[str, Any]) -> bool:
    """Whether a function without a forward derivative is called within an equation's jaxprs."""
    return any(eqn.primitive.name == "custom_vjp_call" for eqn in inner_equations(params))


def holds_name(name: str, params: dict[str, Any]) -> bool:
    """Whether ``checkpoint_name`` gives a value this name within the jaxprs of an equation."""
    return any(
        eqn.primitive.name == "name" and eqn.params["name"] == name
        for eqn in inner_equations(params)
    )


def holds_float16(params: dict[str, Any]) -> bool:
    """Whether anything is computed in float16 within the jaxprs of an equation."""
    values = (v.aval for eqn in inner_equations(params) for v in (*eqn.invars, *eqn.outvars))
    return any(getattr(aval, "dtype", None) == np.float16 for aval in values)


def inner_equations(params: dict[str, Any]) -> Iterator[core.JaxprEqn]:
    """The equations of the jaxprs among parameters, and of those within."""
    for jaxpr in core.jaxprs_in_params(params):
        for eqn in jaxpr.eqns:
            yield eqn
            yield from inner_equations(eqn.params)


def varies(value: Value) -> bool:
    """Whether a value's type says that it differs over the devices of a ``shard_map``."""
    return bool(varying_axes(value.aval))


def complex_primitive(eqn: Equation) -> str | None:
    """The primitive on complex values at an equation; ``None`` if it has none.

    One that holds a jaxpr may have some off the path. An equation that makes a complex value of its
    parts is there for the sake of another.
    """
    if any(map(_holds_jaxpr, eqn.params.values())):
        return None
    values = (*(v for v in eqn.inputs if isinstance(v, Value)), *eqn.outputs)
    if not any(is_complex(v.aval) for v in values):
        return None
    return eqn.sources[0].primitive.name if eqn.name in WHOLE else label(eqn)


def _holds_jaxpr(parameter: Any) -> bool:
    if isinstance(parameter, tuple | list):
        return any(map(_holds_jaxpr, parameter))
    return isinstance(parameter, core.Jaxpr | core.ClosedJaxpr)


def same_parameter(a: Any, b: Any) -> bool:
    if isinstance(a, (core.ClosedJaxpr, core.Jaxpr)):
        return isinstance(b, type(a)) and structure(a) == structure(b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def zero_outputs(closed: core.ClosedJaxpr) -> list[bool]:
    """Which outputs are zero whatever the inputs: a literal 0, perhaps broadcast."""
    made_by = {var: eqn for eqn in closed.jaxpr.eqns for var in eqn.outvars}

    def is_zero(atom: Any) -> bool:
        if isinstance(atom, core.Literal):
            return bool(atom.val == 0)
        eqn = made_by.get(atom)
        return (
            eqn is not None and eqn.primitive.name == "broadcast_in_dim" and is_zero(eqn.invars[0])
        )

    return list(map(is_zero, closed.jaxpr.outvars))


def structure(jaxpr: Any) -> tuple[Any, ...]:
    """A key equal for two jaxprs exactly when they are the same computation, names aside."""
    closed_over = tuple(map(id, getattr(jaxpr, "consts", ())))
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    number: dict[Any, int] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        number[var] = len(number)

    def key(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return ("literal", str(atom.aval), repr(atom.val))
        return number[atom]

    def parameter(value: Any) -> Any:
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            return structure(value)
        if isinstance(value, np.ndarray):
            return (value.shape, str(value.dtype), value.tobytes())
        return id(value) if callable(value) else repr(value)

    lines = []
    for eqn in jaxpr.eqns:
        params = tuple((k, parameter(v)) for k, v in sorted(eqn.params.items()))
        lines.append((eqn.primitive.name, params, tuple(map(key, eqn.invars))))
        for var in eqn.outvars:
            number[var] = len(number)
    avals = tuple(str(v.aval) for v in jaxpr.invars)
    return (closed_over, avals, tuple(lines), tuple(map(key, jaxpr.outvars)))


def transform(eqn: Equation) -> tuple[Any, tuple[int, ...]]:
    """The kind and the lengths of a Fourier transform of parts."""
    (fft,) = (e for e in eqn.params["call_jaxpr"].jaxpr.eqns if e.primitive.name == "fft")
    return fft.params["fft_type"], fft.params["fft_lengths"]


def has_own_types(eqn: Equation) -> bool:
    """Whether it takes or returns what is no array."""
    values = [v for v in (*eqn.inputs, *eqn.outputs) if isinstance(v, Value)]
    return not all(hasattr(v.aval, "dtype") for v in values)
