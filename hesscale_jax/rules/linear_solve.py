"""Solutions of linear systems ``A x = b``, with ``N`` the inverse of ``A``.

    dy = J dx + 2 N r,   vy = (N*N) (vb + vA (x*x)),   r_i = sum_j vA_ij N_ji x_j

They are exact: an entry of ``A`` changes one equation of the system. No array is larger than ``A``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Constant, Equation, Program
from hesscale_jax._mesh import lying, whole
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.dense_jacobian import SAMPLES, signs
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push

__all__ = ["linear_solve", "triangular_solve", "tridiagonal_solve"]

# A thousand unknowns; the inverse of a matrix of 100 rows.
LARGEST_INVERSE = 2**20

Rule = Callable[[Equation, Sequence[Moments], Any], list[Moments]]


def triangular_solve(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + 2 N r, vy = (N*N) (vb + vA (x*x))``, ``r_i = sum_j vA_ij N_ji x_j``.

    ``N`` is the inverse of the triangle; of ``A``, what the equation doesn't read has no moments.
    """
    va = operands[0].spread
    if va is not None:
        keep, below = (jnp.tril, -1) if eqn.params["lower"] else (jnp.triu, 1)
        va = keep(va, below if eqn.params["unit_diagonal"] else 0)
        va = jnp.swapaxes(va, -1, -2) if eqn.params["transpose_a"] else va
    return _solved(eqn, operands, va, recurse.curved, eqn.params["left_side"])


def tridiagonal_solve(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + 2 N r, vy = (N*N) (vb + vA (x*x))``, with ``N`` the dense inverse."""
    below, on, above, b = operands
    n = b.primal.shape[-2]
    offsets = zip((below, on, above), (-1, 0, 1), strict=True)
    bands = [
        jnp.einsum("...i,ij->...ij", x.spread, jnp.eye(n, k=k, dtype=x.spread.dtype))
        for x, k in offsets
        if x.spread is not None
    ]
    return _solved(eqn, operands, total(*bands), recurse.curved)


def _solved(
    eqn: Equation, operands: Sequence[Moments], va: Any, curved: bool, left: bool = True
) -> list[Moments]:
    """The moments of ``A x = b``, or of ``x A = b``, from the spread of ``A``."""
    primals = [x.primal for x in operands]
    x, vb = _jaxpr.bind(eqn, *primals), operands[-1].spread
    (shift,) = push(eqn, primals, [x.shift for x in operands])
    if va is None and vb is None:
        return [Moments(x, shift)]
    shape = x.shape if left else (*x.shape[:-2], *x.shape[:-3:-1])
    *batch, n, _ = shape
    identity = jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*batch, n, n))
    identity = lying(identity, jax.typeof(whole(whole(x, -1), -2)))
    inverse = widened(_jaxpr.bind(eqn, *primals[:-1], identity))
    wide = widened(x)

    def applied(matrix: Any, y: Any) -> Any:
        return matrix @ y if left else y @ matrix

    changed = None if va is None else applied(va, wide * wide)
    spread = applied(inverse * inverse, total(vb, changed))
    if va is not None and curved:
        bend = 2 * applied(inverse, applied(va * jnp.swapaxes(inverse, -1, -2), wide))
        shift = total(shift, lax.convert_element_type(bend, x.dtype))
    return [Moments(x, shift, spread)]


def linear_solve(max_entries: int = LARGEST_INVERSE, samples: int = SAMPLES) -> Rule:
    """The rule of ``custom_linear_solve``, with or without a matrix that is written out.

    The operator ``A`` is a function of what it closes over, by which its result is pushed: the
    spread of ``A x`` at fixed ``x`` takes the place of ``vA (x*x)``, and half the derivative of
    that in the direction ``N_i`` the place of ``r_i``. It is exact where an entry of what ``A`` is
    made of changes one equation of the system, as the matrix of ``jnp.linalg.solve`` does.

    Args:
      max_entries: The largest inverse of ``A`` that is computed, by as many solves as a system has
        unknowns, in numbers of all right-hand sides together. Above, random signs ``z`` take the
        place of the unit vectors, as in ``sampled``.
      samples: How many signs.
    """

    def rule(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        """``dy = J dx + 2 N r, vy = (N*N) (vb + v(A x))``, ``r_i = dv(A x)_i/dx N_i / 2``."""
        return _operator_solved(eqn, operands, recurse, max_entries, samples)

    rule.__name__ = "linear_solve"
    return rule


def _operator_solved(
    eqn: Equation, operands: Sequence[Moments], recurse: Any, max_entries: int, samples: int
) -> list[Moments]:
    primals = [x.primal for x in operands]
    system = _System(eqn)
    of_a, of_b = operands[: system.consts], operands[-system.unknowns :]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    xs = results[: system.unknowns]
    moves = any(x.spread is not None for x in of_a)
    if not moves and all(x.spread is None for x in of_b):
        return list(map(Moments, results, shifts))

    def solved(*b: Any) -> list[Any]:
        b = tuple(lax.convert_element_type(y, x.dtype) for y, x in zip(b, xs, strict=True))
        return _jaxpr.listed(_jaxpr.bind(eqn, *primals[: -len(b)], *b), eqn)[: len(b)]

    def applied(*xs: Any) -> tuple[list[Any], list[Any]]:
        """The spread of ``A x``, and the shift that it bends by."""
        moments = [*(x._replace(shift=None) for x in of_a), *map(Moments, xs)]
        ys = recurse(system.body, moments)[: len(xs)]
        spreads = [_filled(y.spread, x, spread_dtype(x.dtype)) for x, y in zip(xs, ys, strict=True)]
        return spreads, [_filled(y.shift, x, x.dtype) for x, y in zip(xs, ys, strict=True)]

    changed, bent = applied(*xs) if moves else ([None] * len(xs), [None] * len(xs))
    entering = [total(y.spread, v) for y, v in zip(of_b, changed, strict=True)]
    entering = [_filled(v, x, spread_dtype(x.dtype)) for v, x in zip(entering, xs, strict=True)]

    def along(*e: Any) -> tuple[list[Any], list[Any]]:
        """``(N e) * (N (e*v))``, and ``e * r`` with ``r`` in the direction ``N e``."""
        inverse = solved(*e)
        pushed = solved(*(d * v for d, v in zip(e, entering, strict=True)))
        squares = [widened(n) * widened(p) for n, p in zip(inverse, pushed, strict=True)]
        if not (moves and recurse.curved):
            return squares, []
        _, (turned, _) = jax.jvp(applied, tuple(xs), tuple(inverse))
        return squares, [d * t for d, t in zip(e, turned, strict=True)]

    probes = system.unit_vectors(xs, max_entries)
    if probes is None:
        probes = [samples**-0.5 * signs(eqn, k, x, samples) for k, x in enumerate(xs)]
    squares, turned = jax.vmap(along)(*map(_jaxpr.varying_as, probes, xs))
    spreads = [v.sum(0) for v in squares]
    if turned:
        # JAX transposes a solve in all of its right-hand sides, or in none.
        linear = [0 * v if len(xs) > 1 else None for v in entering]
        terms = zip(turned, bent, linear, strict=True)
        bends = solved(*(total(t.sum(0) - s, v) for t, s, v in terms))
        shifts[: len(xs)] = map(total, shifts, bends)
    rest = [None] * (len(results) - len(xs))  # auxiliary results, which have no derivative
    return list(map(Moments, results, [*shifts[: len(xs)], *rest], [*spreads, *rest]))


class _System:
    """The operator that a ``custom_linear_solve`` inverts.

    Attributes:
      consts: How many of the equation's operands ``A`` is made of, the first.
      unknowns: How many arrays ``x`` consists of, the first results; ``b`` are the last operands.
      body: The program ``A x`` of these and of ``x``, which takes the place of ``b``.
    """

    def __init__(self, eqn: Equation) -> None:
        self.consts = eqn.params["const_lengths"].matvec
        program = _jaxpr.body(eqn.params["jaxprs"].matvec, eqn).program
        self.unknowns = len(program.outputs)
        of_b = range(len(eqn.inputs) - self.unknowns, len(eqn.inputs))
        # As in a loop, each unknown depends on all: so all are wanted if one is.
        carry = {k: self.consts + k for k in range(self.unknowns)}
        rest = [Constant(0.0)] * (len(eqn.outputs) - self.unknowns)
        padded = Program(program.inputs, program.equations, [*program.outputs, *rest])
        self.body = Body(padded, [*range(self.consts), *of_b], carry)

    def unit_vectors(self, xs: Sequence[Any], max_entries: int) -> list[Any] | None:
        """One for each unknown, a row of each array; ``None`` if the inverse is too large.

        Along axes on which there are as many systems, one is an unknown of each of them.
        """
        unknowns = [list(x.shape) for x in xs]
        if len(xs) == 1:
            for axis in _apart(self.body.program, self.consts):
                unknowns[0][axis] = 1
        counts = list(map(math.prod, unknowns))
        if sum(counts) * sum(x.size for x in xs) > max_entries:
            return None
        rows, start = [], 0
        for x, shape, count in zip(xs, unknowns, counts, strict=True):
            unit = jnp.eye(sum(counts), count, -start, dtype=x.dtype)
            rows.append(jnp.broadcast_to(unit.reshape(-1, *shape), (sum(counts), *x.shape)))
            start += count
        return rows


# What keeps the axes of its operands, if it has but one rank.
ENTRYWISE = frozenset({"add", "convert_element_type", "copy", "div", "mul", "neg", "sub"})


def _apart(program: Program, consts: int) -> Sequence[int]:
    """The axes of ``x`` along which ``A x`` is computed for each part of ``x`` by itself.

    They are those of a batch of systems, or of right-hand sides. None are found in an ``A`` that
    does more than multiply by matrices and numbers.
    """
    (x,), result = program.inputs[consts:], program.outputs[0]
    axes: dict[Any, dict[int, int]] = {x: {axis: axis for axis in range(len(x.shape))}}
    for eqn in program.equations:
        reads = [(i, axes[v]) for i, v in enumerate(eqn.inputs) if v in axes]
        if reads:
            axes.update(dict.fromkeys(eqn.outputs, _followed(eqn, reads)))
    followed = axes.get(result, {})
    return [axis for axis in followed if followed[axis] == axis]


def _followed(eqn: Equation, reads: Sequence[tuple[int, dict[int, int]]]) -> dict[int, int]:
    """Where the axes of ``x`` are in the result of an equation, from where they are in operands."""
    side, axes = reads[0]
    shapes = {v.shape for v in (*eqn.inputs, *eqn.outputs) if v.shape}
    if eqn.name in ENTRYWISE and len(shapes) == 1:
        return {x: at for x, at in axes.items() if all(other.get(x) == at for _, other in reads)}
    if len(reads) > 1:
        return {}
    if eqn.name == "transpose":
        permutation = eqn.params["permutation"]
        return {x: permutation.index(at) for x, at in axes.items()}
    if eqn.name == "dot_general":
        contracted, batch = (sides[side] for sides in eqn.params["dimension_numbers"])
        other = len(eqn.inputs[1 - side].shape) - len(contracted) - len(batch)
        rank = len(eqn.inputs[side].shape)
        free = [axis for axis in range(rank) if axis not in (*contracted, *batch)]
        first = len(batch) + (other if side else 0)
        place = {axis: i for i, axis in enumerate(batch)}
        place |= {axis: first + i for i, axis in enumerate(free)}
        return {x: place[at] for x, at in axes.items() if at in place}
    return {}


def _filled(values: Any, like: Any, dtype: Any) -> Any:
    return jnp.zeros(like.shape, dtype) if values is None else values
