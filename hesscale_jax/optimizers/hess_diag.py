"""The extra argument ``hess_diag`` of every transformation here: its checks and its dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike


def accumulator_dtype(array: ArrayLike) -> DTypeLike:
    """The dtype of an average of curvatures: at least float32, since their squares leave half."""
    dtype = jnp.result_type(array)
    return jnp.float32 if dtype.itemsize < 4 else dtype


def cast_like(tree: optax.Updates, other: optax.Updates) -> optax.Updates:
    """A tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, other)


def match(hess_diag: optax.Updates | None, updates: optax.Updates, who: str) -> optax.Updates:
    """Returns `hess_diag` masked where `updates` is; raises if they differ in structure or shape.

    `optax.masked` and `optax.multi_transform` mask the updates, but hand on extra arguments whole.
    """
    if hess_diag is None:
        raise TypeError(
            f"{who} needs the extra argument 'hess_diag': call "
            "update(updates, state, params, hess_diag=...) with the diagonal of the Hessian, for "
            "example from hesscale_jax.hesscale. If you do pass it, some wrapper on the way does "
            "not hand extra arguments on."
        )

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        matched = jax.tree.map(
            lambda u, h: u if is_masked(u) else h, updates, hess_diag, is_leaf=is_masked
        )
        jax.tree.map(lambda h, u: None, matched, updates)  # Raises if `hess_diag` goes deeper.
    except ValueError as error:
        raise ValueError(
            "'hess_diag' has a different structure from 'updates': "
            f"{jax.tree.structure(hess_diag)} against {jax.tree.structure(updates)}"
        ) from error

    for (path, u), h in zip(
        jax.tree.leaves_with_path(updates), jax.tree.leaves(matched), strict=True
    ):
        if jnp.shape(h) != jnp.shape(u):
            at = jax.tree_util.keystr(path)
            raise ValueError(
                "'hess_diag' has a different shape from 'updates': "
                f"hess_diag{at} is {jnp.shape(h)}, updates{at} is {jnp.shape(u)}"
            )
    return matched


def keep_unless(fresh: Any, new: optax.Updates, old: optax.Updates) -> optax.Updates:
    """The new tree where the curvature is fresh, else the old one; ``None`` is always fresh."""
    if fresh is None:
        return new
    return jax.tree.map(lambda n, o: jnp.where(fresh, n, o), new, old)


def usable(hess_diag: optax.Updates, refreshed: Any, skip_nonfinite: bool) -> Any:
    """Whether the curvature is to be taken in: ``None`` if that is certain while tracing."""
    if not skip_nonfinite:
        return refreshed
    finite = [jnp.all(jnp.isfinite(h)) for h in jax.tree.leaves(hess_diag)]
    parts = finite if refreshed is None else [jnp.asarray(refreshed), *finite]
    return jnp.all(jnp.stack(parts))
