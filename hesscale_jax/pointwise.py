"""The arithmetic inside a block of :mod:`hesscale_jax.blocks`: exact, off-diagonal terms included.

The *sources* of a block are the values it reads; their entries are taken as independent. Relative
to them, a value ``v`` of the block has, at its own position,

    D[v, i]    dv/d(source i)
    U[v, j]    dv/d(s_j) for each reduction s_j of the block

and a reduction has ``w[j, i] = ds_j/d(source i)`` and, with the others, the covariance
``V[j, k] = sum over the reduced axes of w_j w_k v_i``, where ``v_i`` is the source's spread. Then

    cov(a, b) = sum_i D_a D_b v_i  +  sum_j (D_a U_bj + D_b U_aj) w_j v  +  sum_jk U_aj U_bk V_jk
    y = phi(a, b, ...)   shift_y = sum_a phi_a shift_a + sum_ab phi_ab cov(a, b)
    s = sum_k c_k u_k    w_s = c D_u + sum_j (sum_k c U_uj) w_j,   shift_s = sum_k c shift_u

and a value that leaves the block leaves with spread cov(v, v).

Most values need none of this written out: whatever is computed from one value alone, its *root*,
has a slope ``dv/d(root)``, and ``cov(a, b) = slope_a slope_b cov(root_a, root_b)``. Sources,
reductions and results in which different roots meet are roots; only they have D and U.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Value
from hesscale_jax.blocks import Block, Spans
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.derivatives import Coefficient, Pointwise
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import Reduction, push

__all__ = ["BlockArithmetic"]


@dataclasses.dataclass(eq=False)
class Root:
    """A value written out in the block's sources and reductions, by ``D`` and ``U``."""

    of_source: dict[Value, Coefficient]
    of_sum: dict["Sum", Coefficient]


@dataclasses.dataclass(eq=False)
class Sum:
    """A reduction's result, by its derivative ``w`` in every entry of the block's sources."""

    of_source: dict[Value, Coefficient]


@dataclasses.dataclass
class Derived:
    """A value of the block: a root, and the slope of the value in it."""

    root: Root
    slope: Coefficient = 1.0


class BlockArithmetic:
    """Processes the equations of one block, one at a time, in program order."""

    def __init__(self, block: Block, spread_of: Callable[[Value], Any]) -> None:
        """``spread_of`` gives the spread with which a value made elsewhere enters the block."""
        self._block = block
        self._frame, self._reduced = block.frame, block.reduced
        self._dtype = spread_dtype(*(value.dtype for value in block.spans))
        self._spread_of = spread_of
        self._derived: dict[Value, Derived] = {}
        self._spreads: dict[Value, Any] = {}  # of sources, in the frame
        self._covariances: dict[tuple[Root, Root], Any] = {}
        self._sum_covariances: dict[tuple[Sum, Sum], Any] = {}

    # One equation

    def pointwise(
        self, eqn: Equation, rule: Pointwise, operands: Sequence[Moments], curved: bool
    ) -> Moments:
        """``shift_y = sum_a phi_a shift_a + sum_ab phi_ab cov(a, b)``.

        The second sum is left out unless ``curved``.
        """
        (value,) = eqn.outputs
        primals = [x.primal for x in operands]
        y = _jaxpr.bind(eqn, *primals)
        active = [i for i, x in enumerate(operands) if x.active]
        slopes, curvatures = rule.derivatives(eqn, y, primals, active)
        slopes = {i: _plain(slope) for i, slope in slopes.items()}
        shifts = {i: operands[i].shift for i in active}
        if rule.own_jvp:
            (shift,) = push(eqn, primals, [shifts.get(i) for i in range(len(operands))])
        else:
            shift = total(*(times(slopes.get(i), shifts[i]) for i in active))

        spans = self._block.spans[value]
        entered = {i: self._enter(slope, spans) for i, slope in slopes.items()}
        bent = {}
        if curved:
            bent = {pair: self._enter(_plain(c), spans) for pair, c in curvatures.items()}
        parts = {i: self._read(eqn.inputs[i]) for i in active}
        self._derived[value] = self._compose(parts, entered)
        shift = total(_as(shift, value), self._bend(parts, bent, value))
        return Moments(y, shift)

    def reduction(self, eqn: Equation, rule: Reduction, operands: Sequence[Moments]) -> Moments:
        """``s = sum_k c_k u_k``."""
        (operand, *_), (value,) = eqn.inputs, eqn.outputs
        primals = [x.primal for x in operands]
        s = _jaxpr.bind(eqn, *primals)
        (shift,) = push(eqn, primals, [x.shift for x in operands])
        u = self._read(operand)
        if all(operand.shape[i] == 1 for i in rule.axes(eqn)):
            self._derived[value] = u
        else:
            weights = _plain(rule.weights(eqn, primals, s))
            c = times(self._enter(weights, self._block.spans[operand]), u.slope)
            self._derived[value] = Derived(Root({}, {Sum(self._in_sources(u.root, c)): 1.0}))
        return Moments(s, shift)

    def view(self, eqn: Equation, operands: Sequence[Moments]) -> Moments:
        """``y = x`` at other positions."""
        (x,), (operand,), (value,) = operands, eqn.inputs, eqn.outputs
        (shift,) = push(eqn, [x.primal], [x.shift])
        self._derived[value] = self._read(operand)
        return Moments(_jaxpr.bind(eqn, x.primal), shift)

    def spread(self, value: Value) -> Any:
        """``cov(v, v)``: the spread with which the value leaves the block."""
        v = self._derived[value]
        return self._leave(times(times(v.slope, v.slope), self._cov(v.root, v.root)), value)

    # Derivatives in roots, sources and sums

    def _read(self, value: Value) -> Derived:
        if value not in self._derived:
            spread = self._spread_of(value)
            if spread is not None:
                self._spreads[value] = self._enter(spread, self._block.spans[value])
            self._derived[value] = Derived(Root({value: 1.0}, {}))
        return self._derived[value]

    def _compose(self, parts: dict[int, Derived], slopes: dict[int, Coefficient]) -> Derived:
        by_root: dict[Root, Coefficient] = {}
        for i, slope in slopes.items():
            root = parts[i].root
            by_root[root] = plus(by_root.get(root), times(slope, parts[i].slope))
        if len(by_root) == 1:
            return Derived(*next(iter(by_root.items())))
        made = Root({}, {})
        for root, slope in by_root.items():
            _add(made.of_source, root.of_source, slope)
            _add(made.of_sum, root.of_sum, slope)
        return Derived(made)

    def _bend(
        self, parts: dict[int, Derived], curvatures: dict[tuple[int, int], Any], value: Value
    ) -> Any:
        """``sum_ab phi_ab cov(a, b)``, in the value's shape and dtype."""
        by_roots: dict[tuple[Root, Root], Coefficient] = {}
        for (i, j), curvature in curvatures.items():
            a, b = parts[i], parts[j]
            pair = (a.root, b.root) if id(a.root) <= id(b.root) else (b.root, a.root)
            both = curvature if i == j else times(2.0, curvature)
            by_roots[pair] = plus(by_roots.get(pair), times(both, times(a.slope, b.slope)))
        terms = [times(q, self._cov(*pair)) for pair, q in by_roots.items()]
        return _as(self._leave(total(*terms), value), value)

    def _in_sources(self, root: Root, c: Coefficient) -> dict[Value, Coefficient]:
        """``w = c D_u + sum_j (sum_k c U_uj) w_j`` for a root ``u``."""
        w: dict[Value, Coefficient] = {}
        for source, d in root.of_source.items():
            view = self._block.view(self._block.spans[source])
            repeated = [axis for axis in self._reduced if view[axis] == 1]
            w[source] = self._sum(times(c, d), repeated, missing=True)
        for j, u in root.of_sum.items():
            factor = self._sum(times(c, u), self._reduced, missing=True)
            _add(w, j.of_source, factor)
        return w

    # Covariances: linear in the spreads of the sources

    def _cov(self, a: Root, b: Root) -> Any:
        if (a, b) not in self._covariances:
            terms = [
                times(times(d, b.of_source[source]), self._spreads.get(source))
                for source, d in a.of_source.items()
                if source in b.of_source
            ]
            if a is b:
                terms += [times(2.0, self._cross(a, a))]
            else:
                terms += [self._cross(a, b), self._cross(b, a)]
            terms += [
                times(times(u, v), self._sum_cov(j, k))
                for j, u in a.of_sum.items()
                for k, v in b.of_sum.items()
            ]
            self._covariances[a, b] = self._covariances[b, a] = total(*terms)
        return self._covariances[a, b]

    def _cross(self, a: Root, b: Root) -> Any:
        """``sum_j D_a U_bj w_j v``"""
        return total(
            *(
                times(times(times(d, u), j.of_source[source]), self._spreads.get(source))
                for source, d in a.of_source.items()
                for j, u in b.of_sum.items()
                if source in j.of_source
            )
        )

    def _sum_cov(self, j: Sum, k: Sum) -> Any:
        if (j, k) not in self._sum_covariances:
            terms = [
                self._sum(times(times(w, k.of_source[i]), self._spreads.get(i)), self._reduced)
                for i, w in j.of_source.items()
                if i in k.of_source
            ]
            self._sum_covariances[j, k] = self._sum_covariances[k, j] = total(*terms)
        return self._sum_covariances[j, k]

    # Between the shape of a value and the block's frame

    def _enter(self, coefficient: Coefficient, spans: Spans) -> Coefficient:
        """A coefficient that broadcasts to a value at ``spans``, in the frame."""
        if isinstance(coefficient, float):
            return coefficient
        if coefficient.dtype != jnp.bool_ and coefficient.dtype != self._dtype:
            coefficient = lax.convert_element_type(coefficient, self._dtype)
        if jnp.ndim(coefficient) == 0:
            return coefficient
        occupied = (s for n, s in zip(coefficient.shape, spans, strict=True) if n > 1)
        return _reshaped(coefficient, self._block.view(tuple(occupied)))

    def _leave(self, array: Any, value: Value) -> Any:
        """The reverse of ``_enter`` for an array: in the value's shape and spread dtype."""
        if array is None:
            return None
        array = jnp.broadcast_to(array, self._block.view(self._block.spans[value]))
        return lax.convert_element_type(_reshaped(array, value.shape), spread_dtype(value.dtype))

    def _sum(self, x: Coefficient, axes: Sequence[int], missing: bool = False) -> Coefficient:
        """The sum over axes of the frame, which stay with size 1.

        An axis along which ``x`` is the same everywhere counts as often as the frame has it if
        ``missing``, else once.
        """
        if x is None or not axes:
            return x
        present = [i for i in axes if jnp.ndim(x) and x.shape[i] > 1]
        absent = functools.reduce(
            lambda n, i: n * self._frame[i], (i for i in axes if i not in present), 1
        )
        if present:
            x = jnp.sum(x, present, keepdims=True, dtype=self._dtype)
        return times(float(absent), x) if missing else x


def _as(shift: Any, value: Value) -> Any:
    """A shift in the value's shape and dtype."""
    if shift is None:
        return None
    return lax.convert_element_type(jnp.broadcast_to(shift, value.shape), value.dtype)


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else lax.reshape(x, shape)


# Coefficients: None is zero, 1.0 is one, a Boolean array is a choice


def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """The product. Where a Boolean coefficient is false it is zero, whatever the other factor."""
    if a is None or b is None:
        return None
    for factor, other in ((a, b), (b, a)):
        if isinstance(factor, float) and factor == 1.0:
            return other
        if _is_choice(factor):
            return _choose(factor, other)
    return a * b


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """The sum."""
    if a is None or b is None:
        return b if a is None else a
    return _number(a) + _number(b)


def _add(to: dict[Any, Coefficient], terms: dict[Any, Coefficient], factor: Coefficient) -> None:
    """``to += factor * terms``, key by key."""
    for key, term in terms.items():
        to[key] = plus(to.get(key), times(factor, term))


def _plain(x: Coefficient) -> Coefficient:
    """A constant as a Python float, which has no dtype of its own."""
    return x if isinstance(x, jax.Array) or np.ndim(x) else float(x)


def _is_choice(x: Coefficient) -> bool:
    return not isinstance(x, float) and x.dtype == jnp.bool_


def _choose(choice: Any, x: Coefficient) -> Coefficient:
    if not isinstance(x, float) and _is_choice(x):
        return jnp.logical_and(choice, x)
    return jnp.where(choice, x, 0.0)


def _number(x: Coefficient) -> Coefficient:
    return _choose(x, 1.0) if _is_choice(x) else x
