"""How a rule is looked up."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
from jax.extend import core

from hesscale_jax._jaxpr import Constant, Equation, label, location
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.rules.unsupported import UNSUPPORTED

__all__ = ["ByEquation", "PiecewiseConstant", "Unsupported", "find"]

Find = Callable[[Equation], Any]

COMPLEX = (
    "complex values have to be written out in their real and imaginary parts, and for this primitive "
    "there is no such form"
)

# Their result is not what they change, so that a path would end here unseen.
STORES = frozenset({"accum_grad_in_ref", "addupdate", "masked_swap", "swap"})


class PiecewiseConstant:
    """Primitives without a derivative (sign, floor, comparisons, stop_gradient): a path ends."""


@dataclasses.dataclass(frozen=True)
class ByEquation:
    """An entry of the table for a primitive whose family depends on its parameters.

    Attributes:
      choose: ``(eqn, find) -> rule``, or ``None`` if there is none; ``find`` looks up the rule of
        an equation that ``eqn`` holds.
    """

    choose: Callable[[Equation, Find], Any]


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """The rule of an equation that has none: it says why.

    Attributes:
      reason: Why there is none, if that is known.
      curable: Whether another table could have a rule.
    """

    reason: str = ""
    curable: bool = True

    def __call__(self, eqn: Equation, operands: Sequence[Any], recurse: Any) -> NoReturn:
        """Raise the error, with the user's line."""
        raise UnsupportedPrimitiveError(label(eqn), location(eqn), self.reason, self.curable)


def find(rules: Mapping[Any, Any], eqn: Equation) -> Any:
    """The rule of an equation on a path: by its primitive, its label, or the primitive's name."""
    keys = (eqn.primitive, label(eqn), eqn.name)
    rule = next((rules[key] for key in keys if key in rules), None)
    if isinstance(rule, ByEquation):
        rule = rule.choose(eqn, lambda inner: find(rules, inner))
    if isinstance(rule, PiecewiseConstant):
        return rule
    if rule is None and eqn.name in STORES:
        Unsupported(UNSUPPORTED[eqn.name], curable=False)(eqn, (), None)
    if _is_complex(eqn):
        return Unsupported(COMPLEX, curable=False)
    return Unsupported(UNSUPPORTED.get(eqn.name, "")) if rule is None else rule


def _is_complex(eqn: Equation) -> bool:
    """Whether an equation has complex values; one that holds a jaxpr may have some off the path."""
    if any(_holds_jaxpr(value) for value in eqn.params.values()):
        return False
    values = (*(v for v in eqn.inputs if not isinstance(v, Constant)), *eqn.outputs)
    return any(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in values)


def _holds_jaxpr(parameter: Any) -> bool:
    if isinstance(parameter, tuple | list):
        return any(map(_holds_jaxpr, parameter))
    return isinstance(parameter, core.Jaxpr | core.ClosedJaxpr)
