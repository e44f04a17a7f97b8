r"""Newton's method with the diagonal of the Hessian: ``g / (|h| + damping)``."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hesscale_jax.optimizers.hess_diag import (
    accumulator_dtype,
    cast_like,
    keep_unless,
    match,
    usable,
)

Negative = Literal["abs", "floor"]

# What stands for negative curvature.
_MADE_POSITIVE: dict[Negative, Callable[..., Any]] = {
    "abs": jnp.abs,
    "floor": lambda h: jnp.maximum(h, 0),
}


def scale_by_diagonal_newton(
    damping: ArrayLike, *, negative: Negative = "abs", skip_nonfinite: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Divide updates by the Hessian's diagonal.

    See :func:`diagonal_newton` for the formula and for an example.

    Args:
      damping: Term added to the denominator, in units of curvature; positive where the curvature
        may be zero.
      negative: What stands for negative curvature: its absolute value, or 0 (``"floor"``).
      skip_nonfinite: Whether the updates are 0 if there is an infinity or NaN anywhere in
        ``hess_diag``.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` without state. Its ``update`` requires
      ``hess_diag``, as :func:`scale_by_hesscale`'s does. Arithmetic is done in float32 at least.

    Raises:
      ValueError: If ``negative`` is not one of the above; from ``update``, if ``hess_diag`` differs
        from the updates in structure or shape, or if there is a ``refreshed``: no curvature is kept
        for the steps between.
      TypeError: From ``update``, if ``hess_diag`` is missing.
    """
    if negative not in _MADE_POSITIVE:
        raise ValueError(f"'negative' must be one of {list(_MADE_POSITIVE)}, got {negative!r}.")
    made_positive = _MADE_POSITIVE[negative]

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        hess_diag: optax.Updates | None = None,
        refreshed: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        if refreshed is not None:
            raise ValueError(
                "scale_by_diagonal_newton keeps no curvature from one step to the next: it takes a "
                "diagonal at every step, and no 'refreshed'. With value_and_hesscale_every, use an "
                "optimizer that averages the curvature, such as adahesscale."
            )
        matched = match(hess_diag, updates, "scale_by_diagonal_newton")
        g = jax.tree.map(lambda u: jnp.asarray(u, accumulator_dtype(u)), updates)
        h = cast_like(matched, g)
        scaled = jax.tree.map(lambda g, h: g / (made_positive(h) + damping), g, h)
        scaled = keep_unless(usable(h, None, skip_nonfinite), scaled, optax.tree.zeros_like(g))
        return cast_like(scaled, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def diagonal_newton(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike,
    *,
    negative: Negative = "abs",
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with the Hessian's diagonal alone.

    .. math::

        u_t = -\alpha_t\, g_t / (|h_t| + \mu)

    with the gradient :math:`g_t`, the diagonal :math:`h_t` of the Hessian or an estimate of it, and
    the damping :math:`\mu`. Nothing is averaged: it is for full batches, or an estimate without
    noise.

    Args:
      learning_rate: A fixed factor or a schedule, see :func:`optax.scale_by_learning_rate`.
      damping: As for :func:`scale_by_diagonal_newton`.
      negative: As for :func:`scale_by_diagonal_newton`.
      skip_nonfinite: As for :func:`scale_by_diagonal_newton`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` requires ``hess_diag``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from hesscale_jax.optimizers import diagonal_newton
      >>> solver = diagonal_newton(learning_rate=1.0, damping=0.0)
      >>> params, curvature = jnp.array([3.0, -2.0]), jnp.array([10.0, 0.1])
      >>> grad = curvature * params
      >>> updates, _ = solver.update(grad, solver.init(params), params, hess_diag=curvature)
      >>> print(params + updates)
      [0. 0.]

    References:
      Becker and LeCun, Improving the Convergence of Back-Propagation Learning with Second Order
      Methods, 1988, where curvature is not negative.
    """
    return optax.chain(
        scale_by_diagonal_newton(damping, negative=negative, skip_nonfinite=skip_nonfinite),
        optax.scale_by_learning_rate(learning_rate),
    )
