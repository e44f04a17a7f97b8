r"""The spread of a layer's weights: along a basis of its inputs, and by its factors.

A leaf ``W`` of a product ``z_n = x_n W``, inputs x outputs, may vary in other ways than entry by
entry. With half-variances ``D`` along the columns of an orthonormal basis ``V`` of its inputs, a
covariance ``S`` of its inputs, common to all outputs, and half-variances ``t`` of its outputs,

    vz_nj = sum_a (x_n V)_a^2 D_aj + x_n S x_n^T + t_j

is linear in all three, and its transpose at the curvature ``h_nj`` of the outputs is

    D_aj:  sum_n (x_n V)_a^2 h_nj           the diagonal in the basis
    S:     sum_n (sum_j h_nj) x_n^T x_n     the inputs' second moment, weighted by curvature
    t_j:   sum_n h_nj                       the outputs' curvature

An axis of the leaf that the product runs over (a batch of products, a stack of layers) has each of
these once for each of its entries. A convolution's inputs are its patches.

Between the leaf and its product there are changes of view: casts, transposes, reshapes, slices
that loops take. Each dimension of a value on the way is made of *spans* ``(hi, lo)`` of the leaf's
entries in row-major order: ``hi`` entries in all, ``lo`` from one index to the next.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation

__all__ = [
    "MAX_INPUTS",
    "Bases",
    "Factored",
    "Factors",
    "Layout",
    "canonical",
    "row_major",
    "viewed",
]

Span = tuple[int, int]
Axis = tuple[Span, ...]  # what a dimension is made of, the slowest to vary first

RENAMED = frozenset(
    (
        *("convert_element_type", "copy", "copy_p", "device_put", "layout_constraint", "name"),
        *("optimization_barrier", "pbroadcast", "pvary", "reduce_precision", "reshard"),
        "sharding_constraint",
    )
)


# More inputs than this have no second moment unless asked for: 256 MiB in float32.
MAX_INPUTS = 8192


class Factors(NamedTuple):
    """The curvature of a leaf: along its entries or a basis, and by factors.

    Attributes:
      hess_diag: HesScale's diagonal, in the leaf's shape; in the bases of its inputs and outputs
        where they were given.
      inputs: The second moment of the inputs, of shape ``(*stack, n, n)`` for ``n`` inputs; None
        where the leaf is no layer's weights, or there are too many.
      outputs: The curvature of the outputs summed over examples, of shape ``(*stack, *outputs)``;
        None where the leaf is no layer's weights.
    """

    hess_diag: Any
    inputs: Any = None
    outputs: Any = None


class Bases(NamedTuple):
    """Orthonormal bases of a layer's inputs and outputs, as columns; None for the coordinates.

    Attributes:
      inputs: Of shape ``(*stack, n, n)`` for ``n`` inputs.
      outputs: Of shape ``(*stack, m, m)`` for ``m`` outputs.
    """

    inputs: Any = None
    outputs: Any = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are summed over by its products, and which index their outputs.

    Attributes:
      shape: The leaf's shape.
      stack: The axes that the products run over: layers of a ``scan``, a batch of products.
      inputs: The axes that the products sum over; of a convolution, those of a patch.
      outputs: The others.
      last: Whether no other such leaf has a product that depends on this one's, as in the last
        layer of a network.
      reason: Why the leaf is no layer's weights, empty if it is.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    last: bool = False
    reason: str = ""

    @property
    def factored(self) -> bool:
        """Whether the leaf is a layer's weights: a factor of products, and of nothing else."""
        return not self.reason

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The leaf's sizes along some axes."""
        return tuple(self.shape[i] for i in axes)

    @property
    def counts(self) -> tuple[int, int, int]:
        """The number of matrices in the leaf, of their inputs and of their outputs."""
        return tuple(math.prod(self.sizes(axes)) for axes in self._groups)  # type: ignore[return-value]

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return self.stack, self.inputs, self.outputs

    def matrices(self, leaf: Any) -> Any:
        """A leaf as ``(count, inputs, outputs)``."""
        order = [i for axes in self._groups for i in axes]
        return jnp.transpose(leaf, order).reshape(self.counts)

    def leaf(self, matrices: Any) -> Any:
        """The leaf that has these matrices."""
        order = [i for axes in self._groups for i in axes]
        back = sorted(range(len(order)), key=order.__getitem__)
        return jnp.transpose(matrices.reshape(self.sizes(order)), back)


@dataclasses.dataclass(frozen=True)
class Factored:
    """A spread of the kind above, of a leaf or of a view of it.

    Attributes:
      diagonal: ``(count, n, m)``: half-variances along the basis, for each output.
      inputs: ``(count, n, n)``: the inputs' covariance; None for none.
      outputs: ``(count, m)``: half-variances of the outputs.
      basis: ``(count, n, n)``, its columns; None for the coordinates.
      axes: What each dimension of the value is made of.
      stack: What ``count`` runs over.
      weight: What the transpose weights each input by: None for its curvature.
    """

    diagonal: Any
    inputs: Any
    outputs: Any
    basis: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    stack: Axis = dataclasses.field(metadata={"static": True})
    weight: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def varied(self) -> dict[str, Any]:
        """What the spread is linear in."""
        names = ("diagonal", "inputs", "outputs")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def each(self, scanned: Axis) -> "Factored":
        """With the spans of a loop's steps as a leading axis of every array, for ``scan``."""
        rest = tuple(s for s in _split(self.stack, scanned) if s not in scanned)
        order = [*scanned, *rest]

        def leading(x: Any) -> Any:
            x = _permuted(x, _split(self.stack, scanned), order)
            return x.reshape(_count(scanned), _count(rest), *x.shape[1:])

        return dataclasses.replace(jax.tree.map(leading, self), axes=self.axes[1:], stack=rest)

    def sharded(self, spec: Any) -> "Factored":
        """How ``shard_map`` is to split the arrays, of a value that it splits by ``spec``."""
        named = [
            (name, set(axis) <= set(self.stack))
            for name, axis in zip(spec, self.axes, strict=False)
            if name is not None
        ]
        of_stack, of_outputs = (
            next((name for name, stacked in named if stacked == wanted), None)
            for wanted in (True, False)
        )
        return dataclasses.replace(
            self,
            diagonal=P(of_stack, None, of_outputs),
            inputs=None if self.inputs is None else P(of_stack),
            outputs=P(of_stack, of_outputs),
            basis=None if self.basis is None else P(of_stack),
        )

    def local(self, shape: tuple[int, ...]) -> "Factored":
        """The same on one device, where the value has another shape."""
        axes = row_major(shape)
        held = [i for i, axis in enumerate(self.axes) if axis and set(axis) <= set(self.stack)]
        stack = tuple(span for i in held for span in axes[i])
        # The devices that split the outputs between them see the same inputs.
        split = _count(_joined(self.axes)) // math.prod(shape)
        shared = split // (_count(self.stack) // _count(stack))
        weight = None if self.weight is None else self.weight / shared
        return dataclasses.replace(self, axes=axes, stack=stack, weight=weight)

    def spread(self, eqn: Equation, position: int, x: Any) -> Any:
        """The spread of the product with ``x``, in the shape of the equation's result."""
        if eqn.name == "dot_general":
            return _dot_general(self, eqn, position, x)
        return _convolution(self, eqn, x)

    def of_rows(self, rows: Any) -> Any:
        """The spread of the outputs, ``(count, N, m)``, of inputs ``(count, N, n)``."""
        features = rows if self.basis is None else rows @ self.basis
        y = (features * features) @ self.diagonal + self.outputs[:, None, :]
        if self.inputs is None:
            return y
        common = jnp.sum((rows @ self.inputs) * rows, axis=-1)
        common = common if self.weight is None else _weighted(common, self.weight)
        return y + common[..., None]


jax.tree_util.register_dataclass(Factored)


def _weighted(x: Any, weight: float) -> Any:
    """``x``, whose transpose takes the weight for each cotangent."""
    return jax.custom_derivatives.linear_call(
        lambda _, x: x, lambda _, cotangent: jnp.full_like(cotangent, weight), (), x
    )


def _dot_general(f: Factored, eqn: Equation, position: int, x: Any) -> Any:
    contract, batch = eqn.params["dimension_numbers"]
    of_x, of_w = contract[1 - position], contract[position]
    batch_x, batch_w = batch[1 - position], batch[position]
    free_x = [i for i in range(x.ndim) if i not in (*of_x, *batch_x)]
    free_w = [i for i in range(len(f.axes)) if i not in (*of_w, *batch_w)]
    stack, inputs, outputs = (_joined(f.axes[i] for i in g) for g in (batch_w, of_w, free_w))
    rows = jnp.transpose(x.astype(f.diagonal.dtype), (*batch_x, *free_x, *of_x))
    free_shape = [x.shape[i] for i in free_x]
    rows = rows.reshape(_count(stack), math.prod(free_shape), _count(inputs))
    rows = _permuted(rows, stack, ordered(stack))
    rows = _permuted(rows, inputs, ordered(inputs), axis=2)
    y = f.of_rows(rows)
    y = _permuted(y, ordered(stack), stack)
    y = _permuted(y, ordered(outputs), outputs, axis=2)
    if position == 0:
        y = jnp.swapaxes(y, 1, 2)
    return y.reshape(eqn.outputs[0].shape)


def _convolution(f: Factored, eqn: Equation, x: Any) -> Any:
    numbers = eqn.params["dimension_numbers"]
    of_outputs, *of_inputs = numbers.rhs_spec
    inputs, outputs = _joined(f.axes[i] for i in of_inputs), f.axes[of_outputs]
    n = _count(inputs)
    sizes = [_count(f.axes[i]) for i in of_inputs]
    # A kernel whose outputs are the entries of a patch, in the order of the equation's.
    kernel = jnp.eye(n, dtype=f.diagonal.dtype).reshape(*sizes, n)
    kernel = jnp.moveaxis(kernel, range(len(sizes) + 1), (*of_inputs, of_outputs))
    patches = _jaxpr.bind(
        eqn,
        x.astype(kernel.dtype),
        kernel,
        preferred_element_type=kernel.dtype,
        precision=(lax.Precision.HIGHEST,) * 2,
    )
    channel = numbers.out_spec[1]
    patches = jnp.moveaxis(patches, channel, -1)
    rows = _permuted(patches.reshape(1, -1, n), inputs, ordered(inputs), axis=2)
    y = _permuted(f.of_rows(rows), ordered(outputs), outputs, axis=2)
    return jnp.moveaxis(y.reshape(*patches.shape[:-1], _count(outputs)), -1, channel)


# Spans


def row_major(shape: Sequence[int]) -> tuple[Axis, ...]:
    """What the dimensions of a leaf are made of; one of size 1 of nothing."""
    axes: list[Axis] = []
    lo = 1
    for size in reversed(shape):
        axes.append(((lo * size, lo),) if size > 1 else ())
        lo *= size
    return tuple(reversed(axes))


def viewed(eqn: Equation, axes: Sequence[Axis]) -> tuple[Axis, ...] | None:
    """What the dimensions of a view of a value are made of; None if the equation is none."""
    shape = eqn.outputs[0].shape
    if eqn.name in RENAMED and len(eqn.outputs) == 1:
        return tuple(axes)
    if eqn.name == "transpose":
        return tuple(axes[i] for i in eqn.params["permutation"])
    if eqn.name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(_joined(axes), shape)
    if eqn.name == "broadcast_in_dim" and math.prod(shape) == _count(_joined(axes)):
        found: list[Axis] = [()] * len(shape)
        for i, axis in zip(eqn.params["broadcast_dimensions"], axes, strict=True):
            found[i] = axis
        return tuple(found)
    return None


def _reshaped(spans: Axis, shape: Sequence[int]) -> tuple[Axis, ...] | None:
    left = list(spans)
    axes: list[Axis] = []
    for size in shape:
        axis: list[Span] = []
        while size > 1:
            hi, lo = left.pop(0)
            if size % (hi // lo) == 0:
                size //= hi // lo
                axis.append((hi, lo))
            elif (hi // lo) % size == 0:
                axis.append((hi, hi // size))
                left.insert(0, (hi // size, lo))
                size = 1
            else:
                return None
        axes.append(_merged(axis))
    return tuple(axes)


def _joined(axes: Iterable[Axis]) -> Axis:
    return tuple(span for axis in axes for span in axis)


def _count(spans: Iterable[Span]) -> int:
    return math.prod(hi // lo for hi, lo in spans)


def ordered(spans: Axis) -> Axis:
    """The spans as they follow each other in the leaf."""
    return tuple(sorted(spans, reverse=True))


def canonical(spans: Axis) -> Axis:
    """The spans in order, those that touch as one."""
    return _merged(ordered(spans))


def _merged(spans: Iterable[Span]) -> Axis:
    merged: list[Span] = []
    for hi, lo in spans:
        if merged and merged[-1][1] == hi:
            merged[-1] = (merged[-1][0], lo)
        else:
            merged.append((hi, lo))
    return tuple(merged)


def _split(spans: Axis, others: Axis) -> Axis:
    """The spans, cut where the others begin and end."""
    cuts = {bound for span in others for bound in span}
    found: list[Span] = []
    for hi, lo in spans:
        bounds = sorted({hi, lo, *(c for c in cuts if lo < c < hi)}, reverse=True)
        found += zip(bounds, bounds[1:], strict=False)
    return tuple(found)


def _permuted(x: Any, spans: Axis, order: Sequence[Span], axis: int = 0) -> Any:
    """An array, of which an axis that runs over spans is to run over them in another order."""
    if tuple(spans) == tuple(order):
        return x
    sizes = [hi // lo for hi, lo in spans]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    permutation = [spans.index(span) for span in order]
    parts = x.reshape(*before, *sizes, *after)
    kept = range(axis), range(axis + len(sizes), parts.ndim)
    parts = jnp.transpose(parts, (*kept[0], *(axis + i for i in permutation), *kept[1]))
    return parts.reshape(x.shape)
