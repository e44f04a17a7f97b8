"""The transform as users meet it: arguments, results, errors, JAX's transforms around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ACTIVATIONS, normal
from jax import lax, nn
from jax.interpreters import ad, mlir

import hesscale_jax as hs

LABELS = np.array([0, 3, 1, 2, 2])
X = normal(5, 3, seed=9)


def parameters(seed=0):
    return {
        "hidden": {"w": normal(3, 6, seed=seed), "b": normal(6, seed=seed + 1)},
        "out": {"w": normal(6, 4, seed=seed + 2), "b": normal(4, seed=seed + 3)},
    }


def logits(params, x):
    h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return h @ params["out"]["w"] + params["out"]["b"][None]


def loss(params, x=X):
    z = logits(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, LABELS).mean()


def exact_diagonal(fun, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(jnp.diagonal(jax.hessian(lambda p: fun(unravel(p)))(flat)))


def assert_trees_close(received, expected, rtol=1e-9):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for r, e in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert r.dtype == e.dtype
        np.testing.assert_allclose(r, e, rtol=0, atol=rtol * np.max(np.abs(e), initial=0))


# Arguments and results


def test_value_gradient_and_last_layer():
    value, (grad, diagonal) = hs.value_and_hesscale(loss)(parameters())
    expected_value, expected_grad = jax.value_and_grad(loss)(parameters())
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    assert_trees_close(grad, expected_grad)
    assert_trees_close(diagonal["out"], exact_diagonal(loss, parameters())["out"])


def test_hesscale_returns_what_value_and_hesscale_does():
    value, result = hs.value_and_hesscale(loss)(parameters())
    assert_trees_close(hs.hesscale(loss)(parameters()), result, rtol=0)
    assert value.shape == ()


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), (0, -1)])
def test_argnums(argnums):
    def quartic(p, q):
        return jnp.sum(p**4) + jnp.sum(jnp.sin(q["q"]) ** 2)

    args = normal(3), {"q": normal(2, 4)}
    grad, diagonal = hs.hesscale(quartic, argnums)(*args)
    assert_trees_close(grad, jax.grad(quartic, argnums)(*args))
    exact = 12 * args[0] ** 2, {"q": 2 * jnp.cos(2 * args[1]["q"])}
    chosen = exact[argnums] if isinstance(argnums, int) else tuple(exact[i] for i in argnums)
    assert_trees_close(diagonal, chosen)


@pytest.mark.parametrize("number", [float, np.float64, np.asarray])
def test_numbers_are_differentiated_as_arrays_are(number):
    def quartic(p, scale):
        return scale * p["a"] ** 4 + jnp.tanh(p["b"])

    params = {"a": number(1.5), "b": number(0.5)}
    grad, diagonal = hs.hesscale(quartic)(params, 2.0)
    assert_trees_close(grad, jax.grad(quartic)(params, 2.0))
    exact = jax.hessian(quartic)(params, 2.0)
    assert_trees_close(diagonal, {name: exact[name][name] for name in params})


def test_has_aux_hands_on_anything():
    def with_aux(params):
        z = logits(params, X)
        aux = {
            "logits": z,
            "name": "mlp",
            "key": jax.random.key(0),
            "one": jnp.ones(()),
            "none": None,
        }
        return jnp.mean(z**2), aux

    (value, aux), (grad, _) = hs.value_and_hesscale(with_aux, has_aux=True)(parameters())
    assert aux["name"] == "mlp"
    assert aux["none"] is None
    np.testing.assert_allclose(jnp.mean(aux["logits"] ** 2), value)
    assert_trees_close(grad, jax.grad(with_aux, has_aux=True)(parameters())[0])
    result, aux = hs.hesscale(with_aux, has_aux=True)(parameters())
    assert len(result) == 2
    assert aux["one"] == 1


def test_keyword_arguments_and_the_function_s_name():
    fun = hs.hesscale(loss)
    assert fun.__name__ == "loss"
    assert_trees_close(fun(parameters(), x=2 * X)[0], jax.grad(loss)(parameters(), x=2 * X))


def test_python_control_flow_on_data():
    def branching(p, flag):
        return jnp.sum(p**2) if flag else jnp.sum(p**3)

    p = normal(3)
    assert_trees_close(hs.hesscale(branching)(p, np.array(False))[1], 6 * p)


def test_loss_that_does_not_depend_on_the_argument():
    for fun in (
        lambda p: 0.0,
        lambda p: jnp.sum(lax.stop_gradient(p)),
        lambda p: jnp.sum(jnp.sign(p)),
    ):
        grad, diagonal = hs.hesscale(fun)(normal(3))
        assert_trees_close((grad, diagonal), (jnp.zeros(3), jnp.zeros(3)))


def test_argument_handed_straight_out():
    value, (grad, diagonal) = hs.value_and_hesscale(lambda p: p)(normal())
    assert (value, grad, diagonal) == (normal(), 1, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), parameters())
    grad, diagonal = hs.hesscale(loss)(params, X.astype(dtype))
    assert all(p.dtype == dtype for p in jax.tree.leaves((grad, diagonal)))
    reference = hs.hesscale(loss)(parameters())[1]
    # A few units in the last place of the dtype, through two layers.
    rtol = 32 * float(jnp.finfo(dtype).eps)
    for r, e in zip(jax.tree.leaves(diagonal), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(r.astype(float), e, rtol=0, atol=rtol * np.abs(e).max())


# Structure: what counts as one computation, and what ends a path


def test_a_function_traced_twice_counts_once():
    def network(p):
        return nn.relu(nn.softplus(jnp.sin(X @ p) @ p.T) @ p)

    def residual(p):
        return jnp.mean((network(p) - 1) * (network(p) - 1))

    def square(p):
        return jnp.mean((network(p) - 1) ** 2)

    assert_trees_close(hs.hesscale(residual)(normal(3, 6)), hs.hesscale(square)(normal(3, 6)))


def test_custom_derivatives_that_differ_are_not_merged():
    def scaled_gradient(scale):
        @jax.custom_jvp
        def identity(x):
            return x * 1.0

        identity.defjvp(lambda primals, tangents: (primals[0], scale * tangents[0]))
        return identity

    def fun(p):
        return jnp.sum(scaled_gradient(2.0)(p) * 3 + scaled_gradient(5.0)(p) * 7)

    grad, _ = hs.hesscale(fun)(normal(3))
    assert_trees_close(grad, jnp.full(3, 41.0))


def test_jit_is_no_border_of_a_block():
    def inside_jit(p):
        return jnp.sum(jax.jit(jnp.sin)(p) * jax.jit(jnp.cos)(p) * p)

    p = normal(4)
    assert_trees_close(hs.hesscale(inside_jit)(p)[1], exact_diagonal(inside_jit, p))


def test_stop_gradient_ends_a_path():
    def fun(p):
        return jnp.sum(p**3 * lax.stop_gradient(p) ** 2)

    p = normal(4)
    assert_trees_close(hs.hesscale(fun)(p), (3 * p**4, 6 * p**3))


def test_derivatives_inside_the_loss():
    def fun(p):
        inner = jax.grad(lambda q: jnp.sum(nn.silu(q) * q))(p)
        return jnp.sum(inner**2)

    p = normal(4)
    grad, diagonal = hs.hesscale(fun)(p)
    assert_trees_close(grad, jax.grad(fun)(p))
    assert_trees_close(diagonal, exact_diagonal(fun, p))


@pytest.mark.parametrize("name", [*ACTIVATIONS, "abs"])
def test_kinks_are_where_jax_has_them(name):
    activation = jnp.abs if name == "abs" else getattr(nn, name)

    def fun(p):
        return jnp.sum(activation(p) * jnp.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0]))

    p = jnp.array([-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
    grad, diagonal = jax.jit(hs.hesscale(fun))(p)
    assert_trees_close(grad, jax.grad(fun)(p))
    assert_trees_close(diagonal, exact_diagonal(fun, p))


def test_networks_of_one_unit_a_layer_are_exact():
    def fun(params):
        y = X[:, :1]
        for w, b in params:
            y = nn.gelu(y @ w + b[None])
        return jnp.sum(y[0] ** 2)

    params = [(normal(1, 1, seed=i), normal(1, seed=10 + i)) for i in range(4)]
    grad, diagonal = jax.jit(hs.hesscale(fun))(params)
    assert_trees_close(grad, jax.grad(fun)(params))
    assert_trees_close(diagonal, exact_diagonal(fun, params))


def focal(z):
    p = jnp.exp(-optax.losses.softmax_cross_entropy_with_integer_labels(z, LABELS))
    return -((1 - p) ** 2) * jnp.log(p)


TARGETS = normal(5, 4, seed=12)
PROBABILITIES = nn.softmax(TARGETS)
HEADS = {
    "cross-entropy by label": lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(z, LABELS).mean(),
    "cross-entropy, one-hot": lambda z: optax.losses.softmax_cross_entropy(z, nn.one_hot(LABELS, 4)).sum(),
    "cross-entropy by indexing": lambda z: -nn.log_softmax(z)[np.arange(5), LABELS].mean(),
    "label smoothing": lambda z: optax.losses.softmax_cross_entropy(
        z, optax.losses.smooth_labels(nn.one_hot(LABELS, 4), 0.1)
    ).mean(),
    "binary cross-entropy": lambda z: optax.losses.sigmoid_binary_cross_entropy(z, PROBABILITIES).mean(),
    "MSE as a square": lambda z: jnp.mean((z - TARGETS) ** 2),
    "MSE as a product": lambda z: jnp.mean((z - TARGETS) * (z - TARGETS)),
    "MSE as a dot product": lambda z: jnp.vdot(z - TARGETS, z - TARGETS),
    "MSE by optax": lambda z: optax.losses.squared_error(z, TARGETS).mean(),
    # Of each example: over a batch, the root couples examples that share the layer's weights.
    "RMSE": lambda z: jnp.sqrt(jnp.mean((z - TARGETS) ** 2, 1)).mean(),
    "RMSE of one example": lambda z: jnp.sqrt(jnp.mean((z[0] - TARGETS[0]) ** 2)),
    "Huber": lambda z: optax.losses.huber_loss(z, TARGETS).mean(),
    "Gaussian NLL": lambda z: jnp.mean(((z - TARGETS) / jnp.exp(0.3 * z)) ** 2 / 2 + 0.3 * z),
    "focal by label": lambda z: focal(z).mean(),
    "focal, sigmoid": lambda z: optax.losses.sigmoid_focal_loss(z, nn.one_hot(LABELS, 4)).mean(),
    "KL divergence": lambda z: optax.losses.kl_divergence(nn.log_softmax(z), PROBABILITIES).mean(),
    "cosine distance": lambda z: optax.losses.cosine_distance(z, TARGETS).mean(),
    "log-cosh": lambda z: optax.losses.log_cosh(z, TARGETS).mean(),
    "layer norm, then cross-entropy": lambda z: -jnp.mean(PROBABILITIES * nn.standardize(nn.log_softmax(z))),
    "with an L2 penalty": lambda z: jnp.mean(z**4),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_last_linear_layer_is_exact(name):
    def fun(params):
        penalty = 0.1 * optax.tree.norm(params, squared=True) if "penalty" in name else 0.0
        return HEADS[name](logits({"hidden": fixed, "out": params}, X)) + penalty

    fixed, params = (parameters(seed=20)[k] for k in ("hidden", "out"))
    grad, diagonal = hs.hesscale(fun)(params)
    assert_trees_close(grad, jax.grad(fun)(params))
    assert_trees_close(diagonal, exact_diagonal(fun, params))


# JAX's transforms inside and around


def test_jit_equals_eager_and_traces_once():
    traces = []

    def counted(params, x):
        traces.append(None)
        return loss(params, x)

    jitted = jax.jit(hs.value_and_hesscale(counted))
    assert_trees_close(jitted(parameters(), X), hs.value_and_hesscale(loss)(parameters(), X), 1e-12)
    jitted(parameters(seed=5), X)
    assert len(traces) == 1


def test_vmap_over_parameters_equals_a_loop():
    stacked = jax.tree.map(lambda *ps: jnp.stack(ps), *(parameters(seed) for seed in (0, 10, 20)))
    received = jax.vmap(hs.hesscale(loss))(stacked)
    each = [hs.hesscale(loss)(parameters(seed)) for seed in (0, 10, 20)]
    assert_trees_close(received, jax.tree.map(lambda *rs: jnp.stack(rs), *each), 1e-12)


def test_vmap_inside_equals_batching():
    def by_example(params):
        def one(x, label):
            z = logits(params, x[None])[0]
            return optax.losses.softmax_cross_entropy_with_integer_labels(z, label)

        return jax.vmap(one)(X, LABELS).mean()

    assert_trees_close(
        hs.hesscale(by_example)(parameters()), hs.hesscale(loss)(parameters()), 1e-12
    )


def test_derivative_of_the_diagonal():
    def trace(p):
        return jnp.sum(hs.hesscale(lambda p: jnp.sum(jnp.sin(p) * p))(p)[1])

    p = normal(3)
    # (x sin x)'' = 2 cos x - x sin x
    assert_trees_close(jax.grad(trace)(p), -3 * jnp.sin(p) - p * jnp.cos(p))


def test_training_step_in_scan_and_cond():
    def step(params, x):
        grad, diagonal = hs.hesscale(loss)(params, x)
        scaled = jax.tree.map(
            lambda p, g, h: p - 0.1 * g / (jnp.abs(h) + 0.1), params, grad, diagonal
        )
        return lax.cond(x[0, 0] > 0, lambda: scaled, lambda: params), None

    batches = jnp.stack([jnp.abs(X), -jnp.abs(X), jnp.abs(X)])
    received, _ = jax.jit(functools.partial(lax.scan, step))(parameters(), batches)
    expected = parameters()
    for x in batches:
        expected, _ = step(expected, x)
    assert_trees_close(received, expected, 1e-12)


# Rules of one's own

WITHOUT_CHOLESKY = {name: rule for name, rule in hs.RULES.items() if name != "cholesky"}


def test_a_rule_for_a_primitive_without_one():
    def fun(p):
        return jnp.sum(lax.linalg.cholesky(p, symmetrize_input=False))

    def cholesky(eqn, operands, recurse):
        # Of one entry, the Cholesky factor is the square root.
        ((x, dx, vx),) = operands
        y = jnp.sqrt(x)
        return [hs.Moments(y, dx / (2 * y) - vx / (4 * y**3), vx / (4 * x))]

    p = jnp.full((1, 1), 2.0)
    with pytest.raises(hs.UnsupportedPrimitiveError, match="cholesky"):
        hs.hesscale(fun, rules=WITHOUT_CHOLESKY)(p)
    for key in ("cholesky", lax.linalg.cholesky_p):
        _, diagonal = hs.hesscale(fun, rules=WITHOUT_CHOLESKY | {key: cholesky})(p)
        assert_trees_close(diagonal, jax.hessian(fun)(p).reshape(1, 1))


def test_a_rule_that_recurses():
    def checkpoint(eqn, operands, recurse):
        return recurse(jax.extend.core.ClosedJaxpr(eqn.params["jaxpr"], ()), operands)

    def checkpointed(params):
        return jax.checkpoint(loss)(params, X)

    rules = hs.RULES | dict.fromkeys(("checkpoint", "remat2", "remat"), checkpoint)
    assert_trees_close(
        hs.hesscale(checkpointed, rules=rules)(parameters()), hs.hesscale(loss)(parameters())
    )


def unknown_primitives():
    """A pointwise primitive and a bilinear one that the library does not know."""
    cube, product = jax.extend.core.Primitive("cube"), jax.extend.core.Primitive("product")
    for primitive, fun in ((cube, lambda x: x * x * x), (product, jnp.matmul)):
        primitive.def_impl(fun)
        primitive.def_abstract_eval(
            lambda *xs, fun=fun: jax.core.ShapedArray(
                jax.eval_shape(fun, *xs).shape, jnp.result_type(*xs)
            )
        )
        mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    ad.defjvp(cube, lambda g, x: 3 * x * x * g)
    ad.defbilinear(
        product, lambda g, x, w: product.bind(g, w.T), lambda g, x, w: product.bind(x.T, g)
    )
    return cube, product


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_families_take_primitives_of_ones_own(dtype):
    cube, product = unknown_primitives()

    def own(w, x):
        return jnp.sum(cube.bind(product.bind(x, w))).astype(float)

    def builtin(w, x):
        return jnp.sum((x @ w) ** 3).astype(float)

    args = normal(3, 2).astype(dtype), normal(5, 3).astype(dtype)
    rules = hs.RULES | {"cube": hs.rules.nested, "product": hs.rules.multilinear}
    received, expected = hs.hesscale(own, rules=rules)(*args), hs.hesscale(builtin)(*args)
    # In bfloat16 a cube and an integer power are rounded at other places: 8 bits.
    assert_trees_close(received, expected, 1e-9 if dtype == jnp.float64 else 2e-2)


def test_the_error_offers_the_rule_of_pointwise_primitives():
    cube, _ = unknown_primitives()
    with pytest.raises(hs.UnsupportedPrimitiveError, match=r"entry by entry.*rules\.nested"):
        hs.hesscale(lambda w: jnp.sum(cube.bind(w)))(normal(3))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (hs.Moments(1.0), "returned Moments"),
        ([], "returned 0 of them"),
        (None, "returned NoneType"),
        ([1.0], "returned list"),
    ],
)
def test_a_rule_must_return_moments(returned, says):
    rules = hs.RULES | {"sin": lambda eqn, operands, recurse: returned}
    with pytest.raises(TypeError, match=f"the rule of 'sin' must return a list .* {says}"):
        hs.hesscale(lambda w: jnp.sum(jnp.sin(w)), rules=rules)(normal(3))


# Errors, raised while tracing and in the user's terms


@pytest.mark.parametrize(
    ("fun", "arg", "error", "says"),
    [
        (jnp.sum, jnp.arange(3), TypeError, "floating-point inputs .* int64"),
        (
            lambda p: jnp.sum(p.real),
            lax.complex(normal(3), normal(3)),
            TypeError,
            "floating-point inputs .* complex128",
        ),
        (jnp.sum, {"a": normal(3), "b": "text"}, TypeError, r"str at args\[0\]\['b'\]"),
        (lambda p: 0.0, {}, TypeError, "no floating-point array"),
        (lambda p: p, normal(3), TypeError, r"returns a scalar, got shape \(3,\)"),
        (
            lambda p: lax.complex(p[0], p[1]),
            normal(3),
            TypeError,
            "real scalar, got dtype complex128",
        ),
        (lambda p: jnp.argmax(p), normal(3), TypeError, "real scalar, got dtype int64"),
        (lambda p: (jnp.sum(p), 1), normal(3), TypeError, "got tuple.* has_aux=True"),
        (lambda p: None, normal(3), TypeError, "real scalar, got None"),
    ],
)
def test_unfit_arguments_and_losses(fun, arg, error, says):
    with pytest.raises(error, match=says):
        hs.hesscale(fun)(arg)
    with pytest.raises(error, match=says):
        jax.make_jaxpr(lambda: hs.hesscale(fun)(arg))()


def test_has_aux_without_a_pair():
    with pytest.raises(TypeError, match=r"must return a pair \(scalar, aux\)"):
        hs.hesscale(jnp.sum, has_aux=True)(normal(3))


def test_unknown_curvature():
    with pytest.raises(ValueError, match=r"curvature must be one of .*gauss_newton.* got 'newton'"):
        hs.hesscale(jnp.sum, curvature="newton")


@pytest.mark.parametrize(
    ("argnums", "error", "says"),
    [
        (1, ValueError, "more positional arguments than the 1"),
        (-2, ValueError, "more positional arguments than the 1"),
        ((0, 0), ValueError, "names an argument twice"),
        ("p", TypeError, "an int or a sequence of ints"),
    ],
)
def test_unfit_argnums(argnums, error, says):
    with pytest.raises(error, match=says):
        hs.hesscale(jnp.sum, argnums)(normal(3))


def test_unsupported_primitive_names_itself_the_line_and_the_options():
    def model(p):
        return lax.linalg.cholesky(p)  # the line to be named

    with pytest.raises(hs.UnsupportedPrimitiveError) as caught:
        jax.jit(hs.hesscale(lambda p: jnp.sum(model(p)), rules=WITHOUT_CHOLESKY))(normal(4, 4))
    line = model.__code__.co_firstlineno + 1
    assert isinstance(caught.value, NotImplementedError)
    assert f"no rule for 'cholesky' (used at {__file__}:{line}" in str(caught.value)
    assert "stop_gradient" in str(caught.value)
    assert "rules=hesscale_jax.RULES | {'cholesky': rule}" in str(caught.value)
    assert "hesscale_jax.rules.dense" in str(caught.value)


def test_unsupported_primitive_off_the_path_is_evaluated():
    def fun(p, x):
        return jnp.sum(p**2 * jnp.abs(jnp.fft.fft(x)))

    x = normal(4, seed=1)
    assert_trees_close(hs.hesscale(fun)(normal(4), x)[1], 2 * jnp.abs(jnp.fft.fft(x)))
