"""Types of arrays on a mesh: how they lie on its explicit axes, and vary along manual ones.

The latter are those of ``jax.shard_map``.
"""

from typing import Any

import jax
from jax import lax

__all__ = ["lying", "replicated", "varying", "varying_axes", "whole"]


def varying_axes(aval: Any) -> frozenset[Any]:
    """The axes along which a type varies."""
    axes = getattr(aval, "manual_axis_type", None)
    return frozenset() if axes is None else frozenset(axes.varying)


def varying(x: Any, aval: Any) -> Any:
    """``x`` with a type that varies along the axes of another type too."""
    axes = varying_axes(aval) - varying_axes(jax.typeof(x))
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def lying(x: Any, aval: Any) -> Any:
    """``x`` of a type's shape as its values lie on a mesh of explicit axes."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or not sharding.mesh.explicit_axes:
        return x
    if jax.typeof(x).sharding.spec == sharding.spec:
        return x
    return jax.sharding.reshard(x, sharding)


def replicated(x: Any) -> Any:
    """``x``, whole on each device where explicit axes divide it."""
    divided = any(jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if divided else x


def whole(x: Any, axis: int) -> Any:
    """``x``, no longer divided along one of its axes by explicit axes of a mesh."""
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if spec[axis] is None:
        return x
    spec[axis] = None
    return jax.sharding.reshard(x, sharding.update(spec=jax.sharding.PartitionSpec(*spec)))
