"""Which programs compute each example of a batch by itself, and how they compute one.

The outputs hold the examples along an axis. From there back through the equations, what is read
must hold them along an axis too, or be read as a whole by every example, as parameters are. A value
that would have to be both mixes them, as the mean of batch normalisation does.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Program, Value
from hesscale_jax.blocks import Plan
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import push

__all__ = ["Examples", "Mixed"]


class Mixed(Exception):
    """An equation does not compute each example by itself, as far as is known."""

    def __init__(self, eqn: Equation) -> None:
        super().__init__(eqn)
        self.eqn = eqn


class Along(NamedTuple):
    """Examples along an axis, each ``width`` wide; as many as there are."""

    axis: int
    width: int


class Examples:
    """A part of a loss and the model that leads to it, as computed for each example by itself.

    Attributes:
      count: How many examples there are.
      mixed: An equation that mixes more of them, if there is one.
    """

    def __init__(
        self,
        program: Program,
        steps: Plan,
        model: Iterable[Equation],
        part: Any,
        count: int,
        mixed: Equation | None = None,
    ) -> None:
        """The analysis for ``count`` examples along the leading axis of the part's outputs.

        Raises:
          Mixed: They are not computed each by itself.
        """
        self._steps = steps
        self.count = count
        self.mixed = mixed
        self._at: dict[Value, Along | None] = {}
        self._read: dict[Equation, list[Along | None]] = {}
        if count == 1:
            return
        for v in part.outputs:
            self._at[v] = Along(0, v.shape[0] // count)
        for eqn in part.equations:
            self._forward(eqn)
        for eqn in reversed(list(model)):
            self._back(eqn)
        for eqn in steps.rules:
            if any(v in program.inputs and self._at.get(v) for v in eqn.inputs):
                raise Mixed(eqn)  # Each example has parameters of its own.

    def _forward(self, eqn: Equation) -> None:
        """Find where the results of an equation of the loss hold the examples."""
        active = [i for i, v in enumerate(eqn.inputs) if v in self._steps.active]
        expected = [self._at[eqn.inputs[i]] for i in active]
        for v in eqn.outputs:
            for axis, n in enumerate(v.shape):
                if n % self.count:
                    continue
                found = self._reads(eqn, Along(axis, n // self.count))
                if found is not None and [found[i] for i in active] == expected:
                    self._at[v] = Along(axis, n // self.count)
                    break
            else:
                raise Mixed(eqn)

    def _back(self, eqn: Equation) -> None:
        """Find where the operands of an equation of the model hold the examples."""
        demanded = {self._at[v] for v in eqn.outputs if v in self._at}
        if len(demanded) != 1:
            raise Mixed(eqn)
        (at,) = demanded
        read = [None] * len(eqn.inputs) if at is None else self._reads(eqn, at)
        if read is None:
            raise Mixed(eqn)
        self._read[eqn] = read
        for v, where in zip(eqn.inputs, read, strict=True):
            if v in self._steps.active and self._at.setdefault(v, where) != where:
                raise Mixed(eqn)
        for v in eqn.outputs:
            self._at.setdefault(v, at)

    def _reads(self, eqn: Equation, at: Along) -> list[Along | None] | None:
        """Which entries of each operand one example's result is computed of.

        ``None`` for the whole of it, and in place of the list if that is not known.
        """
        if isinstance(self._steps.rules[eqn], Pointwise):
            n = at.width * self.count
            return [at if v.shape and v.shape[at.axis] == n else None for v in eqn.inputs]
        find = READS.get(eqn.name)
        return find(eqn, at, self.count) if find is not None else None

    def split(self, model: Sequence[Equation], values: Mapping[Value, Any]) -> Any:
        """What differs between the examples, along a leading axis of them.

        For each equation of the model: slopes of what is pointwise, else operands.
        """
        found = []
        for eqn in model:
            read = self._read.get(eqn, [None] * len(eqn.inputs))
            primals = [_value(v, values) for v in eqn.inputs]
            if self.count == 1 or not any(read):
                found.append([])
            elif isinstance(self._steps.rules[eqn], Pointwise):
                at = self._at[eqn.outputs[0]]
                slopes = self._slopes(eqn, primals)
                found.append([self._leading(s, at) for s in slopes])
            else:
                pairs = zip(primals, read, strict=True)
                found.append([self._leading(x, at) for x, at in pairs if at is not None])
        return found

    def _slopes(self, eqn: Equation, primals: list[Any]) -> list[Any]:
        """The derivative of each entry of a pointwise result in those of each moving operand."""
        slopes = []
        for i in self._moving(eqn):
            tangents = [jnp.ones_like(x) if k == i else None for k, x in enumerate(primals)]
            slopes.append(push(eqn, primals, tangents)[0])
        return slopes

    def _moving(self, eqn: Equation) -> list[int]:
        return [i for i, v in enumerate(eqn.inputs) if v in self._steps.active]

    def _leading(self, x: Any, at: Along) -> Any:
        x = jnp.asarray(x)
        shape = (*x.shape[: at.axis], self.count, at.width, *x.shape[at.axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), at.axis, 0)

    def pushed(
        self,
        model: Sequence[Equation],
        values: Mapping[Value, Any],
        example: Any,
        tangents: dict[Value, Any],
    ) -> dict[Value, Any]:
        """Tangents of all values of an example, from those of the parameters."""
        for eqn, arrays in zip(model, example, strict=True):
            moving = [i for i in self._moving(eqn) if eqn.inputs[i] in tangents]
            if not moving:
                continue
            steps = [tangents[eqn.inputs[i]] for i in moving]
            if arrays and isinstance(self._steps.rules[eqn], Pointwise):
                slopes = [s for i, s in zip(self._moving(eqn), arrays, strict=True) if i in moving]
                pairs = zip(slopes, steps, strict=True)
                tangents[eqn.outputs[0]] = sum(s * d.astype(s.dtype) for s, d in pairs)
                continue
            read = self._read.get(eqn, [None] * len(eqn.inputs))
            own = iter(arrays)
            primals = [
                _value(v, values) if at is None else next(own)
                for v, at in zip(eqn.inputs, read, strict=True)
            ]
            changes = self._changes(eqn)

            def of_moving(*xs: Any, eqn: Any = eqn, moving: Any = moving, changes: Any = changes, primals: Any = primals) -> Any:
                replaced = list(primals)
                for i, x in zip(moving, xs, strict=True):
                    replaced[i] = x
                return _jaxpr.listed(_jaxpr.bind(eqn, *replaced, **changes), eqn)

            start = tuple(primals[i] for i in moving)
            _, pushed = jax.jvp(of_moving, start, tuple(steps))
            pairs = zip(eqn.outputs, pushed, strict=True)
            tangents.update({v: d for v, d in pairs if _jaxpr.is_inexact(v)})
        return tangents

    def _changes(self, eqn: Equation) -> dict[str, Any]:
        """The parameters that hold the shape of a result, for one example."""
        at = self._at.get(eqn.outputs[0])
        name = SHAPES.get(eqn.name)
        if at is None or name is None:
            return {}
        found = list(eqn.params[name])
        found[at.axis] = at.width
        return {name: tuple(found)}


def _value(atom: Any, values: Mapping[Value, Any]) -> Any:
    return atom.value if isinstance(atom, Constant) else values[atom]


# Where the operands of each primitive hold the examples, if its result holds them at `at`

SHAPES = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices"}

Reads = list[Along | None] | None


def _reshape(eqn: Equation, at: Along, count: int) -> Reads:
    """The axis before which there are as many entries, if each example is a stretch of it."""
    (x,), (y,) = eqn.inputs, eqn.outputs
    before, size = math.prod(y.shape[: at.axis]), at.width * math.prod(y.shape[at.axis + 1 :])
    for axis in range(len(x.shape)):
        rest = math.prod(x.shape[axis + 1 :])
        same = math.prod(x.shape[:axis]) == before and size % max(rest, 1) == 0
        if same and x.shape[axis] == count * (size // max(rest, 1)):
            return [Along(axis, size // max(rest, 1))]
    return None


def _transpose(eqn: Equation, at: Along, count: int) -> Reads:
    return [Along(eqn.params["permutation"][at.axis], at.width)]


def _broadcast(eqn: Equation, at: Along, count: int) -> Reads:
    dimensions = list(eqn.params["broadcast_dimensions"])
    if at.axis not in dimensions:
        return [None]
    axis = dimensions.index(at.axis)
    return [Along(axis, at.width) if eqn.inputs[0].shape[axis] == count * at.width else None]


def _reduction(eqn: Equation, at: Along, count: int) -> Reads:
    kept = [i for i in range(len(eqn.inputs[0].shape)) if i not in eqn.params["axes"]]
    return [Along(kept[at.axis], at.width)] * len(eqn.inputs)


def _product(eqn: Equation, at: Along, count: int) -> Reads:
    (contract, batch), (x, w) = eqn.params["dimension_numbers"], eqn.inputs
    free = [
        [i for i in range(len(v.shape)) if i not in (*contract[k], *batch[k])]
        for k, v in enumerate((x, w))
    ]
    if at.axis < len(batch[0]):
        return [Along(sides[at.axis], at.width) for sides in batch]
    axis = at.axis - len(batch[0])
    if axis < len(free[0]):
        return [Along(free[0][axis], at.width), None]
    return [None, Along(free[1][axis - len(free[0])], at.width)]


def _convolution(eqn: Equation, at: Along, count: int) -> Reads:
    numbers = eqn.params["dimension_numbers"]
    if at.axis != numbers.out_spec[0] or eqn.params["batch_group_count"] != 1:
        return None
    return [Along(numbers.lhs_spec[0], at.width), None]


def _along_others(name: str) -> Any:
    """What acts along one axis, or some, and not along the others."""

    def reads(eqn: Equation, at: Along, count: int) -> Reads:
        axes = eqn.params[name]
        acts = axes if isinstance(axes, Sequence) else [axes]
        return None if at.axis in acts else [at] * len(eqn.inputs)

    return reads


def _slice(eqn: Equation, at: Along, count: int) -> Reads:
    return [at] if eqn.inputs[0].shape[at.axis] == eqn.outputs[0].shape[at.axis] else None


def _pad(eqn: Equation, at: Along, count: int) -> Reads:
    return [at, None] if eqn.params["padding_config"][at.axis] == (0, 0, 0) else None


def _window(eqn: Equation, at: Along, count: int) -> Reads:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    ones = all(eqn.params[name][at.axis] == 1 for name in names)
    return [at] if ones and tuple(eqn.params["padding"][at.axis]) == (0, 0) else None


def _gather(eqn: Equation, at: Along, count: int) -> Reads:
    """Rows of a table by ids of the examples, or entries of the examples by theirs."""
    numbers, (x, ids) = eqn.params["dimension_numbers"], eqn.inputs
    if at.axis in numbers.offset_dims:
        return None
    by = [i for i in range(len(eqn.outputs[0].shape)) if i not in numbers.offset_dims]
    axis = by.index(at.axis)
    paired = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    return [Along(paired[axis], at.width) if axis in paired else None, Along(axis, at.width)]


READS = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduction),
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "concatenate": _along_others("dimension"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along_others("axis")),
    **dict.fromkeys(("split", "stack"), None),
    "rev": _along_others("dimensions"),
    "sort": _along_others("dimension"),
    "slice": _slice,
    "pad": _pad,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "gather": _gather,
}
