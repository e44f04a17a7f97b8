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
    """An equation does not compute each example by itself, as far as is known.

    Without an equation: an output is a parameter.
    """

    def __init__(self, eqn: Equation | None) -> None:
        super().__init__(eqn)
        self.eqn = eqn


class Along(NamedTuple):
    """Examples along an axis, each ``width`` wide; as many as there are."""

    axis: int
    width: int


class Examples:
    """A model, as it is computed for each example of a batch by itself.

    Attributes:
      count: How many examples there are.
      mixed: An equation that mixes more of them, if there is one.
    """

    def __init__(
        self, program: Program, steps: Plan, count: int, mixed: Equation | None = None
    ) -> None:
        """The analysis for ``count`` examples along the leading axis of the outputs.

        Raises:
          Mixed: They are not computed each by itself.
        """
        self.count = count
        self.mixed = mixed
        self.program = program
        self.steps = steps
        self.at: dict[Value, Along | None] = {}
        self.read: dict[Equation, list[Along | None]] = {}
        self._equations = [eqn for eqn in program.equations if eqn in steps.rules]
        for v in program.outputs if count > 1 else ():
            self._demand(v, Along(0, v.shape[0] // count), None)
        for eqn in reversed(self._equations) if count > 1 else ():
            self._back(eqn)

    def _back(self, eqn: Equation) -> None:
        """Find where the operands of an equation hold the examples."""
        demanded = {self.at[v] for v in eqn.outputs if v in self.at}
        if len(demanded) != 1:
            raise Mixed(eqn)
        (at,) = demanded
        read: Reads = [None] * len(eqn.inputs)
        if at is not None:
            read = reads(self.steps, eqn, at, self.count)
        if read is None:
            raise Mixed(eqn)
        self.read[eqn] = read
        for v, where in zip(eqn.inputs, read, strict=True):
            if v in self.steps.active:
                self._demand(v, where, eqn)
        for v in eqn.outputs:
            self.at.setdefault(v, at)

    def _demand(self, value: Value, at: Along | None, eqn: Equation | None) -> None:
        own = at is not None and value in self.program.inputs
        if own or self.at.setdefault(value, at) != at:
            raise Mixed(eqn)

    def check(self, steps: Plan, equations: Iterable[Equation], outputs: Iterable[Value]) -> None:
        """Raise ``Mixed`` where equations of the loss do not take each example by itself."""
        held = {v: Along(0, v.shape[0] // self.count) for v in outputs}
        for eqn in equations:
            active = [i for i, v in enumerate(eqn.inputs) if v in steps.active]
            for v in eqn.outputs:
                axes = [axis for axis, n in enumerate(v.shape) if n % self.count == 0]
                for at in (Along(axis, v.shape[axis] // self.count) for axis in axes):
                    read = reads(steps, eqn, at, self.count)
                    if read and all(read[i] == held[eqn.inputs[i]] for i in active):
                        held[v] = at
                        break
                else:
                    raise Mixed(eqn)

    def linearised(self, values: Mapping[Value, Any]) -> "Linear":
        """The derivative of the outputs of each example in the inputs of the program."""
        equations: list[_Pointwise | _Other] = []
        for eqn in self._equations:
            read = self.read.get(eqn, [None] * len(eqn.inputs))
            moving = [i for i, v in enumerate(eqn.inputs) if v in self.steps.active]
            primals = [v.value if isinstance(v, Constant) else values[v] for v in eqn.inputs]
            at = self.at.get(eqn.outputs[0])
            if at and isinstance(self.steps.rules[eqn], Pointwise):
                slopes = [self._leading(_slope(eqn, primals, i), at) for i in moving]
                equations.append(_Pointwise(eqn, moving, slopes))
                continue
            pairs = list(zip(primals, read, strict=True))
            own = [self._leading(x, at) for x, at in pairs if at]
            shared = [None if at else x for x, at in pairs]
            equations.append(_Other(eqn, moving, own, shared, changes(eqn, at, read)))
        return Linear(self.program, equations)

    def _leading(self, x: Any, at: Along) -> Any:
        """The entries of each example, along a leading axis of examples."""
        shape = (*x.shape[: at.axis], self.count, at.width, *x.shape[at.axis + 1 :])
        return jnp.moveaxis(jnp.reshape(x, shape), at.axis, 0)


class _Pointwise(NamedTuple):
    """``dy = sum_i slope_i * dx_i``."""

    eqn: Equation
    moving: list[int]
    arrays: list[Any]  # of each example

    def push(self, slopes: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        pairs = zip(slopes, tangents, strict=True)
        # A slope has the dtype of the result; of a conversion the operand has another.
        terms = [s * d.astype(s.dtype) for s, d in pairs if d is not None]
        return [sum(terms) if terms else None]


class _Other(NamedTuple):
    """``dy = J dx``, with the Jacobian of the equation for one example."""

    eqn: Equation
    moving: list[int]
    arrays: list[Any]  # operands of each example
    shared: list[Any]  # what all examples read, and gaps for the others
    changes: dict[str, Any]

    def push(self, arrays: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        own = iter(arrays)
        operands = [next(own) if x is None else x for x in self.shared]
        along = {i: d for i, d in zip(self.moving, tangents, strict=True) if d is not None}

        def fun(*moved: Any) -> list[Any]:
            replaced = list(operands)
            for i, x in zip(along, moved, strict=True):
                replaced[i] = x
            return _jaxpr.listed(_jaxpr.bind(self.eqn, *replaced, **self.changes), self.eqn)

        start = tuple(operands[i] for i in along)
        _, pushed = jax.jvp(fun, start, tuple(along.values()))
        results = zip(self.eqn.outputs, pushed, strict=True)
        return [d if _jaxpr.is_inexact(v) else None for v, d in results]


class Linear(NamedTuple):
    """The derivative of a model, example by example."""

    program: Program
    equations: list[Any]

    @property
    def arrays(self) -> list[list[Any]]:
        """What differs between examples, along a leading axis of them."""
        return [eqn.arrays for eqn in self.equations]

    def pushed(self, arrays: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """The tangents of one example's outputs, from those of the inputs."""
        known: dict[Any, Any] = dict(zip(self.program.inputs, tangents, strict=True))
        for each, own in zip(self.equations, arrays, strict=True):
            along = [known.get(each.eqn.inputs[i]) for i in each.moving]
            known.update(zip(each.eqn.outputs, each.push(own, along), strict=True))
        return [known[v] for v in self.program.outputs]


def _slope(eqn: Equation, primals: Sequence[Any], i: int) -> Any:
    """The derivative of each entry of a pointwise result in that of operand ``i``."""
    tangents = [jnp.ones_like(x) if k == i else None for k, x in enumerate(primals)]
    return push(eqn, primals, tangents)[0]


def reads(steps: Plan, eqn: Equation, at: Along, count: int) -> "Reads":
    """Where operands hold what one example's result is computed of, if that is held ``at``.

    ``None`` for an operand of which each reads the whole, and in place of all if it is not known.
    """
    if isinstance(steps.rules[eqn], Pointwise):
        n = at.width * count
        return [at if v.shape and v.shape[at.axis] == n else None for v in eqn.inputs]
    found = READS.get(eqn.name)
    return found(eqn, at, count) if found is not None else None


def changes(eqn: Equation, at: Along | None, read: Sequence[Along | None]) -> dict[str, Any]:
    """The parameters of an equation that hold a shape, for one example."""
    name = SHAPES.get(eqn.name)
    where = read[0] if name == "slice_sizes" else at
    if name is None or where is None:
        return {}
    found = list(eqn.params[name])
    paired = name == "slice_sizes" and found[where.axis] == 1
    found[where.axis] = 1 if paired else where.width
    return {name: tuple(found)}


# Where the operands of each primitive hold the examples, if its result holds them at `at`

SHAPES = {
    "broadcast_in_dim": "shape",
    "dynamic_slice": "slice_sizes",
    "gather": "slice_sizes",
    "reshape": "new_sizes",
    "slice": "limit_indices",
}

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
    whole = eqn.inputs[0].shape[at.axis] == eqn.outputs[0].shape[at.axis]
    return [at, *(None for _ in eqn.inputs[1:])] if whole else None


def _stack(eqn: Equation, at: Along, count: int) -> Reads:
    axis = eqn.params["axis"]
    own = Along(at.axis - (at.axis > axis), at.width)
    return None if at.axis == axis else [own] * len(eqn.inputs)


def _pad(eqn: Equation, at: Along, count: int) -> Reads:
    return [at, None] if eqn.params["padding_config"][at.axis] == (0, 0, 0) else None


def _window(eqn: Equation, at: Along, count: int) -> Reads:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    ones = all(eqn.params[name][at.axis] == 1 for name in names)
    return [at] if ones and tuple(eqn.params["padding"][at.axis]) == (0, 0) else None


def _gather(eqn: Equation, at: Along, count: int) -> Reads:
    """Rows of a table by ids of the examples, or entries of the examples by theirs."""
    numbers, (x, _) = eqn.params["dimension_numbers"], eqn.inputs
    if at.axis in numbers.offset_dims:
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [i for i in range(len(x.shape)) if i not in gone]
        axis = kept[numbers.offset_dims.index(at.axis)]
        whole = eqn.params["slice_sizes"][axis] == x.shape[axis]
        return [Along(axis, at.width), None] if whole else None
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
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along_others("axis")
    ),
    "split": _along_others("axis"),
    "stack": _stack,
    "dynamic_slice": _slice,
    "rev": _along_others("dimensions"),
    "sort": _along_others("dimension"),
    "slice": _slice,
    "pad": _pad,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "gather": _gather,
}
