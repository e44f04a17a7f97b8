"""The noun of the library: what every value of a program carries forward.

For an equation ``y = f(x)`` with Jacobian ``J`` and an independent, zero-mean perturbation of every
entry of ``x`` with half-variances ``vx``,

    dy = J dx + sum_i d2f/dx_i2 vx_i        (shift:  how far the mean moves)
    vy = (J*J) vx                           (spread: how far the entries scatter)

Both are linear in ``(dx, vx)``; the transpose of the loss's shift is ``(gradient, HesScale)``.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

__all__ = ["Moments"]


class Moments(NamedTuple):
    """A value, the first-order change of it, and half the variance of its entries.

    ``None`` for a shift or a spread means zero: nothing is computed for it.

    Attributes:
      primal: The value, an array of any shape.
      shift: How far its mean moves, in its shape and dtype.
      spread: Half the variance of its entries, in its shape, and float32 at least.
    """

    primal: Any
    shift: Any = None
    spread: Any = None

    @property
    def active(self) -> bool:
        """Whether the value moves at all with the differentiated arguments."""
        return self.shift is not None or self.spread is not None


def spread_dtype(*dtypes: Any) -> Any:
    """The dtype spreads are carried in: at least float32, since squares leave half precision."""
    double = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
