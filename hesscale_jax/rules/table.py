"""How a rule is looked up."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from hesscale_jax._jaxpr import Equation, complex_primitive, label, location
from hesscale_jax.errors import ComplexValuesError, UnsupportedPrimitiveError
from hesscale_jax.rules.unsupported import UNSUPPORTED

__all__ = ["ByEquation", "ComplexValues", "PiecewiseConstant", "Unsupported", "find"]

Find = Callable[[Equation], Any]

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


class ComplexValues(Unsupported):
    """The same for an equation on complex values."""

    def __call__(self, eqn: Equation, operands: Sequence[Any], recurse: Any) -> NoReturn:
        """Raise the error, with the user's line."""
        raise ComplexValuesError(complex_primitive(eqn) or eqn.name, location(eqn), self.reason)


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
    if complex_primitive(eqn) is not None:
        return ComplexValues("no form in real and imaginary parts", curable=False)
    return Unsupported(UNSUPPORTED.get(eqn.name, "")) if rule is None else rule
