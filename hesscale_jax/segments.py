"""Which scatters and gathers undo each other: pure graph analysis, no arithmetic.

``s_j = sum_{id(k) = j} u_k`` is a scatter, and ``y_k = s_id(k)`` a gather. Where a program takes
what it has added up back by the same ids, or two such sums meet, they are the reduction and the
broadcast of a softmax or a normalisation over segments, and belong to blocks as ``reduce_sum`` and
``broadcast_in_dim`` do.
"""

import functools
import itertools
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Program, Value, size
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.selection import Join, Scatter, Take, View

__all__ = ["Ids", "Segmented", "segmented"]

# What changes the shape or the dtype of ids: of equally many entries, their order stays.
SAME_IDS = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze"})

CLIP, FILL = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.FILL_OR_DROP


class Ids(NamedTuple):
    """The segment of each entry, however it is written.

    Attributes:
      root: What it is computed from.
      segments: How many there are.
      known: Whether the root is, before the first equation.
      wraps: Whether a negative one counts from the end.
    """

    root: Any
    segments: int
    known: bool = False
    wraps: bool = False


class Segmented(NamedTuple):
    """A gather or a scatter by segments.

    The entries lie as what they are taken from or added to does, but for the one axis of the
    segments, along which they have one for each id. The ids may differ along other axes, as under
    ``vmap``.

    Attributes:
      ids: By which ids.
      axis: The axis of the segments.
      along: The axes that the dimensions of the ids run along.
      wraps: Whether a negative id counts from the end, and is still to be replaced.
      drops: Whether an id out of bounds has no segment; else it has the nearest.
      full: Whether each segment is known to have an entry.
      ends: Whether it is a sum that nothing of the kind reads.
    """

    ids: Ids
    axis: int
    along: tuple[int, ...]
    wraps: bool
    drops: bool
    full: bool = False
    ends: bool = False


def segmented(
    program: Program, rules: Mapping[Equation, Any], active: Container[Value]
) -> dict[Equation, Segmented]:
    """The scatters and gathers on a path by ids by which a sum is taken back, or meets another."""
    candidates = [
        eqn
        for eqn, rule in rules.items()
        if isinstance(rule, Take) or (isinstance(rule, Scatter) and eqn.inputs[0] not in active)
    ]
    if not any(isinstance(rules[eqn], Scatter) for eqn in candidates):
        return {}
    found = _by_ids(program, candidates)
    meeting = _meeting(rules, found, active)
    ids = {found[eqn].ids for eqn in meeting}
    return {
        eqn: each._replace(ends=isinstance(rules[eqn], Scatter) and eqn not in meeting)
        for eqn, each in found.items()
        if each.ids in ids
    }


def _meeting(
    rules: Mapping[Equation, Any], found: dict[Equation, Segmented], active: Container[Value]
) -> set[Equation]:
    """The scatters whose sums are taken back by their ids, or meet another sum by them.

    Two sums meet if what they add up are pointwise functions of one value.
    """
    meeting: set[Equation] = set()
    sums: dict[Any, frozenset[Equation]] = {}  # that a value is a pointwise function of
    origins: dict[Any, frozenset[Value]] = {}  # the values that it is one of
    for eqn, rule in rules.items():
        of = (origins.get(v, frozenset([v])) for v in eqn.inputs if v in active)
        origin = frozenset[Value]().union(*of)
        if isinstance(rule, Pointwise | View | Join) or eqn in found:
            origins.update(dict.fromkeys(eqn.outputs, origin))
        read = frozenset[Equation]().union(*(sums.get(v, ()) for v in eqn.inputs))
        if isinstance(rule, Scatter):
            read = frozenset([eqn] if eqn in found else [])
        elif eqn in found:
            meeting.update(each for each in read if found[each].ids == found[eqn].ids)
        elif isinstance(rule, Pointwise):
            meeting.update(
                a
                for a, b in itertools.permutations(read, 2)
                if found[a].ids == found[b].ids
                and not origins[a.outputs[0]].isdisjoint(origins[b.outputs[0]])
            )
        if isinstance(rule, Pointwise | View | Join | Scatter):
            sums.update(dict.fromkeys(eqn.outputs, read))
    return meeting


def _by_ids(program: Program, candidates: Iterable[Equation]) -> dict[Equation, Segmented]:
    """Those of the candidates that go by segments, and how."""
    written = _Written(program)
    found: dict[Equation, Segmented] = {}
    from_end = set()  # ids of which negative ones are replaced where something is taken or added
    for eqn in candidates:
        axes = _axes(eqn)
        if axes is None:
            continue
        segments = _jaxpr.sizes(eqn.inputs[0].shape)[axes[0]]
        root, replaced = written.root(eqn.inputs[1], segments)
        known = isinstance(root, Constant) or root in program.inputs
        ids, mode = Ids(root, segments, known), eqn.params["mode"]
        if replaced:
            from_end.add(ids)
        drops = mode == FILL or (mode != CLIP and eqn.name != "gather")
        found[eqn] = Segmented(ids, *axes, wraps=not replaced, drops=drops)
    reaches_all = functools.cache(_reaches_all)
    for eqn, each in list(found.items()):
        ids = each.ids._replace(wraps=each.ids in from_end)
        full = len(each.along) == 1 and reaches_all(ids, each.drops)
        found[eqn] = each._replace(ids=ids, wraps=each.wraps and ids.wraps, full=full)
        if found[eqn].wraps and eqn.params["mode"] == CLIP:
            del found[eqn]  # A negative id is the first segment here, and another one elsewhere.
    return found


def _reaches_all(ids: Ids, drops: bool) -> bool:
    """Whether each segment is known to have an entry."""
    counted = isinstance(ids.segments, int) and ids.segments > 0
    if not counted or not isinstance(ids.root, Constant) or _unknown(ids.root.value):
        return False
    at = np.asarray(ids.root.value).astype(np.int64).ravel()
    at = np.where(at < 0, at + ids.segments, at) if ids.wraps else at
    at = at[(at >= 0) & (at < ids.segments)] if drops else at.clip(0, ids.segments - 1)
    return bool(np.bincount(at, minlength=ids.segments).all())


def _axes(eqn: Equation) -> tuple[int, tuple[int, ...]] | None:
    """The axis of the segments, and those that the ids run along; ``None`` if there is no such."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.name == "gather":
        (whole, _), (entries,) = eqn.inputs, eqn.outputs
        window, single = numbers.offset_dims, numbers.collapsed_slice_dims
        columns, batch = numbers.start_index_map, numbers.start_indices_batching_dims
    else:
        whole, _, entries = eqn.inputs
        window, single = numbers.update_window_dims, numbers.inserted_window_dims
        columns = numbers.scatter_dims_to_operand_dims
        batch = numbers.scatter_indices_batching_dims
    if len(columns) != 1 or tuple(columns) != tuple(single):
        return None
    paired = dict(zip(batch, numbers.operand_batching_dims, strict=True))
    axis = int(columns[0])
    sizes, of_entries = _jaxpr.sizes(whole.shape), _jaxpr.sizes(entries.shape)
    along = tuple(i for i in range(len(of_entries)) if i not in window)
    if [paired.get(i, axis) for i in range(len(along))] != list(along):
        return None
    one_each = (*sizes[:axis], of_entries[axis], *sizes[axis + 1 :])
    return (axis, along) if of_entries == one_each and of_entries[axis] > 1 else None


class _Written:
    """What ids are computed from."""

    def __init__(self, program: Program) -> None:
        self._made = {v: eqn for eqn in program.equations for v in eqn.outputs}
        self._constants: dict[Any, Any] = {}

    def root(self, ids: Value | Constant, count: int) -> tuple[Any, bool]:
        """The ids as they are first written, and whether negative ones are replaced since."""
        wrapped = False
        while ids in self._made:
            eqn = self._made[ids]
            if eqn.name in SAME_IDS and self._is_same(eqn.inputs[0], ids):
                ids = eqn.inputs[0]
            elif not wrapped and (before := self._wrapped(eqn, count)) is not None:
                ids, wrapped = before, True
            else:
                break
        return self._key(ids), wrapped

    def _is_same(self, before: Value | Constant, ids: Value | Constant) -> bool:
        """Whether a change of shape or dtype leaves as many entries, and what they are."""
        old, new = (np.dtype(_dtype(v)) for v in (before, ids))
        large = all(d.kind in "iu" and d.itemsize >= 4 for d in (old, new))
        old_size, new_size = (size(_jaxpr.sizes(v.shape)) for v in (before, ids))
        return (large or np.can_cast(old, new)) and old_size == new_size

    def _wrapped(self, eqn: Equation, count: int) -> Any:
        """``ids`` of ``where(ids < 0, ids + count, ids)``; ``None`` if an equation is another."""
        if eqn.name != "select_n" or len(eqn.inputs) != 3:
            return None
        negative, ids, replaced = eqn.inputs
        made = self._made.get(replaced)
        if made is None or made.name != "add":
            return None
        if self._key(made.inputs[0]) != self._key(ids) or _number(made.inputs[1]) != count:
            return None
        if isinstance(negative, Constant) and isinstance(ids, Constant):
            known = [x.value for x in (negative, ids)]
            if any(map(_unknown, known)):
                return None
            return ids if np.array_equal(known[0], np.asarray(known[1]) < 0) else None
        test = self._made.get(negative)
        if test is None or test.name != "lt" or _number(test.inputs[1]) != 0:
            return None
        return ids if self._key(test.inputs[0]) == self._key(ids) else None

    def _key(self, ids: Value | Constant) -> Any:
        """The same for constants of the same entries, which may have a size of 1 along axes."""
        if isinstance(ids, Value) or _unknown(ids.value):
            return ids
        entries = np.asarray(ids.value)
        if entries.dtype.kind not in "iu":
            return ids
        shape = tuple(n for n in entries.shape if n != 1)
        return self._constants.setdefault((shape, entries.astype(np.int64).tobytes()), ids)


def _unknown(value: Any) -> bool:
    """Whether what a constant holds is not known now, or not here."""
    known = isinstance(value, np.ndarray | np.generic | int)
    return not known and not (
        isinstance(value, jax.Array)
        and not isinstance(value, jax.core.Tracer)
        and value.is_fully_addressable
    )


def _dtype(atom: Value | Constant) -> Any:
    return atom.dtype if isinstance(atom, Value) else jnp.result_type(atom.value)


def _number(atom: Value | Constant) -> Any:
    if isinstance(atom, Value) or size(atom.shape) != 1 or _unknown(atom.value):
        return None
    return np.asarray(atom.value).item()
