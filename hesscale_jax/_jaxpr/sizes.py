"""Sizes that are not known while tracing, as those of a program to export."""

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp

__all__ = ["Size", "dimension", "number", "size", "sizes"]


def size(shape: tuple[int, ...]) -> int:
    """The number of entries of an array of this shape."""
    return math.prod(shape)


class Size(int):
    """A number that stands for a symbolic dimension, so that one can order and divide sizes.

    It is the dimension's value where each symbol is a large prime. Two are equal, and one divides
    another, if that holds for the dimensions, whatever the symbols are.
    """

    dimension: Any

    def __eq__(self, other: Any) -> bool:
        return bool(self.dimension == dimension(other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __mul__(self, other: int) -> int:
        return _sized(self.dimension * dimension(other), int(self) * int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        return _sized(self.dimension // dimension(other), int(self) // int(other))

    def __rfloordiv__(self, other: int) -> int:
        return _sized(other // self.dimension, other // int(self))

    def __mod__(self, other: int) -> int:
        return int((self.dimension % dimension(other)) != 0)

    def __rmod__(self, other: int) -> int:
        return int((other % self.dimension) != 0)


def sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """A shape in numbers that can be compared."""
    if all(isinstance(n, int) for n in shape):
        return shape
    return tuple(_sized(n, _value(n)) for n in shape)


def dimension(size: int) -> Any:
    """The dimension that a size stands for."""
    return size.dimension if isinstance(size, Size) else size


def number(size: Any, dtype: Any) -> Any:
    """A size as a factor: a float if it is known, else an array of this dtype."""
    return float(size) if isinstance(size, int) else jnp.asarray(size, dtype)


def _sized(dimension: Any, value: int) -> int:
    if isinstance(dimension, int):
        return dimension
    size = Size(value)
    size.dimension = dimension
    return size


def _value(dimension: Any) -> int:
    if isinstance(dimension, int):
        return dimension
    values = {name: _prime(name) for name in sorted(dimension._get_vars())}
    return int(dimension._evaluate(values))


_primes = (n for n in itertools.count(10007, 2) if all(n % k for k in range(3, 200, 2)))


@functools.cache
def _prime(name: str) -> int:
    """Another one for each symbol."""
    return next(_primes)
