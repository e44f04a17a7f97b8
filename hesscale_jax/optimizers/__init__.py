"""Optax transformations that take the curvature as the extra argument ``hess_diag``."""

from hesscale_jax.optimizers.adahesscale import (
    ScaleByHesScaleState,
    adahesscale,
    scale_by_hesscale,
)
from hesscale_jax.optimizers.diagonal_newton import diagonal_newton, scale_by_diagonal_newton
from hesscale_jax.optimizers.estimator import hess_diag_as_estimator
from hesscale_jax.optimizers.trust_region import (
    ScaleByCurvatureTrustRegionState,
    scale_by_curvature_trust_region,
    scaled_adahesscale,
    scaled_adam,
)

__all__ = [
    "ScaleByCurvatureTrustRegionState",
    "ScaleByHesScaleState",
    "adahesscale",
    "diagonal_newton",
    "hess_diag_as_estimator",
    "scale_by_curvature_trust_region",
    "scale_by_diagonal_newton",
    "scale_by_hesscale",
    "scaled_adahesscale",
    "scaled_adam",
]
