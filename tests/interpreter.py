"""Jaxprs by NumPy, equation by equation: nothing is compiled, so that many programs can be checked.

:func:`evaluate` computes what a jaxpr does. :func:`expand` also computes ``y'`` and ``y''`` of
``y(t)``, where each input is ``x + x' t + x'' t^2 / 2``, in several directions at once: they lie
along the last axis of ``x'`` and ``x''``. A primitive of which nothing is known here is run, or
differentiated, by JAX.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax
from jax.extend import core

from hesscale_jax import _jaxpr

Array = Any


class Series(NamedTuple):
    """A value with its first and second derivatives, ``None`` where they are zero."""

    x: Array
    d: Array = None
    dd: Array = None

    @property
    def moves(self) -> bool:
        return self.d is not None or self.dd is not None


def array(x: Any) -> Array:
    """In NumPy, which has no random keys."""
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return x if is_key else np.asarray(x)


class Cell:
    """What a mutable array holds."""

    def __init__(self, value: Any) -> None:
        self.value = value


def evaluate(closed: core.ClosedJaxpr, *args: Array) -> list[Array]:
    """The results of a jaxpr."""
    with np.errstate(all="ignore"):
        return Numbers().run(closed, list(map(array, args)))


def traced(fun: Callable[..., Any], *args: Any) -> Any:
    """What ``fun`` returns, by its jaxpr."""
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    results = evaluate(closed, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def expand(closed: core.ClosedJaxpr, args: Sequence[Series]) -> list[Series]:
    """The results of a jaxpr and their derivatives."""
    with np.errstate(all="ignore"):
        return Expansions().run(closed, args)


def basis(xs: Sequence[Array]) -> list[Series]:
    """One direction for each entry of all the arrays, without second derivatives."""
    ends = list(itertools.accumulate((x.size for x in xs), initial=0))
    pieces = (np.eye(ends[-1])[lo:hi] for lo, hi in itertools.pairwise(ends))
    return [
        Series(x, rows.reshape(*x.shape, -1).astype(x.dtype))
        for x, rows in zip(xs, pieces, strict=True)
    ]


class Interpreter:
    """What runs equations, of a jaxpr or of a ``Program``, on values of one kind."""

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        env.update((v, self.constant(x)) for v, x in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> Any:
            return self.constant(_jaxpr.literal(atom)) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.apply(eqn, list(map(read, eqn.invars))), strict=True))
        return list(map(read, jaxpr.outvars))

    def apply(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of an equation."""
        inside = STRUCTURED.get(eqn.primitive.name)
        return inside(self, eqn, operands) if inside else self.operation(eqn, operands)

    # What differs between the kinds

    def operation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of a primitive that runs no other jaxpr."""
        raise NotImplementedError

    def constant(self, x: Array) -> Any:
        raise NotImplementedError

    def number(self, value: Any) -> Array:
        """Without derivatives."""
        raise NotImplementedError

    def at(self, value: Any, t: int) -> Any:
        """The slice for a step of a loop."""
        raise NotImplementedError

    def stacked(self, values: Sequence[Any], aval: Any) -> Any:
        """What a loop returns, where ``values`` are those of its steps."""
        raise NotImplementedError


class Numbers(Interpreter):
    """Values are arrays."""

    def operation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        by_numpy = OPERATIONS.get(eqn.primitive.name)
        results = by_numpy(*operands, **eqn.params) if by_numpy else NotImplemented
        if results is NotImplemented:
            results = _jaxpr.bind(eqn, *operands)
        found = [array(y) for y in (results if isinstance(results, list) else [results])]
        for y, v in zip(found, outputs(eqn), strict=True):
            assert (y.shape, y.dtype) == (v.aval.shape, v.aval.dtype), f"{eqn.primitive}: {y!r}"
        return found

    def constant(self, x: Array) -> Array:
        return array(x)

    def number(self, value: Array) -> Array:
        return value

    def at(self, value: Array, t: int) -> Array:
        return value[t]

    def stacked(self, values: Sequence[Array], aval: Any) -> Array:
        return np.stack(values) if values else np.zeros(aval.shape, aval.dtype)


def outputs(eqn: Any) -> Sequence[Any]:
    return eqn.outputs if isinstance(eqn, _jaxpr.Equation) else eqn.outvars


class Expansions(Interpreter):
    """Values are :class:`Series`."""

    def operation(self, eqn: Any, operands: list[Series]) -> list[Series]:
        name, x = eqn.primitive.name, operands[0] if operands else None
        results = Numbers().operation(eqn, [x.x for x in operands])
        moves = any(x.moves for x in operands) and name not in STILL
        if not (moves and jnp.issubdtype(results[0].dtype, jnp.inexact)):
            return list(map(Series, results))
        if name in LINEAR:
            return linear(eqn, operands, results)
        y = results[0]
        if name in UNARY and y.dtype == x.x.dtype:
            return [chained(x, y, *UNARY[name](x.x, y))]
        if name == "integer_pow":
            return [chained(x, y, *slopes_of_power(x.x, **eqn.params))]
        if name in BINARY:
            return [BINARY[name](eqn, *operands, y)]
        return by_jvp(eqn, operands)

    def constant(self, x: Array) -> Series:
        return Series(array(x))

    def number(self, value: Series) -> Array:
        return value.x

    def at(self, value: Series, t: int) -> Series:
        return Series(*(None if part is None else part[t] for part in value))

    def stacked(self, values: Sequence[Series], aval: Any) -> Series:
        x = Numbers().stacked([y.x for y in values], aval)
        return Series(x, *(joined(np.stack, values, k) for k in (1, 2)))


# What runs other jaxprs, or has a state


def call(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    return interpreter.run(_jaxpr.called(eqn), operands)


def dead(interpreter: Interpreter, eqn: Any, _: list[Any]) -> list[Any]:
    """What ``jax.grad`` leaves of a ``custom_vjp`` in ``jax.checkpoint`` if nothing reads it."""
    return [interpreter.constant(np.full(v.aval.shape, np.nan)) for v in eqn.outvars]


def custom(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    """A function with a derivative rule of its own."""
    if any(isinstance(x, Series) and x.moves for x in operands):
        return by_jvp(eqn, operands)
    return call(interpreter, eqn, operands)


def solve(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    if any(isinstance(x, Series) and x.moves for x in operands):
        return by_jvp(eqn, operands)
    lengths = eqn.params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    consts = operands[before : before + lengths.solve]
    return interpreter.run(eqn.params["jaxprs"].solve, [*consts, *operands[sum(lengths) :]])


def scan(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    return scanned(
        interpreter, eqn, operands, functools.partial(interpreter.run, eqn.params["jaxpr"])
    )


def scanned(
    interpreter: Interpreter, eqn: Any, operands: list[Any], step: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """A loop, by the function of a step."""
    consts, carry, xs = ([operands[i] for i in group] for group in _jaxpr.scan_groups(eqn))
    count, length = len(carry), eqn.params["length"]
    steps: list[list[Any]] = [[]] * length
    for t in reversed(range(length)) if eqn.params["reverse"] else range(length):
        read = [*consts, *carry, *(interpreter.at(x, t) for x in xs)]
        results = step(read)
        carry, steps[t] = results[:count], results[count:]
    ys = (
        interpreter.stacked([step[i] for step in steps], v.aval)
        for i, v in enumerate(outputs(eqn)[count:])
    )
    return [*carry, *ys]


def while_loop(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, consts = operands[:of_test], operands[of_test : of_test + of_body]
    carry = operands[of_test + of_body :]
    while interpreter.number(interpreter.run(eqn.params["cond_jaxpr"], [*tested, *carry])[0]):
        carry = interpreter.run(eqn.params["body_jaxpr"], [*consts, *carry])
    return carry


def cond(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    branches = eqn.params["branches"]
    which = np.clip(int(interpreter.number(operands[0])), 0, len(branches) - 1)
    return interpreter.run(branches[which], operands[1:])


def new_cell(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    return [Cell(*operands)]


def get(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    return [whole(eqn, operands).value]


def swap(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    cell = whole(eqn, operands)
    before, cell.value = cell.value, operands[1]
    return [before]


def add_to_cell(interpreter: Interpreter, eqn: Any, operands: list[Any]) -> list[Any]:
    cell = whole(eqn, operands)
    cell.value = np.add(interpreter.number(cell.value), interpreter.number(operands[1]))
    return []


def whole(eqn: Any, operands: list[Any]) -> Cell:
    if eqn.params["tree"].num_leaves:
        raise NotImplementedError("parts of a mutable array")
    return operands[0]


STRUCTURED: dict[str, Callable[[Interpreter, Any, list[Any]], list[Any]]] = {
    "custom_lin": dead,
    **dict.fromkeys(_jaxpr.CALLS, call),
    **dict.fromkeys(_jaxpr.CUSTOM, custom),
    "addupdate": add_to_cell,
    "cond": cond,
    "custom_linear_solve": solve,
    "freeze": lambda interpreter, eqn, operands: [operands[0].value],
    "get": get,
    "new_ref": new_cell,
    "scan": scan,
    "swap": swap,
    "while": while_loop,
}


# Primitives on numbers


def broadcast(x: Array, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Array:
    kept = dict(zip(broadcast_dimensions, x.shape, strict=True))
    return np.broadcast_to(x.reshape([kept.get(i, 1) for i in range(len(shape))]), shape)


def iota(*, dtype: Any, shape: Any, dimension: int, **_: Any) -> Array:
    row = np.arange(shape[dimension], dtype=dtype)
    return broadcast(row, shape=shape, broadcast_dimensions=(dimension,))


def reshape(x: Array, *, new_sizes: Any, dimensions: Any, **_: Any) -> Array:
    return (x if dimensions is None else x.transpose(dimensions)).reshape(new_sizes)


def convert(x: Array, *, new_dtype: Any, **_: Any) -> Array:
    return (x if np.dtype(new_dtype).kind == "c" else np.real(x)).astype(new_dtype)


def integer_pow(x: Array, *, y: int) -> Array:
    power = np.power(x, abs(y))
    return power if y >= 0 else np.divide(1, power, dtype=x.dtype)


def dot_general(a: Array, b: Array, *, dimension_numbers: Any, **how: Any) -> Array:
    left, right, result = letters(dimension_numbers, a.ndim, b.ndim)
    dtype = how["preferred_element_type"] or a.dtype
    return einsum(f"{left},{right}->{result}", a, b, dtype).astype(dtype)


def einsum(formula: str, a: Array, b: Array, dtype: Any) -> Array:
    """In single precision at least."""
    wide = np.promote_types(dtype, np.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype
    return np.einsum(formula, a.astype(wide), b.astype(wide))


def letters(dimension_numbers: Any, a: int, b: int) -> tuple[str, str, str]:
    """A ``dot_general`` of operands of ranks ``a`` and ``b`` in the notation of ``einsum``."""
    (of_a, of_b), (batch_a, batch_b) = dimension_numbers
    names = iter("abcdefghijklmnopqrstuvwxy")
    left, right = dict.fromkeys(range(a), ""), dict.fromkeys(range(b), "")
    for i, j in zip((*batch_a, *of_a), (*batch_b, *of_b), strict=True):
        left[i] = right[j] = next(names)
    free = [(side, i) for side in (left, right) for i in side if not side[i]]
    for side, i in free:
        side[i] = next(names)
    result = [left[i] for i in batch_a] + [side[i] for side, i in free]
    return "".join(left.values()), "".join(right.values()), "".join(result)


def dynamic_slice(x: Array, *starts: Array, slice_sizes: Any) -> Array:
    return x[window(x.shape, starts, slice_sizes)]


def dynamic_update_slice(x: Array, update: Array, *starts: Array) -> Array:
    result = x.copy()
    result[window(x.shape, starts, update.shape)] = update
    return result


def window(shape: Any, starts: Iterable[Any], sizes: Any) -> tuple[slice, ...]:
    """A slice of an array, moved to be within its bounds."""
    inside = [max(0, min(int(at), n - m)) for at, n, m in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(at, at + m) for at, m in zip(inside, sizes, strict=True))


def pad(x: Array, value: Array, *, padding_config: Any) -> Array:
    if any(lo < 0 or hi < 0 for lo, hi, _ in padding_config):
        return NotImplemented
    filled = [n + max(n - 1, 0) * k for n, (*_, k) in zip(x.shape, padding_config, strict=True)]
    sides = [(lo, lo + n, hi, k + 1) for n, (lo, hi, k) in zip(filled, padding_config, strict=True)]
    result = np.full([end + hi for _, end, hi, _ in sides], value, x.dtype)
    result[tuple(slice(lo, end, step) for lo, end, _, step in sides)] = x
    return result


def cumulative(function: np.ufunc) -> Callable[..., Array]:
    def accumulate(x: Array, *, axis: int, reverse: bool) -> Array:
        turned = np.flip(x, axis) if reverse else x
        result = function.accumulate(turned, axis, x.dtype)
        return np.flip(result, axis) if reverse else result

    return accumulate


def sort(*xs: Array, dimension: int, num_keys: int, **_: Any) -> Any:
    if num_keys > 1:
        return NotImplemented
    order = np.argsort(xs[0], dimension, kind="stable")
    return [np.take_along_axis(x, order, dimension) for x in xs]


def gather(
    x: Array, indices: Array, *, dimension_numbers: Any, slice_sizes: Any, **how: Any
) -> Array:
    numbers, batch = dimension_numbers, indices.shape[:-1]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [n for i, n in enumerate(slice_sizes) if i not in gone]
    result = np.full((*batch, *kept), outside(x.dtype, how["fill_value"]), x.dtype)
    axes = numbers.start_index_map, numbers.operand_batching_dims
    for at, starts in places(x, indices, *axes, numbers.start_indices_batching_dims):
        if reads(how["mode"], starts, slice_sizes, x.shape):
            result[at] = x[window(x.shape, starts, slice_sizes)].reshape(kept)
    return np.moveaxis(result, range(len(batch), result.ndim), numbers.offset_dims)


def scatter(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def scattered(
        x: Array, indices: Array, updates: Array, *, dimension_numbers: Any, mode: Any, **_: Any
    ) -> Array:
        numbers, rank = dimension_numbers, indices.ndim - 1
        updates = np.moveaxis(updates, numbers.update_window_dims, range(rank, updates.ndim))
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        lengths = iter(updates.shape[rank:])
        sizes = [1 if i in gone else next(lengths) for i in range(x.ndim)]
        result = x.copy()
        axes = numbers.scatter_dims_to_operand_dims, numbers.operand_batching_dims
        for at, starts in places(x, indices, *axes, numbers.scatter_indices_batching_dims):
            if reads(mode, starts, sizes, x.shape):
                place = window(x.shape, starts, sizes)
                result[place] = function(result[place], updates[at].reshape(sizes))
        return result

    return scattered


def places(
    x: Array, indices: Array, axes: Any, batched: Any, batching: Any
) -> Iterable[tuple[Any, list[int]]]:
    """Where each slice of ``x`` starts, by position in ``indices``."""
    for at in np.ndindex(indices.shape[:-1]):
        starts = dict(zip(axes, map(int, indices[at]), strict=True))
        starts.update((i, at[j]) for i, j in zip(batched, batching, strict=True))
        yield at, [starts.get(i, 0) for i in range(x.ndim)]


def reads(mode: Any, starts: Any, sizes: Any, shape: Any) -> bool:
    """Whether a slice is looked at: some are not that reach beyond the bounds."""
    fits = (0 <= at <= n - m for at, m, n in zip(starts, sizes, shape, strict=True))
    return mode != lax.GatherScatterMode.FILL_OR_DROP or all(fits)


def outside(dtype: Any, fill: Any) -> Any:
    """What is read outside of an array."""
    if fill is not None:
        return fill
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    limits = None if dtype.kind == "b" else np.iinfo(dtype)
    return True if limits is None else limits.min if dtype.kind == "i" else limits.max


def reduce_precision(x: Array, *, exponent_bits: int, mantissa_bits: int) -> Array:
    known = jnp.finfo(x.dtype)
    return x if (known.nexp, known.nmant) == (exponent_bits, mantissa_bits) else NotImplemented


def bitcast(x: Array, *, new_dtype: Any) -> Array:
    return x.view(new_dtype) if x.dtype.itemsize == np.dtype(new_dtype).itemsize else NotImplemented


def special(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of SciPy, which knows the usual dtypes."""
    return lambda x: function(x.astype(float)).astype(x.dtype)


def elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *xs, **_: function(*xs)


def reduced(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, *, axes, **_: function(x, axis=tuple(axes))


def arg(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, *, axes, index_dtype: function(x, *axes).astype(index_dtype)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "complex": lambda x, y: x + 1j * y if x.dtype == float else NotImplemented,
    "conj": np.conj,
    "copy": np.asarray,
    "device_put": lambda x, **_: np.asarray(x),
    "copy_p": np.asarray,
    "cos": np.cos,
    "div": lambda x, y: x / y if jnp.issubdtype(x.dtype, jnp.inexact) else NotImplemented,
    "eq": np.equal,
    "erf": special(scipy.special.erf),
    "erf_inv": special(scipy.special.erfinv),
    "erfc": special(scipy.special.erfc),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "imag": np.imag,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "name": np.asarray,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "optimization_barrier": lambda *xs: list(xs),
    "or": np.bitwise_or,
    "pow": lambda x, y: np.power(x, y).astype(x.dtype),
    "real": np.real,
    "rem": np.fmod,
    "rsqrt": lambda x: np.divide(1, np.sqrt(x), dtype=x.dtype),
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": np.asarray,
    "sub": np.subtract,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: elementwise(function) for name, function in ELEMENTWISE.items()},
    "argmax": arg(np.argmax),
    "argmin": arg(np.argmin),
    "bitcast_convert_type": bitcast,
    "broadcast_in_dim": broadcast,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "convert_element_type": convert,
    "cumlogsumexp": cumulative(np.logaddexp),
    "cumprod": cumulative(np.multiply),
    "cumsum": cumulative(np.add),
    "dot_general": dot_general,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    "integer_pow": integer_pow,
    "iota": iota,
    "pad": pad,
    "reduce_and": reduced(np.all),
    "reduce_max": reduced(np.max),
    "reduce_min": reduced(np.min),
    "reduce_or": reduced(np.any),
    "reduce_precision": reduce_precision,
    "reduce_prod": reduced(np.prod),
    "reduce_sum": lambda x, *, axes, **_: np.sum(x, tuple(axes), x.dtype),
    "reshape": reshape,
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "scatter": scatter(lambda x, update: update),
    "scatter-add": scatter(np.add),
    "scatter-mul": scatter(np.multiply),
    "slice": lambda x, *, start_indices, limit_indices, strides: x[
        tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))
    ],
    "sort": sort,
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "stack": lambda *xs, axis: np.stack(xs, axis),
    "tile": lambda x, *, reps: np.tile(x, reps),
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "unstack": lambda x, *, axis: list(np.moveaxis(x, axis, 0)),
}


# Primitives on series

# Derivatives are 0, or there are none.
STILL = {"ceil", "floor", "round", "sign", "stop_gradient"}

Params = dict[str, Any]


def longer_gather(params: Params, of_x: int, of_y: int, count: int) -> Params:
    numbers = params["dimension_numbers"]
    return params | {
        "dimension_numbers": numbers._replace(offset_dims=(*numbers.offset_dims, of_y)),
        "slice_sizes": (*params["slice_sizes"], count),
        "fill_value": 0,
    }


def longer_reshape(params: Params, of_x: int, of_y: int, count: int) -> Params:
    order = params["dimensions"]
    sizes = (*params["new_sizes"], count)
    return {"new_sizes": sizes, "dimensions": order and (*order, of_x)}


def longer_slice(params: Params, of_x: int, of_y: int, count: int) -> Params:
    return {
        "start_indices": (*params["start_indices"], 0),
        "limit_indices": (*params["limit_indices"], count),
        "strides": params["strides"] and (*params["strides"], 1),
    }


# Linear in all operands together, with the parameters for one more axis at the end, of length
# ``count``, where the operand and the result had ranks ``of_x`` and ``of_y``.
SAME = ("add", "add_any", "complex", "concatenate", "conj", "convert_element_type", "copy")
SAME += ("copy_p", "cumsum", "imag", "name", "neg", "real", "reduce_sum", "rev", "split")
SAME += ("device_put", "optimization_barrier", "squeeze", "stack", "sub", "unstack")
LINEAR: dict[str, Callable[[Params, int, int, int], Params]] = {
    **dict.fromkeys(SAME, lambda params, of_x, of_y, count: params),
    "broadcast_in_dim": lambda params, of_x, of_y, count: {
        "shape": (*params["shape"], count),
        "broadcast_dimensions": (*params["broadcast_dimensions"], of_y),
    },
    "gather": longer_gather,
    "pad": lambda params, *_: {"padding_config": (*params["padding_config"], (0, 0, 0))},
    "reshape": longer_reshape,
    "slice": longer_slice,
    "tile": lambda params, *_: {"reps": (*params["reps"], 1)},
    "transpose": lambda params, of_x, *_: {"permutation": (*params["permutation"], of_x)},
}


def linear(eqn: Any, operands: list[Series], ys: list[Array]) -> list[Series]:
    """The same for the derivatives as for the values."""
    name, count = eqn.primitive.name, directions(operands)
    params = LINEAR[name](eqn.params, operands[0].x.ndim, ys[0].ndim, count)
    parts = []
    for k in (1, 2):
        part: Any = [None] * len(ys)
        if any(x[k] is not None for x in operands):
            given = [filled(x, k, count) for x in operands]
            if name == "gather":
                given[1] = operands[1].x
            if name == "pad":
                given[1] = np.zeros((), given[0].dtype)
            part = OPERATIONS[name](*given, **params)
        if part is NotImplemented:
            return by_jvp(eqn, operands)
        parts.append(part if isinstance(part, list) else [part])
    return list(map(Series, ys, *parts))


# First and second derivatives, of ``x`` and ``y = f(x)``.
UNARY: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "abs": lambda x, y: (np.where(x < 0, -1.0, 1.0), None),
    "atan": lambda x, y: (1 / (1 + x * x), -2 * x / (1 + x * x) ** 2),
    "cos": lambda x, y: (-np.sin(x), -y),
    "erf": lambda x, y: (c := 2 / math.sqrt(math.pi) * np.exp(-x * x), -2 * x * c),
    "erfc": lambda x, y: (c := -2 / math.sqrt(math.pi) * np.exp(-x * x), -2 * x * c),
    "exp": lambda x, y: (y, y),
    "exp2": lambda x, y: (math.log(2) * y, math.log(2) ** 2 * y),
    "expm1": lambda x, y: (y + 1, y + 1),
    "log": lambda x, y: (1 / x, -1 / (x * x)),
    "log1p": lambda x, y: (1 / (1 + x), -1 / (1 + x) ** 2),
    "logistic": lambda x, y: (y * (1 - y), y * (1 - y) * (1 - 2 * y)),
    "rsqrt": lambda x, y: (-y / (2 * x), 3 * y / (4 * x * x)),
    "sin": lambda x, y: (np.cos(x), -y),
    "sqrt": lambda x, y: (1 / (2 * y), -1 / (4 * y * x)),
    "square": lambda x, y: (2 * x, np.full_like(x, 2)),
    "tanh": lambda x, y: (1 - y * y, -2 * y * (1 - y * y)),
}


def slopes_of_power(x: Array, y: int) -> tuple[Array, Array]:
    def at(factor: int, power: int) -> Array:
        return factor * integer_pow(x, y=power) if factor else None

    return at(y, y - 1), at(y * (y - 1), y - 2)


def chained(x: Series, y: Array, slope: Array, bend: Array) -> Series:
    """``y' = f' x'`` and ``y'' = f' x'' + f'' x'^2``."""
    slope, bend = wide(slope), wide(bend)
    return Series(y, times(slope, x.d), plus(times(slope, x.dd), times(bend, times(x.d, x.d))))


def product(eqn: Any, a: Series, b: Series, y: Array) -> Series:
    """``(a b)' = a' b + a b'`` and ``(a b)'' = a'' b + 2 a' b' + a b''``."""
    of, left, right = times, wide(a.x), wide(b.x)
    if eqn.primitive.name == "dot_general":
        numbers = letters(eqn.params["dimension_numbers"], a.x.ndim, b.x.ndim)
        of = functools.partial(contracted, *numbers)
    slope = plus(of(a.d, right), of(left, b.d))
    return Series(y, slope, plus(of(a.dd, right), times(2, of(a.d, b.d)), of(left, b.dd)))


def contracted(left: str, right: str, result: str, a: Array, b: Array) -> Array:
    """Direction by direction."""
    if a is None or b is None:
        return None
    count = max(a.shape[-1], b.shape[-1])
    a, b = (np.broadcast_to(x, (*x.shape[:-1], count)) for x in (a, b))
    return einsum(f"{left}z,{right}z->{result}z", a, b, a.dtype)


def quotient(eqn: Any, a: Series, b: Series, y: Array) -> Series:
    """``y b = a``, differentiated."""
    by, minus = wide(1 / b.x), -wide(y)
    d = times(plus(a.d, times(minus, b.d)), by)
    dd = times(plus(a.dd, times(minus, b.dd), times(-2, times(d, b.d))), by)
    return Series(y, d, dd)


def extremum(eqn: Any, a: Series, b: Series, y: Array) -> Series:
    """Of equal operands each counts half."""
    of_a, of_b = (np.equal(x.x, y).astype(y.dtype) for x in (a, b))
    of_a, of_b = wide(of_a / (1 + of_b)), wide(of_b / (1 + of_a))
    return Series(y, *(plus(times(of_a, a[k]), times(of_b, b[k])) for k in (1, 2)))


def chosen(eqn: Any, which: Series, *cases_and_y: Any) -> Series:
    *cases, y = cases_and_y

    def choose(parts: Sequence[Array]) -> Array:
        return np.choose(wide(which.x).astype(int), parts)

    return Series(y, *(joined(choose, cases, k) for k in (1, 2)))


BINARY: dict[str, Callable[..., Series]] = {
    "div": quotient,
    "dot_general": product,
    "max": extremum,
    "min": extremum,
    "mul": product,
    "select_n": chosen,
}


def by_jvp(eqn: Any, operands: list[Series]) -> list[Series]:
    """By the derivative of the primitive in JAX."""
    moving = [i for i, x in enumerate(operands) if x.moves]
    primals = [x.x for x in operands]
    along = _jaxpr.along(eqn, primals, moving)
    floats = [i for i, v in enumerate(outputs(eqn)) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    xs = tuple(primals[i] for i in moving)

    def function(*xs: Any) -> list[Any]:
        results = along(*xs)
        listed = results if isinstance(results, list | tuple) else [results]
        return [listed[i] for i in floats]

    def derivatives(d: Any, dd: Any) -> Any:
        def first(xs: Any, d: Any) -> Any:
            if eqn.primitive.name != "custom_vjp_call":
                return jax.jvp(function, xs, d)[1]
            results, back = jax.vjp(function, *xs)  # JAX has the derivative of its rule alone
            return jax.linear_transpose(back, results)(d)[0]

        return jax.jvp(first, (xs, d), (d, dd))

    # Batches of sparse matrices lie along the first axis.
    d, dd = (
        tuple(np.moveaxis(filled(operands[i], k, directions(operands)), -1, 0) for i in moving)
        for k in (1, 2)
    )
    results = list(map(Series, Numbers().apply(eqn, primals)))
    for i, *parts in zip(floats, *traced(jax.vmap(derivatives), d, dd), strict=True):
        results[i] = Series(results[i].x, *(np.moveaxis(x, 0, -1) for x in parts))
    return results


def directions(operands: Sequence[Series]) -> int:
    """Their number."""
    parts = (part for x in operands for part in x[1:] if part is not None)
    return next(parts).shape[-1]


def filled(x: Series, k: int, count: int) -> Array:
    part = np.zeros((*x.x.shape, count)) if x[k] is None else x[k]
    return part.astype(x.x.dtype, copy=False)


def joined(function: Callable[..., Array], xs: Sequence[Series], k: int) -> Array:
    """A function of all derivatives of one order."""
    if all(x[k] is None for x in xs):
        return None
    return function([filled(x, k, directions(xs)) for x in xs])


def wide(x: Array) -> Array:
    """For all directions."""
    return None if x is None else x[..., None]


def times(a: Array, b: Array) -> Array:
    return None if a is None or b is None else a * b


def plus(*terms: Array) -> Array:
    given = [x for x in terms if x is not None]
    return sum(given[1:], given[0]) if given else None
