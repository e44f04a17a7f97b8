"""HesScale for JAX: the gradient and an approximate Hessian diagonal in one pass."""

from hesscale_jax import rules
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.moments import Moments
from hesscale_jax.optimizers import *  # noqa: F403
from hesscale_jax.rules import RULES
from hesscale_jax.transform import hesscale, value_and_hesscale
