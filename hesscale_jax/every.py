"""The diagonal at every k-th step, the gradient at each: 1 + 0.65 / k gradients a step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hesscale_jax._mesh import lying
from hesscale_jax.factors import value_and_factors
from hesscale_jax.transform import value_and_hesscale

__all__ = ["value_and_factors_every", "value_and_hesscale_every"]


def value_and_hesscale_every(k: int) -> Callable[..., Callable[..., Any]]:
    """:func:`value_and_hesscale` with the diagonal refreshed at every ``k``-th step alone.

    Args:
      k: How many steps one diagonal serves; 1 or more.

    Returns:
      A function with the arguments of :func:`value_and_hesscale`. What it returns takes the number
      of the step before the loss's arguments and returns ``(value, (grad, hess_diag), refreshed)``.
      At steps that ``k`` does not divide, ``hess_diag`` is 0 and ``refreshed`` is False: handed on
      as ``refreshed=``, the optimizers here leave their averages of the curvature as they are.
      Auxiliary data must be arrays.

      The two ways are branches of one ``lax.cond``, unless the number of the step is a Python int,
      static under ``jit``: then only the one it asks for is traced, and ``refreshed`` is a Python
      bool. Two compiled programs, for ``min(step % k, 1)``, are faster than one with a branch where
      memory is what limits a step, or convolutions on a CPU (jax-ml/jax#12868).

    Raises:
      ValueError: ``k`` is less than 1.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(w):
      ...     return jnp.sum(w**4)
      >>> step_fun = jax.jit(hs.value_and_hesscale_every(10)(loss))
      >>> for step in (0, 1):
      ...     value, (grad, hess_diag), refreshed = step_fun(step, jnp.array([1.0, 2.0]))
      ...     print(grad, hess_diag, refreshed)
      [ 4. 32.] [12. 48.] True
      [ 4. 32.] [0. 0.] False
    """
    _check(k)
    return functools.partial(_every, k, value_and_hesscale)


def value_and_factors_every(k: int) -> Callable[..., Callable[..., Any]]:
    """:func:`value_and_factors` with the factors renewed at every ``k``-th step alone.

    Args:
      k: How many steps the factors serve; 1 or more.

    Returns:
      A function with the arguments of :func:`value_and_factors`, whose result takes the number of
      the step first and returns ``(value, (grad, factors), refreshed)``, as that of
      :func:`value_and_hesscale_every` does.

    Raises:
      ValueError: ``k`` is less than 1.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(w, x):
      ...     return jnp.sum((x @ w) ** 2) / 2
      >>> step_fun = jax.jit(hs.value_and_factors_every(10)(loss))
      >>> x = jnp.array([[1.0, 2.0]])
      >>> for step in (0, 1):
      ...     value, (grad, factors), refreshed = step_fun(step, jnp.ones((2, 1)), x)
      ...     print(factors.outputs, refreshed)
      [1.] True
      [0.] False
    """
    _check(k)
    return functools.partial(_every, k, value_and_factors)


def _every(
    k: int,
    transform: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **how: Any,
) -> Callable[..., Any]:
    curved = transform(fun, argnums, has_aux, **how)
    return alternating(k, curved, jax.value_and_grad(fun, argnums, has_aux))


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")


def alternating(
    k: int, curved: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """``curved`` at each step that ``k`` divides, else ``plain`` and a curvature of 0."""

    @functools.wraps(curved)
    def every_fun(step: Any, *args: Any, **kwargs: Any) -> Any:
        def curvature() -> Any:
            return curved(*args, **kwargs)

        def gradient() -> Any:
            value, grad = plain(*args, **kwargs)
            _, (_, absent) = jax.eval_shape(curvature)
            nothing = jax.tree.map(lambda x: lying(jnp.zeros(x.shape, x.dtype), x), absent)
            return value, (grad, nothing)

        if not isinstance(step, int | np.integer | jax.Array):
            raise TypeError(
                "the number of the step comes first, before the loss's arguments, got "
                f"{type(step).__name__}"
            )
        if isinstance(step, int):
            return (*gradient(), False) if step % k else (*curvature(), True)
        refreshed = jnp.equal(step % k, 0)
        return *jax.lax.cond(refreshed, curvature, gradient), refreshed

    return every_fun
