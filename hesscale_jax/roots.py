"""What the values of a block are given by: their roots, with the derivatives in these.

See :mod:`hesscale_jax.pointwise`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from hesscale_jax._jaxpr import Value
from hesscale_jax.coefficients import add_to
from hesscale_jax.rules.derivatives import Coefficient

__all__ = [
    "Derived",
    "Local",
    "Mixed",
    "Root",
    "Split",
    "Sum",
    "composite",
    "deeper_first",
    "held",
    "leaves_of",
    "mixed",
    "parts_of_pair",
]


@dataclasses.dataclass(eq=False)
class Local:
    """A local root, by its derivatives in the sources.

    A source that has size 1 along reduced axes is ``repeated`` along them: reductions take its
    entries in more than once. It stands alone.
    """

    of_source: dict[Value, Coefficient]
    repeated: tuple[int, ...] = ()
    depth: ClassVar[int] = 0


@dataclasses.dataclass(eq=False)
class Sum:
    """A reduction, by its derivatives ``w`` in local roots.

    Of what it adds up, what has a form is ``added``, with its factor at each position.
    """

    of_local: dict[Local, Coefficient]
    added: dict["Local | Sum", Coefficient] = dataclasses.field(default_factory=dict)
    depth: ClassVar[int] = 1


@dataclasses.dataclass(eq=False)
class Mixed:
    """A root that takes in reductions, by its derivatives in what it is computed from."""

    parts: dict["Root | Sum", Coefficient]
    depth: int  # more than that of any part


Root = Local | Mixed

WIDEST = 4  # sources of a local root: one of more is given by what it is computed from


@dataclasses.dataclass
class Derived:
    """A value of the block: a root, and the slope of the value in it."""

    root: Root
    slope: Coefficient = 1.0


class Split(NamedTuple):
    """A value by its derivatives in some sources, and a root of the others."""

    slopes: dict[Value, Coefficient]
    rest: Root | None


def held(root: Root) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where the coefficients of a root are, and those of what it is computed from, each once."""
    waiting, found = [root], {root}
    while waiting:
        for terms in vars(waiting.pop()).values():
            for key in terms if isinstance(terms, dict) else ():
                yield terms, key
                if not isinstance(key, Value) and key not in found:
                    found.add(key)
                    waiting.append(key)


def composite(parts: dict[Any, Coefficient]) -> Root:
    """A root by its derivatives in other roots."""
    of_source: dict[Value, Coefficient] = {}
    for root, slope in parts.items():
        if isinstance(root, Mixed) or root.repeated:
            return mixed(parts)
        add_to(of_source, root.of_source, slope)
    return Local(of_source) if len(of_source) <= WIDEST else mixed(parts)


def mixed(parts: dict[Any, Coefficient]) -> Mixed:
    """A root that takes in reductions, by what makes no more parts with constant derivatives."""
    found: dict[Any, Coefficient] = {}
    for root, slope in parts.items():
        inner = root.parts if isinstance(root, Mixed) else {}
        constant = inner and all(isinstance(c, float) for c in (slope, *inner.values()))
        add_to(found, inner if constant else {root: 1.0}, slope)
    found = found if len(found) <= len(parts) else parts
    return Mixed(found, 1 + max(x.depth for x in found))


def deeper_first(a: Root | Sum, b: Root | Sum) -> tuple[Root | Sum, Root | Sum]:
    """That of two roots first which is given by the other, or by other parts."""
    if not isinstance(a, Mixed) or (isinstance(b, Mixed) and a.depth < b.depth):
        return b, a
    return a, b


def parts_of_pair(a: Root | Sum, b: Root | Sum) -> Iterable[tuple[Any, Any]]:
    """The pairs of roots of whose covariances that of ``a`` and ``b`` is computed."""
    a, b = deeper_first(a, b)
    if not isinstance(a, Mixed):
        return ()
    if a is b:
        return itertools.combinations_with_replacement(a.parts, 2)
    return ((x, b) for x in a.parts)


def leaves_of(parts: dict[Any, Coefficient]) -> dict[Any, Coefficient]:
    """Derivatives in locals and reductions, of what is given by its derivatives in any roots."""
    left, leaves = dict(parts), {}
    while left:
        # The deepest first, so that each is taken apart once.
        root = max(left, key=lambda x: x.depth)
        slope = left.pop(root)
        if isinstance(root, Mixed):
            add_to(left, root.parts, slope)
        else:
            leaves[root] = slope
    return leaves
