"""Loops, branches and mapped programs: the equations that run other programs.

The moments go into the program that the equation holds and come out of it. Each step of a loop
takes the entries of what it is handed as independent: off-diagonal terms between steps are dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax._jaxpr import Equation
from hesscale_jax.errors import WhileLoopError
from hesscale_jax.moments import Moments, spread_dtype

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
        return _filled(results[: len(carry)], moving), results[len(carry) :]

    # Of what has an effect nothing is computed again, nor where the user says what is.
    regions = any(inner.region for inner in body.program.equations)
    if not (regions or _jaxpr.has_effects(body.program)):
        step = jax.checkpoint(step, prevent_cse=False, policy=recurse.policy)
    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, _filled(carry, moving), xs, **how)
    return [*carry, *ys]


def _cond(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``y = branches[which](x)``: a result has moments if it has in any branch."""
    which, *operands = operands

    def run(body: Any) -> Callable[[list[Moments]], list[Moments]]:
        return lambda operands: _filled(recurse(body, operands), recurse.wanted)

    return lax.switch(which.primal, [run(body) for body in eqn.bodies], operands)


def _while(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """No rule: how many steps there are to go back through is not known while tracing."""
    raise WhileLoopError(_jaxpr.location(eqn))


def _shard_map(eqn: Equation, operands: Sequence[Moments], recurse: Any) -> list[Moments]:
    """``y = body(x)`` on each device: moments are sharded as their values are."""
    (body,) = eqn.bodies
    mapped = _jaxpr.shard_mapped(eqn, lambda *operands: tuple(recurse(body, operands)))
    return list(mapped(*operands))


def _filled(values: Sequence[Moments], moving: Sequence[bool]) -> list[Moments]:
    """Values with a shift and a spread where they move, and without where they do not."""
    return [
        _fill(x) if moves else Moments(x.primal) for x, moves in zip(values, moving, strict=True)
    ]


def _fill(x: Moments) -> Moments:
    wide = spread_dtype(jnp.result_type(x.primal))
    shift = lax.full_like(x.primal, 0) if x.shift is None else x.shift
    spread = lax.full_like(x.primal, 0, wide) if x.spread is None else x.spread
    return Moments(x.primal, shift, spread)


scan = ControlFlow(_scan)
cond = ControlFlow(_cond)
while_loop = ControlFlow(_while)
shard_map = ControlFlow(_shard_map)
