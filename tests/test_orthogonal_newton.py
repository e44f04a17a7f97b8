"""The optimizer in the inputs and outputs of each layer: its formula, and what Optax asks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from cases import normal
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

import hesscale_jax as hs
import hesscale_jax.linen
import hesscale_jax.nnx
from hesscale_jax.optimizers.orthogonal_newton import (
    QUINTIC,
    RMS,
    STEPS,
    damped_inverse,
    orthogonalised,
)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # the arithmetic of Optax's wrappers needs it
        yield


def loss(params, x, y):
    h = jnp.tanh(x @ params["hidden"] + params["bias"])

    def step(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(step, h, params["stacked"])
    return jnp.mean((h @ params["out"] - y) ** 2)


def start(dtype="float64"):
    params = {
        "hidden": normal(5, 4, seed=1),
        "bias": normal(1, 4, seed=2) / 10,
        "stacked": normal(2, 4, 4, seed=3) / 2,
        "out": normal(4, 3, seed=4),
    }
    return jax.tree.map(lambda p: p.astype(dtype), params)


DATA = normal(20, 5, seed=5), normal(20, 3, seed=6)
LAYOUTS = hs.layouts(loss)(start(), *DATA)
SOLVER = hs.orthogonal_newton(0.02, LAYOUTS)


def curvature(params, batch=DATA):
    _, (grad, factors) = hs.value_and_factors(loss)(params, *batch)
    return grad, factors


# The formula


def reference(grads, every_factor, rate, weight_decay, params):
    """In NumPy, with an inverse and in float64."""
    p = {name: np.asarray(x) for name, x in params.items()}
    state = {}
    for t, (grad, factors) in enumerate(zip(grads, every_factor, strict=True), 1):
        steps, lengths = {}, {}
        for name in p:
            g = np.asarray(grad[name])
            if name == "bias":
                m, v = state.get(name, (0, 0))
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
                state[name] = m, v
                steps[name] = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
                continue
            m, a, h = state.get(name, (0, 0, 0))
            if factors is not None:
                a = 0.8 * a + 0.2 * np.asarray(factors[name].inputs)
                h = 0.8 * h + 0.2 * np.abs(np.asarray(factors[name].outputs))
            m = 0.9 * m + 0.1 * g
            state[name] = m, a, h
            ahead, n = 0.9 * m + 0.1 * g, a.shape[-1]
            mean = np.trace(a, axis1=-2, axis2=-1)[..., None, None] / n
            left = np.linalg.inv(a / mean + 0.2 * np.eye(n)) @ ahead
            s = newton_schulz(left / (h / h.mean(-1, keepdims=True) + 0.2)[..., None, :])
            s = RMS * s / np.sqrt(np.mean(s**2, axis=(-2, -1), keepdims=True))
            bend = np.einsum("...ij,...ik,...kj,...j->...", s, a, s, h) / h.sum(-1)
            steps[name], lengths[name] = s, np.sum(ahead * s, axis=(-2, -1)) / bend
        mean = np.exp(np.mean(np.log(np.concatenate([np.ravel(x) for x in lengths.values()]))))
        for name, u in steps.items():
            if name in lengths:
                u = u * np.clip(lengths[name] / mean, 1 / 3, 3)[..., None, None]
            p[name] = p[name] - rate * (u + weight_decay * p[name])
    return p


def newton_schulz(x):
    a, b, c = QUINTIC
    x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for _ in range(STEPS):
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_the_formula(weight_decay):
    solver = hs.orthogonal_newton(0.05, LAYOUTS, weight_decay=weight_decay or None)
    params = start()
    state = solver.init(params)
    grads, every_factor = [], []
    update = jax.jit(solver.update)
    for t in range(4):
        grad, factors = curvature(params)
        refreshed = t != 1
        updates, state = update(grad, state, params, factors=factors, refreshed=refreshed)
        grads.append(grad)
        every_factor.append(factors if refreshed else None)
        params = optax.apply_updates(params, updates)
    expected = reference(grads, every_factor, 0.05, weight_decay, start())
    for name in params:
        # Newton and Schulz's polynomial has a slope of 3.4 at 0, five times: 1e-12 becomes 5e-10.
        np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 2e-3)])
@pytest.mark.parametrize(("n", "damping"), [(3, 0.2), (64, 0.2), (300, 0.2), (64, 0.002)])
def test_the_inverse(n, damping, dtype, rtol):
    # One eigenvalue has the whole trace: the worst condition that there can be.
    direction = np.random.default_rng(0).standard_normal(n)
    direction /= np.linalg.norm(direction)
    a = 7e-9 * np.outer(direction, direction)
    found = damped_inverse(jnp.asarray(a, dtype)[None], damping)[0]
    expected = np.linalg.inv(a / (7e-9 / n) + damping * np.eye(n))
    # Of entries up to 1 / damping; rounding is that of the condition number, n / damping.
    worse = 0.2 / damping
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol / damping * worse)
    nothing = damped_inverse(jnp.zeros((1, n, n), dtype), damping)[0]
    np.testing.assert_allclose(nothing, np.eye(n) / damping, rtol=0, atol=1e-4 / damping)


def test_the_inverse_of_an_indefinite_matrix_is_that_of_its_modulus():
    half = normal(3, 5, 5)
    a = half + jnp.swapaxes(half, 1, 2)
    values, vectors = np.linalg.eigh(a)
    moduli = np.abs(values)
    inverse = 1 / (moduli / moduli.mean(-1, keepdims=True) + 0.2)
    expected = np.einsum("...ij,...j,...kj->...ik", vectors, inverse, vectors)
    np.testing.assert_allclose(damped_inverse(a, 0.2), expected, rtol=1e-9, atol=1e-9)
    each = jax.vmap(lambda a: damped_inverse(a[None], 0.2)[0])(a)
    np.testing.assert_allclose(each, expected, rtol=1e-9, atol=1e-9)


TARGETS, ADVANTAGES = 3 * normal(32, 2, seed=5), normal(32, seed=6)


@pytest.mark.parametrize(
    "head",
    [
        lambda z: jnp.log1p((z - TARGETS) ** 2).mean(),
        lambda z: optax.cosine_distance(z, TARGETS).mean(),
        lambda z: -jnp.mean(jax.nn.log_softmax(z)[:, 0] * (ADVANTAGES - ADVANTAGES.mean())),
        lambda z: jnp.log1p(-jax.nn.sigmoid(z)).mean(),
    ],
    ids=["Cauchy", "cosine", "policy gradient", "generator"],
)
def test_trains_where_the_loss_is_not_convex_in_the_outputs(head):
    # The inputs' second moments are indefinite, and have no inverse by Newton and Schulz.
    def loss(params):
        return head(jnp.tanh(normal(32, 4) @ params[0]) @ params[1])

    params = [normal(4, 8, seed=1), normal(8, 2, seed=2)]
    solver = hs.orthogonal_newton(1e-2, hs.layouts(loss)(params))

    @jax.jit
    def step(params, state):
        value, (grads, factors) = hs.value_and_factors(loss)(params)
        updates, state = solver.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, value

    state, values = solver.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert np.isfinite(values).all()
    assert max(values[1:]) < values[0]


def test_orthogonalised():
    for shape in ((2, 6, 4), (1, 4, 6), (1, 5, 5)):
        values = np.linalg.svd(orthogonalised(normal(*shape)), compute_uv=False)
        assert values.max() < 1.3
        assert np.median(values) > 0.6
    np.testing.assert_array_equal(orthogonalised(jnp.zeros((1, 3, 4))), 0)


# What may come


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_the_loss_does_not_matter(scale):
    params = start("float32")
    grad, factors = jax.tree.map(lambda x: x.astype("float32"), curvature(params))
    update = jax.jit(SOLVER.update)
    expected, _ = update(grad, SOLVER.init(params), factors=factors)
    scaled = jax.tree.map(lambda x: jnp.float32(scale) * x, (grad, factors))
    updates, _ = update(scaled[0], SOLVER.init(params), factors=scaled[1])
    for name in ("hidden", "stacked", "out"):
        # The polynomial's slope at 0 of 3.4, five times, on float32's rounding.
        np.testing.assert_allclose(updates[name], expected[name], rtol=0, atol=1e-5)


def test_layers_go_at_most_three_times_as_far_as_their_mean():
    grad, factors = curvature(start())
    steep = grad | {"out": 1e6 * grad["out"]}
    updates, _ = SOLVER.update(steep, SOLVER.init(start()), factors=factors)
    lengths = {name: float(jnp.sqrt(jnp.mean(updates[name] ** 2))) / (0.02 * RMS) for name in grad}
    np.testing.assert_allclose(lengths["out"], 3)
    np.testing.assert_allclose(lengths["hidden"], 1 / 3)


def test_a_layer_that_dies_stays_where_it_is():
    params = start("float32")
    grad, factors = jax.tree.map(lambda x: x.astype("float32"), curvature(params))
    dead = grad | {"out": jnp.zeros_like(grad["out"])}
    update = jax.jit(SOLVER.update)
    updates, state = update(grad, SOLVER.init(params), factors=factors)
    assert np.any(updates["out"])
    for _ in range(1000):  # Momentum goes through every size that float32 has.
        updates, state = update(dead, state, factors=factors)
        assert not np.any(updates["out"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_tiny_gradients_are_a_direction_too():
    for size in (1e-19, 1e-30, 1e-37, 1e-44):
        values = orthogonalised(jnp.full((1, 2, 3), size, "float32"))
        assert np.isfinite(values).all()


def test_too_many_inputs_are_isotropic():
    def wide_loss(w, x):
        return jnp.mean((x @ w) ** 2)

    w, x = normal(8193, 2).astype("float32"), normal(3, 8193, seed=1).astype("float32")
    solver = hs.orthogonal_newton(0.1, hs.layouts(wide_loss)(w, x))
    state = solver.init(w)
    assert state[0].inputs is None
    assert state[0].inverse is None
    _, (grad, factors) = hs.value_and_factors(wide_loss)(w, x)
    assert factors.inputs is None
    updates, _ = solver.update(grad, state, factors=factors)
    relative = factors.outputs / factors.outputs.mean()
    direction = orthogonalised((grad / (relative + 0.2)[None])[None])[0]
    scale = -0.1 * RMS / np.sqrt(np.mean(np.square(direction)))
    np.testing.assert_allclose(updates, scale * direction, rtol=0, atol=1e-5)


def test_nothing_to_update():
    solver = optax.multi_transform(
        {"layers": SOLVER, "frozen": optax.set_to_zero()}, dict.fromkeys(start(), "frozen")
    )
    grad, factors = curvature(start())
    updates, _ = solver.update(grad, solver.init(start()), start(), factors=factors)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_masked_factors_are_not_looked_at():
    mask = {"hidden": True, "bias": True, "stacked": True, "out": False}
    grad, factors = curvature(start())
    solver = optax.masked(SOLVER, mask)
    state = solver.init(start())
    expected, _ = solver.update(grad, state, factors=factors)
    updates, _ = solver.update(grad, state, factors=factors | {"out": optax.MaskedNode()})
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_the_state_keeps_its_dtypes():
    params = start("float32")
    grad, factors = jax.tree.map(lambda x: x.astype("float32"), curvature(params))
    wide = {name: np.float64(0.9) for name in ("b1", "decay", "damping", "adam_b1", "adam_b2")}
    solver = hs.orthogonal_newton(0.01, LAYOUTS, **wide)
    state = solver.init(params)
    updates, new = solver.update(grad, state, factors=factors, refreshed=jnp.array(True))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), new[0], state[0])


def test_nothing_moves_where_all_is_0():
    grad, factors = jax.tree.map(jnp.zeros_like, curvature(start()))
    updates, state = SOLVER.update(grad, SOLVER.init(start()), factors=factors)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_dead_inputs_and_outputs_are_bounded():
    params = start()
    params["hidden"] = params["hidden"].at[:, 0].set(0.0)
    params["bias"] = params["bias"].at[:, 0].set(-100.0)  # A unit of slope 0.
    x = DATA[0].at[:, 1].set(0.0)
    grad, factors = curvature(params, (x, DATA[1]))
    updates, _ = SOLVER.update(grad, SOLVER.init(params), factors=factors)
    assert all(np.abs(u).max() < 0.06 for u in jax.tree.leaves(updates))


def test_nan_factors_are_left_out_and_nan_gradients_skipped():
    grad, factors = curvature(start())
    _, before = SOLVER.update(grad, SOLVER.init(start()), factors=factors)
    expected, _ = SOLVER.update(grad, before, factors=factors, refreshed=False)
    broken = factors | {"out": factors["out"]._replace(inputs=factors["out"].inputs + jnp.nan)}
    updates, state = SOLVER.update(grad, before, factors=broken)
    assert state[0].refreshed == 1
    jax.tree.map(np.testing.assert_array_equal, updates, expected)

    updates, state = SOLVER.update(grad | {"bias": grad["bias"] + jnp.inf}, before, factors=factors)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state[0], before[0])


def test_errors():
    grad, factors = curvature(start())
    state = SOLVER.init(start())
    with pytest.raises(TypeError, match=r"factors=.*value_and_factors"):
        SOLVER.update(grad, state)
    with pytest.raises(TypeError, match=r"what hesscale_jax\.value_and_factors returns, got"):
        SOLVER.update(grad, state, factors=grad)
    with pytest.raises(ValueError, match="'factors' has a different structure"):
        SOLVER.update(grad, state, factors={"hidden": factors["hidden"]})
    with pytest.raises(ValueError, match="not those of a layer"):
        SOLVER.update(grad, state, factors=factors | {"out": factors["bias"]})
    with pytest.raises(ValueError, match="'layouts' has a different structure"):
        hs.orthogonal_newton(0.1, LAYOUTS["out"]).init(start())
    with pytest.raises(ValueError, match=r"parameter\['out'\] of shape \(4, 3\)"):
        hs.orthogonal_newton(0.1, LAYOUTS | {"out": LAYOUTS["hidden"]}).init(start())
    with pytest.raises(ValueError, match=r"optax\.flatten"):
        optax.flatten(SOLVER).init(start())


# Optax


def train(solver, params, steps=60, k=10):
    @jax.jit
    def step(params, state, number):
        transform = hs.value_and_factors_every(k)(loss)
        value, (grad, factors), refreshed = transform(number, params, *DATA)
        updates, state = solver.update(
            grad, state, params, factors=factors, refreshed=refreshed, value=value
        )
        return optax.apply_updates(params, updates), state, value

    state = solver.init(params)
    values = []
    for number in range(steps):
        params, state, value = step(params, state, number)
        values.append(float(value))
    return params, state, values


WRAPPED = {
    "itself": SOLVER,
    "chain": optax.chain(optax.clip_by_global_norm(1.0), SOLVER),
    "inject_hyperparams": optax.inject_hyperparams(hs.orthogonal_newton, static_args=("layouts",))(
        learning_rate=0.02, layouts=LAYOUTS
    ),
    "masked": optax.chain(
        optax.masked(SOLVER, {"hidden": True, "bias": True, "stacked": True, "out": False}),
        optax.masked(
            optax.sgd(1e-2), {"hidden": False, "bias": False, "stacked": False, "out": True}
        ),
    ),
    "multi_transform": optax.multi_transform(
        {"layers": SOLVER, "rest": optax.adam(1e-2)},
        {"hidden": "layers", "bias": "rest", "stacked": "layers", "out": "layers"},
    ),
    "apply_if_finite": optax.apply_if_finite(SOLVER, 3),
    "MultiSteps": optax.MultiSteps(SOLVER, 2),
    "schedule": hs.orthogonal_newton(optax.cosine_decay_schedule(0.04, 60), LAYOUTS),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_trains_in_optax(name):
    solver = WRAPPED[name]
    _, state, values = train(solver, start())
    assert values[-1] < 0.8 * values[0]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(solver.init, start()))
    assert jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state) == shapes


def test_bfloat16():
    params = start("bfloat16")
    grad, factors = curvature(params, tuple(x.astype("bfloat16") for x in DATA))
    updates, state = SOLVER.update(grad, SOLVER.init(params), params, factors=factors)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state[0].inputs)} == {jnp.dtype("float32")}


def test_a_checkpoint_goes_on(tmp_path):
    params, state, _ = train(SOLVER, start(), 12)
    saver = orbax.checkpoint.StandardCheckpointer()
    saver.save(tmp_path / "state", (params, state))
    saver.wait_until_finished()
    restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: (params, state)))
    jax.tree.map(np.testing.assert_array_equal, restored, (params, state))
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))


def test_sharded_as_the_parameters():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"hidden": (None, "d"), "bias": (), "stacked": (None, None, "d"), "out": ("d",)}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*s)) for name, s in spec.items()}
    params = jax.device_put(start(), shardings)
    whole, _, values = train(SOLVER, start(), 12)
    sharded, state, same = train(SOLVER, params, 12)
    np.testing.assert_allclose(same, values, rtol=1e-8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-8), sharded, whole)
    assert state[0].mu["hidden"].sharding.is_equivalent_to(shardings["hidden"], 2)


# Flax


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.norm = nnx.Linear(5, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.norm(self.hidden(x))))

    def model_loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    data = [x.astype("float32") for x in DATA]
    model = Model(nnx.Rngs(0))
    mean = model.norm.mean[...]
    layouts = hesscale_jax.nnx.layouts(model_loss)(model, *data)
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    assert [layouts[name]["kernel"].get_value().last for name in ("hidden", "out")] == [False, True]
    optimizer = nnx.Optimizer(model, hs.orthogonal_newton(0.02, layouts), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, number):
        transform = hesscale_jax.nnx.value_and_factors_every(10)(model_loss)
        value, (grads, factors), refreshed = transform(number, model, *data)
        optimizer.update(model, grads, factors=factors, refreshed=refreshed)
        return value

    values = [train_step(model, optimizer, number) for number in range(60)]
    assert values[-1] < 0.6 * values[0]
    assert np.any(model.norm.mean[...])
    value, (_, factors) = hesscale_jax.nnx.value_and_factors(model_loss)(model, *data)
    assert value.shape == ()
    assert factors["out"]["kernel"].get_value().inputs.shape == (16, 16)


def test_linen():
    model = linen.Sequential([linen.Dense(16), linen.gelu, linen.Dense(3)])
    params = model.init(jax.random.key(0), DATA[0])

    def model_loss(params):
        return jnp.mean((model.apply(params, DATA[0]) - DATA[1]) ** 2)

    state = hesscale_jax.linen.TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=hs.orthogonal_newton(0.02, hs.layouts(model_loss)(params)),
    )

    @jax.jit
    def train_step(state):
        transform = hs.value_and_factors_every(10)(model_loss)
        value, (grads, factors), refreshed = transform(state.step, state.params)
        return state.apply_gradients(grads=grads, factors=factors, refreshed=refreshed), value

    values = []
    for _ in range(60):
        state, value = train_step(state)
        values.append(value)
    assert values[-1] < 0.6 * values[0]
