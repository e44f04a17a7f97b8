"""The optimizers: their formulas against NumPy and the authors' code, and what Optax asks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hesscale_jax as hs
from hesscale_jax.optimizers import ScaleByHesScaleState, adahesscale, scale_by_hesscale

STEPS = 5
RATES = np.linspace(0.5, 0.1, STEPS)


def schedule(count):
    return jnp.asarray(RATES)[count]


def tree_of(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"w": jnp.asarray(rng.normal(size=(3, 2)), dtype)},
        "bias": jnp.asarray(rng.normal(size=2), dtype),
    }


def steps(count=STEPS, dtype=jnp.float64):
    """A gradient and a diagonal, with entries of both signs, for each step."""
    return [(tree_of(2 * t, dtype), tree_of(2 * t + 1, dtype)) for t in range(count)]


def run(transformation, params, batches, **extra_args):
    """All updates, stacked, and the last state."""
    state = transformation.init(params)
    received = []
    for grad, hess_diag in batches:
        updates, state = transformation.update(
            grad, state, params, hess_diag=hess_diag, **extra_args
        )
        params = optax.apply_updates(params, updates)
        received.append(updates)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *received), state


def restated(batches, b1, b2, eps, power, root):
    """m^ / (root(v^) + eps) in NumPy, leaf by leaf."""

    def leaf(*grads_and_diagonals):
        grads, diagonals = np.split(np.stack(grads_and_diagonals), 2)
        m = v = np.zeros_like(grads[0])
        for t, (g, h) in enumerate(zip(grads, diagonals, strict=True), start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * power(h)
            yield (m / (1 - b1**t)) / (root(v / (1 - b2**t)) + eps)

    grads, diagonals = zip(*batches, strict=True)
    return jax.tree.map(lambda *leaves: np.stack(list(leaf(*leaves))), *grads, *diagonals)


def assert_close(received, expected, rtol=1e-12):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    jax.tree.map(lambda r, e: np.testing.assert_allclose(r, e, rtol=rtol), received, expected)


def assert_same_avals(received, expected):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, received) == jax.tree.map(jax.typeof, expected)


# The formula


@pytest.mark.parametrize(
    ("moment", "power", "root"),
    [("squared", np.square, np.sqrt), ("abs", np.abs, lambda v: v)],
    ids=["squared", "abs"],
)
@pytest.mark.parametrize(
    ("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.8, 0.95, 0.3), (0.0, 0.0, 1e-3)]
)
def test_updates_equal_the_formula(b1, b2, eps, moment, power, root):
    batches = steps()
    received, state = run(scale_by_hesscale(b1, b2, eps, moment=moment), tree_of(99), batches)
    assert_close(received, restated(batches, b1, b2, eps, power, root))
    assert state.count == STEPS


def test_without_eps_the_updates_are_clipped():
    batches = steps()
    received, _ = run(scale_by_hesscale(), tree_of(99), batches)
    unclipped = restated(batches, 0.9, 0.999, 0.0, np.square, np.sqrt)
    assert (np.abs(unclipped["dense"]["w"]) > 1).any()
    assert (np.abs(unclipped["dense"]["w"]) < 1).any()
    assert_close(received, jax.tree.map(lambda u: np.clip(u, -1, 1), unclipped))


def test_alias_descends_at_the_learning_rate():
    batches = steps()
    received, _ = run(adahesscale(0.25, 0.8, 0.95, 1e-3, moment="abs"), tree_of(99), batches)
    direction, _ = run(scale_by_hesscale(0.8, 0.95, 1e-3, moment="abs"), tree_of(99), batches)
    assert_close(received, jax.tree.map(lambda u: -0.25 * u, direction))


def test_trajectory_of_the_authors():
    """Six steps of the authors' optimizer on a tanh network with two hidden layers."""
    golden = np.load(Path(__file__).parent / "golden" / "optim_adahesscale.npz")

    def params_after(step):
        names = [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
        return {name: jnp.asarray(golden[f"param{step}/{name}"]) for name in names}

    def linear(params, layer, x):
        z = jnp.einsum("ni,oi->no", x, params[f"{layer}.weight"])
        return z + params[f"{layer}.bias"][None]

    def loss(params, x, y):
        x = jnp.tanh(linear(params, 0, x))
        x = jnp.tanh(linear(params, 2, x))
        logits = linear(params, 4, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

    (b1, b2), eps, lr = golden["betas"].tolist(), float(golden["eps"]), float(golden["lr"])
    solver = adahesscale(lr, b1, b2, eps)
    curvature = jax.jit(hs.value_and_hesscale(loss))
    params = params_after(0)
    state = solver.init(params)
    for step, (x, y) in enumerate(zip(golden["xs"], golden["ys"], strict=True)):
        value, (grad, hess_diag) = curvature(params, x, y)
        np.testing.assert_allclose(value, golden["losses"][step], rtol=1e-9)
        updates, state = solver.update(grad, state, params, hess_diag=hess_diag)
        params = optax.apply_updates(params, updates)
        assert_close(params, params_after(step + 1), rtol=1e-9)


# Errors


@pytest.mark.parametrize("solver", [scale_by_hesscale(), adahesscale(0.1)])
def test_missing_curvature_is_named(solver):
    params = tree_of(0)
    with pytest.raises(TypeError, match=r"hess_diag=.*hesscale_jax\.hesscale"):
        solver.update(params, solver.init(params), params)


@pytest.mark.parametrize(
    "hess_diag",
    [
        {"bias": jnp.ones(2)},
        tree_of(0) | {"extra": jnp.ones(1)},
        tree_of(0) | {"bias": {"deeper": jnp.ones(2)}},
        tree_of(0) | {"bias": None},
        [jnp.ones(2), jnp.ones((3, 2))],
        jnp.ones(2),
    ],
    ids=["fewer leaves", "more leaves", "deeper", "None", "another container", "an array"],
)
def test_another_structure_is_an_error_of_tracing(hess_diag):
    solver, params = scale_by_hesscale(), tree_of(0)
    state = solver.init(params)
    with pytest.raises(ValueError, match="'hess_diag' has a different structure from 'updates'"):
        jax.eval_shape(lambda h: solver.update(params, state, hess_diag=h), hess_diag)


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 3, 2), ()])
def test_another_shape_is_an_error_of_tracing(shape):
    solver, params = scale_by_hesscale(), tree_of(0)
    state = solver.init(params)
    hess_diag = params | {"dense": {"w": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=r"hess_diag\['dense'\]\['w'\] is .*\['w'\] is \(3, 2\)"):
        jax.eval_shape(lambda h: solver.update(params, state, hess_diag=h), hess_diag)


def test_unknown_moment_is_an_error():
    with pytest.raises(ValueError, match="'moment' must be one of"):
        scale_by_hesscale(moment="cubed")


# Composition


def test_unknown_extra_arguments_are_ignored():
    batches = steps()
    received, _ = run(adahesscale(0.1), tree_of(99), batches, value=3.0, unknown="anything")
    expected, _ = run(adahesscale(0.1), tree_of(99), batches)
    assert_close(received, expected, rtol=0)


def test_second_call_does_not_recompile():
    solver, params = adahesscale(0.1), tree_of(99)
    traces = []

    @jax.jit
    def update(grad, state, hess_diag):
        traces.append(None)
        return solver.update(grad, state, hess_diag=hess_diag)

    state = solver.init(params)
    for grad, hess_diag in steps(3):
        _, state = update(grad, state, hess_diag)
    assert len(traces) == 1
    assert update._cache_size() == 1


def test_injected_hyperparameters():
    batches = steps()
    received, state = run(
        optax.inject_hyperparams(adahesscale)(schedule, b1=0.8, eps=1e-3), tree_of(99), batches
    )
    expected, _ = run(adahesscale(schedule, b1=0.8, eps=1e-3), tree_of(99), batches)
    assert_close(received, expected)
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps"}


def test_injected_hyperparameters_can_be_changed():
    solver, params = optax.inject_hyperparams(adahesscale)(0.1), tree_of(99)
    [(grad, hess_diag)] = steps(1)
    state = solver.init(params)
    before, _ = solver.update(grad, state, hess_diag=hess_diag)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    after, _ = solver.update(grad, state, hess_diag=hess_diag)
    assert_close(after, jax.tree.map(lambda u: 2 * u, before))


@pytest.mark.parametrize(
    "chained",
    [
        optax.chain(optax.identity(), scale_by_hesscale(), optax.scale(-0.1)),
        optax.named_chain(("direction", scale_by_hesscale()), ("step", optax.scale(-0.1))),
    ],
    ids=["chain", "named_chain"],
)
def test_chains_hand_the_curvature_on(chained):
    batches = steps()
    received, _ = run(chained, tree_of(99), batches)
    expected, _ = run(adahesscale(0.1), tree_of(99), batches)
    assert_close(received, expected)


@pytest.mark.parametrize("mask_compatible_extra_args", [False, True])
@pytest.mark.parametrize(
    "mask", [{"dense": {"w": True}, "bias": False}, {"dense": False, "bias": True}]
)
def test_masked(mask, mask_compatible_extra_args):
    batches = steps()
    masked = optax.masked(
        adahesscale(0.1), mask, mask_compatible_extra_args=mask_compatible_extra_args
    )
    received, _ = run(masked, tree_of(99), batches)
    solved, _ = run(adahesscale(0.1), tree_of(99), batches)
    untouched = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[grad for grad, _ in batches])
    expected = jax.tree.map(lambda m, *trees: trees[not m], mask, solved, untouched)
    assert_close(received, expected)


def test_mismatch_is_found_inside_a_mask():
    solver, params = optax.masked(scale_by_hesscale(), {"dense": False, "bias": True}), tree_of(0)
    with pytest.raises(ValueError, match=r"hess_diag\['bias'\] is \(3,\)"):
        solver.update(params, solver.init(params), hess_diag=params | {"bias": jnp.ones(3)})


def test_multi_transform():
    batches = steps()
    solver = optax.multi_transform(
        {"fast": adahesscale(0.5), "slow": adahesscale(0.1)}, {"dense": "fast", "bias": "slow"}
    )
    received, _ = run(solver, tree_of(99), batches)
    fast, _ = run(adahesscale(0.5), tree_of(99), batches)
    slow, _ = run(adahesscale(0.1), tree_of(99), batches)
    assert_close(received, {"dense": fast["dense"], "bias": slow["bias"]})


def test_none_among_the_updates():
    solver, params = adahesscale(0.1), tree_of(0) | {"frozen": None}
    updates, _ = solver.update(params, solver.init(params), hess_diag=params)
    assert updates["frozen"] is None
    assert updates["bias"].shape == (2,)


def test_map_params_finds_both_moments():
    solver, params = scale_by_hesscale(), tree_of(0)
    _, state = run(solver, params, steps())
    mapped = optax.tree.map_params(solver, lambda leaf: jnp.full_like(leaf, 7), state)
    assert mapped.count == STEPS
    for leaf in jax.tree.leaves((mapped.mu, mapped.nu)):
        np.testing.assert_array_equal(leaf, 7)


def test_schedule_counts_the_steps():
    batches = steps()
    received, _ = run(adahesscale(schedule), tree_of(99), batches)
    direction, _ = run(scale_by_hesscale(), tree_of(99), batches)
    expected = jax.tree.map(lambda u: jnp.einsum("t,t...->t...", -RATES, u), direction)
    assert_close(received, expected)


def test_weight_decay_is_decoupled_and_masked():
    params = tree_of(99)
    batches = steps(1)
    mask = {"dense": True, "bias": False}
    received, _ = run(adahesscale(0.5, weight_decay=0.1, mask=mask), params, batches)
    expected, _ = run(adahesscale(0.5), params, batches)
    expected["dense"]["w"] -= 0.5 * 0.1 * params["dense"]["w"][None]
    assert_close(received, expected)


# Dtypes, shapes and shardings


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("hess_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16, jnp.float64])
def test_dtypes_are_preserved(dtype, hess_dtype, mu_dtype):
    solver, params = adahesscale(0.1, mu_dtype=mu_dtype), tree_of(0, dtype)
    state = solver.init(params)
    updates, after = solver.update(params, state, hess_diag=tree_of(1, hess_dtype))
    assert_same_avals(updates, params)
    assert_same_avals(after, state)
    assert state[0].mu["bias"].dtype == (mu_dtype or dtype)
    assert state[0].nu["bias"].dtype == np.promote_types(dtype, np.float32)


def test_injected_hyperparameters_do_not_widen_the_state():
    inject = optax.inject_hyperparams(scale_by_hesscale, hyperparam_dtype=jnp.float64)
    solver, params = inject(), tree_of(0, jnp.float32)
    state = solver.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, after = solver.update(params, state, hess_diag=params)
    assert_same_avals((updates, after), (params, state))


@pytest.mark.parametrize(
    ("dtype", "curvature"), [(jnp.float16, 3e4), (jnp.float16, 1e-4), (jnp.bfloat16, 1e15)]
)
def test_square_of_a_half_precision_curvature_is_kept(dtype, curvature):
    g, h = jnp.full(3, 0.5, dtype), jnp.full(3, curvature, dtype)
    solver = scale_by_hesscale(eps=1e-8)
    updates, _ = solver.update(g, solver.init(g), hess_diag=h)
    # The rounding of a half-precision result; subnormal in float16 where the curvature is 3e4.
    np.testing.assert_allclose(updates, 0.5 / curvature, rtol=1e-2)


def test_state_is_stable_under_cond():
    solver, params = adahesscale(0.1), tree_of(0, jnp.bfloat16)

    @jax.jit
    def maybe_update(predicate, state):
        return jax.lax.cond(
            predicate,
            lambda: solver.update(params, state, hess_diag=params),
            lambda: (params, state),
        )

    state = solver.init(params)
    assert maybe_update(False, state)[1][0].count == 0
    assert maybe_update(True, state)[1][0].count == 1


def test_scan_equals_the_loop():
    batches = steps()
    solver, params = adahesscale(schedule), tree_of(99)

    def step(state, batch):
        grad, hess_diag = batch
        updates, state = solver.update(grad, state, params, hess_diag=hess_diag)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    state, received = jax.lax.scan(step, solver.init(params), stacked)
    expected, expected_state = run(solver, params, batches)
    assert_close(received, expected)
    assert_close(state, expected_state)


def test_state_is_sharded_like_the_parameters():
    mesh = jax.make_mesh((2,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(jnp.arange(6.0).reshape(2, 3).astype(jnp.bfloat16), sharding)
    solver = scale_by_hesscale()
    state = solver.init(params)
    updates, after = solver.update(params, state, hess_diag=params)
    for array in (state.mu, state.nu, updates, after.mu, after.nu):
        assert array.sharding.is_equivalent_to(sharding, ndim=2)


def test_python_scalars_are_parameters_too():
    solver = scale_by_hesscale()
    updates, state = solver.update({"a": -0.5}, solver.init({"a": 1.0}), hess_diag={"a": 2.0})
    assert_close(updates, {"a": jnp.asarray(-0.25)}, rtol=1e-7)
    assert isinstance(state, ScaleByHesScaleState)


# Where there is next to no curvature, or far too much


CURVATURES = {
    "zero": np.zeros((3, 2)),
    "one zero column": np.array([[0.0, 2.0], [0.0, 3.0], [0.0, 0.5]]),
    "tiny": np.full((3, 2), 1e-30),
    "huge": np.full((3, 2), 1e30),
    "mixed": np.array([[0.0, 1e30], [1e-30, 1.0], [-1e30, -1e-30]]),
}


@pytest.mark.parametrize("moment", ["squared", "abs"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
def test_no_parameter_moves_by_more_than_the_learning_rate(curvature, scale, dtype, moment):
    solver = adahesscale(0.01, moment=moment)
    gradient = np.array([[1.0, -0.5], [0.25, 0.0], [3.0, 0.01]])
    g = {"w": jnp.asarray(scale * gradient, dtype)}
    h = {"w": jnp.asarray(scale * curvature, jnp.float32)}
    state = solver.init(g)
    for _ in range(3):
        updates, state = solver.update(g, state, g, hess_diag=h)
        assert np.isfinite(np.asarray(updates["w"], np.float64)).all()
        # The rounding of bfloat16.
        assert np.abs(np.asarray(updates["w"], np.float64)).max() <= 0.01 * (1 + 2**-7)
        assert not np.any(np.sign(updates["w"]) * np.sign(gradient) > 0)
    assert np.isfinite(state[0].nu["w"]).all()


def test_a_leaf_without_curvature_is_trained_and_a_dead_one_stays():
    g, h = jnp.array([2.0, -1e-6, 0.0, 0.5]), jnp.array([0.0, 0.0, 0.0, 1.0])
    updates, _ = scale_by_hesscale().update(g, scale_by_hesscale().init(g), hess_diag=h)
    assert_close(updates, jnp.array([1.0, -1.0, 0.0, 0.5]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_nothing_at_all_stays_finite_when_compiled(dtype):
    zero = jnp.zeros(4, dtype)
    solver = adahesscale(0.1)
    update = jax.jit(lambda p, state: solver.update(p, state, p, hess_diag=p))
    np.testing.assert_array_equal(update(zero, solver.init(zero))[0], zero)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_curvature_that_appears_late(dtype):
    solver = adahesscale(0.01)
    p = jnp.ones(3, dtype)
    state = solver.init(p)
    for step in range(100):
        h = jnp.full(3, 4.0 if step >= 50 else 0.0, jnp.float32)
        updates, state = solver.update(p, state, p, hess_diag=h)
        assert np.abs(np.asarray(updates, np.float64)).max() <= 0.01 * (1 + 2**-7)
    # The average of 16 over half of the steps. Bfloat16 has eight bits, and an average of ones in
    # it comes to rest at .98.
    expected = -0.01 / (16 * (1 - 0.999**50) / (1 - 0.999**100)) ** 0.5
    rtol = 1e-4 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=rtol)


def test_steps_do_not_depend_on_the_scale_of_the_loss():
    batches = steps()
    expected, _ = run(adahesscale(0.1), tree_of(99), batches)
    for scale in (1e-12, 1e12):
        scaled = jax.tree.map(lambda leaf, c=scale: c * leaf, batches)
        received, _ = run(adahesscale(0.1), tree_of(99), scaled)
        assert_close(received, expected)


def test_a_square_that_overflows_is_forgotten_in_time():
    g = jnp.ones(2, jnp.float32)
    solver = scale_by_hesscale(b2=0.5)
    state = solver.init(g)
    for h in [1e30] + 200 * [2.0]:
        updates, state = solver.update(g, state, hess_diag=jnp.full(2, h, jnp.float32))
    np.testing.assert_allclose(updates, 0.5, rtol=1e-5)  # float32
