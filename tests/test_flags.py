"""Under JAX's debugging and configuration flags, a training step does what it does with Adam."""

import contextlib
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from jax import lax, nn

import hesscale_jax as hs
import hesscale_jax.nnx

X, LABELS = jnp.asarray(normal(5, 3)), np.array([0, 1, 1, 0, 1])
PARAMS = {"w": jnp.asarray(normal(3, 3, seed=1)) / 2, "out": jnp.asarray(normal(3, 2, seed=2))}
SINGLE = jax.tree.map(lambda x: x.astype(jnp.float32), (PARAMS, X))


def loss(params, x):
    """Of a loop, a variance, which holds a NaN that is not chosen, and a masked softmax."""
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=2)
    h = nn.relu((h - h.mean(0)[None]) / jnp.sqrt(jnp.var(h, 0)[None] + 0.1))
    logits = jnp.where(jnp.arange(2)[None] < 5, h @ params["out"], -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def adahesscale_step(params, state, x):
    grad, hess_diag = hs.hesscale(loss)(params, x)
    updates, state = hs.adahesscale(0.1).update(grad, state, params, hess_diag=hess_diag)
    return optax.apply_updates(params, updates), state


def adam_step(params, state, x):
    updates, state = optax.adam(0.1).update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def run(step, optimizer, wrap, params=PARAMS, x=X):
    with jax.numpy_dtype_promotion("standard"):  # of Optax's own arithmetic
        return jax.block_until_ready(wrap(step)(params, optimizer.init(params), x))[0]


@functools.cache
def without_flags():
    return run(adahesscale_step, hs.adahesscale(0.1), jax.jit)


def flag(name, value):
    """A flag that is no context manager."""

    @contextlib.contextmanager
    def changed():
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            yield
        finally:
            jax.config.update(name, before)

    return changed


FLAGS = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": lambda: jax.disable_jit(),
    "log_compiles": lambda: jax.log_compiles(True),
    "no x64": lambda: jax.enable_x64(False),
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    **{
        f"precision {precision}": functools.partial(jax.default_matmul_precision, precision)
        for precision in ("bfloat16", "tensorfloat32", "float32", "highest")
    },
    "custom keys": lambda: jax.enable_custom_prng(True),
    "partitionable keys": lambda: jax.threefry_partitionable(False),
    "default device": lambda: jax.default_device(jax.devices()[1]),
    "softmax": flag("jax_softmax_custom_jvp", False),
    "checks": flag("jax_enable_checks", True),
    "tracebacks": flag("jax_traceback_filtering", "off"),
    "cache misses": flag("jax_explain_cache_misses", True),
    "linearize": flag("jax_use_direct_linearize", False),
    "constants": flag("jax_use_simplified_jaxpr_constants", True),
    "key reuse": flag("jax_debug_key_reuse", True),
    "legacy keys": flag("jax_legacy_prng_key", "error"),
    "constant folding": flag("eager_constant_folding", True),
    "thread guard": flag("jax_thread_guard", True),
    "static indices": flag("jax_check_static_indices", True),
    "vma": flag("check_vma", True),
    "optimizations": flag("jax_disable_most_optimizations", False),
}
"""By name. Left out are those of devices, compilers, caches and dumps, which act on what is traced;
and `jax_remat3`, `jax_scan3`, for a checkpoint and a loop of another kind that are not finished."""

# What acts while tracing alone, or on compiled functions alone, is tried with those.
EAGER = ["debug_nans", "debug_infs", "disable_jit", "no x64", "promotion", "rank promotion"]
SELDOM = ["default device", "linearize", "key reuse", "constant folding"]
WRAPS = [(name, "jit") for name in FLAGS] + [(name, "not jitted") for name in EAGER]
WRAPS += [pytest.param(name, "not jitted", marks=pytest.mark.slow) for name in SELDOM]


@pytest.mark.parametrize(("name", "wrap"), WRAPS)
@pytest.mark.filterwarnings("ignore")  # of the flags themselves
def test_a_step_under_a_flag(name, wrap):
    expected = without_flags()
    wrapped = jax.jit if wrap == "jit" else lambda step: step
    args = SINGLE if name == "no x64" else (PARAMS, X)
    with FLAGS[name]():
        run(adam_step, optax.adam(0.1), wrapped, *args)
        received = run(adahesscale_step, hs.adahesscale(0.1), wrapped, *args)
    # Half the digits of what is computed in single precision, or in less.
    rtol = 1e-3 if name == "no x64" else 1e-9
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


def test_a_nan_that_is_there_is_found():
    def with_nan(x):
        return jnp.sum(jnp.log(x))

    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        hs.hesscale(with_nan)(jnp.array([-1.0, 1.0]))


def test_nothing_is_sent_to_or_from_the_device():
    step = jax.jit(adahesscale_step)
    with jax.numpy_dtype_promotion("standard"):
        state = hs.adahesscale(0.1).init(PARAMS)
        params, state = step(PARAMS, state, X)
        with jax.transfer_guard("disallow"), jax.no_tracing():
            step(params, state, X)


# Tracers that are left behind


@contextlib.contextmanager
def checking_leaks():
    """The search for what refers to a tracer takes seconds where all objects are looked at."""
    gc.collect()
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


def custom_vjp(x):
    sine = jax.custom_vjp(lambda x: jnp.sin(x))
    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (jnp.cos(x) * g,))
    return sine(x)


def custom_jvp(x):
    sine = jax.custom_jvp(lambda x: jnp.sin(x))
    sine.defjvp(lambda primals, tangents: (sine(*primals), jnp.cos(primals[0]) * tangents[0]))
    return sine(x)


def step(h, w):
    return jnp.tanh(h @ w), None


LAYERS = {
    "dense": lambda h, w: jnp.tanh(h @ w),
    "scan": lambda h, w: lax.scan(step, h, jnp.stack([w, w]))[0],
    "checkpoint": lambda h, w: jax.checkpoint(lambda h: nn.softmax(jnp.tanh(h @ w)))(h),
    "checkpoint in a scan": lambda h, w: lax.scan(jax.checkpoint(step), h, w[None])[0],
    "cond": lambda h, w: lax.cond(h.sum() < 0, lambda h: jnp.tanh(h @ w), lambda h: h @ w, h),
    "custom_vjp": lambda h, w: custom_vjp(h @ w),
    "custom_jvp": lambda h, w: custom_jvp(h @ w),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_tracer_is_left(name):
    def fun(w):
        y = LAYERS[name](X, w)
        return jnp.mean(y**2), {"y": y, "name": name}

    def transformed(w):
        value, (grad, hess_diag) = hs.value_and_hesscale(fun, has_aux=True)(w)
        return value[1]["y"], grad, hess_diag

    jax.eval_shape(transformed, PARAMS["w"])
    with checking_leaks():
        jax.jit(transformed)(PARAMS["w"])
        transformed(PARAMS["w"])


def test_no_tracer_is_left_of_a_module():
    x = SINGLE[1]
    layers = (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model = nnx.Sequential(*layers)
    optimizer = nnx.Optimizer(model, hs.adahesscale(0.1), wrt=nnx.Param)
    definition, state = nnx.split((model, optimizer))

    def train_step(state):
        model, optimizer = nnx.merge(definition, state)
        fun = hesscale_jax.nnx.value_and_hesscale(
            lambda model: (jnp.mean(model(x) ** 2), model(x)), has_aux=True
        )
        _, (grads, hess_diag) = fun(model)
        optimizer.update(model, grads, hess_diag=hess_diag)
        return nnx.state((model, optimizer))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.eval_shape(train_step, state)
        with checking_leaks():
            jax.jit(train_step)(state)


def test_what_xla_computes_twice_may_be_rounded_in_two_ways():
    """A maximum's slope does not depend on how XLA fuses, and rounds, what is compared."""
    shapes = enumerate([(5, 3), (5,), (3,)])
    inputs, targets, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in shapes)
    optimizer = optax.amsgrad(0.1)

    def loss(w):
        p = jnp.ones(3)
        state = optimizer.init(p)
        for _ in range(2):
            grad = jax.grad(lambda p: jnp.mean((jnp.tanh(inputs @ p) - inputs @ w) ** 2))(p)
            updates, state = optimizer.update(grad, state, p)
            p = p + updates
        return jnp.sum((inputs @ p - targets) ** 2)

    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        expected = hs.hesscale(loss)(w / 2)
        with FLAGS["optimizations"]():
            found = jax.jit(hs.hesscale(loss))(w / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-7)  # g / (|g| + eps) cancels


def test_a_choice_by_numbers_that_have_no_logarithm():
    """What is known of numbers is computed while tracing, and may be NaN on the way."""
    numbers, w = np.array([1.0, -1.0, 2.0]), X[0]
    with jax.debug_nans(True):
        found = hs.hesscale(lambda w: jnp.sum(jnp.where(jnp.log(numbers) > -9, w**2, w**3)))
        _, hess_diag = jax.jit(found)(w)
    np.testing.assert_allclose(hess_diag, np.where(numbers > 0, 2, 6 * w), rtol=1e-9)


@pytest.mark.parametrize("name", ["scan", "checkpoint in a scan", "custom_vjp", "custom_jvp"])
def test_calls_without_jit_keep_nothing(name):
    def call():
        jax.block_until_ready(hs.hesscale(lambda w: jnp.sum(LAYERS[name](X, w) ** 2))(PARAMS["w"]))
        gc.collect()
        return len(jax.live_arrays())

    first = [call(), call()][-1]  # Constants are made at the first.
    assert call() <= first
