"""Hutchinson's estimate of the Hessian diagonal (Bekas et al., 2007), the peer of HesScale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def value_and_hutchinson(fun: Callable[..., jax.Array]) -> Callable[..., Any]:
    """`z * (H z)` for one random `z` of signs, with the value and the gradient on the way.

    Returns:
        A function of a random key and the arguments of `fun` that returns
        `(value, (grad, estimate))` with respect to the first of them.
    """

    def estimate(key: jax.Array, params: Any, *args: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        signs = _random_signs(key, params)
        (value, grad), (_, product) = jax.jvp(
            lambda p: jax.value_and_grad(fun)(p, *args), (params,), (signs,)
        )
        return value, (grad, jax.tree.map(jnp.multiply, signs, product))

    return estimate


def _random_signs(key: jax.Array, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, signs)
