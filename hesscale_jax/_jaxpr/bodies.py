"""The programs that an equation runs, and whether they act entry by entry."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax._src.core import NamedAxisEffect

from hesscale_jax._jaxpr.binding import trace
from hesscale_jax._jaxpr.custom_rules import derivative_jaxpr, is_own
from hesscale_jax._jaxpr.flattening import flatten
from hesscale_jax._jaxpr.program import (
    CUSTOM,
    HIGH,
    Body,
    Equation,
    Program,
    Value,
    as_closed,
    is_inexact,
    scan_groups,
)
from hesscale_jax._jaxpr.rewriting import ENTRYWISE, MOVES_ENTRIES
from hesscale_jax._jaxpr.sources import ONE_RESULT, function_name

__all__ = [
    "acts_entrywise",
    "bodies_of",
    "body",
    "has_effects",
    "is_collective",
    "passes_entrywise",
]


def has_effects(program: Program, collectives: bool = True) -> bool:
    """Whether running the program, or differentiating it, does more than to compute results.

    To JAX, so do collectives: the name of their axis is an effect.
    """

    def counted(effects: Iterable[Any]) -> bool:
        return any(collectives or not isinstance(e, NamedAxisEffect) for e in effects)

    return any(
        counted(eqn.sources[0].effects)
        or (eqn.name in CUSTOM and counted(derivative_jaxpr(eqn).effects))
        or any(has_effects(body.program, collectives) for body in eqn.bodies)
        for eqn in program.equations
    )


def is_collective(eqn: Equation) -> bool:
    """Whether it, or a loop's step, takes values of other devices under ``shard_map``."""
    return any(isinstance(effect, NamedAxisEffect) for effect in eqn.sources[0].effects)


def body(jaxpr: Any, eqn: Equation, given: Sequence[Any] = ()) -> Body:
    """A body that takes the operands of its equation in order, of which the first are given.

    What a function with its own derivative computes is run for its curvature besides that
    derivative: without effects.
    """
    custom = eqn.name in CUSTOM
    apart = not (custom and function_name(eqn).startswith(ONE_RESULT))
    program = flatten(as_closed(jaxpr), eqn.sources, not custom, apart, eqn.ruled, given=given)
    return Body(program, range(len(program.inputs)))


def bodies_of(eqn: Equation) -> Iterator[Body]:
    params = eqn.params
    match eqn.name:
        case "scan":
            first, last = (group.start for group in scan_groups(eqn)[1:])
            step = body(params["jaxpr"], eqn, eqn.inputs[:first])
            yield Body(step.program, step.inputs, {i: first + i for i in range(last - first)})
        case "while":
            consts = params["cond_nconsts"]
            first = params["body_nconsts"]
            step = body(params["body_jaxpr"], eqn, eqn.inputs[consts : consts + first])
            carry = {i: first + i for i in range(len(eqn.outputs))}
            yield Body(step.program, [consts + i for i in step.inputs], carry)
        case "cond":
            for branch in (body(jaxpr, eqn, eqn.inputs[1:]) for jaxpr in params["branches"]):
                yield Body(branch.program, [1 + i for i in branch.inputs])
        case "custom_jvp_call" if is_own(eqn):
            return
        case "custom_jvp_call" | "custom_vjp_call":
            yield body(params["call_jaxpr"], eqn, eqn.inputs)
        case "shard_map":
            # On each device, what is split in two ways is two values.
            split: dict[Any, Any] = {}
            given = [
                v if isinstance(v, Value) and split.setdefault(v, spec) == spec else None
                for v, spec in zip(eqn.inputs, params["in_specs"], strict=True)
            ]
            yield body(params["jaxpr"], eqn, given)


def acts_entrywise(eqn: Equation) -> bool:
    """Whether each entry of the results depends on the operands' entries at its position alone.

    That is asked of a ``custom_jvp`` function's rule: whether tangents pass through it so. Of a
    primitive that JAX expands to others, it is asked of those.
    """
    if eqn.name not in ("custom_jvp_call", HIGH) or not is_inexact(eqn.outputs[0]):
        return False
    shape = eqn.outputs[0].shape
    values = [v for v in eqn.inputs if isinstance(v, Value)]
    if any(not _broadcasts(v.shape, shape) for v in values):
        return False
    if any(v.shape != shape for v in eqn.outputs):
        return False
    if eqn.name == HIGH:
        return len(eqn.outputs) == 1 and all(
            e.name in ENTRYWISE and all(_broadcasts(v.shape, shape) for v in e.outputs)
            for e in _expansion(eqn).equations
        )
    program = flatten(derivative_jaxpr(eqn), apart=False)
    return passes_entrywise(program, program.inputs[len(values) :], shape)


def passes_entrywise(program: Program, moving: Iterable[Value], shape: tuple[int, ...]) -> bool:
    """Whether what moves passes through a program entry by entry, in the shape given."""
    return shape == () or _pass_entrywise(program, set(moving), shape)


def _expansion(eqn: Equation) -> Program:
    """What JAX expands a primitive to, which may lack the primitive's derivative."""
    primitive = eqn.params["_prim"]
    operands = jax.tree.unflatten(primitive.in_tree, primitive.in_avals_flat)
    return flatten(trace(primitive.expand, *operands), apart=False)


def _pass_entrywise(program: Program, moving: set[Any], shape: tuple[int, ...]) -> bool:
    """Whether what moves passes through a program entry by entry.

    What it moves is added to ``moving``.
    """
    for eqn in program.equations:
        positions = [i for i, v in enumerate(eqn.inputs) if v in moving]
        if not positions:
            continue
        if eqn.name in ("scan", "while", "cond"):
            if not _loop_passes_entrywise(eqn, moving, shape):
                return False
            continue
        if eqn.name not in MOVES_ENTRIES or (eqn.name == "div" and positions != [0]):
            return False
        if eqn.name == "broadcast_in_dim":
            rank = len(eqn.inputs[0].shape)
            if eqn.params["broadcast_dimensions"] != tuple(range(rank)):
                return False
        if not all(_broadcasts(v.shape, shape) for v in eqn.outputs):
            return False
        moving.update(eqn.outputs)
    return True


def _loop_passes_entrywise(eqn: Equation, moving: set[Any], shape: tuple[int, ...]) -> bool:
    if eqn.name == "scan":
        _, carry, xs = scan_groups(eqn)
        if any(eqn.inputs[i] in moving for i in xs):
            return False
    for body in eqn.bodies:
        inputs, outputs = body.program.inputs, body.program.outputs
        inside = {v for v, i in zip(inputs, body.inputs, strict=True) if eqn.inputs[i] in moving}
        while True:
            reached = set(inside)
            if not _pass_entrywise(body.program, reached, shape):
                return False
            more = {inputs[j] for i, j in body.carry.items() if outputs[i] in reached}
            if more <= inside:
                break
            inside |= more
        found = [i for i, v in enumerate(outputs) if v in reached]
        if eqn.name == "scan" and any(i >= len(carry) for i in found):
            return False
        moving.update(eqn.outputs[i] for i in found)
    return True


def _broadcasts(operand: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an operand has an entry for each of the result's, at size 1 the same for several."""
    return operand == () or (
        len(operand) == len(shape) and all(n in (1, m) for n, m in zip(operand, shape, strict=True))
    )
