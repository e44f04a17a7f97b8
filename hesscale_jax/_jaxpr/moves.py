"""What moves entries, and what puts them back."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hesscale_jax._jaxpr.numbers import Numbers
from hesscale_jax._jaxpr.program import Constant, Equation, Value
from hesscale_jax._jaxpr.rewriting import FEW

__all__ = ["Moves", "are_plain"]


# What selects all of its operand's entries if the shapes are the same.
SELECTS_ALL = frozenset({"concatenate", "dynamic_slice", "pad", "reshape", "slice", "split"})
SELECTS_ALL |= {"transpose"}

VIEWS = frozenset({"reshape", "squeeze"})

# What may put entries back to where they were.
UNDOES = VIEWS | {"concatenate", "gather", "rev", "slice", "stack", "transpose"}


def are_plain(atoms: Sequence[Any]) -> bool:
    """Whether none of them is complex in parts."""
    return all(isinstance(x, Value | Constant) for x in atoms)


def _sharded_alike(x: Any, var: Any) -> bool:
    """Whether a value has the sharding that its type says, as under ``AxisType.Explicit``."""
    return not isinstance(x, Value) or x.aval.sharding == var.aval.sharding


def _is_identity(eqn: Any) -> bool:
    """Whether an equation selects all entries of its operand, where they are."""
    if eqn.primitive.name not in SELECTS_ALL:
        return False
    x, *_ = (v.aval for v in eqn.invars)
    if len(eqn.outvars) > 1 or x.shape != eqn.outvars[0].aval.shape:
        return False
    match eqn.primitive.name:
        case "pad":
            return all(edge == (0, 0, 0) for edge in eqn.params["padding_config"])
        case "slice":
            return all(by == 1 for by in eqn.params["strides"] or ())
        case "transpose":
            return tuple(eqn.params["permutation"]) == tuple(range(len(x.shape)))
        case "concatenate":
            return len(eqn.invars) == 1
        case _:
            return True


Slices = tuple[tuple[int, int], ...]  # where each axis starts and ends


def _slices(eqn: Any) -> Slices | None:
    params = eqn.params
    if any(by != 1 for by in params["strides"] or ()):
        return None
    return tuple(zip(params["start_indices"], params["limit_indices"], strict=True))


def _placed(eqn: Equation) -> dict[Slices | None, Any]:
    """The operands that lie in an equation's result as they are, by where."""
    (shape, *_), result = [x.shape for x in eqn.inputs] or [()], eqn.outputs[0].shape
    match eqn.name:
        case "concatenate":
            laid = _laid(result, [x.shape for x in eqn.inputs], eqn.params["dimension"])
            return dict(zip(laid, eqn.inputs, strict=True))
        case "pad":
            edges = eqn.params["padding_config"]
            if any(low < 0 or high < 0 or between for low, high, between in edges):
                return {}
            at = tuple((low, low + n) for (low, _, _), n in zip(edges, shape, strict=True))
            return {at: eqn.inputs[0]}
        case "tile" if math.prod(eqn.params["reps"]) <= FEW:
            copies = itertools.product(*map(range, eqn.params["reps"]))
            spans = (
                tuple((k * n, (k + 1) * n) for k, n in zip(copy, shape, strict=True))
                for copy in copies
            )
            return dict.fromkeys(spans, eqn.inputs[0])
        case _:
            return {}


def _joined_again(slices: list[Any], axis: int, shape: Sequence[int]) -> Any:
    """The value that slices along an axis follow one another of, if they are all of it."""
    source = slices[0].inputs[0]
    if any(x.inputs[0] is not source for x in slices) or source.shape != tuple(shape):
        return None
    laid = _laid(source.shape, [x.outputs[0].shape for x in slices], axis)
    return source if list(map(_slices, slices)) == laid else None


def _laid(shape: Sequence[int], parts: Sequence[Sequence[int]], axis: int) -> list[Slices]:
    """Where parts lie that follow one another along an axis."""
    ends = list(itertools.accumulate((part[axis] for part in parts), initial=0))
    return [
        tuple((ends[k], ends[k + 1]) if i == axis else (0, n) for i, n in enumerate(shape))
        for k in range(len(parts))
    ]


class Moves:
    """What moves entries in a program, by what was made of what."""

    def __init__(self, made: Mapping[Any, Equation], numbers: Numbers) -> None:
        self._made = made
        self._numbers = numbers

    def unmoved(self, eqn: Any, inputs: Sequence[Any]) -> Any:
        """The value that an equation yields as it is, where nothing moves or all is put back."""
        x = inputs[0] if _is_identity(eqn) else self._undone(eqn, inputs)
        return x if x is not None and _sharded_alike(x, eqn.outvars[0]) else None

    def _undone(self, eqn: Any, inputs: Sequence[Any]) -> Any:
        """The value whose entries an equation puts back, if it undoes what moved them."""
        if eqn.primitive.name not in UNDOES or not are_plain(inputs):
            return None
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        if name in ("gather", "rev"):
            axis, source, positions = self._taken(eqn, inputs)
            if source is not None and source.shape == shape:
                return source if (positions == np.arange(shape[axis])).all() else None
        if name == "concatenate" and (whole := [x for x in inputs if x.shape == shape]):
            return whole[0]  # beside what is empty
        made: list[Any] = [self._made.get(x) if isinstance(x, Value) else None for x in inputs]
        if not made or any(x is None for x in made):
            return None
        first, *others = made
        match name:
            case "reshape" | "squeeze" if first.name in VIEWS:
                return first.inputs[0] if first.inputs[0].shape == shape else None
            case "rev" if first.name == "rev":
                back = set(eqn.params["dimensions"]) == set(first.params["dimensions"])
                return first.inputs[0] if back else None
            case "transpose" if first.name == "transpose":
                there, here = first.params["permutation"], eqn.params["permutation"]
                back = all(there[axis] == i for i, axis in enumerate(here))
                return first.inputs[0] if back else None
            case "slice":
                return _placed(first).get(_slices(eqn))
            case "stack" if first.name == "unstack":
                back = all(x is first for x in others) and inputs == first.outputs
                back = back and eqn.params["axis"] == first.params["axis"]
                return first.inputs[0] if back else None
            case "stack":
                slices = [self._made.get(x.inputs[0]) for x in made if x.name in VIEWS]
                if len(slices) < len(made) or any(x is None or x.name != "slice" for x in slices):
                    return None
                return _joined_again(slices, eqn.params["axis"], shape)
            case "concatenate" if first.name == "split":
                back = all(x is first for x in others) and inputs == first.outputs
                back = back and eqn.params["dimension"] == first.params["axis"]
                return first.inputs[0] if back else None
            case "concatenate" if all(x.name == "slice" for x in made):
                return _joined_again(made, eqn.params["dimension"], shape)
        return None

    def _taken(self, eqn: Any, inputs: Sequence[Any]) -> tuple[int, Any, np.ndarray]:
        """The axis, the value and the positions that entries are taken from, if they are known.

        Where they are taken from what was taken itself, those of that. No value if there is none.
        """
        x, nothing = inputs[0], (0, None, np.zeros(0))
        if eqn.primitive.name == "rev":
            axes = eqn.params["dimensions"]
            if len(axes) != 1 or not isinstance(x.shape[axis := axes[0]], int):
                return nothing
            return self._composed(x, axis, np.arange(x.shape[axis])[::-1])
        numbers, found = eqn.params["dimension_numbers"], self._numbers.of(inputs[1])
        if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
            return nothing
        (axis,), rank = numbers.collapsed_slice_dims, len(x.shape)
        rest = tuple(i for i in range(rank) if i != axis)
        along = all(eqn.params["slice_sizes"][i] == x.shape[i] for i in rest)
        if numbers.start_index_map != (axis,) or numbers.offset_dims != rest or not along:
            return nothing
        if found is None or np.ndim(found) != 2 or not isinstance(x.shape[axis], int):
            return nothing
        positions = np.asarray(found)[:, 0]
        if not ((positions >= 0) & (positions < x.shape[axis])).all():
            return nothing
        return self._composed(x, axis, positions)

    def _composed(self, x: Any, axis: int, positions: np.ndarray) -> tuple[int, Any, np.ndarray]:
        """Positions of ``x`` along an axis as those of what ``x`` was taken from itself."""
        before = self._made.get(x) if isinstance(x, Value) else None
        if before is not None and before.name in ("gather", "rev"):
            first, source, at = self._taken(before, before.inputs)
            if source is not None and first == axis:
                return axis, source, at[positions]
        return axis, x, positions
