"""Oracles, for whoever adds a rule: dense algebra next to what the library computes.

For a function ``y = f(x)`` that is one rule, or one block, with dense Jacobian ``J`` and second
derivatives ``H``, and random cotangents ``g`` of the shift and ``h`` of the spread,

    grad = J^T g,   hess_diag = (J*J)^T h + sum_j g_j H_jii
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hesscale_jax import _jaxpr
from hesscale_jax.moments import spread_dtype
from hesscale_jax.rules import RULES
from hesscale_jax.transform import transposed

__all__ = ["check_rule"]


def check_rule(
    fun: Callable[..., Any],
    *args: Any,
    key: Any,
    rules: Mapping[Any, Any] = RULES,
    rtol: float = 1e-9,
) -> None:
    """Compare a rule, or a block as a whole, with dense algebra at random cotangents.

    Args:
      fun: A function of floating-point arrays that returns one array, small enough for its dense
        Hessian. It is exact if it is one rule or one block.
      *args: The arrays to evaluate it at, better in float64 and away from kinks.
      key: A ``jax.random.key`` for the cotangents.
      rules: The table under test.
      rtol: How far an entry may be off, relative to the largest entry of the same array.

    Raises:
      AssertionError: The gradient or the diagonal differs.
    """
    out = jax.eval_shape(fun, *args)
    of_shift, of_spread = jax.random.split(key)
    g = jax.random.normal(of_shift, out.shape, out.dtype)
    h = jax.random.normal(of_spread, out.shape, spread_dtype(out.dtype))

    @jax.jit
    def received(args: Any) -> Any:
        program = _jaxpr.flatten(_jaxpr.trace(fun, *args))
        (value,), transpose = transposed(program, args, rules, "hessian", spreads=True)
        return value, *transpose(g, h)

    @jax.jit
    def expected(args: Any) -> Any:
        """The gradient and the diagonal in each argument, and the size of the terms in each."""
        results = []
        for i, x in enumerate(args):
            jacobian = jax.jacobian(fun, i)(*args).reshape(out.size, *x.shape)
            hessian = jax.hessian(fun, i)(*args).reshape(out.size, x.size, x.size)
            bends = jnp.einsum("jii->ji", hessian).reshape(jacobian.shape)
            per_output = (out.size, *(1,) * x.ndim)
            g_j, h_j = (c.reshape(per_output).astype(x.dtype) for c in (g, h))
            results.append((g_j * jacobian, jnp.concatenate([h_j * jacobian**2, g_j * bends])))
        return results

    value, grads, diagonals = received(args)
    assert_close(value, fun(*args)[None], rtol, "value")
    for i, (grad, diagonal) in enumerate(expected(args)):
        assert_close(grads[i], grad, rtol, f"gradient in argument {i}")
        assert_close(diagonals[i], diagonal, rtol, f"hess_diag in argument {i}")


def assert_close(received: Any, terms: Any, rtol: float, what: str) -> None:
    """Compare with the sum of the terms along axis 0.

    An entry may be off by ``rtol`` times the largest sum of the terms' absolute values: where the
    terms cancel, rounding is measured against them and not against what is left.
    """
    scale = np.max(np.abs(terms).sum(0), initial=1e-3)
    np.testing.assert_allclose(received, np.sum(terms, 0), rtol=0, atol=rtol * scale, err_msg=what)
