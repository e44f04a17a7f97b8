"""Equations that stand for others: sums of products, products of a few, short loops."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from hesscale_jax._jaxpr.program import CALLS, as_closed, called, scan_groups
from hesscale_jax._mesh import lying

__all__ = [
    "ENTRYWISE",
    "FEW",
    "IMAGES",
    "MOST_IN_ROW",
    "MOST_IN_TABLE",
    "MOVES_ENTRIES",
    "PRODUCTS",
    "REDUCES",
    "REDUCTIONS",
    "SCATTERS",
    "SHORT",
    "SMALL",
    "all_rows_at_once",
    "chooses",
    "convolved_by_parts",
    "count_entrywise",
    "free_axes",
    "maps_rows",
    "multiplied_and_summed",
    "multiplied_on",
    "multiplied_out",
    "rewritten_as",
    "scattered_apart",
    "selections_first",
    "summed_on_log_scale",
]


# Linear, entry by entry, in operands that move.
MOVES_ENTRIES = frozenset({"add", "add_any", "broadcast_in_dim", "convert_element_type", "copy"})
MOVES_ENTRIES |= {"div", "mul", "neg", "reduce_precision", "select_n", "sub"}

# What a loop's body is made of that is written out where the loop is short.
ENTRYWISE = MOVES_ENTRIES | {"abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2"}
ENTRYWISE |= {"atanh", "cbrt", "ceil", "clamp", "cos", "cosh", "custom_jvp_call", "eq", "erf"}
ENTRYWISE |= {"erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "le"}
ENTRYWISE |= {"lgamma", "log", "log1p", "logistic", "lt", "max", "min", "ne", "not", "or", "pow"}
ENTRYWISE |= {"rem", "reshape", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square"}
ENTRYWISE |= {"squeeze", "stop_gradient", "tan", "tanh", "xor", "is_finite"}
ENTRYWISE |= {"bitcast_convert_type", "shift_left", "shift_right_arithmetic", "shift_right_logical"}

# What a block is made of besides.
REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_sum"})

# What combines all entries along axes, and how it combines two of them.
REDUCES: dict[str, tuple[Any, Any]] = {
    "reduce_prod": (lax.mul, lax.reduce_prod),
    "reduce_sum": (lax.add, lax.reduce_sum),
}

# What selects some of a value's entries.
SELECTS = frozenset({"dynamic_slice", "gather", "slice"})

# What combines what is scattered with what is there, and what it leaves as it is.
SCATTERS: dict[str, tuple[Any, int]] = {
    "scatter-add": (lax.add, 0),
    "scatter-mul": (lax.mul, 1),
    "scatter-sub": (lax.add, 0),
}

# Linear in what moves: in several operands, but for the products.
PRODUCTS = frozenset({"conv_general_dilated", "div", "dot_general", "mul", "select_n"})
IMAGES = MOVES_ENTRIES | SELECTS | PRODUCTS
IMAGES |= {"concatenate", "cumsum", "expand_dims", "pad", "reduce_sum", "reshape", "rev"}
IMAGES |= {"scatter-add", "scatter-sub", "split", "squeeze", "stack", "transpose", "unstack"}

# The most equations that a loop is written out to, those without derivatives by the quarter.
SHORT = 512

# Products, and copies, of no more entries are written out.
FEW = 8

# Running sums on a log scale along no more entries are written out.
MOST_IN_ROW = 64

# Convolutions of two images, as bilinear forms of no more entries, are written out.
MOST_IN_TABLE = 2**14

# Matrices of no more entries are multiplied by entry by entry.
SMALL = 512


def chooses(closed: core.ClosedJaxpr) -> bool:
    """Whether a branch is chosen, by a number of the step's it may be."""
    return any(
        eqn.primitive.name == "cond" or (eqn.primitive.name in CALLS and chooses(called(eqn)))
        for eqn in closed.jaxpr.eqns
    )


def count_entrywise(closed: core.ClosedJaxpr, moving: set[Any], known: set[Any]) -> float:
    """The number of equations, infinite if one does not act entry by entry.

    One that nothing moving enters counts a quarter: it has no derivatives. A branch is chosen by
    what is known. What moves is added to ``moving``, what is known to ``known``.
    """
    count = 0.0
    for eqn in closed.jaxpr.eqns:
        literal = [isinstance(v, core.Literal) for v in eqn.invars]
        moves = [not x and v in moving for x, v in zip(literal, eqn.invars, strict=True)]
        knows = [x or v in known for x, v in zip(literal, eqn.invars, strict=True)]
        if eqn.primitive.name in CALLS:
            count += _count_in(called(eqn), moves, knows)
        elif eqn.primitive.name == "cond" and knows[0]:
            branches = map(as_closed, eqn.params["branches"])
            count += max(_count_in(branch, moves[1:], knows[1:]) for branch in branches)
        elif eqn.primitive.name in ENTRYWISE | REDUCTIONS:
            count += 1 if any(moves) else 0.25
        else:
            return math.inf
        if any(moves):
            moving.update(eqn.outvars)
        elif all(knows):
            known.update(eqn.outvars)
    return count


def _count_in(closed: core.ClosedJaxpr, moves: Sequence[bool], knows: Sequence[bool]) -> float:
    moving, known = (set(itertools.compress(closed.jaxpr.invars, f)) for f in (moves, knows))
    return count_entrywise(closed, moving, known)


def rewritten_as(eqn: Any) -> Callable[..., Any] | None:
    """An equation that moves entries alone, as simpler ones, each of one operand."""
    if eqn.primitive.name == "reshape" and (order := eqn.params["dimensions"]) is not None:
        shape, sharding = eqn.params["new_sizes"], eqn.params["sharding"]
        return lambda x: lax.reshape(lax.transpose(x, order), shape, out_sharding=sharding)
    if eqn.primitive.name == "stack" and len(eqn.invars) == 1:
        return lambda x: lax.reshape(x, eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "transpose":
        shape = eqn.invars[0].aval.shape
        long = [i for i in eqn.params["permutation"] if shape[i] != 1]
        views = long == sorted(long)
        return (lambda x: lax.reshape(x, eqn.outvars[0].aval.shape)) if views else None
    if eqn.primitive.name not in ("device_put", "optimization_barrier") or len(eqn.invars) == 1:
        return None
    lists = {k: v for k, v in eqn.params.items() if isinstance(v, list | tuple)}
    each = [{k: type(v)([v[i]]) for k, v in lists.items()} for i in range(len(eqn.invars))]
    bind = eqn.primitive.bind
    return lambda *xs: [
        bind(x, **{**eqn.params, **own})[0] for x, own in zip(xs, each, strict=True)
    ]


def maps_rows(eqn: Any) -> bool:
    """Whether a loop carries nothing, and its steps do no more than what a block is made of."""
    carries = bool(scan_groups(eqn)[1])
    return not (carries or eqn.effects) and _fits_blocks(as_closed(eqn.params["jaxpr"]))


def _fits_blocks(closed: core.ClosedJaxpr) -> bool:
    return all(
        _fits_blocks(called(eqn))
        if eqn.primitive.name in CALLS
        else eqn.primitive.name in ENTRYWISE | REDUCTIONS
        for eqn in closed.jaxpr.eqns
    )


def all_rows_at_once(eqn: Any) -> Callable[..., Any]:
    """The steps of a loop that carries nothing, as one."""
    consts, _, xs = scan_groups(eqn)
    step = core.jaxpr_as_fun(as_closed(eqn.params["jaxpr"]))
    return jax.vmap(step, [None] * len(consts) + [0] * len(xs), axis_size=eqn.params["length"])


def selections_first(eqn: Any, moving: Sequence[bool]) -> Callable[..., Any] | None:
    """A loop that is given what each of its steps selects of operands, some of them ``moving``.

    Other functions of what moves stay in the loop: its block knows how they vary together.

    Returns:
      What selects it before the loop; ``None`` if each step selects nothing alike that moves.
    """
    closed = as_closed(eqn.params["jaxpr"])
    consts, carry, _ = scan_groups(eqn)
    inputs = closed.jaxpr.invars
    same = {*closed.jaxpr.constvars, *(inputs[i] for i in consts)}
    moves = {inputs[i] for i in consts if moving[i]}
    alike, rest = [], []
    for e in closed.jaxpr.eqns:
        operands = [v for v in e.invars if not isinstance(v, core.Literal)]
        alone = e.effects or not operands or not same.issuperset(operands)
        varies = not moves.isdisjoint(operands)
        if alone or (varies and e.primitive.name not in SELECTS):
            rest.append(e)
            continue
        alike.append(e)
        same.update(e.outvars)
        if varies:
            moves.update(e.outvars)
    reads = itertools.chain(closed.jaxpr.outvars, *(e.invars for e in rest))
    read = {v for v in reads if not isinstance(v, core.Literal)}
    made = [v for e in alike for v in e.outvars if v in read]
    if moves.isdisjoint(made):
        return None

    fixed = [i for i in consts if inputs[i] in read]
    names = closed.jaxpr.debug_info.with_unknown_names()

    def part(inputs: Sequence[Any], outputs: Sequence[Any], eqns: Sequence[Any]) -> Any:
        jaxpr = core.Jaxpr(closed.jaxpr.constvars, inputs, outputs, eqns, debug_info=names)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))

    before = part([inputs[i] for i in consts], made, alike)
    arguments = [*made, *(inputs[i] for i in fixed), *inputs[len(consts) :]]
    step = part(arguments, closed.jaxpr.outvars, rest)

    def looped(*operands: Any) -> list[Any]:
        given = [*before(*operands[: len(consts)]), *(operands[i] for i in fixed)]

        def body(carried: Sequence[Any], rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            results = step(*given, *carried, *rows)
            return results[: len(carry)], results[len(carry) :]

        start, rows = operands[len(consts) :][: len(carry)], operands[len(consts) + len(carry) :]
        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        ends, stacked = lax.scan(body, list(start), list(rows), **options)
        return [*ends, *stacked]

    return looped


def free_axes(eqn: Any) -> list[list[int]]:
    """The axes of each factor of a ``dot_general`` that it neither sums over nor runs over."""
    sides = zip(*eqn.params["dimension_numbers"], strict=True)
    return [
        [i for i in range(len(v.aval.shape)) if i not in (*summed, *batch)]
        for v, (summed, batch) in zip(eqn.invars, sides, strict=True)
    ]


def multiplied_and_summed(eqn: Any) -> Callable[[Any, Any], Any]:
    """A ``dot_general`` of which one factor has no free axes but of size 1: entry by entry."""
    result, free = eqn.outvars[0].aval, free_axes(eqn)
    sides = list(zip(*eqn.params["dimension_numbers"], strict=True))
    wide = 0 if all(eqn.invars[1].aval.shape[i] == 1 for i in free[1]) else 1
    (summed, batch), others = sides[wide], [*itertools.chain(*sides[1 - wide])]
    partner = dict(zip((*summed, *batch), others, strict=True))

    def multiply_and_sum(lhs: Any, rhs: Any) -> Any:
        x, y = (lhs, rhs) if wide == 0 else (rhs, lhs)
        x, y = (
            lax.convert_element_type(z, result.dtype) if z.dtype != result.dtype else z
            for z in (x, y)
        )
        y = _transpose(y, [*(partner[i] for i in sorted(partner)), *free[1 - wide]])
        y = lax.squeeze(y, range(len(partner), y.ndim)) if free[1 - wide] else y
        if y.shape != x.shape:
            y = lax.broadcast_in_dim(y, x.shape, sorted(partner))
        rows = lax.reduce_sum(lax.mul(x, lying(y, jax.typeof(x))), tuple(summed))
        kept = [i for i in range(x.ndim) if i not in summed]
        rows = _transpose(rows, [kept.index(i) for i in (*batch, *free[wide])])
        rows = lax.reshape(rows, result.shape) if rows.shape != result.shape else rows
        return lying(rows, result)

    return multiply_and_sum


def multiplied_out(eqn: Any) -> Callable[[Any], Any]:
    """A product of entries, one after the other."""
    axes = eqn.params["axes"]

    def multiply(x: Any) -> Any:
        rest = [i for i in range(x.ndim) if i not in axes]
        count = math.prod(x.shape[i] for i in axes)
        rows = lax.reshape(_transpose(x, [*axes, *rest]), (count, *(x.shape[i] for i in rest)))
        return functools.reduce(
            lax.mul, (lax.index_in_dim(rows, i, 0, False) for i in range(count))
        )

    return multiply


def multiplied_on(eqn: Any) -> Callable[[Any], Any]:
    """A running product, one entry after the other."""
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]

    def multiply(x: Any) -> Any:
        rows = [lax.slice_in_dim(x, i, i + 1, axis=axis) for i in range(x.shape[axis])]
        products = list(itertools.accumulate(reversed(rows) if reverse else rows, lax.mul))
        return lax.concatenate(products[::-1] if reverse else products, axis)

    return multiply


def summed_on_log_scale(eqn: Any) -> Callable[[Any], Any]:
    """A running sum of exponentials, each sum of its own."""
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]

    def log_sums(x: Any) -> Any:
        n = x.shape[axis]
        up_to = np.triu(np.ones((n, n), bool)) if reverse else np.tril(np.ones((n, n), bool))
        up_to = up_to.reshape([n if i in (axis, axis + 1) else 1 for i in range(x.ndim + 1)])
        rows = jnp.where(up_to, jnp.expand_dims(x, axis), -np.inf)
        return jax.nn.logsumexp(rows, axis + 1)

    return log_sums


def convolved_by_parts(eqn: Any) -> Callable[[Any, Any], Any]:
    """A convolution of two operands as two products, the first with a constant array."""

    def convolve(lhs: Any, rhs: Any) -> Any:
        units = [jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape) for x in (lhs, rhs)]
        bind = functools.partial(eqn.primitive.bind, **eqn.params)
        table = jax.vmap(lambda a: jax.vmap(lambda b: bind(a, b).ravel())(units[1]))(units[0])
        of_rhs = jnp.tensordot(lhs.ravel(), table, 1)
        result = eqn.outvars[0].aval
        return (rhs.ravel() @ of_rhs).reshape(result.shape).astype(result.dtype)

    return convolve


def scattered_apart(eqn: Any) -> Callable[..., Any]:
    """A scatter to what has no effect, and then its effect on what was there, entry by entry."""
    combine, neutral = SCATTERS[eqn.primitive.name]

    def apart(x: Any, *others: Any) -> Any:
        alone = eqn.primitive.bind(lax.full_like(x, neutral), *others, **eqn.params)
        return combine(x, alone)

    return apart


def _transpose(x: Any, permutation: list[int]) -> Any:
    return x if permutation == sorted(permutation) else lax.transpose(x, permutation)
