"""The diagonal at every k-th step, and optimizers that are told when it is fresh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optimizers import assert_close, steps, tree_of

import hesscale_jax as hs

KEEPS_CURVATURE = {
    "scale_by_hesscale": hs.scale_by_hesscale,
    "adahesscale": lambda **options: hs.adahesscale(0.1, **options),
    "scale_by_curvature_trust_region": lambda **options: hs.scale_by_curvature_trust_region(
        0.1, **options
    ),
    "scaled_adahesscale": lambda **options: hs.scaled_adahesscale(0.1, **options),
    "scaled_adam": lambda **options: hs.scaled_adam(0.1, **options),
}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # the arithmetic of Adam needs it
        yield


every_solver = pytest.mark.parametrize("build", KEEPS_CURVATURE.values(), ids=list(KEEPS_CURVATURE))


def loss(params, x, scale=1.0):
    return scale * jnp.sum(jnp.tanh(x @ params["dense"]["w"] + params["bias"][None]) ** 3)


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))


def test_the_diagonal_comes_at_every_kth_step():
    traces = []

    def traced(params, x, scale):
        traces.append(None)
        return loss(params, x, scale)

    transformed = jax.jit(hs.value_and_hesscale_every(3)(traced))
    params = tree_of(0)
    value, (grad, hess_diag) = hs.value_and_hesscale(loss)(params, X, scale=2.0)
    for step in range(7):
        received = transformed(step, params, X, scale=2.0)
        fresh = step % 3 == 0
        assert received[2] == fresh
        expected = hess_diag if fresh else jax.tree.map(jnp.zeros_like, hess_diag)
        assert_close(received[:2], (value, (grad, expected)))
    assert len(traces) == 3  # one for each branch, and one for the shapes of no curvature


def test_argnums_aux_and_curvature_are_handed_on():
    def with_aux(x, params):
        return loss(params, x), {"rows": x.sum(1)}

    every = hs.value_and_hesscale_every(2)(with_aux, 1, True, curvature="gauss_newton")
    expected = hs.value_and_hesscale(with_aux, 1, True, curvature="gauss_newton")(X, tree_of(0))
    for step in (0, 1):
        value, (grad, hess_diag), fresh = every(step, X, tree_of(0))
        assert_close(value, expected[0])
        assert_close(grad, expected[1][0])
        assert fresh == (step == 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(hess_diag))


def test_a_static_step_leaves_no_branch():
    every = hs.value_and_hesscale_every(3)(loss)
    for step in (0, 1):
        traced = jax.jit(every, static_argnums=0).trace(step, tree_of(0), X)
        assert "cond" not in str(traced.jaxpr)
        *received, fresh = every(step, tree_of(0), X)
        assert fresh is (step == 0)
        *expected, _ = every(jnp.asarray(step), tree_of(0), X)
        assert_close(received, expected)


def test_k_is_checked():
    with pytest.raises(ValueError, match="k must be 1 or more"):
        hs.value_and_hesscale_every(0)


@every_solver
def test_what_is_not_fresh_leaves_the_average_alone(build):
    solver, params = build(), tree_of(99)
    update = jax.jit(solver.update)
    (grad, hess_diag), (_, other), *_ = steps(3)
    state = solver.init(params)
    _, after = update(grad, state, params, hess_diag=hess_diag, refreshed=True)
    _, expected = update(grad, state, params, hess_diag=hess_diag)
    assert_close(after, expected)
    zero = jax.tree.map(jnp.zeros_like, other)
    for stale in (other, zero):
        _, kept = update(grad, after, params, hess_diag=stale, refreshed=False)
        assert_close(curvature_of(kept), curvature_of(after), rtol=0)
    _, taken = update(grad, after, params, hess_diag=other, refreshed=True)
    assert not np.array_equal(curvature_of(taken)[0], curvature_of(after)[0])


@every_solver
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_enters(build, bad):
    params = tree_of(99)
    grad, hess_diag = steps(1)[0]
    poisoned = hess_diag | {"bias": hess_diag["bias"].at[1].set(bad)}
    guarded, plain = build(), build(skip_nonfinite=False)
    state = guarded.init(params)
    updates, after = guarded.update(grad, state, params, hess_diag=poisoned)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, after)))
    assert_close(curvature_of(after), curvature_of(state), rtol=0)
    _, entered = plain.update(grad, state, params, hess_diag=poisoned)
    if np.isnan(bad):  # What is infinite counts as the largest square there is.
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(entered))
    assert not np.array_equal(curvature_of(entered)[0], curvature_of(state)[0])
    received, _ = guarded.update(grad, state, params, hess_diag=hess_diag)
    assert_close(received, plain.update(grad, state, params, hess_diag=hess_diag)[0])


def test_without_any_curvature_nothing_moves():
    solver, params = hs.adahesscale(0.1), tree_of(99)
    grad, hess_diag = steps(1)[0]
    updates, _ = solver.update(
        grad, solver.init(params), params, hess_diag=hess_diag, refreshed=False
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_training_with_a_diagonal_now_and_then():
    solver = hs.adahesscale(0.02, eps=1e-2)
    every = hs.value_and_hesscale_every(4)(loss)

    @jax.jit
    def train(params):
        def step(carry, count):
            params, state = carry
            value, (grad, hess_diag), fresh = every(count, params, X)
            updates, state = solver.update(
                grad, state, params, hess_diag=hess_diag, refreshed=fresh
            )
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, solver.init(params)), jnp.arange(40))

    (_, state), values = train(tree_of(0))
    assert values[-1] < values[0] - 1
    assert state[0].count == 40
    assert state[0].nu_count == 10


def curvature_of(state):
    """The averages of the curvature in a state, and their counts."""
    ours = (hs.ScaleByHesScaleState, hs.ScaleByCurvatureTrustRegionState)
    states = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ours))
    found = [(s.nu, getattr(s, "nu_count", ())) for s in states if isinstance(s, ours)]
    return jax.tree.leaves(found)
