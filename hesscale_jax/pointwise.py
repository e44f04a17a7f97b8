"""The arithmetic inside a block of :mod:`hesscale_jax.blocks`: exact, off-diagonal terms included.

The *sources* of a block are the values it reads; their entries are taken as independent. A value is
*local* if each of its entries depends on the sources' entries at its own position alone. Relative
to local values ``l`` and to the reductions ``s_j`` of the block, a value ``v`` has, at its own
position,

    D[v, l]    dv/dl
    U[v, j]    dv/ds_j

and a reduction has ``w[j, l] = ds_j/dl`` and, with the others, a covariance ``V[j, k]``. Over the
sources ``x_i``, with their spreads ``v_i``,

    c(l, m) = sum_i dl/dx_i dm/dx_i v_i
    cov(a, b) = sum_lm (D_al D_bm + sum_j (D_al U_bj + D_bl U_aj) w_jm) c(l, m)
                + sum_jk U_aj U_bk V_jk
    V_jk = sum_lm sum over the reduced axes of w_jl w_km c(l, m)
    y = phi(a, b, ...)   shift_y = sum_a phi_a shift_a + sum_ab phi_ab cov(a, b)
    s = sum_k c_k u_k    w_s = c D_u + sum_j (sum_k c U_uj) w_j,   shift_s = sum_k c shift_u

and a value that leaves the block leaves with spread cov(v, v).

Most values need none of this written out: whatever is computed from one value alone, its *root*,
has a slope ``dv/d(root)``, and ``cov(a, b) = slope_a slope_b cov(root_a, root_b)``. Sources,
reductions and results in which different roots meet are roots; only they have D and U.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
class Local:
    """A local root, by its derivatives in the sources.

    A source that has size 1 along reduced axes is ``repeated`` along them: reductions take its
    entries in more than once. It stands alone.
    """

    of_source: dict[Value, Coefficient]
    repeated: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Mixed:
    """A root that takes in reductions, by ``D`` and ``U``."""

    of_local: dict[Local, Coefficient]
    of_sum: dict["Sum", Coefficient]


@dataclasses.dataclass(eq=False)
class Sum:
    """A reduction, by ``w``."""

    of_local: dict[Local, Coefficient]


Root = Local | Mixed


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
        self._covariances: dict[tuple[Any, Any], Any] = {}  # of roots, and of sums

    # One equation

    def pointwise(
        self,
        eqn: Equation,
        rule: Pointwise,
        operands: Sequence[Moments],
        active: Sequence[int],
        curved: bool,
    ) -> Moments:
        """``shift_y = sum_a phi_a shift_a + sum_ab phi_ab cov(a, b)``.

        Over the ``active`` operands; the second sum is left out unless ``curved``.
        """
        (value,) = eqn.outputs
        primals = [x.primal for x in operands]
        y = _jaxpr.bind(eqn, *primals)
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
            self._derived[value] = Derived(Mixed({}, {self._sum_of(u.root, c): 1.0}))
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

    # Handing a block over from one trace to another

    @property
    def sources(self) -> frozenset[Value]:
        """The values read so far that were made elsewhere."""
        return frozenset(self._spreads)

    def held(self, value: Value) -> Iterator[tuple[dict[Any, Any], Any]]:
        """Where the arrays are that the value's covariances are computed from: ``holder[key]``."""
        derived = self._derived[value]
        for holder, key in ((vars(derived), "slope"), *_held(derived.root)):
            if isinstance(holder[key], jax.Array):
                yield holder, key
            if key in self._spreads:
                yield self._spreads, key

    def forget(self, sources: Iterable[Value]) -> None:
        """Take these sources in anew, and compute covariances anew."""
        for source in sources:
            del self._spreads[source], self._derived[source]
        self._covariances.clear()

    # Derivatives in roots, sources and sums

    def _read(self, value: Value) -> Derived:
        if value not in self._derived:
            spread = self._spread_of(value)
            if spread is not None:
                self._spreads[value] = self._enter(spread, self._block.spans[value])
            view = self._block.view(self._block.spans[value])
            repeated = tuple(axis for axis in self._reduced if view[axis] == 1)
            self._derived[value] = Derived(Local({value: 1.0}, repeated))
        return self._derived[value]

    def _compose(self, parts: dict[int, Derived], slopes: dict[int, Coefficient]) -> Derived:
        by_root: dict[Root, Coefficient] = {}
        for i, slope in slopes.items():
            root = parts[i].root
            by_root[root] = plus(by_root.get(root), times(slope, parts[i].slope))
        if len(by_root) == 1:
            return Derived(*next(iter(by_root.items())))
        local = Local({})
        for root, slope in by_root.items():
            if isinstance(root, Mixed) or root.repeated:
                break
            _add(local.of_source, root.of_source, slope)
        else:
            return Derived(local)
        made = Mixed({}, {})
        for root, slope in by_root.items():
            part = _written_out(root)
            _add(made.of_local, part.of_local, slope)
            _add(made.of_sum, part.of_sum, slope)
        return Derived(made)

    def _bend(
        self, parts: dict[int, Derived], curvatures: dict[tuple[int, int], Any], value: Value
    ) -> Any:
        """``sum_ab phi_ab cov(a, b)``, in the value's shape and dtype."""
        by_roots: dict[tuple[Root, Root], Coefficient] = {}
        for (i, j), curvature in curvatures.items():
            a, b = parts[i], parts[j]
            pair = (a.root, b.root)
            pair = pair[::-1] if pair[::-1] in by_roots else pair
            both = curvature if i == j else times(2.0, curvature)
            by_roots[pair] = plus(by_roots.get(pair), times(both, times(a.slope, b.slope)))
        terms = [times(q, self._cov(*pair)) for pair, q in by_roots.items()]
        return _as(self._leave(total(*terms), value), value)

    def _sum_of(self, root: Root, c: Coefficient) -> Sum:
        """``w = c D_u + sum_j (sum_k c U_uj) w_j`` for a root ``u``."""
        u = _written_out(root)
        w = {
            local: self._sum(times(c, d), local.repeated, missing=True)
            for local, d in u.of_local.items()
        }
        for j, d in u.of_sum.items():
            _add(w, j.of_local, self._sum(times(c, d), self._reduced, missing=True))
        return Sum(w)

    # Covariances: linear in the spreads of the sources

    def _cov(self, a: Root, b: Root) -> Any:
        local = isinstance(a, Local) and isinstance(b, Local)
        return self._once(a, b, self._local_cov if local else self._mixed_cov)

    def _local_cov(self, a: Local, b: Local) -> Any:
        """``c(a, b)``"""
        return total(
            *(
                times(times(d, b.of_source[source]), self._spreads.get(source))
                for source, d in a.of_source.items()
                if source in b.of_source
            )
        )

    def _mixed_cov(self, a: Root, b: Root) -> Any:
        a_parts, b_parts = _written_out(a), _written_out(b)
        local = _pairs(a_parts.of_local, b_parts.of_local, self._cov)
        sums = _pairs(a_parts.of_sum, b_parts.of_sum, self._sum_cov)
        if a is b:
            return total(*local, times(2.0, self._cross(a_parts, a_parts)), *sums)
        return total(*local, self._cross(a_parts, b_parts), self._cross(b_parts, a_parts), *sums)

    def _cross(self, a: Mixed, b: Mixed) -> Any:
        """``sum_j sum_lm D_al U_bj w_jm c(l, m)``"""
        return total(
            *(
                times(u, total(*_pairs(a.of_local, j.of_local, self._cov)))
                for j, u in b.of_sum.items()
            )
        )

    def _sum_cov(self, j: Sum, k: Sum) -> Any:
        """``V_jk``"""

        def summed(j: Sum, k: Sum) -> Any:
            # Each term by itself: one of repeated sources is not there at every position.
            return total(
                *(self._sum(x, self._reduced) for x in _pairs(j.of_local, k.of_local, self._cov))
            )

        return self._once(j, k, summed)

    def _once(self, a: Any, b: Any, cov: Callable[[Any, Any], Any]) -> Any:
        """A covariance, computed for a pair when it is first asked for."""
        if (a, b) not in self._covariances:
            self._covariances[a, b] = self._covariances[b, a] = cov(a, b)
        return self._covariances[a, b]

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


def _held(root: Any) -> Iterator[tuple[dict[Any, Any], Any]]:
    for terms in vars(root).values():
        if isinstance(terms, dict):
            for key in terms:
                yield terms, key
                if not isinstance(key, Value):
                    yield from _held(key)


def _as(shift: Any, value: Value) -> Any:
    """A shift in the value's shape and dtype."""
    if shift is None:
        return None
    return lax.convert_element_type(jnp.broadcast_to(shift, value.shape), value.dtype)


def _written_out(root: Root) -> Mixed:
    return root if isinstance(root, Mixed) else Mixed({root: 1.0}, {})


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else lax.reshape(x, shape)


# Coefficients: None is zero, 1.0 is one, a Boolean array is a choice


def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """The product. Where a Boolean coefficient is false it is zero, whatever the other factor."""
    if a is None or b is None:
        return None
    factors = (a, b), (b, a)
    for factor, other in factors:
        if isinstance(factor, float) and factor == 1.0:
            return other
    for factor, other in factors:
        if _is_choice(factor):
            return _choose(factor, other)
    return a * b


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """The sum."""
    if a is None or b is None:
        return b if a is None else a
    return _number(a) + _number(b)


def _pairs(
    a: dict[Any, Coefficient], b: dict[Any, Coefficient], cov: Callable[[Any, Any], Any]
) -> list[Any]:
    """The terms ``a_x b_y cov(x, y)``."""
    return [times(times(d, e), cov(x, y)) for x, d in a.items() for y, e in b.items()]


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
