"""Any equation that JAX differentiates twice: by its dense Jacobian, or by random signs.

Both hold for one equation: its operands that differ, and the entries of each, count as independent.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Value, is_inexact, size
from hesscale_jax._mesh import automatically, lying, on_mesh
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push
from hesscale_jax.rules.table import ByEquation, Find

__all__ = ["MAX_ENTRIES", "SAMPLES", "dense", "matrix_function", "sampled", "signs", "varying"]

# A matrix of 16 rows: a Cholesky factor's Jacobian took 20 ms there on a CPU, with 32 rows 280 ms,
# where 16 signs took 1 ms and the gradient 0.1 ms.
MAX_ENTRIES = 2**16

# The second derivatives in each of m entries hold m**2 numbers. Up to so many for each of
# MAX_ENTRIES are written out: those of 4096 entries, which take 200 MB.
MORE_OF_OPERAND = 2**8

# The error of the diagonal through one Cholesky factor of 16 rows, relative to its size: 1.5 with
# 4 signs, 0.8 with 16.
SAMPLES = 16

# Their last two axes are a matrix each, those in front of them a batch.
FACTORISATIONS = frozenset({"cholesky", "eigh", "lu", "qr", "svd"})

# JAX cannot vectorise them.
ONE_BY_ONE = frozenset({"spsolve"})

# (equation, primals, position, its spread, positions of results, whether curved) -> their spreads,
# and what bends them if so
Pushed = Callable[..., tuple[list[Any], list[Any]]]


def dense(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + sum_i d2f/dx_i2 vx_i, vy = (J*J) vx``, with the derivatives written out.

    The domain is every primitive that JAX differentiates twice, with real operands and results. For
    an operand of n entries and results of m it takes n evaluations of the equation's second
    derivative and n m numbers of memory. In a batch of matrices that are factorised, n is that of
    one matrix. The table has it for matrix functions of small arrays. To have it at any size::

        hesscale(loss, rules=hesscale_jax.RULES | {"cholesky": hesscale_jax.rules.dense})
    """
    return _of_each_operand(eqn, operands, recurse, _written_out)


def sampled(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + f''[z, z*vx], vy = (J z) * (J (z*vx))``, averaged over random signs ``z``.

    The domain is that of ``dense``, of which it is an unbiased estimate at the cost of a few
    derivatives, whatever the size: the mean over ``z`` of ``z_i z_j`` is 1 for ``i = j`` and else
    0. The table has it for matrix functions of large arrays, with 16 signs;
    ``matrix_function(max_entries=0, samples=64)`` takes more. The diagonal is noisy, and may be
    negative where that of ``dense`` isn't. The gradient is not sampled.

    The signs are drawn from a fixed key, the primitive's name and the operand's position and shape,
    so that the same loss gives the same diagonal each time. Two equations of one primitive and
    shape therefore share them: between such equations in a row the estimate is not unbiased.

    Examples:
      >>> import jax.numpy as jnp, hesscale_jax as hs
      >>> rules = hs.RULES | {"cholesky": hs.rules.sampled}
      >>> def loss(x):
      ...     return jnp.log(jnp.diagonal(jnp.linalg.cholesky(jnp.diag(x)))).sum()
      >>> grad, hess_diag = hs.hesscale(loss, rules=rules)(jnp.array([1.0, 2.0]))
      >>> print(grad)
      [0.5  0.25]
    """
    return _of_each_operand(eqn, operands, recurse, functools.partial(_estimated, SAMPLES))


def matrix_function(max_entries: int = MAX_ENTRIES, samples: int = SAMPLES) -> ByEquation:
    """``dense`` where the Jacobian is small, else ``sampled``: for primitives without a cheap form.

    The table has it for factorisations and for ``reduce`` by a function of your own. The Jacobian
    of a batch of matrices holds one for each matrix.

    Args:
      max_entries: The largest Jacobian in one operand that is written out, in numbers of all
        results together. That of one matrix of n by n has ``n**4``: by default, one of 16 rows
        still is. Of an operand of m entries, ``m**2`` may be 256 times as many: by default, 4096
        entries of a function of few results.
      samples: How many random signs are averaged over beyond that.

    Examples:
      >>> import hesscale_jax as hs
      >>> rules = hs.RULES | {"cholesky": hs.rules.matrix_function(max_entries=2**20)}
    """

    def rule(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        return _of_each_operand(eqn, operands, recurse, functools.partial(_estimated, samples))

    rule.__name__ = "sampled"

    def choose(eqn: Equation, find: Find) -> Any:
        """By the dense Jacobian where it is small, else by random signs: `dense`, `sampled`."""
        of_operand, of_jacobian = _entries(eqn)
        fits = of_jacobian <= max_entries and of_operand**2 <= MORE_OF_OPERAND * max_entries
        return dense if fits else rule

    return ByEquation(choose)


def batch_axes(eqn: Equation, i: int) -> Sequence[int]:
    """The axes of operand ``i`` along which the equation acts on each part by itself.

    They are the first axes of the results.
    """
    rank = len(eqn.inputs[i].shape)
    if eqn.name in FACTORISATIONS:
        return range(rank - 2)
    if eqn.name == "reduce" and i < len(eqn.outputs):
        return [axis for axis in range(rank) if axis not in eqn.params["dimensions"]]
    return ()


def signs(eqn: Equation, i: int, x: Any, samples: int) -> Any:
    """As many arrays of random signs as there are samples, in the shape and dtype of ``x``."""
    seed = zlib.crc32(f"{eqn.name} {i} {x.shape}".encode())
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    return jax.random.rademacher(key, (samples, *x.shape), x.dtype)


def varying(eqn: Equation, operands: Sequence[Moments]) -> list[tuple[int, Moments]]:
    """The operands that have a spread, with their positions: a value that is several, once."""
    return [
        (i, x)
        for i, x in enumerate(operands)
        if x.spread is not None and x.primal.size and eqn.inputs.index(eqn.inputs[i]) == i
    ]


def _entries(eqn: Equation) -> tuple[Any, Any]:
    """How many numbers the largest operand has, and the Jacobian in it."""
    results = sum(size(v.shape) for v in eqn.outputs if is_inexact(v))
    of_operands = [
        math.prod(n for axis, n in enumerate(v.shape) if axis not in batch_axes(eqn, i))
        for i, v in enumerate(eqn.inputs)
        if not isinstance(v, Constant) and is_inexact(v)
    ]
    largest = max(of_operands, default=0)
    return largest, largest * results


def _of_each_operand(
    eqn: Equation, operands: Sequence[Moments], recurse: Any, pushed: Pushed
) -> list[Moments]:
    """The shifts pushed through, and what the spread of each operand is ``pushed`` to."""
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    spreads: list[Any] = [None] * len(results)
    carried = [k for k, v in enumerate(eqn.outputs) if is_inexact(v)]
    for i, x in varying(eqn, operands):

        def compute(i: int = i, x: Moments = x) -> tuple[list[Any], list[Any]]:
            given = list(map(on_mesh, primals))
            return pushed(eqn, given, i, on_mesh(x.spread), carried, recurse.curved)

        # JAX's second derivatives of these do not take all ways to lie on explicit axes.
        alone = eqn.name in FACTORISATIONS
        found, bends = automatically(compute, x.primal) if alone else compute()
        for k, spread in zip(carried, found, strict=True):
            spreads[k] = total(spreads[k], spread)
        for k, bend in zip(carried, bends, strict=False):
            shifts[k] = total(shifts[k], lax.convert_element_type(bend, results[k].dtype))
    return list(map(Moments, results, shifts, spreads))


def _written_out(
    eqn: Equation,
    primals: Sequence[Any],
    i: int,
    spread: Any,
    carried: Sequence[int],
    curved: bool,
) -> tuple[list[Any], list[Any]]:
    """The spreads of results from that of operand ``i``, and what it bends them by."""
    slopes, bends = _derivatives(eqn, primals, i, carried)
    values, batch = [eqn.outputs[k] for k in carried], batch_axes(eqn, i)

    def weighted(derivatives: Any, value: Value) -> Any:
        return _weighted(derivatives, spread, batch, value)

    squares = [slope**2 for slope in slopes]
    bent = list(map(weighted, bends, values)) if curved else []
    return list(map(weighted, squares, values)), bent


def _derivatives(eqn: Equation, primals: Sequence[Any], i: int, carried: Sequence[int]) -> Any:
    """The first and the second derivative of the results in each entry of operand ``i``.

    The entry is one of each part of a batch at once.
    """
    x = primals[i]
    fun = _carried(eqn, primals, i, carried)
    own = [1 if axis in batch_axes(eqn, i) else n for axis, n in enumerate(x.shape)]
    count = math.prod(own)

    def in_direction(e: Any) -> Any:
        e = lying(jnp.broadcast_to(e, x.shape), jax.typeof(x))
        return jax.jvp(lambda x: jax.jvp(fun, [x], [e])[1], [x], [e])

    return jax.vmap(in_direction)(jnp.eye(count, dtype=x.dtype).reshape(count, *own))


def _weighted(derivatives: Any, spread: Any, batch: Sequence[int], value: Any) -> Any:
    """``sum_i derivatives_i spread_i``, in the dtype of the result's spread."""
    shape = [spread.shape[axis] for axis in batch]
    own = [axis for axis in range(spread.ndim) if axis not in batch]
    rows = jnp.transpose(spread, (*batch, *own)).reshape(*shape, len(derivatives))
    columns = derivatives.reshape(len(derivatives), *shape, math.prod(value.shape[len(shape) :]))
    sums = jnp.einsum("...i,i...k->...k", rows, columns.astype(spread.dtype))
    return lax.convert_element_type(sums.reshape(value.shape), spread_dtype(value.dtype))


def _estimated(
    samples: int,
    eqn: Equation,
    primals: Sequence[Any],
    i: int,
    spread: Any,
    carried: Sequence[int],
    curved: bool,
) -> tuple[list[Any], list[Any]]:
    """The same by random signs ``z``: ``(J z) * (J t)`` and ``f''[z, t]`` for ``t = z*vx``."""
    fun, x = _carried(eqn, primals, i, carried), primals[i]

    def along(z: Any) -> Any:
        t = lax.convert_element_type(z * spread, x.dtype)

        def slope(x: Any) -> Any:
            return jax.jvp(fun, [x], [z])[1]

        slopes, bends = jax.jvp(slope, [x], [t])
        pushed = jax.jvp(fun, [x], [t])[1]
        return [s * p for s, p in zip(slopes, pushed, strict=True)], bends

    z = signs(eqn, i, x, samples)
    squares, bends = lax.map(along, z) if eqn.name in ONE_BY_ONE else jax.vmap(along)(z)
    wide = [y.astype(spread_dtype(y.dtype)).mean(0) for y in squares]
    return wide, [bend.mean(0) for bend in bends] if curved else []


def _carried(eqn: Equation, primals: Sequence[Any], i: int, carried: Sequence[int]) -> Any:
    """The results that carry moments, as a function of the value that operand ``i`` is."""

    def fun(x: Any) -> list[Any]:
        operands = list(primals)
        if eqn.name == "reduce":  # JAX differentiates it in all of its arrays, or not at all.
            nothing = lax.select(False, x.ravel()[0], jnp.zeros((), x.dtype))
            for k, y in enumerate(primals[: len(eqn.outputs)]):
                operands[k] = y + nothing.astype(y.dtype) if is_inexact(y) else y
        results = _jaxpr.listed(_jaxpr.of_values(eqn, operands, [i])(x), eqn)
        return [results[k] for k in carried]

    return fun
