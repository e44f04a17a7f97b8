"""The slopes of equations, as constants of forms: entry by entry, and as matrices.

See :mod:`hesscale_jax.images` for where they are used.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Value, is_inexact
from hesscale_jax._mesh import at_mesh_of, lying, on_mesh, replicated
from hesscale_jax.arrays import Factor, Reader, of_atom
from hesscale_jax.factored import RENAMED
from hesscale_jax.forms import Form
from hesscale_jax.rules.derivatives import Pointwise

__all__ = ["are_few", "by_unit_vectors", "is_linear", "slope_in", "slope_of_loop"]


# Their slopes are finite where their operands are.
SMOOTH = {"abs", "asinh", "atan", "cos", "erf", "integer_pow", "logistic", "sin", "square", "tanh"}

# Their slopes are finite anyhow, but for those of a sine at infinity, where it has no value.
BOUNDED = {"asinh", "atan", "clamp", "cos", "erf", "logistic", "max", "min", "sin", "tanh"}

# Linear in their operands, by matrices of no more entries than these.
MOST_IN_MATRIX = 2**14


def slope_in(eqn: Equation, rule: Pointwise, i: int) -> Factor | float:
    """The slope of an equation in an operand."""
    if rule.slopes is not None:
        return rule.slopes[i]
    if eqn.name == "mul":
        return of_atom(eqn.inputs[1 - i])
    if eqn.name == "div" and i == 0:
        other = of_atom(eqn.inputs[1])
        return other.mapped(lambda x: 1 / x, other.shape)
    if eqn.name == "select_n":
        which = of_atom(eqn.inputs[0])
        chosen = which.mapped(lambda x: x.astype("int32") == i - 1, which.shape)
        return dataclasses.replace(chosen, safe=True)
    (y,) = eqn.outputs
    reads = frozenset(v for v in (*eqn.inputs, y) if isinstance(v, Value))

    def slope(read: Reader) -> Any:
        operands, result = list(map(read, eqn.inputs)), read(y)
        if not _jaxpr.takes(eqn, operands):
            operands = [_as(v, x) for v, x in zip(eqn.inputs, operands, strict=True)]
            result = _as(y, result)
        found, _ = rule.derivatives(eqn, result, operands, [i])
        return jnp.broadcast_to(read.number(found.get(i, 0.0)), y.shape)

    is_finite = eqn.name in SMOOTH and eqn.params.get("y", 1) >= 0
    compute = _at_home(eqn, slope)
    return Factor(tuple(y.shape), reads, compute, finite=is_finite, safe=eqn.name in BOUNDED)


def _at_home(eqn: Equation, compute: Callable[[Reader], Any]) -> Callable[[Reader], Any]:
    """The same on the mesh of an equation, which it runs."""

    def compute_there(read: Reader) -> Any:
        with at_mesh_of(eqn.outputs[0].aval):
            return compute(read)

    return compute_there


def slope_of_loop(eqn: Equation, i: int, k: int) -> Factor:
    """The slope of a loop's result in an operand: linear, entry by entry."""

    def slope(read: Reader) -> Any:
        operands = [_as(v, x) for v, x in zip(eqn.inputs, map(read, eqn.inputs), strict=True)]

        def result(x: Any) -> Any:
            return _run(eqn, *operands[:i], x, *operands[i + 1 :])[k]

        _, along = jax.jvp(result, [operands[i]], [jnp.ones_like(operands[i])])
        return read.number(along)

    reads = frozenset(v for v in eqn.inputs if isinstance(v, Value))
    return Factor(tuple(eqn.outputs[k].shape), reads, _at_home(eqn, slope))


def is_linear(eqn: Equation, active: Sequence[int]) -> bool:
    """Whether a solve, a window or a loop is affine in its operands at these positions."""
    match eqn.name:
        case "conv_general_dilated" | "reduce_window_sum":
            return len(active) == 1
        case "triangular_solve":
            return active == [1]
        case "custom_linear_solve":
            return min(active) >= sum(eqn.params["const_lengths"])
        case "scan":
            return _is_linear_loop(eqn, active)
    return _jaxpr.label(eqn) == "custom_jvp_call[complex.fft]"


def _is_linear_loop(eqn: Equation, active: Sequence[int]) -> bool:
    (body,) = eqn.bodies
    if eqn.sources[0].effects:
        return False  # They would take place again.
    inputs, outputs = body.program.inputs, body.program.outputs
    moving = {v for v, i in zip(inputs, body.inputs, strict=True) if i in active}
    while True:
        reached = set(moving)
        for e in body.program.equations:
            at = [i for i, v in enumerate(e.inputs) if v in reached]
            if at and not _is_linear_step(e, at):
                return False
            reached.update(filter(is_inexact, e.outputs) if at else ())
        more = {inputs[j] for i, j in body.carry.items() if outputs[i] in reached}
        if more <= moving:
            return True
        moving |= more


def _is_linear_step(eqn: Equation, at: Sequence[int]) -> bool:
    if eqn.name in _jaxpr.IMAGES:
        several = eqn.name not in _jaxpr.PRODUCTS or eqn.name == "select_n"
        return (several or len(at) == 1) and not (eqn.name == "div" and at != [0])
    if eqn.name in ("dynamic_update_slice", "scatter"):
        return True
    return eqn.name in RENAMED or is_linear(eqn, at)


def are_few(eqn: Equation, active: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether the slopes of such an equation's results in operands are written out."""
    rows, columns = [eqn.outputs[k].shape for k in wanted], [eqn.inputs[i].shape for i in active]
    if not all(isinstance(n, int) for n in itertools.chain(*rows, *columns)):
        return False
    return sum(map(math.prod, rows)) * sum(map(math.prod, columns)) <= MOST_IN_MATRIX


def by_unit_vectors(
    eqn: Equation, forms: Mapping[int, Form], wanted: Sequence[int]
) -> list[Form] | None:
    """What is affine in operands, by matrices, if they are small."""
    if not are_few(eqn, [*forms], wanted):
        return None
    images = [Form(tuple(y.shape), {}) for y in eqn.outputs]
    for i, x in forms.items():
        for k in wanted:
            m, n = math.prod(eqn.outputs[k].shape), math.prod(eqn.inputs[i].shape)
            by = _matrix(eqn, i, k)
            apart = x.reshaped((n,)).placed((m, n), [1])
            image = apart.through(by).summed([1]).reshaped(images[k].shape)
            images[k] = images[k].plus(image)
    return images


def _matrix(eqn: Equation, i: int, k: int) -> Factor:
    """The derivative of a result in an operand, which does not depend on it."""
    operand, y = eqn.inputs[i], eqn.outputs[k]
    m, n = math.prod(y.shape), math.prod(operand.shape)

    def matrix(read: Reader) -> Any:
        operands = [
            _as(v, v.value if isinstance(v, Constant) else on_mesh(read.primal(v)))
            for v in eqn.inputs
        ]

        def result(x: Any) -> Any:
            return _run(eqn, *operands[:i], x, *operands[i + 1 :])[k]

        def image(unit: Any) -> Any:
            unit = lying(unit.reshape(operand.shape), operand.aval)
            return jax.jvp(result, [operands[i]], [unit])[1]

        columns = jax.vmap(image, out_axes=-1)(jnp.eye(n, dtype=operand.dtype))
        return replicated(columns).reshape(m, n)

    reads = frozenset(v for v in eqn.inputs if isinstance(v, Value))
    return Factor((m, n), reads, _at_home(eqn, matrix), safe=True)


def _run(eqn: Equation, *operands: Any) -> list[Any]:
    """The results, of a loop without what its steps compute for nothing."""
    changes = {}
    if eqn.name == "scan":
        changes["jaxpr"] = _jaxpr.without_dead_code(eqn.params["jaxpr"])
    return _jaxpr.listed(_jaxpr.bind(eqn, *operands, **changes), eqn)


def _as(atom: Value | Constant, x: Any) -> Any:
    return lax.convert_element_type(x, atom.dtype)
