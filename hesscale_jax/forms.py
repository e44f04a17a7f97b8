"""Linear images of one value, written in indices: how they vary together when they meet again.

A value ``y`` that is affine in a *source* ``x``, an input of the program or the result of something
curved, is kept as a sum of terms

    dy[t] = sum_s  M[t, s] dx[s]        M[t, s] = c * product_k F_k[t, s] * product_a [s_a = i_a[t]]

An axis ``a`` of the source is *bound* to positions of ``y`` by an index ``i_a``, or it is *summed*
over. The factors ``F_k`` are constants: arrays off the path, or the other factor of a product, with
size 1 along each axis on which they do not depend. Where a choice is closed, its factor is 0 and
discards infinities and NaN: it is a *gate*. Two images of one source covary by

    cov(y, z)[t] = sum_s M_y[t, s] M_z[t, s] v[s]

one product more, linear in the spread ``v``. Factors are computed where they are needed alone:
until then they are shapes, and a function of the program's values.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Value, is_inexact
from hesscale_jax._mesh import automatically, on_mesh

__all__ = [
    "Blank",
    "Factor",
    "Form",
    "Reader",
    "Term",
    "TooLarge",
    "are_apart",
    "covariance",
    "gated",
    "identity",
    "known",
    "of_atom",
    "placed",
    "side_by_side",
    "together",
    "variance",
]

# More entries than these are not written out: a static index, and a factor; nor, of what is known,
# computed while tracing.
MOST_INDICES, MOST_ENTRIES, MOST_KNOWN = 2**22, 2**26, 2**14

Source = Any  # a value, or the part of one that has no form


@dataclasses.dataclass(frozen=True)
class Reader:
    """The primals that factors are computed from, in the dtype of spreads.

    Attributes:
      primal: Gives the primal of a value.
      dtype: The dtype that numbers are converted to.
      within: The dtype in which products of spreads and squares are taken, by the factors' dtypes.
    """

    primal: Callable[[Value], Any]
    dtype: Any
    within: Callable[..., Any]
    _known: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, atom: Value | Constant) -> Any:
        """The primal of a value, or a constant."""
        x = atom.value if isinstance(atom, Constant) else self.primal(atom)
        return self.number(x) if _is_number(x) else jnp.asarray(on_mesh(x))

    def number(self, x: Any) -> Any:
        """An array of numbers, or of truth values as zeros and ones, in the dtype."""
        if isinstance(x, np.ndarray) and x.size <= MOST_KNOWN:
            return x.astype(self.dtype)
        return lax.convert_element_type(on_mesh(x), self.dtype)

    def array(self, factor: "Factor") -> Any:
        """A factor, computed once."""
        return self.once(factor, self._computed, factor)

    def _computed(self, factor: "Factor") -> Any:
        return on_mesh(factor.compute(self))

    def numbers(self, factor: "Factor") -> Any:
        """The same as numbers, in the dtype."""
        return self.once((factor, self.dtype), lambda: self.number(self.array(factor)))

    def once(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, computed once by a key that holds while the arguments exist."""
        if key not in self._known:
            self._known[key] = args, function(*args)
        return self._known[key][1]


@dataclasses.dataclass(frozen=True)
class Blank(Reader):
    """Zeros in place of a program's values: what covariances take does not depend on these."""

    primal: Any = None
    dtype: Any = jnp.float32
    within: Callable[..., Any] = lambda *dtypes: jnp.float32

    def array(self, factor: "Factor") -> Any:
        """A factor of zeros, or of such factors."""
        if factor.static is None and not factor.made_of:
            return self.once(factor, jnp.zeros, factor.shape, int)
        return super().array(factor)


class TooLarge(Exception):
    """A factor, or an index, with too many entries."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array to be computed when it is needed.

    Attributes:
      shape: Its shape.
      reads: The program's values and constants that it is computed from, but for what is known.
      compute: The array, from a function that gives the primals of those values.
      static: The array, if it is known.
      base: What it is a reshape of, if it is one.
      within: Whether it is an index that is within bounds.
      finite: Whether it is finite where the program's values are: those values, and slopes of
        which that is known.
      safe: Whether it stays as it is behind a gate: what is known, or an operand of a product,
        by which JAX's gradient multiplies what the gate closes too.
      made_of: The factors that it is computed from, if it is from these alone.
      multiplied: How many multiplications one sum of products takes, the largest of those that it
        is computed from, if these were multiplied out.
      serial: A number that grows from one to the next: an order that is the same in each process.
    """

    shape: tuple[int, ...]
    reads: frozenset[Value | Constant]
    compute: Callable[[Reader], Any]
    static: np.ndarray | None = None
    base: "Factor | None" = None
    within: bool = False
    finite: bool = True
    safe: bool = False
    made_of: "tuple[Factor, ...]" = ()
    multiplied: int = 0
    serial: int = dataclasses.field(default_factory=itertools.count().__next__)

    def mapped(self, function: Callable[[Any], Any], shape: Sequence[int]) -> "Factor":
        """``function`` of it, which works on arrays of NumPy and of JAX."""
        if self.static is not None:
            return known(function(self.static))

        def compute(read: Reader) -> Any:
            return function(read.array(self))

        return _made_of(shape, (self,), compute)

    def reshaped(self, shape: Sequence[int]) -> "Factor":
        """In another shape, row by row."""
        base = self.base or self
        if base.shape == tuple(shape):
            return base
        return dataclasses.replace(base.mapped(lambda x: x.reshape(shape), shape), base=base)

    @property
    def squeezed(self) -> "Factor":
        """Without its axes of size 1."""
        return self.reshaped([n for n in self.shape if n != 1])

    def transposed(self, axes: Sequence[int]) -> "Factor":
        """With its axes in another order."""
        if list(axes) == list(range(len(axes))):
            return self
        return self.mapped(lambda x: x.transpose(axes), [self.shape[i] for i in axes])

    def widened(self, count: int) -> "Factor":
        """With ``count`` more axes of size 1 at the end."""
        return self.reshaped((*self.shape, *(1,) * count))

    def masked(self, gates: Iterable["Factor"]) -> "Factor":
        """Zero where one of those gates is that depend on no axis but its own."""
        if self.safe:
            return self

        def fits(gate: Factor) -> bool:
            sizes = zip(self.shape, gate.shape, strict=True)
            return gate is not self and all(n == 1 or m == n for m, n in sizes)

        gates = sorted(filter(fits, gates), key=lambda g: g.serial)
        if not gates:
            return self

        def mask(x: Any, *gates: Any) -> Any:
            open_ = functools.reduce(operator.and_, (g.astype(bool) for g in gates))
            return _jaxpr.only_where(open_, jnp.asarray(x))

        return combined(mask, self.shape, self, *gates)

    @property
    def nonzero(self) -> "Factor":
        """Where it is not 0."""
        return self.mapped(lambda x: x.astype(bool), self.shape)

    def same(self, other: "Factor") -> bool:
        """Whether both are known to be one array."""
        if self is other:
            return True
        if self.static is None or other.static is None or self.shape != other.shape:
            return False
        return bool(np.array_equal(self.static, other.static))


def known(x: Any) -> Factor:
    """A factor that is known."""
    x = np.asarray(x)
    if x.size > MOST_INDICES:
        raise TooLarge
    return Factor(x.shape, frozenset(), lambda read: x, x, safe=True)


def of_atom(atom: Value | Constant) -> Factor:
    """The primal of a value or a constant."""
    shape = tuple(atom.shape)
    if isinstance(atom, Constant) and _is_known(atom.value):
        return known(atom.value)
    return Factor(shape, frozenset([atom]), lambda read: read(atom))


def _is_known(x: Any) -> bool:
    """Whether it is kept by value, as scales and positions are: not an array of numbers."""
    return not isinstance(x, jax.core.Tracer) and (np.ndim(x) == 0 or not _is_number(x))


def _is_number(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def combined(function: Callable[..., Any], shape: Sequence[int], *factors: Factor) -> Factor:
    """``function`` of several factors."""

    def compute(read: Reader) -> Any:
        return function(*map(read.array, factors))

    return _made_of(shape, factors, compute)


def _made_of(
    shape: Sequence[int], factors: Sequence[Factor], compute: Callable[[Reader], Any]
) -> Factor:
    """A factor that is computed from others."""
    finite, safe = (all(getattr(f, name) for f in factors) for name in ("finite", "safe"))
    made = Factor(tuple(shape), _reads(factors), compute, finite=finite, safe=safe)
    multiplied = max((f.multiplied for f in factors), default=0)
    return dataclasses.replace(made, made_of=tuple(factors), multiplied=multiplied)


def added(a: Factor, b: Factor, of_a: float, of_b: float) -> Factor:
    """``of_a * a + of_b * b``, of the same shape."""
    x, y = (f.base or f for f in (a, b))
    x, y = (x, y) if x.shape == y.shape else (a, b)
    if x.static is not None and y.static is not None and x.static.size <= MOST_KNOWN:
        return known(of_a * x.static + of_b * y.static).reshaped(a.shape)

    def add(read: Reader) -> Any:
        return _scaled(of_a, read.numbers(x)) + _scaled(of_b, read.numbers(y))

    return _made_of(x.shape, (x, y), add).reshaped(a.shape)


def _scaled(c: float, x: Any) -> Any:
    return x if c == 1.0 else c * x


# One term


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One term of a form, of a value of some rank.

    Attributes:
      scale: A constant.
      factors: Arrays with an axis for each of the value's and each that is summed over, of size 1
        where they do not depend on it.
      at: For each axis of the source, an index with an axis for each of the value's, or the number
        of the axis that is summed over.
      summed: How many axes are summed over.
      once: Whether each entry of the source reaches each entry of the value in one way: then the
        squares of all that it is multiplied by give the spread.
      gates: Arrays like its factors. Nothing comes through where one of them is 0.
    """

    scale: float
    factors: tuple[Factor, ...]
    at: tuple["Factor | int", ...]
    summed: int = 0
    once: bool = True
    gates: tuple[Factor, ...] = ()

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What it is but for its scale: the same for a term of the same arrays."""
        at = tuple((True, a) if isinstance(a, int) else (False, a.serial) for a in self.at)
        return self.summed, at, tuple(sorted(f.serial for f in self.factors))

    @property
    def finite(self) -> bool:
        """Whether its factors are, where the program's values are."""
        return all(f.finite for f in self.factors)

    @property
    def is_known(self) -> bool:
        """Whether all of its arrays are."""
        arrays = (f for f in (*self.factors, *self.at, *self.gates) if isinstance(f, Factor))
        return all(f.static is not None for f in arrays)

    def dims(self, change: Callable[[Factor], Factor], **also: Any) -> "Term":
        """With a change of the value's axes, which come first, applied to every array."""
        at = tuple(a if isinstance(a, int) else change(a) for a in self.at)
        return self._changed(change, at=at, **also)

    def _changed(self, change: Callable[[Factor], Factor], **also: Any) -> "Term":
        """With a change applied to its factors and gates."""
        changed = {f: change(f) for f in (*self.factors, *self.gates)}
        factors, gates = (tuple(changed[f] for f in fs) for fs in (self.factors, self.gates))
        return dataclasses.replace(self, factors=factors, gates=gates, **also)

    def scaled(self, by: Factor, gate: Factor | None = None) -> "Term":
        """Times a factor that has the value's axes; what is known of one shape is one factor.

        Args:
          by: The factor.
          gate: Where it discards everything, if it does.
        """
        after = by.widened(self.summed)
        closed = gate is not None and not (gate.static is not None and gate.static.all())
        gates, factors = self.gates, self.factors
        if gate is not None and closed:
            gates = (*gates, after if gate is by else gate.widened(self.summed))
        for i, f in enumerate(factors):
            if f.static is not None and after.static is not None and f.shape == after.shape:
                both = known(f.static * after.static)
                factors = (*factors[:i], both, *factors[i + 1 :])
                break
        else:
            factors = (*factors, after)
        return dataclasses.replace(self, factors=factors, gates=gates)

    def any_along(self, dims: Sequence[int]) -> tuple[Factor, ...]:
        """Its gates, those that depend on some axes as one that is open if any along these is.

        Nothing comes through zeros that are known either.
        """
        inside = [g for g in self.gates if _depends(g, dims)]
        if not inside:
            return self.gates
        zeros = [f for f in self.factors if f.static is not None and _depends(f, dims)]
        outside = tuple(g for g in self.gates if g not in inside)
        open_ = [f.nonzero for f in dict.fromkeys((*inside, *zeros))]
        static = [f.static for f in open_ if f.static is not None]
        if len(static) < len(open_):
            return (*outside, _contracted(open_, dims))
        all_ = functools.reduce(operator.and_, static)
        any_ = all_.any(tuple(dims), keepdims=True)
        return outside if any_.all() else (*outside, known(any_))

    def bound_along(self, dim: int) -> list[int]:
        """The axes of the source that are bound to positions along one of the value's."""
        return [i for i, a in enumerate(self.at) if not isinstance(a, int) and a.shape[dim] != 1]

    def separates(self, dim: int) -> bool:
        """Whether other positions along an axis of the value are other entries of the source."""
        return any(_distinct(self.at[a]) for a in self.bound_along(dim))

    def summed_over(self, dim: int, size: int, source: Sequence[int]) -> "Term":
        """The sum over an axis of the value, which stays with size 1."""
        if size == 1:
            return self
        bound = self.bound_along(dim)
        once = self.once and any(_distinct(self.at[a]) for a in bound)
        whole = next((a for a in bound if _runs_along(self.at[a], dim, source[a])), None)
        term = dataclasses.replace(self, once=once)
        for axis in bound:
            if axis != whole:
                term = term._written_out(axis, source[axis])
        if whole is not None:
            return term._renamed(dim, whole)
        gates = term.any_along([dim])
        there = [f.masked(term.gates) for f in term.factors if f.shape[dim] != 1]
        if not there:
            return dataclasses.replace(term, scale=term.scale * size, gates=gates)
        rest = tuple(f for f in term.factors if f.shape[dim] == 1)
        made = _contracted(there, [dim])
        if math.prod(made.shape) > MOST_ENTRIES:
            raise TooLarge

        return dataclasses.replace(term, factors=(*rest, made), gates=gates)

    def _written_out(self, axis: int, size: int) -> "Term":
        """With the index of an axis as a factor of zeros and ones, and the axis summed over."""
        index = self.at[axis]
        assert isinstance(index, Factor)
        shape = (*index.shape, *(1,) * self.summed, size)
        if math.prod(shape) > MOST_ENTRIES:
            raise TooLarge

        at = (*self.at[:axis], self.summed, *self.at[axis + 1 :])
        term = self._changed(lambda f: f.widened(1), at=at, summed=self.summed + 1)
        hot = index.mapped(lambda i: _hot(i, size).reshape(shape), shape)
        hot = dataclasses.replace(hot, safe=True)
        gates = (*term.gates, hot) if term.gates else ()
        return dataclasses.replace(term, factors=(*term.factors, hot), gates=gates)

    def _renamed(self, dim: int, axis: int) -> "Term":
        """With an axis of the value that one of the source runs along summed over."""

        def to_the_end(f: Factor) -> Factor:
            rank = len(f.shape)
            order = [*(i for i in range(rank) if i != dim), dim]
            shape = (*f.shape[:dim], 1, *f.shape[dim + 1 :], f.shape[dim])
            return f.transposed(order).reshaped(shape)

        at = (*self.at[:axis], self.summed, *self.at[axis + 1 :])
        return self._changed(to_the_end, at=at, summed=self.summed + 1)

    def summed_by(self, ids: Factor, count: int, rank: int, source: Sequence[int]) -> "Term":
        """The sums over entries along the first axis that have one id, along that axis.

        Args:
          ids: The id of each entry; one that is out of bounds, and not negative, leaves it out.
            Nothing reaches an id that no entry has.
          count: How many ids there are.
          rank: The value's rank.
          source: The source's shape.
        """
        term = dataclasses.replace(self, once=self.once and self.separates(0))
        indices, sizes, axes = [ids], [count], list[int]()
        for axis in self.bound_along(0):
            index = self.at[axis]
            assert isinstance(index, Factor)
            if math.prod(index.shape) == index.shape[0]:
                indices.append(index.squeezed)
                sizes.append(source[axis])
                axes.append(axis)
            else:
                term = term._written_out(axis, source[axis])
        ones = (1,) * (rank - 1 + term.summed)
        among = [f for f in term.factors if f.shape[0] != 1]
        rest = [f for f in term.factors if f.shape[0] == 1]
        after = np.broadcast_shapes(ones, *(f.shape[1:] for f in among))
        # A matrix of what is sparse.
        if math.prod((*sizes, *after)) > (MOST_INDICES if axes else MOST_ENTRIES):
            raise TooLarge

        def added_up(factors: Sequence[Factor], indices: Sequence[Factor]) -> Factor:
            counts = sizes[: len(indices)]
            after = np.broadcast_shapes(ones, *(f.shape[1:] for f in factors))

            def add_up(read: Reader) -> Any:
                numbers = (read.numbers(f) for f in factors)
                one = jnp.ones((*ids.shape, *ones), read.dtype)
                x = functools.reduce(jnp.multiply, numbers, one)
                at = tuple(jnp.asarray(read.array(i)) for i in indices)
                y = jnp.zeros((*counts, *after), read.dtype).at[at].add(x, mode="drop")
                return jnp.moveaxis(y, range(1, len(counts)), range(1 - len(counts), 0))

            shape = (count, *after, *counts[1:])
            made = _made_of(shape, factors, add_up)
            return dataclasses.replace(made, reads=_reads((*factors, *indices)))

        closing = [g for g in term.gates if g.shape[0] != 1]
        zeros = [f for f in among if closing and f.static is not None]
        made = added_up([f.masked(term.gates) for f in among], indices)
        reached = added_up([f.nonzero for f in dict.fromkeys((*closing, *zeros))], [ids])
        more = len(axes)
        gates = (g.widened(more) for g in (*(g for g in term.gates if g not in closing), reached))
        at = list(term.at)
        for k, axis in enumerate(axes):
            at[axis] = term.summed + k
        return dataclasses.replace(
            term,
            factors=(*(f.widened(more) for f in rest), made),
            at=tuple(at),
            summed=term.summed + more,
            gates=tuple(gates),
        )

    def plus(self, other: "Term") -> "Term | None":
        """The sum of two terms as one, ``None`` if they have to stay two."""
        if self.summed != other.summed or not all(map(_agree, self.at, other.at)):
            return None
        mine = [f for f in self.factors if not any(map(f.same, other.factors))]
        theirs = [f for f in other.factors if not any(map(f.same, self.factors))]
        common = tuple(f for f in self.factors if f not in mine)
        if len(common) + len(theirs) != len(other.factors):
            return None
        gates = _either(self, other)
        if not mine and not theirs:
            both = dataclasses.replace(self, scale=self.scale + other.scale)
        elif len(mine) == len(theirs) == 1 and mine[0].shape == theirs[0].shape:
            x, y = mine[0], theirs[0]
            if gates != self.gates or gates != other.gates:
                x, y = x.masked(self.gates), y.masked(other.gates)
            factor = added(x, y, self.scale, other.scale)
            both = dataclasses.replace(self, scale=1.0, factors=(*common, factor))
        else:
            return None
        # What is added up here reaches the value in one way from now on.
        return dataclasses.replace(both, once=False, gates=gates)


def _either(a: Term, b: Term) -> tuple[Factor, ...]:
    """The gates of a sum of two terms: open where those of one are."""
    mine = [g for g in a.gates if not any(map(g.same, b.gates))]
    theirs = [g for g in b.gates if not any(map(g.same, a.gates))]
    common = tuple(g for g in a.gates if g not in mine)
    if not mine or not theirs:
        return common
    count = len(mine)

    def either(*gates: Any) -> Any:
        open_ = [g.astype(bool) for g in gates]
        return functools.reduce(operator.and_, open_[:count]) | functools.reduce(
            operator.and_, open_[count:]
        )

    gates = [*mine, *theirs]
    static = [g.static for g in gates if g.static is not None]
    if len(static) == len(gates):
        return (*common, known(either(*static)))
    return (*common, combined(either, np.broadcast_shapes(*(g.shape for g in gates)), *gates))


def side_by_side(terms: Sequence[Term], dim: int, sizes: Sequence[int]) -> Term | None:
    """One term of arrays along an axis, from one of each; ``None`` if they have to stay apart.

    They have to where an entry of the source is known to be in several, or they are of other kinds.

    Args:
      terms: The terms.
      dim: The axis.
      sizes: How long each of the arrays is.
    """
    first = terms[0]
    kinds = {
        (t.scale, t.summed, len(t.factors), *(a if isinstance(a, int) else None for a in t.at))
        for t in terms
    }
    if len(kinds) != 1:
        return None

    @functools.cache
    def join(parts: tuple[Any, ...]) -> Any:
        one = parts[0]
        if isinstance(one, int) or (one.shape[dim] == 1 and all(map(one.same, parts))):
            return one
        full = list(np.broadcast_shapes(*((*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in parts)))
        shapes = [(*full[:dim], n, *full[dim + 1 :]) for n in sizes]
        full[dim] = sum(sizes)
        if math.prod(full) > MOST_ENTRIES:
            raise TooLarge

        def concatenate(*arrays: Any) -> Any:
            return jnp.concatenate(list(map(jnp.broadcast_to, arrays, shapes)), dim)

        static = [p.static for p in parts if p.static is not None]
        if len(static) == len(parts):
            return known(np.concatenate(list(map(np.broadcast_to, static, shapes)), dim))
        return combined(concatenate, full, *parts)

    rank = max((len(g.shape) for t in terms for g in t.gates), default=0)
    open_ = known(np.ones((1,) * rank, bool))
    at = tuple(map(join, zip(*(t.at for t in terms), strict=True)))
    joined = dataclasses.replace(
        first,
        factors=tuple(map(join, zip(*(t.factors for t in terms), strict=True))),
        at=at,
        once=all(t.once for t in terms),
        gates=tuple(map(join, itertools.zip_longest(*(t.gates for t in terms), fillvalue=open_))),
    )
    if joined.bound_along(dim):
        return joined if joined.separates(dim) else None
    others = any(f.shape[dim] != 1 and f not in first.factors for f in joined.factors)
    return joined if others and joined.summed else None


def _hot(index: Any, size: int) -> Any:
    """Zeros and ones along a new axis."""
    return index[..., None] == np.arange(size).reshape((*(1,) * index.ndim, size))


def _agree(a: "Factor | int", b: "Factor | int") -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
    return a.same(b)


def _distinct(index: "Factor | int") -> bool:
    if isinstance(index, int) or index.static is None:
        return False
    return np.unique(index.static).size == index.static.size


def _runs_along(index: "Factor | int", dim: int, size: int) -> bool:
    """Whether an index is 0, 1, 2, ... along one axis, to the end of the source's."""
    if isinstance(index, int) or index.static is None:
        return False
    return index.shape[dim] == size and np.array_equal(index.static.ravel(), np.arange(size))


def _axis_of(index: Factor, rank: int, size: int) -> int | None:
    """The axis of a value that an axis of the source of this size is the same as, if it is one."""
    along = [dim for dim in range(rank) if index.shape[dim] != 1]
    return along[0] if len(along) == 1 and _runs_along(index, along[0], size) else None


def _contracted(factors: Sequence[Factor], dims: Sequence[int]) -> Factor:
    """The sum over some axes of a product."""
    full = np.broadcast_shapes(*(f.shape for f in factors))
    shape = [1 if i in dims else n for i, n in enumerate(full)]
    kept = [i for i, n in enumerate(shape) if n != 1]
    sizes = tuple(shape[i] for i in kept)

    def contract(read: Reader) -> Any:
        return _product([_operand(f, range(len(shape)), read) for f in factors], kept, sizes)

    made = _made_of(sizes, factors, contract)
    multiplied = max(made.multiplied, math.prod(full))
    return dataclasses.replace(made, multiplied=multiplied).reshaped(shape)


def _operand(f: Factor, labels: Sequence[int], read: Reader) -> tuple[Any, list[int]]:
    """A factor's numbers and the labels of its axes, but for those of size 1."""
    there = [label for label, n in zip(labels, f.shape, strict=True) if n != 1]
    return read.numbers(f.squeezed), there


def _reads(factors: Iterable[Factor]) -> frozenset[Value | Constant]:
    return frozenset[Value | Constant]().union(*(f.reads for f in factors))


Operand = tuple[Any, Sequence[int]]  # an array, and the labels of its axes


def _folded(operands: Sequence[Operand], kept: Sequence[int]) -> list[Operand]:
    """The operands with those that are known multiplied, if that is small."""
    constants = [(x, at) for x, at in operands if isinstance(x, np.ndarray)]
    rest = [(x, at) for x, at in operands if not isinstance(x, np.ndarray)]
    sizes = {i: n for x, at in constants for i, n in zip(at, x.shape, strict=True) if n != 1}
    if len(constants) < 2 or math.prod(sizes.values()) > MOST_KNOWN:
        return list(operands)
    left = sorted(sizes.keys() & {*kept, *(i for _, at in rest for i in at)})
    arguments: list[Any] = []
    for x, at in constants:
        there = [i for i, n in zip(at, x.shape, strict=True) if n != 1]
        arguments += [x.reshape([n for n in x.shape if n != 1]), there]
    return [*rest, (np.asarray(np.einsum(*arguments, left)), left)]


def _product(
    operands: Sequence[tuple[Any, Sequence[int]]], kept: Sequence[int], shape: Sequence[int]
) -> Any:
    """The sum of the product of arrays over all axes but some, in a shape with ones elsewhere.

    An array's axes have labels; along an axis of size 1 it is the same everywhere.
    """
    by_axes: dict[tuple[int, ...], Any] = {}
    for x, labels in _folded(operands, kept):
        there = tuple(i for i, n in zip(labels, x.shape, strict=True) if n != 1)
        x = x.reshape([n for n in x.shape if n != 1])
        # Of the same axes in any order, they are multiplied first: the search for the best order
        # of contractions takes two of them for one.
        alike = [o for o in by_axes if sorted(o) == sorted(there) and len(set(o)) == len(o)]
        order = alike[0] if alike else there
        if order in by_axes:
            x = by_axes[order] * (x.transpose([there.index(i) for i in order]) if alike else x)
        by_axes[order] = x
    kept = [i for i in kept if any(i in axes for axes in by_axes)]
    arguments = itertools.chain(*((x, axes) for axes, x in by_axes.items()))
    y = jnp.einsum(*arguments, kept, precision=lax.Precision.HIGHEST)
    return y.reshape(shape)


# Forms


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A value as the sum of linear images of its sources.

    Attributes:
      shape: The value's shape.
      of: The terms by source.
    """

    shape: tuple[int, ...]
    of: dict[Source, tuple[Term, ...]]

    def map(self, shape: Sequence[int], change: Callable[[Term, Source], Term]) -> "Form":
        """With every term changed, for a value of this shape."""
        of = {x: tuple(change(term, x) for term in terms) for x, terms in self.of.items()}
        return Form(tuple(shape), of)

    def plus(self, other: "Form", times: float = 1.0) -> "Form":
        """``self + times * other``."""
        shape = np.broadcast_shapes(self.shape, other.shape)
        of = dict(self.of)
        for source, terms in other.of.items():
            scaled = (dataclasses.replace(t, scale=times * t.scale) for t in terms)
            of[source] = collected((*of.get(source, ()), *scaled))
        return Form(shape, of)

    def times(self, by: "Factor | float", gate: Factor | None = None) -> "Form":
        """Times a constant, or an array with the value's axes; nothing where a gate is 0."""
        if isinstance(by, float):
            return self.map(
                self.shape, lambda term, _: dataclasses.replace(term, scale=by * term.scale)
            )
        if gate is None and all(n == 1 for n in by.shape) and by.static is not None:
            return self.times(float(by.static.ravel()[0]))
        shape = np.broadcast_shapes(self.shape, by.shape)
        return self.map(shape, lambda term, _: term.scaled(by, gate))

    def through(self, by: Factor) -> "Form":
        """Times an array of the same shape whose zeros connect nothing: a gate behind gates."""
        return self.map(self.shape, lambda term, _: term.scaled(by, by if term.gates else None))

    def transposed(self, axes: Sequence[int]) -> "Form":
        """With the value's axes in another order."""
        rank = len(axes)

        def change(f: Factor) -> Factor:
            return f.transposed([*axes, *range(rank, len(f.shape))])

        return self.map([self.shape[i] for i in axes], lambda term, _: term.dims(change))

    def placed(self, shape: Sequence[int], at: Sequence[int]) -> "Form":
        """Broadcast, with the value's axes at these of the result's."""
        change = functools.partial(placed, rank=len(shape), at=at)
        return self.map(shape, lambda term, _: term.dims(change))

    def reshaped(self, shape: Sequence[int]) -> "Form":
        """In another shape, row by row."""
        if self.shape == tuple(shape):
            return self
        rank, groups = len(self.shape), list(_groups(self.shape, shape))

        def change(f: Factor) -> Factor:
            full, sizes = list(f.shape), []
            for old, new in groups:
                if all(f.shape[i] == 1 for i in old):
                    sizes += [1] * len(new)
                    continue
                for i in old:
                    full[i] = self.shape[i]
                sizes += [shape[i] for i in new]
            if math.prod(full) > MOST_ENTRIES:
                raise TooLarge
            after = (*sizes, *f.shape[rank:])
            if full != list(f.shape):
                f = f.mapped(lambda x: _broadcast(x, full), full)
            return f.reshaped(after)

        return self.map(shape, lambda term, _: term.dims(change))

    def taken(self, dims: Sequence[int], indices: Sequence[Factor]) -> "Form":
        """At positions along some axes, 0 where one is negative; the axes of the indices lead."""
        rank, lead = len(self.shape), indices[0].shape
        rest = [i for i in range(rank) if i not in dims]
        outside = [
            i for i in indices if not (i.within or (i.static is not None and (i.static >= 0).all()))
        ]

        def bounded(i: Factor) -> Factor:
            return i.mapped(lambda x: x.clip(0), i.shape) if i in outside else i

        def change(f: Factor) -> Factor:
            more = range(rank, len(f.shape))
            f = f.transposed([*dims, *rest, *more])
            after = f.shape[len(dims) :]
            if all(n == 1 for n in f.shape[: len(dims)]):
                return f.reshaped((*(1,) * len(lead), *after))
            sizes = (*lead, *after)
            if math.prod(sizes) > MOST_ENTRIES:
                raise TooLarge
            along = [i for i, n in enumerate(f.shape[: len(dims)]) if n != 1]
            f = f.reshaped([*(f.shape[i] for i in along), *after])
            at = [bounded(indices[i]) for i in along]
            static = [i.static for i in at if i.static is not None]
            if f.static is not None and len(static) == len(at):
                return known(f.static[tuple(static)])
            if len(at) == 1 and _runs_along(f, 0, f.shape[0]):
                return at[0].mapped(lambda i: i.astype(int), lead).widened(len(after))

            def take(x: Any, *at: Any) -> Any:
                return _jaxpr.entries(jnp.asarray(x), at)

            return combined(take, sizes, f, *at)

        shape = (*lead, *(self.shape[i] for i in rest))
        form = self.map(shape, lambda term, _: term.dims(change))
        for index in outside:
            there = index.mapped(lambda i: i >= 0, index.shape).widened(len(rest))
            form = form.times(there, gate=there)
        return form

    def summed(self, dims: Iterable[int]) -> "Form":
        """The sum over axes, which stay with size 1."""
        form = self
        for dim in dims:
            size = form.shape[dim]
            shape = (*form.shape[:dim], 1, *form.shape[dim + 1 :])
            add_up = functools.partial(_summed_over, dim=dim, size=size)
            form = form.map(shape, add_up)
        return form

    def summed_by(self, ids: Factor, count: int) -> "Form":
        """The sums over entries along the first axis that have one id, along that axis."""
        rank = len(self.shape)
        return self.map(
            (count, *self.shape[1:]), lambda term, x: term.summed_by(ids, count, rank, x.shape)
        )

    @property
    def reads(self) -> frozenset[Value]:
        """The values from which its factors and indices are computed."""
        return frozenset(v for v in _reads(self._arrays) if isinstance(v, Value))

    @property
    def multiplied(self) -> int:
        """How many multiplications its arrays take, about."""
        return sum(f.multiplied for f in self._arrays)

    @property
    def _arrays(self) -> list[Factor]:
        arrays = (a for ts in self.of.values() for t in ts for a in (*t.factors, *t.at, *t.gates))
        return [a for a in arrays if isinstance(a, Factor)]


def placed(f: Factor, rank: int, at: Sequence[int]) -> Factor:
    """With the first axes at these of a value's, and ones at the others."""
    order = sorted(range(len(at)), key=at.__getitem__)
    after = range(len(at), len(f.shape))
    f = f.transposed([*order, *after])
    sizes = [1] * rank
    for i, n in zip(sorted(at), f.shape, strict=False):
        sizes[i] = n
    return f.reshaped([*sizes, *f.shape[len(at) :]])


def _summed_over(term: Term, source: Source, dim: int, size: int) -> Term:
    return term.summed_over(dim, size, source.shape)


def identity(value: "Source") -> Form:
    """A value as a source."""
    return gated(value, ())


def gated(value: "Source", gates: tuple[Factor, ...]) -> Form:
    """A value as a source, of which nothing comes through where one of the gates is 0."""
    shape, rank = tuple(value.shape), len(value.shape)

    def along(i: int) -> Factor:
        n = shape[i]
        return known(np.arange(n).reshape([n if j == i else 1 for j in range(rank)]))

    return Form(shape, {value: (Term(1.0, (), tuple(map(along, range(rank))), gates=gates),)})


def collected(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The terms with those as one that can be; a term of 0 is left out."""
    left: list[Term] = []
    for term in terms:
        for i, other in enumerate(left):
            both = other.plus(term)
            if both is not None:
                left[i] = both
                break
        else:
            left.append(term)
    return tuple(t for t in left if t.scale != 0.0)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The axes of two shapes of one size, in runs that hold the same entries."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds: list[int] = []
        news: list[int] = []
        a = b = 1
        while not (olds or news) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a *= old[i]
                olds.append(i)
                i += 1
            else:
                b *= new[j]
                news.append(j)
                j += 1
        yield olds, news


def _broadcast(x: Any, shape: Sequence[int]) -> Any:
    return np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else jnp.broadcast_to(x, shape)


# Covariances


def covariance(
    left: Sequence[Term],
    right: Sequence[Term],
    spread: Any,
    shape: Sequence[int],
    read: Reader,
    over: Sequence[int] = (),
) -> Any:
    """``sum_s M_y[t, s] M_z[t, s] v[s]`` for two images of one source.

    Args:
      left: The terms of one.
      right: The terms of the other, the same for a variance.
      spread: The source's spread ``v``.
      shape: The shape of both, with ones where they are the same everywhere.
      read: The primals that factors are computed from.
      over: Axes of both to sum over, which stay with size 1.

    Returns:
      An array that broadcasts to the shape, ``None`` if there is nothing that both share.
    """
    if spread is None:
        return None
    compute = functools.partial(_covariance, left, right, spread, shape, read, over)
    return automatically(compute, spread)


def _covariance(
    left: Sequence[Term],
    right: Sequence[Term],
    spread: Any,
    shape: Sequence[int],
    read: Reader,
    over: Sequence[int],
) -> Any:
    spread, same = read.number(spread), left is right
    left, right = (
        read.once((together, *terms), together, terms, len(shape), spread.shape)
        for terms in (left, right)
    )
    if same:
        distinct = itertools.combinations_with_replacement(left, 2)
        pairs = [(a, b, 1.0 if a is b else 2.0) for a, b in distinct]
    else:
        pairs = [(a, b, 1.0) for a, b in itertools.product(left, right)]
    found = [(times, a, b, _of_pair(a, b, spread, shape, read, over)) for a, b, times in pairs]
    products = [(times * a.scale * b.scale, *pair) for times, a, b, pair in found if pair]
    if not products:
        return None
    common = functools.reduce(operator.and_, (gates for *_, gates in products))
    terms = [_scaled(c, _behind(y, gates - common, read)) for c, y, gates in products]
    return _behind(functools.reduce(jnp.add, terms), common, read)


def together(terms: Sequence[Term], rank: int, source: Sequence[int]) -> Sequence[Term]:
    """The terms with several of known arrays as one, of their matrix, if that is small."""
    known_ones = [t for t in terms if t.is_known]
    if len(known_ones) < 3:
        return terms
    first, *others = known_ones
    axes = [
        i
        for i, a in enumerate(first.at)
        if isinstance(a, int) or not all(_agree(a, t.at[i]) for t in others)
    ]
    shapes = (
        a.shape[:rank] for t in known_ones for a in (*t.factors, *t.at) if isinstance(a, Factor)
    )
    entries = math.prod((*np.broadcast_shapes(*shapes), *(source[i] for i in axes)))
    if entries > MOST_KNOWN:
        return terms
    matrices, gates = [], []
    for term in known_ones:
        for axis in axes:
            if not isinstance(term.at[axis], int):
                term = term._written_out(axis, source[axis])
        order = [*range(rank), *(rank + term.at[axis] for axis in axes)]  # type: ignore[operator]
        scale = np.full((1,) * len(order), term.scale)
        matrices.append([scale, *(f.static.transpose(order) for f in term.factors)])  # type: ignore[union-attr]
        gates.append([scale != 0, *(g.static.transpose(order) != 0 for g in term.gates)])  # type: ignore[union-attr]
    matrix = known(sum(functools.reduce(operator.mul, xs) for xs in matrices))
    open_ = known(sum(functools.reduce(operator.mul, xs) for xs in gates))
    shut = () if open_.static.all() else (open_,)  # type: ignore[union-attr]
    at = tuple(axes.index(i) if i in axes else a for i, a in enumerate(first.at))
    one = Term(1.0, (matrix,), at, len(axes), once=False, gates=shut)
    return [one, *(t for t in terms if t not in known_ones)]


def variance(form: Form, vary: Callable[[Any], Any], read: Reader) -> Any:
    """The spread of a value of this form, from those of its sources; None if they have none."""
    total: Any = None
    for source, terms in form.of.items():
        y = covariance(terms, terms, vary(source), form.shape, read)
        total = y if total is None else total if y is None else total + y
    return None if total is None else jnp.broadcast_to(total, form.shape)


def _of_pair(
    a: Term,
    b: Term,
    spread: Any,
    shape: Sequence[int],
    read: Reader,
    over: Sequence[int],
) -> tuple[Any, frozenset[Factor]] | None:
    """``sum_s M_y[t, s] M_z[t, s] v[s]`` for a term of each, but for their scales, and its gates.

    Factors that depend on ``t`` alone are taken out of the sum, which is computed once for all
    terms that differ in these.
    """
    rank = len(shape)
    if are_apart(a, b, rank):
        return None
    pair, outside, gates = [], [], frozenset[Factor]()
    for term in (a, b):
        dims = (*over, *range(rank, rank + term.summed))
        inside = [f for f in term.factors if _depends(f, dims)]
        outside += [f for f in term.factors if f not in inside]
        inside = [read.once((f, None, *term.gates), f.masked, term.gates) for f in inside]
        for g in read.once((dims, *term.factors, None, *term.gates), term.any_along, dims):
            gates |= {read.once((g, rank), g.reshaped, g.shape[:rank])}
        pair.append(dataclasses.replace(term, factors=tuple(inside), gates=()))
    a, b = sorted(pair, key=lambda term: term.key)
    key = a.key, b.key, id(spread), tuple(shape), tuple(over)
    y = read.once(key, _sum_over_source, a, b, spread, shape, read, over)
    if y is None:
        return None
    wide = [read.once((f, rank), f.reshaped, f.shape[:rank]) for f in outside]
    outside = [read.once((f, gates), f.masked, gates) for f in wide]
    outside.sort(key=lambda f: f.serial)
    return read.once((key, *outside), _times, y, outside, read), gates


def _times(x: Any, factors: Sequence[Factor], read: Reader) -> Any:
    """``x`` times factors that have no axes but its own."""
    for f in factors:
        y = read.numbers(f)
        x = x * y.reshape(y.shape[: x.ndim])
    return x


def _behind(x: Any, gates: frozenset[Factor], read: Reader) -> Any:
    """``x``, and 0 where a gate is."""
    if not gates:
        return x
    open_ = read.once(gates, _all_open, gates, read)
    return _jaxpr.only_where(open_, x)


def _all_open(gates: frozenset[Factor], read: Reader) -> Any:
    in_order = sorted(gates, key=lambda g: (g.static is None, g.serial))
    return functools.reduce(operator.and_, (read.array(g).astype(bool) for g in in_order))


def _depends(f: Factor, axes: Iterable[int]) -> bool:
    """Whether it is not the same everywhere along these axes."""
    return any(f.shape[i] != 1 for i in axes)


def _sum_over_source(
    a: Term,
    b: Term,
    spread: Any,
    shape: Sequence[int],
    read: Reader,
    over: Sequence[int],
) -> Any:
    rank = len(shape)
    of_source = list(range(rank, rank + spread.ndim))
    masks: list[Factor] = []
    gathered: dict[int, Factor] = {}
    for axis, (i, j) in enumerate(zip(a.at, b.at, strict=True)):
        if isinstance(i, int) and isinstance(j, int):
            continue
        if isinstance(i, int) or isinstance(j, int):
            index = j if isinstance(i, int) else i
            assert isinstance(index, Factor)
            along = _axis_of(index, rank, spread.shape[axis])
            if along is not None and along not in of_source:
                of_source[axis] = along  # What is summed over in one is this axis in the other.
            else:
                masks.append(_one_hot(index, axis, spread.ndim, spread.shape[axis]))
            continue
        gathered[axis] = i
        if not i.same(j):
            equal = _equal(i, j)
            if equal is None:
                return None
            masks.append(equal.widened(spread.ndim))
    arrays: dict[tuple[int, ...], list[tuple[Any, list[int]]]] = {}
    for term in (a, b):
        labels = [*range(rank), *(0,) * term.summed]
        for axis, k in enumerate(term.at):
            if isinstance(k, int):
                labels[rank + k] = of_source[axis]
        for f in term.factors:
            same = arrays.setdefault((id(f), *labels), [])
            same.append(_operand(f, labels, read))
    operands: list[tuple[Any, Sequence[int]]] = [
        (functools.reduce(operator.mul, [x for x, _ in same]), same[0][1])
        for same in arrays.values()
    ]
    for mask in masks:
        operands.append((read.numbers(mask), range(rank + spread.ndim)))
    places = tuple(gathered.items())
    key = id(spread), places, *of_source
    at = read.once(key, _at, spread, gathered, rank, of_source, read)
    operands.append(at)
    sizes = [1] * rank
    for x, at in operands:
        for n, label in zip(x.shape, at, strict=True):
            if label < rank and label not in over:
                sizes[label] = max(sizes[label], n)
    numbers = {v.dtype for v in _reads((*a.factors, *b.factors)) if is_inexact(v)}
    dtype = read.within(*numbers) if numbers and read.dtype == jnp.float32 else read.dtype
    rounded = [
        (x if x.dtype == dtype else lax.convert_element_type(x, dtype), at) for x, at in operands
    ]
    y = read.number(_product(rounded, [i for i in range(rank) if i not in over], sizes))
    spanned = {i for x, at in operands for n, i in zip(x.shape, at, strict=True) if n != 1}
    alike = math.prod(shape[i] for i in over if i not in spanned)  # entries of each sum
    return _scaled(float(alike), y)


def _one_hot(index: Factor, axis: int, count: int, size: int) -> Factor:
    """An index as zeros and ones over the value's axes and the source's."""
    after = [size if i == axis else 1 for i in range(count)]
    shape = (*index.shape, *after)
    return index.mapped(lambda i: _hot(i, size).reshape(shape), shape)


def are_apart(a: Term, b: Term, rank: int) -> bool:
    """Whether two terms are known to share no entry of their source at one position."""
    if a is b:
        return False
    masks = [
        f.static.reshape(f.shape[:rank]) != 0
        for f in (*a.factors, *b.factors)
        if f.static is not None and math.prod(f.shape[rank:]) == 1
    ]
    equal = [
        i.static == j.static
        for i, j in zip(a.at, b.at, strict=True)
        if isinstance(i, Factor)
        and isinstance(j, Factor)
        and not (i.static is None or j.static is None)
    ]
    return any(not functools.reduce(np.logical_and, masks, each).any() for each in equal)


def _equal(a: Factor, b: Factor) -> Factor | None:
    """Where two indices are the same; ``None`` if they are known to be so nowhere."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    if a.static is not None and b.static is not None:
        equal = a.static == b.static
        return known(equal) if equal.any() else None
    return combined(lambda x, y: jnp.asarray(x) == jnp.asarray(y), shape, a, b)


def _at(
    spread: Any,
    index: dict[int, Factor],
    rank: int,
    of_source: Sequence[int],
    read: Reader,
) -> tuple[Any, list[int]]:
    """The spread at the positions that its bound axes are bound to, with its labels."""
    labels = list(of_source)
    taken = {}
    for axis, i in index.items():
        along = _axis_of(i, rank, spread.shape[axis])
        if along is not None and along not in labels:
            labels[axis] = along
        else:
            taken[axis] = i
    if not taken:
        return spread, labels
    dims = sorted({d for i in taken.values() for d in range(rank) if i.shape[d] != 1})
    rest = [axis for axis in range(spread.ndim) if axis not in taken]
    rows = jnp.transpose(spread, [*taken, *rest])
    indices = (i.reshaped([i.shape[d] for d in dims]) for i in taken.values())
    y = _jaxpr.entries(rows, list(map(read.array, indices)))
    return y, [*dims, *(labels[axis] for axis in rest)]
