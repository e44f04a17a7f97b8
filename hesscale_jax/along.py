"""Arrays in the frame of a block along whose one axis entries have segments.

Along that axis an array has first what belongs to each entry, then what belongs to each segment.
Whatever is linear in the entries or segments here is a product, a gather or a scatter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax._mesh import lying, whole

__all__ = ["Along"]


class Along(NamedTuple):
    """An axis along which entries have segments.

    Attributes:
      axis: The axis.
      entries: How many entries it has.
      segments: How many segments there are.
      batch: The other axes along which the segments of entries differ.
    """

    axis: int
    entries: Any
    segments: Any
    batch: tuple[int, ...]

    def with_length(self, length: Any, shape: Sequence[Any]) -> tuple[Any, ...]:
        """The shape with another length of the axis."""
        return (*shape[: self.axis], length, *shape[self.axis + 1 :])

    def rows(self, ids: Any) -> Any:
        """The segments of entries and of segments, as ``taken`` needs them."""
        shape = self.with_length(self.segments, ids.shape)
        ids = lax.concatenate([ids, lax.broadcasted_iota(ids.dtype, shape, self.axis)], self.axis)
        return lax.reshape(ids, (*(ids.shape[i] for i in self._indexed), 1))

    def padded(self, x: Any) -> Any:
        """What belongs to each entry, and nothing for the segments."""
        if x.shape[self.axis] == 1:
            return x
        widths = [(0, self.segments if i == self.axis else 0, 0) for i in range(x.ndim)]
        return lax.pad(x, np.zeros((), x.dtype), widths)

    def of_entries(self, x: Any) -> Any:
        """The part that belongs to each entry."""
        return self._part(x, 0, self.entries)

    def of_segments(self, x: Any) -> Any:
        """The part that belongs to each segment."""
        return self._part(x, self.entries, self.entries + self.segments)

    def _part(self, x: Any, start: Any, stop: Any) -> Any:
        if not jnp.ndim(x) or x.shape[self.axis] == 1:
            return x
        return lax.slice_in_dim(x, start, stop, axis=self.axis)

    def taken(self, x: Any, rows: Any) -> Any:
        """What belongs to each segment, for its entries and itself."""
        x = jnp.broadcast_to(x, self._as_often(x.shape, rows))
        numbers = lax.GatherDimensionNumbers(
            offset_dims=self._window(x.ndim),
            collapsed_slice_dims=(self.axis,),
            start_index_map=(self.axis,),
            operand_batching_dims=self.batch,
            start_indices_batching_dims=tuple(map(self._indexed.index, self.batch)),
        )
        sizes = [1 if i in self._indexed else n for i, n in enumerate(x.shape)]
        return lax.gather(x, rows, numbers, sizes, mode="promise_in_bounds")

    def added(self, x: Any, rows: Any) -> Any:
        """The sum over what belongs to each entry of a segment."""
        length = self.entries + self.segments
        x = jnp.broadcast_to(x, self.with_length(length, self._as_often(x.shape, rows)))
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=self._window(x.ndim),
            inserted_window_dims=(self.axis,),
            scatter_dims_to_operand_dims=(self.axis,),
            operand_batching_dims=self.batch,
            scatter_indices_batching_dims=tuple(map(self._indexed.index, self.batch)),
        )
        x = whole(x, self.axis)
        zeros = lax.full(self.with_length(self.segments, x.shape), 0, x.dtype)
        zeros = lying(zeros, jax.typeof(x))
        return lax.scatter_add(zeros, rows, x, numbers, mode="promise_in_bounds")

    @property
    def _indexed(self) -> list[int]:
        return sorted((*self.batch, self.axis))

    def _window(self, rank: int) -> tuple[int, ...]:
        return tuple(i for i in range(rank) if i not in self._indexed)

    def _as_often(self, shape: Sequence[Any], rows: Any) -> list[Any]:
        """The shape with the lengths of the axes along which the segments differ."""
        lengths = dict(zip(self._indexed, rows.shape, strict=False))
        return [lengths[i] if i in self.batch else n for i, n in enumerate(shape)]
