r"""AdaHesScale: Adam with the Hessian's diagonal in place of the gradient in its second moment.

.. math::

    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) h_t^2, \qquad
    u_t = \mathrm{clip}(\hat{m}_t / \sqrt{\hat{v}_t}, -1, 1) \quad \text{or} \quad
    \hat{m}_t / (\sqrt{\hat{v}_t} + \varepsilon)

The curvature :math:`h_t` arrives as the extra argument ``hess_diag``, so that any estimate of the
diagonal can feed it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from hesscale_jax.optimizers.hess_diag import (
    accumulator_dtype,
    bounded_square,
    cast_like,
    keep_unless,
    match,
    usable,
)

Moment = Literal["squared", "abs"]

# The power of the curvature that is averaged, and the root that brings it back to its units.
_POWER_AND_ROOT: dict[Moment, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "squared": (bounded_square, jnp.sqrt),
    "abs": (jnp.abs, lambda v: v),
}


class ScaleByHesScaleState(NamedTuple):
    """State of :func:`scale_by_hesscale`."""

    count: jax.Array  # type: ignore[assignment]  # Updates so far; shape=(), dtype=jnp.int32.
    mu: optax.Updates  # EMA of the updates, in their dtype or in `mu_dtype`.
    nu: optax.Updates  # EMA of the curvature's square or absolute value, in float32 at least.
    nu_count: jax.Array  # Curvatures in it so far; shape=(), dtype=jnp.int32.


def scale_by_hesscale(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = None,
    *,
    moment: Moment = "squared",
    mu_dtype: DTypeLike | None = None,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates by a running average of the Hessian's diagonal.

    See :func:`adahesscale` for the formula and for an example.

    Args:
        b1: Decay rate of the average of the updates.
        b2: Decay rate of the average of the curvature.
        eps: Term added to the denominator, in units of curvature; or None, to clip the updates to
            [-1, 1] instead.
        moment: What is averaged of the curvature: its square, whose root divides, or its absolute
            value, which divides as it is.
        mu_dtype: Dtype of the average of the updates; by default that of the parameters.
        skip_nonfinite: Whether to leave out, as a whole, a ``hess_diag`` with an infinity or NaN
            anywhere, as ``refreshed=False`` would: the step is then taken with the average as it
            is. ``nu_count`` tells how many have been taken in.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` requires the keyword
        argument ``hess_diag``, an array for each of the updates and of the same shape, and ignores
        extra arguments unknown to it. With ``refreshed=False`` it leaves ``hess_diag`` out; until
        one has been taken in, the updates are 0. The updates keep their dtypes; the arithmetic is
        done in float32 at least. Where the updates hold :class:`optax.MaskedNode`, as inside
        :func:`optax.masked`, ``hess_diag`` is not looked at.

    Raises:
        ValueError: If ``moment`` is not one of the above; from ``update``, if ``hess_diag`` differs
            from the updates in structure or shape.
        TypeError: From ``update``, if ``hess_diag`` is missing.
    """
    if moment not in _POWER_AND_ROOT:
        raise ValueError(f"'moment' must be one of {list(_POWER_AND_ROOT)}, got {moment!r}.")
    power, root = _POWER_AND_ROOT[moment]

    def init_fn(params: optax.Params) -> ScaleByHesScaleState:
        return ScaleByHesScaleState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accumulator_dtype(p)), params),
            nu_count=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByHesScaleState,
        params: optax.Params | None = None,
        *,
        hess_diag: optax.Updates | None = None,
        refreshed: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByHesScaleState]:
        del params, extra_args
        # nu's dtype is that of the arithmetic: the square of a half-precision curvature would
        # overflow in its own.
        h = cast_like(match(hess_diag, updates, "scale_by_hesscale"), state.nu)
        g = cast_like(updates, state.nu)

        fresh = usable(h, refreshed, skip_nonfinite)

        count = optax.safe_increment(state.count)
        nu_count = keep_unless(fresh, optax.safe_increment(state.nu_count), state.nu_count)
        mu = optax.tree.update_moment(g, cast_like(state.mu, state.nu), b1, 1)
        nu = optax.tree.update_moment(jax.tree.map(power, h), state.nu, b2, 1)
        nu = keep_unless(fresh, nu, state.nu)
        # Strict dtype promotion refuses the power of an integer.
        mu_hat = optax.tree.bias_correction(mu, b1, count.astype(float))
        nu_hat = optax.tree.bias_correction(nu, b2, nu_count.astype(float))
        scaled = jax.tree.map(lambda m, v: divided(m, root(v), eps), mu_hat, nu_hat)
        if fresh is not None:
            # Without any curvature the average is 0/0.
            scaled = jax.tree.map(lambda u: jnp.where(nu_count > 0, u, 0), scaled)

        state = ScaleByHesScaleState(
            count=count,
            mu=cast_like(mu, state.mu),
            nu=cast_like(nu, state.nu),
            nu_count=nu_count,
        )
        return cast_like(scaled, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def divided(m: jax.Array, curvature: jax.Array, eps: ArrayLike | None) -> jax.Array:
    """``m / (curvature + eps)``; without eps ``clip(m / curvature, -1, 1)``, with 0 for 0 / 0."""
    if eps is not None:
        return m / (curvature + eps)
    larger = jnp.maximum(curvature, jnp.abs(m))
    return m / jnp.where(larger == 0, 1, larger)


def adahesscale(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike | None = None,
    *,
    moment: Moment = "squared",
    mu_dtype: DTypeLike | None = None,
    skip_nonfinite: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHesScale: Adam with the Hessian's diagonal in place of the gradient in its second moment.

    With the gradient :math:`g_t`, the diagonal :math:`h_t` of the Hessian or an estimate of it,
    and the learning rate :math:`\alpha_t`, the updates are

    .. math::

        \begin{align*}
          m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
          v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) h_t^2 \\
          \hat{m}_t &\leftarrow m_t / (1 - \beta_1^t) \\
          \hat{v}_t &\leftarrow v_t / (1 - \beta_2^t) \\
          u_t &\leftarrow -\alpha_t \,\mathrm{clip}\left(
            \hat{m}_t / \sqrt{\hat{v}_t}, -1, 1\right)
        \end{align*}

    With ``moment="abs"``, :math:`h_t^2` becomes :math:`|h_t|` and the root falls away. In both, a
    gradient over a curvature is a length in parameter space: at :math:`\alpha_t = 1` the step is
    Newton's, and unlike Adam's it is blind to the scale of each parameter, until the clip. That
    bounds it where the curvature is 0 or next to nothing: no parameter moves by more than
    :math:`\alpha_t`, whatever the scale of the loss.

    With a number for ``eps`` it is the authors' form, which divides by
    :math:`\sqrt{\hat{v}_t} + \varepsilon` and does not clip. Theirs is 1e-8: where the curvature is
    0, a step is then 1e8 times the gradient.

    Args:
        learning_rate: A global scaling factor, either fixed or evolving along iterations with a
            scheduler, see :func:`optax.scale_by_learning_rate`.
        b1: Decay rate of the average of the gradients.
        b2: Decay rate of the average of the curvature.
        eps: Term added to the denominator, in units of curvature, or None for the clip, see above.
        moment: ``"squared"`` or ``"abs"``, see above.
        mu_dtype: Dtype of the average of the gradients; by default that of the parameters.
        skip_nonfinite: As for :func:`scale_by_hesscale`.
        weight_decay: Strength of the weight decay, decoupled as in :func:`optax.adamw`: multiplied
            by the learning rate, not by the curvature. None for no decay.
        mask: A tree with the structure of the parameters or a prefix of it, or a callable that
            returns one given the parameters: True where the weight decay applies.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` requires ``hess_diag``,
        see :func:`scale_by_hesscale`; and ``params``, if there is weight decay.

    Raises:
        ValueError: As :func:`scale_by_hesscale`.
        TypeError: As :func:`scale_by_hesscale`.

    Examples:
        A quadratic, whose Hessian's diagonal is known. However different its curvatures, every
        parameter goes to its minimum at one rate:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from hesscale_jax.optimizers import adahesscale
        >>> curvature = jnp.array([1e-3, 1.0, 1e3])
        >>> def loss(params):
        ...     return 0.5 * jnp.sum(curvature * params**2)
        >>> params = jnp.ones(3)
        >>> solver = adahesscale(learning_rate=0.1)
        >>> state = solver.init(params)
        >>> for _ in range(10):
        ...     grad = jax.grad(loss)(params)
        ...     updates, state = solver.update(grad, state, params, hess_diag=curvature)
        ...     params = optax.apply_updates(params, updates)
        >>> [round(float(p), 2) for p in params]
        [0.23, 0.23, 0.23]

    References:
        Elsayed and Mahmood, `HesScale: Scalable Computation of Hessian Diagonals
        <https://arxiv.org/abs/2210.11639>`_, 2022

        Elsayed et al., `Revisiting Scalable Hessian Diagonal Approximations for Applications in
        Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024

    .. warning::
        :func:`optax.MultiSteps` averages the updates of its micro-batches but hands on only the
        last one's ``hess_diag``: average the two together, before ``update``. And
        :func:`optax.apply_if_finite` looks at the updates alone. A NaN in ``hess_diag`` passes it,
        and is left out here, unless ``skip_nonfinite=False``.
    """
    decay = (
        optax.identity()
        if weight_decay is None
        else optax.add_decayed_weights(weight_decay, mask=mask)
    )
    return optax.chain(
        scale_by_hesscale(
            b1=b1,
            b2=b2,
            eps=eps,
            moment=moment,
            mu_dtype=mu_dtype,
            skip_nonfinite=skip_nonfinite,
        ),
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )
