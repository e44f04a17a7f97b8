"""The exact diagonal of the generalised Gauss-Newton matrix, example by example.

With the outputs ``z(p)`` of the model and the Hessian ``H`` of the loss's head in them,

    diag(J^T H J) = sum_n sum_c J_nc * (H_n J_n)_c        J_nc = dz_nc/dp

where the sum over examples ``n`` is of those that the program, by its structure, computes each by
itself: their gradients are computed for C outputs of all examples in as many backward passes.

What loss there is of parameters alone, a penalty, has no such outputs: HesScale takes that.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Program, Value, size
from hesscale_jax.blocks import Plan
from hesscale_jax.examples import Examples, Mixed
from hesscale_jax.head import LossHead, check_regions, names_output
from hesscale_jax.moments import spread_dtype
from hesscale_jax.paths import loop
from hesscale_jax.planning import plan
from hesscale_jax.propagate import Kept, affine_in
from hesscale_jax.rules.table import find

__all__ = ["gauss_newton"]

# The most outputs of one example, or of a batch whose examples are mixed: each is a backward pass.
MAX_OUTPUTS = 4096

# The most equations of a loop in the model that is written out.
UNROLL = 2**12

# How many numbers of gradients are held at once.
AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Part:
    """Equations of the loss's head that no other equation of it but the affine end is joined with.

    Attributes:
      equations: The equations, in program order.
      outputs: The values that it takes from the model.
    """

    equations: list[Equation]
    outputs: list[Value]


def gauss_newton(
    program: Program, rules: Mapping[Any, Any], residual: bool
) -> tuple[Kept, Callable[[Sequence[Any]], list[Any]]]:
    """How to compute the matrix's diagonal, with the ``residual`` of the Hessian's if asked for.

    Returns:
      Where HesScale keeps second derivatives: in what the loss has of parameters alone, and for the
      residual in the model; and a function that computes the rest for the program's inputs.
    """

    def rule(eqn: Equation) -> Any:
        return find(rules, eqn)

    if _jaxpr.sums_wrongly(program):
        warnings.warn(
            "jaxlib 0.10 adds up many gradients at once wrongly now and then, on a CPU and not in "
            "float64: the diagonal may hold NaN or large numbers. Set XLA_FLAGS="
            "--xla_cpu_experimental_ynn_fusion_type= in the environment before JAX is imported, "
            "or use a newer jaxlib.",
            RuntimeWarning,
            stacklevel=2,
        )
    check_regions(program)
    steps = plan(program, program.inputs, program.outputs[:1], rule)
    named = names_output(program)
    head = LossHead(program, steps.rules, affine_in(steps), program.inputs, named=named)
    _check(program, steps, head, rule)
    parts = [part for part in _parts(steps, head) if not _is_penalty(part, head)]
    of_model = frozenset(eqn for part in parts for eqn in part.equations)
    kept = frozenset(steps.rules) if residual else head.equations
    found = [_Outputs(program, steps, head, part, rules) for part in parts]

    def diagonal(inputs: Sequence[Any]) -> list[Any]:
        total = [jnp.zeros(x.shape, spread_dtype(x.dtype)) for x in inputs]
        if not found:
            return total
        values = _evaluated(program, inputs)
        for outputs in found:
            total = list(map(jnp.add, total, outputs.diagonal(values, inputs)))
        return total

    return Kept(kept - of_model), diagonal


def _check(program: Program, steps: Plan, head: LossHead, rule: Any) -> None:
    """Raise where the head starts within an equation, or an effect would take place twice."""
    if _jaxpr.has_effects(program, collectives=False):
        raise ValueError(
            "the loss has effects (prints, mutable arrays, callbacks), which the exact "
            "Gauss-Newton diagonal would repeat. Take them out, or use curvature='gauss_newton'."
        )
    _check_devices(program, steps, head)
    for eqn in steps.rules:
        inside = eqn in head.equations and head.is_entry(eqn)
        for body in eqn.bodies if eqn not in head.equations else ():
            paths = loop(eqn, body, steps.active, steps.active, rule)
            wanted = [body.program.outputs[i] for i in sorted(paths.wanted)]
            inner = plan(body.program, paths.moving, wanted, rule)
            inside |= bool(head.inside(eqn, body, inner.rules, affine_in(inner)).equations)
        if inside and eqn.bodies:
            raise ValueError(
                f"the model's outputs are inside of {_jaxpr.label(eqn)!r} (used at "
                f"{_jaxpr.location(eqn)}), where the exact Gauss-Newton diagonal would need the "
                "loss's Hessian in them. Let it return the outputs, and compute the loss of them "
                "behind it; or use curvature='gauss_newton'."
            )


def _check_devices(program: Program, steps: Plan, head: LossHead) -> None:
    """Raise where outputs are of several devices, unless the loss is affine in what it takes."""
    values = [*program.inputs, *(v for eqn in steps.rules for v in eqn.outputs)]
    found = ["values vary by device"] if any(map(_jaxpr.varies, values)) else []
    for eqn in steps.rules:
        several = _jaxpr.is_collective(eqn) or eqn.name == "shard_map"
        if several and eqn not in head.tail:
            found.append(f"{_jaxpr.label(eqn)!r}, used at {_jaxpr.location(eqn)}")
    if found:
        raise ValueError(
            f"the exact Gauss-Newton diagonal is of one device's examples ({found[-1]}). Put it "
            "inside of jax.shard_map(..., check_vma=False), its loss that of the device or the "
            "pmean of that, and average the diagonals by pmean; or use curvature='gauss_newton'."
        )


def _is_penalty(part: Part, head: LossHead) -> bool:
    """Whether a part is of parameters alone."""
    alone = all(map(head.is_parameter_like, part.outputs))
    return alone and not any(map(head.is_entry, part.equations))


def _parts(steps: Plan, head: LossHead) -> list[Part]:
    """The head without its affine end, in parts of which the loss is a sum."""
    bent = [eqn for eqn in steps.rules if eqn in head.equations and eqn not in head.tail]
    made = {v for eqn in bent for v in eqn.outputs}
    groups: list[tuple[set[Value], list[Equation]]] = []
    for eqn in bent:
        touched = {v for v in (*eqn.inputs, *eqn.outputs) if v in steps.active}
        joined = [group for group in groups if not group[0].isdisjoint(touched)]
        groups = [group for group in groups if group[0].isdisjoint(touched)]
        groups.append(
            (
                touched.union(*(values for values, _ in joined)),
                [*itertools.chain.from_iterable(eqns for _, eqns in joined), eqn],
            )
        )
    order = {eqn: i for i, eqn in enumerate(bent)}
    return [
        Part(sorted(eqns, key=order.__getitem__), _in_order(steps, values - made))
        for values, eqns in groups
    ]


def _in_order(steps: Plan, values: set[Value]) -> list[Value]:
    return list(dict.fromkeys(v for eqn in steps.rules for v in eqn.inputs if v in values))


def _evaluated(program: Program, inputs: Sequence[Any]) -> dict[Value, Any]:
    """Every value of a program."""
    made = [v for eqn in program.equations for v in eqn.outputs]
    values = [*program.inputs, *made]
    return dict(zip(values, _jaxpr.evaluate(program, inputs, values), strict=True))


class _Outputs:
    """The outputs of a model that one part of the loss's head takes."""

    def __init__(
        self, program: Program, steps: Plan, head: LossHead, part: Part, rules: Mapping[Any, Any]
    ) -> None:
        self._program = program
        self._part = part
        self._check_sharding()
        self._tail = [eqn for eqn in steps.rules if eqn in head.tail]
        traced = _jaxpr.trace(
            lambda *inputs: _jaxpr.evaluate(program, inputs, part.outputs),
            *(v.aval for v in program.inputs),
        )
        self._model = _jaxpr.flatten(traced, ruled=rules, unroll=UNROLL)
        self.examples = self._independent(steps, rules)
        count = sum(map(size, self._shapes())) // self.examples.count
        if count > MAX_OUTPUTS:
            self._raise(count)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [v.shape for v in self._part.outputs]

    def _independent(self, steps: Plan, rules: Mapping[Any, Any]) -> Examples:
        """The most examples that are computed each by itself, along the leading axis."""
        model = self._model
        within = plan(model, model.inputs, model.outputs, lambda eqn: find(rules, eqn))
        whole = math.gcd(*(shape[0] if shape else 1 for shape in self._shapes()))
        mixed: Equation | None = None
        for count in (n for n in range(whole, 1, -1) if whole % n == 0):
            try:
                found = Examples(model, within, count)
                found.check(steps, self._part.equations, self._part.outputs)
            except Mixed as error:
                mixed = mixed or error.eqn
            else:
                return found
        return Examples(model, within, 1, mixed)

    def _raise(self, count: int) -> NoReturn:
        mixed = self.examples.mixed
        whose = "one example's"
        if not set(self._model.inputs).isdisjoint(self._model.outputs):
            whose = "parameters that the loss's head reads as they are"
        elif mixed is not None:
            whose = f"all examples', which {_jaxpr.label(mixed)!r} mixes ({_jaxpr.location(mixed)})"
        raise ValueError(
            "the exact Gauss-Newton diagonal takes a backward pass for each output of the model: "
            f"here {count}, more than {MAX_OUTPUTS}; they are {whose}. Options: (1) a smaller "
            "batch; (2) curvature='gauss_newton', HesScale's approximation in one pass; (3) if the "
            "examples do not depend on one another, write that step so that they have an axis of "
            "their own throughout."
        )

    def _check_sharding(self) -> None:
        """Raise if the type of an output says where it lies, as on a mesh of ``Explicit`` axes."""
        if any(axis is not None for v in self._part.outputs for axis in v.aval.sharding.spec):
            raise ValueError(
                "the exact Gauss-Newton diagonal takes the model's outputs apart, which are "
                "sharded over a mesh with AxisType.Explicit. Use AxisType.Auto, where the compiler "
                "chooses, or curvature='gauss_newton'."
            )

    def diagonal(self, values: Mapping[Value, Any], inputs: Sequence[Any]) -> list[Any]:
        """The diagonal of ``J^T H J`` for each input of the program."""
        count, outputs = self.examples.count, sum(map(size, self._shapes()))
        of_columns = self._of_columns(values, inputs)
        columns = outputs // count
        at_once = _fitting(columns, columns * outputs)
        positions = jnp.arange(columns).reshape(columns // at_once, at_once)
        if len(positions) == 1:
            return of_columns(positions[0])

        def add(total: list[Any], some: Any) -> tuple[list[Any], None]:
            return list(map(jnp.add, total, of_columns(some))), None

        start = [jnp.zeros(x.shape, spread_dtype(x.dtype)) for x in inputs]
        return lax.scan(add, start, positions)[0]

    def _of_columns(
        self, values: Mapping[Value, Any], inputs: Sequence[Any]
    ) -> Callable[[Any], list[Any]]:
        """What the columns at some positions add to the diagonal, ``sum_n J_nc * (H_n J_n)_c``."""
        zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
        linear = self.examples.linearised(_evaluated(self._model, inputs))

        hessian = self._hessian(values)
        count = self.examples.count

        def of_columns(positions: Any) -> list[Any]:
            curvatures = hessian(positions)

            def of_example(arrays: Any, curvature: Any) -> list[Any]:
                def outputs(*tangents: Any) -> Any:
                    pushed = linear.pushed(arrays, tangents)
                    return jnp.concatenate([x.ravel().astype(curvature.dtype) for x in pushed])

                units = jax.nn.one_hot(positions, curvature.shape[1], dtype=curvature.dtype)
                return _quadratic(jax.linear_transpose(outputs, *zeros), units, curvature)

            at_once = _fitting(count, len(positions) * sum(x.size for x in zeros) * count)
            groups = jax.tree.map(
                lambda x: x.reshape(count // at_once, at_once, *x.shape[1:]),
                (linear.arrays, curvatures),
            )

            def add(total: list[Any], group: Any) -> tuple[list[Any], None]:
                found = jax.vmap(of_example)(*group)
                return [t + x.sum(0) for t, x in zip(total, found, strict=True)], None

            start = [jnp.zeros(x.shape, spread_dtype(x.dtype)) for x in zeros]
            return lax.scan(add, start, groups)[0]

        return of_columns

    def _hessian(self, values: Mapping[Value, Any]) -> Callable[[Any], Any]:
        """Columns of the loss's Hessian in the outputs of each example: of shape ``(n, k, c)``.

        The head is run in float32 at least: a second derivative may lie beyond half precision.
        """
        count = self.examples.count
        outputs = [values[v] for v in self._part.outputs]
        sizes = [x.size // count for x in outputs]
        dtype = spread_dtype(*(x.dtype for x in outputs))

        def loss(flat: Any) -> Any:
            """The loss of outputs side by side, of each example in a row."""
            ends = list(itertools.accumulate(sizes))[:-1]
            parts = jnp.split(flat, ends, axis=1)
            replaced = dict(values)
            for v, x, part in zip(self._part.outputs, outputs, parts, strict=True):
                replaced[v] = part.reshape(x.shape).astype(spread_dtype(x.dtype))
            return _rerun(self._program, [*self._part.equations, *self._tail], replaced)

        flat = jnp.concatenate([x.reshape(count, -1).astype(dtype) for x in outputs], axis=1)

        def column(position: Any) -> Any:
            unit = (jnp.arange(sum(sizes)) == position).astype(dtype)
            along = jnp.broadcast_to(unit, flat.shape)
            return jax.jvp(jax.grad(loss), (flat,), (along,))[1]

        return lambda positions: jnp.moveaxis(lax.map(column, positions, batch_size=32), 0, 1)


def _fitting(count: int, numbers: int) -> int:
    """How many of ``count``, in groups of a size, hold ``AT_ONCE`` of all ``numbers`` at most."""
    sizes = (n for n in range(count, 0, -1) if count % n == 0)
    return next((n for n in sizes if n * numbers <= AT_ONCE * count), 1)


def _rerun(program: Program, equations: Iterable[Equation], values: dict[Value, Any]) -> Any:
    """The loss with some of the equations run again, in float32 at least, on other values."""

    def read(atom: Any) -> Any:
        return atom.value if isinstance(atom, Constant) else values[atom]

    for eqn in sorted(equations, key=program.equations.index):
        with _jaxpr.context(eqn):
            results = _jaxpr.run_widely(eqn, *map(read, eqn.inputs))
        values.update(zip(eqn.outputs, results, strict=True))
    return read(program.outputs[0])


def _quadratic(pull: Callable[[Any], Sequence[Any]], units: Any, curvature: Any) -> list[Any]:
    """``sum_c J_c * (H J)_c`` of one example, where ``pull(z)`` is ``J^T z``.

    For the columns ``c`` of the Hessian that ``curvature`` holds, in rows, as ``units`` do their
    positions.

    What is pulled has a largest entry of 1, since the model may compute in half precision.
    """

    def wide(x: Any) -> Any:
        return x.astype(spread_dtype(x.dtype))

    def paired(unit: Any, row: Any) -> list[Any]:
        largest = jnp.max(jnp.abs(row))
        size = jnp.where(largest > 0, largest, 1)
        pairs = zip(pull(unit), pull(row / size), strict=True)
        return [wide(a) * wide(b) * size.astype(spread_dtype(a.dtype)) for a, b in pairs]

    held = len(units) * sum(x.size for x in jax.eval_shape(pull, curvature[0]))
    if held <= AT_ONCE:
        return [x.sum(0) for x in jax.vmap(paired)(units, curvature)]

    def add(total: list[Any], both: Any) -> tuple[list[Any], None]:
        return list(map(jnp.add, total, paired(*both))), None

    start = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(paired, units[0], curvature[0])]
    return lax.scan(add, start, (units, curvature))[0]
