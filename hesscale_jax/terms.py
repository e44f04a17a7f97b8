"""One term of a linear image, and what linear steps make of it.

See :mod:`hesscale_jax.forms` for what a term is.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax.arrays import (
    MOST_ENTRIES,
    MOST_INDICES,
    MOST_KNOWN,
    Factor,
    Reader,
    TooLarge,
    added,
    combined,
    contracted,
    depends_on,
    known,
    made_of,
    one_hot,
    read_by,
)

__all__ = ["Term", "axis_of", "collected", "runs_along", "side_by_side", "together"]


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
        inside = [g for g in self.gates if depends_on(g, dims)]
        if not inside:
            return self.gates
        zeros = [f for f in self.factors if f.static is not None and depends_on(f, dims)]
        outside = tuple(g for g in self.gates if g not in inside)
        open_ = [f.nonzero for f in dict.fromkeys((*inside, *zeros))]
        static = [f.static for f in open_ if f.static is not None]
        if len(static) < len(open_):
            return (*outside, contracted(open_, dims))
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
        whole = next((a for a in bound if runs_along(self.at[a], dim, source[a])), None)
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
        made = contracted(there, [dim])
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
        hot = index.mapped(lambda i: one_hot(i, size).reshape(shape), shape)
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
            made = made_of(shape, factors, add_up)
            return dataclasses.replace(made, reads=read_by((*factors, *indices)))

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
        common, mine, theirs = _parted(self.factors, other.factors)
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


def _parted(
    a: Iterable[Factor], b: Iterable[Factor]
) -> tuple[list[Factor], list[Factor], list[Factor]]:
    """The factors that two products share, each as often as both have it, and the rest of each."""
    common, mine, theirs = list[Factor](), list[Factor](), list(b)
    for f in a:
        if (other := next(filter(f.same, theirs), None)) is None:
            mine.append(f)
        else:
            common.append(f)
            theirs.remove(other)
    return common, mine, theirs


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
            # Numbers may stand beside truth values.
            dtypes = [x.dtype for x in arrays]
            numbers = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
            dtype = max(numbers, key=lambda d: d.itemsize) if numbers else np.result_type(*dtypes)
            wide = (lax.convert_element_type(x, dtype) for x in arrays)
            return jnp.concatenate(list(map(jnp.broadcast_to, wide, shapes)), dim)

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


def _agree(a: "Factor | int", b: "Factor | int") -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
    return a.same(b)


def _distinct(index: "Factor | int") -> bool:
    if isinstance(index, int) or index.static is None:
        return False
    return np.unique(index.static).size == index.static.size


def runs_along(index: "Factor | int", dim: int, size: int) -> bool:
    """Whether an index is 0, 1, 2, ... along one axis, to the end of the source's."""
    if isinstance(index, int) or index.static is None:
        return False
    return index.shape[dim] == size and np.array_equal(index.static.ravel(), np.arange(size))


def axis_of(index: Factor, rank: int, size: int) -> int | None:
    """The axis of a value that an axis of the source of this size is the same as, if it is one."""
    along = [dim for dim in range(rank) if index.shape[dim] != 1]
    return along[0] if len(along) == 1 and runs_along(index, along[0], size) else None


def collected(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The terms with those as one that can be; a term of 0 is left out, unless others made it.

    Entry by entry, what cancels would vary by the sum of what both do.
    """
    left: list[Term] = []
    for term in terms:
        for i, other in enumerate(left):
            both = other.plus(term)
            if both is not None:
                left[i] = both
                break
        else:
            left.append(term)
    return tuple(t for t in left if t.scale != 0.0 or not t.once)


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
