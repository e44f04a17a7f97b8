"""Gauss-Newton: which equations are the loss's head, and what that makes of the diagonal."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name

import hesscale_jax as hs

X, LABELS, TARGETS = normal(5, 3, seed=9), np.array([0, 3, 1, 2, 2]), normal(5, 4, seed=8)
CONVEX = {
    "cross-entropy": lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(z, LABELS).mean(),
    "binary cross-entropy": lambda z: optax.losses.sigmoid_binary_cross_entropy(z, nn.sigmoid(TARGETS)).mean(),
    "MSE": lambda z: jnp.mean((z - TARGETS) ** 2),
    "MSE as a product": lambda z: jnp.mean((z - TARGETS) * (z - TARGETS)),
    "Huber": lambda z: optax.losses.huber_loss(z, TARGETS).mean(),
    "log-cosh": lambda z: optax.losses.log_cosh(z, TARGETS).mean(),
}  # fmt: skip


def gauss_newton(fun):
    return hs.hesscale(fun, curvature="gauss_newton")


def mlp(params, x=X):
    h = nn.gelu(x @ params["w1"] + params["b1"][None])
    h = nn.standardize(h) * params["scale"][None]
    return h @ params["w2"] + params["b2"][None]


def mlp_parameters():
    shapes = {"w1": (3, 6), "b1": (6,), "scale": (6,), "w2": (6, 4), "b2": (4,)}
    return {k: normal(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}


def cnn(params, images=normal(5, 6, 6, 2, seed=3)):  # noqa: B008  (data the model closes over)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, params["k"], (1, 1), "SAME", dimension_numbers=numbers)
    x = linen.max_pool(nn.tanh(x), (2, 2), (2, 2))
    return x.reshape(5, -1) @ params["w"]


def cnn_parameters():
    return {"k": normal(3, 3, 2, 3), "w": normal(27, 4, seed=1)}


def transformer(params, tokens=np.array([[0, 2, 1], [3, 3, 0], [1, 2, 4], [4, 0, 0], [2, 2, 1]])):  # noqa: B008
    x = params["embedding"][tokens] + params["positions"][None]
    q, k, v = (x @ w for w in params["attention"])
    scores = jnp.einsum("btd,bsd->bts", q, k) / 2
    x = x + nn.softmax(scores) @ v
    x = x + nn.gelu(nn.standardize(x) @ params["up"]) @ params["down"]
    return x.mean(1) @ params["out"]


def transformer_parameters():
    return {
        "embedding": normal(5, 4),
        "positions": normal(3, 4, seed=1),
        "attention": [normal(4, 4, seed=i) for i in (2, 3, 4)],
        "up": normal(4, 7, seed=5),
        "down": normal(7, 4, seed=6),
        "out": normal(4, 4, seed=7),
    }


MODELS = {
    "mlp": (mlp, mlp_parameters()),
    "cnn": (cnn, cnn_parameters()),
    "transformer": (transformer, transformer_parameters()),
}


@pytest.mark.parametrize("head", CONVEX)
@pytest.mark.parametrize("model", MODELS)
def test_non_negative_and_not_zero(model, head):
    apply, params = MODELS[model]
    _, diagonal = jax.jit(gauss_newton(lambda p: CONVEX[head](apply(p))))(params)
    for path, h in jax.tree.leaves_with_path(diagonal):
        # Rounding of terms that are at most as large as the largest entry.
        assert np.min(h) >= -1e-14 * np.max(h), path
        assert np.max(h) > 0, path


def test_last_layer_agrees_with_the_hessian():
    def fun(params):
        return CONVEX["cross-entropy"](mlp(params))

    full, gauss = (
        hs.hesscale(fun, curvature=c)(mlp_parameters())[1] for c in ("hessian", "gauss_newton")
    )
    for name in ("w2", "b2"):
        np.testing.assert_allclose(gauss[name], full[name], rtol=1e-12)
    assert np.abs(gauss["w1"] - full["w1"]).max() > 1e-3 * np.abs(full["w1"]).max()


def test_a_penalty_is_exact_and_leaves_the_model_s_head_alone():
    def fun(params, weight):
        penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return CONVEX["cross-entropy"](mlp(params)) + weight * penalty

    without, with_penalty = (gauss_newton(fun)(mlp_parameters(), w)[1] for w in (0.0, 0.5))
    for name, h in without.items():
        np.testing.assert_allclose(with_penalty[name], h + 1, rtol=1e-12)


def test_a_penalty_that_is_a_norm():
    def fun(p):
        return jnp.mean((X @ p - TARGETS) ** 2) + jnp.sqrt(jnp.sum(p**2))

    p = normal(3, 4)
    hessian = jax.hessian(fun)(p).reshape(12, 12)
    np.testing.assert_allclose(gauss_newton(fun)(p)[1].ravel(), np.diagonal(hessian), rtol=1e-9)


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda p: jnp.sum(p**2), lambda p: jnp.full_like(p, 2)),
        (lambda p: jnp.sum(p * p), lambda p: jnp.full_like(p, 2)),
        (lambda p: jnp.sum(jnp.exp(p)), jnp.exp),
        (lambda p: jnp.sum((p - TARGETS[0]) ** 2), lambda p: jnp.full_like(p, 2)),
        # A residual squared, as in Gauss and Newton: 2 r'^2, without r r''.
        (lambda p: jnp.sum((p**2 - 1) ** 2), lambda p: 8 * p**2),
        (lambda p: jnp.vdot(r := jnp.sin(p), r), lambda p: 2 * jnp.cos(p) ** 2),
    ],
    ids=["square", "product", "exp", "distance", "residual", "residuals"],
)
def test_losses_of_parameters_alone(fun, expected):
    p = normal(4)
    np.testing.assert_allclose(gauss_newton(fun)(p)[1], expected(p), rtol=1e-12)


PENALTIES = {
    "log-sum-exp": lambda p: jnp.log(jnp.sum(jnp.exp(p["a"]))),
    "norm": lambda p: jnp.sqrt(jnp.sum(p["a"] ** 2)),
    "norms of groups": lambda p: jnp.sum(jnp.linalg.norm(p["a"].reshape(2, 2), axis=1)),
    "in a loop": lambda p: jnp.log(
        jax.lax.scan(lambda c, x: (c + jnp.exp(x), None), 0.0, p["a"])[0]
    ),
    "of several": lambda p: jnp.log(jnp.exp(p["a"]).sum() + jnp.exp(p["b"]).sum()),
    "of several, joined": lambda p: jnp.linalg.norm(jnp.concatenate([p["a"], p["b"]])),
    "beside a residual": lambda p: jnp.sum((p["b"] ** 2) ** 2) + jnp.log(jnp.exp(p["a"]).sum()),
}


@pytest.mark.parametrize("loss", PENALTIES.values(), ids=PENALTIES)
def test_a_convex_function_of_parameters_alone_is_no_model(loss):
    p = {"a": normal(4), "b": normal(4)}
    hessian = jax.jit(jax.hessian(loss))(p)
    received = jax.jit(gauss_newton(loss))(p)[1]
    np.testing.assert_allclose(received["a"], jnp.diag(hessian["a"]["a"]), rtol=1e-9)
    assert np.all(received["b"] >= 0)


def test_an_activation_before_the_loss_counts_as_the_loss_unless_the_output_is_named():
    def fun(name):
        def loss(w):
            return jnp.mean((name(jnp.tanh(X @ w)) - TARGETS) ** 2)

        return loss

    w = normal(3, 4)
    unnamed = gauss_newton(fun(lambda y: y))(w)[1]
    named = gauss_newton(fun(lambda y: checkpoint_name(y, "model_output")))(w)[1]
    np.testing.assert_allclose(unnamed, hs.hesscale(fun(lambda y: y))(w)[1], rtol=1e-12)
    np.testing.assert_allclose(
        gauss_newton(fun(lambda y: checkpoint_name(y, "other")))(w)[1], unnamed, rtol=1e-12
    )
    # 2/N sum_n s'(a)^2 x^2
    slopes = 1 - jnp.tanh(X @ w) ** 2
    np.testing.assert_allclose(named, 2 / 20 * (X**2).T @ slopes**2, rtol=1e-9)


def test_a_linear_loss_has_none_in_the_model():
    def fun(w):
        return jnp.mean(jnp.tanh(X @ w["1"]) @ w["2"])

    w = {"1": normal(3, 4), "2": normal(4, 2, seed=1)}
    for h in jax.tree.leaves(gauss_newton(fun)(w)[1]):
        np.testing.assert_array_equal(h, np.zeros_like(h))


def test_a_loss_at_a_hidden_layer_keeps_its_head():
    def fun(w):
        hidden = X @ w["1"]
        return CONVEX["MSE"](hidden) + CONVEX["cross-entropy"](jnp.tanh(hidden) @ w["2"])

    w = {"1": normal(3, 4), "2": normal(4, 4, seed=1)}
    both = gauss_newton(fun)(w)[1]["1"]
    alone = gauss_newton(lambda w: CONVEX["MSE"](X @ w["1"]))(w)[1]["1"]
    assert np.all(both > alone)


def test_reparametrised_weights_are_parameters():
    def fun(params):
        v, g = params
        w = g[None] * v / jnp.linalg.norm(v, axis=0, keepdims=True)
        return CONVEX["cross-entropy"](X @ w)

    params = normal(3, 4), jnp.abs(normal(4, seed=1))
    grad, (of_v, of_g) = gauss_newton(fun)(params)
    for received, expected in zip(grad, jax.grad(fun)(params), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-9)
    assert np.min(of_v) > 0
    assert np.min(of_g) > 0
