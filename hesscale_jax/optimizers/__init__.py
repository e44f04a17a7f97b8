"""Optax transformations that take the curvature as the extra argument ``hess_diag``."""

from hesscale_jax.optimizers.adahesscale import (
    ScaleByHesScaleState,
    adahesscale,
    scale_by_hesscale,
)

__all__ = ["ScaleByHesScaleState", "adahesscale", "scale_by_hesscale"]
