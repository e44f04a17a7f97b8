"""The analysis of a program: its paths, its blocks, and how these lead through loops.

A loop belongs to a block if its body is one, in which the carries start and end at the same spans,
what is read at every step lies along them, and nothing that a step hands on takes in a sum over
either. What is scanned over enters step by step, and has no place in the frame. If what the steps
hand out is known as images, the loop is in no block.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation, Program, Value, size
from hesscale_jax.blocks import Block, DoesNotFit, Plan, Through
from hesscale_jax.grouping import Grouping
from hesscale_jax.paths import loop, on_paths
from hesscale_jax.rules.control_flow import scan
from hesscale_jax.rules.selection import Reduction
from hesscale_jax.segments import segmented
from hesscale_jax.slopes import are_few, is_linear

__all__ = ["plan"]


# How often blocks are looked at again for where they are to end, and how many values are tried.
ROUNDS, TRIED = 8, 64


def plan(
    program: Program,
    moving: Iterable[Value],
    wanted: Iterable[Any],
    find: Callable[[Equation], Any],
) -> Plan:
    """Analyse a program.

    Args:
      program: The program.
      moving: The inputs that have a shift or a spread.
      wanted: The outputs whose moments are asked for.
      find: The rule of an equation, ``None`` if there is none.
    """
    active, rules = on_paths(program, moving, wanted, find)
    segments = segmented(program, rules, active)
    found = {eqn: _through(eqn, active, find) for eqn, rule in rules.items() if rule is scan}
    loops = {eqn: through for eqn, through in found.items() if through is not None}
    ends: set[Value] = set()
    blocks = Grouping(active, segments, loops, ends).run(rules)
    for _ in range(ROUNDS):
        more = set(_read_again(rules, blocks, active)) - ends
        if not more:
            break
        ends |= more
        blocks = Grouping(active, segments, loops, ends).run(rules)
    return Plan(active, rules, blocks, segments, loops)


def _read_again(
    rules: dict[Equation, Any], blocks: dict[Equation, Block], active: frozenset[Value]
) -> Iterator[Value]:
    """The values that blocks are to end with, since another block reads them again.

    Two blocks that share a value do not know how what one makes of it varies with it. If all that
    the first makes for the other is made of one value with independent entries, nothing is lost
    where it begins anew after that; and there both know.
    """
    members: dict[Block, list[Equation]] = {}
    for eqn, block in blocks.items():
        members.setdefault(block, []).append(eqn)
    made = {v: block for eqn, block in blocks.items() for v in eqn.outputs}
    read: dict[Block, set[Value]] = {}  # from elsewhere
    for eqn, block in blocks.items():
        others = (v for v in active.intersection(eqn.inputs) if made.get(v) is not block)
        read.setdefault(block, set()).update(others)
    for block, equations in members.items():
        if not (block.cut or block.along):
            parted = _Parted(block, equations, rules, active)
            yield from parted.ends(read, made)


class _Parted(NamedTuple):
    """A block, if it ended with one of its values."""

    block: Block
    equations: list[Equation]
    rules: dict[Equation, Any]
    active: frozenset[Value]

    def ends(self, read: dict[Block, set[Value]], made: dict[Value, Block]) -> Iterator[Value]:
        """Where it is to end, for what each block reads from elsewhere, and what makes values."""
        own = {v for eqn in self.equations for v in eqn.outputs}
        later = [values for values in read.values() if not values.isdisjoint(own)]
        for handed_on in (values & own for values in later):
            if len(handed_on) > 1:
                yield from self._last(reversed(self.equations), handed_on)

        def origins(values: Iterable[Value]) -> set[Any]:
            return {made.get(v, v) for v in values}

        here = read[self.block]
        before = {made[v] for v in here if v in made}
        meets = len(before) > 1 or any(read[block] & here for block in before)
        if meets or any(origins(values) & origins(here) for values in later):
            first = (e for e in reversed(self.equations) if own.isdisjoint(e.inputs))
            sums = (e for e in first if isinstance(self.rules[e], Reduction))
            yield from self._last(sums, set())

    def _last(self, equations: Iterable[Equation], handed_on: set[Value]) -> Iterator[Value]:
        """The first of some equations' results after which it may end, if it is soon found."""
        results = (v for eqn in equations for v in eqn.outputs if v in self.block.spans)
        found = (v for v in itertools.islice(results, TRIED) if self.is_apart(v, handed_on))
        yield from itertools.islice(found, 1)

    def is_apart(self, end: Value, handed_on: set[Value]) -> bool:
        """Whether these are made of the value, and it of other sources than what is beside it."""
        before, first = {end}, [e for e in self.equations if end in e.outputs]
        for eqn in reversed(self.equations):
            if not before.isdisjoint(eqn.outputs):
                before |= self.active.intersection(eqn.inputs)
                first.append(eqn)
        own = {v for eqn in self.equations for v in eqn.outputs}
        if not self._is_independent(end, before - own, first):
            return False
        beside, after = before - {end}, {end}
        for eqn in self.equations:
            operands = self.active.intersection(eqn.inputs)
            if end in eqn.outputs:
                continue
            if after.isdisjoint(operands):
                if not beside.isdisjoint(operands):
                    beside.update(eqn.outputs)
                continue
            if not beside.isdisjoint(operands - after):
                return False
            after.update(eqn.outputs)
        return handed_on <= after

    def _is_independent(self, end: Value, sources: set[Value], equations: list[Equation]) -> bool:
        """Whether no two entries of the value are made of one entry of its sources.

        Those of a sum may be, as those of a product are.
        """
        if any(isinstance(self.rules[eqn], Reduction) for eqn in equations):
            return self.block.leaves_clean(end)
        spans, axes_along = self.block.spans, self.block.axes_along
        axes = set(axes_along(spans[end]))
        return all(x in spans and axes.issubset(axes_along(spans[x])) for x in sources)


def _through(
    eqn: Equation, active: frozenset[Value], find: Callable[[Equation], Any]
) -> Through | None:
    """How a block leads through a loop; ``None`` if it does not."""
    (body,) = eqn.bodies
    consts, carry, xs = _jaxpr.scan_groups(eqn)
    length = eqn.params["length"]
    if eqn.sources[0].effects or not isinstance(length, int) or length == 0:
        return None
    if _hands_out_images(eqn, active):
        return None
    inputs, outputs = body.program.inputs, body.program.outputs
    paths = loop(eqn, body, active, active, find)
    wanted = [outputs[i] for i in sorted(paths.wanted)]
    steps = plan(body.program, paths.moving, wanted, find)
    block = _one(steps)
    if block is None or block.along is not None:
        return None
    steps = dataclasses.replace(steps, blocks=dict.fromkeys(steps.rules, block))

    first = carry.start
    carries = [i for i in range(len(carry)) if outputs[i] in steps.active]
    read = [i for i in (*consts, *carry) if inputs[i] in steps.active]
    scanned = [eqn.inputs[i] for i in xs if inputs[i] in steps.active]
    lying = [*(inputs[i] for i in read), *(outputs[i] for i in carries)]
    moving = {i: eqn.inputs[i] for i in read if eqn.inputs[i] in active}
    if (
        not carries
        or any(v not in block.spans for v in lying)
        or any(i in carry and i - first not in carries for i in read)
        or any(
            block.spans[inputs[i]] != block.spans[outputs[i - first]] for i in read if i in carry
        )
        or len({*scanned, *moving.values()}) < len(scanned) + len({*moving.values()})
    ):
        return None
    guide = max(carries, key=lambda i: size(outputs[i].sizes))
    axes = block.axes_along(block.spans[outputs[guide]])
    operands = {x: block.spans[inputs[i]] for i, x in moving.items()}
    if any(operands[x] != block.spans[inputs[i]] for i, x in moving.items()):
        return None
    if any(axis not in axes for v in lying for axis in block.axes_along(block.spans[v])):
        return None
    scanned_in = {inputs[i]: i for i in xs if inputs[i] in steps.active}
    depends, summed = _dependencies(steps, {inputs[i]: i for i in read}, scanned_in)
    view = block.view(axes)
    across = any(view[axis] != 1 for axis in block.reduced)  # else no sum is over a carry
    if across and any(outputs[i] in summed for i in carries):
        return None
    reach = {i: depends[outputs[i]] for i in carries}
    while True:
        more = {
            i: found.union(*(reach[j - first] for j in found if j in carry))
            for i, found in reach.items()
        }
        if more == reach:
            break
        reach = more
    return Through(
        plan=steps,
        block=block,
        guide=guide,
        axes=axes,
        operands=operands,
        carries={i: block.spans[outputs[i]] for i in carries},
        scanned=frozenset(scanned),
        depends={
            i: list(dict.fromkeys(moving[j] for j in sorted(found | {first + i}) if j in moving))
            for i, found in reach.items()
        },
        fed=frozenset(i for i, found in reach.items() if not found.isdisjoint(xs)),
        sums=across and not summed.isdisjoint(wanted),
    )


def _hands_out_images(eqn: Equation, active: frozenset[Value]) -> bool:
    """Whether what a loop's steps hand out is known as images: how it varies along them, too."""
    _, carry, _ = _jaxpr.scan_groups(eqn)
    into, wanted = (
        [i for i, v in enumerate(vs) if v in active] for vs in (eqn.inputs, eqn.outputs)
    )
    hands_out = bool(wanted) and wanted[-1] >= len(carry)
    return hands_out and is_linear(eqn, into) and are_few(eqn, into, wanted)


def _one(steps: Plan) -> Block | None:
    """One block of all of a program's blocks, if all equations on a path are in one."""
    blocks = dict.fromkeys(steps.blocks.get(eqn) for eqn in steps.rules)
    if not blocks or any(block is None or block.cut for block in blocks):
        return None
    one, *others = sorted(filter(None, blocks), key=lambda block: -block.entries)
    try:
        for other in others:
            if other.entries not in (1, one.entries):
                raise DoesNotFit
            one.absorb({other: lambda span: span}, {})
    except DoesNotFit:
        return None
    return one


def _dependencies(
    steps: Plan, local: dict[Value, int], others: dict[Value, int]
) -> tuple[dict[Value, frozenset[int]], set[Value]]:
    """The sources that each value depends on, and the values that take in sums over local ones."""
    depends = {v: frozenset([i]) for v, i in (*local.items(), *others.items())}
    summed: set[Value] = set()
    for eqn, rule in steps.rules.items():
        operands = [v for v in eqn.inputs if v in steps.active]
        if through := steps.loops.get(eqn):
            # A loop may be handed what no step reads.
            operands = [v for v in operands if v in through.operands or v in through.scanned]
        found = frozenset[int]().union(*(depends[v] for v in operands))
        depends.update(dict.fromkeys(eqn.outputs, found))
        sums = isinstance(rule, Reduction) and not found.isdisjoint(local.values())
        if sums or not summed.isdisjoint(operands):
            summed.update(eqn.outputs)
    return depends, summed
