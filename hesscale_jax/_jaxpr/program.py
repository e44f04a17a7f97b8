"""A traced function as equations, and what they run."""

import dataclasses
import functools
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from hesscale_jax._jaxpr.sizes import sizes

__all__ = [
    "CALLS",
    "CUSTOM",
    "HIGH",
    "Body",
    "Constant",
    "Equation",
    "Program",
    "Region",
    "Value",
    "as_closed",
    "aval_of",
    "called",
    "is_inexact",
    "literal",
    "region_inside",
    "scan_groups",
]


# Calls that only group equations: they are written out, so that a block can cross their border.
CALLS = frozenset({"jit", "remat2", "checkpoint", "call", "closed_call", "eval_jaxpr"})

# A primitive of arrays or of types of its own that JAX expands to others, with its own derivative.
HIGH = "call_hi_primitive"

# Functions with a derivative rule of their own.
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """The result of an equation, or an input of the program. Equal only to itself."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in numbers that can be compared, for the analysis of a program."""
        return sizes(self.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


@dataclasses.dataclass(eq=False, slots=True)
class Constant:
    """An operand known while tracing: a literal, or an array the loss closes over."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    @property
    def dtype(self) -> Any:
        return self.value.dtype


@dataclasses.dataclass(eq=False, slots=True)
class Region:
    """A call of ``jax.checkpoint``: what is computed in it is computed again for the transpose."""

    options: dict[str, Any]  # of jax.checkpoint
    parent: "Region | None"


@dataclasses.dataclass(eq=False)
class Equation:
    """One application of a primitive: ``outputs = primitive(*inputs, **params)``."""

    primitive: core.Primitive
    params: dict[str, Any]
    inputs: tuple[Any, ...]  # each a Value or a Constant
    outputs: tuple[Value, ...]
    sources: tuple[core.JaxprEqn, ...]  # where it comes from, then the calls around it
    region: Region | None = None  # the innermost around it
    ruled: Container[Any] = ()  # what its programs take as it is

    @property
    def name(self) -> str:
        return self.primitive.name

    @functools.cached_property
    def entrywise(self) -> bool:
        """Whether it is a function with a rule of its own that acts entry by entry."""
        from hesscale_jax._jaxpr.bodies import acts_entrywise  # which flattens programs itself

        return acts_entrywise(self)

    @functools.cached_property
    def bodies(self) -> "tuple[Body, ...]":
        """The programs that it runs: a loop's, each branch's, a function's with its own rule."""
        from hesscale_jax._jaxpr.bodies import bodies_of

        return tuple(bodies_of(self))


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """A function as equations in program order."""

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Any]  # each a Value or a Constant


@dataclasses.dataclass(eq=False, slots=True)
class Body:
    """A program that an equation runs, once or in a loop.

    Attributes:
      program: The program. Its outputs are the equation's.
      inputs: Which operand of the equation each input of the program takes.
      carry: The outputs of a loop's step that are inputs of the next one: output -> input.
    """

    program: Program
    inputs: Sequence[int]
    carry: dict[int, int] = dataclasses.field(default_factory=dict)


def literal(atom: Any) -> Any:
    """The value of a literal, with a dtype: a ``bool`` of Python has none."""
    return atom.val if hasattr(atom.val, "dtype") else np.asarray(atom.val, atom.aval.dtype)


def is_inexact(value: Value | Constant) -> bool:
    """Whether derivatives can flow through a value of this dtype."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def aval_of(x: Value | Constant) -> Any:
    return x.aval if isinstance(x, Value) else jax.typeof(x.value)


def region_inside(call: Any, parent: Region | None) -> Region | None:
    """The region inside a call: a new one if it is of ``jax.checkpoint``."""
    if "policy" not in call.params:
        return parent
    return Region({name: call.params[name] for name in ("policy", "prevent_cse")}, parent)


def called(call: Any) -> core.ClosedJaxpr:
    """The jaxpr that a call of ``CALLS`` runs."""
    return as_closed(call.params.get("jaxpr") or call.params["call_jaxpr"])


def as_closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def scan_groups(eqn: Any) -> tuple[range, range, range]:
    """The positions of a ``scan``'s operands: constants, carry, and what is scanned over."""
    if "ft_in" in eqn.params:
        consts, carry, _ = (len(group) for group in eqn.params["ft_in"].unpack())
    else:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    count = len(eqn.inputs if isinstance(eqn, Equation) else eqn.invars)
    bounds = (0, consts, consts + carry, count)
    groups = (range(lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False))
    return next(groups), next(groups), next(groups)
