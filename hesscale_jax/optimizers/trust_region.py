r"""Step-size scaling: updates shortened until the curvature along them is within bounds.

.. math::

    v_t = \beta_2 v_{t-1} + (1 - \beta_2) h_t^2, \qquad q_t = \sqrt{v_t}, \qquad
    T_t = \sum q_t u_t^2, \qquad u_t \leftarrow \min(s, \sqrt{2 \delta / T_t})\, u_t
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from hesscale_jax.optimizers.adahesscale import Moment, adahesscale
from hesscale_jax.optimizers.hess_diag import (
    accumulator_dtype,
    bounded_square,
    cast_like,
    keep_unless,
    match,
    usable,
)

MaskOrFn = Any | Callable[[optax.Params], Any] | None


class ScaleByCurvatureTrustRegionState(NamedTuple):
    """State of :func:`scale_by_curvature_trust_region`."""

    nu: optax.Updates  # EMA of the curvature's square, in float32 at least; starts at 0.
    scale: jax.Array  # The last factor; shape=(), in the widest dtype of nu; starts at `max_scale`.


def scale_by_curvature_trust_region(
    delta: ArrayLike = 1e-8,
    b2: ArrayLike = 0.999,
    max_scale: ArrayLike = 1.0,
    *,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Shorten updates, all by one factor, so that the curvature along them stays within bounds.

    With the updates :math:`u_t`, learning rate included, and the Hessian's diagonal :math:`h_t`,

    .. math::

        \begin{align*}
          v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) h_t^2 \\
          T_t &\leftarrow \textstyle\sum \sqrt{v_t}\, u_t^2 \quad \text{over all parameters} \\
          u_t &\leftarrow \min\left(s, \sqrt{2 \delta / T_t}\right) u_t
        \end{align*}

    so that :math:`\tfrac12 u_t^\top \mathrm{diag}(\sqrt{v_t})\, u_t \le \delta`. The average starts
    at 0 and is not corrected for it: the first steps are bounded less.

    Args:
      delta: The bound, in units of the loss; positive.
      b2: Decay rate of the average of the squared curvature.
      max_scale: :math:`s`, the factor where the curvature allows a larger one; 1 never lengthens.
      skip_nonfinite: As for :func:`scale_by_hesscale`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`, last in a chain: after the learning rate.
      Its ``update`` requires ``hess_diag`` and takes ``refreshed``, as :func:`scale_by_hesscale`'s
      does.

    Raises:
      TypeError: From ``update``, if ``hess_diag`` is missing.
      ValueError: From ``update``, if it differs from the updates in structure or shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from hesscale_jax.optimizers import scale_by_curvature_trust_region
      >>> solver = scale_by_curvature_trust_region(delta=1e-2, b2=0.0)
      >>> updates, curvature = jnp.array([3.0, 4.0]), jnp.array([8.0, 8.0])
      >>> scaled, _ = solver.update(updates, solver.init(updates), hess_diag=curvature)
      >>> print(scaled, f"{0.5 * jnp.sum(curvature * scaled**2):.4f}")
      [0.03 0.04] 0.0100

    References:
      Elsayed et al., `Revisiting Scalable Hessian Diagonal Approximations for Applications in
      Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
    """

    def init_fn(params: optax.Params) -> ScaleByCurvatureTrustRegionState:
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator_dtype(p)), params)
        return ScaleByCurvatureTrustRegionState(nu, jnp.asarray(max_scale, widest(nu)))

    def widest(nu: optax.Updates) -> DTypeLike:
        return np.result_type(np.float32, *(v.dtype for v in jax.tree.leaves(nu)))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByCurvatureTrustRegionState,
        params: optax.Params | None = None,
        *,
        hess_diag: optax.Updates | None = None,
        refreshed: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByCurvatureTrustRegionState]:
        del params, extra_args
        h = cast_like(match(hess_diag, updates, "scale_by_curvature_trust_region"), state.nu)
        fresh = usable(h, refreshed, skip_nonfinite)
        nu = optax.tree.update_moment(jax.tree.map(bounded_square, h), state.nu, b2, 1)
        nu = keep_unless(fresh, nu, state.nu)
        wide = cast_like(updates, state.nu)
        terms = jax.tree.leaves(jax.tree.map(lambda v, u: jnp.sum(jnp.sqrt(v) * u * u), nu, wide))
        dtype = state.scale.dtype
        total = sum((term.astype(dtype) for term in terms), jnp.zeros([], dtype))
        # No curvature along the updates: the root is infinite, and the largest factor is taken.
        scale = jnp.minimum(max_scale, jnp.sqrt(2 * delta / total)).astype(dtype)
        scaled = jax.tree.map(lambda u: scale.astype(u.dtype) * u, wide)
        state = ScaleByCurvatureTrustRegionState(cast_like(nu, state.nu), scale)
        return cast_like(scaled, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scaled_adahesscale(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = None,
    *,
    delta: ArrayLike = 1e-8,
    max_scale: ArrayLike = 1.0,
    moment: Moment = "squared",
    mu_dtype: DTypeLike | None = None,
    skip_nonfinite: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaHesScale with step-size scaling: 'Scaled AdaHesScale'.

    The updates of :func:`adahesscale`, shortened by :func:`scale_by_curvature_trust_region`.

    Args:
      learning_rate: As for :func:`adahesscale`.
      b1: As for :func:`adahesscale`.
      b2: Decay rate of the average of the curvature, in both.
      eps: As for :func:`adahesscale`.
      delta: The bound of :func:`scale_by_curvature_trust_region`.
      max_scale: The largest factor there.
      moment: As for :func:`adahesscale`.
      mu_dtype: As for :func:`adahesscale`.
      skip_nonfinite: As for :func:`scale_by_hesscale`.
      weight_decay: As for :func:`adahesscale`; the decay is part of the update that is shortened.
      mask: As for :func:`adahesscale`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` requires ``hess_diag``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from hesscale_jax.optimizers import scaled_adahesscale
      >>> solver = scaled_adahesscale(learning_rate=1.0, delta=1e-2)
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 10.0])
      >>> grad = curvature * params
      >>> updates, _ = solver.update(grad, solver.init(params), params, hess_diag=curvature)
      >>> print(updates)
      [-0.239... -0.239...]

    References:
      Elsayed et al., `Revisiting Scalable Hessian Diagonal Approximations for Applications in
      Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
    """
    direction = adahesscale(
        learning_rate,
        b1,
        b2,
        eps,
        moment=moment,
        mu_dtype=mu_dtype,
        skip_nonfinite=skip_nonfinite,
        weight_decay=weight_decay,
        mask=mask,
    )
    bound = scale_by_curvature_trust_region(delta, b2, max_scale, skip_nonfinite=skip_nonfinite)
    return optax.chain(direction, bound)


def scaled_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    delta: ArrayLike = 1e-8,
    max_scale: ArrayLike = 1.0,
    mu_dtype: DTypeLike | None = None,
    skip_nonfinite: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with step-size scaling by the curvature: 'Scaled Adam'.

    The updates of :func:`optax.adamw`, shortened by :func:`scale_by_curvature_trust_region`.

    Args:
      learning_rate: As for :func:`optax.adamw`.
      b1: As for :func:`optax.adamw`.
      b2: Decay rate of the averages of the squared gradient and of the squared curvature.
      eps: As for :func:`optax.adamw`.
      delta: The bound of :func:`scale_by_curvature_trust_region`.
      max_scale: The largest factor there.
      mu_dtype: As for :func:`optax.adamw`.
      skip_nonfinite: As for :func:`scale_by_hesscale`.
      weight_decay: As for :func:`optax.adamw`; here there is none by default, as in Adam.
      mask: As for :func:`optax.adamw`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` requires ``hess_diag``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from hesscale_jax.optimizers import scaled_adam
      >>> solver = scaled_adam(learning_rate=1.0, delta=1e-2)
      >>> params, curvature = jnp.array([1.0, 1.0]), jnp.array([1.0, 10.0])
      >>> grad = curvature * params
      >>> updates, _ = solver.update(grad, solver.init(params), params, hess_diag=curvature)
      >>> print(updates)
      [-0.239... -0.239...]

    References:
      Elsayed et al., `Revisiting Scalable Hessian Diagonal Approximations for Applications in
      Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
    """
    direction = optax.adamw(
        learning_rate, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask
    )
    bound = scale_by_curvature_trust_region(delta, b2, max_scale, skip_nonfinite=skip_nonfinite)
    return optax.chain(direction, bound)
