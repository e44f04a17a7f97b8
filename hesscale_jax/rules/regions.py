"""Regions: a function as one step, by its dense derivatives or by random signs.

What is differentiated is the function of all its operands together, for each example by itself
where it is mapped over a batch.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._complex import is_complex
from hesscale_jax._jaxpr import Equation
from hesscale_jax._mesh import lying, replicated
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.regions import REGION, Exact
from hesscale_jax.rules.derivatives import widened
from hesscale_jax.rules.multilinear import total
from hesscale_jax.rules.selection import push
from hesscale_jax.rules.table import ByEquation, ComplexValues, Find

__all__ = ["region"]

# How many columns of a Jacobian are computed at once.
CHUNK = 128

Function = Callable[..., list[Any]]


class Given(NamedTuple):
    """What the spreads of the operands give each result, in its spread and in its shift."""

    spreads: list[Any]
    bends: list[Any]


def exact(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + sum_i d2f/dx_i2 vx_i, vy = (J*J) vx``, over all operands together."""

    def given(key: Any, fun: Function, xs: Sequence[Any], spreads: Sequence[Any]) -> Given:
        ys = jax.eval_shape(fun, *xs)
        columns, rows = _size(xs), _size(ys)
        if columns * rows > (limit := eqn.params["how"].max_entries):
            raise ValueError(
                f"the Jacobian of the exact region {eqn.params['name']!r} (used at "
                f"{_jaxpr.location(eqn)}) has {rows} x {columns} numbers, more than {limit}. "
                "Options: (1) map it over the examples of a batch: jax.vmap(hs.exact(fun), ...), "
                "which has one Jacobian for each; (2) make the region smaller; (3) raise the "
                "limit: hs.exact(fun, max_entries=...); (4) use hs.sampled(fun), an unbiased "
                "estimate."
            )
        if not recurse.curved and rows < columns:
            return _by_rows(fun, xs, spreads)
        return _by_columns(fun, xs, spreads, _derivatives(eqn), recurse.curved)

    return _moments(eqn, operands, recurse, given, None)


def _by_columns(
    fun: Function, xs: Sequence[Any], spreads: Sequence[Any], derivatives: Any, curved: bool
) -> Given:
    """Along each entry of the operands: the first and the second derivative of all results."""
    starts = list(itertools.accumulate((x.size for x in xs), initial=0))

    def column(position: Any) -> tuple[list[Any], list[Any]]:
        units = [
            (jnp.arange(x.size).reshape(x.shape) + start == position).astype(x.dtype)
            for x, start in zip(xs, starts, strict=False)
        ]
        units = [lying(unit, jax.typeof(x)) for unit, x in zip(units, xs, strict=True)]
        unit = list(map(_jaxpr.varying_as, units, xs))
        if not curved:
            return derivatives.first(fun, xs, unit), []
        return derivatives.second(fun, xs, unit, unit)

    slopes, bends = lax.map(column, jnp.arange(starts[-1]), batch_size=CHUNK)
    variances = jnp.concatenate([replicated(v).ravel() for v in spreads])

    def weighted(columns: Any) -> Any:
        return jnp.tensordot(variances, columns.astype(variances.dtype), 1)

    return Given(
        [weighted(s.astype(variances.dtype) ** 2) for s in slopes], list(map(weighted, bends))
    )


def _by_rows(fun: Function, xs: Sequence[Any], spreads: Sequence[Any]) -> Given:
    """For each entry of the results: the first derivative in all operands."""
    ys, pull = jax.vjp(fun, *xs)
    found = []
    for k, y in enumerate(ys):

        def row(position: Any, k: int = k, y: Any = y) -> list[Any]:
            unit = jnp.arange(math.prod(y.shape)).reshape(y.shape) == position
            unit = lying(unit, jax.typeof(y))
            cotangents = list(map(jnp.zeros_like, ys))
            cotangents[k] = unit.astype(y.dtype)
            return pull(list(map(_jaxpr.varying_as, cotangents, ys)))

        rows = lax.map(row, jnp.arange(math.prod(y.shape)), batch_size=CHUNK)
        parts = [
            jnp.tensordot(replicated(r).astype(v.dtype) ** 2, replicated(v), v.ndim)
            for r, v in zip(rows, spreads, strict=True)
        ]
        found.append(jnp.reshape(sum(parts), y.shape))
    return Given(found, [])


def sampled(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``dy = J dx + f''[z, z*vx], vy = (J z) * (J (z*vx))``, averaged over random signs ``z``."""
    how, derivatives = eqn.params["how"], _derivatives(eqn)
    of_float16 = _jaxpr.holds_float16(eqn.params)
    looped = any(caller.primitive.name == "scan" for caller in eqn.sources[1:])
    if looped and not how.keyed:
        raise ValueError(
            f"the sampled region {eqn.params['name']!r} (used at {_jaxpr.location(eqn)}) would "
            "draw the same signs at each step of a loop. Give each step a key of its own: scan "
            "over jax.random.split(key, length), and call hs.sampled(fun, key=key) within."
        )

    def given(key: Any, fun: Function, xs: Sequence[Any], spreads: Sequence[Any]) -> Given:
        if of_float16:
            xs = list(map(widened, xs))

        def estimate(key: Any) -> Given:
            """What one array of signs gives."""
            keys = jax.random.split(key, len(xs))
            z = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, xs, strict=True)]
            z = list(map(_jaxpr.varying_as, z, xs))
            pairs = zip(z, spreads, strict=True)
            t = [lax.convert_element_type(s * v, s.dtype) for s, v in pairs]
            if recurse.curved:
                along_t, bends = derivatives.second(fun, xs, z, t)
            else:
                along_t, bends = derivatives.first(fun, xs, t), []
            slopes = zip(derivatives.first(fun, xs, z), along_t, strict=True)
            return Given([a * b for a, b in slopes], bends)

        found = jax.vmap(estimate)(jax.random.split(key, how.samples))
        return jax.tree.map(lambda x: x.mean(0), found)

    key = jax.random.key(how.seed, impl="threefry2x32")
    for number in recurse.place:
        key = jax.random.fold_in(key, number)
    return _moments(eqn, operands, recurse, given, key, _widely if of_float16 else REGION.bind)


def _widely(*operands: Any, jaxpr: Any, **params: Any) -> list[Any]:
    """What a region computes, in float32: its estimates lie beyond the range of float16."""
    program = _jaxpr.flatten(jaxpr, apart=False)
    given = operands[: len(program.inputs)]  # without the key
    return _jaxpr.evaluate(program, given, program.outputs, _jaxpr.run_widely)


def _moments(
    eqn: Equation,
    operands: Sequence[Moments],
    recurse: Any,
    given: Callable[..., Given],
    key: Any,
    run: Callable[..., list[Any]] = REGION.bind,
) -> list[Moments]:
    """The shifts pushed through, and what the spreads ``given`` to each example come to.

    The derivatives are those of the region as it is ``run``.
    """
    primals = [x.primal for x in operands]
    results = _jaxpr.listed(_jaxpr.bind(eqn, *primals), eqn)
    shifts = push(eqn, primals, [x.shift for x in operands])
    spreads: list[Any] = [None] * len(results)
    moving = [i for i, x in enumerate(operands) if x.spread is not None and x.primal.size]
    carried = [k for k, v in enumerate(eqn.outputs) if recurse.wanted[k] and _jaxpr.is_inexact(v)]
    if not (moving and carried):
        return list(map(Moments, results, shifts, spreads))

    def example(key: Any, *arrays: Any) -> Given:
        xs = list(arrays[: len(primals)])

        def fun(*moved: Any) -> list[Any]:
            for i, x in zip(moving, moved, strict=True):
                xs[i] = x
            found = run(*xs, **eqn.params | {"layers": ()})
            return [found[k] for k in carried]

        if getattr(eqn.params["how"], "keyed", False):
            key = jax.random.fold_in(xs[-1], jax.random.bits(key))
        return given(key, fun, [xs[i] for i in moving], arrays[len(primals) :])

    for axes in eqn.params["layers"]:
        example = _over_examples(example, (*axes, *(axes[i] for i in moving)))
    found = example(key, *primals, *(operands[i].spread for i in moving))
    for k, spread in zip(carried, found.spreads, strict=True):
        spreads[k] = lax.convert_element_type(spread, spread_dtype(results[k].dtype))
    for k, bend in zip(carried, found.bends, strict=False):
        shifts[k] = total(shifts[k], lax.convert_element_type(bend, results[k].dtype))
    return list(map(Moments, results, shifts, spreads))


def _over_examples(
    example: Callable[..., Given], axes: Sequence[int | None]
) -> Callable[..., Given]:
    """The same for a batch; each example has a key of its own."""

    def batch(key: Any, *arrays: Any) -> Given:
        mapped = [(jax.typeof(x), i) for x, i in zip(arrays, axes, strict=True) if i is not None]
        (aval, axis), *_ = mapped
        keys = None if key is None else jax.random.split(key, aval.shape[axis])
        if keys is not None and (along := aval.sharding.spec[axis]) is not None:
            keys = jax.sharding.reshard(keys, jax.sharding.PartitionSpec(along))
        return jax.vmap(example, (0, *axes))(keys, *arrays)

    return batch


class _Forward:
    """Derivatives of a function by its forward derivative."""

    @staticmethod
    def first(fun: Function, xs: Sequence[Any], t: Sequence[Any]) -> list[Any]:
        """``J t``."""
        return jax.jvp(fun, tuple(xs), tuple(t))[1]

    @classmethod
    def second(
        cls, fun: Function, xs: Sequence[Any], z: Sequence[Any], t: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """``J t`` and ``f''[z, t]``."""
        both = cls.first(lambda *xs: [*cls.first(fun, xs, z), *fun(*xs)], xs, t)
        return both[len(both) // 2 :], both[: len(both) // 2]


class _Reverse:
    """The same of a function without one: what is linear in cotangents ``u`` of the results."""

    @staticmethod
    def first(fun: Function, xs: Sequence[Any], t: Sequence[Any]) -> list[Any]:
        """``J t``, by ``(J^T u) t``."""
        ys, pull = jax.vjp(fun, *xs)
        return _coefficients(lambda u: _inner(pull(u), t), ys)

    @classmethod
    def second(
        cls, fun: Function, xs: Sequence[Any], z: Sequence[Any], t: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """``J t``, and ``f''[z, t]`` by ``d((J^T u) z)/dx t``."""

        def bent(u: list[Any]) -> Any:
            def along_z(xs: Sequence[Any]) -> Any:
                return _inner(jax.vjp(fun, *xs)[1](u), z)

            return _inner(jax.grad(along_z)(tuple(xs)), t)

        return cls.first(fun, xs, t), _coefficients(bent, fun(*xs))


def _coefficients(linear: Callable[[list[Any]], Any], ys: Sequence[Any]) -> list[Any]:
    """Of a linear function of arrays like ``ys``: its gradient.

    Of one number it is the value at 1, which does not differentiate through what is a derivative
    already: ``jax.experimental.ode.odeint`` allows two.
    """
    if _size(ys) == len(ys) == 1:
        (y,) = ys
        value = linear([_jaxpr.varying_as(jnp.ones_like(y), y)])
        return [jnp.reshape(value, y.shape).astype(y.dtype)]
    return jax.grad(linear)([_jaxpr.varying_as(jnp.zeros_like(y), y) for y in ys])


def _inner(a: Sequence[Any], b: Sequence[Any]) -> Any:
    dtype = spread_dtype(*(x.dtype for x in a))
    return sum(jnp.vdot(x, y).astype(dtype) for x, y in zip(a, b, strict=True))


def _derivatives(eqn: Equation) -> Any:
    return _Reverse if _jaxpr.holds_custom_vjp(eqn.params) else _Forward


def _size(values: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) for x in values)


def _choose(eqn: Equation, find: Find) -> Any:
    """By the derivatives of the function as a whole, or by random signs: `exact`, `sampled`."""
    if any(is_complex(v.aval) for v in eqn.outputs):
        return ComplexValues("complex results", curable=False)
    return exact if isinstance(eqn.params["how"], Exact) else sampled


region = ByEquation(_choose)
