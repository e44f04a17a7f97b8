"""How a rule is looked up."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hesscale_jax._jaxpr import Equation

__all__ = ["ByEquation", "find"]

Find = Callable[[Equation], Any]


@dataclasses.dataclass(frozen=True)
class ByEquation:
    """An entry of the table for a primitive whose family depends on its parameters.

    Attributes:
      choose: ``(eqn, find) -> rule``, or ``None`` if there is none; ``find`` looks up the rule of
        an equation that ``eqn`` holds.
    """

    choose: Callable[[Equation, Find], Any]


def find(rules: Mapping[Any, Any], eqn: Equation) -> Any:
    """The rule of an equation, by its primitive or the primitive's name; ``None`` without one."""
    rule = rules.get(eqn.primitive, rules.get(eqn.name))
    if isinstance(rule, ByEquation):
        return rule.choose(eqn, lambda inner: find(rules, inner))
    return rule
