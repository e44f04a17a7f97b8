"""Arrays that are computed when they are needed: until then, shapes and functions of values.

The constants that terms of :mod:`hesscale_jax.terms` are made of: what is off the path, the other
factor of a product, an index. What is known while tracing is an array of NumPy.
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
from hesscale_jax._jaxpr import Constant, Value
from hesscale_jax._mesh import on_mesh

__all__ = [
    "MOST_ENTRIES",
    "MOST_INDICES",
    "MOST_KNOWN",
    "Blank",
    "Factor",
    "Reader",
    "TooLarge",
    "added",
    "combined",
    "contracted",
    "depends_on",
    "known",
    "made_of",
    "of_atom",
    "one_hot",
    "operand",
    "placed",
    "product",
    "read_by",
    "scaled",
]


# More entries than these are not written out: a static index, and a factor; nor, of what is known,
# computed while tracing.
MOST_INDICES, MOST_ENTRIES, MOST_KNOWN = 2**22, 2**26, 2**14


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

        return made_of(shape, (self,), compute)

    def reshaped(self, shape: Sequence[int]) -> "Factor":
        """In another shape, row by row."""
        base, shape = self.base or self, tuple(shape)
        if base.shape == shape:
            return base
        if shape not in base._reshapes:
            made = base.mapped(lambda x: x.reshape(shape), shape)
            base._reshapes[shape] = dataclasses.replace(made, base=base)
        return base._reshapes[shape]

    @functools.cached_property
    def _reshapes(self) -> "dict[tuple[int, ...], Factor]":
        return {}

    @property
    def squeezed(self) -> "Factor":
        """Without its axes of size 1."""
        return self.reshaped([n for n in self.shape if n != 1])

    def transposed(self, axes: Sequence[int]) -> "Factor":
        """With its axes in another order."""
        shape = [self.shape[i] for i in axes]
        moved = [i for i in axes if self.shape[i] != 1]
        if moved == sorted(moved):
            return self.reshaped(shape)
        return self.mapped(lambda x: x.transpose(axes), shape)

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

    return made_of(shape, factors, compute)


def made_of(
    shape: Sequence[int], factors: Sequence[Factor], compute: Callable[[Reader], Any]
) -> Factor:
    """A factor that is computed from others."""
    finite, safe = (all(getattr(f, name) for f in factors) for name in ("finite", "safe"))
    made = Factor(tuple(shape), read_by(factors), compute, finite=finite, safe=safe)
    multiplied = max((f.multiplied for f in factors), default=0)
    return dataclasses.replace(made, made_of=tuple(factors), multiplied=multiplied)


def added(a: Factor, b: Factor, of_a: float, of_b: float) -> Factor:
    """``of_a * a + of_b * b``, of the same shape."""
    x, y = (f.base or f for f in (a, b))
    x, y = (x, y) if x.shape == y.shape else (a, b)
    if x.static is not None and y.static is not None and x.static.size <= MOST_KNOWN:
        return known(of_a * x.static + of_b * y.static).reshaped(a.shape)

    def add(read: Reader) -> Any:
        return scaled(of_a, read.numbers(x)) + scaled(of_b, read.numbers(y))

    return made_of(x.shape, (x, y), add).reshaped(a.shape)


def scaled(c: float, x: Any) -> Any:
    """``c * x``; of ``c = 1``, nothing is computed."""
    return x if c == 1.0 else c * x


def one_hot(index: Any, size: int) -> Any:
    """Zeros and ones along a new axis."""
    return index[..., None] == np.arange(size).reshape((*(1,) * index.ndim, size))


def contracted(factors: Sequence[Factor], dims: Sequence[int]) -> Factor:
    """The sum over some axes of a product."""
    full = np.broadcast_shapes(*(f.shape for f in factors))
    shape = [1 if i in dims else n for i, n in enumerate(full)]
    kept = [i for i, n in enumerate(shape) if n != 1]
    sizes = tuple(shape[i] for i in kept)

    def contract(read: Reader) -> Any:
        return product([operand(f, range(len(shape)), read) for f in factors], kept, sizes)

    made = made_of(sizes, factors, contract)
    multiplied = max(made.multiplied, math.prod(full))
    return dataclasses.replace(made, multiplied=multiplied).reshaped(shape)


def operand(
    f: Factor, labels: Sequence[int], read: Reader, times: int = 1
) -> tuple[Any, list[int]]:
    """A factor's numbers so many times, and the labels of its axes, but for those of size 1.

    Each label is there once.
    """
    there = [label for label, n in zip(labels, f.shape, strict=True) if n != 1]
    distinct = list(dict.fromkeys(there))
    places = tuple(distinct.index(label) for label in there)
    f = f.squeezed
    return read.once((f, places, times), _power, read.numbers(f), places, times), distinct


def _power(x: Any, places: Sequence[int], times: int) -> Any:
    """Entries to a power, those at which axes with the same number have the same index."""
    if len(set(places)) < len(places):
        einsum = np.einsum if isinstance(x, np.ndarray) else jnp.einsum
        x = einsum(x, places, sorted(set(places)))
    return functools.reduce(operator.mul, [x] * times)


def read_by(factors: Iterable[Factor]) -> frozenset[Value | Constant]:
    """What factors are computed from."""
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


def product(
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


def placed(f: Factor, rank: int, at: Sequence[int]) -> Factor:
    """With the first axes at these of a value's, and ones at the others."""
    order = sorted(range(len(at)), key=at.__getitem__)
    after = range(len(at), len(f.shape))
    f = f.transposed([*order, *after])
    sizes = [1] * rank
    for i, n in zip(sorted(at), f.shape, strict=False):
        sizes[i] = n
    return f.reshaped([*sizes, *f.shape[len(at) :]])


def depends_on(f: Factor, axes: Iterable[int]) -> bool:
    """Whether it is not the same everywhere along these axes."""
    return any(f.shape[i] != 1 for i in axes)
