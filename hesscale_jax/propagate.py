"""The interpreter: one walk over a program in program order, moments in, moments out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Constant, Equation, Program, Value
from hesscale_jax.blocks import Block, Plan, plan
from hesscale_jax.errors import UnsupportedPrimitiveError
from hesscale_jax.head import loss_head
from hesscale_jax.moments import Moments
from hesscale_jax.pointwise import BlockArithmetic
from hesscale_jax.rules.derivatives import Pointwise
from hesscale_jax.rules.multilinear import multilinear
from hesscale_jax.rules.selection import Join, Reduction, Selection
from hesscale_jax.rules.table import find

__all__ = ["propagate"]


def propagate(
    program: Program,
    operands: Sequence[Moments],
    rules: Mapping[Any, Any],
    curvature: str = "hessian",
    spreads: bool = False,
) -> list[Moments]:
    """Push moments through a program.

    Args:
      program: The program.
      operands: One per input.
      rules: The rule of each primitive, by the primitive or its name.
      curvature: ``"hessian"``, or ``"gauss_newton"`` to keep second derivatives in the head alone.
      spreads: Whether the loss's spread is asked for too.

    Returns:
      One per output. Of all but the first, the loss, only the primal is asked for.
    """
    moving = [v for v, x in zip(program.inputs, operands, strict=True) if x.active]
    steps = plan(program, moving, program.outputs[:1], lambda eqn: find(rules, eqn))
    if curvature == "hessian":
        return _Walk(program, operands, steps, rules, lambda eqn: True, spreads).run()
    head = loss_head(program, moving, steps.rules, lambda eqn: _is_affine(eqn, steps))
    return _Walk(program, operands, steps, rules, head.__contains__, spreads).run()


class _Walk:
    def __init__(
        self,
        program: Program,
        operands: Sequence[Moments],
        steps: Plan,
        rules: Mapping[Any, Any],
        curved: Callable[[Equation], bool],
        spreads: bool,
    ) -> None:
        self._program = program
        self._plan = steps
        self._rules = rules
        self._curved = curved
        self._spreads = spreads
        self._moments = dict(zip(program.inputs, operands, strict=True))
        self._blocks: dict[Block, BlockArithmetic] = {}
        self._made_in: dict[Value, BlockArithmetic] = {}

    def run(self) -> list[Moments]:
        for eqn in self._program.equations:
            with _jaxpr.context(eqn):
                results = self._step(eqn)
            self._moments.update(zip(eqn.outputs, results, strict=True))
        read = self._collapsed if self._spreads else self._read
        return list(map(read, self._program.outputs))

    def _step(self, eqn: Equation) -> list[Moments]:
        if eqn not in self._plan.rules:
            results = _jaxpr.bind(eqn, *(self._read(v).primal for v in eqn.inputs))
            return list(map(Moments, _jaxpr.listed(results, eqn)))
        rule = self._plan.rules[eqn]
        if eqn in self._plan.blocks:
            return [self._in_block(eqn, rule)]
        if rule is None:
            raise UnsupportedPrimitiveError(eqn.name, _jaxpr.location(eqn))
        return rule(eqn, [self._collapsed(v) for v in eqn.inputs], self._recurse(eqn))

    def _in_block(self, eqn: Equation, rule: Any) -> Moments:
        block = self._plan.blocks[eqn]
        if block not in self._blocks:
            self._blocks[block] = BlockArithmetic(block, lambda v: self._collapsed(v).spread)
        arithmetic = self._blocks[block]
        operands = [self._read(v) for v in eqn.inputs]
        (value,) = eqn.outputs
        self._made_in[value] = arithmetic
        if isinstance(rule, Pointwise):
            return arithmetic.pointwise(eqn, rule, operands, self._curved(eqn))
        if isinstance(rule, Join):
            return arithmetic.pointwise(eqn, rule.inside, operands, self._curved(eqn))
        if isinstance(rule, Reduction):
            return arithmetic.reduction(eqn, rule, operands)
        return arithmetic.view(eqn, operands)

    def _read(self, atom: Value | Constant) -> Moments:
        """Without the spread, if the value was made in a block."""
        if isinstance(atom, Constant):
            return Moments(atom.value)
        moments = self._moments[atom]
        return moments if atom in self._plan.active else Moments(moments.primal)

    def _collapsed(self, atom: Value | Constant) -> Moments:
        """With the spread with which the value leaves its block."""
        if isinstance(atom, Value) and atom in self._made_in:
            spread = self._made_in.pop(atom).spread(atom)
            self._moments[atom] = self._moments[atom]._replace(spread=spread)
        return self._read(atom)

    def _recurse(self, eqn: Equation) -> Callable[[Any, Sequence[Moments]], list[Moments]]:
        def recurse(closed: Any, operands: Sequence[Moments]) -> list[Moments]:
            """Push moments through a jaxpr that the equation holds."""
            program = _jaxpr.flatten(closed)
            moving = [v for v, x in zip(program.inputs, operands, strict=True) if x.active]
            steps = plan(program, moving, program.outputs, lambda inner: find(self._rules, inner))
            curved = self._curved(eqn)
            return _Walk(program, operands, steps, self._rules, lambda inner: curved, True).run()

        # Whether a rule keeps second derivatives: Gauss-Newton drops them in the model.
        recurse.curved = self._curved(eqn)  # type: ignore[attr-defined]
        return recurse


def _is_affine(eqn: Equation, steps: Plan) -> bool:
    """Whether an equation's result is affine in its active operands together."""
    rule = steps.rules[eqn]
    positions = [i for i, v in enumerate(eqn.inputs) if v in steps.active]
    if isinstance(rule, Pointwise):
        return rule.affine(positions)
    if rule is multilinear:
        return len(positions) == 1
    return isinstance(rule, Selection)
