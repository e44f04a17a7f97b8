"""Products of spreads and squares in half precision: where they are taken, and what they change."""

import collections

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from models import QUALITY_TASKS, ResNet, Task

import hesscale_jax as hs
import hesscale_jax.nnx


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax takes statistics in float32, and the GPT adds positions to a batch."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def products(jaxpr):
    """How often each pair of the factors' dtypes is multiplied, bodies included."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            found[tuple(v.aval.dtype.name for v in eqn.invars[:2])] += 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += products(inner)
    return found


def ragged(params, x, sizes):
    hidden = jnp.tanh(jax.lax.ragged_dot(x, params["first"], sizes))
    return jnp.mean(jax.lax.ragged_dot(hidden, params["second"], sizes) ** 2)


def ragged_arguments(dtype):
    params = {"first": normal(2, 3, 4).astype(dtype), "second": normal(2, 4, 5).astype(dtype)}
    return params, normal(6, 3).astype(dtype), jnp.array([2, 4])


def probe(params, x):
    """One linear layer, of data: the forms of its parameters are exact."""
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


RESNET = Task(lambda rngs: ResNet([4, 8], 3, rngs=rngs), input_shape=(8, 8, 3), batch=4, classes=3)
MODELS = {"residual CNN": RESNET} | {
    name: QUALITY_TASKS[name]
    for name in ("MLP, 3 hidden, gelu", "+ LayerNorm, tanh", "CNN, max-pool relu", "GPT, 2 layers")
}


def program(name, dtype):
    """A loss, and its arguments, of which the first is to be differentiated."""
    if name == "ragged":
        return ragged, ragged_arguments(dtype)
    if name == "linear probe":
        params = {"w": normal(3, 2).astype(dtype), "b": normal(2).astype(dtype)}
        return probe, (params, normal(4, 3).astype(dtype))
    params, batch = MODELS[name].draw(0, dtype)
    return MODELS[name].loss, (params, *batch)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.bfloat16) for name in ("residual CNN", "GPT, 2 layers", "ragged")),
        *((name, jnp.float16) for name in ("MLP, 3 hidden, gelu", "ragged", "linear probe")),
    ],
)
def test_no_product_of_float32_in_half_precision_on_an_accelerator(name, dtype, monkeypatch):
    loss, args = program(name, dtype)
    plain = products(jax.make_jaxpr(jax.value_and_grad(loss))(*args).jaxpr)

    def own(**how):
        """The products that the diagonal adds to those of the gradient."""
        jaxpr = jax.make_jaxpr(hs.value_and_hesscale(loss, **how))(*args).jaxpr
        return products(jaxpr) - plain

    wide = ("float32", "float32")
    assert own()[wide] > 0  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    narrow = own()
    assert narrow[wide] == 0
    assert narrow[("bfloat16", "bfloat16")] > 0
    assert own(product_dtype=jnp.float32)[wide] > 0
    assert own(product_dtype=jnp.bfloat16) == narrow


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_float32_model_stays_in_float32_unless_asked(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loss, args = program("MLP, 3 hidden, gelu", jnp.float32)
    traced = jax.make_jaxpr(hs.value_and_hesscale(loss))(*args).jaxpr
    assert set(products(traced)) == {("float32", "float32")}
    asked = jax.make_jaxpr(hs.value_and_hesscale(loss, product_dtype=jnp.bfloat16))(*args).jaxpr
    assert ("bfloat16", "bfloat16") in products(asked)


def relative(actual, expected):
    """The largest L1 error of a leaf, relative to the leaf."""

    def of(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.abs(a - b).sum() / np.abs(b).sum()

    return max(jax.tree.leaves(jax.tree.map(of, actual, expected)))


# A factor in bfloat16 is off by 2^-9 at most, a product of two and its rounded result by 3 * 2^-9.
# Through a network such errors add up at random: 0.3 % in its leaves, 1 % in a GPT of 12 layers.
LIMIT = 0.02


NAMES = [*MODELS, "ragged", "linear probe"]
AT_SCALES = [(name, 1.0) for name in NAMES] + [
    (name, scale) for name in ("MLP, 3 hidden, gelu", "linear probe") for scale in (1e-6, 1e6)
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "scale"), AT_SCALES)
def test_half_precision_changes_little_at_any_scale(name, scale, dtype):
    loss, args = program(name, dtype)

    def scaled(*args):
        return scale * loss(*args).astype(jnp.float32)

    def of(product_dtype):
        return jax.jit(hs.hesscale(scaled, product_dtype=product_dtype))(*args)

    (grads, narrow), (expected_grads, wide) = of(jnp.bfloat16), of(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    assert relative(narrow, wide) < LIMIT
    assert relative(narrow, wide) > 0


def test_float64_stays():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 4)

    w, x = normal(3, 2), normal(4, 3)
    exact = hs.hesscale(loss)(w, x)
    asked = hs.hesscale(loss, product_dtype=jnp.bfloat16)(w, x)
    jax.tree.map(np.testing.assert_array_equal, asked, exact)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, jnp.float64])
def test_other_dtypes_raise(dtype):
    with pytest.raises(ValueError, match=r"product_dtype must be None, jnp\.bfloat16 or"):
        hs.hesscale(jnp.sum, product_dtype=dtype)


def test_every_door_takes_it():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = normal(4, 3).astype(jnp.float32)

    def loss(model):
        return jnp.sum(nnx.tanh(model(x)) ** 2)

    graphdef, params = nnx.split(model)

    def pure(params):
        return loss(nnx.merge(graphdef, params))

    how = {"product_dtype": jnp.bfloat16}
    _, expected = hs.hesscale(pure, **how)(params)
    assert relative(expected, hs.hesscale(pure)(params)[1]) > 0
    found = [
        hs.value_and_hesscale(pure, **how)(params)[1][1],
        hs.value_and_hesscale_every(2)(pure, **how)(0, params)[1][1],
        hesscale_jax.nnx.hesscale(loss, **how)(model)[1],
        hesscale_jax.nnx.value_and_hesscale(loss, **how)(model)[1][1],
        hesscale_jax.nnx.value_and_hesscale_every(2)(loss, **how)(0, model)[1][1],
    ]
    for diagonal in found:
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.leaves(diagonal), jax.tree.leaves(expected)
        )


def test_factors_take_it_between_layers():
    loss, args = program("MLP, 3 hidden, gelu", jnp.float32)

    def factors(product_dtype):
        _, (grads, factors) = jax.jit(hs.value_and_factors(loss, product_dtype=product_dtype))(
            *args
        )
        return grads, factors

    (grads, narrow), (expected_grads, wide) = factors(jnp.bfloat16), factors(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    assert 0 < relative(narrow, wide) < LIMIT


def test_steps_in_bfloat16_train_as_in_float32():
    loss, (params, *batch) = program("MLP, 3 hidden, gelu", jnp.float32)

    def trained(product_dtype):
        solver = hs.adahesscale(0.01)

        @jax.jit
        def step(params, state):
            value_and = hs.value_and_hesscale(loss, product_dtype=product_dtype)
            value, (grads, hess_diag) = value_and(params, *batch)
            updates, state = solver.update(grads, state, params, hess_diag=hess_diag)
            return optax.apply_updates(params, updates), state, value

        state, after = solver.init(params), params
        for _ in range(50):
            after, state, value = step(after, state)
        return value

    np.testing.assert_allclose(trained(jnp.bfloat16), trained(jnp.float32), rtol=0.05)
