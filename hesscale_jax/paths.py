"""Which values lie on a differentiable path from what moves to what is wanted."""

from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple

from hesscale_jax._jaxpr import Body, Equation, Program, Value, is_inexact, size
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.selection import PiecewiseConstant

__all__ = ["Loop", "loop", "on_paths"]


def on_paths(
    program: Program,
    moving: Iterable[Value],
    wanted: Iterable[Any],
    find: Callable[[Equation], Any],
) -> tuple[frozenset[Value], dict[Equation, Any]]:
    """The values on a differentiable path, and the rules of the equations that make them."""
    reached, found = _reach(program, moving, find)
    needed = {v for v in wanted if v in reached}
    rules = {}
    for eqn in reversed(found):
        if not needed.isdisjoint(eqn.outputs):
            rules[eqn] = rule = found[eqn]
            read = [v for v in eqn.inputs if v in reached]
            if isinstance(rule, ControlFlow):
                inside = [loop(eqn, body, reached, needed, find) for body in eqn.bodies]
                read = [v for v in read if any(v in paths.read for paths in inside)]
            needed.update(read)
    return frozenset(needed), dict(reversed(rules.items()))


def _reach(
    program: Program, moving: Iterable[Value], find: Callable[[Equation], Any]
) -> tuple[set[Value], dict[Equation, Any]]:
    """The values that move with the inputs, and the rules of the equations that read them."""
    # An array without entries carries no derivative anywhere.
    reached = {v for v in moving if size(v.sizes)}
    found = {}
    for eqn in program.equations:
        if reached.isdisjoint(eqn.inputs):
            continue
        found[eqn] = rule = find(eqn)
        moved: Iterable[Value] = eqn.outputs
        if isinstance(rule, PiecewiseConstant):
            moved = ()
        elif isinstance(rule, ControlFlow):
            inside = [_moving(eqn, body, reached, find)[1] for body in eqn.bodies]
            moved = [v for i, v in enumerate(eqn.outputs) if any(i in m for m in inside)]
        reached.update(v for v in moved if is_inexact(v) and size(v.sizes))
    return reached, found


class Loop(NamedTuple):
    """The paths through a body, at any of its steps.

    Attributes:
      moving: The inputs of the body's program that move.
      wanted: The positions of its outputs whose moments are asked for.
      read: The operands of the equation on a path.
    """

    moving: set[Value]
    wanted: set[int]
    read: set[Any]


def loop(
    eqn: Equation,
    body: Body,
    moving: Container[Any],
    wanted: Container[Any],
    find: Callable[[Equation], Any],
) -> Loop:
    """The paths through a body whose operands move and whose results are wanted as given.

    What a step hands to the next moves if it does at any step, and is wanted if it is at any.
    """
    inputs, outputs = body.program.inputs, body.program.outputs
    moves, _ = _moving(eqn, body, moving, find)
    asked = {i for i, v in enumerate(eqn.outputs) if v in wanted}
    while True:
        active, _ = on_paths(body.program, moves, [outputs[i] for i in asked], find)
        more = {i for i, j in body.carry.items() if inputs[j] in active}
        if more <= asked:
            read = {eqn.inputs[i] for i, v in zip(body.inputs, inputs, strict=True) if v in active}
            return Loop(moves, asked, read)
        asked |= more


def _moving(
    eqn: Equation, body: Body, moving: Container[Any], find: Callable[[Equation], Any]
) -> tuple[set[Value], set[int]]:
    """The inputs of the body's program that move at any step, and the positions of its outputs."""
    inputs, outputs = body.program.inputs, body.program.outputs
    moves = {v for v, i in zip(inputs, body.inputs, strict=True) if eqn.inputs[i] in moving}
    while True:
        reached, _ = _reach(body.program, moves, find)
        more = {inputs[j] for i, j in body.carry.items() if outputs[i] in reached}
        if more <= moves:
            return moves, {i for i, v in enumerate(outputs) if v in reached}
        moves |= more
