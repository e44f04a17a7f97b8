"""A ``TrainState`` for ``flax.linen`` that hands the curvature on to its optimizer."""

import functools
from typing import Any, Self

import optax
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
      ...     apply_fn=model.apply, params=params, tx=hs.adahesscale(0.5)
      ... )
      >>> @jax.jit
      ... def train_step(state, x, y):
      ...     def loss(params):
      ...         return jnp.mean((state.apply_fn(params, x) - y) ** 2)
      ...     value, (grads, hess_diag) = hs.value_and_hesscale(loss)(state.params)
      ...     return state.apply_gradients(grads=grads, hess_diag=hess_diag), value
      >>> for _ in range(30):
      ...     state, value = train_step(state, x, y)
      >>> bool(value < 0.01)
      True
    """

    def apply_gradients(
        self, *, grads: Any, hess_diag: Any = None, refreshed: Any = None, **kwargs: Any
    ) -> Self:
        """Update the parameters, the optimizer's state and the step.

        Args:
          grads: The gradients, with the structure of ``params``.
          hess_diag: The Hessian's diagonal, with the structure of ``params``; may be left out if
            the optimizer does not need it.
          refreshed: What :func:`hesscale_jax.value_and_hesscale_every` returns besides.
          **kwargs: Other attributes to replace, ``batch_stats`` say.

        Returns:
          The new state.

        Raises:
          TypeError: ``hess_diag`` is missing, and the optimizer needs it.
          ValueError: ``hess_diag`` differs from ``grads`` in structure or shape.
        """
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, hess_diag=hess_diag, refreshed=refreshed)
        informed = self.replace(tx=optax.GradientTransformation(tx.init, update))
        updated = super(TrainState, informed).apply_gradients(grads=grads, **kwargs)
        return updated.replace(tx=self.tx)
