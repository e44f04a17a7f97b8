"""How linear images of one source vary together: products of their terms with its spread.

    cov(y, z)[t] = sum_s M_y[t, s] M_z[t, s] v[s]

See :mod:`hesscale_jax.forms` for what ``M`` is. Linear in the spread, so that it transposes.
"""

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import is_inexact
from hesscale_jax._mesh import automatically
from hesscale_jax.arrays import (
    Factor,
    Reader,
    combined,
    depends_on,
    known,
    one_hot,
    operand,
    product,
    read_by,
    scaled,
)
from hesscale_jax.forms import Form
from hesscale_jax.terms import Term, axis_of, together

__all__ = ["are_apart", "covariance", "variance"]


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
    scaled_pairs = [(times * a.scale * b.scale, a, b) for a, b, times in pairs]
    found = [(c, _of_pair(a, b, spread, shape, read, over)) for c, a, b in scaled_pairs if c]
    products = [(c, *pair) for c, pair in found if pair]
    if not products:
        return None
    common = functools.reduce(operator.and_, (gates for *_, gates in products))
    terms = [scaled(c, _behind(y, gates - common, read)) for c, y, gates in products]
    return _behind(functools.reduce(jnp.add, terms), common, read)


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
        inside = [f for f in term.factors if depends_on(f, dims)]
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
            along = axis_of(index, rank, spread.shape[axis])
            if along is not None and along not in of_source:
                of_source[axis] = along  # What is summed over in one is this axis in the other.
            else:
                masks.append(_mask(index, axis, spread.ndim, spread.shape[axis]))
            continue
        gathered[axis] = i
        if not i.same(j):
            equal = _equal(i, j)
            if equal is None:
                return None
            masks.append(equal.widened(spread.ndim))
    factors = collections.Counter[tuple[Factor, tuple[int, ...]]]()
    for term in (a, b):
        labels = [*range(rank), *(0,) * term.summed]
        for axis, k in enumerate(term.at):
            if isinstance(k, int):
                labels[rank + k] = of_source[axis]
        factors.update((f, tuple(labels)) for f in term.factors)
    operands: list[tuple[Any, Sequence[int]]] = [
        operand(f, labels, read, times) for (f, labels), times in factors.items()
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
    numbers = {v.dtype for v in read_by((*a.factors, *b.factors)) if is_inexact(v)}
    dtype = read.within(*numbers) if numbers and read.dtype == jnp.float32 else read.dtype
    rounded = [
        (x if x.dtype == dtype else lax.convert_element_type(x, dtype), at) for x, at in operands
    ]
    y = read.number(product(rounded, [i for i in range(rank) if i not in over], sizes))
    spanned = {i for x, at in operands for n, i in zip(x.shape, at, strict=True) if n != 1}
    alike = math.prod(shape[i] for i in over if i not in spanned)  # entries of each sum
    return scaled(float(alike), y)


def _mask(index: Factor, axis: int, count: int, size: int) -> Factor:
    """An index as zeros and ones over the value's axes and the source's."""
    after = [size if i == axis else 1 for i in range(count)]
    shape = (*index.shape, *after)
    return index.mapped(lambda i: one_hot(i, size).reshape(shape), shape)


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
        along = axis_of(i, rank, spread.shape[axis])
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
