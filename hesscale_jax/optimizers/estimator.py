"""The diagonal as a source for optimizers that ask for one, as Optax's Sophia does."""

from typing import Any

import optax

from hesscale_jax.optimizers.hess_diag import cast_like, keep_unless, match, usable


def hess_diag_as_estimator(*, skip_nonfinite: bool = True) -> optax.GradientTransformationExtraArgs:
    """A ``hessian_diagonal_fn`` for :func:`optax.contrib.sophia` that hands on ``hess_diag``.

    Sophia takes it in at every ``update_interval``-th step, and looks at it in no other.

    Args:
      skip_nonfinite: Whether to hand on zeros in place of a ``hess_diag`` with an infinity or NaN
        anywhere, which would stay in Sophia's average for good: a zero makes it smaller by ``b2``.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` returns ``hess_diag`` in
      the dtypes of the updates.

    Raises:
      TypeError: From ``update``, if ``hess_diag`` is missing.
      ValueError: From ``update``, if it differs from the updates in structure or shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from hesscale_jax.optimizers import hess_diag_as_estimator
      >>> solver = optax.contrib.sophia(0.1, hessian_diagonal_fn=hess_diag_as_estimator())
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 10.0])
      >>> grad, state = curvature * params, solver.init(params)
      >>> for _ in range(2):
      ...     updates, state = solver.update(grad, state, params, hess_diag=curvature)
      >>> print(updates)
      [-0.100... -0.100...]

    References:
      Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
      Pre-training <https://arxiv.org/abs/2305.14342>`_, 2023
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        hess_diag: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        h = cast_like(match(hess_diag, updates, "hess_diag_as_estimator"), updates)
        h = keep_unless(usable(h, None, skip_nonfinite), h, optax.tree.zeros_like(h))
        return h, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
