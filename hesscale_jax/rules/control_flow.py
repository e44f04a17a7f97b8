"""Loops, branches and mapped programs: the equations that run other programs.

The moments go into the program that the equation holds and come out of it. Each step of a loop
takes the entries of what it is handed as independent: off-diagonal terms between steps are dropped,
unless a block leads through the loop (:mod:`hesscale_jax.loops`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Body, Equation
from hesscale_jax._mesh import lying
from hesscale_jax.errors import WhileLoopError
from hesscale_jax.factored import Factored
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.rules.table import Unsupported

__all__ = ["ControlFlow", "cond", "scan", "shard_map", "while_loop"]

Rule = Callable[[Equation, Sequence[Moments], Any], list[Moments]]


class ControlFlow:
    """The family of equations that run their bodies: a path leads through these alone."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def __call__(self, eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
        """The moments of the results."""
        return self._rule(eqn, operands, recurse)


def _scan(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``carry, y = body(constants, carry, x)`` in order, with moments in the carry.

    What a step hands to the next has moments from the start if it has at any step. What is kept of
    a step for the transpose are the results of products, reductions and the like; what is cheap to
    compute again from them, entry by entry, is.
    """
    (body,) = eqn.bodies
    consts, carry, xs = ([operands[i] for i in group] for group in _jaxpr.scan_groups(eqn))
    moving = recurse.moving(body)[len(consts) :][: len(carry)]

    def step(carry: list[Moments], xs: list[Moments]) -> tuple[list[Moments], list[Moments]]:
        results = recurse(body, [*consts, *carry, *xs])
        return filled(results[: len(carry)], moving), results[len(carry) :]

    carry, ys = run_steps(eqn, step, filled(carry, moving), list(map(_each, xs)), recurse.policy)
    return [*carry, *ys]


def run_steps(eqn: Equation, step: Any, carry: Any, xs: list[Moments], policy: Any) -> Any:
    """``lax.scan`` as a loop of the user's does it."""
    (body,) = eqn.bodies
    # Of what has an effect nothing is computed again, nor where the user says what is.
    regions = any(inner.region for inner in body.program.equations)
    if not (regions or _jaxpr.has_effects(body.program)):
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    how = {name: eqn.params[name] for name in ("reverse", "unroll")}
    length = None if xs else eqn.params["length"]  # The former may be symbolic.
    if any(jax.typeof(x).sharding.mesh.explicit_axes for x in jax.tree.leaves(carry)):
        step, carry = _lying_alike(step, carry, xs)
    return lax.scan(step, carry, xs, length, **how)


def _lying_alike(step: Any, carry: Any, xs: list[Moments]) -> tuple[Any, Any]:
    """A loop whose carry lies at every step as the first one hands it on."""

    def first(carry: Any, xs: list[Moments]) -> Any:
        return step(carry, jax.tree.map(lambda x: lax.index_in_dim(x, 0, keepdims=False), xs))[0]

    types = jax.eval_shape(first, carry, xs)

    def settled(carry: Any, xs: list[Moments]) -> Any:
        carry, ys = step(carry, xs)
        return jax.tree.map(lying, carry, types), ys

    return settled, jax.tree.map(lying, carry, types)


def _cond(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``y = branches[which](x)``: a result has moments if it has in any branch."""
    which, *operands = operands
    bodies: list[Body] = list(eqn.bodies)
    given: list[list[Any]] = [[] for _ in bodies]
    if _jaxpr.uses_state(eqn):
        bodies, given = _with_state(eqn, which.primal, [x.primal for x in operands])

    def run(body: Body, given: list[Any]) -> Callable[[list[Moments]], list[Moments]]:
        def branch(operands: list[Moments]) -> list[Moments]:
            return filled(recurse(body, [*operands, *map(Moments, given)]), recurse.wanted)

        return branch

    return lax.switch(which.primal, list(map(run, bodies, given)), operands)


def _with_state(eqn: Equation, which: Any, primals: list[Any]) -> tuple[list[Body], Any]:
    """Branches without an effect, and what their equations with one return.

    Mutable arrays are read and written here, once; the moments are pushed through the rest.
    """
    for inner in (inner for body in eqn.bodies for inner in body.program.equations):
        if inner.sources[0].effects and inner.bodies and any(map(_jaxpr.is_inexact, inner.outputs)):
            reason = "in a branch, mutable arrays are not followed into loops and further branches"
            Unsupported(reason, curable=False)(inner, (), None)
    bodies, returned = zip(*map(_jaxpr.without_state, eqn.bodies), strict=True)

    def run(chosen: int) -> Callable[[], list[list[Any]]]:
        def branch() -> list[list[Any]]:
            others = [
                [lying(jnp.zeros(v.shape, v.dtype), v.aval) for v in values] for values in returned
            ]
            others[chosen] = _jaxpr.evaluate(eqn.bodies[chosen].program, primals, returned[chosen])
            return others

        return branch

    with _jaxpr.at_once():
        return list(bodies), lax.switch(which, list(map(run, range(len(bodies)))))


def _while(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """No rule: how many steps there are to go back through is not known while tracing."""
    raise WhileLoopError(_jaxpr.location(eqn))


def _shard_map(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``y = body(x)`` on each device: moments are sharded as their values are."""
    (body,) = eqn.bodies
    in_specs = tuple(map(_spec, eqn.params["in_specs"], operands))

    def run(*operands: Moments) -> tuple[Moments, ...]:
        return tuple(recurse(body, list(map(_local, operands))))

    return list(_jaxpr.shard_mapped(eqn, run, in_specs)(*operands))


def _spec(spec: Any, x: Moments) -> Any:
    """How an operand of ``shard_map`` is split, of which the value is split by ``spec``."""
    structured = isinstance(x.spread, Factored)
    return Moments(spec, spec, x.spread.sharded(spec)) if structured else spec


def _local(x: Moments) -> Moments:
    """An operand of ``shard_map`` on one device."""
    structured = isinstance(x.spread, Factored)
    return x._replace(spread=x.spread.local(x.primal.shape)) if structured else x


def _each(x: Moments) -> Moments:
    """What a loop takes a slice of at each step."""
    structured = isinstance(x.spread, Factored)
    return x._replace(spread=x.spread.each(x.spread.axes[0])) if structured else x


def filled(values: Sequence[Moments], moving: Sequence[bool]) -> list[Moments]:
    """Values with a shift and a spread where they move, and without where they do not."""
    return [
        _fill(x) if moves else Moments(x.primal) for x, moves in zip(values, moving, strict=True)
    ]


def _fill(x: Moments) -> Moments:
    wide = spread_dtype(jnp.result_type(x.primal))
    shift = lax.full_like(x.primal, 0) if x.shift is None else x.shift
    spread = lax.full_like(x.primal, 0, wide) if x.spread is None else x.spread
    aval = jax.typeof(x.primal)
    return Moments(x.primal, lying(shift, aval), lying(spread, aval))


scan = ControlFlow(_scan)
cond = ControlFlow(_cond)
while_loop = ControlFlow(_while)
shard_map = ControlFlow(_shard_map)
