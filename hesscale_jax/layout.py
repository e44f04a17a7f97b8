"""Where a leaf meets its product: pure graph analysis, no arithmetic.

A leaf is one factor of one product if a single path leads on from it, through changes of view and
into the loops and branches that it is handed to, and ends in a product.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Program, Value
from hesscale_jax.blocks import Plan, loop, plan
from hesscale_jax.factored import Axis, Layout, row_major, viewed
from hesscale_jax.rules.control_flow import ControlFlow
from hesscale_jax.rules.multilinear import multilinear

__all__ = ["Arrival", "arrival", "layouts", "reads"]

Find = Callable[[Equation], Any]
Readers = dict[Any, list[tuple[Equation, int]]]
PRODUCTS = ("dot_general", "conv_general_dilated")


class Arrival(NamedTuple):
    """Where the path from a value ends: an operand of an equation that is no change of view."""

    eqn: Equation
    position: int
    axes: tuple[Axis, ...]


class _Roles(NamedTuple):
    stack: Axis
    inputs: Axis
    outputs: Axis


class NotFactored(Exception):
    """A leaf is not one factor of one product; the message says why."""


def layouts(
    program: Program, wanted: Sequence[Any], find: Find, leaves: Sequence[Value]
) -> list[Layout]:
    """The layout of each of the inputs of a program, all of which are differentiated."""
    steps = plan(program, leaves, wanted, find)
    readers = reads(steps)
    found = [_layout(steps, readers, find, leaf) for leaf in leaves]
    ends = [
        arrival(readers, leaf, row_major(layout.shape)).eqn if layout.factored else None
        for leaf, layout in zip(leaves, found, strict=True)
    ]
    last = _last(steps, {eqn for eqn in ends if eqn is not None})
    return [
        dataclasses.replace(layout, last=eqn in last)
        for layout, eqn in zip(found, ends, strict=True)
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
        return Layout(shape, *_per_axis(shape, roles))
    except NotFactored as error:
        return Layout(shape, reason=str(error))


def reads(steps: Plan) -> Readers:
    """Which equations on a path read a value, and as which operand."""
    readers: Readers = defaultdict(list)
    for eqn in steps.rules:
        for i, value in enumerate(eqn.inputs):
            readers[value].append((eqn, i))
    return readers


def arrival(readers: Readers, value: Value, axes: tuple[Axis, ...]) -> Arrival:
    """Where the one path from a value leads; raises :class:`NotFactored` if there is not one."""
    while True:
        found = readers.get(value, ())
        if len(found) != 1:
            names = ", ".join(sorted({_jaxpr.label(eqn) for eqn, _ in found}))
            raise NotFactored(f"it is read {len(found)} times ({names})" if found else "not read")
        ((eqn, position),) = found
        onward = viewed(eqn, axes)
        if onward is None:
            return Arrival(eqn, position, axes)
        (value,), axes = eqn.outputs, onward


def _roles(
    steps: Plan, readers: Readers, find: Find, value: Value, axes: tuple[Axis, ...]
) -> _Roles:
    eqn, position, axes = arrival(readers, value, axes)
    rule = steps.rules[eqn]
    if rule is multilinear and eqn.name in PRODUCTS:
        return _of_product(eqn, position, axes)
    if isinstance(rule, ControlFlow):
        stack: Axis = ()
        if eqn.name == "scan":
            _, carry, xs = _jaxpr.scan_groups(eqn)
            if position in carry:
                raise NotFactored("a loop carries it from step to step")
            if position in xs:
                stack, axes = axes[0], axes[1:]
        found = {_inside(steps, find, eqn, i, position, axes) for i in range(len(eqn.bodies))}
        found.discard(None)
        if len(found) != 1:
            raise NotFactored(f"the branches of {eqn.name} use it in different ways")
        roles = found.pop()
        assert roles is not None
        return roles._replace(stack=stack + roles.stack)
    raise NotFactored(f"{_jaxpr.label(eqn)!r} reads it")


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
        local = tuple(value.shape)
        whole = _Sharded(eqn, position, axes, local)
        return whole.of(_roles(inner, readers, find, value, row_major(local)))
    return _roles(inner, readers, find, value, axes)


class _Sharded:
    """An operand of ``shard_map``, whose leaf has other strides on each device."""

    def __init__(
        self, eqn: Equation, position: int, axes: tuple[Axis, ...], local: tuple[int, ...]
    ) -> None:
        self._whole = axes
        if axes != row_major(eqn.inputs[position].shape):
            raise NotFactored("shard_map reads a transpose or reshape of it")
        self._local = row_major(local)
        spec = eqn.params["in_specs"][position]
        names = [*spec, *([None] * (len(axes) - len(spec)))]
        self._sharded = {i for i, name in enumerate(names) if name not in (None, ())}

    def of(self, roles: _Roles) -> _Roles:
        axes = [self._axes(spans) for spans in roles]
        if self._sharded.intersection(axes[1]):
            raise NotFactored("shard_map shards its inputs")
        return _Roles(*(tuple(s for i in group for s in self._whole[i]) for group in axes))

    def _axes(self, spans: Axis) -> list[int]:
        return _axes_of(self._local, spans)


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
        return _Roles(joined(batch), joined(contract), joined(free))
    if position == 0:
        raise NotFactored("it is the image of a convolution")
    if eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        raise NotFactored("its convolution is grouped")
    of_outputs, *of_inputs = eqn.params["dimension_numbers"].rhs_spec
    return _Roles((), joined(of_inputs), joined([of_outputs]))


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
            inside = [(a, b) for a, b in spans if a <= hi and b >= lo]
            covered = 1
            for a, b in inside:
                covered *= a // b
            if covered == hi // lo:
                found.append(i)
            elif inside or any(b < hi and lo < a for a, b in spans):
                raise NotFactored(f"its axis {i} is of the inputs in part")
    return found
