"""The exact diagonal of the Gauss-Newton matrix, and the refined one, against dense algebra."""

import contextlib
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree

import hesscale_jax as hs
from hesscale_jax import _jaxpr
from hesscale_jax.examples import Examples, Mixed
from hesscale_jax.planning import plan
from hesscale_jax.rules.table import find

KEYS = jax.random.split(jax.random.key(0), 10)
X = jax.random.normal(KEYS[0], (6, 4))
LABELS = jnp.array([0, 2, 1, 1, 0, 2])
TOKENS = jnp.array([[0, 3, 1, 2], [4, 1, 1, 0]])


@pytest.fixture(autouse=True)
def as_models_are_written():
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape) / shape[0] ** 0.5


def cross_entropy(logits, labels=LABELS):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def mlp(hidden, act):
    def model(params):
        x = X
        for weights, bias in params[:-1]:
            x = act(x @ weights + bias)
        weights, bias = params[-1]
        return x @ weights + bias

    sizes = [4, *[5] * hidden, 3]
    params = [
        (normal(i, *pair), normal(i, pair[1]))
        for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))
    ]
    return model, params


def convolutional(params):
    images = normal(1, 3, 6, 6, 2)
    y = lax.conv_general_dilated(
        images, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jax.nn.relu(y + params["b"])
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return y.reshape(3, -1) @ params["o"]


def transformer(params):
    h = params["e"][TOKENS] + params["at"]
    u = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    q, k, v = jnp.split(u * params["g"] @ params["qkv"], 3, -1)
    scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), q @ jnp.swapaxes(k, 1, 2), -1e9)
    h = h + jax.nn.softmax(scores) @ v @ params["o"]
    h = h.reshape(8, 4)
    return (h + jax.nn.gelu(h @ params["m"]) @ params["n"]).reshape(2, 4, 4) @ params["e"].T


def stacked(params):
    """Layers in a loop, and a weight that is normalised."""

    def layer(h, w):
        return h + jnp.tanh(h @ w), None

    h, _ = lax.scan(layer, X, params["layers"])
    return h @ (params["o"] / jnp.linalg.norm(params["o"]))


def recurrent(params):
    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h

    _, states = lax.scan(step, jnp.zeros((3, 5)), normal(2, 4, 3, 2))
    return jnp.swapaxes(states, 0, 1) @ params["o"]


def batch_normalised(params):
    h = X @ params[0]
    h = (h - h.mean(0)) * lax.rsqrt(h.var(0) + 1e-3)
    return jnp.tanh(h) @ params[1]


def whole(params):
    h = jnp.tanh(X @ params["in"])
    return (jnp.sum(h) * X[:, :3] + h[jnp.array([1, 0, 2, 3, 5, 4])]) @ params["out"]


def sequences(logits):
    return cross_entropy(logits, TOKENS)


def flattened(logits):
    return cross_entropy(logits.reshape(8, 5), TOKENS.reshape(8))


ATTENTION = {
    "e": normal(1, 5, 4),
    "at": normal(2, 4, 4),
    "g": 1 + normal(3, 4),
    "qkv": normal(4, 4, 12),
    "o": normal(5, 4, 4),
    "m": normal(6, 4, 6),
    "n": normal(7, 6, 4),
}
RNN = {"w": normal(3, 2, 5), "u": normal(4, 5, 5), "o": normal(5, 5, 2)}


def cosh(outputs):
    return jnp.mean(jnp.cosh(outputs))


def squared(outputs):
    return jnp.mean((outputs - X[:, :3]) ** 2)


KERNELS = {"k": normal(3, 3, 3, 2, 3), "b": normal(4, 3), "o": normal(5, 27, 3)}
LAYERS = {"layers": normal(2, 2, 4, 4), "o": normal(3, 4, 3)}
PAIR = {"in": normal(1, 4, 3), "out": normal(2, 3, 3)}
CRITIC, CRITIC_PARAMS = mlp(1, jnp.tanh)

# A model, its parameters, the loss's head, and how many examples it computes each by itself.
MODELS = {
    "MLP, tanh": (*mlp(2, jnp.tanh), cross_entropy, 6),
    "MLP, GELU": (*mlp(3, jax.nn.gelu), cross_entropy, 6),
    "MLP, ReLU": (*mlp(2, jax.nn.relu), squared, 6),
    "one output": (lambda p: CRITIC(p)[:, 0], CRITIC_PARAMS, cosh, 6),
    "convolutions": (convolutional, KERNELS, lambda z: cross_entropy(z, LABELS[:3]), 3),
    "transformer": (transformer, ATTENTION, sequences, 2),
    "transformer, flattened logits": (transformer, ATTENTION, flattened, 2),
    "layers in a loop": (stacked, LAYERS, cross_entropy, 6),
    "recurrent": (recurrent, RNN, cosh, 3),
    "recurrent, last step": (lambda p: recurrent(p)[:, -1], RNN, cosh, 3),
    "what each example reads whole": (whole, PAIR, cross_entropy, 6),
    "batch normalisation": (batch_normalised, (normal(3, 4, 5), normal(4, 5, 3)), cross_entropy, 1),
    "a head that mixes": (*mlp(2, jnp.tanh), lambda z: jnp.sqrt(squared(z)), 1),
}


def dense_gauss_newton(model, head, params):
    flat, unravel = ravel_pytree(params)
    outputs, restore = ravel_pytree(model(params))
    jacobian = jax.jit(jax.jacobian(lambda p: ravel_pytree(model(unravel(p)))[0]))(flat)
    hessian = jax.jit(jax.hessian(lambda z: head(restore(z))))(outputs)
    return jnp.einsum("ai,ab,bi->i", jacobian, hessian, jacobian)


def diagonal(fun, params, curvature):
    _, (grad, hess_diag) = jax.jit(hs.value_and_hesscale(fun, curvature=curvature))(params)
    expected = jax.jit(jax.grad(fun))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grad, expected
    )
    return ravel_pytree(hess_diag)[0]


def exact_diagonal(fun, params):
    flat, unravel = ravel_pytree(params)
    return jnp.diagonal(jax.jit(jax.hessian(lambda p: fun(unravel(p))))(flat))


@pytest.mark.parametrize("name", MODELS)
def test_equals_dense_algebra(name):
    model, params, head, _ = MODELS[name]
    expected = dense_gauss_newton(model, head, params)
    received = diagonal(lambda p: head(model(p)), params, "exact_gauss_newton")
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12 * expected.max())


def model_program(model, params):
    leaves, tree = jax.tree.flatten(params)
    traced = _jaxpr.trace(lambda *xs: model(jax.tree.unflatten(tree, xs)), *leaves)
    program = _jaxpr.flatten(traced, unroll=2**10)
    return program, plan(program, program.inputs, program.outputs, lambda e: find(hs.RULES, e))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "a head that mixes"])
def test_examples_are_computed_each_by_itself(name):
    model, params, _, count = MODELS[name]
    program, steps = model_program(model, params)
    if count > 1:
        assert Examples(program, steps, count).count == count
    whole = program.outputs[0].shape[0]
    if count != whole:
        with pytest.raises(Mixed):
            Examples(program, steps, whole)


MIXING = {
    "mean": lambda w: X @ w - (X @ w).mean(0),
    "cumulative sum": lambda w: jnp.cumsum(X @ w, 0),
    "reversed": lambda w: (X @ w)[::-1] + X @ w,
    "Gram matrix": lambda w: (X @ w) @ (X @ w).T,
    "halves swapped": lambda w: jnp.concatenate([(X @ w)[3:], (X @ w)[:3]]),
    "sorted": lambda w: jnp.sort(X @ w, 0),
    "other entries": lambda w: jnp.broadcast_to((X @ w).ravel()[:6, None], (6, 3)),
    "factorised": lambda w: jnp.linalg.qr(X @ w)[0],
    "parameters in a row": lambda w: jnp.concatenate([w, w[:2]]) * X[:, :3],
    "a parameter for each": lambda w: jnp.tanh(jnp.concatenate([w, w]))[:6, :1] * X,
    "summed over a window": lambda w: jax.lax.reduce_window(
        X @ w, 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"
    ),
    "padded": lambda w: jax.lax.pad((X @ w), 0.0, ((1, -1, 0), (0, 0, 0))),
    "along the axis of a convolution": lambda w: jax.lax.conv_general_dilated(
        (X @ w)[None], jnp.ones((3, 3, 3)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "stacked": lambda w: jnp.stack([*(X @ w)[1:], (X @ w)[0]]),
    "rolled": lambda w: jnp.roll(jnp.reshape(X @ w, (2, 9)), 1, 1).reshape(6, 3),
    "transposed and back": lambda w: (X @ w).T.reshape(6, 3),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_not_taken_apart(name):
    program, steps = model_program(MIXING[name], normal(1, 4, 3))
    with pytest.raises(Mixed):
        Examples(program, steps, 6)


def test_an_example_may_read_rows_of_a_table_that_is_computed():
    """Each takes the whole table as its own, as it takes parameters."""

    def model(w):
        return checkpoint_name(jnp.tanh(X @ w)[jnp.array([1, 0, 2, 2, 4, 5])], "model_output")

    def head(z):
        return jnp.sum(z**4) + jnp.sum(jnp.prod(z, -1) ** 2)

    w = normal(1, 4, 3)
    program, steps = model_program(model, w)
    assert Examples(program, steps, 6).count == 6
    received = diagonal(lambda w: head(model(w)), w, "exact_gauss_newton")
    expected = dense_gauss_newton(model, head, w)
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12 * expected.max())


def test_a_parameter_for_each_example_mixes_them():
    program, steps = model_program(lambda w: jnp.tanh(w) * X, normal(1, 6, 4))
    with pytest.raises(Mixed):
        Examples(program, steps, 6)


@pytest.mark.parametrize("act", [jnp.tanh, jax.nn.gelu, jax.nn.relu])
@pytest.mark.parametrize("hidden", [1, 2])
def test_refined_is_exact_up_to_two_hidden_layers(hidden, act):
    model, params = mlp(hidden, act)

    def fun(p):
        return cross_entropy(model(p))

    expected = exact_diagonal(fun, params)
    received = diagonal(fun, params, "refined")
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12)
    assert not np.allclose(diagonal(fun, params, "hessian"), expected, rtol=1e-2)


@pytest.mark.parametrize("name", ["transformer", "recurrent", "batch normalisation"])
def test_refined_is_the_matrix_and_hesscales_residual(name):
    model, params, head, _ = MODELS[name]

    def fun(p):
        return head(model(p))

    exact, hessian, gauss_newton, refined = (
        diagonal(fun, params, c)
        for c in ("exact_gauss_newton", "hessian", "gauss_newton", "refined")
    )
    np.testing.assert_allclose(refined, exact + (hessian - gauss_newton), rtol=1e-9, atol=1e-11)


def test_a_model_that_computes_in_another_dtype():
    """A layer in float32 of parameters in float64, as Flax casts a softmax."""

    def loss(params):
        hidden = jnp.tanh((X @ params["w"]).astype(jnp.float32)).astype(X.dtype)
        return cross_entropy(hidden @ params["o"])

    params = {"w": normal(1, 4, 5), "o": normal(2, 5, 3)}
    _, received = hs.hesscale(loss, curvature="refined")(params)
    flat, unravel = ravel_pytree(params)
    expected = jnp.diagonal(jax.hessian(lambda flat: loss(unravel(flat)))(flat))
    # Of numbers below 1 in float32.
    np.testing.assert_allclose(ravel_pytree(received)[0], expected, rtol=0, atol=1e-6)


HALVES = {
    "converted": lambda z: jnp.mean(z.astype(jnp.float32) ** 2),
    "moved first": lambda z: jnp.mean(z[:, 1:].reshape(-1).astype(jnp.float32) ** 2),
    "a difference": lambda z: jnp.mean((z - X[:, :3].astype(z.dtype)).astype(jnp.float32) ** 2),
    "computed in half precision": lambda z: jnp.sum(z @ z.T).astype(jnp.float32),
    "read twice": lambda z: cross_entropy(z.astype(jnp.float32)) + jnp.sum(z * z),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("head", HALVES)
@pytest.mark.parametrize("curvature", ["exact_gauss_newton", "refined"])
def test_a_model_in_half_precision_keeps_the_range_of_float32(head, dtype, curvature):
    def diagonal(scale, dtype):
        def loss(w):
            with jax.numpy_dtype_promotion("standard"):
                return scale * HALVES[head](jnp.asarray(X, dtype) @ w.astype(dtype))

        return hs.hesscale(loss, curvature=curvature)(normal(1, 4, 3).astype(jnp.float32))[1]

    expected = diagonal(1.0, jnp.float32)
    for scale in (1e-10, 1e-6, 1.0, 1e6, 1e10):
        received = diagonal(scale, dtype) / scale
        error = jnp.abs(received - expected).max() / jnp.abs(expected).max()
        assert error < (2e-3 if dtype == jnp.float16 else 2e-2), (scale, error)


def test_penalties_and_several_outputs():
    """A policy, a value and a penalty; what is shared is summed before it is squared."""
    params = {"in": normal(1, 4, 5), "policy": normal(2, 5, 3), "value": normal(3, 5)}

    def model(p):
        h = jnp.tanh(X @ p["in"])
        return {"logits": h @ p["policy"], "value": h @ p["value"]}

    def head(z):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(z["logits"]), LABELS[:, None], 1)[:, 0]
        return jnp.mean((z["value"] - X[:, 0]) ** 2 - chosen * X[:, 1])

    def penalty(p):
        return 0.3 * sum(jnp.sum(jnp.cosh(x)) for x in jax.tree.leaves(p))

    def fun(p):
        return head(model(p)) + penalty(p)

    expected = dense_gauss_newton(model, head, params) + exact_diagonal(penalty, params)
    for curvature in ("exact_gauss_newton", "refined"):
        received = diagonal(fun, params, curvature)
        np.testing.assert_allclose(
            received,
            expected if curvature == "exact_gauss_newton" else exact_diagonal(fun, params),
            rtol=1e-10,
            atol=1e-12,
        )


def test_the_output_that_is_named():
    model, params = mlp(2, jnp.tanh)

    def named(p):
        return checkpoint_name(jnp.tanh(model(p)), "model_output")

    def head(z):
        return jnp.mean((z - X[:, :3]) ** 2)

    expected = dense_gauss_newton(named, head, params)
    received = diagonal(lambda p: head(named(p)), params, "exact_gauss_newton")
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-13)


def test_gradients_of_many_numbers_are_held_a_few_at_a_time(monkeypatch):
    model, params, head, _ = MODELS["MLP, tanh"]

    def fun(p):
        return head(model(p))

    expected = diagonal(fun, params, "exact_gauss_newton")
    for held in (1, 500):  # one pair of passes, or 2 examples of 3 outputs of 73 parameters
        monkeypatch.setattr("hesscale_jax.gauss_newton.AT_ONCE", held)
        received = diagonal(lambda p: head(model(p)), params, "exact_gauss_newton")
        np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_second_derivatives_are_held_a_few_columns_at_a_time(monkeypatch):
    def fun(w):
        return jnp.mean(jax.nn.logsumexp(jnp.tanh(X @ w), 1))

    def largest():
        traced = jax.make_jaxpr(hs.hesscale(lambda w: fun(w), curvature="exact_gauss_newton"))(w)
        inner = _jaxpr.inspection.inner_equations({"jaxpr": traced.jaxpr})
        return max(v.aval.size for eqn in inner for v in eqn.outvars)

    w = normal(1, 4, 30)
    assert largest() >= 6 * 30 * 30
    expected = diagonal(fun, w, "exact_gauss_newton")
    monkeypatch.setattr("hesscale_jax.gauss_newton.AT_ONCE", 1000)
    assert largest() <= 1000
    received = diagonal(lambda w: fun(w), w, "exact_gauss_newton")
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_transformations_of_it():
    model, params, head, _ = MODELS["MLP, tanh"]
    diagonals = jax.jit(
        jax.vmap(
            lambda scale: hs.hesscale(
                lambda p: scale * head(model(p)), curvature="exact_gauss_newton"
            )(params)[1]
        )
    )(jnp.array([1.0, 2.0]))
    for x in jax.tree.leaves(diagonals):
        np.testing.assert_allclose(2 * x[0], x[1], rtol=1e-12)


HEADS_OF_PARAMETERS = {
    "a power": lambda w: jnp.sum(w**3),
    "a product": lambda w: jnp.prod(w) + jnp.sum(jnp.cosh(w)),
    "a region": hs.exact(lambda w: jnp.sum(jnp.tanh(X @ w) ** 2)),
}


@pytest.mark.parametrize("curvature", ["exact_gauss_newton", "refined"])
@pytest.mark.parametrize("name", HEADS_OF_PARAMETERS)
def test_a_head_may_read_parameters_as_they_are(name, curvature):
    fun, w = HEADS_OF_PARAMETERS[name], normal(1, 4, 3)
    received = diagonal(fun, w, curvature)
    np.testing.assert_allclose(received, exact_diagonal(fun, w), rtol=1e-10, atol=1e-12)


def test_errors_say_what_to_do(monkeypatch):
    model, params, head, _ = MODELS["MLP, tanh"]
    exact = {"curvature": "exact_gauss_newton"}

    def printed(p):
        z = model(p)
        jax.debug.print("{}", z)
        return head(z)

    with pytest.raises(ValueError, match="has effects"):
        hs.hesscale(printed, **exact)(params)
    with pytest.raises(ValueError, match="curvature must be one of"):
        hs.value_and_factors(lambda p: head(model(p)), **exact)(params)

    def in_a_loop(p):
        return jnp.sum(lax.map(lambda x: jnp.sum((x @ p[0][0]) ** 2), X))

    with pytest.raises(ValueError, match=r"inside of 'scan'.*behind it; or use curvature"):
        hs.hesscale(in_a_loop, **exact)(params)
    monkeypatch.setattr("hesscale_jax.gauss_newton.MAX_OUTPUTS", 3)
    hs.hesscale(lambda p: head(model(p)), **exact)(params)
    with pytest.raises(ValueError, match="24, more than 3; they are parameters that the loss's"):
        hs.hesscale(lambda p: jnp.sum(p[0] * p[1] ** 2), **exact)((normal(1, 4, 3),) * 2)
    normalised, params, head, _ = MODELS["batch normalisation"]
    with pytest.raises(ValueError, match=r"18, more than 3; .*'sub' mixes .*test_ladder.py"):
        hs.hesscale(lambda p: head(normalised(p)), **exact)(params)

    def of_jax(p):
        h = X @ p[0]
        return head((h / jnp.sqrt(h.var(0))) @ p[1])

    of_jax(params)  # JAX traces its variance once, and remembers no line of it.
    with pytest.raises(ValueError, match=r" mixes \(\S*test_ladder.py:\d+ .*of_jax\)"):
        hs.hesscale(of_jax, **exact)(params)


@pytest.mark.parametrize("curvature", ["exact_gauss_newton", "refined", "gauss_newton"])
def test_a_jaxlib_that_adds_up_wrongly_is_warned_of(curvature, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    w = jnp.ones((4, 3), jnp.float32)

    def differentiate(w):
        loss = hs.hesscale(lambda w: cross_entropy(X.astype(w.dtype) @ w), curvature=curvature)
        jax.eval_shape(loss, w)

    monkeypatch.setenv("XLA_FLAGS", "--other --xla_cpu_experimental_ynn_fusion_type=")
    differentiate(w)
    monkeypatch.setenv("XLA_FLAGS", "--other")
    differentiate(w.astype(float))
    warned = pytest.warns(RuntimeWarning, match="XLA_FLAGS")
    with contextlib.nullcontext() if curvature == "gauss_newton" else warned:
        differentiate(w)


@pytest.mark.parametrize("curvature", ["exact_gauss_newton", "refined"])
def test_a_loop_s_step_may_choose_a_branch_by_what_it_computes(curvature):
    def step(h, w):
        return lax.cond(jnp.sum(h) > 0, jnp.tanh, jnp.sin, h @ w)

    def looped(p):
        h, _ = lax.scan(lambda h, _: (step(h, p["w"]), None), X, None, length=2)
        return cross_entropy(h @ p["v"])

    def written_out(p):
        return cross_entropy(step(step(X, p["w"]), p["w"]) @ p["v"])

    params = {"w": normal(1, 4, 4), "v": normal(2, 4, 3)}
    received, expected = (
        hs.hesscale(f, curvature=curvature)(params) for f in (looped, written_out)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), received, expected)
