"""The extra argument ``hess_diag`` of every transformation here: its checks and its dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike, DTypeLike


def accumulator_dtype(array: ArrayLike) -> DTypeLike:
    """The dtype of an average of curvatures: at least float32, since their squares leave half."""
    dtype = jnp.result_type(array)
    return jnp.float32 if dtype.itemsize < 4 else dtype


def cast_like(tree: optax.Updates, other: optax.Updates) -> optax.Updates:
    """A tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, other)


def match(hess_diag: optax.Updates | None, updates: optax.Updates, who: str) -> optax.Updates:
    """Returns `hess_diag` with the structure of `updates`; raises if they differ in it or in shape.

    `optax.masked` and `optax.multi_transform` mask the updates, and `optax.flatten` makes them one
    vector; all hand on extra arguments as they are.
    """
    if hess_diag is None:
        raise TypeError(
            f"{who} needs the extra argument 'hess_diag': call "
            "update(grad, state, params, hess_diag=hess_diag) with what "
            "grad, hess_diag = hesscale_jax.hesscale(loss)(params, ...) returns, and likewise "
            "nnx.Optimizer.update and apply_gradients of hesscale_jax.linen.TrainState. If you do "
            "pass it, some wrapper on the way does not hand extra arguments on: Flax's own "
            "TrainState is one."
        )

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if is_vector(updates) and not is_vector(hess_diag):
        return ravelled(hess_diag, updates)
    try:
        matched = jax.tree.map(
            lambda u, h: u if is_masked(u) else h, updates, hess_diag, is_leaf=is_masked
        )
        jax.tree.map(lambda h, u: None, matched, updates)  # Raises if `hess_diag` goes deeper.
    except ValueError as error:
        raise ValueError(
            f"'hess_diag' has a different structure from 'updates': {apart(hess_diag, updates)}"
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


def apart(hess_diag: Any, updates: Any) -> str:
    """In which leaves two trees differ, and the likely reason."""
    if isinstance(hess_diag, tuple) != isinstance(updates, tuple):
        return (
            "one of them is a tuple. hesscale returns (grad, hess_diag), and value_and_hesscale "
            "(value, (grad, hess_diag)): take them apart first."
        )
    here, there = (
        [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
        for tree in (hess_diag, updates)
    )
    missing, surplus = ([x for x in a if x not in b] for a, b in ((there, here), (here, there)))
    if not missing and not surplus:
        return f"{jax.tree.structure(hess_diag)} against {jax.tree.structure(updates)}"
    lacks = [f"it lacks {', '.join(missing[:3])}"] * bool(missing)
    return "; ".join(lacks + [f"it has {', '.join(surplus[:3])} besides"] * bool(surplus))


def is_vector(tree: Any) -> bool:
    """Whether a tree is one array of one axis, such as `optax.flatten` makes of any."""
    return jax.tree_util.all_leaves([tree]) and jnp.ndim(tree) == 1


def ravelled(hess_diag: optax.Updates, vector: Any) -> jax.Array:
    """The diagonal as `optax.flatten` lays out the updates; raises if it is longer or shorter."""
    size = sum(np.size(h) for h in jax.tree.leaves(hess_diag))
    if size != np.size(vector):
        raise ValueError(
            "'hess_diag' has a different structure from 'updates', which are one vector of "
            f"{np.size(vector)} entries, as inside optax.flatten: hess_diag has {size}. If "
            "optax.masked or optax.multi_transform is around optax.flatten, pass it "
            "mask_compatible_extra_args=True, so that hess_diag is masked as the updates are."
        )
    return ravel_pytree(hess_diag)[0]


def bounded_square(h: jax.Array) -> jax.Array:
    """The square of a finite number, or one that is finite too where it would overflow."""
    largest = float(jnp.finfo(h.dtype).max) ** 0.5 / 2
    return jnp.square(jnp.clip(h, -largest, largest))


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
