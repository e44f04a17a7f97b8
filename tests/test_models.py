"""Whole models: those of `benchmarks/zoo.py`, and a GPT in bfloat16.

They are written the way users write them, so without the tests' strict promotion.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hesscale_jax as hs

for package in ("equinox", "haiku"):
    pytest.importorskip(package)

from models import gpt_task  # noqa: E402
from zoo import ZOO  # noqa: E402

# Equal up to control flow, and compared with one another.
GPTS = "GPT, scanned", "GPT, rematerialised", "GPT, scanned and rematerialised"
RECURRENT = "LSTM", "GRU", "LSTM, Linen", "GRU, Linen"


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_trees_close(received, expected, rtol):
    """Up to ``rtol`` of the largest entry of all."""
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    received, expected = map(jax.tree.leaves, (received, expected))
    largest = max(np.max(np.abs(leaf), initial=0) for leaf in expected)
    assert 0 < largest < np.inf
    for r, e in zip(received, expected, strict=True):
        assert r.dtype == e.dtype
        np.testing.assert_allclose(r, e, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in GPTS])
def test_gradient_is_that_of_jax_and_the_diagonal_finite(name):
    model = ZOO[name]()
    params, batch = model.draw(0, jnp.float64)
    expected = jax.jit(jax.grad(model.loss))(params, *batch)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(expected))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))

    grad, diagonal = jax.jit(hs.hesscale(model.loss))(params, *batch)
    assert_trees_close(grad, expected, rtol=1e-9)
    assert jax.tree.structure(diagonal) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(diagonal))
    assert any(leaf.any() for leaf in jax.tree.leaves(diagonal))


def stacked(state):
    """The parameters of a GPT whose layers are a list, for one that scans over its layers."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *state["layers"].values())
    return nnx.State(dict(state) | {"layers": layers})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != GPTS[-1])) for name in GPTS],
)
def test_control_flow_makes_no_difference(name):
    looped, other = ZOO["GPT"](), ZOO[name]()
    params, batch = looped.draw(0, jnp.float64)
    arranged = stacked if "scanned" in name else lambda state: state
    value, grad = jax.jit(jax.value_and_grad(other.loss))(arranged(params), *batch)

    expected_value, expected = jax.jit(hs.value_and_hesscale(looped.loss))(params, *batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    assert_trees_close(grad, arranged(expected[0]), rtol=1e-9)
    received = jax.jit(hs.hesscale(other.loss))(arranged(params), *batch)
    for r, e in zip(received, expected, strict=True):
        assert_trees_close(r, arranged(e), rtol=1e-9)


def test_bfloat16():
    task = gpt_task(4, vocabulary=30, length=16, width=32, heads=4, layers=1)
    params, batch = task.draw(0, jnp.bfloat16)
    diagonal = jax.jit(hs.hesscale(task.loss))
    _, received = diagonal(params, *batch)
    _, expected = diagonal(jax.tree.map(lambda p: p.astype(jnp.float32), params), *batch)

    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(received))
    pairs = list(zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True))
    difference = sum(np.abs(r.astype(jnp.float32) - e).sum() for r, e in pairs)
    # The type has 8 bits, and is off by 0.7 % here; the gradient by as much.
    assert difference < 0.05 * sum(np.abs(e).sum() for _, e in pairs)
