"""The arithmetic inside a block of :mod:`hesscale_jax.blocks`: exact, off-diagonal terms included.

The *sources* of a block are the values it reads; their entries are taken as independent. A value is
*local* if each of its entries depends on the sources' entries at its own position alone. Others
take in reductions. Covariances follow the program, from a value to its operands,

    y = phi(a, b, ...)   cov(y, z) = sum_a phi_a cov(a, z)
                         shift_y = sum_a phi_a shift_a + sum_ab phi_ab cov(a, b)

down to local values ``l`` and reductions ``s_j``. With the spreads ``v_i`` of the sources ``x_i``,

    c(l, m) = sum_i dl/dx_i dm/dx_i v_i
    cov(l, s_j) = sum_m w_jm c(l, m)                w_jm = ds_j/dm
    cov(s_j, s_k) = sum over the reduced axes of sum_l w_jl cov(l, s_k)

For a reduction of ``u``, with ``D_l = du/dl`` and ``U_k = du/ds_k`` at its own position,

    s = sum_i c_i u_i    w_s = c D + sum_k (sum_i c_i U_k) w_k,   shift_s = sum_i c_i shift_u

and a value that leaves the block leaves with spread cov(v, v). Of sources that are images of one
value and meet, c and w are those in that value's entries (:mod:`hesscale_jax.forms`).

Most values need none of this written out: whatever is computed from one value alone, its *root*,
has a slope ``dv/d(root)``, and ``cov(a, b) = slope_a slope_b cov(root_a, root_b)``. Sources,
reductions and results in which different roots meet are roots; and a value that is broadcast, so
that what holds for all of its copies is computed once.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Value, dimension, size
from hesscale_jax.arrays import Factor, Reader
from hesscale_jax.blocks import Block, Spans
from hesscale_jax.coefficients import (
    Cut,
    add_to,
    as_coefficient,
    cut_where_zero,
    plus,
    quadratic,
    scaled,
    times,
    uncut,
    varies,
)
from hesscale_jax.covariances import covariance
from hesscale_jax.forms import Form
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.roots import (
    Derived,
    Local,
    Mixed,
    Root,
    Split,
    Sum,
    composite,
    deeper_first,
    held,
    leaves_of,
    mixed,
    parts_of_pair,
)
from hesscale_jax.rules.derivatives import Coefficient, Pointwise, widened
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import Reduction, Scatter, jvp
from hesscale_jax.segments import Segmented

__all__ = ["BlockArithmetic"]


class BlockArithmetic:
    """Processes the equations of one block, one at a time, in program order."""

    def __init__(
        self,
        block: Block,
        forms: dict[Value, Form],
        spread_of: Callable[[Any], Any],
        reader_in: Callable[[Any], Reader],
    ) -> None:
        """Start a block.

        Args:
          block: The block.
          forms: The forms, in its frame, of what it reads that is not independent.
          spread_of: Gives the spread with which a value made elsewhere enters the block, or that
            of a form's source.
          reader_in: Gives what forms are computed from, in a dtype.
        """
        self.block = block
        self._frame, self._reduced = block.frame, block.reduced
        self._along = block.along
        self._dtype = spread_dtype(*(value.dtype for value in block.spans))
        self._spread_of = spread_of
        self._forms = forms
        self.reader_in = reader_in
        self._form_of: dict[Local | Sum, Form | None] = {}
        self._derived: dict[Value, Derived] = {}
        self._spreads: dict[Any, Any] = {}  # in the frame, of sources; by other keys, of segments
        self._joint: dict[tuple[Value, Value], Any] = {}  # covariances of two sources, both ways
        self._covariances: dict[tuple[Any, Any], Any] = {}  # of roots and sums
        self._entrywise_covariances: dict[tuple[Any, Any], Any] = {}
        self._local_covariances: dict[tuple[Local, Local], Any] = {}

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
        shifts = {i: operands[i].shift for i in active}
        if rule.own_jvp:
            (y,), (shift,) = jvp(eqn, primals, [shifts.get(i) for i in range(len(operands))])
        else:
            y = _jaxpr.bind(eqn, *primals)
        with _jaxpr.at_once():  # what is known takes longer to trace within
            slopes, curvatures = rule.derivatives(eqn, y, primals, active)
        if not rule.own_jvp:
            shift = total(*(scaled(as_coefficient(slopes.get(i)), shifts[i]) for i in active))
        wide = list(map(widened, primals))
        if varies(slopes, curvatures) and _jaxpr.takes(eqn, wide):
            # The gradient's slopes are those of jax.grad, the block's do not saturate.
            slopes, curvatures = rule.derivatives(eqn, _jaxpr.bind(eqn, *wide), wide, active)

        spans = self.block.spans[value]
        bent = curvatures if curved else {}
        # What is the slope and the curvature, as of exp, enters once.
        distinct = {id(c): c for c in (*slopes.values(), *bent.values())}
        enters = {key: self.enter(as_coefficient(c), spans) for key, c in distinct.items()}
        entered = {i: enters[id(c)] for i, c in slopes.items()}
        if rule.cuts:
            entered = {i: cut_where_zero(slope) for i, slope in entered.items()}
        bent = {pair: enters[id(c)] for pair, c in bent.items()}
        parts = {i: self._part(eqn.inputs[i], value) for i in active}
        self._derived[value] = self._compose(parts, entered)
        shift = total(_as(shift, value), self._bend(parts, bent, value))
        return Moments(y, shift)

    def reduction(self, eqn: Equation, rule: Reduction, operands: Sequence[Moments]) -> Moments:
        """``s = sum_k c_k u_k``."""
        (operand, *_), (value,) = eqn.inputs, eqn.outputs
        primals = [x.primal for x in operands]
        (s,), (shift,) = jvp(eqn, primals, [x.shift for x in operands])
        u = self._read(operand)
        if all(operand.shape[i] == 1 for i in rule.axes(eqn)):
            self._derived[value] = u
        else:
            weights = as_coefficient(rule.weights(eqn, primals, s))
            c = times(self.enter(weights, self.block.spans[operand]), u.slope)
            self._derived[value] = Derived(mixed({self._sum_of(u.root, c): 1.0}))
        return Moments(s, shift)

    def view(self, eqn: Equation, operands: Sequence[Moments]) -> Moments:
        """``y = x`` at other positions."""
        (x,), (operand,), (value,) = operands, eqn.inputs, eqn.outputs
        (y,), (shift,) = jvp(eqn, [x.primal], [x.shift])
        self._derived[value] = self._read(operand)
        return Moments(y, shift)

    def scatter(
        self, eqn: Equation, rule: Scatter, operands: Sequence[Moments], by: Segmented
    ) -> Moments:
        """``s_j = x_j + sum_{id(k) = j} c_k u_k``."""
        (_, _, operand), (value,) = eqn.inputs, eqn.outputs
        primals = [x.primal for x in operands]
        (s,), (shift,) = jvp(eqn, primals, [x.shift for x in operands])
        spans = self.block.spans[operand]
        kept = self._kept(primals[1], by, spans)
        u = self._read(operand)
        weights = self.enter(as_coefficient(rule.weights(eqn, primals, s)), spans)
        summed = self._sum_of(u.root, times(kept, times(weights, u.slope)))
        self._derived[value] = Derived(mixed({summed: self._reached(kept, by)}))
        return Moments(s, shift)

    def take(self, eqn: Equation, operands: Sequence[Moments], by: Segmented) -> Moments:
        """``y_k = x_id(k)``, without a derivative where the id has no segment."""
        (operand, _), (value,) = eqn.inputs, eqn.outputs
        primals = [x.primal for x in operands]
        (y,), (shift,) = jvp(eqn, primals, [x.shift for x in operands])
        kept = self._kept(primals[1], by, self.block.spans[value])
        x = self._read(operand)
        self._derived[value] = Derived(x.root, times(kept, x.slope) if by.drops else x.slope)
        return Moments(y, shift)

    def _kept(self, indices: Any, by: Segmented, spans: Spans) -> Any:
        """Which of the entries at ``spans`` have a segment: 1 or 0."""
        if (self.block, by.wraps, by.drops) not in self._spreads:
            ids = _wide(lax.squeeze(indices, (indices.ndim - 1,)))
            count = dimension(by.ids.segments)
            kept = (ids >= 0) & (ids < count) if by.drops else jnp.ones(ids.shape, bool)
            along = tuple(spans[i] for i in by.along)
            kept = lax.convert_element_type(kept, self._dtype)
            self._spreads[self.block, by.wraps, by.drops] = self.enter(kept, along)
            if self._along is not None and self.block not in self._spreads:
                self._note(ids, by.wraps)
        return self._spreads[self.block, by.wraps, by.drops]

    def _note(self, ids: Any, wraps: bool) -> None:
        """Note the segments of the entries of the block."""
        along, (_, spans) = self._along, self.block.ids
        assert along is not None
        ids = _reshaped(ids, self.block.view(spans))
        ids = jnp.where(ids < 0, ids + along.segments, ids) if wraps else ids
        self._spreads[self.block] = along.rows(jnp.clip(ids, 0, along.segments - 1))

    def _rows(self) -> Any:
        """The segments as :class:`Along` needs them, from what the ids are computed from."""
        if self.block not in self._spreads:
            ids, _ = self.block.ids
            primal = self.reader_in(self._dtype).primal
            root = ids.root.value if isinstance(ids.root, Constant) else primal(ids.root)
            self._note(_wide(jnp.asarray(root)), ids.wraps)
        return self._spreads[self.block]

    def _reached(self, kept: Any, by: Segmented) -> Coefficient:
        """Where a segment has an entry, among those ``kept``."""
        if self._along is None or by.full:
            return 1.0
        key = self.block, by.wraps, by.drops, "reached"
        if key not in self._spreads:
            self._spreads[key] = self._sum(kept, self._reduced) > 0
        return Cut(self._spreads[key])

    def spread(self, value: Value) -> Any:
        """``cov(v, v)``: the spread with which the value leaves the block."""
        v = self._derived[value]
        root = v.root
        if isinstance(root, Local):
            own = total(self._local_cov(root, root), self._formed(root, root))
        else:
            own = self._cov(root, root)
        return self._leave(quadratic(v.slope, own), value)

    # Handing a block over from one trace to another

    @property
    def sources(self) -> frozenset[Value]:
        """The values read so far that were made elsewhere."""
        return frozenset(self._spreads)

    def held(self, value: Value) -> Iterator[tuple[dict[Any, Any], Any]]:
        """Where the arrays are that the value's covariances are computed from: ``holder[key]``."""
        derived = self._derived[value]
        yield from ((self._spreads, key) for key in self._spreads if not isinstance(key, Value))
        for holder, key in ((vars(derived), "slope"), *held(derived.root)):
            x = holder[key]
            arrays = (
                ((vars(x), name) for name in vars(x)) if isinstance(x, Cut) else [(holder, key)]
            )
            yield from ((h, k) for h, k in arrays if isinstance(h[k], jax.Array))
            if key in self._spreads:
                yield self._spreads, key
                yield from ((self._joint, pair) for pair in self._joint if key in pair)

    def forget(self, sources: Iterable[Value], values: Iterable[Value]) -> None:
        """Take these sources in anew, without these values, and compute covariances anew."""
        gone = frozenset(sources)
        for source in gone:
            del self._spreads[source]
            self._derived.pop(source, None)
        for pair in [pair for pair in self._joint if not gone.isdisjoint(pair)]:
            del self._joint[pair]
        for value in values:
            self._derived.pop(value, None)
        self._covariances.clear()
        self._entrywise_covariances.clear()
        self._local_covariances.clear()
        self._form_of.clear()

    # A loop that is part of the block: see hesscale_jax.loops

    def covariance(self, a: Value | Root | None, b: Value | Root | None) -> Any:
        """``cov(a, b)``, in the frame."""
        if a is None or b is None:
            return None
        x, y = (self._read(v) if isinstance(v, Value) else Derived(v) for v in (a, b))
        return scaled(x.slope, scaled(y.slope, self._cov(x.root, y.root)))

    def take_in(self, covariances: dict[tuple[Value, Value], Any]) -> None:
        """Sources by their covariances, in the frame: of a pair, or the spread of one."""
        for (a, b), both in covariances.items():
            if a is b:
                self._spreads[a] = both
            else:
                self._joint[a, b] = self._joint[b, a] = both

    def define(
        self, value: Value, slopes: dict[Value, Coefficient], lying: dict[Value, Spans]
    ) -> None:
        """A value by its derivatives in sources, which lie at these spans."""
        own = self._repeated(self.block.spans[value])
        alike: dict[Value, Coefficient] = {}
        parts: dict[Any, Coefficient] = {}
        for source, slope in slopes.items():
            repeated = self._repeated(lying[source])
            if repeated == own:
                alike[source] = slope
            else:
                parts[Local({source: 1.0}, repeated)] = slope
        if alike or not parts:
            parts[Local(alike, own)] = 1.0
        self._derived[value] = Derived(mixed(parts) if len(parts) > 1 else next(iter(parts)))

    def derive(self, value: Value, slopes: dict[Value, Coefficient], rest: Value | None) -> None:
        """A value by its derivatives in others of the block, and a source of its own."""
        parts = dict(enumerate(self._part(operand, value) for operand in slopes))
        entered = dict(enumerate(slopes.values()))
        if rest is not None:
            repeated = self._repeated(self.block.spans[value])
            parts[-1] = self._derived[rest] = Derived(Local({rest: 1.0}, repeated))
            entered[-1] = 1.0
        self._derived[value] = self._compose(parts, entered)

    def split(self, values: Sequence[Value], known: Container[Value]) -> list["Split"]:
        """``v = sum_x dv/dx x + r`` over the sources that are known: the slopes, and ``r``.

        Of the known ones no sum is taken, but of those that are the same along it.
        """
        rests: dict[Any, Any] = {}

        def rest(leaf: Any) -> Any:
            if leaf not in rests:
                if isinstance(leaf, Sum):
                    parts = {left: w for x, w in leaf.of_local.items() if (left := rest(x))}
                    rests[leaf] = Sum(parts) if parts else None
                else:
                    others = {s: c for s, c in leaf.of_source.items() if s not in known}
                    rests[leaf] = Local(others, leaf.repeated) if others else None
            return rests[leaf]

        found = []
        for value in values:
            v, slopes, left = (
                self._read(value),
                dict[Value, Coefficient](),
                dict[Any, Coefficient](),
            )
            for leaf, d in leaves_of({v.root: v.slope}).items():
                of_local = leaf.of_local if isinstance(leaf, Sum) else {leaf: 1.0}
                for local, w in of_local.items():
                    inside = {s: c for s, c in local.of_source.items() if s in known}
                    add_to(slopes, inside, times(d, w))
                if rest(leaf):
                    left[rest(leaf)] = d
            found.append(Split(slopes, mixed(left) if left else None))
        return found

    # Derivatives in roots, sources and sums

    def _read(self, value: Value) -> Derived:
        if value in self._forms and value not in self._derived:
            self._derived[value] = Derived(Local({value: 1.0}))
        if value not in self._derived:
            spread = self._spread_of(value)
            if spread is not None:
                self._spreads[value] = self.enter(spread, self.block.spans[value])
            repeated = self._repeated(self.block.spans[value])
            self._derived[value] = Derived(Local({value: 1.0}, repeated))
        return self._derived[value]

    def _repeated(self, spans: Spans) -> tuple[int, ...]:
        """The reduced axes along which what lies at ``spans`` has size 1."""
        view = self.block.view(tuple(span for span in spans if not span.by))
        return tuple(axis for axis in self._reduced if view[axis] == 1)

    def _part(self, operand: Value, result: Value) -> Derived:
        """An operand of a result, as a root of its own if it is broadcast to it."""
        part = self._read(operand)
        if not isinstance(part.slope, float) and size(operand.sizes) < size(result.sizes):
            part = self._derived[operand] = Derived(composite({part.root: part.slope}))
        return part

    def _compose(self, parts: dict[int, Derived], slopes: dict[int, Coefficient]) -> Derived:
        by_root: dict[Root, Coefficient] = {}
        for i, slope in slopes.items():
            root = parts[i].root
            by_root[root] = plus(by_root.get(root), times(slope, parts[i].slope))
        if len(by_root) == 1:
            return Derived(*next(iter(by_root.items())))
        return Derived(composite(by_root))

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
        terms = [scaled(q, self._cov(*pair)) for pair, q in by_roots.items()]
        return _as(self._leave(total(*terms), value), value)

    def _sum_of(self, root: Root, c: Coefficient) -> Sum:
        """``w = c D + sum_k (sum_i c_i U_k) w_k`` for a root ``u``."""
        w: dict[Local, Coefficient] = {}
        added: dict[Local | Sum, Coefficient] = {}
        for leaf, d in leaves_of({root: c}).items():
            if self._form(leaf):
                added[leaf] = d
            if isinstance(leaf, Local):
                add_to(w, {leaf: 1.0}, self._sum(d, leaf.repeated, missing=True))
            else:
                add_to(w, leaf.of_local, self._sum(d, self._reduced, missing=True))
        return Sum(w, added)

    # Covariances: linear in the spreads of the sources

    def _cov(self, a: Root | Sum, b: Root | Sum) -> Any:
        """A covariance, computed for a pair when it is first asked for, after those of its parts.

        They wait in a list, because a chain of roots may be deeper than Python's stack.
        """
        waiting = [(a, b)]
        while waiting:
            x, y = waiting[-1]
            missing = [pair for pair in parts_of_pair(x, y) if pair not in self._covariances]
            waiting += missing
            if not missing:
                if (x, y) not in self._covariances:
                    self._covariances[x, y] = self._covariances[y, x] = self._covariance(x, y)
                waiting.pop()
        return self._covariances[a, b]

    def _covariance(self, a: Root | Sum, b: Root | Sum) -> Any:
        a, b = deeper_first(a, b)
        if isinstance(a, Mixed):
            return self._mixed_cov(a, b)
        assert not isinstance(b, Mixed)
        return total(self._entrywise(a, b), self._formed(a, b))

    def _entrywise(self, a: Local | Sum, b: Local | Sum) -> Any:
        """What two roots share of sources that are independent, computed once as well."""
        if (a, b) not in self._entrywise_covariances:
            found = self._entrywise_covariance(a, b)
            self._entrywise_covariances[a, b] = self._entrywise_covariances[b, a] = found
        return self._entrywise_covariances[a, b]

    def _entrywise_covariance(self, a: Local | Sum, b: Local | Sum) -> Any:
        if a.depth < b.depth:
            a, b = b, a
        if isinstance(a, Sum):
            # Each term by itself: one of repeated sources is not there at every position.
            axes = self._reduced if isinstance(b, Sum) else b.repeated
            apart = {x: tuple(i for i in axes if i not in x.repeated) for x in a.of_local}
            terms = {x: scaled(w, self._entrywise(x, b)) for x, w in a.of_local.items()}
            if self._along is None:
                return total(*(self._sum(term, apart[x]) for x, term in terms.items()))
            # A sum by segments takes longer than what it adds up.
            alike = {each: [terms[x] for x in terms if apart[x] == each] for each in apart.values()}
            return total(*(self._sum(total(*each), along) for along, each in alike.items()))
        assert isinstance(b, Local)
        c = self._local_cov(a, b)
        # A copy: the transpose adds up its uses before it adds what comes from outside the block.
        # Else a broadcast would come last, and XLA computes such a sum anew for each reader of it.
        return None if c is None else jnp.copy(c)

    def _local_cov(self, a: Local, b: Local) -> Any:
        """``c(a, b)``, computed once as well."""
        if (a, b) not in self._local_covariances:
            terms = (
                scaled(d, scaled(e, self._between(x, y)))
                for x, d in a.of_source.items()
                for y, e in b.of_source.items()
            )
            self._local_covariances[a, b] = self._local_covariances[b, a] = total(*terms)
        return self._local_covariances[a, b]

    def _between(self, a: Value, b: Value) -> Any:
        """The covariance of two sources."""
        return self._spreads.get(a) if a is b else self._joint.get((a, b))

    def _mixed_cov(self, a: Mixed, b: Root | Sum) -> Any:
        """``sum_l a_l cov(l, b)`` over the parts of ``a``; ``sum_lm a_l a_m cov(l, m)``."""
        if a is not b:
            return total(*(scaled(d, self._cov(x, b)) for x, d in a.parts.items()))
        parts, terms = list(a.parts.items()), []
        for i, (x, d) in enumerate(parts, 1):
            crossed = total(*(scaled(e, self._cov(x, y)) for y, e in parts[i:]))
            terms.append(quadratic(d, self._cov(x, x), scaled(2.0, crossed)))
        return total(*terms)

    # Forms

    def _formed(self, a: Local | Sum, b: Local | Sum) -> Any:
        """What two roots share of the sources of forms."""
        one, other = self._form(a), self._form(b)
        if one is None or other is None:
            return None
        reader = self.reader_in(self._dtype)
        terms = (
            covariance(
                one.of[source],
                other.of[source],
                reader.once(source, self._spread_of, source),
                self._frame,
                reader,
            )
            for source in one.of
            if source in other.of
        )
        return scaled(self._open(a), scaled(self._open(b), total(*terms)))

    def _open(self, root: Local | Sum) -> Coefficient:
        """Where a path from a source of forms to a root is open: cut elsewhere, else 1."""
        return self.reader_in(self._dtype).once((root, "open"), self._opened, root)

    def _opened(self, root: Local | Sum) -> Coefficient:
        if isinstance(root, Local):
            paths = [d for value, d in root.of_source.items() if value in self._forms]
        else:
            paths = [times(d, self._open(leaf)) for leaf, d in root.added.items()]
        cuts = [path.where for path in paths if isinstance(path, Cut)]
        if len(cuts) < len(paths):
            return 1.0
        where = functools.reduce(jnp.logical_or, cuts)
        return Cut(self._any(where, self._reduced) if isinstance(root, Sum) else where)

    def _form(self, root: Local | Sum) -> Form | None:
        """The form of a local root, or of a reduction, if it has one."""
        if root not in self._form_of:
            forms = list(self._addends(root))
            self._form_of[root] = functools.reduce(Form.plus, forms) if forms else None
        return self._form_of[root]

    def _addends(self, root: Local | Sum) -> Iterator[Form]:
        """The forms that add up to that of a root."""
        if isinstance(root, Local):
            for value, d in root.of_source.items():
                if value in self._forms:
                    yield self._times(Form(self._frame, self._forms[value].of), d)
            return
        for leaf, d in root.added.items():
            form = self._form(leaf)
            assert form is not None
            if isinstance(leaf, Local):
                yield self._times(form, d).summed(self._reduced)
            else:
                yield self._times(form, self._sum(d, self._reduced, missing=True))

    def _times(self, form: Form, coefficient: Coefficient) -> Form:
        if not form.of or coefficient is None:
            return Form(self._frame, {})
        x = uncut(coefficient)
        if isinstance(x, float):
            return form.times(x)
        x = x if x.ndim else x.reshape((1,) * len(self._frame))
        return form.times(Factor(x.shape, frozenset(), lambda read: x))

    # Between the shape of a value and the block's frame

    def enter(self, coefficient: Coefficient, spans: Spans) -> Coefficient:
        """A coefficient that broadcasts to a value at ``spans``, in the frame."""
        if isinstance(coefficient, float):
            return coefficient
        if isinstance(coefficient, Cut):
            parts = (self.enter(x, spans) for x in (coefficient.where, coefficient.number))
            return Cut(*parts)
        if coefficient.dtype != jnp.bool_ and coefficient.dtype != self._dtype:
            coefficient = lax.convert_element_type(coefficient, self._dtype)
        if jnp.ndim(coefficient) == 0:
            return coefficient
        occupied = tuple(s for n, s in zip(coefficient.shape, spans, strict=True) if n != 1)
        x = _reshaped(coefficient, self._view(occupied))
        if self._along is None:
            return x
        if _is_by_segments(occupied):
            return self._along.taken(x, self._rows())
        return self._along.padded(x)

    def _leave(self, array: Any, value: Value) -> Any:
        """The reverse of ``enter`` for an array: in the value's shape and spread dtype."""
        if array is None:
            return None
        spans = self.block.spans[value]
        view = self._view(spans)
        if self._along is not None:
            along = self._along
            part = along.of_segments if _is_by_segments(spans) else along.of_entries
            array = part(array)
        array = array if array.shape == view else jnp.broadcast_to(array, view)
        return lax.convert_element_type(_reshaped(array, value.shape), spread_dtype(value.dtype))

    def _view(self, spans: Spans) -> tuple[int, ...]:
        """The shape in the frame of an array at ``spans``, with the segments' axis if by them."""
        view = self.block.view(spans)
        if self._along is None or not _is_by_segments(spans):
            return view
        return self._along.with_length(self._along.segments, view)

    def full(self, x: Coefficient, spans: Spans) -> Any:
        """A coefficient or covariance at every position of ``spans``, in the frame."""
        x = 0.0 if x is None else uncut(x)
        return jnp.broadcast_to(jnp.asarray(x, self._dtype), self.block.view(spans))

    def leave_along(self, array: Any, spans: Spans, axes: Sequence[int]) -> Any:
        """An array with an axis for each of the spans: of size 1, but along ``axes``."""
        if array is None:
            return None
        array = self.full(array, tuple(spans[i] for i in axes))
        sizes = [dimension(s.hi // s.lo) if i in axes else 1 for i, s in enumerate(spans)]
        return _reshaped(array, tuple(sizes))

    def _sum(self, x: Coefficient, axes: Sequence[int], missing: bool = False) -> Coefficient:
        """The sum over axes of the frame, which stay with size 1.

        An axis along which ``x`` is the same everywhere counts as often as the frame has it if
        ``missing``, else once. Where all that is added up is cut, so is the sum.
        """
        if x is None or not axes:
            return x
        if isinstance(x, Cut):
            return Cut(self._any(x.where, axes), self._sum(uncut(x), axes, missing))
        if self._along is not None and self._along.axis in axes:
            rows = self._rows()
            x = lax.convert_element_type(x, self._dtype)
            x = jnp.broadcast_to(x, x.shape or (1,) * len(self._frame))
            return self._along.taken(self._along.added(x, rows), rows)
        present = [i for i in axes if jnp.ndim(x) and x.shape[i] != 1]
        absent = functools.reduce(
            lambda n, i: n * self._frame[i], (i for i in axes if i not in present), 1
        )
        if present:
            kept = [1 if i in present else n for i, n in enumerate(x.shape)]
            x = lax.reduce_sum(lax.convert_element_type(x, self._dtype), present)
            x = lax.reshape(x, kept)
        return times(_jaxpr.number(absent, self._dtype), x) if missing else x

    def _any(self, where: Any, axes: Sequence[int]) -> Any:
        """Whether it is so anywhere along axes of the frame, which stay with size 1."""
        return self._sum(lax.convert_element_type(where, self._dtype), axes) > 0


def _wide(ids: Any) -> Any:
    """Ids that count up to any size."""
    return ids if ids.dtype.itemsize >= 4 else lax.convert_element_type(ids, jnp.int32)


def _is_by_segments(spans: Spans) -> bool:
    return any(span.by for span in spans)


def _as(shift: Any, value: Value) -> Any:
    """A shift in the value's shape and dtype."""
    if shift is None:
        return None
    shift = shift if shift.shape == value.shape else jnp.broadcast_to(shift, value.shape)
    return lax.convert_element_type(shift, value.dtype)


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else lax.reshape(x, shape)
