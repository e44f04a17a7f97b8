"""Tracing functions, and running equations."""

import contextlib
import importlib.metadata
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config
from jax._src import core as jax_core
from jax._src.interpreters import partial_eval
from jax._src.state.types import RefEffect
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import PartitionSpec as P

from hesscale_jax._jaxpr.program import CUSTOM, Body, Constant, Equation, Program, Value, is_inexact
from hesscale_jax._jaxpr.sources import context
from hesscale_jax._mesh import at_mesh_of, varying, varying_axes

__all__ = [
    "add",
    "at_once",
    "bind",
    "entries",
    "evaluate",
    "is_on_cpu",
    "is_on_one_cpu",
    "listed",
    "multiply",
    "only_where",
    "run",
    "run_widely",
    "shard_mapped",
    "stops_at_nans",
    "sums_wrongly",
    "takes",
    "trace",
    "uses_state",
    "varying_as",
    "with_constants",
    "without_dead_code",
    "without_state",
]


def trace(fun: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
    """The jaxpr of ``fun`` at the types of ``args``, those within a ``shard_map`` too."""
    types = [x for x in jax.tree.leaves(args) if not isinstance(x, jax.core.Tracer)]
    mesh = next((x.sharding.mesh for x in types if varying_axes(x)), None)
    if mesh is None:
        avals = (x for x in types if isinstance(x, jax_core.ShapedArray))
        with at_mesh_of(next(avals, None)):
            return jax.make_jaxpr(fun)(*args)
    found = list[core.ClosedJaxpr]()

    def on_device() -> None:
        xs = jax.tree.map(lambda x: varying(jnp.zeros(x.shape, x.dtype), x), args)
        found.append(jax.make_jaxpr(fun)(*xs))

    names, around = set(mesh.manual_axes), jax.sharding.get_abstract_mesh()
    if not names <= set(around.manual_axes):
        automatic = dict.fromkeys(names, jax.sharding.AxisType.Auto)
        mesh = mesh.update_axis_types(automatic) if around.empty else around
        on_device = jax.shard_map(
            on_device, mesh=mesh, axis_names=names, in_specs=(), out_specs=None
        )
    jax.eval_shape(on_device)
    return found[0]


HALF = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))

# JAX's own, which compute in the dtype of their operands, but for what takes these bit by bit.
PRIMITIVES = {p for p in vars(primitives).values() if isinstance(p, core.Primitive)}
PRIMITIVES -= {primitives.bitcast_convert_type_p}


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


def without_dead_code(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """A program without what it computes for nothing, which may have no derivative."""
    outputs = [True] * len(jaxpr.out_avals)
    live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, outputs, instantiate=True)
    return core.ClosedJaxpr(live, jaxpr.consts)


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


def sums_wrongly(program: Program) -> bool:
    """Whether XLA may add up gradients of this program wrongly: see docs/reference/versions.md.

    Fusions of jaxlib 0.10 for YNNPACK do so on a CPU, of what is not in float64.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    off = "xla_cpu_experimental_ynn_fusion_type=" in (flag.lstrip("-") for flag in flags)
    narrow = any(is_inexact(v) and v.dtype != np.float64 for v in program.inputs)
    faulty = importlib.metadata.version("jaxlib").startswith("0.10.")
    return is_on_cpu() and narrow and faulty and not off


def varying_as(x: Any, other: Any) -> Any:
    """``x`` with a type that varies over the devices of a ``shard_map`` as that of ``other``."""
    return varying(x, jax.typeof(other))


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


def only_where(open_: Any, x: Any) -> Any:
    """``x`` where it is open, else 0: ``jnp.where`` traces a call."""
    shape = lax.broadcast_shapes(open_.shape, x.shape)
    open_, x = (y if y.shape == shape else jnp.broadcast_to(y, shape) for y in (open_, x))
    one, other = (jax.typeof(y).sharding for y in (open_, x))
    if one.spec != other.spec:  # They lie on a mesh of explicit axes.
        open_ = jax.sharding.reshard(open_, other) if any(other.spec) else open_
        x = x if any(other.spec) else jax.sharding.reshard(x, one)
    return lax.select(open_, x, lax.full_like(x, 0))


def entries(x: Any, at: Sequence[Any], axis: int = 0) -> Any:
    """At positions along some axes from one on, none of which is out of bounds."""
    at = tuple(map(jnp.asarray, at))
    sharding, where = jax.typeof(x).sharding, None
    if any(sharding.spec):
        spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
        spec[axis : axis + len(at)] = [None] * max(i.ndim for i in at)
        where = sharding.update(spec=P(*spec))
    indexed = x.at[(*(slice(None),) * axis, *at)]
    return indexed.get(mode="promise_in_bounds", wrap_negative_indices=False, out_sharding=where)


def run(eqn: Equation, *operands: Any) -> list[Any]:
    """What the equation computes, from operands that no derivative flows through."""
    with at_once() if eqn.sources[0].effects else contextlib.nullcontext():
        return listed(bind(eqn, *operands), eqn)


def run_widely(eqn: Equation, *operands: Any) -> list[Any]:
    """What the equation computes, in float32 in place of half precision.

    What holds a program, a loop or a function with its own derivative, computes as it is.
    """
    changes = {k: np.dtype(np.float32) for k, p in eqn.params.items() if is_half(p)}
    holds = any(core.jaxprs_in_params(eqn.params))
    if holds or eqn.primitive not in PRIMITIVES:
        changes = {}
        operands = tuple(
            x if x.dtype == v.dtype else lax.convert_element_type(x, v.dtype)
            for x, v in zip(operands, eqn.inputs, strict=True)
        )
    else:
        operands = tuple(map(_widened, operands))
    return list(map(_widened, listed(bind(eqn, *operands, **changes), eqn)))


def is_half(dtype: Any) -> bool:
    """Whether it is the dtype of half precision."""
    return isinstance(dtype, np.dtype) and dtype in HALF


def _widened(x: Any) -> Any:
    return lax.convert_element_type(x, np.float32) if is_half(x.dtype) else x


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


def evaluate(
    program: Program,
    operands: Sequence[Any],
    wanted: Sequence[Any],
    run: Callable[..., list[Any]] = run,
) -> list[Any]:
    """What some of the values of a program are, each equation as it is ``run``."""
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


def with_constants(closed: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[Any]]:
    """A jaxpr that takes what it closes over as its first operands, and what that is."""
    count = len(closed.consts)

    def function(*operands: Any) -> list[Any]:
        given = core.ClosedJaxpr(closed.jaxpr, operands[:count])
        return core.jaxpr_as_fun(given)(*operands[count:])

    if not count:
        return closed, []
    return trace(function, *closed.consts, *closed.in_avals), list(closed.consts)


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
