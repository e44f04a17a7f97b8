"""Everything the library assumes about JAX's internals, in one place.

A traced loss becomes a :class:`Program`: a list of equations in which nested ``jit`` and
``checkpoint`` calls are written out, a value computed twice is computed once, and what no output
needs is left out. What else holds a jaxpr, such as ``scan``, has a :class:`Body`. Each assumption
made here is pinned by one test in ``tests/test_jaxpr_contracts.py``.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import sysconfig
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config, source_info_util
from jax._src import core as jax_core
from jax._src.interpreters import partial_eval
from jax._src.state.types import RefEffect
from jax.extend import core

from hesscale_jax import _complex
from hesscale_jax._complex import Complex, is_complex

__all__ = [
    "Body",
    "Constant",
    "Equation",
    "Program",
    "Region",
    "Value",
    "bind",
    "flatten",
    "label",
    "location",
    "trace",
]

# Calls that only group equations: they are written out, so that a block can cross their border.
CALLS = frozenset({"jit", "remat2", "checkpoint", "call", "closed_call", "eval_jaxpr"})

# What makes a complex value of its parts.
WHOLE = frozenset({"complex", "convert_element_type"})

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

# What combines all entries along axes, and how it combines two of them.
REDUCES: dict[str, tuple[Any, Any]] = {
    "reduce_prod": (lax.mul, lax.reduce_prod),
    "reduce_sum": (lax.add, lax.reduce_sum),
}

# What selects all of its operand's entries if the shapes are the same.
SELECTS_ALL = frozenset({"concatenate", "dynamic_slice", "pad", "reshape", "slice", "split"})
SELECTS_ALL |= {"transpose"}

VIEWS = frozenset({"reshape", "squeeze"})

# What may put entries back to where they were.
UNDOES = VIEWS | {"concatenate", "gather", "rev", "slice", "stack", "transpose"}

# The name of a function that has one of another's results begins so, as no name in Python can.
ONE_RESULT = "result."

# The most equations that a loop is written out to, those without derivatives by the quarter.
SHORT = 512

# Products of no more entries are written out.
FEW = 8

# A primitive of arrays or of types of its own that JAX expands to others, with its own derivative.
HIGH = "call_hi_primitive"

# Functions with a derivative rule of their own.
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})

# Where libraries are.
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """The result of an equation, or an input of the program. Equal only to itself."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in numbers that can be compared, for the analysis of a program."""
        return sizes(self.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


@dataclasses.dataclass(eq=False, slots=True)
class Constant:
    """An operand known while tracing: a literal, or an array the loss closes over."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    @property
    def dtype(self) -> Any:
        return self.value.dtype


@dataclasses.dataclass(eq=False, slots=True)
class Region:
    """A call of ``jax.checkpoint``: what is computed in it is computed again for the transpose."""

    options: dict[str, Any]  # of jax.checkpoint
    parent: "Region | None"


@dataclasses.dataclass(eq=False)
class Equation:
    """One application of a primitive: ``outputs = primitive(*inputs, **params)``."""

    primitive: core.Primitive
    params: dict[str, Any]
    inputs: tuple[Any, ...]  # each a Value or a Constant
    outputs: tuple[Value, ...]
    sources: tuple[core.JaxprEqn, ...]  # where it comes from, then the calls around it
    region: Region | None = None  # the innermost around it
    ruled: Container[Any] = ()  # what its programs take as it is

    @property
    def name(self) -> str:
        return self.primitive.name

    @functools.cached_property
    def entrywise(self) -> bool:
        """Whether it is a function with a rule of its own that acts entry by entry."""
        return acts_entrywise(self)

    @functools.cached_property
    def bodies(self) -> "tuple[Body, ...]":
        """The programs that it runs: a loop's, each branch's, a function's with its own rule."""
        return tuple(_bodies(self))


@dataclasses.dataclass(eq=False, slots=True)
class Program:
    """A function as equations in program order."""

    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Any]  # each a Value or a Constant


@dataclasses.dataclass(eq=False, slots=True)
class Body:
    """A program that an equation runs, once or in a loop.

    Attributes:
      program: The program. Its outputs are the equation's.
      inputs: Which operand of the equation each input of the program takes.
      carry: The outputs of a loop's step that are inputs of the next one: output -> input.
    """

    program: Program
    inputs: Sequence[int]
    carry: dict[int, int] = dataclasses.field(default_factory=dict)


# Tracing and binding


def trace(fun: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
    """The jaxpr of ``fun`` at the shapes and dtypes of ``args``."""
    return jax.make_jaxpr(fun)(*args)


def bind(eqn: Equation, *operands: Any, **changes: Any) -> Any:
    """Apply the equation's primitive to other operands, with ``changes`` to its parameters.

    Returns the result, or a list of them if the equation has not exactly one.
    """
    params = eqn.primitive.get_bind_params(eqn.params | changes)
    if eqn.primitive.name in CUSTOM:
        # A backward pass may index what it reads by traced numbers; NumPy's arrays do not allow it.
        operands = tuple(jax.device_put(x) if isinstance(x, np.ndarray) else x for x in operands)
    results = eqn.primitive.bind(*operands, **params)
    return results[0] if eqn.primitive.multiple_results and len(results) == 1 else results


def takes(eqn: Equation, operands: Sequence[Any]) -> bool:
    """Whether the equation can be applied to these, which are of other dtypes than its own."""
    other = any(x.dtype != v.dtype for x, v in zip(operands, eqn.inputs, strict=True))
    return other and "call_jaxpr" not in eqn.params


def listed(results: Any, eqn: Equation) -> list[Any]:
    """What :func:`bind` returned, one entry per output of the equation."""
    return [results] if len(eqn.outputs) == 1 else list(results)


def is_on_one_cpu(eqn: Equation, *operands: Any) -> bool:
    """Whether an equation runs on the CPU, as far as tracing tells, and on no mesh of several."""
    explicit = any(axis is not None for x in operands for axis in jax.typeof(x).sharding.spec)
    explicit = explicit or eqn.params.get("out_sharding") is not None
    several = jax.sharding.get_abstract_mesh().size > 1
    return is_on_cpu() and not explicit and not several


def is_on_cpu() -> bool:
    """Whether what is traced will run on the CPU, as far as tracing tells."""
    return jax.default_backend() == "cpu"


def stops_at_nans() -> bool:
    """Whether each function that runs is looked at for NaN or infinity."""
    return bool(config.debug_nans.value or config.debug_infs.value)


def multiply(a: Any, b: Any) -> Any:
    """``a * b`` for arrays of one rank, or floats."""
    return _without_dispatch(lax.mul, operator.mul, a, b)


def add(a: Any, b: Any) -> Any:
    """``a + b`` for arrays of one rank, or floats."""
    return _without_dispatch(lax.add, operator.add, a, b)


def _without_dispatch(bind: Any, operation: Any, a: Any, b: Any) -> Any:
    """NumPy's dispatch takes several times as long to trace as the primitive."""
    floats = isinstance(a, float), isinstance(b, float)
    if all(floats):
        return operation(a, b)
    a = np.asarray(a, b.dtype) if floats[0] else a
    b = np.asarray(b, a.dtype) if floats[1] else b
    return bind(a, b) if a.dtype == b.dtype else operation(a, b)


@contextlib.contextmanager
def context(eqn: Equation) -> Iterator[None]:
    """What is bound inside carries the user's line, name scope and settings of ``eqn``."""
    source = eqn.sources[0]
    info = source.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), source.ctx.manager:
        yield


def location(eqn: Equation) -> str:
    """Where the user wrote the equation: ``file.py:41 (function)``."""
    frame = user_frame(eqn)
    if frame is None:
        return "an unknown line"
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"


def user_frame(eqn: Equation) -> Any:
    """The innermost frame outside of installed libraries, if there is one, else the innermost.

    So a layer of a library is found where the user calls it. ``None`` if no frame is known.
    """
    frames = [
        frame
        for source in eqn.sources
        for frame in source_info_util.user_frames(source.source_info.traceback)
    ]
    outside = (frame for frame in frames if not frame.file_name.startswith(INSTALLED))
    return next(outside, frames[0] if frames else None)


def library_frame(eqn: Equation) -> Any:
    """The innermost frame, if it is in an installed library, else ``None``; JAX's are not known."""
    for source in eqn.sources:
        for frame in source_info_util.user_frames(source.source_info.traceback):
            return frame if frame.file_name.startswith(INSTALLED) else None
    return None


def label(eqn: Equation) -> str:
    """The primitive, with the name of the function that it runs: ``custom_vjp_call[f]``."""
    name: str | None
    match eqn.name:
        case "custom_jvp_call" | "custom_vjp_call":
            name = _wrapped(eqn) or _name(eqn)
        case "pallas_call" | "region":
            name = eqn.params["name"]
        case "ffi_call":
            name = eqn.params["target_name"]
        case _:
            name = None
    return f"{eqn.name}[{name}]" if name else eqn.name


def literal(atom: Any) -> Any:
    """The value of a literal, with a dtype: a ``bool`` of Python has none."""
    return atom.val if hasattr(atom.val, "dtype") else np.asarray(atom.val, atom.aval.dtype)


def has_effects(program: "Program") -> bool:
    """Whether running the program, or differentiating it, does more than to compute results."""
    return any(
        eqn.sources[0].effects
        or (eqn.name in CUSTOM and _with_derivative(eqn).effects)
        or any(has_effects(body.program) for body in eqn.bodies)
        for eqn in program.equations
    )


def run(eqn: Equation, *operands: Any) -> list[Any]:
    """What the equation computes, from operands that no derivative flows through."""
    with at_once() if eqn.sources[0].effects else contextlib.nullcontext():
        return listed(bind(eqn, *operands), eqn)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Outside of the trace of ``linear_transpose``, that splits what is known from what is linear.

    It has no rule for a branch that uses a mutable array.
    """
    trace = jax_core.trace_ctx.trace
    if isinstance(trace, partial_eval.JaxprTrace):
        with jax_core.set_current_trace(trace.parent_trace):
            yield
    else:
        yield


def evaluate(program: Program, operands: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    """What some of the values of a program are."""
    known = dict(zip(program.inputs, operands, strict=True))

    def read(atom: Value | Constant) -> Any:
        return atom.value if isinstance(atom, Constant) else known[atom]

    for eqn in program.equations:
        with context(eqn):
            known.update(zip(eqn.outputs, run(eqn, *map(read, eqn.inputs)), strict=True))
    return list(map(read, wanted))


def without_state(body: Body) -> tuple[Body, list[Value]]:
    """A body that is given what its equations with an effect return, and what that is."""
    program = body.program
    given = [v for eqn in program.equations if eqn.sources[0].effects for v in eqn.outputs]
    left = [eqn for eqn in program.equations if not eqn.sources[0].effects]
    program = Program([*program.inputs, *given], left, program.outputs)
    # Like the choice of the branch, the first operand, what is given does not move.
    return Body(program, [*body.inputs, *(0 for _ in given)]), given


def uses_state(eqn: Equation) -> bool:
    """Whether an equation reads or writes mutable arrays."""
    return any(isinstance(effect, RefEffect) for effect in eqn.sources[0].effects)


def pure(function: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, list[Any]]:
    """The jaxpr of a function and its results at ``args``, without effects that are not needed."""
    closed = trace(function, *args)
    program = flatten(closed, effects=False)
    return closed, evaluate(program, args, program.outputs)


def holds_callback(params: dict[str, Any]) -> bool:
    """Whether Python is called anywhere within the jaxprs of an equation."""
    return any("callback" in eqn.primitive.name for eqn in _equations(params))


def holds_custom_vjp(params: dict[str, Any]) -> bool:
    """Whether a function without a forward derivative is called within an equation's jaxprs."""
    return any(eqn.primitive.name == "custom_vjp_call" for eqn in _equations(params))


def holds_name(name: str, params: dict[str, Any]) -> bool:
    """Whether ``checkpoint_name`` gives a value this name within the jaxprs of an equation."""
    return any(
        eqn.primitive.name == "name" and eqn.params["name"] == name for eqn in _equations(params)
    )


def _equations(params: dict[str, Any]) -> Iterator[core.JaxprEqn]:
    """The equations of the jaxprs among parameters, and of those within."""
    for jaxpr in core.jaxprs_in_params(params):
        for eqn in jaxpr.eqns:
            yield eqn
            yield from _equations(eqn.params)


def with_constants(closed: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[Any]]:
    """A jaxpr that takes what it closes over as its first operands, and what that is."""
    count = len(closed.consts)

    def function(*operands: Any) -> list[Any]:
        given = core.ClosedJaxpr(closed.jaxpr, operands[:count])
        return core.jaxpr_as_fun(given)(*operands[count:])

    if not count:
        return closed, []
    return trace(function, *closed.consts, *closed.in_avals), list(closed.consts)


def hide_frames(file: str) -> None:
    """Leave the frames of a file out of where the user wrote an equation."""
    source_info_util.register_exclusion(file)


def complex_primitive(eqn: Equation) -> str | None:
    """The primitive on complex values at an equation; ``None`` if it has none.

    One that holds a jaxpr may have some off the path. An equation that makes a complex value of its
    parts is there for the sake of another.
    """
    if any(map(_holds_jaxpr, eqn.params.values())):
        return None
    values = (*(v for v in eqn.inputs if isinstance(v, Value)), *eqn.outputs)
    if not any(is_complex(v.aval) for v in values):
        return None
    return eqn.sources[0].primitive.name if eqn.name in WHOLE else label(eqn)


def _holds_jaxpr(parameter: Any) -> bool:
    if isinstance(parameter, tuple | list):
        return any(map(_holds_jaxpr, parameter))
    return isinstance(parameter, core.Jaxpr | core.ClosedJaxpr)


def _name(eqn: Equation) -> str:
    """The name of the function with a derivative rule of its own that an equation calls."""
    return eqn.params["call_jaxpr"].jaxpr.debug_info.func_name or ""


def _wrapped(eqn: Equation) -> str | None:
    """The name of the user's function that a wrapper of an installed library calls, if it does.

    ``equinox.filter_custom_vjp`` gives every function to JAX under the wrapper's own name.
    """
    for inner in eqn.params["call_jaxpr"].jaxpr.eqns[:1]:
        frames = list(source_info_util.user_frames(inner.source_info.traceback))
        for called, caller in itertools.pairwise(frames):
            if _last(caller) == _name(eqn) and caller.file_name.startswith(INSTALLED):
                return None if called.file_name.startswith(INSTALLED) else _last(called)
    return None


def _last(frame: Any) -> str:
    return str(frame.function_name).rsplit(".", 1)[-1]


def is_inexact(value: Value | Constant) -> bool:
    """Whether derivatives can flow through a value of this dtype."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


# Flattening


def flatten(
    closed: core.ClosedJaxpr,
    callers: tuple[core.JaxprEqn, ...] = (),
    effects: bool = True,
    apart: bool = True,
    ruled: Container[Any] = (),
    unroll: int = 0,
) -> Program:
    """Write out nested calls, merge equal equations, drop what no output needs.

    The ``callers`` are the equations that ``closed`` is a parameter of, the innermost first. An
    equation with an effect is kept, unless ``effects`` are not wanted. A function with a ``jvp``
    rule of its own that acts entry by entry stands there once for each result, if they are to be
    taken ``apart``; one that mixes entries stands there as its rule says, unless its label is among
    the ``ruled``. Loops of no more equations than ``unroll`` over all steps are written out.
    """
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    builder = _Builder(inputs, apart, ruled, unroll=unroll)
    outputs = builder.inline(closed, inputs, callers)
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
        self._alike: dict[Any, list[Equation]] = {}  # by primitive and operands
        self._constants: dict[Any, Constant] = {}
        self._transposed: dict[Value, Equation] = {}
        self._stacks: dict[Value, tuple[int, list[Any]]] = {}  # steps' results, side by side
        self._made: dict[Any, Equation] = {}
        self._known: dict[Any, Any] = {}  # what is computed of numbers alone, else None

    def inline(
        self,
        closed: core.ClosedJaxpr,
        operands: Sequence[Any],
        callers: tuple[core.JaxprEqn, ...] = (),
        region: Region | None = None,
        written: bool = True,
        in_parts: bool = True,
        steps: bool = False,
    ) -> list[Any]:
        """Append the equations of ``closed``, ``written`` by the user or by this library.

        What is complex among the operands and the results may be ``in_parts``. In ``steps`` of a
        loop that are written out, a branch is chosen now.
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
                within = (eqn, *callers), _region(eqn, region)
                results = self.inline(called(eqn), inputs, *within, in_parts=in_parts, steps=steps)
            elif eqn.primitive.name == "scan" and self._is_short(eqn, inputs):
                results = self._written_out(eqn, inputs, (eqn, *callers), region, in_parts)
            elif steps and eqn.primitive.name == "cond":
                which, *operands = inputs
                branch = _closed(eqn.params["branches"][int(self._number(which))])
                within = (eqn, *callers), region
                results = self.inline(branch, operands, *within, in_parts=in_parts, steps=True)
            elif _is_identity(eqn) and _sharded_alike(inputs[0], eqn.outvars[0]):
                results = inputs[:1]
            elif (source := self._undone(eqn, inputs)) and _sharded_alike(source, eqn.outvars[0]):
                results = [source]
            elif rewritten := _rewritten(eqn):
                closed = trace(rewritten, *(v.aval for v in eqn.invars))
                results = self.inline(closed, inputs, (eqn, *callers), region, written=False)
            elif stack := self._of_stack(eqn, inputs):
                results = [self._stack(*stack, (eqn, *callers), region)]
            elif reduced := self._of_reduced_stack(eqn, inputs):
                combined, parts = reduced
                results = self.inline(combined, parts, (eqn, *callers), region)
            elif in_parts and (form := self._form(eqn, inputs)):
                results = self._in_parts(eqn, form, inputs, (eqn, *callers), region)
            elif eqn.primitive.name == "dot_general" and self._contracts_everything(eqn, inputs):
                expanded = trace(_multiply_and_sum(eqn), *(v.aval for v in eqn.invars))
                results = self.inline(expanded, inputs, (eqn, *callers), region, written=False)
            elif eqn.primitive.name == "reduce_prod" and self._has_few(eqn, inputs):
                expanded = trace(_multiply(eqn), *(v.aval for v in eqn.invars))
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
                sources = (eqn, *callers) if written else callers
                results = self._append(eqn, params, inputs, sources, region)
                if eqn.primitive.name == "stack" and _are_plain(inputs):
                    self._stacks[results[0]] = params["axis"], list(inputs)
                several = self._one_result and len(results) > 1
                if several and acts_entrywise(self._made[results[0]]):
                    alone = trace(_one_by_one(eqn), *(v.aval for v in eqn.invars))
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
            step = _closed(eqn.params["jaxpr"]), [*consts, *carry, *here]
            results = self.inline(*step, callers, region, in_parts=in_parts, steps=True)
            carry, stacks[t] = results[: len(carry)], results[len(carry) :]
        stacked = zip(*(stacks[t] for t in times), strict=True)
        return [*carry, *(self._stack(0, list(parts), callers, region) for parts in stacked)]

    def _is_short(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a loop acts entry by entry on what it carries, in few equations over all steps.

        What the steps hand out is stacked, if it is a table's: if nothing moves that is scanned
        over.
        """
        length = eqn.params["length"]
        _, carry, xs = scan_groups(eqn)
        if not isinstance(length, int) or not length or eqn.effects:
            return False
        closed = _closed(eqn.params["jaxpr"])
        if sum(1 for _ in _equations(eqn.params)) * length <= self._unroll:
            return True
        if len(eqn.outvars) == len(carry) and not _chooses(closed):
            return False  # A block leads through it.
        avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        moves = [isinstance(x, Value) and x in self._moving for x in inputs]
        if len(eqn.outvars) > len(carry) and (
            any(moves[i] for i in xs) or any(map(is_complex, avals))
        ):
            return False
        variables = closed.jaxpr.invars
        moving = {v for i, v in enumerate(variables) if moves[i] or i in carry}
        known = {variables[i] for i in xs if self._entry(inputs[i], 0, None) is not None}
        return _count_entrywise(closed, moving, known) * length <= SHORT

    def _entry(self, table: Any, t: int, other: Any) -> Any:
        """A number of a table that is known, or the ``other``."""
        if len(table.shape) != 1 or (numbers := self._number(table)) is None:
            return other
        return self._constant(np.asarray(numbers)[t])

    def _number(self, atom: Any) -> Any:
        """What is computed of numbers alone; ``None`` if it is not, or is large."""
        if isinstance(atom, Constant):
            count = size(atom.shape)
            if not isinstance(count, int) or count > SHORT:
                return None
            return None if isinstance(atom.value, jax.core.Tracer | jax.Ref) else atom.value
        if atom not in self._known:
            self._known[atom] = self._computed(atom)
        return self._known[atom]

    def _computed(self, value: Value) -> Any:
        eqn = self._made.get(value)
        if eqn is None or eqn.sources[0].effects or eqn.name not in ENTRYWISE | {"iota"}:
            return None
        operands = list(map(self._number, eqn.inputs))
        if not isinstance(size(value.shape), int) or size(value.shape) > SHORT:
            return None
        if any(x is None for x in operands):
            return None
        with jax.ensure_compile_time_eval():
            return listed(bind(eqn, *operands), eqn)[eqn.outputs.index(value)]

    def _stack(self, axis: int, parts: list[Any], callers: Any, region: Region | None) -> Any:
        """Values of one shape side by side along a new axis."""

        def stack(*parts: Any) -> Any:
            return lax.concatenate([lax.expand_dims(x, (axis,)) for x in parts], axis)

        (stacked,) = self.inline(trace(stack, *map(_aval, parts)), parts, callers, region)
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

        return trace(combined, *map(_aval, parts)), parts

    def _undone(self, eqn: Any, inputs: Sequence[Any]) -> Any:
        """The value whose entries an equation puts back, if it undoes what moved them."""
        if eqn.primitive.name not in UNDOES or not _are_plain(inputs):
            return None
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        if name in ("gather", "rev"):
            axis, source, positions = self._taken(eqn, inputs)
            if source is not None and source.shape == shape:
                return source if (positions == np.arange(shape[axis])).all() else None
        if name == "concatenate" and (whole := [x for x in inputs if x.shape == shape]):
            return whole[0]  # beside what is empty
        made: list[Any] = [self._made.get(x) if isinstance(x, Value) else None for x in inputs]
        if not made or any(x is None for x in made):
            return None
        first, *others = made
        match name:
            case "reshape" | "squeeze" if first.name in VIEWS:
                return first.inputs[0] if first.inputs[0].shape == shape else None
            case "rev" if first.name == "rev":
                back = set(eqn.params["dimensions"]) == set(first.params["dimensions"])
                return first.inputs[0] if back else None
            case "transpose" if first.name == "transpose":
                there, here = first.params["permutation"], eqn.params["permutation"]
                back = all(there[axis] == i for i, axis in enumerate(here))
                return first.inputs[0] if back else None
            case "slice":
                return _placed(first).get(_slices(eqn))
            case "stack" if first.name == "unstack":
                back = all(x is first for x in others) and inputs == first.outputs
                back = back and eqn.params["axis"] == first.params["axis"]
                return first.inputs[0] if back else None
            case "stack":
                slices = [self._made.get(x.inputs[0]) for x in made if x.name in VIEWS]
                if len(slices) < len(made) or any(x is None or x.name != "slice" for x in slices):
                    return None
                return _joined_again(slices, eqn.params["axis"], shape)
            case "concatenate" if first.name == "split":
                back = all(x is first for x in others) and inputs == first.outputs
                back = back and eqn.params["dimension"] == first.params["axis"]
                return first.inputs[0] if back else None
            case "concatenate" if all(x.name == "slice" for x in made):
                return _joined_again(made, eqn.params["dimension"], shape)
        return None

    def _taken(self, eqn: Any, inputs: Sequence[Any]) -> tuple[int, Any, np.ndarray]:
        """The axis, the value and the positions that entries are taken from, if they are known.

        Where they are taken from what was taken itself, those of that. No value if there is none.
        """
        x, nothing = inputs[0], (0, None, np.zeros(0))
        if eqn.primitive.name == "rev":
            axis, *more = eqn.params["dimensions"]
            if more or not isinstance(x.shape[axis], int):
                return nothing
            return self._composed(x, axis, np.arange(x.shape[axis])[::-1])
        numbers, found = eqn.params["dimension_numbers"], self._number(inputs[1])
        if len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
            return nothing
        (axis,), rank = numbers.collapsed_slice_dims, len(x.shape)
        rest = tuple(i for i in range(rank) if i != axis)
        along = all(eqn.params["slice_sizes"][i] == x.shape[i] for i in rest)
        if numbers.start_index_map != (axis,) or numbers.offset_dims != rest or not along:
            return nothing
        if found is None or np.ndim(found) != 2 or not isinstance(x.shape[axis], int):
            return nothing
        positions = np.asarray(found)[:, 0]
        if not ((positions >= 0) & (positions < x.shape[axis])).all():
            return nothing
        return self._composed(x, axis, positions)

    def _composed(self, x: Any, axis: int, positions: np.ndarray) -> tuple[int, Any, np.ndarray]:
        """Positions of ``x`` along an axis as those of what ``x`` was taken from itself."""
        before = self._made.get(x) if isinstance(x, Value) else None
        if before is not None and before.name in ("gather", "rev"):
            first, source, at = self._taken(before, before.inputs)
            if source is not None and first == axis:
                return axis, source, at[positions]
        return axis, x, positions

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
        if _is_own(call) or label(call) in self._ruled or call.entrywise:
            return None
        if any(is_complex(v.aval) for v in (*values, *outputs)):
            return None
        closed = trace(_expanded(call, moving, self._order), *(v.aval for v in values))
        trial = _Builder(values, True, self._ruled, order=1)
        trial._moving.intersection_update(inputs[i] for i in moving)
        trial.inline(closed, values)
        return (closed, values) if trial.all_in_blocks() else None

    def all_in_blocks(self) -> bool:
        """Whether all that moves may be computed in blocks."""
        return all(
            eqn.entrywise
            if eqn.name == "custom_jvp_call"
            else eqn.name in ENTRYWISE | {"reduce_max", "reduce_min", "reduce_sum"}
            for eqn in self.equations
            if not self._moving.isdisjoint(v for v in eqn.inputs if isinstance(v, Value))
        )

    def _contracts_everything(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a ``dot_general`` has no free axes, as in ``einsum('bd,bd->b')`` and ``vdot``.

        An axis of size 1 is none, except in a layer: one unit, applied to one example.
        """
        free = _free(eqn)
        layer = all(free) and any(map(self._is_given, inputs))
        return not layer and all(
            v.aval.shape and all(v.aval.shape[i] == 1 for i in axes)
            for v, axes in zip(eqn.invars, free, strict=True)
        )

    def _is_given(self, x: Any) -> bool:
        """Whether a value is an input, or one in another dtype."""
        while x in self._made and self._made[x].name == "convert_element_type":
            (x,) = self._made[x].inputs
        return x in self._inputs

    def _has_few(self, eqn: Any, inputs: Sequence[Any]) -> bool:
        """Whether a product is of few entries that move: a block may take them as one value's."""
        shape = eqn.invars[0].aval.shape
        count = math.prod(shape[i] for i in eqn.params["axes"])
        moves = isinstance(inputs[0], Value) and inputs[0] in self._moving
        return isinstance(count, int) and 0 < count <= FEW and moves

    def _append(
        self,
        eqn: Any,
        params: dict[str, Any],
        inputs: tuple[Any, ...],
        sources: Any,
        region: Region | None,
    ) -> tuple[Value, ...]:
        alike = self._alike.setdefault((eqn.primitive, *map(id, inputs)), [])
        outputs = tuple(Value(v.aval) for v in eqn.outvars)
        new = Equation(eqn.primitive, params, inputs, outputs, sources, region, self._ruled)
        if new.name == "transpose":
            self._transposed[outputs[0]] = new
        if not eqn.effects:
            for old in alike:
                if _same_parameters(old, new):
                    return old.outputs
            alike.append(new)
        self.equations.append(new)
        self._made.update(dict.fromkeys(outputs, new))
        moves = not self._moving.isdisjoint(v for v in inputs if isinstance(v, Value))
        if moves and new.name != "stop_gradient":
            self._moving.update(filter(is_inexact, outputs))
        return new.outputs

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
        return _complex.FORMS.get(eqn.primitive.name) or _with_parts(eqn)

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
            results[:] = [_of_shape(x, v) for x, v in zip(found, outputs, strict=True)]
            return [x for x in jax.tree.leaves(results) if not isinstance(x, float)]

        traced = trace(of_arrays, *(_real_aval(avals[i]) for i in read))
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

        traced = trace(whole, *(_real_aval(var.aval) for _ in read))
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

    def _constant(self, value: Any) -> Constant:
        """One object per literal, so that equal operands are identical."""
        key: Any = id(value)
        if np.ndim(value) == 0 and not isinstance(value, jax.Array | jax.Ref):
            # Bit by bit: 0.0 and -0.0 are equal, but not the same operand.
            key = (type(value), np.asarray(value).dtype, np.asarray(value).tobytes())
        return self._constants.setdefault(key, Constant(value))


def _aval(x: Value | Constant) -> Any:
    return x.aval if isinstance(x, Value) else jax.typeof(x.value)


def _real_aval(aval: Any) -> Any:
    """The type of a part of a complex value, or of a real one."""
    return aval.update(dtype=_complex.real_dtype(aval)) if is_complex(aval) else aval


def _of_shape(x: Any, value: Value) -> Any:
    """A result with each part that is no float in the shape of the value."""
    if not isinstance(x, Complex):
        return x
    parts = zip(x, _complex.filled(x, value), strict=True)
    return Complex(*(part if isinstance(part, float) else array for part, array in parts))


def _region(call: Any, parent: Region | None) -> Region | None:
    """The region inside a call: a new one if it is of ``jax.checkpoint``."""
    if "policy" not in call.params:
        return parent
    return Region({name: call.params[name] for name in ("policy", "prevent_cse")}, parent)


def called(call: Any) -> core.ClosedJaxpr:
    """The jaxpr that a call of ``CALLS`` runs."""
    return _closed(call.params.get("jaxpr") or call.params["call_jaxpr"])


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _needed(equations: list[Equation], outputs: Sequence[Any], effects: bool) -> list[Equation]:
    """The equations that an output depends on, or that have an effect."""
    wanted = set(map(id, outputs))
    kept = []
    for eqn in reversed(equations):
        if (effects and eqn.sources[0].effects) or any(id(v) in wanted for v in eqn.outputs):
            wanted.update(map(id, eqn.inputs))
            kept.append(eqn)
    return kept[::-1]


def _same_parameters(a: Equation, b: Equation) -> bool:
    """Whether two applications of a primitive to the same operands compute the same."""
    if a.name == "custom_jvp_call":
        # Its derivative rule is a new closure on every trace: compare what the rules compute.
        definitions = (eqn.params["call_jaxpr"] for eqn in (a, b))
        return _same(*definitions) and _same(_with_derivative(a), _with_derivative(b))
    if a.name in WHOLE and is_complex(a.outputs[0].aval) and a.sources[0] is not b.sources[0]:
        return False  # each is there for the equation that reads it, and an error names that
    return a.params.keys() == b.params.keys() and all(
        _same(value, b.params[key]) for key, value in a.params.items()
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (core.ClosedJaxpr, core.Jaxpr)):
        return isinstance(b, type(a)) and structure(a) == structure(b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _with_derivative(eqn: Equation) -> core.ClosedJaxpr:
    """The function and its derivative in every floating argument, as a jaxpr.

    In what it closes over, the leading operands, it has none: JAX raises where one is asked for.
    """
    values = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value)]
    arguments = range(eqn.params["num_consts"], len(eqn.inputs))
    moving = [i for i in values if i in arguments and is_inexact(eqn.inputs[i])]
    constants = [v.value if isinstance(v, Constant) else None for v in eqn.inputs]

    def with_derivative(primals: list[Any], tangents: list[Any]) -> Any:
        operands = list(constants)
        for i, primal in zip(values, primals, strict=True):
            operands[i] = primal
        start = [operands[i] for i in moving]
        return jax.jvp(along(eqn, operands, moving), start, tangents)

    avals = {i: jax.ShapeDtypeStruct(eqn.inputs[i].shape, eqn.inputs[i].dtype) for i in values}
    return trace(with_derivative, list(avals.values()), [avals[i] for i in moving])


def moved_results(eqn: Equation, positions: Sequence[int]) -> list[bool]:
    """Which results of a custom_jvp function move with these operands, by its derivative rule."""
    jaxpr = _with_derivative(eqn).jaxpr
    values = [i for i, v in enumerate(eqn.inputs) if isinstance(v, Value)]
    own = [i for i in values if i >= eqn.params["num_consts"] and is_inexact(eqn.inputs[i])]
    tangents = zip(own, jaxpr.invars[len(values) :], strict=True)
    reached = {v for i, v in tangents if i in positions}
    for inner in jaxpr.eqns:
        if not reached.isdisjoint(v for v in inner.invars if not hasattr(v, "val")):
            reached.update(inner.outvars)
    derivatives = jaxpr.outvars[len(eqn.outputs) :]
    return [not hasattr(v, "val") and v in reached for v in derivatives]


def along(eqn: Equation, primals: Sequence[Any], positions: Sequence[int]) -> Callable[..., Any]:
    """The equation as a function of the operands at ``positions`` alone."""

    def function(*operands: Any) -> Any:
        replaced = list(primals)
        for position, operand in zip(positions, operands, strict=True):
            replaced[position] = operand
        return bind(eqn, *replaced)

    return function


def zero_outputs(closed: core.ClosedJaxpr) -> list[bool]:
    """Which outputs are zero whatever the inputs: a literal 0, perhaps broadcast."""
    made_by = {var: eqn for eqn in closed.jaxpr.eqns for var in eqn.outvars}

    def is_zero(atom: Any) -> bool:
        if isinstance(atom, core.Literal):
            return bool(atom.val == 0)
        eqn = made_by.get(atom)
        return (
            eqn is not None and eqn.primitive.name == "broadcast_in_dim" and is_zero(eqn.invars[0])
        )

    return list(map(is_zero, closed.jaxpr.outvars))


def structure(jaxpr: Any) -> tuple[Any, ...]:
    """A key equal for two jaxprs exactly when they are the same computation, names aside."""
    closed_over = tuple(map(id, getattr(jaxpr, "consts", ())))
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    number: dict[Any, int] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        number[var] = len(number)

    def key(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return ("literal", str(atom.aval), repr(atom.val))
        return number[atom]

    def parameter(value: Any) -> Any:
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            return structure(value)
        if isinstance(value, np.ndarray):
            return (value.shape, str(value.dtype), value.tobytes())
        return id(value) if callable(value) else repr(value)

    lines = []
    for eqn in jaxpr.eqns:
        params = tuple((k, parameter(v)) for k, v in sorted(eqn.params.items()))
        lines.append((eqn.primitive.name, params, tuple(map(key, eqn.invars))))
        for var in eqn.outvars:
            number[var] = len(number)
    avals = tuple(str(v.aval) for v in jaxpr.invars)
    return (closed_over, avals, tuple(lines), tuple(map(key, jaxpr.outvars)))


# Programs within equations


def body(jaxpr: Any, eqn: Equation) -> Body:
    """A body that takes the operands of its equation in order.

    What a function with its own derivative computes is run for its curvature besides that
    derivative: without effects.
    """
    custom = eqn.name in CUSTOM
    apart = not (custom and _name(eqn).startswith(ONE_RESULT))
    program = flatten(_closed(jaxpr), eqn.sources, not custom, apart, eqn.ruled)
    return Body(program, range(len(program.inputs)))


def _bodies(eqn: Equation) -> Iterator[Body]:
    params = eqn.params
    match eqn.name:
        case "scan":
            first, last = (group.start for group in scan_groups(eqn)[1:])
            step = body(params["jaxpr"], eqn)
            yield Body(step.program, step.inputs, {i: first + i for i in range(last - first)})
        case "while":
            consts = params["cond_nconsts"]
            step = body(params["body_jaxpr"], eqn)
            carry = {i: params["body_nconsts"] + i for i in range(len(eqn.outputs))}
            yield Body(step.program, [consts + i for i in step.inputs], carry)
        case "cond":
            for branch in (body(jaxpr, eqn) for jaxpr in params["branches"]):
                yield Body(branch.program, [1 + i for i in branch.inputs])
        case "custom_jvp_call" if _is_own(eqn):
            return
        case "custom_jvp_call" | "custom_vjp_call":
            yield body(params["call_jaxpr"], eqn)
        case "shard_map":
            yield body(params["jaxpr"], eqn)


def _is_own(eqn: Equation) -> bool:
    """Whether it stands for a primitive on complex values, which is its body."""
    return _name(eqn).startswith(_complex.own(""))


def transform(eqn: Equation) -> tuple[Any, tuple[int, ...]]:
    """The kind and the lengths of a Fourier transform of parts."""
    (fft,) = (e for e in eqn.params["call_jaxpr"].jaxpr.eqns if e.primitive.name == "fft")
    return fft.params["fft_type"], fft.params["fft_lengths"]


def scan_groups(eqn: Any) -> tuple[range, range, range]:
    """The positions of a ``scan``'s operands: constants, carry, and what is scanned over."""
    if "ft_in" in eqn.params:
        consts, carry, _ = (len(group) for group in eqn.params["ft_in"].unpack())
    else:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    count = len(eqn.inputs if isinstance(eqn, Equation) else eqn.invars)
    bounds = (0, consts, consts + carry, count)
    groups = (range(lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False))
    return next(groups), next(groups), next(groups)


def shard_mapped(eqn: Equation, fun: Callable[..., Any], in_specs: Any) -> Callable[..., Any]:
    """``fun`` of as many operands and results, mapped as a ``shard_map`` equation is."""
    params = eqn.params
    return jax.shard_map(
        fun,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=params["out_specs"],
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


def _with_parts(eqn: Any) -> Any:
    """How to run a program on the parts of complex operands, and hand out those of results."""
    match eqn.primitive.name:
        case "scan":
            return _scan_in_parts
        case "cond":
            return _cond_in_parts
        case "custom_jvp_call":
            return _custom_jvp_in_parts
        case "custom_vjp_call":
            return _custom_vjp_in_parts
    return None


def _on_parts(jaxpr: Any) -> Callable[..., list[Any]]:
    """A program as a function of operands, each real or in parts, that returns such results."""
    run = core.jaxpr_as_fun(_closed(jaxpr))
    return lambda *operands: [_complex.apart(y) for y in run(*map(_complex.together, operands))]


def _scan_in_parts(eqn: Equation, bind: Any, *operands: Any) -> list[Any]:
    step = _on_parts(eqn.params["jaxpr"])
    operands = tuple(map(_complex.filled, operands, eqn.inputs))
    consts, carry, xs = ([operands[i] for i in group] for group in scan_groups(eqn))

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = step(*consts, *carry, *xs)
        return results[: len(carry)], results[len(carry) :]

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, xs, **how)
    results = [*carry, *ys]
    return results if len(results) > 1 else results[0]


def _cond_in_parts(eqn: Equation, bind: Any, which: Any, *operands: Any) -> list[Any]:
    operands = tuple(map(_complex.filled, operands, eqn.inputs[1:]))
    results = lax.switch(which, list(map(_on_parts, eqn.params["branches"])), *operands)
    return results if len(results) > 1 else results[0]


def _custom_jvp_in_parts(eqn: Equation, bind: Any, *operands: Any) -> Any:
    leaves, tree = jax.tree.flatten(list(map(_complex.filled, operands, eqn.inputs)))
    definition, rule = _of_leaves(eqn, bind, tree)
    function = jax.custom_jvp(definition)
    function.defjvp(lambda primals, tangents: jax.jvp(rule, primals, tangents))
    results = function(*leaves)
    return results if len(results) > 1 else results[0]


def _custom_vjp_in_parts(eqn: Equation, bind: Any, *operands: Any) -> Any:
    leaves, tree = jax.tree.flatten(list(map(_complex.filled, operands, eqn.inputs)))
    definition, rule = _of_leaves(eqn, bind, tree)
    function = jax.custom_vjp(definition)
    function.defvjp(lambda *leaves: jax.vjp(rule, *leaves), lambda pullback, g: pullback(g))
    results = function(*leaves)
    return results if len(results) > 1 else results[0]


def _of_leaves(eqn: Equation, bind: Any, tree: Any) -> tuple[Any, Any]:
    """A function with a derivative rule, by its definition and by its rule, of operands' parts."""
    run = _on_parts(eqn.params["call_jaxpr"])

    def definition(*leaves: Any) -> list[Any]:
        return run(*jax.tree.unflatten(tree, leaves))

    def rule(*leaves: Any) -> list[Any]:
        results = bind(*map(_complex.together, jax.tree.unflatten(tree, leaves)))
        return list(map(_complex.apart, listed(results, eqn)))

    definition.__name__ = eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
    return definition, rule


def _chooses(closed: core.ClosedJaxpr) -> bool:
    """Whether a branch is chosen, by a number of the step's it may be."""
    return any(
        eqn.primitive.name == "cond" or (eqn.primitive.name in CALLS and _chooses(called(eqn)))
        for eqn in closed.jaxpr.eqns
    )


def _count_entrywise(closed: core.ClosedJaxpr, moving: set[Any], known: set[Any]) -> float:
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
            branches = map(_closed, eqn.params["branches"])
            count += max(_count_in(branch, moves[1:], knows[1:]) for branch in branches)
        elif eqn.primitive.name in ENTRYWISE:
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
    return _count_entrywise(closed, moving, known)


# A function with a derivative rule of its own may act entry by entry, whatever it is made of


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
    program = flatten(_with_derivative(eqn), apart=False)
    return shape == () or _pass_entrywise(program, set(program.inputs[len(values) :]), shape)


def has_own_types(eqn: Equation) -> bool:
    """Whether it takes or returns what is no array."""
    values = [v for v in (*eqn.inputs, *eqn.outputs) if isinstance(v, Value)]
    return not all(hasattr(v.aval, "dtype") for v in values)


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


def _one_by_one(eqn: Any) -> Callable[..., list[Any]]:
    """A function with a ``jvp`` rule of its own and several results, as a function for each.

    Integer results are left out.
    """

    def single(k: int) -> Any:
        def result(*operands: Any) -> Any:
            return bind(eqn, *operands)[k]

        result.__name__ = f"{ONE_RESULT}{_name(eqn)}.{k}"
        function = jax.custom_jvp(result)
        function.defjvp(lambda primals, tangents: jax.jvp(result, primals, tangents))
        return function

    inexact = [k for k, v in enumerate(eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return lambda *operands: [single(k)(*operands) for k in inexact]


def _are_plain(atoms: Sequence[Any]) -> bool:
    """Whether none of them is complex in parts."""
    return all(isinstance(x, Value | Constant) for x in atoms)


def _sharded_alike(x: Any, var: Any) -> bool:
    """Whether a value has the sharding that its type says, as under ``AxisType.Explicit``."""
    return not isinstance(x, Value) or x.aval.sharding == var.aval.sharding


def _is_identity(eqn: Any) -> bool:
    """Whether an equation selects all entries of its operand, where they are."""
    if eqn.primitive.name not in SELECTS_ALL:
        return False
    x, *_ = (v.aval for v in eqn.invars)
    if len(eqn.outvars) > 1 or x.shape != eqn.outvars[0].aval.shape:
        return False
    match eqn.primitive.name:
        case "pad":
            return all(edge == (0, 0, 0) for edge in eqn.params["padding_config"])
        case "slice":
            return all(by == 1 for by in eqn.params["strides"] or ())
        case "transpose":
            return tuple(eqn.params["permutation"]) == tuple(range(len(x.shape)))
        case "concatenate":
            return len(eqn.invars) == 1
        case _:
            return True


Slices = tuple[tuple[int, int], ...]  # where each axis starts and ends


def _slices(eqn: Any) -> Slices | None:
    params = eqn.params
    if any(by != 1 for by in params["strides"] or ()):
        return None
    return tuple(zip(params["start_indices"], params["limit_indices"], strict=True))


def _placed(eqn: Equation) -> dict[Slices | None, Any]:
    """The operands that lie in an equation's result as they are, by where."""
    (shape, *_), result = [x.shape for x in eqn.inputs] or [()], eqn.outputs[0].shape
    match eqn.name:
        case "concatenate":
            laid = _laid(result, [x.shape for x in eqn.inputs], eqn.params["dimension"])
            return dict(zip(laid, eqn.inputs, strict=True))
        case "pad":
            edges = eqn.params["padding_config"]
            if any(low < 0 or high < 0 or between for low, high, between in edges):
                return {}
            at = tuple((low, low + n) for (low, _, _), n in zip(edges, shape, strict=True))
            return {at: eqn.inputs[0]}
        case "tile" if math.prod(eqn.params["reps"]) <= FEW:
            copies = itertools.product(*map(range, eqn.params["reps"]))
            spans = (
                tuple((k * n, (k + 1) * n) for k, n in zip(copy, shape, strict=True))
                for copy in copies
            )
            return dict.fromkeys(spans, eqn.inputs[0])
        case _:
            return {}


def _joined_again(slices: list[Any], axis: int, shape: Sequence[int]) -> Any:
    """The value that slices along an axis follow one another of, if they are all of it."""
    source = slices[0].inputs[0]
    if any(x.inputs[0] is not source for x in slices) or source.shape != tuple(shape):
        return None
    laid = _laid(source.shape, [x.outputs[0].shape for x in slices], axis)
    return source if list(map(_slices, slices)) == laid else None


def _laid(shape: Sequence[int], parts: Sequence[Sequence[int]], axis: int) -> list[Slices]:
    """Where parts lie that follow one another along an axis."""
    ends = list(itertools.accumulate((part[axis] for part in parts), initial=0))
    return [
        tuple((ends[k], ends[k + 1]) if i == axis else (0, n) for i, n in enumerate(shape))
        for k in range(len(parts))
    ]


def _rewritten(eqn: Any) -> Callable[..., Any] | None:
    """An equation that renames positions alone, as views, each of one operand."""
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


def _expanded(eqn: Equation, moving: Sequence[int], order: int) -> Callable[..., list[Any]]:
    """``f(x0) + f'(x0 + d/2) d`` for ``x0 + d`` at ``d = 0``: as ``f`` to second order.

    To first order, ``f(x0) + f'(x0) d``. What is infinite does not vary.
    """

    def function(*xs: Any) -> list[Any]:
        given = iter(xs)
        operands = [x.value if isinstance(x, Constant) else next(given) for x in eqn.inputs]
        start = [lax.stop_gradient(operands[i]) for i in moving]
        steps = [_if_finite(operands[i] - x) for i, x in zip(moving, start, strict=True)]
        middle = start if order == 1 else [x + d / 2 for x, d in zip(start, steps, strict=True)]
        fun = along(eqn, operands, moving)
        _, changes = jax.jvp(lambda *xs: listed(fun(*xs), eqn), middle, steps)
        ys = listed(fun(*start), eqn)
        return [y + _if_finite(dy) for y, dy in zip(ys, changes, strict=True)]

    return function


def _if_finite(x: Any) -> Any:
    return lax.select(lax.is_finite(x), x, lax.full_like(x, 0))


# A dot product row by row is a multiplication and a sum in disguise


def _free(eqn: Any) -> list[list[int]]:
    """The axes of each factor of a ``dot_general`` that it neither sums over nor runs over."""
    sides = zip(*eqn.params["dimension_numbers"], strict=True)
    return [
        [i for i in range(len(v.aval.shape)) if i not in (*summed, *batch)]
        for v, (summed, batch) in zip(eqn.invars, sides, strict=True)
    ]


def _multiply_and_sum(eqn: Any) -> Callable[[Any, Any], Any]:
    result, free = eqn.outvars[0].aval, _free(eqn)
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = (
        [
            [i - sum(j < i for j in ones) for i in axes]
            for axes, ones in zip(sides, free, strict=True)
        ]
        for sides in eqn.params["dimension_numbers"]
    )

    def multiply_and_sum(lhs: Any, rhs: Any) -> Any:
        lhs, rhs = (
            lax.squeeze(x, ones) if ones else x for x, ones in zip((lhs, rhs), free, strict=True)
        )
        partner = dict(zip((*lhs_axes, *lhs_batch), (*rhs_axes, *rhs_batch), strict=True))
        rhs = _transpose(rhs, [partner[i] for i in range(lhs.ndim)])
        wide = [
            lax.convert_element_type(x, result.dtype) if x.dtype != result.dtype else x
            for x in (lhs, rhs)
        ]
        rows = lax.reduce_sum(lax.mul(*wide), tuple(lhs_axes))
        kept = sorted(lhs_batch)
        rows = _transpose(rows, [kept.index(i) for i in lhs_batch])
        return lax.reshape(rows, result.shape) if any(free) else rows

    return multiply_and_sum


def _multiply(eqn: Any) -> Callable[[Any], Any]:
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


def _transpose(x: Any, permutation: list[int]) -> Any:
    return x if permutation == sorted(permutation) else lax.transpose(x, permutation)


# Sizes that are not known, as those of a program to export


def size(shape: tuple[int, ...]) -> int:
    """The number of entries of an array of this shape."""
    return math.prod(shape)


class Size(int):
    """A number that stands for a symbolic dimension, so that one can order and divide sizes.

    It is the dimension's value where each symbol is a large prime. Two are equal, and one divides
    another, if that holds for the dimensions, whatever the symbols are.
    """

    dimension: Any

    def __eq__(self, other: Any) -> bool:
        return bool(self.dimension == dimension(other))

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __mul__(self, other: int) -> int:
        return _sized(self.dimension * dimension(other), int(self) * int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        return _sized(self.dimension // dimension(other), int(self) // int(other))

    def __rfloordiv__(self, other: int) -> int:
        return _sized(other // self.dimension, other // int(self))

    def __mod__(self, other: int) -> int:
        return int((self.dimension % dimension(other)) != 0)

    def __rmod__(self, other: int) -> int:
        return int((other % self.dimension) != 0)


def sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """A shape in numbers that can be compared."""
    if all(isinstance(n, int) for n in shape):
        return shape
    return tuple(_sized(n, _value(n)) for n in shape)


def dimension(size: int) -> Any:
    """The dimension that a size stands for."""
    return size.dimension if isinstance(size, Size) else size


def number(size: Any, dtype: Any) -> Any:
    """A size as a factor: a float if it is known, else an array of this dtype."""
    return float(size) if isinstance(size, int) else jnp.asarray(size, dtype)


def _sized(dimension: Any, value: int) -> int:
    if isinstance(dimension, int):
        return dimension
    size = Size(value)
    size.dimension = dimension
    return size


def _value(dimension: Any) -> int:
    if isinstance(dimension, int):
        return dimension
    values = {name: _prime(name) for name in sorted(dimension._get_vars())}
    return int(dimension._evaluate(values))


_primes = (n for n in itertools.count(10007, 2) if all(n % k for k in range(3, 200, 2)))


@functools.cache
def _prime(name: str) -> int:
    """Another one for each symbol."""
    return next(_primes)
