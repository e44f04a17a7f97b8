"""Fourier transforms of complex values in two parts, of any kind and over up to three axes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push

__all__ = ["fourier"]


def fourier(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = F dx, v_re = (S + C) / 2, v_im = (S - C) / 2`` by ``cos^2 t = (1 + cos 2t) / 2``.

    For ``x = a + i b`` of ``n`` entries, with ``t = 2 pi k j / n`` summed over the axes,

        S = sum_j c_j^2 (va_j + vb_j)     C_k = sum_j c_j^2 cos(2 t) (va_j - vb_j)

    where ``C`` is a transform at the doubled index, ``2 k`` modulo ``n``, and ``c`` is 1, or
    ``1 / n`` for an inverse, times 2 where an ``irfft`` takes an entry of half the spectrum twice.
    """
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    va, vb = [x.spread for x in operands] + [None] * (2 - len(operands))
    if va is None and vb is None:
        return list(map(Moments, results, shifts))
    plain, doubled = _sums(eqn, total(va, vb), total(va, None if vb is None else -vb))
    spreads = [(plain + doubled) / 2, (plain - doubled) / 2][: len(results)]
    return list(map(Moments, results, shifts, spreads))


def _sums(eqn: Equation, added: Any, subtracted: Any) -> tuple[Any, Any]:
    """``S`` and ``C``, in the shape of the result."""
    kind, lengths = _jaxpr.transform(eqn)
    shape = eqn.outputs[0].shape
    axes = range(len(shape) - len(lengths), len(shape))
    weights = np.ones(())
    if kind == lax.FftType.IRFFT:
        weights = _times_taken(lengths[-1]) ** 2
    if kind in (lax.FftType.IFFT, lax.FftType.IRFFT):
        weights = weights / float(np.prod(lengths)) ** 2
    weights = np.broadcast_to(weights, (1,) * (added.ndim - weights.ndim) + weights.shape)
    added, subtracted = (x * weights.astype(x.dtype) for x in (added, subtracted))
    plain = jnp.broadcast_to(jnp.sum(added, axes, keepdims=True), shape)
    doubled = jnp.fft.fftn(subtracted, lengths, axes).real
    for axis, n in zip(axes, lengths, strict=True):
        doubled = _jaxpr.entries(doubled, [2 * np.arange(shape[axis]) % n], axis)
    wide = spread_dtype(eqn.outputs[0].dtype)
    return lax.convert_element_type(plain, wide), lax.convert_element_type(doubled, wide)


def _times_taken(n: int) -> np.ndarray:
    """How often each entry of half a spectrum of ``n`` stands in the whole."""
    times = np.full(n // 2 + 1, 2.0)
    times[0] = 1
    if n % 2 == 0:
        times[-1] = 1
    return times
