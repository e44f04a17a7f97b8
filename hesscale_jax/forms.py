"""Linear images of one value, written in indices: how they vary together when they meet again.

A value ``y`` that is affine in a *source* ``x``, an input of the program or the result of something
curved, is kept as a sum of terms

    dy[t] = sum_s  M[t, s] dx[s]        M[t, s] = c * product_k F_k[t, s] * product_a [s_a = i_a[t]]

An axis ``a`` of the source is *bound* to positions of ``y`` by an index ``i_a``, or it is *summed*
over. The factors ``F_k`` are constants: arrays off the path, or the other factor of a product, with
size 1 along each axis on which they do not depend. Where a choice is closed, its factor is 0 and
discards infinities and NaN: it is a *gate*. Two images of one source covary by

    cov(y, z)[t] = sum_s M_y[t, s] M_z[t, s] v[s]

one product more, linear in the spread ``v`` (:mod:`hesscale_jax.covariances`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Value
from hesscale_jax.arrays import MOST_ENTRIES, Factor, TooLarge, combined, known, placed, read_by
from hesscale_jax.terms import Term, collected, runs_along

__all__ = ["Form", "gated", "identity"]


Source = Any  # a value, or the part of one that has no form


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
            if len(at) == 1 and runs_along(f, 0, f.shape[0]):
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
        return frozenset(v for v in read_by(self._arrays) if isinstance(v, Value))

    @property
    def multiplied(self) -> int:
        """How many multiplications its arrays take, about."""
        return sum(f.multiplied for f in self._arrays)

    @property
    def _arrays(self) -> list[Factor]:
        arrays = (a for ts in self.of.values() for t in ts for a in (*t.factors, *t.at, *t.gates))
        return [a for a in arrays if isinstance(a, Factor)]


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
