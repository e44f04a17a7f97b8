"""HesScale for JAX: a loss's gradient and an approximate Hessian diagonal in one pass.

``hesscale(loss)`` is to the curvature what ``jax.grad(loss)`` is to the gradient; the Optax
transformations precondition with it.
"""

import importlib.metadata

from hesscale_jax import rules
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.every import value_and_factors_every, value_and_hesscale_every
from hesscale_jax.explanation import explain
from hesscale_jax.factored import Bases, Factors, Layout
from hesscale_jax.factors import layouts, value_and_factors
from hesscale_jax.moments import Moments
from hesscale_jax.optimizers import (
    ScaleByCurvatureTrustRegionState,
    ScaleByHesScaleState,
    ScaleByOrthogonalNewtonState,
    adahesscale,
    diagonal_newton,
    hess_diag_as_estimator,
    orthogonal_newton,
    scale_by_curvature_trust_region,
    scale_by_diagonal_newton,
    scale_by_hesscale,
    scale_by_orthogonal_newton,
    scaled_adahesscale,
    scaled_adam,
)
from hesscale_jax.regions import exact, sampled
from hesscale_jax.report import Report
from hesscale_jax.rules import RULES
from hesscale_jax.transform import hesscale, value_and_hesscale

__all__ = [
    "RULES",
    "Bases",
    "Factors",
    "Layout",
    "Moments",
    "Report",
    "ScaleByCurvatureTrustRegionState",
    "ScaleByHesScaleState",
    "ScaleByOrthogonalNewtonState",
    "UnsupportedPrimitiveError",
    "adahesscale",
    "diagonal_newton",
    "exact",
    "explain",
    "hess_diag_as_estimator",
    "hesscale",
    "layouts",
    "orthogonal_newton",
    "rules",
    "sampled",
    "scale_by_curvature_trust_region",
    "scale_by_diagonal_newton",
    "scale_by_hesscale",
    "scale_by_orthogonal_newton",
    "scaled_adahesscale",
    "scaled_adam",
    "value_and_factors",
    "value_and_factors_every",
    "value_and_hesscale",
    "value_and_hesscale_every",
]

try:
    __version__ = importlib.metadata.version("hesscale_jax")
except importlib.metadata.PackageNotFoundError:  # Imported from a checkout that is not installed.
    __version__ = "0.0.0"
