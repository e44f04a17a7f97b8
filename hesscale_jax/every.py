"""The diagonal at every k-th step, the gradient at each: 1 + 0.65 / k gradients a step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hesscale_jax.rules import RULES
from hesscale_jax.transform import value_and_hesscale

__all__ = ["value_and_hesscale_every"]


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
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")

    def transform(
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        *,
        curvature: str = "hessian",
        rules: Mapping[Any, Any] = RULES,
    ) -> Callable[..., Any]:
        with_diagonal = value_and_hesscale(fun, argnums, has_aux, curvature=curvature, rules=rules)
        without = jax.value_and_grad(fun, argnums, has_aux)

        @functools.wraps(fun)
        def every_fun(step: Any, *args: Any, **kwargs: Any) -> Any:
            def gradient() -> Any:
                value, grad = without(*args, **kwargs)
                return value, (grad, jax.tree.map(jnp.zeros_like, grad))

            def diagonal() -> Any:
                return with_diagonal(*args, **kwargs)

            if isinstance(step, int):
                return (*gradient(), False) if step % k else (*diagonal(), True)
            refreshed = jnp.equal(step % k, 0)
            return *jax.lax.cond(refreshed, diagonal, gradient), refreshed

        return every_fun

    return transform
