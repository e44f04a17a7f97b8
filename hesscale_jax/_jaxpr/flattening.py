"""From a jaxpr to a :class:`Program`: calls written out, equal equations merged."""

import functools
import itertools
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from hesscale_jax import _complex
from hesscale_jax._complex import Complex, is_complex
from hesscale_jax._jaxpr.binding import bind, evaluate, trace
from hesscale_jax._jaxpr.custom_rules import compute_the_same, expansion_by_rule, is_own, one_by_one
from hesscale_jax._jaxpr.inspection import inner_equations
from hesscale_jax._jaxpr.moves import Moves, are_plain
from hesscale_jax._jaxpr.numbers import Numbers
from hesscale_jax._jaxpr.parts import of_shape, real_aval, with_parts
from hesscale_jax._jaxpr.program import (
    CALLS,
    Constant,
    Equation,
    Program,
    Region,
    Value,
    as_closed,
    aval_of,
    called,
    is_inexact,
    literal,
    region_inside,
    scan_groups,
)
from hesscale_jax._jaxpr.rewriting import (
    ENTRYWISE,
    FEW,
    IMAGES,
    MOST_IN_ROW,
    MOST_IN_TABLE,
    PRODUCTS,
    REDUCES,
    REDUCTIONS,
    SCATTERS,
    SHORT,
    SMALL,
    all_rows_at_once,
    chooses,
    convolved_by_parts,
    count_entrywise,
    free_axes,
    maps_rows,
    multiplied_and_summed,
    multiplied_on,
    multiplied_out,
    rewritten_as,
    scattered_apart,
    selections_first,
    summed_on_log_scale,
)
from hesscale_jax._jaxpr.sizes import size
from hesscale_jax._jaxpr.sources import label

__all__ = ["flatten", "pure"]


def pure(function: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, list[Any]]:
    """The jaxpr of a function and its results at ``args``, without effects that are not needed."""
    closed = trace(function, *args)
    program = flatten(closed, effects=False)
    return closed, evaluate(program, args, program.outputs)


def flatten(
    closed: core.ClosedJaxpr,
    callers: tuple[core.JaxprEqn, ...] = (),
    effects: bool = True,
    apart: bool = True,
    ruled: Container[Any] = (),
    unroll: int = 0,
    given: Sequence[Any] = (),
) -> Program:
    """Write out nested calls, merge equal equations, drop what no output needs.

    The ``callers`` are the equations that ``closed`` is a parameter of, the innermost first. An
    equation with an effect is kept, unless ``effects`` are not wanted. A function with a ``jvp``
    rule of its own that acts entry by entry stands there once for each result, if they are to be
    taken ``apart``; one that mixes entries stands there as its rule says, unless its label is among
    the ``ruled``. Loops of no more equations than ``unroll`` over all steps are written out. For
    some of the inputs it may be ``given`` what they are: constants of few numbers are read in
    their place, and of one value at several places the first is.
    """
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    builder = _Builder(inputs, apart, ruled, unroll=unroll)
    numbers = Numbers({})
    first: dict[Any, Value] = {}  # the input that reads a value
    read = [
        x
        if isinstance(x, Constant) and numbers.of(x) is not None
        else first.setdefault(x if isinstance(x, Value) else v, v)
        for x, v in itertools.zip_longest(given, inputs)
    ]
    outputs = builder.inline(closed, read, callers)
    last = (*closed.jaxpr.eqns[-1:], *callers)
    outputs = [
        builder.together(x, var, last) for x, var in zip(outputs, closed.jaxpr.outvars, strict=True)
    ]
    return Program(inputs, _needed(builder.equations, outputs, effects), outputs)


class _Builder:
    """Collects equations, one for each distinct computation."""

    def __init__(
        self,
        inputs: Sequence[Value],
        apart: bool,
        ruled: Container[Any] = (),
        order: int = 2,
        unroll: int = 0,
    ) -> None:
        self.equations: list[Equation] = []
        self._unroll = unroll
        self._ruled = ruled
        self._order = order  # of the derivatives that are due
        self._inputs = frozenset(inputs)
        self._one_result = apart
        self._moving = set(filter(is_inexact, inputs))  # what may depend on an input
        self._images = set(inputs)  # what is affine in the inputs
        self._sums = set[Value]()  # functions of what reductions return, and of nothing else
        self._sharing = set[Value]()  # of other values too: their entries share a reduction
        self._alike: dict[Any, list[Equation]] = {}  # by primitive, mesh and operands
        self._constants: dict[Any, Constant] = {}
        self._transposed: dict[Value, Equation] = {}
        self._stacks: dict[Value, tuple[int, list[Any]]] = {}  # steps' results, side by side
        self._made: dict[Any, Equation] = {}
        self._numbers = Numbers(self._made)
        self._moves = Moves(self._made, self._numbers)

    def inline(
        self,
        closed: core.ClosedJaxpr,
        operands: Sequence[Any],
        callers: tuple[core.JaxprEqn, ...] = (),
        region: Region | None = None,
        written: bool = True,
        in_parts: bool = True,
    ) -> list[Any]:
        """Append the equations of ``closed``, ``written`` by the user or by this library.

        What is complex among the operands and the results may be ``in_parts``.
        """
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))
        env.update(zip(jaxpr.constvars, map(self._constant, closed.consts), strict=True))

        def read(atom: Any) -> Any:
            return self._constant(literal(atom)) if isinstance(atom, core.Literal) else env[atom]

        def joined(x: Any, var: Any) -> Any:
            return self.together(x, var, (eqn, *callers), region)

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            results: Sequence[Any]
            if eqn.primitive.name in CALLS:
                within = (eqn, *callers), region_inside(eqn, region)
                results = self.inline(called(eqn), inputs, *within, in_parts=in_parts)
            elif eqn.primitive.name == "scan" and maps_rows(eqn):
                mapped = trace(all_rows_at_once(eqn), *(v.aval for v in eqn.invars))
                results = self.inline(mapped, inputs, (eqn, *callers), region, in_parts=in_parts)
            elif eqn.primitive.name == "scan" and (looped := self._selections_first(eqn, inputs)):
                within = (eqn, *callers), region
                results = self.inline(looped, inputs, *within, written=False, in_parts=in_parts)
            elif eqn.primitive.name == "scan" and self._is_short(eqn, inputs):
                results = self._written_out(eqn, inputs, (eqn, *callers), region, in_parts)
            elif branch := self._branch(eqn, inputs):
                within = (eqn, *callers), region
                results = self.inline(branch, inputs[1:], *within, in_parts=in_parts)
            elif rewritten := rewritten_as(eqn):
                closed = trace(rewritten, *(v.aval for v in eqn.invars))
                results = self.inline(closed, inputs, (eqn, *callers), region, written=False)
            elif source := self._moves.unmoved(eqn, inputs):
                results = [source]
            elif eqn.primitive.name in SCATTERS and self._scatters_constants(inputs):
                apart = trace(scattered_apart(eqn), *(v.aval for v in eqn.invars))
                results = self.inline(apart, inputs, (eqn, *callers), region, written=False)
            elif stack := self._of_stack(eqn, inputs):
                results = [self._stack(*stack, (eqn, *callers), region)]
            elif reduced := self._of_reduced_stack(eqn, inputs):
                combined, parts = reduced
                results = self.inline(combined, parts, (eqn, *callers), region)
            elif in_parts and (form := self._form(eqn, inputs)):
                results = self._in_parts(eqn, form, inputs, (eqn, *callers), region)
            elif by_entries := self._by_entries(eqn, inputs):
                expanded = trace(by_entries(eqn), *(v.aval for v in eqn.invars))
                results = self.inline(expanded, inputs, (eqn, *callers), region, written=False)
            elif expansion := self._expansion(eqn, inputs):
                closed, operands = expansion
                order, self._order = self._order, 1
                results = self.inline(closed, operands, (eqn, *callers), region, written=False)
                self._order = order
            else:
                params = eqn.params
                inputs = tuple(map(joined, inputs, eqn.invars))
                if eqn.primitive.name == "dot_general":
                    params, inputs = self._without_transposes(params, inputs)
                if eqn.primitive.name in ("gather", "scatter", "scatter-add", "scatter-sub"):
                    inputs = (inputs[0], self._known(inputs[1]), *inputs[2:])
                elif eqn.primitive.name == "select_n":
                    inputs = (self._known(inputs[0]), *inputs[1:])
                sources = (eqn, *callers) if written else callers
                results = self._append(eqn, params, inputs, sources, region)
                if eqn.primitive.name == "stack" and are_plain(inputs):
                    self._stacks[results[0]] = params["axis"], list(inputs)
                several = self._one_result and len(results) > 1
                if several and self._made[results[0]].entrywise:
                    alone = trace(one_by_one(eqn), *(v.aval for v in eqn.invars))
                    each = iter(self.inline(alone, inputs, callers, region))
                    results = tuple(next(each) if is_inexact(v) else v for v in results)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _written_out(
        self, eqn: Any, inputs: tuple[Any, ...], callers: Any, region: Region | None, in_parts: bool
    ) -> list[Any]:
        """The steps of a loop, one after the other: a block may cross them."""
        consts, carry, xs = ([inputs[i] for i in group] for group in scan_groups(eqn))
        stacks: dict[int, list[Any]] = {}
        avals = [eqn.invars[i].aval for i in scan_groups(eqn)[2]]
        times = range(eqn.params["length"])
        for t in reversed(times) if eqn.params["reverse"] else times:
            part = trace(lambda *xs, t=t: [lax.index_in_dim(x, t, 0, False) for x in xs], *avals)
            here = self.inline(part, xs, callers, region)
            here = [self._entry(x, t, y) for x, y in zip(xs, here, strict=True)]
            step = as_closed(eqn.params["jaxpr"]), [*consts, *carry, *here]
            results = self.inline(*step, callers, region, in_parts=in_parts)
            carry, stacks[t] = results[: len(carry)], results[len(carry) :]
        if not times:
            empty = (np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[len(carry) :])
            return [*carry, *map(self._constant, empty)]
        stacked = zip(*(stacks[t] for t in times), strict=True)
        return [*carry, *(self._stack(0, list(parts), callers, region) for parts in stacked)]

    def _branch(self, eqn: Any, inputs: Sequence[Any]) -> core.ClosedJaxpr | None:
        """The branch that a ``cond`` takes, if it is known by a number, or is that of any device.

        ``jnp.diagonal`` has another within kernels (``mosaic``), where no loss is differentiated.
        """
        if eqn.primitive.name != "cond":
            return None
        platforms = eqn.params.get("branches_platforms") or ()
        of_devices = [i for i, names in enumerate(platforms) if names != ("mosaic",)]
        which = of_devices[0] if len(of_devices) == 1 else self._numbers.of(inputs[0])
        return None if which is None else as_closed(eqn.params["branches"][int(which)])

    def _selections_first(self, eqn: Any, inputs: Sequence[Any]) -> core.ClosedJaxpr | None:
        """A loop, after what each of its steps selects alike."""
        moving = [isinstance(x, Value) and x in self._moving for x in inputs]
        looped = selections_first(eqn, moving)
        return looped and trace(looped, *(v.aval for v in eqn.invars))

    def _is_short(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a loop is written out: of no step or one, or of few equations over all steps.

        Of several, it has to act entry by entry on what it carries. What its steps hand out is
        stacked; what they scan over may move only if another loop's steps have stacked it.
        """
        length = eqn.params["length"]
        _, carry, xs = scan_groups(eqn)
        if not isinstance(length, int) or eqn.effects:
            return False
        if length == 0:
            return all(isinstance(v.aval.dtype, np.dtype) for v in eqn.outvars)  # no keys
        closed = as_closed(eqn.params["jaxpr"])
        if length == 1 or sum(1 for _ in inner_equations(eqn.params)) * length <= self._unroll:
            return True
        moves = [isinstance(x, Value) and x in self._moving for x in inputs]
        scanned = [inputs[i] for i in xs if moves[i]]
        stacked = all(self._stacks.get(x, (None,))[0] == 0 for x in scanned)
        if len(eqn.outvars) == len(carry) and not chooses(closed) and not (scanned and stacked):
            return False  # A block leads through it.
        avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        if len(eqn.outvars) > len(carry) and (not stacked or any(map(is_complex, avals))):
            return False
        variables = closed.jaxpr.invars
        moving = {v for i, v in enumerate(variables) if moves[i] or i in carry}
        known = {variables[i] for i in xs if self._entry(inputs[i], 0, None) is not None}
        return count_entrywise(closed, moving, known) * length <= SHORT

    def _entry(self, table: Any, t: int, other: Any) -> Any:
        """A number of a table that is known, or the ``other``."""
        if len(table.shape) != 1 or (numbers := self._numbers.of(table)) is None:
            return other
        return self._constant(np.asarray(numbers)[t])

    def _stack(self, axis: int, parts: list[Any], callers: Any, region: Region | None) -> Any:
        """Values of one shape side by side along a new axis."""

        def stack(*parts: Any) -> Any:
            return lax.concatenate([lax.expand_dims(x, (axis,)) for x in parts], axis)

        (stacked,) = self.inline(trace(stack, *map(aval_of, parts)), parts, callers, region)
        self._stacks[stacked] = axis, parts
        return stacked

    def _of_stack(self, eqn: Any, inputs: Sequence[Any]) -> tuple[int, list[Any]] | None:
        """The stack that a slice or a transposition of one is."""
        axis, parts = self._stacks.get(inputs[0], (0, [])) if inputs else (0, [])
        params = eqn.params
        if not parts:
            return None
        if eqn.primitive.name == "slice":
            shapes = zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, strict=True)
            if any(n != m for i, (n, m) in enumerate(shapes) if i != axis):
                return None
            step = params["strides"][axis] if params["strides"] else 1
            some = parts[params["start_indices"][axis] : params["limit_indices"][axis] : step]
            return (axis, some) if some else None
        if eqn.primitive.name == "transpose":
            order = params["permutation"]
            rest = [i for i in order if i != axis]
            return (order.index(axis), parts) if rest == sorted(rest) else None
        return None

    def _of_reduced_stack(
        self, eqn: Any, inputs: Sequence[Any]
    ) -> tuple[core.ClosedJaxpr, list[Any]] | None:
        """What a sum or a product over a stack's axis is, of the parts."""
        axis, parts = self._stacks.get(inputs[0], (0, [])) if inputs else (0, [])
        combine, reduce = REDUCES.get(eqn.primitive.name, (None, None))
        if not parts or reduce is None or axis not in eqn.params["axes"]:
            return None
        others = tuple(i - (i > axis) for i in eqn.params["axes"] if i != axis)

        def combined(*parts: Any) -> Any:
            result = functools.reduce(combine, parts)
            return reduce(result, others) if others else result

        return trace(combined, *map(aval_of, parts)), parts

    def _expansion(self, eqn: Any, inputs: Sequence[Any]) -> Any:
        """What computes a function with a ``jvp`` rule of its own that mixes entries, by its rule.

        Returns:
          A jaxpr and its operands, if all of it may belong to a block; else ``None``.
        """
        if eqn.primitive.name != "custom_jvp_call" or not self._one_result:
            return None
        values = [v for v in inputs if isinstance(v, Value)]
        moving = [i for i, v in enumerate(inputs) if v in self._moving]
        outputs = tuple(Value(v.aval) for v in eqn.outvars)
        call = Equation(eqn.primitive, eqn.params, tuple(inputs), outputs, (eqn,))
        if not moving or not all(map(is_inexact, outputs)):
            return None
        if is_own(call) or label(call) in self._ruled or call.entrywise:
            return None
        if any(is_complex(v.aval) for v in (*values, *outputs)):
            return None
        closed = trace(expansion_by_rule(call, moving, self._order), *(v.aval for v in values))
        trial = _Builder(values, True, self._ruled, order=1)
        trial._moving.intersection_update(inputs[i] for i in moving)
        trial.inline(closed, values)
        return (closed, values) if trial.all_in_blocks() else None

    def all_in_blocks(self) -> bool:
        """Whether all that moves may be computed in blocks."""
        return all(
            eqn.entrywise if eqn.name == "custom_jvp_call" else eqn.name in ENTRYWISE | REDUCTIONS
            for eqn in self.equations
            if not self._moving.isdisjoint(v for v in eqn.inputs if isinstance(v, Value))
        )

    def _by_entries(self, eqn: Any, inputs: Sequence[Any]) -> Callable[[Any], Any] | None:
        """What writes an equation out entry by entry, so that a block or a form may take it."""
        match eqn.primitive.name:
            case "dot_general":
                by_entries = self._contracts_everything(eqn, inputs) or self._weighs(eqn, inputs)
                return multiplied_and_summed if by_entries else None
            case "reduce_prod":
                return multiplied_out if self._has_few(eqn, inputs, eqn.params["axes"]) else None
            case "cumprod":
                few = self._has_few(eqn, inputs, [eqn.params["axis"]])
                return multiplied_on if few else None
            case "cumlogsumexp":
                few = self._has_few(eqn, inputs, [eqn.params["axis"]], MOST_IN_ROW)
                return summed_on_log_scale if few else None
            case "conv_general_dilated":
                return convolved_by_parts if self._are_few_images(eqn, inputs) else None
        return None

    def _contracts_everything(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a ``dot_general`` has no free axes, as in ``einsum('bd,bd->b')`` and ``vdot``.

        An axis of size 1 is none, except in a layer: one unit, applied to one example. What is
        multiplied by a scalar has no free axes either, if both move.
        """
        if not all(v.aval.shape for v in eqn.invars):
            return all(isinstance(x, Value) and x in self._moving for x in inputs)
        free = free_axes(eqn)
        layer = all(free) and any(map(self._is_given, inputs))
        return not layer and all(
            v.aval.shape[i] == 1 for v, axes in zip(eqn.invars, free, strict=True) for i in axes
        )

    def _weighs(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a ``dot_general`` adds up something curved, weighted by a constant vector.

        Or by a small matrix, if what is curved is a vector. The vector may move too if one of both
        shares a reduction among its entries, as a softmax does.
        """
        moving = [x for x in inputs if isinstance(x, Value) and x in self._moving]
        curved = {x for x in moving if x not in self._images}
        if not curved or (len(moving) == 2 and curved.isdisjoint(self._sharing)):
            return False
        for k, axes in enumerate(free_axes(eqn)):
            weights, other = eqn.invars[k].aval, inputs[1 - k]
            entries = math.prod(other.shape)
            small = isinstance(entries, int) and entries <= SMALL and len(moving) == 1
            if (other in curved or small) and math.prod(weights.shape[i] for i in axes) == 1:
                return True
        return False

    def _is_given(self, x: Any) -> bool:
        """Whether a value is an input, or one in another dtype."""
        while x in self._made and self._made[x].name == "convert_element_type":
            (x,) = self._made[x].inputs
        return x in self._inputs

    def _has_few(
        self, eqn: Any, inputs: Sequence[Any], axes: Sequence[int], most: int = FEW
    ) -> bool:
        """Whether few entries that move are combined: a block may take them as one value's."""
        count = math.prod(eqn.invars[0].aval.shape[i] for i in axes)
        moves = isinstance(inputs[0], Value) and inputs[0] in self._moving
        return isinstance(count, int) and 0 < count <= most and moves

    def _are_few_images(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether both operands are images of inputs, and small."""
        counts = [math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)]
        entries = math.prod(counts)
        small = isinstance(entries, int) and 0 < entries <= MOST_IN_TABLE
        return small and all(isinstance(x, Value) and x in self._images for x in inputs)

    def _scatters_constants(self, inputs: Sequence[Any]) -> bool:
        """Whether what moves is added to or multiplied by what does not, at some places."""
        moves = [isinstance(x, Value) and x in self._moving for x in inputs]
        return moves[0] and not any(moves[1:])

    def _append(
        self,
        eqn: Any,
        params: dict[str, Any],
        inputs: tuple[Any, ...],
        sources: Any,
        region: Region | None,
    ) -> tuple[Value, ...]:
        key = eqn.primitive, eqn.ctx.cur_abstract_mesh, *map(id, inputs)
        alike = self._alike.setdefault(key, [])
        outputs = tuple(Value(v.aval) for v in eqn.outvars)
        new = Equation(eqn.primitive, params, inputs, outputs, sources, region, self._ruled)
        if new.name == "transpose":
            self._transposed[outputs[0]] = new
        if not eqn.effects:
            for old in alike:
                if compute_the_same(old, new):
                    return old.outputs
            alike.append(new)
        self.equations.append(new)
        self._made.update(dict.fromkeys(outputs, new))
        moves = not self._moving.isdisjoint(v for v in inputs if isinstance(v, Value))
        if moves and new.name != "stop_gradient":
            self._moving.update(filter(is_inexact, outputs))
            if self._is_linear(new):
                self._images.update(outputs)
            self._note_sharing(new)
        return new.outputs

    def _note_sharing(self, eqn: Equation) -> None:
        """Take note of results whose entries share what a reduction added up."""
        moving = [v for v in eqn.inputs if isinstance(v, Value) and v in self._moving]
        sums = [v in self._sums for v in moving]
        repeated = any(size(y.sizes) > size(moving[0].sizes) for y in eqn.outputs)
        if eqn.name in REDUCTIONS or (eqn.name in ENTRYWISE and all(sums) and not repeated):
            self._sums.update(eqn.outputs)
        elif eqn.name in ENTRYWISE and (any(sums) or not self._sharing.isdisjoint(moving)):
            self._sharing.update(eqn.outputs)

    def _is_linear(self, eqn: Equation) -> bool:
        """Whether an equation is affine in the inputs."""
        moving = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value) and v in self._moving]
        linear = len(moving) == 1 or eqn.name not in PRODUCTS
        linear = linear and (eqn.name != "div" or moving == [0])
        return linear and eqn.name in IMAGES and all(eqn.inputs[i] in self._images for i in moving)

    # Complex values: in parts where they may depend on an input, else as they are

    def _form(self, eqn: Any, operands: Sequence[Any]) -> Any:
        """How to compute the parts of an equation's results, if that is what is due."""
        if not any(is_complex(v.aval) for v in (*eqn.invars, *eqn.outvars)):
            return None
        if eqn.primitive.name in ("real", "imag") and not isinstance(operands[0], Complex):
            return None
        if eqn.primitive.name in ("broadcast_in_dim", "complex", "convert_element_type"):
            # A part that is a number is known to be.
            return _complex.FORMS[eqn.primitive.name]
        if self._moving.isdisjoint(x for x in jax.tree.leaves(operands) if isinstance(x, Value)):
            return None
        return _complex.FORMS.get(eqn.primitive.name) or with_parts(eqn)

    def _in_parts(
        self, eqn: Any, form: Any, operands: Sequence[Any], callers: Any, region: Region | None
    ) -> list[Any]:
        """Append the equations that compute the parts of the results."""
        inputs, outputs = (tuple(Value(v.aval) for v in vs) for vs in (eqn.invars, eqn.outvars))
        equation = Equation(eqn.primitive, eqn.params, inputs, outputs, callers, region)
        apart = [
            self._apart(x, v, callers, region) if is_complex(v.aval) else x
            for x, v in zip(operands, inputs, strict=True)
        ]
        leaves, tree = jax.tree.flatten(apart)
        avals = [v.aval for x, v in zip(apart, eqn.invars, strict=True) for _ in jax.tree.leaves(x)]
        read = [i for i, x in enumerate(leaves) if not isinstance(x, float)]
        results: list[Any] = []

        def of_arrays(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for i, array in zip(read, arrays, strict=True):
                filled[i] = array
            bound = functools.partial(bind, equation)
            found = form(equation, bound, *jax.tree.unflatten(tree, filled))
            found = [found] if len(outputs) == 1 else found
            results[:] = [of_shape(x, v) for x, v in zip(found, outputs, strict=True)]
            return [x for x in jax.tree.leaves(results) if not isinstance(x, float)]

        traced = trace(of_arrays, *(real_aval(avals[i]) for i in read))
        made = iter(self.inline(traced, [leaves[i] for i in read], callers, region, written=False))
        return jax.tree.map(lambda x: x if isinstance(x, float) else next(made), results)

    def _apart(self, x: Any, value: Value, callers: Any, region: Region | None) -> Complex:
        """The parts of a complex value."""
        if isinstance(x, Complex):
            return x
        if isinstance(x, Constant) and np.ndim(x.value) == 0 and not isinstance(x.value, jax.Array):
            return Complex(float(np.real(x.value)), float(np.imag(x.value)))
        parts = trace(lambda z: tuple(_complex.apart(z)), value.aval)
        return Complex(*self.inline(parts, [x], callers, region, written=False, in_parts=False))

    def together(self, x: Any, var: Any, callers: Any, region: Region | None = None) -> Any:
        """A value in parts as one, any other as it is."""
        if not isinstance(x, Complex):
            return x
        read = [part for part in x if not isinstance(part, float)]

        def whole(*arrays: Any) -> Any:
            left = iter(arrays)
            parts = Complex(*(part if isinstance(part, float) else next(left) for part in x))
            if isinstance(x.im, float) and x.im == 0.0:
                parts = _complex.filled(parts, var.aval)
                return lax.convert_element_type(parts.re, var.aval.dtype)
            return _complex.together(_complex.filled(parts, var.aval))

        traced = trace(whole, *(real_aval(var.aval) for _ in read))
        (z,) = self.inline(traced, read, callers, region, written=False, in_parts=False)
        return z

    def _without_transposes(
        self, params: dict[str, Any], inputs: tuple[Any, ...]
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """A ``dot_general`` of what its operands are transposed from, as in ``x.T @ x``."""
        numbers = [list(sides) for sides in params["dimension_numbers"]]
        operands = list(inputs)
        for side, operand in enumerate(inputs):
            if isinstance(operand, Value) and operand in self._transposed:
                eqn = self._transposed[operand]
                axes = eqn.params["permutation"]
                taken = {i for sides in numbers for i in sides[side]}
                free = [axis for i, axis in enumerate(axes) if i not in taken]
                if free == sorted(free):  # The result has them in this order.
                    for sides in numbers:
                        sides[side] = tuple(axes[i] for i in sides[side])
                    operands[side] = eqn.inputs[0]
        return params | {"dimension_numbers": tuple(map(tuple, numbers))}, tuple(operands)

    def _known(self, x: Any) -> Any:
        """Positions, or choices, as a constant, if they are computed of numbers alone."""
        if isinstance(x, Constant) or any(x.aval.sharding.spec):
            return x
        numbers = self._numbers.of(x)
        return x if numbers is None else self._constant(np.asarray(numbers))

    def _constant(self, value: Any) -> Constant:
        """One object per literal, so that equal operands are identical."""
        key: Any = id(value)
        if np.ndim(value) == 0 and not isinstance(value, jax.Array | jax.Ref):
            # Bit by bit: 0.0 and -0.0 are equal, but not the same operand.
            key = (type(value), np.asarray(value).dtype, np.asarray(value).tobytes())
        return self._constants.setdefault(key, Constant(value))


def _needed(equations: list[Equation], outputs: Sequence[Any], effects: bool) -> list[Equation]:
    """The equations that an output depends on, or that have an effect."""
    wanted = set(map(id, outputs))
    kept = []
    for eqn in reversed(equations):
        if (effects and eqn.sources[0].effects) or any(id(v) in wanted for v in eqn.outputs):
            wanted.update(map(id, eqn.inputs))
            kept.append(eqn)
    return kept[::-1]
