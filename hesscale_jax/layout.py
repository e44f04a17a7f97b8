"""Where a leaf meets its product: pure graph analysis, no arithmetic.

A leaf is a factor of products if each path that leads on from it, through changes of view and into
the loops and branches that it is handed to, ends in a product, and all sum over the same axes.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Program, Value
from hesscale_jax.blocks import Plan
from hesscale_jax.factored import Axis, Layout, canonical, row_major, viewed
from hesscale_jax.paths import loop
from hesscale_jax.planning import plan
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.multilinear import Multilinear

__all__ = ["Arrival", "arrivals", "layouts", "reads"]

Find = Callable[[Equation], Any]
Readers = dict[Any, list[tuple[Equation, int]]]
PRODUCTS = ("dot_general", "conv_general_dilated")


class Arrival(NamedTuple):
    """Where a path from a value ends: an operand of an equation that is no change of view."""

    eqn: Equation
    position: int
    axes: tuple[Axis, ...]


class _Roles(NamedTuple):
    stack: Axis
    inputs: Axis
    outputs: Axis


class NotFactored(Exception):
    """A leaf is not a factor of products alone; the message says why."""


def layouts(
    program: Program, wanted: Sequence[Any], find: Find, leaves: Sequence[Value]
) -> list[Layout]:
    """The layout of each of the inputs of a program, all of which are differentiated."""
    steps = plan(program, leaves, wanted, find)
    readers = reads(steps)
    found = [_layout(steps, readers, find, leaf) for leaf in leaves]
    ends = [
        {end.eqn for end in arrivals(readers, leaf, row_major(layout.shape))}
        if layout.factored
        else set()
        for leaf, layout in zip(leaves, found, strict=True)
    ]
    last = _last(steps, set().union(*ends))
    return [
        dataclasses.replace(layout, last=layout.factored and eqns <= last)
        for layout, eqns in zip(found, ends, strict=True)
    ]


def _last(steps: Plan, layers: set[Equation]) -> set[Equation]:
    """The products whose result no other layer reads, directly or not."""
    last = {eqn for eqn in layers if not eqn.bodies}
    before: dict[Any, set[Equation]] = {}
    for eqn in steps.rules:
        behind = set().union(*(before.get(v, ()) for v in eqn.inputs))
        if eqn in layers:
            last -= behind
            behind = {eqn}
        before.update(dict.fromkeys(eqn.outputs, behind))
    return last


def _layout(steps: Plan, readers: Readers, find: Find, leaf: Value) -> Layout:
    shape = tuple(leaf.shape)
    if not all(isinstance(n, int) and n > 0 for n in shape):
        return Layout(shape, reason="its shape is symbolic or empty")
    try:
        roles = _roles(steps, readers, find, leaf, row_major(shape))
        stack, inputs, outputs = _per_axis(shape, roles)
        return Layout(shape, stack, inputs, outputs)
    except NotFactored as error:
        return Layout(shape, reason=str(error))


def reads(steps: Plan) -> Readers:
    """Which equations on a path read a value, and as which operand."""
    readers: Readers = defaultdict(list)
    for eqn in steps.rules:
        for i, value in enumerate(eqn.inputs):
            readers[value].append((eqn, i))
    return readers


def arrivals(readers: Readers, value: Value, axes: tuple[Axis, ...]) -> Iterator[Arrival]:
    """Where the paths from a value lead through changes of view."""
    for eqn, position in readers.get(value, ()):
        onward = viewed(eqn, axes)
        if onward is None:
            yield Arrival(eqn, position, axes)
        else:
            yield from arrivals(readers, eqn.outputs[0], onward)


def _roles(
    steps: Plan, readers: Readers, find: Find, value: Value, axes: tuple[Axis, ...]
) -> _Roles:
    """The roles of a value's spans, the same in each of its products."""
    found = {_at(steps, find, end) for end in arrivals(readers, value, axes)}
    if not found:
        raise NotFactored("nothing that the loss depends on reads it")
    if len(found) > 1:
        raise NotFactored("its products sum over different axes of it")
    return found.pop()


def _at(steps: Plan, find: Find, end: Arrival) -> _Roles:
    eqn, position, axes = end
    rule = steps.rules[eqn]
    if isinstance(rule, Multilinear) and eqn.name in PRODUCTS:
        return _of_product(eqn, position, axes)
    if not isinstance(rule, ControlFlow):
        raise NotFactored(f"{_jaxpr.label(eqn)!r} reads it")
    stack: Axis = ()
    if eqn.name == "scan":
        _, carry, xs = _jaxpr.scan_groups(eqn)
        if position in carry:
            raise NotFactored("a loop hands it from step to step")
        if position in xs:
            stack, axes = axes[0], axes[1:]
    inside = [_inside(steps, find, eqn, i, position, axes) for i in range(len(eqn.bodies))]
    found = {roles for roles in inside if roles is not None}
    if len(found) != 1:
        raise NotFactored(f"the branches of {eqn.name} sum over different axes of it")
    roles = found.pop()
    return roles._replace(stack=canonical(stack + roles.stack))


def _inside(
    steps: Plan, find: Find, eqn: Equation, which: int, position: int, axes: tuple[Axis, ...]
) -> _Roles | None:
    """The roles within a body; None if it does not read the operand."""
    body = eqn.bodies[which]
    paths = loop(eqn, body, steps.active, steps.active, find)
    program = body.program
    inner = plan(program, paths.moving, [program.outputs[i] for i in sorted(paths.wanted)], find)
    value = program.inputs[list(body.inputs).index(position)]
    readers = reads(inner)
    if not readers.get(value):
        return None
    if eqn.name == "shard_map":
        return _on_each_device(
            eqn, position, axes, lambda local: _roles(inner, readers, find, value, local)
        )
    return _roles(inner, readers, find, value, axes)


def _on_each_device(
    eqn: Equation,
    position: int,
    axes: tuple[Axis, ...],
    inside: Callable[[tuple[Axis, ...]], _Roles],
) -> _Roles:
    """The roles in ``shard_map``, where the value has other strides."""
    if axes != row_major(eqn.inputs[position].shape):
        raise NotFactored("shard_map reads a transpose or reshape of it")
    (body,) = eqn.bodies
    local = row_major(body.program.inputs[position].shape)
    groups = [_axes_of(local, spans) for spans in inside(local)]
    spec = eqn.params["in_specs"][position]
    sharded = {i for i, name in enumerate(spec) if name not in (None, ())}
    # The arrays of a structured spread have one axis for all axes of a role.
    if sharded.intersection((*groups[0][1:], *groups[1], *groups[2][1:])):
        raise NotFactored("shard_map shards its inputs, or not the first of its output axes")
    return _Roles(*(canonical(tuple(s for i in group for s in axes[i])) for group in groups))


def _of_product(eqn: Equation, position: int, axes: tuple[Axis, ...]) -> _Roles:
    def joined(dims: Sequence[int]) -> Axis:
        return tuple(itertools.chain.from_iterable(axes[i] for i in dims))

    if eqn.inputs[0] is eqn.inputs[1]:
        raise NotFactored("it is multiplied by itself")
    if eqn.name == "dot_general":
        contract, batch = (sides[position] for sides in eqn.params["dimension_numbers"])
        if not contract:
            raise NotFactored("its product sums over none of its axes")
        free = [i for i in range(len(axes)) if i not in (*contract, *batch)]
        return _Roles(*(canonical(joined(dims)) for dims in (batch, contract, free)))
    if position == 0:
        raise NotFactored("it is the image of a convolution")
    if eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        raise NotFactored("its convolution is grouped")
    of_outputs, *of_inputs = eqn.params["dimension_numbers"].rhs_spec
    return _Roles((), canonical(joined(of_inputs)), canonical(joined([of_outputs])))


def _per_axis(shape: tuple[int, ...], roles: _Roles) -> list[tuple[int, ...]]:
    """The axes of a leaf of each role."""
    axes = row_major(shape)
    role: dict[int, int] = {}
    for which, spans in enumerate(roles):
        role.update(dict.fromkeys(_axes_of(axes, spans), which))
    ones = [i for i, n in enumerate(shape) if n == 1]
    if ones and 1 not in role.values():
        role[ones.pop(0)] = 1
    for i in ones:  # Which role has an axis of size 1 makes no difference but in shapes.
        last = i == len(shape) - 1
        role[i] = 2 if last else role.get(i - 1, role.get(i + 1, 1))
    return [tuple(i for i in sorted(role) if role[i] == which) for which in range(3)]


def _axes_of(axes: Sequence[Axis], spans: Axis) -> list[int]:
    """The axes that consist of some of the spans."""
    found = []
    for i, axis in enumerate(axes):
        for hi, lo in axis:
            parts = [(min(hi, a), max(lo, b)) for a, b in spans if b < hi and lo < a]
            if math.prod(a // b for a, b in parts) == hi // lo:
                found.append(i)
            elif parts:
                raise NotFactored(f"its products sum over a part of axis {i}")
    return found
