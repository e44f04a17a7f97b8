"""How much a program computes: multiplications, and its largest array."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend import core

from hesscale_jax._jaxpr.sizes import sizes

__all__ = ["Work", "work"]


class Work(NamedTuple):
    """About what a program takes.

    Attributes:
      multiplications: Those of its products of arrays, and one for each entry of what else it
        computes, in loops of unknown length those of one step.
      largest: The entries of its largest array.
    """

    multiplications: int = 0
    largest: int = 0


def work(equations: Iterable[Any]) -> Work:
    """What equations of a program or of a jaxpr take, with all branches of each choice."""
    total = Work()
    for eqn in equations:
        inner = [work(jaxpr.eqns) for jaxpr in core.jaxprs_in_params(eqn.params)]
        once = sum(each.multiplications for each in inner) or _multiplications(eqn)
        steps = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        sizes_here = [*(each.largest for each in inner), *map(_entries, _results(eqn))]
        total = Work(total.multiplications + steps * once, max(total.largest, *sizes_here, 0))
    return total


def _multiplications(eqn: Any) -> int:
    """Those of an equation that runs no others."""
    results = sum(map(_entries, _results(eqn)))
    match eqn.primitive.name:
        case "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            shape = _shape(_operands(eqn)[0])
            return results * math.prod(shape[i] for i in summed)
        case "conv_general_dilated":
            kernel = _operands(eqn)[1]
            return results * _entries(kernel) // max(1, _shape(kernel)[_features(eqn)])
    return results


def _features(eqn: Any) -> int:
    """The axis of a convolution's kernel that the result has."""
    return int(eqn.params["dimension_numbers"].rhs_spec[0])


def _operands(eqn: Any) -> Any:
    return eqn.inputs if hasattr(eqn, "inputs") else eqn.invars


def _results(eqn: Any) -> Any:
    return eqn.outputs if hasattr(eqn, "outputs") else eqn.outvars


def _entries(x: Any) -> int:
    return math.prod(_shape(x))


def _shape(x: Any) -> tuple[int, ...]:
    shape = getattr(x.aval if hasattr(x, "aval") else x, "shape", ())
    return tuple(map(int, sizes(shape)))
