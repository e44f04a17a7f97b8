"""Step-size scaling, diagonal Newton and Sophia: formulas, and what Optax asks of all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_optimizers import assert_close, assert_same_avals, run, steps, tree_of

import hesscale_jax
from hesscale_jax import optimizers
from hesscale_jax.optimizers import (
    adahesscale,
    diagonal_newton,
    hess_diag_as_estimator,
    scale_by_curvature_trust_region,
    scale_by_diagonal_newton,
    scaled_adahesscale,
    scaled_adam,
)

SOLVERS = {
    "adahesscale": adahesscale(0.1),
    "diagonal_newton": diagonal_newton(0.1, 1e-3),
    "hess_diag_as_estimator": optax.contrib.sophia(
        0.1, hessian_diagonal_fn=hess_diag_as_estimator(), update_interval=1
    ),
    "scale_by_curvature_trust_region": scale_by_curvature_trust_region(0.1),
    "scale_by_diagonal_newton": scale_by_diagonal_newton(1e-3),
    "scale_by_hesscale": optimizers.scale_by_hesscale(),
    "scaled_adahesscale": scaled_adahesscale(0.1, delta=1e-3),
    "scaled_adam": scaled_adam(0.1, delta=1e-3),
}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # the arithmetic of Adam and of Sophia needs it
        yield


every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def test_every_transformation_is_tested():
    functions = {name for name in optimizers.__all__ if not name.endswith("State")}
    takes_factors = {"orthogonal_newton", "scale_by_orthogonal_newton"}  # test_orthogonal_newton.py
    assert functions - takes_factors == set(SOLVERS)


# Formulas


def factors(updates, diagonals, delta, b2, max_scale):
    """The trust region in NumPy: one factor a step."""
    v = [np.zeros(h.shape) for h in jax.tree.leaves(diagonals[0])]
    for u, h in zip(updates, diagonals, strict=True):
        pairs = list(zip(jax.tree.leaves(u), jax.tree.leaves(h), strict=True))
        v = [b2 * vi + (1 - b2) * np.square(hi) for vi, (_, hi) in zip(v, pairs, strict=True)]
        total = sum(
            np.sum(np.sqrt(vi) * np.square(ui)) for vi, (ui, _) in zip(v, pairs, strict=True)
        )
        yield min(max_scale, np.sqrt(2 * delta / total)) if total else max_scale


@pytest.mark.parametrize(
    ("delta", "b2", "max_scale"), [(1e-8, 0.999, 1.0), (0.3, 0.9, 1.0), (10.0, 0.5, 3.0)]
)
def test_trust_region_equals_the_formula(delta, b2, max_scale):
    batches = steps()
    zero = jax.tree.map(jnp.zeros_like, tree_of(0))
    batches = [(batches[0][0], zero), (zero, batches[1][1]), *batches[2:]]  # T = 0 in two ways
    solver = scale_by_curvature_trust_region(delta, b2, max_scale)
    received, state = run(solver, tree_of(99), batches)
    scale = np.array(list(factors(*zip(*batches, strict=True), delta, b2, max_scale)))
    assert scale[0] == scale[1] == max_scale
    np.testing.assert_allclose(state.scale, scale[-1], rtol=1e-9)
    assert solver.init(tree_of(99)).scale == max_scale
    updates = jax.tree.map(lambda *u: np.stack(u), *(u for u, _ in batches))
    expected = jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), updates)
    assert_close(received, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("scaled", "direction"),
    [(scaled_adahesscale, adahesscale), (scaled_adam, optax.adam)],
)
def test_scaled_solvers_shorten_the_direction(scaled, direction):
    batches = steps()
    received, _ = run(scaled(0.1, 0.8, 0.95, 1e-3, delta=1e-3), tree_of(99), batches)
    plain = optax.with_extra_args_support(direction(0.1, 0.8, 0.95, 1e-3))
    updates, _ = run(plain, tree_of(99), batches)
    by_step = [jax.tree.map(lambda u, t=t: u[t], updates) for t in range(len(batches))]
    scale = np.array(list(factors(by_step, [h for _, h in batches], 1e-3, 0.95, 1.0)))
    assert (scale < 1).any()
    expected = jax.tree.map(lambda u: u * scale.reshape(-1, *[1] * (u.ndim - 1)), updates)
    assert_close(received, expected, rtol=1e-9)


def test_diagonal_newton_needs_a_diagonal_at_every_step():
    solver = diagonal_newton(0.1, 0.1)
    g = jnp.ones(3)
    with pytest.raises(ValueError, match=r"at every step.*value_and_hesscale_every"):
        solver.update(g, solver.init(g), g, hess_diag=g, refreshed=jnp.array(False))


@pytest.mark.parametrize(
    ("negative", "positive"), [("abs", np.abs), ("floor", lambda h: np.maximum(h, 0))]
)
def test_diagonal_newton_equals_the_formula(negative, positive):
    batches = steps()
    received, _ = run(diagonal_newton(0.25, 0.3, negative=negative), tree_of(99), batches)
    each = [jax.tree.map(lambda g, h: -0.25 * g / (positive(h) + 0.3), *pair) for pair in batches]
    assert_close(received, jax.tree.map(lambda *u: np.stack(u), *each))


def test_unknown_treatment_of_negative_curvature_is_an_error():
    with pytest.raises(ValueError, match="'negative' must be one of"):
        diagonal_newton(0.1, 0.1, negative="squared")


def test_sophia_takes_the_diagonal():
    batches = steps()
    solver = optax.contrib.sophia(
        0.1, b2=0.9, update_interval=2, hessian_diagonal_fn=hess_diag_as_estimator()
    )
    _, (state, *_) = run(solver, tree_of(99), batches)
    expected = jax.tree.map(jnp.zeros_like, tree_of(0))
    for _, h in batches[::2]:
        expected = jax.tree.map(lambda v, h: 0.9 * v + 0.1 * h, expected, h)
    assert_close(state.nu, expected)


# What Optax asks


@every_solver
def test_missing_curvature_is_named(solver):
    params = tree_of(0)
    with pytest.raises(TypeError, match=r"hess_diag=.*hesscale_jax\.hesscale"):
        solver.update(params, solver.init(params), params)


@every_solver
def test_another_structure_or_shape_is_an_error_of_tracing(solver):
    params = tree_of(0)
    state = solver.init(params)
    for hess_diag in ({"bias": jnp.ones(2)}, params | {"bias": jnp.ones(3)}):
        with pytest.raises(ValueError, match="'hess_diag' has a different"):
            jax.eval_shape(lambda h: solver.update(params, state, params, hess_diag=h), hess_diag)


@every_solver
def test_one_compilation_serves_every_step_and_unknown_arguments(solver):
    traces = []

    @jax.jit
    def update(grad, state, params, hess_diag):
        traces.append(None)
        return solver.update(grad, state, params, hess_diag=hess_diag, unknown=1)

    params = tree_of(0)
    state = solver.init(params)
    for grad, hess_diag in steps(3):
        updates, state = update(grad, state, params, hess_diag)
    assert len(traces) == 1
    assert_same_avals(updates, params)


@every_solver
def test_composes_as_optax_does(solver):
    batches, params = steps(), tree_of(99)
    expected, _ = run(solver, params, batches)
    for wrapped in (
        optax.chain(optax.identity(), solver),
        optax.named_chain(("solver", solver)),
        optax.masked(solver, jax.tree.map(lambda _: True, params)),
        optax.multi_transform({"all": solver}, jax.tree.map(lambda _: "all", params)),
        optax.apply_if_finite(solver, 1),
    ):
        received, _ = run(wrapped, params, batches)
        assert_close(received, expected)


@every_solver
def test_masked_leaves_are_left_alone(solver):
    batches, params = steps(2), tree_of(99)
    mask = {"dense": {"w": True}, "bias": False}
    received, _ = run(optax.masked(solver, mask), params, batches)
    assert_close(received["bias"], jnp.stack([grad["bias"] for grad, _ in batches]))
    alone = [tuple({"w": tree["dense"]["w"]} for tree in batch) for batch in batches]
    expected, _ = run(solver, {"w": params["dense"]["w"]}, alone)
    assert_close(received["dense"], expected)


@every_solver
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_are_preserved_under_scan_and_cond(solver, dtype):
    params = tree_of(0, dtype)
    state = solver.init(params)

    def step(state, batch):
        grad, hess_diag = batch
        updates, new = solver.update(grad, state, params, hess_diag=hess_diag)
        return jax.lax.cond(True, lambda: new, lambda: state), updates

    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps(3, dtype))
    after, updates = jax.lax.scan(step, state, batches)
    assert_same_avals(after, state)
    assert_same_avals(jax.tree.map(lambda u: u[0], updates), params)


@every_solver
def test_states_are_mapped_as_the_parameters_are(solver):
    params = tree_of(0)
    state = solver.init(params)
    mapped = optax.tree.map_params(solver, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


INJECTED = {
    "adahesscale": (adahesscale, {"learning_rate": 0.1, "eps": 1e-3}),
    "diagonal_newton": (diagonal_newton, {"learning_rate": 0.1, "damping": 1e-3}),
    "scale_by_curvature_trust_region": (scale_by_curvature_trust_region, {"delta": 1e-3}),
    "scale_by_diagonal_newton": (scale_by_diagonal_newton, {"damping": 1e-3}),
    "scale_by_hesscale": (optimizers.scale_by_hesscale, {"b1": 0.8, "b2": 0.9, "eps": 1e-3}),
    "scaled_adahesscale": (scaled_adahesscale, {"learning_rate": 0.1, "delta": 1e-3}),
    "scaled_adam": (scaled_adam, {"learning_rate": 0.1, "delta": 1e-3}),
}


@pytest.mark.parametrize(("build", "numbers"), INJECTED.values(), ids=INJECTED)
def test_hyperparameters_are_injected(build, numbers):
    batches, params = steps(2), tree_of(99)

    def last(solver, **changed):
        def inject(state):
            return state._replace(hyperparams=state.hyperparams | changed) if changed else state

        state = inject(solver.init(params))
        for grad, hess_diag in batches:
            updates, state = solver.update(grad, state, params, hess_diag=hess_diag)
        return updates

    injected = optax.inject_hyperparams(build)(**numbers)
    unchanged = last(injected)
    assert_close(unchanged, last(build(**numbers)))
    for name, number in numbers.items():
        received = last(injected, **{name: jnp.asarray(number / 2)})
        assert_close(received, last(build(**numbers | {name: number / 2})))
        assert not np.allclose(received["bias"], unchanged["bias"], rtol=1e-6)


@every_solver
def test_schedule_free(solver):
    """The iterate and the average of Defazio et al. (2024) around the solver's own steps."""
    batches, b1 = steps(3), 0.7
    wrapped = optax.contrib.schedule_free(solver, learning_rate=1.0, b1=b1)
    y = x = z = tree_of(99)
    state, inner = wrapped.init(y), solver.init(z)
    for t, (grad, hess_diag) in enumerate(batches, start=1):
        step, inner = solver.update(grad, inner, y, hess_diag=hess_diag)
        z = optax.apply_updates(z, step)
        x = jax.tree.map(lambda x, z, t=t: x + (z - x) / t, x, z)
        updates, state = wrapped.update(grad, state, y, hess_diag=hess_diag)
        y = optax.apply_updates(y, updates)
        # Optax recovers x from y and z, and loses a few digits.
        assert_close(y, jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z), rtol=1e-9)


@every_solver
def test_states_are_sharded_as_the_parameters_are(solver):
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    params, grad, hess_diag = (
        jax.device_put({"w": jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)))}, sharding)
        for i in range(3)
    )
    with jax.set_mesh(sharding.mesh):
        state = jax.jit(solver.init)(params)
        for _ in range(2):
            updates, state = jax.jit(solver.update)(grad, state, params, hess_diag=hess_diag)
    for array in jax.tree.leaves((updates, state)):
        expected = sharding if array.ndim else whole
        assert array.sharding.is_equivalent_to(expected, array.ndim), array.sharding


# Micro-batches


def loss(params, x):
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["dense"]["w"] + params["bias"][None]) ** 3, axis=1))


def test_micro_batches_are_averaged():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
    derivatives = hesscale_jax.value_and_hesscale(loss)
    mean = optax.microbatching.AccumulationType.MEAN
    accumulated = optax.microbatch(derivatives, argnums=1, microbatch_size=4, accumulator=mean)

    def in_scan(params, x):
        def step(total, part):
            return jax.tree.map(jnp.add, total, derivatives(params, part)), None

        zero = jax.tree.map(jnp.zeros_like, derivatives(params, x[:4]))
        total, _ = jax.lax.scan(step, zero, x.reshape(3, 4, 3))
        return jax.tree.map(lambda leaf: leaf / 3, total)

    expected = derivatives(tree_of(0), x)
    for way in (accumulated, in_scan):
        assert_close(jax.jit(way)(tree_of(0), x), expected)


def test_multi_steps_hands_on_the_last_curvature_alone():
    """As the documentation of the optimizers warns."""
    solver, params, batches = adahesscale(0.1), tree_of(99), steps(2)
    grad = jax.tree.map(lambda *g: sum(g) / 2, *(g for g, _ in batches))
    expected, _ = solver.update(grad, solver.init(params), params, hess_diag=batches[1][1])
    received, _ = run(optax.MultiSteps(solver, 2), params, batches)
    # MultiSteps' weights of the average are float32.
    assert_close(jax.tree.map(lambda u: u[1], received), expected, rtol=1e-6)


# What is not finite


UNGUARDED = {
    "adahesscale": adahesscale(0.1, skip_nonfinite=False),
    "diagonal_newton": diagonal_newton(0.1, 1e-3, skip_nonfinite=False),
    "hess_diag_as_estimator": optax.contrib.sophia(
        0.1, hessian_diagonal_fn=hess_diag_as_estimator(skip_nonfinite=False), update_interval=1
    ),
    "scale_by_curvature_trust_region": scale_by_curvature_trust_region(0.1, skip_nonfinite=False),
    "scale_by_diagonal_newton": scale_by_diagonal_newton(1e-3, skip_nonfinite=False),
    "scale_by_hesscale": optimizers.scale_by_hesscale(skip_nonfinite=False),
    "scaled_adahesscale": scaled_adahesscale(0.1, delta=1e-3, skip_nonfinite=False),
    "scaled_adam": scaled_adam(0.1, delta=1e-3, skip_nonfinite=False),
}


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def spoilt(tree, bad):
    """One entry of one leaf is not finite."""
    return tree | {"bias": tree["bias"].at[1].set(bad)}


@pytest.mark.parametrize(("dtype", "bad"), [(jnp.bfloat16, np.nan), (jnp.float32, np.inf)])
@pytest.mark.parametrize("at", ["gradient", "diagonal", "both"])
@every_solver
def test_apply_if_finite_keeps_parameters_and_state_finite(solver, at, bad, dtype):
    """Under jit and scan, the second of five steps is bad."""
    solver, params = optax.apply_if_finite(solver, 3), tree_of(99, dtype)
    batches = steps(5, dtype)
    grad, hess_diag = batches[1]
    grad = spoilt(grad, bad) if at != "diagonal" else grad
    hess_diag = spoilt(hess_diag, bad) if at != "gradient" else hess_diag
    batches[1] = grad, hess_diag

    def step(carry, batch):
        params, state = carry
        grad, hess_diag = batch
        updates, state = solver.update(grad, state, params, hess_diag=hess_diag)
        return (optax.apply_updates(params, updates), state), updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    (after, state), updates = jax.lax.scan(step, (params, solver.init(params)), stacked)
    assert all_finite((after, state, updates))
    assert np.any(jax.tree.map(lambda u: u[-1], updates)["bias"])


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"scale_by_curvature_trust_region"}))
def test_without_the_guard_they_do_not_stay_finite(name):
    params, (grad, hess_diag) = tree_of(99), steps(1)[0]
    solver = UNGUARDED[name]
    updates, state = solver.update(
        grad, solver.init(params), params, hess_diag=spoilt(hess_diag, np.nan)
    )
    assert not all_finite((updates, state))


@pytest.mark.parametrize("name", ["adahesscale", "scale_by_hesscale", "scaled_adahesscale"])
def test_a_diagonal_left_out_is_one_not_refreshed(name):
    solver, params, batches = SOLVERS[name], tree_of(99), steps(4)

    def last(**at_bad):
        state = solver.init(params)
        for t, (grad, hess_diag) in enumerate(batches):
            bad = at_bad if t in (0, 2) else {}
            updates, state = solver.update(
                grad, state, params, **{"hess_diag": hess_diag, "refreshed": True} | bad
            )
        return updates, state

    nan = jax.tree.map(lambda h: h * np.nan, batches[0][1])
    expected = last(refreshed=False)
    for bad in (nan, spoilt(batches[0][1], np.inf)):
        assert_close(last(hess_diag=bad), expected)
        assert_close(last(hess_diag=bad, refreshed=False), expected)


@every_solver
def test_masked_leaves_may_be_anything(solver):
    params, (grad, hess_diag) = tree_of(99), steps(1)[0]
    masked = optax.masked(solver, {"dense": True, "bias": False})
    results = [
        masked.update(grad, masked.init(params), params, hess_diag=h)
        for h in (hess_diag, spoilt(hess_diag, np.nan))
    ]
    assert_close(*results)


# Optax's wrappers


def always(step, **extra_args):
    return jnp.array(True)


# Each does what the solver does alone, up to the digits of MultiSteps' float32 weights.
TRANSPARENT = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain of a plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, always, forward_extra_args=True
    ),
    "flatten": optax.flatten,
    "flatten within a mask": lambda tx: optax.masked(
        optax.flatten(tx), {"dense": True, "bias": True}
    ),
    "flatten around a mask": lambda tx: optax.flatten(optax.masked(tx, True)),
    "flatten in parts": lambda tx: optax.multi_transform(
        {"a": optax.flatten(tx), "b": optax.flatten(tx)},
        {"dense": "a", "bias": "b"},
        mask_compatible_extra_args=True,
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "MultiSteps of flatten": lambda tx: optax.MultiSteps(optax.flatten(tx), 1),
    "MultiSteps that skips": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "partition": lambda tx: optax.partition({"a": tx, "b": tx}, {"dense": "a", "bias": "b"}),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
}
# Sums over all parameters differ where the parameters are taken in parts.
IN_PARTS = {"flatten in parts", "partition"}


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [
        (wrapper, name)
        for wrapper in TRANSPARENT
        for name in ("adahesscale", "diagonal_newton", "hess_diag_as_estimator", "scaled_adam")
        if not (wrapper in IN_PARTS and name == "scaled_adam")
    ],
)
def test_wrappers_that_hand_the_curvature_on(wrapper, name):
    batches, params, solver = steps(3), tree_of(99), SOLVERS[name]
    expected, _ = run(solver, params, batches, value=1.0)
    received, _ = run(TRANSPARENT[wrapper](solver), params, batches, value=1.0)
    assert_close(received, expected, rtol=1e-6 if "MultiSteps" in wrapper else 1e-9)


@every_solver
def test_flatten_with_refreshed_bfloat16_and_jit(solver):
    params = tree_of(0, jnp.bfloat16)
    flattened = optax.flatten(optax.apply_if_finite(solver, 1))
    state = flattened.init(params)
    update = jax.jit(flattened.update)
    for _, hess_diag in steps(2):
        updates, state = update(params, state, params, hess_diag=hess_diag)
    assert_same_avals(updates, params)
    assert all_finite(state)


@every_solver
def test_flatten_of_one_array(solver):
    w = tree_of(0)["dense"]["w"]
    expected, _ = run(solver, w, [(w, w + 1)])
    received, _ = run(optax.flatten(solver), w, [(w, w + 1)])
    assert_close(received, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "wrapped",
    [
        optax.masked(optax.flatten(adahesscale(0.1)), {"dense": True, "bias": False}),
        optax.multi_transform(
            {"a": optax.flatten(adahesscale(0.1)), "b": optax.sgd(0.1)},
            {"dense": "a", "bias": "b"},
        ),
    ],
    ids=["masked", "multi_transform"],
)
def test_a_mask_around_flatten_is_told_what_to_do(wrapped):
    params = tree_of(0)
    with pytest.raises(ValueError, match=r"vector of 6 .* has 8.*mask_compatible_extra_args=True"):
        wrapped.update(params, wrapped.init(params), params, hess_diag=params)


def test_lookahead_hands_nothing_on():
    params = optax.LookaheadParams.init_synced(tree_of(0))
    wrapped = optax.lookahead(adahesscale(0.1), 5, 0.5)
    with pytest.raises(TypeError, match=r"some wrapper on the way does not hand"):
        wrapped.update(tree_of(0), wrapped.init(params), params)
