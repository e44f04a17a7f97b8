"""A ``TrainState`` for ``flax.linen`` that hands the curvature on to its optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """Flax's ``TrainState``, for an optimizer whose ``update`` takes the Hessian's diagonal.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen
      >>> import hesscale_jax as hs
      >>> import hesscale_jax.linen
      >>> model = linen.Dense(1)
      >>> x, y = jnp.array([[1.0, 3.0], [2.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> params = model.init(jax.random.key(0), x)
      >>> state = hesscale_jax.linen.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=hs.adahesscale(0.1)
      ... )
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     def loss(params):
      ...         return jnp.mean((state.apply_fn(params, x) - y) ** 2)
      ...     value, (grads, hess_diag) = hs.value_and_hesscale(loss)(state.params)
      ...     return state.apply_gradients(grads=grads, hess_diag=hess_diag), value
      >>> for _ in range(50):
      ...     state, value = train_step(state, x, y)
      >>> bool(value < 0.1)
      True
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        hess_diag: Any = None,
        factors: Any = None,
        refreshed: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Update the parameters, the optimizer's state and the step.

        Where ``params`` has Flax's collection ``_overwrite_with_gradient``, of 8-bit training, the
        optimizer is handed the ``"params"`` of ``grads`` and of ``hess_diag``; the collection is
        replaced by that of ``grads``, as Flax does.

        Args:
          grads: The gradients, with the structure of ``params``.
          hess_diag: The Hessian's diagonal, with the structure of ``params``; may be left out if
            the optimizer does not need it.
          factors: What :func:`hesscale_jax.value_and_factors` returns, for an optimizer that needs
            it.
          refreshed: What :func:`hesscale_jax.value_and_hesscale_every` returns besides, or
            :func:`hesscale_jax.value_and_factors_every`.
          **kwargs: Attributes of this state to replace, ``batch_stats`` say. What is not an
            attribute is an extra argument of the optimizer's ``update``, as the ``value`` of
            :func:`optax.contrib.reduce_on_plateau` is.

        Returns:
          The new state.

        Raises:
          TypeError: ``hess_diag`` is missing, and the optimizer needs it; or a keyword is neither
            an attribute nor used by the optimizer.
          ValueError: ``hess_diag`` differs from ``grads`` in structure or shape.
        """
        attributes = {field.name for field in dataclasses.fields(self)}
        replaced = {name: kwargs.pop(name) for name in attributes & kwargs.keys()}
        curvature = {"hess_diag": hess_diag, "factors": factors, "refreshed": refreshed}
        given = {name: value for name, value in curvature.items() if value is not None}

        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any) -> Any:
            extra_args = {name: trained(value) for name, value in (given | kwargs).items()}
            for name in kwargs:
                with_unusable = extra_args | {name: object()}
                if is_traceable(tx.update, updates, state, params, **with_unusable):
                    raise TypeError(
                        f"apply_gradients got {name!r}, which is neither an attribute of "
                        f"{type(self).__name__} nor used by its optimizer."
                    )
            return tx.update(updates, state, params, **extra_args)

        informed = self.replace(tx=optax.GradientTransformation(tx.init, update))
        updated = super(TrainState, informed).apply_gradients(grads=grads, **replaced)
        return updated.replace(tx=replaced.get("tx", self.tx))


def trained(tree: Any) -> Any:
    """The part of a tree like ``grads`` that Flax hands to the optimizer."""
    if isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree:
        return tree["params"]
    return tree


def is_traceable(update: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the update makes do with its arguments, of which one is no use to anyone."""
    try:
        jax.eval_shape(lambda: update(*args, **kwargs))
    except Exception:
        return False
    return True
