"""The interpreter of jaxprs computes what JAX does, and its derivatives."""

import random
from collections.abc import Callable
from typing import Any

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax import lax

import hesscale_jax as hs

UNARY = ("abs", "atan", "cos", "erf", "erfc", "exp", "exp2", "expm1", "logistic", "sin")
UNARY += ("square", "tanh")
OF_POSITIVE = ("log", "log1p", "rsqrt", "sqrt")
AT = jnp.array([1, 0, 1])
OUTSIDE = jnp.array([[1], [7]])
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: lambda x, y, name=name: getattr(lax, name)(x) for name in UNARY},
    **{name: lambda x, y, name=name: getattr(lax, name)(x**2 + 1) for name in OF_POSITIVE},
    "integer_pow": lambda x, y: lax.integer_pow(x, 3) + lax.integer_pow(y, -2),
    "pow": lambda x, y: (x**2 + 1) ** y,
    "div": lambda x, y: x / (y**2 + 1),
    "mul": lambda x, y: x * y[:1],
    "mul, rank 0": lambda x, y: lax.mul(x[0, 0], y),
    "max": lambda x, y: jnp.maximum(x, y) + jnp.maximum(x, x[:1]),
    "min": lambda x, y: jnp.minimum(x, 0.1),
    "select_n": lambda x, y: jnp.where(x > y, x**2, jnp.sin(y)),
    "dot_general": lambda x, y: x @ y.T,
    "dot_general, batch": lambda x, y: jnp.einsum("ab,ac->abc", x, y),
    "linear": lambda x, y: jnp.pad(jnp.stack([x, -y], 1)[:, ::-1].reshape(6, 2).T, 1),
    "linear, others": lambda x, y: jnp.cumsum(jnp.tile(jnp.concatenate([x, y]), (1, 2)), 1)[::2],
    "split": lambda x, y: jnp.split(x, 3, 1)[1] * y,
    "reduce_max": lambda x, y: jnp.max(x, 1) + jnp.prod(y, 1),
    "sort": lambda x, y: jnp.sort(x * y, 1),
    "cumprod": lambda x, y: jnp.cumprod(x, 1) + lax.cumlogsumexp(y, 1, reverse=True),
    "gather": lambda x, y: (x * y)[AT] + jnp.take_along_axis(x, AT[None], 1)[:1],
    "gather, filled": lambda x, y: jnp.take(x**2, OUTSIDE, 1, mode="fill", fill_value=0.5),
    "gather, clipped": lambda x, y: jnp.take(x**2, OUTSIDE, 1, mode="clip"),
    "scatter": lambda x, y: x.at[AT[:1]].set(y[:1] ** 2),
    "scatter-add": lambda x, y: (x**2).at[:, OUTSIDE[:, 0]].add(y[:, :2], mode="drop"),
    "scatter-mul": lambda x, y: x.at[1].multiply(y[0]),
    "dynamic_slice": lambda x, y: lax.dynamic_slice_in_dim(x * y, jnp.argmax(x[:, 0]), 1),
    "complex": lambda x, y: jnp.abs(jnp.exp(lax.complex(x, y)) + 2.0),
    "custom_jvp_call": lambda x, y: jax.nn.relu(x) * jax.nn.silu(y),
    "custom_linear_solve": lambda x, y: jnp.linalg.solve(x @ x.T + jnp.eye(2), y),
    "scan": lambda x, y: lax.scan(lambda c, a: (c * a, jnp.sin(c)), x[0], y, reverse=True)[1],
    "while": lambda x, y: lax.while_loop(lambda c: jnp.sum(c**2) > 1, lambda c: c * y / 4, x),
    "cond": lambda x, y: lax.cond(jnp.sum(x) > 5, jnp.sin, jnp.square, y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_along_directions(name: str) -> None:
    fun, rng = FUNCTIONS[name], np.random.default_rng(3)
    xs = list(rng.normal(size=(2, 2, 3)))
    ds, dds = (list(x) for x in rng.normal(size=(2, 2, 2, 3, 4)))

    def along(d: Any, dd: Any) -> Any:
        first = jax.jvp(fun, xs, d)
        return first, jax.jvp(lambda xs, d: jax.jvp(fun, xs, d)[1], (xs, d), (d, dd))[1]

    (y, d), dd = jax.jit(jax.vmap(along, -1, ((None, -1), -1)))(ds, dds)
    series = map(interpreter.Series, xs, ds, dds)
    (received,) = interpreter.expand(jax.make_jaxpr(fun)(*xs), list(series))
    for got, want in zip(received, (y, d, dd), strict=True):
        np.testing.assert_allclose(0 if got is None else got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", programs.FAMILIES)
def test_interpreted_equals_compiled(family: str) -> None:
    fun, args, *_ = programs.FAMILIES[family][0](random.Random(2))
    transformed = hs.hesscale(lambda *args: jnp.sum(fun(*args)), range(len(args)))
    received, expected = interpreter.traced(transformed, *args), jax.jit(transformed)(*args)
    for got, want in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        eps = float(jnp.finfo(want.dtype).eps)
        got, want = got.astype(float), want.astype(float)
        np.testing.assert_allclose(got, want, rtol=0, atol=64 * eps * max(1, np.abs(want).max()))
