"""Optax transformations that take the curvature as an extra argument.

It is ``hess_diag``, or ``factors`` of :func:`orthogonal_newton`.
"""

from hesscale_jax.optimizers.adahesscale import (
    ScaleByHesScaleState,
    adahesscale,
    scale_by_hesscale,
)
from hesscale_jax.optimizers.diagonal_newton import diagonal_newton, scale_by_diagonal_newton
from hesscale_jax.optimizers.estimator import hess_diag_as_estimator
from hesscale_jax.optimizers.orthogonal_newton import (
    ScaleByOrthogonalNewtonState,
    orthogonal_newton,
    scale_by_orthogonal_newton,
)
from hesscale_jax.optimizers.trust_region import (
    ScaleByCurvatureTrustRegionState,
    scale_by_curvature_trust_region,
    scaled_adahesscale,
    scaled_adam,
)

__all__ = [
    "ScaleByCurvatureTrustRegionState",
    "ScaleByHesScaleState",
    "ScaleByOrthogonalNewtonState",
    "adahesscale",
    "diagonal_newton",
    "hess_diag_as_estimator",
    "orthogonal_newton",
    "scale_by_curvature_trust_region",
    "scale_by_diagonal_newton",
    "scale_by_hesscale",
    "scale_by_orthogonal_newton",
    "scaled_adahesscale",
    "scaled_adam",
]
