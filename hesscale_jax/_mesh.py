"""Types of arrays on a mesh: how they lie on its explicit axes, and vary along manual ones.

The latter are those of ``jax.shard_map``.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

__all__ = [
    "at_mesh_of",
    "automatically",
    "lying",
    "on_mesh",
    "replicated",
    "varying",
    "varying_axes",
    "whole",
]


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
    return reshard(x, sharding)


def replicated(x: Any) -> Any:
    """``x``, whole on each device where explicit axes divide it."""
    divided = any(jax.typeof(x).sharding.spec)
    return reshard(x, PartitionSpec()) if divided else x


def whole(x: Any, axis: int) -> Any:
    """``x``, no longer divided along one of its axes by explicit axes of a mesh."""
    sharding = jax.typeof(x).sharding
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if spec[axis] is None:
        return x
    spec[axis] = None
    return reshard(x, sharding.update(spec=PartitionSpec(*spec)))


def on_mesh(x: Any) -> Any:
    """``x`` on the mesh of the context, where it lies on one of other explicit axes."""
    if jax.sharding.get_abstract_mesh().empty or not _other_mesh(jax.typeof(x)):
        return x
    return reshard(x, PartitionSpec())


def at_mesh_of(aval: Any) -> contextlib.AbstractContextManager[Any]:
    """The context of the mesh where a value of this type lies, if it is not that of this one."""
    mesh = _other_mesh(aval)
    return jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext()


def _other_mesh(aval: Any) -> Any:
    """The mesh where a value lies, if that of the context is another; within ``auto_axes``."""
    here = jax.sharding.get_abstract_mesh()
    there = getattr(getattr(aval, "sharding", None), "mesh", here)
    return None if here.empty or there.empty or there == here else there


def automatically(compute: Callable[[], Any], like: Any, results: Any = None) -> Any:
    """What is computed where the compiler chooses how it lies.

    On a mesh of explicit axes, where ``like`` lies, arrays that lie in different ways would not go
    together. There the results lie as those of a tree of arrays; by default, they are replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(like).sharding.mesh if mesh.empty else mesh
    if not mesh.explicit_axes:
        return compute()
    automatic = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(automatic)):
        y = compute()
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, y if results is None else results)
    return jax.tree.map(lambda y, spec: reshard(y, NamedSharding(mesh, spec)), y, specs)
