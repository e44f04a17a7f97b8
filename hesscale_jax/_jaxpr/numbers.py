"""What a program computes of numbers alone, known while tracing."""

from collections.abc import Mapping
from typing import Any

import jax

from hesscale_jax._jaxpr.binding import bind, listed
from hesscale_jax._jaxpr.program import Constant, Equation, Value, is_inexact
from hesscale_jax._jaxpr.rewriting import ENTRYWISE, SHORT
from hesscale_jax._jaxpr.sizes import size

__all__ = ["Numbers"]

# What positions are computed with besides: of integers, the same to the bit in any program.
OF_INTEGERS = {"concatenate", "cumsum", "gather", "pad", "reduce_sum", "rev", "scatter-add"}
OF_INTEGERS |= {"slice", "sort", "transpose"}


class Numbers:
    """Values that are computed of few numbers alone, by those that were made."""

    def __init__(self, made: Mapping[Any, Equation]) -> None:
        self._made = made
        self._known: dict[Any, Any] = {}

    def of(self, atom: Any) -> Any:
        """What is computed of numbers alone; ``None`` if it is not, or is large."""
        if isinstance(atom, Constant):
            count = size(atom.shape)
            if not isinstance(count, int) or count > SHORT:
                return None
            return None if isinstance(atom.value, jax.core.Tracer | jax.Ref) else atom.value
        if atom not in self._known:
            self._known[atom] = self._computed(atom)
        return self._known[atom]

    def _computed(self, value: Value) -> Any:
        eqn = self._made.get(value)
        if eqn is None or eqn.sources[0].effects:
            return None
        if eqn.name not in ENTRYWISE | {"iota"} and (
            is_inexact(value) or eqn.name not in OF_INTEGERS
        ):
            return None
        if not isinstance(size(value.shape), int) or size(value.shape) > SHORT:
            return None
        operands = list(map(self.of, eqn.inputs))
        if any(x is None for x in operands):
            return None
        with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
            return listed(bind(eqn, *operands), eqn)[eqn.outputs.index(value)]
