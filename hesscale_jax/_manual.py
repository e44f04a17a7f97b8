"""Types of arrays within ``jax.shard_map``, which say along which of a mesh's axes they vary."""

from typing import Any

import jax
from jax import lax

__all__ = ["varying", "varying_axes"]


def varying_axes(aval: Any) -> frozenset[Any]:
    """The axes along which a type varies."""
    axes = getattr(aval, "manual_axis_type", None)
    return frozenset() if axes is None else frozenset(axes.varying)


def varying(x: Any, aval: Any) -> Any:
    """``x`` with a type that varies along the axes of another type too."""
    axes = varying_axes(aval) - varying_axes(jax.typeof(x))
    return lax.pcast(x, tuple(axes), to="varying") if axes else x
