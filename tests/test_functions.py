"""Every function of ``jax.nn``, ``jax.scipy.special`` and ``jax.scipy.stats``: each alone, exact.

Those of a module are compiled as one program; what fails is listed by name.
"""

import warnings
from collections.abc import Callable
from typing import Any

import functions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import EXCEPTIONS, LINES, Line, public
from jax.flatten_util import ravel_pytree

import hesscale_jax as hs

STEP = 2e-4
DIFFERENCES = [(k / (12 * STEP), i * STEP) for k, i in ((1, -2), (-8, -1), (8, 1), (-1, 2))]


def loss(function: Callable[..., Any], line: Line) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A loss of the operands that are differentiated, and those."""
    options = line[-1] if isinstance(line[-1], dict) else {}
    operands = [x for x in line if x is not options]
    moving = [i for i, x in enumerate(operands) if isinstance(x, jax.Array)]

    def fun(*moved: jax.Array) -> jax.Array:
        filled = list(operands)
        for i, x in zip(moving, moved, strict=True):
            filled[i] = x
        results = jax.tree.leaves(function(*filled, **options))
        return jnp.sum(jnp.square(sum((k + 1) * y for k, y in enumerate(results)) - 0.3))

    return fun, [operands[i] for i in moving]


def differences(lines: dict[str, tuple[Callable[..., Any], Line]]) -> dict[str, str]:
    """Which functions differ from ``jax.grad`` or from the Hessian's diagonal, and how."""
    made = {name: loss(*line) for name, line in lines.items()}
    flat = {name: ravel_pytree(operands) for name, (_, operands) in made.items()}
    points = {name: x for name, (x, _) in flat.items()}
    failed = {}

    @jax.jit
    def received(points: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, x in points.items():
            fun, operands = made[name]
            try:
                moments = hs.hesscale(fun, range(len(operands)))(*flat[name][1](x))
            except Exception as error:  # each is reported by name
                failed[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = [ravel_pytree(m)[0] for m in moments]
        return found

    @jax.jit
    def gradient(points: dict[str, Any]) -> dict[str, Any]:
        def total(points: dict[str, Any]) -> Any:
            return sum(made[name][0](*flat[name][1](x)) for name, x in points.items())

        return jax.grad(total)(points)

    ours = received(points)
    points = {name: points[name] for name in ours}
    grads = gradient(points)
    hessians = {name: np.zeros(x.size) for name, x in points.items()}
    for i in range(max(x.size for x in points.values())):
        for weight, step in DIFFERENCES:
            along = {name: x + step * np.eye(x.size)[i % x.size] for name, x in points.items()}
            for name, g in gradient(along).items():
                if i < len(g):
                    hessians[name][i] += weight * g[i]
    for name, (grad, diagonal) in ours.items():
        # The diagonal is compared with fourth differences: compiling the gradient takes less time.
        for what, got, want, rtol in (
            ("gradient", grad, grads[name], 1e-9),
            ("hess_diag", diagonal, hessians[name], 1e-6),
        ):
            if not np.allclose(got, want, rtol=rtol, atol=1e-3 * rtol * np.abs(want).max()):
                failed[name] = f"{what} {got}, exact {want}"
    return failed


SLOW = ("jax.scipy.special", "jax.scipy.stats")


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in LINES]
)
def test_is_exact(module: str) -> None:
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        failed = differences(functions.in_module(module))
    assert not failed, "\n".join(f"{name}: {how}" for name, how in failed.items())


def test_every_function_has_a_line_or_a_reason() -> None:
    has_line = {name for module in LINES for name in functions.in_module(module)}
    assert public().keys() - has_line == EXCEPTIONS.keys() & public().keys()


def test_what_differs_is_found() -> None:
    def mixed(x: jax.Array) -> jax.Array:
        # Mixes entries twice, in a loop.
        return jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(jnp.cumsum(y)), x)

    assert differences({"mixed": (mixed, (functions.REAL,))}).keys() == {"mixed"}
