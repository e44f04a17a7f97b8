"""Regions: exact ones against dense algebra, sampled ones in expectation and key by key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_solve
from jax.sharding import AxisType, PartitionSpec

import hesscale_jax as hs

KEYS = jax.random.split(jax.random.key(0), 8)
X, Y = jax.random.normal(KEYS[0], (6, 3)), jax.random.normal(KEYS[1], (6, 2))
PARAMS = {
    "in": jax.random.normal(KEYS[2], (3, 4)),
    "mid": jax.random.normal(KEYS[3], (4, 5)) / 2,
    "out": jax.random.normal(KEYS[4], (5, 2)),
}


def hidden(params, x):
    return jnp.tanh(jnp.tanh(x @ params["in"]) @ params["mid"])


def model(params, x):
    return hidden(params, x) @ params["out"]


def loss(params, x=X, y=Y):
    return jnp.mean((model(params, x) - y) ** 2)


def exact_diagonal(fun, params):
    flat, unravel = ravel_pytree(params)
    return jnp.diagonal(jax.jit(jax.hessian(lambda p: fun(unravel(p))))(flat))


def diagonal(fun, params, **options):
    return ravel_pytree(jax.jit(hs.hesscale(fun, **options))(params)[1])[0]


def assert_exact(fun, params, region):
    """Off before, and then the Hessian's diagonal; the gradient is that of JAX."""
    expected = exact_diagonal(fun, params)
    size = jnp.abs(expected).sum()
    assert jnp.abs(diagonal(fun, params) - expected).sum() > 0.05 * size
    received = jax.jit(hs.hesscale(region))(params)
    grad, hess_diag = (ravel_pytree(x)[0] for x in received)
    # 1e-10: linear solves amplify rounding.
    np.testing.assert_allclose(hess_diag, expected, rtol=1e-10, atol=1e-12 * size)
    expected, _ = ravel_pytree(jax.jit(jax.grad(fun))(params))
    np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-13)


def test_a_whole_loss_is_the_hessians_diagonal():
    assert_exact(loss, PARAMS, hs.exact(loss))


def of_each(function):
    """The loss by examples, each of which the function computes."""
    each = jax.vmap(function, (None, 0, 0))
    return lambda params: jnp.mean(each(params, X, Y))


def in_a_loop(function):
    return lambda params: jnp.mean(lax.map(lambda xy: function(params, *xy), (X, Y)))


def one_by_one(function):
    return lambda params: sum(function(params, x, y) for x, y in zip(X, Y, strict=True)) / len(X)


def sharded(function):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("d")

    def of_device(params, x, y):
        return lax.pmean(jnp.mean(jax.vmap(function, (None, 0, 0))(params, x, y)), "d")

    mapped = jax.shard_map(
        of_device, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=PartitionSpec()
    )
    return lambda params: mapped(params, X, Y)


PLACES = {
    "vmap": of_each,
    "map": in_a_loop,
    "one by one": one_by_one,
    "shard_map": sharded,
    "jit": lambda f: of_each(jax.jit(f)),
    "checkpoint": lambda f: of_each(jax.checkpoint(f)),
    "map in checkpoint": lambda f: jax.checkpoint(in_a_loop(f)),
    "cond": lambda f: of_each(lambda p, x, y: lax.cond(x[0] > 0, f, f, p, x, y)),
    "vmap of vmap": lambda f: of_each(
        lambda p, x, y: jax.vmap(f, (None, 1, None))(p, x[:, None], y)[0]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_is_one_step_wherever_it_stands(place):
    received = diagonal(PLACES[place](hs.exact(loss)), PARAMS)
    np.testing.assert_allclose(received, exact_diagonal(loss, PARAMS), rtol=1e-10, atol=1e-12)


def test_parameters_that_it_closes_over_are_arguments():
    def closing(params):
        return jnp.mean((hs.exact(lambda x: model(params, x))(X) - Y) ** 2)

    # The loss is quadratic in the model, so that a step less is exact.
    np.testing.assert_allclose(
        diagonal(closing, PARAMS), exact_diagonal(loss, PARAMS), rtol=1e-10, atol=1e-12
    )


def test_arguments_and_results_are_trees():
    @hs.exact
    def split(params, *, data, shift):
        h = hidden(params, data["x"])
        return {"top": jnp.sin(h @ params["out"]), "count": jnp.argmax(h), "none": None}, shift

    def of_tree(params):
        results, shift = split(params, data={"x": X[0]}, shift=2.0)
        assert results["count"].dtype == int
        return jnp.sum(results["top"]) * shift

    expected = exact_diagonal(lambda p: 2 * jnp.sum(jnp.sin(model(p, X[0]))), PARAMS)
    np.testing.assert_allclose(diagonal(of_tree, PARAMS), expected, rtol=1e-10, atol=1e-12)


def test_is_the_function_itself_to_other_transformations():
    region = hs.exact(loss)
    np.testing.assert_allclose(region(PARAMS), loss(PARAMS), rtol=1e-12)
    flat, unravel = ravel_pytree(PARAMS)
    received, expected = (
        jax.jit(jax.hessian(lambda p, f=f: f(unravel(p))))(flat) for f in (region, loss)
    )
    np.testing.assert_allclose(received, expected, rtol=1e-12, atol=1e-13)


def test_derivatives_of_the_diagonal():
    def trace(params):
        _, diagonals = hs.hesscale(hs.exact(loss))(params)
        return sum(map(jnp.sum, jax.tree.leaves(diagonals)))

    flat, unravel = ravel_pytree(PARAMS)
    expected = jax.jit(jax.grad(lambda p: jnp.trace(jax.hessian(lambda p: loss(unravel(p)))(p))))(
        flat
    )
    received, _ = ravel_pytree(jax.jit(jax.grad(trace))(PARAMS))
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-11)


# What no rule for one equation is right for


def test_the_marginal_likelihood_of_a_gaussian_process():
    x = X[:, :2]

    def nll(p):
        squares = jnp.sum(((x[:, None] - x[None]) / jnp.exp(p["scale"])) ** 2, -1)
        k = jnp.exp(2 * p["size"] - squares / 2) + jnp.exp(2 * p["noise"]) * jnp.eye(len(x))
        factor = jnp.linalg.cholesky(k)
        alpha = cho_solve((factor, True), Y[:, 0])
        return Y[:, 0] @ alpha / 2 + jnp.log(jnp.diagonal(factor)).sum()

    params = {"scale": jnp.zeros((1, 1, 2)), "size": jnp.array(0.1), "noise": jnp.array(-1.0)}
    assert_exact(nll, params, hs.exact(nll))


def test_info_nce():
    def head(a, b):
        a, b = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
        scores = a @ b.T / 0.2
        both = jnp.diagonal(jax.nn.log_softmax(scores, 1) + jax.nn.log_softmax(scores, 0))
        return -jnp.mean(both)

    params = (jax.random.normal(KEYS[5], (6, 4)), jax.random.normal(KEYS[6], (6, 4)))
    assert_exact(lambda p: head(*p), params, lambda p: hs.exact(head)(*p))


def test_a_layer_of_attention():
    params = dict(zip("qkvo", jax.random.normal(KEYS[5], (4, 3, 3)), strict=True))
    x, y = jax.random.normal(KEYS[6], (2, 4, 5, 3))

    def attention(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        return jax.nn.softmax(q @ k.T / 3**0.5) @ v @ p["o"]

    def regression(layer):
        return lambda p: jnp.mean((jax.vmap(layer, (None, 0))(p, x) - y) ** 2)

    assert_exact(regression(attention), params, regression(hs.exact(attention)))


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


@jax.custom_vjp
def same(x):
    return x


same.defvjp(lambda x: (x, None), lambda _, g: (g,))


@jax.custom_vjp
def fourth(x):
    return x**4


# Its backward pass is of functions without a forward derivative.
fourth.defvjp(lambda x: (x**4, x), lambda x, g: (4 * cubed(x) * same(g),))


def test_functions_without_a_forward_derivative():
    def of(cube, region=lambda f: f):
        step = region(lambda w: jnp.tanh(jnp.sum(cube(jnp.outer(w, w)), 0)))
        return lambda w: jnp.sum(step(w) * jnp.arange(3.0))

    w = X[0]
    for custom, plain in ((cubed, lambda x: x**3), (fourth, lambda x: x**4)):
        received = diagonal(of(custom, hs.exact), w)
        np.testing.assert_allclose(received, exact_diagonal(of(plain), w), rtol=1e-10)
        received, expected = (diagonal(of(f, hs.sampled), w) for f in (custom, plain))
        np.testing.assert_allclose(received, expected, rtol=1e-10)


def test_a_differential_equation_which_jax_differentiates_twice():
    def loss(d):
        times = jnp.linspace(0.0, 1.0, 3)
        return jnp.sum(odeint(lambda y, t, d: jnp.sin(y * d), jnp.ones(3), times, d)[-1] ** 2)

    d = jnp.array([0.3, -0.5, 0.8])
    expected = jnp.diagonal(jax.jacrev(jax.grad(loss))(d))
    for region in (hs.exact, hs.sampled):  # Without mixed derivatives, signs do not matter.
        received = diagonal(region(loss), d)
        np.testing.assert_allclose(received, expected, rtol=1e-6)  # of the solver


@pytest.mark.parametrize(
    ("power", "region", "curvature"),
    [
        (cubed, hs.exact, "hessian"),
        (fourth, hs.sampled, "hessian"),
        (fourth, hs.exact, "gauss_newton"),
        (lambda x: x**3, hs.sampled, "gauss_newton"),
    ],
)
def test_regions_of_what_varies_by_device(power, region, curvature):
    @jax.jit
    def of_device(w, x):
        step = region(lambda w: jnp.sum(power(jnp.outer(w, w)), 0)[:2])
        return hs.hesscale(lambda w: jnp.sum(step(w) ** 2 * x), curvature=curvature)(w)[1]

    def varying(w, x):
        return lax.pmean(of_device(lax.pcast(w, "d", to="varying"), x), "d")

    mesh, split = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec("d")
    specs = {"in_specs": (PartitionSpec(), split), "out_specs": PartitionSpec()}
    received = jax.jit(jax.shard_map(varying, mesh=mesh, **specs))(X[0], jnp.arange(1.0, 5.0))
    halves = [of_device(X[0], jnp.arange(i, i + 2)) for i in (1.0, 3.0)]
    np.testing.assert_allclose(received, sum(halves) / 2, rtol=1e-10)


def test_gauss_newton_takes_it_as_of_the_model():
    def with_region(params):
        return jnp.mean((jax.vmap(hs.exact(model), (None, 0))(params, X) - Y) ** 2)

    flat, unravel = ravel_pytree(PARAMS)
    jacobian = jax.jacobian(lambda p: model(unravel(p), X).ravel())(flat)
    expected = 2 * jnp.mean(jacobian**2, axis=0)
    received = diagonal(with_region, PARAMS, curvature="gauss_newton")
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-12)


# Random signs


def mean_of_keys(fun, count):
    """The mean over keys, and its standard error."""
    draws = jax.jit(
        lambda keys: lax.map(
            lambda key: ravel_pytree(hs.hesscale(lambda p: fun(p, key))(PARAMS)[1])[0],
            keys,
            batch_size=500,
        )
    )(jax.random.split(KEYS[7], count))
    return draws.mean(0), draws.std(0) / count**0.5


def assert_unbiased(fun, expected, count=4000):
    mean, error = mean_of_keys(fun, count)
    # Of some 40 entries, one is 5 standard errors off in 1 of 40 000 draws of all keys.
    assert (jnp.abs(mean - expected) < 5 * error + 1e-9).all()
    assert jnp.linalg.norm(error) < 0.3 * jnp.linalg.norm(expected)


def test_a_whole_loss_is_hutchinsons_estimate():
    flat, unravel = ravel_pytree(PARAMS)
    hessian = jax.hessian(lambda p: loss(unravel(p)))(flat)
    assert_unbiased(lambda p, key: hs.sampled(loss, key=key)(p), jnp.diagonal(hessian))
    # Each is z * (H z) for some signs: so is its product with them.
    entry = hs.hesscale(hs.sampled(lambda x: jnp.sin(x[0] * x[1]), seed=3))(X[0][:2])[1]
    h = jax.hessian(lambda x: jnp.sin(x[0] * x[1]))(X[0][:2])
    both = [jnp.stack([h[0, 0] + s * h[0, 1], h[1, 1] + s * h[0, 1]]) for s in (1, -1)]
    assert min(jnp.abs(entry - b).max() for b in both) < 1e-12


def layered(layer):
    """Two regions one after the other, of the same shape and on the same key, over a batch."""
    square = jnp.tril(jnp.ones((4, 4))) / 2

    def loss(params, key):
        def of_example(x, y):
            h = layer(lambda w, h: jnp.tanh(h @ w), key)(params["in"], x)
            h = layer(lambda w, h: jnp.tanh(h @ w), key)(params["mid"][:, :4] * square, h)
            h = layer(lambda w, h: jnp.tanh(h @ w), key)(params["mid"][:, :4] * square, h)
            return jnp.mean((h @ params["out"][:4] - y) ** 2)

        return jnp.mean(jax.vmap(of_example)(X, Y))

    return loss


def test_regions_do_not_share_their_signs():
    exact = layered(lambda f, key: hs.exact(f))
    expected = diagonal(lambda p: exact(p, None), PARAMS)
    assert_unbiased(layered(lambda f, key: hs.sampled(f, key=key)), expected)


def test_steps_of_a_loop_have_keys_of_their_own():
    weights = jnp.stack([PARAMS["mid"][:, :4], PARAMS["mid"][:, 1:]])

    def looped(region):
        def step(h, weight_and_key):
            weight, key = weight_and_key
            return region(key)(lambda w, h: jnp.tanh(h @ w))(weight, h), None

        def fun(weights, keys):
            h, _ = lax.scan(step, X[:4, 0], (weights, keys))
            return jnp.sum(h**2)

        return fun

    exact, sampled, shared = (
        looped(lambda key: hs.exact),
        looped(lambda key: functools.partial(hs.sampled, key=key)),
        looped(lambda key: hs.sampled),
    )
    two_keys = jax.vmap(jax.random.split)(jax.random.split(KEYS[1], 4000))
    _, expected = hs.hesscale(exact)(weights, two_keys[0])
    draws = jax.jit(jax.vmap(lambda keys: hs.hesscale(sampled)(weights, keys)[1]))(two_keys)
    error = draws.std(0) / len(draws) ** 0.5
    assert (jnp.abs(draws.mean(0) - expected) < 5 * error + 1e-9).all()
    with pytest.raises(ValueError, match="the same signs at each step of a loop"):
        hs.hesscale(shared)(weights, two_keys[0])


def test_signs_follow_from_the_seed():
    def of(**how):
        return diagonal(hs.sampled(lambda x: jnp.sin(jnp.prod(x)), **how), X)

    np.testing.assert_array_equal(of(), of(seed=0))
    assert not np.allclose(of(), of(seed=1))
    assert not np.allclose(of(), of(key=jax.random.key(0)))
    assert not np.allclose(of(key=jax.random.key(0)), of(key=jax.random.key(1)))
    exact = diagonal(hs.exact(lambda x: jnp.sin(jnp.prod(x))), X)
    one, many = (jnp.linalg.norm(of(samples=n, seed=5) - exact) for n in (1, 900))
    assert many < one / 10  # 30 in the mean


def test_the_gradient_is_not_sampled():
    grad, _ = jax.jit(hs.hesscale(hs.sampled(loss)))(PARAMS)
    jax.tree.map(np.testing.assert_allclose, grad, jax.grad(loss)(PARAMS))


@pytest.mark.parametrize("cast", ["outside", "inside"])
@pytest.mark.parametrize("samples", [1, 3])
def test_estimates_keep_the_range_of_float32_in_a_model_in_float16(cast, samples):
    x, w = X.astype(jnp.float16), PARAMS["in"].astype(jnp.float32)

    def layer(w):
        return jnp.tanh(x @ w)

    def scaled(scale):
        def loss(w):
            if cast == "inside":
                region = hs.sampled(lambda w: layer(w.astype(x.dtype)), samples=samples)
                y = region(w)
            else:
                y = hs.sampled(layer, samples=samples)(w.astype(x.dtype))
            return scale * jnp.sum(jnp.sum(y.astype(jnp.float32), 1) ** 2)

        return hs.hesscale(loss, curvature="gauss_newton")(w)[1] / scale

    expected = scaled(1.0)
    assert jnp.abs(expected).min() > 0
    for scale in (1e-9, 1e-6, 1e6):
        np.testing.assert_allclose(scaled(scale), expected, rtol=1e-5)  # in float32


def test_decorators_with_arguments():
    @hs.exact(max_entries=42)
    def exact(params):
        return loss(params)

    @hs.sampled(samples=2, seed=1)
    def sampled(params):
        return loss(params)

    assert exact.__name__ == "exact"
    np.testing.assert_array_equal(diagonal(exact, PARAMS), diagonal(hs.exact(loss), PARAMS))
    expected = diagonal(hs.sampled(loss, samples=2, seed=1), PARAMS)
    np.testing.assert_array_equal(diagonal(sampled, PARAMS), expected)
    with pytest.raises(ValueError, match="more than 41"):
        hs.hesscale(hs.exact(max_entries=41)(loss))(PARAMS)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_both_kinds_and_traced(make):
    def of(key):
        return hs.hesscale(hs.sampled(loss, key=key))(PARAMS)[1]["in"]

    np.testing.assert_allclose(jax.jit(of)(make(1)), of(make(1)), rtol=1e-12)
    assert not np.allclose(of(make(1)), of(make(2)))


# What is reported


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"1 x 42 numbers, more than 5\..*max_entries="):
        hs.hesscale(hs.exact(loss, max_entries=5))(PARAMS)
    with pytest.raises(TypeError, match=r"has effects, .*Take prints"):
        hs.exact(lambda x: jax.debug.print("{}", x))(X)
    with pytest.raises(TypeError, match="collectives"):
        jax.vmap(hs.exact(lambda x: lax.psum(x, "examples")), axis_name="examples")(X)
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        hs.sampled(loss, samples=0)
    for mistake in (
        lambda: hs.exact(loss, max_entries=None),
        lambda: hs.sampled(loss, samples=2.0),
        lambda: hs.sampled(loss, seed=jax.random.key(0)),
    ):
        with pytest.raises(TypeError, match="must be an integer, got "):
            mistake()
    for key in (0, jax.random.split(KEYS[0]), jnp.ones(2)):
        with pytest.raises(TypeError, match=r"key must be one key, as jax\.random\.key\(0\)"):
            hs.sampled(loss, key=key)
    fourier = hs.exact(jnp.fft.fft)
    with pytest.raises(NotImplementedError, match="complex results"):
        hs.hesscale(lambda x: jnp.sum(jnp.abs(fourier(x))))(X)
    named = hs.exact(lambda p: jnp.sum(checkpoint_name(model(p, X), "model_output") ** 2))
    hs.hesscale(named)(PARAMS)
    with pytest.raises(ValueError, match="Name the output outside"):
        hs.hesscale(named, curvature="gauss_newton")(PARAMS)


def test_a_whole_loss_is_shown_at_its_own_line():
    report = str(hs.explain(hs.exact(loss))(PARAMS))
    assert "test_regions.py" in report
    assert "transform.py" not in report
    with pytest.raises(ValueError, match=r"used at \S*test_regions.py:\d+ \(hidden\)"):
        hs.hesscale(hs.exact(loss, max_entries=5))(PARAMS)
    norm = jax.custom_vjp(lambda x: jnp.sum(x**2))
    norm.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, g: (2 * g * x,))
    assert "test_regions.py" in str(hs.explain(norm)(X))


def test_explain_names_it_and_points_to_it():
    step, *_ = hs.explain(hs.exact(loss))(PARAMS).steps
    assert (step.rule, step.primitives) == ("exact", ("region[loss]",))
    step, *_ = hs.explain(hs.sampled(loss))(PARAMS).steps
    assert step.rule == "sampled"

    def chain(x):
        return jnp.log(jnp.linalg.det(x @ x.T + jnp.eye(6)))

    assert "hesscale_jax.exact" in str(hs.explain(chain)(X))
    assert "hesscale_jax.exact" not in str(hs.explain(hs.exact(chain))(X))
