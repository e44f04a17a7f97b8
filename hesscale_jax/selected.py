"""What selections make of linear images: forms at other positions, side by side, added up.

For each primitive, a function of its equation and the forms of its operands, ``None`` for those of
operands that do not move. It gives the forms of the results, or ``None`` if there are none.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, is_inexact
from hesscale_jax.arrays import Factor, combined, known, of_atom
from hesscale_jax.forms import Form
from hesscale_jax.rules.selection import extremum
from hesscale_jax.terms import Term, side_by_side

__all__ = ["SELECTIONS"]


def _shape(eqn: Equation) -> tuple[int, ...]:
    return tuple(eqn.outputs[0].shape)


def _broadcast(eqn: Equation, x: Form, *_: Any) -> list[Form]:
    return [x.placed(_shape(eqn), eqn.params["broadcast_dimensions"])]


def _reshape(eqn: Equation, x: Form, *_: Any) -> list[Form]:
    return [x.reshaped(_shape(eqn))]


def _transpose(eqn: Equation, x: Form) -> list[Form]:
    return [x.transposed(eqn.params["permutation"])]


def _along(x: Form, dim: int, index: Any) -> Form:
    """At positions along one axis."""
    index = index if isinstance(index, Factor) else known(np.asarray(index))
    order = [*range(1, dim + 1), 0, *range(dim + 1, len(x.shape))]
    return x.taken([dim], [index]).transposed(order)


def _slice(eqn: Equation, x: Form) -> list[Form]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    for dim, bounds in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        if bounds != (0, x.shape[dim], 1):
            x = _along(x, dim, np.arange(*bounds))
    return [x]


def _rev(eqn: Equation, x: Form) -> list[Form]:
    for dim in eqn.params["dimensions"]:
        x = _along(x, dim, np.arange(x.shape[dim])[::-1])
    return [x]


def _pad(eqn: Equation, x: Form | None, value: Form | None) -> list[Form] | None:
    if x is None or value is not None:
        return None
    for dim, (low, _, inner) in enumerate(eqn.params["padding_config"]):
        n, size = x.shape[dim], _shape(eqn)[dim]
        at = np.arange(size) - low
        index = np.where((at >= 0) & (at % (inner + 1) == 0), at // (inner + 1), -1)
        index = np.where(index < n, index, -1)
        if size != n or not np.array_equal(index, np.arange(n)):
            x = _along(x, dim, index)
    return [x]


def _concatenate(eqn: Equation, *parts: Form | None) -> list[Form]:
    dim, shape = eqn.params["dimension"], _shape(eqn)
    sizes = [v.shape[dim] for v in eqn.inputs]
    of = [{} if part is None else part.of for part in parts]
    joined, start = dict[Any, tuple[Term, ...]](), 0
    for source in of[0]:
        terms = [each.get(source, ()) for each in of]
        if all(len(each) == 1 for each in terms):
            term = side_by_side([term for (term,) in terms], dim, sizes)
            joined |= {source: (term,)} if term else {}
    y = Form(shape, joined)
    for part, n in zip(parts, sizes, strict=True):
        at = np.arange(shape[dim]) - start
        start += n
        if part is not None and n:
            rest = Form(part.shape, {x: t for x, t in part.of.items() if x not in joined})
            y = y.plus(_along(rest, dim, np.where((at >= 0) & (at < n), at, -1)))
    return [y]


def _stack(eqn: Equation, *parts: Form | None) -> list[Form]:
    dim, shape = eqn.params["axis"], _shape(eqn)
    at = [i for i in range(len(shape)) if i != dim]
    y = Form(shape, {})
    for k, part in enumerate(parts):
        if part is not None:
            here = np.arange(shape[dim]) == k
            by = known(here.reshape([n if i == dim else 1 for i, n in enumerate(shape)]))
            y = y.plus(part.placed(shape, at).times(by, gate=by))
    return [y]


def _split(eqn: Equation, x: Form) -> list[Form]:
    dim = eqn.params["axis"]
    sizes = eqn.params["sizes"]
    starts = [0, *itertools.accumulate(sizes)]
    return [_along(x, dim, np.arange(s, s + n)) for s, n in zip(starts, sizes, strict=False)]


def _unstack(eqn: Equation, x: Form) -> list[Form]:
    dim = eqn.params["axis"]
    return [
        _along(x, dim, np.array([k])).reshaped(tuple(v.shape)) for k, v in enumerate(eqn.outputs)
    ]


def _dynamic_slice(eqn: Equation, x: Form | None, *starts: Any) -> list[Form] | None:
    if x is None:
        return None
    for dim, (n, atom) in enumerate(zip(_shape(eqn), eqn.inputs[1:], strict=True)):
        size = x.shape[dim]
        if n != size:
            index = combined(
                lambda s, n=n, size=size: s.astype(int).clip(0, size - n) + np.arange(n),
                (n,),
                of_atom(atom),
            )
            x = _along(x, dim, dataclasses.replace(index, within=True))
    return [x]


def _reduce_sum(eqn: Equation, x: Form) -> list[Form]:
    return [x.summed(eqn.params["axes"]).reshaped(_shape(eqn))]


def _reduce_extremum(eqn: Equation, x: Form) -> list[Form]:
    (operand,), (y,) = eqn.inputs, eqn.outputs

    def taken(x: Any, y: Any) -> Any:
        return extremum.weights(eqn, [x], y)

    by = combined(taken, x.shape, of_atom(operand), of_atom(y))
    return [x.through(by).summed(eqn.params["axes"]).reshaped(_shape(eqn))]


def _psum(eqn: Equation, x: Form, *others: Form | None) -> list[Form] | None:
    axes = eqn.params["axes"]
    if others or not all(isinstance(axis, int) for axis in axes):
        return None
    return [x.summed(axes).reshaped(_shape(eqn))]


def _cumsum(eqn: Equation, x: Form) -> list[Form]:
    dim, rank = eqn.params["axis"], len(x.shape)
    n = x.shape[dim]
    taken_in = np.tri(n, dtype=bool)  # a row for each result
    taken_in = taken_in.T if eqn.params["reverse"] else taken_in
    shape = (*x.shape[:dim], n, *x.shape[dim:])
    apart = x.placed(shape, [i if i < dim else i + 1 for i in range(rank)])
    weights = known(taken_in.reshape([n if i in (dim, dim + 1) else 1 for i in range(rank + 1)]))
    return [apart.times(weights).summed([dim + 1]).reshaped(_shape(eqn))]


def _gather(eqn: Equation, x: Form | None, *_: Any) -> list[Form] | None:
    if x is None:
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indices, mode = of_atom(eqn.inputs[1]), eqn.params["mode"]
    if indices.static is not None and mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        mode = lax.GatherScatterMode.CLIP  # what XLA does, and NumPy does not
    drops = mode == lax.GatherScatterMode.FILL_OR_DROP
    # Clipped, what is taken whole starts at 0.
    columns = {
        dim: k
        for k, dim in enumerate(numbers.start_index_map)
        if drops or sizes[dim] == 1 or sizes[dim] != x.shape[dim]
    }
    dims = [*columns, *numbers.operand_batching_dims]
    rest = [i for i in range(len(x.shape)) if i not in dims]
    if not dims or any(sizes[i] != x.shape[i] for i in rest):
        return None
    lead = indices.shape[:-1]
    wide = {dim: sizes[dim] for dim in columns if sizes[dim] != 1}  # of more entries than one
    at = [
        _window(_position(indices, k, x.shape[dim], mode, sizes[dim]), wide, dim)
        for dim, k in columns.items()
    ]
    at += [_window(_counted(lead, i), wide, None) for i in numbers.start_indices_batching_dims]
    after = [*wide, *rest]
    order = [*range(len(lead)), *(len(lead) + after.index(i) for i in sorted(after))]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [n for i, n in enumerate(sizes) if i not in dropped]
    y = x.taken(dims, at).transposed(order).reshaped((*lead, *kept))
    of_rest = iter(range(len(lead), len(y.shape)))
    of_lead = iter(range(len(lead)))
    order = [
        next(of_rest) if i in numbers.offset_dims else next(of_lead) for i in range(len(y.shape))
    ]
    return [y.transposed(order)]


def _position(indices: Factor, k: int, size: int, mode: Any, count: int = 1) -> Factor:
    """The positions along an axis that one of the columns says, -1 where there is none.

    Of so many entries, it is that of the first.
    """

    def pick(i: Any) -> Any:
        i = i[..., k].astype(int)
        if mode == lax.GatherScatterMode.CLIP:
            return i.clip(0, size - count)
        if mode == lax.GatherScatterMode.PROMISE_IN_BOUNDS:
            return i
        return _where((i >= 0) & (i <= size - count), i, -1)

    position = indices.mapped(pick, indices.shape[:-1])
    bounded = mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return dataclasses.replace(position, within=bounded)


def _window(first: Factor, sizes: Mapping[int, int], dim: int | None) -> Factor:
    """Positions with an axis for each of the windows, counted along that of one of them."""
    if not sizes:
        return first
    shape = tuple(sizes.values())
    along = np.zeros(shape, int)
    if dim is not None and dim in sizes:
        along = _counts(shape, list(sizes).index(dim))

    def each(i: Any) -> Any:
        i = i.reshape((*i.shape, *(1,) * len(shape)))
        return _where(i >= 0, i + along, -1)

    window = first.mapped(each, (*first.shape, *shape))
    return dataclasses.replace(window, within=first.within)


def _counted(shape: Sequence[int], dim: int) -> Factor:
    """The positions along one axis of a shape."""
    return known(_counts(shape, dim))


def _counts(shape: Sequence[int], dim: int) -> np.ndarray:
    counts = np.arange(shape[dim]).reshape([n if i == dim else 1 for i, n in enumerate(shape)])
    return np.broadcast_to(counts, shape)


def _where(condition: Any, x: Any, y: Any) -> Any:
    known_now = isinstance(condition, np.ndarray | np.generic)
    return (np if known_now else jnp).where(condition, x, y)


def _scatter_add(eqn: Equation, x: Form | None, _: None, u: Form | None) -> list[Form] | None:
    y = x or Form(_shape(eqn), {})
    if u is None:
        return [y]
    image = _scattered(eqn, u)
    return None if image is None else [y.plus(image, -1.0 if eqn.name == "scatter-sub" else 1.0)]


def _scattered(eqn: Equation, u: Form) -> Form | None:
    """Zeros to which updates are added."""
    shape, numbers = _shape(eqn), eqn.params["dimension_numbers"]
    inserted, batching = numbers.inserted_window_dims, numbers.operand_batching_dims
    columns, mode = numbers.scatter_dims_to_operand_dims, eqn.params["mode"]
    dims, indices = [*columns, *batching], of_atom(eqn.inputs[1])
    lead = indices.shape[:-1]
    window = [i for i in range(len(shape)) if i not in (*inserted, *batching)]
    sizes = [u.shape[i] for i in numbers.update_window_dims]
    if math.prod(lead) == 1 and not batching:
        image = u.reshaped(
            [sizes[window.index(i)] if i in window else 1 for i in range(len(shape))]
        )
        for k, dim in enumerate(columns):
            image = _along(image, dim, _within(indices, k, image.shape[dim], shape[dim], mode))
    elif sorted(dims) == sorted((*inserted, *batching)) and sizes == [shape[i] for i in window]:
        across = [shape[i] for i in dims]
        at = [_position(indices, k, shape[dim], mode) for k, dim in enumerate(columns)]
        at += [_counted(lead, i) for i in numbers.scatter_indices_batching_dims]
        ids = combined(functools.partial(_flat, sizes=across), (math.prod(lead),), *at)
        first = [i for i in range(len(u.shape)) if i not in numbers.update_window_dims]
        rows = u.transposed([*first, *numbers.update_window_dims]).reshaped((*ids.shape, *sizes))
        image = rows.summed_by(ids, math.prod(across)).reshaped((*across, *sizes))
        image = image.transposed(list(map([*dims, *window].index, range(len(shape)))))
    else:
        return None
    return image


def _within(indices: Factor, k: int, n: int, size: int, mode: Any) -> Factor:
    """Which of ``n`` entries is at each position along an axis; one of the columns says where."""

    def place(i: Any) -> Any:
        start = i[..., k].astype(int).reshape(())
        if mode == lax.GatherScatterMode.CLIP:
            start = start.clip(0, size - n)
        at = np.arange(size) - start
        return _where((at >= 0) & (at < n) & (start >= 0) & (start <= size - n), at, -1)

    return indices.mapped(place, (size,))


def _flat(*at: Any, sizes: Sequence[int]) -> Any:
    """Positions along several axes as one, out of bounds where there is none."""
    there = functools.reduce(jnp.logical_and, (jnp.asarray(i) >= 0 for i in at))
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    ids = sum(stride * jnp.asarray(i) for stride, i in zip(strides, at, strict=True))
    return jnp.where(there, ids, math.prod(sizes)).ravel()


def _set(eqn: Equation, x: Form | None, *others: Form | None) -> list[Form] | None:
    """``x.at[indices].set(u)``: ``x`` with zeros where it is written to, and ``u`` there."""
    y = Form(_shape(eqn), {})
    if x is not None:
        kept = _kept(eqn)
        y = x.times(kept, gate=kept)
    u = next(filter(None, others), None)
    if u is not None:
        image = _updated(eqn, u) if eqn.name == "dynamic_update_slice" else _set_once(eqn, u)
        if image is None:
            return None
        y = y.plus(image)
    return [y]


def _kept(eqn: Equation) -> Factor:
    """One where nothing is written to, else zero."""
    x, *rest = eqn.inputs[0], *(v if is_inexact(v) else None for v in eqn.inputs[1:])
    indices = [of_atom(v) for v, number in zip(eqn.inputs[1:], rest, strict=True) if number is None]

    def kept(*indices: Any) -> Any:
        given = iter(indices)
        others = [next(given) if v is None else jnp.zeros(v.shape, v.dtype) for v in rest]
        return _jaxpr.bind(eqn, jnp.ones(x.shape, x.dtype), *others)

    return combined(kept, _shape(eqn), *indices)


def _updated(eqn: Equation, u: Form) -> Form:
    """Zeros but for the window that is written to."""
    for k, (n, size) in enumerate(zip(u.shape, _shape(eqn), strict=True)):
        start = of_atom(eqn.inputs[2 + k]).reshaped((1,))
        u = _along(u, k, _within(start, 0, n, size, lax.GatherScatterMode.CLIP))
    return u


def _set_once(eqn: Equation, u: Form) -> Form | None:
    """Zeros in which updates are written to places that differ."""
    at = of_atom(eqn.inputs[1])
    once = eqn.params["unique_indices"] or math.prod(at.shape[:-1]) == 1
    if not once and at.static is not None and eqn.params["mode"] != lax.GatherScatterMode.CLIP:
        rows = at.static.reshape(-1, at.shape[-1])
        once = len(np.unique(rows, axis=0)) == len(rows)
    return _scattered(eqn, u) if once else None


def _sort(eqn: Equation, *operands: Form | None) -> list[Form]:
    shape, p = _shape(eqn), eqn.params

    def order(*arrays: Any) -> Any:
        at = lax.broadcasted_iota("int32", shape, p["dimension"])
        return lax.sort((*arrays, at), p["dimension"], p["is_stable"], p["num_keys"])[-1]

    index = combined(order, shape, *map(of_atom, eqn.inputs))
    empty = Form(shape, {})
    return [_in_order(x or empty, p["dimension"], index) for x in operands]


def _top_k(eqn: Equation, x: Form) -> list[Form]:
    return [_in_order(x, eqn.params.get("axis", -1) % len(x.shape), of_atom(eqn.outputs[1]))]


def _in_order(x: Form, dim: int, index: Factor) -> Form:
    """At positions along one axis, which differ along the others."""
    axes, index = range(len(x.shape)), dataclasses.replace(index, within=True)
    return x.taken(axes, [index if i == dim else _counted(index.shape, i) for i in axes])


def _tile(eqn: Equation, x: Form) -> list[Form]:
    for dim, (n, size) in enumerate(zip(x.shape, _shape(eqn), strict=True)):
        if size != n:
            x = _along(x, dim, np.arange(size) % n)
    return [x]


SELECTIONS: dict[str, Callable[..., list[Form] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cumsum": _cumsum,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _set,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "psum": _psum,
    "reduce_max": _reduce_extremum,
    "reduce_min": _reduce_extremum,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "rev": _rev,
    "scatter": _set,
    "scatter-add": _scatter_add,
    "scatter-sub": _scatter_add,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
