"""Products of a sparse and a dense array, by ``jax.experimental.sparse``."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push

__all__ = ["sampled_product", "sparse_product"]

# The positions of an entry in the array, one row each: ``(eqn, operands) -> (..., nse, n)``.
Positions = Callable[[Equation, Sequence[Any]], Any]


def sampled_product(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*x, vw)`` at the positions of ``y``."""
    return _product(eqn, operands, 1, None)


def sparse_product(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = f(dx, w) + f(x, dw), vy = f(vx, w*w) + f(x*s, vw)``, of sparse ``x`` and dense ``w``.

    ``s`` is the sum of the numbers that are stored at one position, mostly ``x`` itself.
    """
    return _product(eqn, operands, len(operands) - 1, POSITIONS[eqn.name])


def _product(
    eqn: Equation, operands: Sequence[Moments], dense: int, positions: Positions | None
) -> list[Moments]:
    x, w = operands[0], operands[dense]
    primals = [y.primal for y in operands]
    (shift,) = push(eqn, primals, [y.shift for y in operands])
    wide = spread_dtype(x.primal.dtype, w.primal.dtype)
    typed = {"preferred_element_type": wide} if "preferred_element_type" in eqn.params else {}

    def spread(a: Any, b: Any) -> Any:
        rest = primals[1:dense], primals[dense + 1 :]
        a, b = (lax.convert_element_type(factor, wide) for factor in (a, b))
        y = _jaxpr.bind(eqn, a, *rest[0], b, *rest[1], **typed)
        return lax.convert_element_type(y, spread_dtype(eqn.outputs[0].dtype))

    of_w = None
    if w.spread is not None:
        data = widened(x.primal)
        summed = data if positions is None else _summed(eqn, data, positions(eqn, primals))
        of_w = spread(data * summed, w.spread)
    of_x = None if x.spread is None else spread(x.spread, jnp.square(widened(w.primal)))
    return [Moments(_jaxpr.bind(eqn, *primals), shift, total(of_x, of_w))]


def _summed(eqn: Equation, data: Any, positions: Any) -> Any:
    """For each number stored, the sum of those at its position."""
    info = eqn.params.get("lhs_spinfo")
    if info is not None and info.unique_indices:
        return data
    batch = positions.ndim - 2
    shape = jnp.broadcast_shapes(data.shape[:batch], positions.shape[:batch])
    data = jnp.broadcast_to(data, (*shape, *data.shape[batch:]))
    positions = jnp.broadcast_to(positions, (*shape, *positions.shape[batch:]))
    added = _added
    for _ in shape:
        added = jax.vmap(added)
    return added(data, positions)


def _added(data: Any, positions: Any) -> Any:
    count, rank = positions.shape
    if not (count and rank):
        return jnp.broadcast_to(data.sum(0), data.shape)
    order = jnp.lexsort(positions.T)
    ordered = positions[order]
    starts = jnp.any(ordered[1:] != ordered[:-1], axis=1)
    groups = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(starts)])
    sums = jax.ops.segment_sum(data[order], groups, count, indices_are_sorted=True)
    return jnp.zeros_like(data).at[order].set(sums[groups])


def _of_bcoo(eqn: Equation, operands: Sequence[Any]) -> Any:
    return operands[1]


def _of_coo(eqn: Equation, operands: Sequence[Any]) -> Any:
    return jnp.stack(operands[1:3], axis=-1)


def _of_csr(eqn: Equation, operands: Sequence[Any]) -> Any:
    """From the columns, and from where each row starts."""
    columns, starts = operands[1:3]

    def rows(columns: Any, starts: Any) -> Any:
        return jnp.cumsum(jnp.zeros(columns.size, int).at[starts].add(1)) - 1

    for _ in range(columns.ndim - 1):
        rows = jax.vmap(rows)
    return jnp.stack([rows(columns, starts), columns.astype(int)], axis=-1)


POSITIONS: dict[str, Positions] = {
    "bcoo_dot_general": _of_bcoo,
    "bcsr_dot_general": _of_csr,
    **dict.fromkeys(("coo_matmat", "coo_matvec"), _of_coo),
    **dict.fromkeys(("csr_matmat", "csr_matvec"), _of_csr),
}
