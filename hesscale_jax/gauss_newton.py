"""The exact diagonal of the generalised Gauss-Newton matrix, example by example.

With the outputs ``z(p)`` of the model and the Hessian ``H`` of the loss's head in them,

    diag(J^T H J) = sum_n sum_c J_nc * (H_n J_n)_c        J_nc = dz_nc/dp

where the sum over examples ``n`` is of those that the program, by its structure, computes each by
itself: their gradients are computed for C outputs of all examples in as many backward passes.

What loss there is of parameters alone, a penalty, has no such outputs: HesScale takes that.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Program, Value
from hesscale_jax.blocks import Plan, loop, plan
from hesscale_jax.examples import Examples, Mixed
from hesscale_jax.head import LossHead, check_regions, names_output
from hesscale_jax.moments import spread_dtype
from hesscale_jax.propagate import Kept, affine_in
from hesscale_jax.rules.table import find

__all__ = ["gauss_newton"]

# The most outputs of one example, or of a batch whose examples are mixed: each is a backward pass.
MAX_OUTPUTS = 4096

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

    check_regions(program)
    steps = plan(program, program.inputs, program.outputs[:1], rule)
    named = names_output(program)
    head = LossHead(program, steps.rules, affine_in(steps), program.inputs, named=named)
    _check(program, steps, head, rule)
    parts = [
        part for part in _parts(steps, head) if not all(map(head.is_parameter_like, part.outputs))
    ]
    of_model = frozenset(eqn for part in parts for eqn in part.equations)
    kept = frozenset(steps.rules) if residual else head.equations
    found = [_Outputs(program, steps, head, part) for part in parts]

    def diagonal(inputs: Sequence[Any]) -> list[Any]:
        total = [jnp.zeros(x.shape, spread_dtype(x.dtype)) for x in inputs]
        if not found:
            return total
        values = _evaluated(program, inputs)
        for outputs in found:
            total = list(map(jnp.add, total, outputs.diagonal(values)))
        return total

    return Kept(kept - of_model), diagonal


def _check(program: Program, steps: Plan, head: LossHead, rule: Any) -> None:
    """Raise where the head starts within an equation, or an effect would take place twice."""
    if _jaxpr.has_effects(program):
        raise ValueError(
            "the loss has effects (prints, mutable arrays, callbacks), which the exact Gauss-Newton "
            "diagonal would repeat. Take them out, or use curvature='gauss_newton'."
        )
    for eqn in steps.rules:
        for body in eqn.bodies if eqn not in head.equations else ():
            paths = loop(eqn, body, steps.active, steps.active, rule)
            wanted = [body.program.outputs[i] for i in sorted(paths.wanted)]
            inner = plan(body.program, paths.moving, wanted, rule)
            if head.inside(eqn, body, inner.rules, affine_in(inner)).equations:
                raise ValueError(
                    f"the model's outputs are inside of {_jaxpr.label(eqn)!r} (used at "
                    f"{_jaxpr.location(eqn)}), so that the exact Gauss-Newton diagonal would need "
                    "the loss's Hessian there. Name the outputs behind it: "
                    "jax.ad_checkpoint.checkpoint_name(y, 'model_output')."
                )


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
        Part(sorted(eqns, key=order.__getitem__), [v for v in _in_order(steps, values - made)])
        for values, eqns in groups
    ]


def _in_order(steps: Plan, values: set[Value]) -> Iterable[Value]:
    return dict.fromkeys(v for eqn in steps.rules for v in eqn.inputs if v in values)


def _evaluated(program: Program, inputs: Sequence[Any]) -> dict[Value, Any]:
    """Every value of a program."""
    made = [v for eqn in program.equations for v in eqn.outputs]
    values = [*program.inputs, *made]
    return dict(zip(values, _jaxpr.evaluate(program, inputs, values), strict=True))


class _Outputs:
    """The outputs of a model that one part of the loss's head takes."""

    def __init__(self, program: Program, steps: Plan, head: LossHead, part: Part) -> None:
        self._program = program
        self._part = part
        self._tail = [eqn for eqn in steps.rules if eqn in head.tail]
        needed = set(part.outputs)
        self._model: list[Equation] = []
        for eqn in reversed(list(steps.rules)):
            if not needed.isdisjoint(eqn.outputs):
                self._model.insert(0, eqn)
                needed.update(v for v in eqn.inputs if v in steps.active)
        self.examples = self._independent(steps)
        count = sum(math.prod(v.shape) for v in part.outputs) // self.examples.count
        if count > MAX_OUTPUTS:
            where = self.examples.mixed
            names = ", ".join(v.aval.str_short(short_dtypes=True) for v in part.outputs)
            why = (
                f"{count} outputs of each example"
                if where is None
                else f"{count} outputs of all examples together, which {_jaxpr.label(where)!r} "
                f"(used at {_jaxpr.location(where)}) does not compute each by itself"
            )
            raise ValueError(
                f"the exact Gauss-Newton diagonal takes a backward pass for each of {why} "
                f"({names}), more than {MAX_OUTPUTS}. Options: (1) a smaller batch; (2) "
                "curvature='gauss_newton', HesScale's approximation, in one pass; (3) if examples "
                "do not depend on one another, write that step so that the batch is an axis of "
                "its own."
            )

    def _independent(self, steps: Plan) -> Examples:
        """The most examples that are computed each by itself, along the leading axis."""
        sizes = {v.shape[0] if v.shape else 1 for v in self._part.outputs}
        mixed: Equation | None = None
        whole = math.gcd(*sizes)
        for count in (n for n in range(whole, 1, -1) if whole % n == 0):
            try:
                return Examples(self._program, steps, self._model, self._part, count)
            except Mixed as error:
                mixed = mixed or error.eqn
        return Examples(self._program, steps, (), self._part, 1, mixed)

    def diagonal(self, values: Mapping[Value, Any]) -> list[Any]:
        """The diagonal of ``J^T H J`` for each input of the program."""
        inputs = self._program.inputs
        curvatures = self._curvatures(values)
        examples = self.examples.split(self._model, values)
        zeros = [jnp.zeros(v.shape, v.dtype) for v in inputs]

        def of_example(example: tuple[Any, Any]) -> list[Any]:
            arrays, curvature = example
            pushed = functools.partial(self.examples.pushed, self._model, values, arrays)

            def outputs(tangents: Sequence[Any]) -> Any:
                found = pushed(dict(zip(inputs, tangents, strict=True)))
                return jnp.concatenate([self._flat(found, v) for v in self._part.outputs])

            transpose = jax.linear_transpose(outputs, zeros)
            return _quadratic(lambda z: transpose(z)[0], curvature)

        size = len(curvatures[0]) * sum(x.size for x in zeros)
        limit = max(1, AT_ONCE // max(size, 1))
        at_once = max(n for n in range(1, self.examples.count + 1) if self.examples.count % n == 0 and n <= limit)
        grouped = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // at_once, at_once, *x.shape[1:]),
            (examples, curvatures),
        )

        def add(total: list[Any], group: Any) -> tuple[list[Any], None]:
            return [t + x.sum(0) for t, x in zip(total, jax.vmap(of_example)(group), strict=True)], None

        start = [jnp.zeros(v.shape, spread_dtype(v.dtype)) for v in inputs]
        return lax.scan(add, start, grouped)[0]

    def _flat(self, tangents: Mapping[Value, Any], value: Value) -> Any:
        size = math.prod(value.shape) // self.examples.count
        if value not in tangents:
            return jnp.zeros(size, value.dtype)
        return tangents[value].reshape(size)

    def _curvatures(self, values: Mapping[Value, Any]) -> Any:
        """The Hessian of the loss in the outputs of each example: of shape ``(n, c, c)``."""
        count = self.examples.count
        outputs = [values[v] for v in self._part.outputs]
        sizes = [x.size // count for x in outputs]
        dtype = jnp.result_type(*outputs)

        def loss(flat: Any) -> Any:
            """The loss of outputs side by side, of each example in a row."""
            ends = list(itertools.accumulate(sizes))[:-1]
            parts = jnp.split(flat, ends, axis=1)
            replaced = dict(values)
            for v, x, part in zip(self._part.outputs, outputs, parts, strict=True):
                replaced[v] = part.reshape(x.shape).astype(x.dtype)
            return _rerun(self._program, [*self._part.equations, *self._tail], replaced)

        flat = jnp.concatenate([x.reshape(count, -1).astype(dtype) for x in outputs], axis=1)

        def column(position: Any) -> Any:
            unit = (jnp.arange(sum(sizes)) == position).astype(dtype)
            along = jnp.broadcast_to(unit, flat.shape)
            return jax.jvp(jax.grad(loss), (flat,), (along,))[1]

        return jnp.moveaxis(lax.map(column, jnp.arange(sum(sizes)), batch_size=32), 0, 1)


def _rerun(program: Program, equations: Iterable[Equation], values: dict[Value, Any]) -> Any:
    """The loss with some of the equations run again on other values."""

    def read(atom: Any) -> Any:
        return atom.value if isinstance(atom, Constant) else values[atom]

    for eqn in sorted(equations, key=program.equations.index):
        with _jaxpr.context(eqn):
            results = _jaxpr.listed(_jaxpr.bind(eqn, *map(read, eqn.inputs)), eqn)
        values.update(zip(eqn.outputs, results, strict=True))
    return read(program.outputs[0])


def _quadratic(pull: Callable[[Any], list[Any]], curvature: Any) -> list[Any]:
    """``sum_c J_c * (H J)_c`` of one example, where ``pull(z)`` is ``J^T z``."""

    def wide(x: Any) -> Any:
        return x.astype(spread_dtype(x.dtype))

    def paired(unit: Any, row: Any) -> list[Any]:
        return [wide(a) * wide(b) for a, b in zip(pull(unit), pull(row), strict=True)]

    units = jnp.eye(len(curvature), dtype=curvature.dtype)
    size = sum(x.size for x in jax.eval_shape(pull, curvature[0]))
    if len(units) * size <= AT_ONCE:
        rows = list(map(wide, jax.vmap(pull)(units)))
        weights = [curvature.astype(x.dtype) for x in rows]
        return [(x * jnp.tensordot(h, x, 1)).sum(0) for h, x in zip(weights, rows, strict=True)]

    def add(total: list[Any], both: Any) -> tuple[list[Any], None]:
        return list(map(jnp.add, total, paired(*both))), None

    start = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(paired, units[0], curvature[0])]
    return lax.scan(add, start, (units, curvature))[0]
