"""HesScale for JAX: a loss's gradient and an approximate Hessian diagonal in one pass.

``hesscale(loss)`` is to the curvature what ``jax.grad(loss)`` is to the gradient; the Optax
transformations precondition with it.
"""

from hesscale_jax import rules
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.explanation import explain
from hesscale_jax.moments import Moments
from hesscale_jax.optimizers import ScaleByHesScaleState, adahesscale, scale_by_hesscale
from hesscale_jax.report import Report
from hesscale_jax.rules import RULES
from hesscale_jax.transform import hesscale, value_and_hesscale

__all__ = [
    "RULES",
    "Moments",
    "Report",
    "ScaleByHesScaleState",
    "UnsupportedPrimitiveError",
    "adahesscale",
    "explain",
    "hesscale",
    "rules",
    "scale_by_hesscale",
    "value_and_hesscale",
]

__version__ = "0.1.0"
