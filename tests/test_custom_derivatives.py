"""Functions with their own derivatives: the rule's gradient, and the curvature of the body."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, normal, normalised
from jax import lax, nn
from jax.experimental import pallas
from jax.experimental.ode import odeint

import hesscale_jax as hs

X, W = normal(4, 6), normal(6, 3, seed=1)


def with_vjp(fun):
    """``fun``, with its own derivative in other words."""

    @jax.custom_vjp
    def wrapped(*args):
        return fun(*args)

    def backward(args, cotangent):
        return jax.vjp(fun, *args)[1](cotangent)

    wrapped.defvjp(lambda *args: (fun(*args), args), backward)
    return wrapped


def with_jvp(fun):
    """The same by a forward rule."""
    wrapped = jax.custom_jvp(lambda *args: fun(*args))
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fun, primals, tangents))
    return wrapped


every_wrapper = pytest.mark.parametrize("wrap", [with_vjp, with_jvp])


@every_wrapper
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("where", ["layer", "norm", "loss"])
def test_equals_the_function_without_its_own_rule(wrap, curvature, where):
    def loss(w, x, wrapped):
        norm = wrapped(functools.partial(normalised, axes=-1)) if where == "norm" else norms
        layer = wrapped(dense) if where == "layer" else dense
        top = wrapped(squares) if where == "loss" else squares
        return top(layer(norm(layer(x, w)), w[:3]))

    def norms(x):
        return normalised(x, -1)

    def dense(x, w):
        return nn.silu(x @ w)

    def squares(x):
        return (x**2).mean()

    received = jax.jit(hs.hesscale(lambda w: loss(w, X, wrap), curvature=curvature))(W)
    expected = jax.jit(hs.hesscale(lambda w: loss(w, X, lambda f: f), curvature=curvature))(W)
    assert_close(received, expected)


@every_wrapper
def test_several_results_and_integer_operands(wrap):
    def fun(x, index, w):
        picked = jnp.take(x @ w, index, axis=1)
        return jnp.sin(picked).sum(1), index + 1, jnp.cumsum(x, 0)

    def loss(f):
        def of(x, w):
            a, index, b = f(x, np.array([0, 2]), w)
            return (a**2).sum() + b.sum() * index.sum().astype(b.dtype)

        return of

    received = hs.hesscale(loss(wrap(fun)), (0, 1))(X, W)
    assert_close(received, hs.hesscale(loss(fun), (0, 1))(X, W))


def test_the_gradient_is_the_rules():
    """Clipped on the way back; the curvature is that of the identity it computes."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def clipped(x, limit):
        return x

    clipped.defvjp(lambda x, limit: (x, None), lambda limit, _, g: (jnp.clip(g, -limit, limit),))

    def loss(x, clip):
        return (clip(jnp.sin(x)) ** 3).sum()

    grad, hess_diag = hs.hesscale(lambda x: loss(x, lambda y: clipped(y, 0.1)))(X)
    assert_close(grad, jax.grad(lambda x: loss(x, lambda y: clipped(y, 0.1)))(X))
    # The gradient that meets sin's curvature is the clipped one.
    s, c = jnp.sin(X), jnp.cos(X)
    assert_close(hess_diag, 6 * s * c**2 - s * jnp.clip(3 * s**2, -0.1, 0.1))


def with_rule(fun, backward):
    """``fun`` of one array, with ``backward(x, g)`` for its derivative."""

    @jax.custom_vjp
    def wrapped(x):
        return fun(x)

    wrapped.defvjp(lambda x: (fun(x), x), lambda x, g: (backward(x, g),))
    return wrapped


def through(fun):
    """``fun`` with the derivative of the identity, without a rule of its own."""
    return lambda x: x + lax.stop_gradient(fun(x) - x)


def quantised(x):
    scale = jnp.max(jnp.abs(x)) / 7
    return jnp.round(x / scale) * scale


@pytest.mark.parametrize("fun", [jnp.round, jnp.sign, jnp.floor, quantised])
def test_straight_through(fun):
    """The body has no derivative: the rule's Jacobian is taken as linear."""
    ste = with_rule(fun, lambda x, g: g)
    received = hs.hesscale(lambda w: (jnp.tanh(ste(X @ w)) ** 2).mean())(W)
    assert_close(received, hs.hesscale(lambda w: (jnp.tanh(through(fun)(X @ w)) ** 2).mean())(W))


def test_a_surrogate_of_a_step():
    spike = with_rule(lambda x: (x > 0).astype(x.dtype), lambda x, g: g / (1 + jnp.abs(x)) ** 2)
    _, hess_diag = hs.hesscale(lambda x: ((spike(2 * x) - 0.3) ** 2).sum())(X)
    assert_close(hess_diag, 8 / (1 + jnp.abs(2 * X)) ** 4)


def test_a_product_of_rounded_factors():
    @jax.custom_vjp
    def product(x, w):
        return jnp.round(4 * x) @ jnp.round(4 * w) / 16

    product.defvjp(
        lambda x, w: (product(x, w), (jnp.round(4 * x) / 4, jnp.round(4 * w) / 4)),
        lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
    )

    def loss(w):
        return (jnp.tanh(product(X, w)) ** 2).mean()

    def by_hand(shift):
        """The same, in the weights' displacement: the rule is linear in it."""
        return (jnp.tanh(product(X, W) + jnp.round(4 * X) / 4 @ shift) ** 2).mean()

    received = jax.jit(hs.hesscale(loss))(W)
    assert_close(received, hs.hesscale(by_hand)(jnp.zeros_like(W)))
    mapped = jax.vmap(hs.hesscale(loss))(jnp.stack([W, W]))
    assert_close(jax.tree.map(lambda x: x[1], mapped), received)


def test_a_choice_loses_nothing():
    """The comparison only chooses: the curvature is that of the body."""
    hinge = with_rule(
        lambda x: jnp.where(x > 0, x**3, 0.0), lambda x, g: jnp.where(x > 0, g * 3 * x**2, 0.0)
    )
    received = hs.hesscale(lambda x: (hinge(x) ** 2).sum())(X)
    assert_close(received, hs.hesscale(lambda x: (jnp.where(x > 0, x**3, 0.0) ** 2).sum())(X))


def test_an_iteration_until_convergence():
    """The body is a loop of unknown length, the backward pass one entry by entry."""
    root = with_rule(
        lambda a: lax.while_loop(
            lambda x: jnp.any(jnp.abs(x * x - a) > 1e-12),
            lambda x: (x + a / x) / 2,
            jnp.ones_like(a),
        ),
        lambda a, g: g / (2 * jnp.sqrt(a)),
    )
    a = 0.5 + X**2
    grad, hess_diag = jax.jit(hs.hesscale(lambda a: (root(a) ** 3).sum()))(a)
    assert_close(grad, 1.5 * jnp.sqrt(a))
    assert_close(hess_diag, 0.75 / jnp.sqrt(a))


def test_an_adjoint_that_is_a_loop_of_which_one_result_is_read():
    def halved(x):
        """Down to less than 1, by a loop; the same for a cotangent, as often."""
        return lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] / 2, c[1] + 1), (x, 0))[0]

    @jax.custom_vjp
    def both(x):
        return x * halved(jnp.ones_like(x)), 2 * halved(x)

    both.defvjp(lambda x: (both(x), None), lambda _, g: (halved(g[0]) + 2 * halved(g[1]),))
    grad, hess_diag = hs.hesscale(lambda x: (both(x)[1] ** 2).sum())(X)
    assert_close(grad, X / 8)
    assert_close(hess_diag, jnp.full_like(X, 1 / 8))


def test_an_adjoint_that_is_a_loop_too():
    """Signs stand for the squares: without bias, here against the dense Jacobian."""
    matrix = jnp.eye(4) + normal(4, 4, seed=3) / 10

    def solve(b, matrix):
        def step(x):
            return x + 0.5 * (b - matrix @ x)

        return lax.while_loop(lambda x: jnp.any(jnp.abs(b - matrix @ x) > 1e-13), step, b)

    solved = with_rule(lambda b: solve(b, matrix), lambda b, g: solve(g, matrix.T))
    b, of_each = normal(4), normal(4, seed=5)

    def loss(b):
        return (of_each * solved(b) ** 2).sum()

    grad, hess_diag = hs.hesscale(loss)(b)
    assert_close(grad, jax.grad(loss)(b))
    expected = 2 * (jnp.linalg.inv(matrix) ** 2).T @ of_each
    # Off the diagonal of the inverse there is a tenth of it, of either sign.
    np.testing.assert_allclose(hess_diag, expected, atol=0.5 * np.abs(of_each).max())


def test_several_results_entry_by_entry():
    """Each result by itself, so that a block knows how they vary together."""

    @jax.custom_jvp
    def both(x):
        return jnp.round(jnp.sin(x), 12), jnp.cos(x), jnp.round(x).astype(int)

    @both.defjvp
    def both_jvp(primals, tangents):
        (x,), (t,) = primals, tangents
        return both(x), (jnp.cos(x) * t, -jnp.sin(x) * t, np.zeros(x.shape, jax.dtypes.float0))

    def loss(x):
        sine, cosine, _ = both(x)
        return (sine * cosine + sine**2).sum()

    received = hs.hesscale(loss)(X)
    assert_close(received[1], -2 * jnp.sin(2 * X) + 2 * jnp.cos(2 * X))


def test_operands_of_other_shapes():
    """Entry by entry in one operand; the other, of the same rank, is not read."""
    act = with_jvp(lambda x, unused: jnp.tanh(x))

    def loss(x, w):
        return (act(x[1:], w) ** 2).sum() + (w**2).sum()

    received = hs.hesscale(loss, (0, 1))(X, W)
    expected = hs.hesscale(lambda x, w: (jnp.tanh(x[1:]) ** 2).sum() + (w**2).sum(), (0, 1))(X, W)
    assert_close(received, expected)


def test_in_loops_and_under_transformations():
    norm = with_vjp(lambda x: normalised(x, -1))

    def loss(w, norm):
        def step(x, w):
            return jax.checkpoint(lambda x: x + norm(nn.tanh(x @ w)))(x), None

        return (lax.scan(step, X, w)[0] @ W).var()

    w = normal(3, 6, 6, seed=2) / 2
    received = jax.jit(hs.hesscale(lambda w: loss(w, norm)))(w)
    assert_close(received, jax.jit(hs.hesscale(lambda w: loss(w, lambda x: normalised(x, -1))))(w))
    mapped = jax.vmap(hs.hesscale(lambda w: loss(w, norm)))(jnp.stack([w, 2 * w]))
    assert_close(jax.tree.map(lambda x: x[0], mapped), received)


# Kernels


def doubled_sine(x):
    def kernel(x, y):
        y[...] = 2 * jnp.sin(x[...])

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(kernel, shape, interpret=True)(x)


@jax.custom_vjp
def sine_kernel(x, n):
    return doubled_sine(x) * n


sine_kernel.defvjp(
    lambda x, n: (sine_kernel(x, n), (x, n)),
    lambda res, g: (2 * jnp.cos(res[0]) * res[1] * g, None),
)


def kernel_loss(w):
    return (sine_kernel(X @ w, 3) ** 2).mean()


def test_a_kernel_says_how_to_pass_a_rule():
    with pytest.raises(hs.UnsupportedPrimitiveError) as caught:
        hs.hesscale(kernel_loss)(W)
    message = str(caught.value)
    assert "'pallas_call'" in message
    assert "test_custom_derivatives.py" in message
    assert "{'custom_vjp_call[sine_kernel]': hesscale_jax.rules.defined_by(function)}" in message
    assert caught.value.primitive == "pallas_call"


def test_a_kernel_with_the_same_function_in_jax():
    rules = hs.RULES | {
        "custom_vjp_call[sine_kernel]": hs.rules.defined_by(lambda x, n: 2 * jnp.sin(x) * n)
    }
    received = jax.jit(hs.hesscale(kernel_loss, rules=rules))(W)
    assert_close(received[0], jax.grad(kernel_loss)(W))
    assert_close(received, hs.hesscale(lambda w: ((6 * jnp.sin(X @ w)) ** 2).mean())(W))


def test_a_kernel_with_a_rule_by_hand():
    def sine_rule(eqn, operands, recurse):
        """``dy = 2 n (cos(x) dx - sin(x) vx), vy = (2 n cos(x))^2 vx``."""
        x, n = operands
        y = sine_kernel(x.primal, n.primal)
        slope = 2 * n.primal * jnp.cos(x.primal)
        return [hs.Moments(y, slope * x.shift - y * x.spread, slope**2 * x.spread)]

    rules = hs.RULES | {"custom_vjp_call[sine_kernel]": sine_rule}
    assert_close(
        hs.hesscale(kernel_loss, rules=rules)(W),
        hs.hesscale(lambda w: ((6 * jnp.sin(X @ w)) ** 2).mean())(W),
    )


def test_a_label_is_not_a_primitive():
    """A function of the user's that is called as a primitive does not take that one's rule."""

    def raising(eqn, operands, recurse):
        raise AssertionError

    @jax.custom_vjp
    def tanh(x):
        return jnp.sin(x[::-1])

    tanh.defvjp(lambda x: (jnp.sin(x[::-1]), x), lambda x, g: (jnp.cos(x) * g[::-1],))

    def loss(x):
        return (tanh(x) ** 2).sum()

    rules = hs.RULES | {"tanh": raising, "custom_vjp_call[other]": raising}
    assert_close(hs.hesscale(loss, rules=rules)(X)[1], 2 * jnp.cos(2 * X))


def straight_through(fun):
    """``fun`` without a derivative in its body, with that of ``3 x``."""
    wrapped = jax.custom_vjp(lambda x: jnp.round(fun(x)))
    wrapped.defvjp(lambda x: (jnp.round(fun(x)), None), lambda _, g: (3 * g,))
    return wrapped


@pytest.mark.parametrize("wrap", [with_vjp, with_jvp, straight_through])
@pytest.mark.parametrize(
    "within",
    [
        jax.checkpoint,
        lambda f: lambda x: lax.cond(x.sum() > 9, lambda x: x, f, x),
        lambda f: lambda x: lax.scan(lambda c, t: (f(c) * t, f(c)), x, jnp.arange(2.0))[1].sum(0),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum(0),
        lambda f: with_vjp(lambda x: lax.fori_loop(0, 2, lambda i, c: f(c), x)),
    ],
    ids=["checkpoint", "cond", "scan", "vmap", "custom_vjp"],
)
def test_a_function_may_close_over_arrays(wrap, within):
    c = jnp.array([0.3, 2.0, 1.0])
    f = within(wrap(lambda x: c * jnp.sin(jnp.outer(c, c) @ x)))

    def loss(x):
        return jnp.sum(f(x) ** 2)

    x = normal(3)
    grad, hess_diag = jax.jit(hs.hesscale(loss))(x)
    assert_close(grad, jax.grad(loss)(x))
    assert np.isfinite(hess_diag).all()
    assert np.abs(hess_diag).min() > 0


@every_wrapper
def test_a_table_that_a_function_closes_over(wrap):
    # Between the steps of a loop over an unknown table nothing would be known of the powers.
    c = jnp.array([0.3, 0.7, -0.4, 1.1])

    def ratio(x):
        return jnp.polyval(c, jnp.sin(x)) / jnp.polyval(c + 1, jnp.sin(x))

    slope = jax.grad(lambda x: ratio(x).sum())
    plain = hs.hesscale(lambda x: (slope(x) ** 2).sum())(normal(3))[1]
    assert_close(hs.hesscale(lambda x: (wrap(slope)(x) ** 2).sum())(normal(3))[1], plain)


def test_a_power_of_two_is_entry_by_entry():
    # A primitive with types of its own in newer versions of JAX.
    def loss(x):
        return jnp.sum(jnp.sin(jnp.ldexp(x, jnp.array([1, 0, -2]))) ** 2)

    x = normal(3)
    assert_close(hs.hesscale(loss)(x), (jax.grad(loss)(x), jnp.diag(jax.hessian(loss)(x))))


def test_several_results_asked_for_twice():
    def loss(x):
        return jnp.sum(jnp.ldexp(x, 1) * jnp.sin(jnp.ldexp(x, 1)))

    x = normal(3)
    assert_close(hs.hesscale(loss)(x), (jax.grad(loss)(x), jnp.diag(jax.hessian(loss)(x))))


def test_a_backward_pass_that_calls_the_function_itself():
    # An ODE solver's: the squares are an estimate by random signs, of one result exact.
    def loss(w):
        y = odeint(lambda y, t, w: -jnp.sum(w) * y, jnp.ones(1), jnp.array([0.0, 1.0]), w)
        return jnp.sum(y[1]) ** 2

    w = jnp.array([0.4, 0.7])
    grad, hess_diag = jax.jit(hs.hesscale(loss))(w)
    assert_close(grad, jax.grad(loss)(w))
    solution = np.exp(-w.sum())
    # Of y^2 with y = exp(-sum(w)); the solver's tolerance is 1.4e-8.
    np.testing.assert_allclose(hess_diag, 4 * solution**2 * np.ones(2), rtol=1e-5)


@jax.custom_vjp
def square_root(a):
    """By Newton's method, all entries at once."""
    return lax.while_loop(
        lambda x: jnp.any(jnp.abs(x * x - a) > 1e-13), lambda x: 0.5 * (x + a / x), a
    )


square_root.defvjp(
    lambda a: ((x := square_root(a)), x),
    lambda x, g: (g / (2 * x),),
)


@jax.custom_vjp
def fixed_point(b):
    """The ``z`` of ``z = tanh(A z + b)``."""
    start = jnp.zeros_like(b)
    return lax.while_loop(lambda z: jnp.any(jnp.abs(moved(z, b) - z) > 1e-14), moved_by(b), start)


def moved(z, b):
    n = len(b)
    return jnp.tanh(0.5 / n * jnp.cos(jnp.arange(1.0 * n * n)).reshape(n, n) @ z + b)


def moved_by(b):
    return lambda z: moved(z, b)


def fixed_point_backward(saved, g):
    z, b = saved
    jacobian = jax.jacrev(moved)(z, b)
    return (jnp.linalg.solve(jnp.eye(len(z)) - jacobian.T, g) * (1 - z**2),)


fixed_point.defvjp(lambda b: ((z := fixed_point(b)), (z, b)), fixed_point_backward)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a: square_root(a[0]),
        lambda a: jnp.sum(jnp.sin(square_root(jnp.exp(a)))),
        lambda a: jnp.sum(jnp.sin(jax.vmap(square_root)(jnp.exp(a)))),
        lambda a: jnp.sum(jnp.sin(square_root(jnp.exp(jnp.tile(a, 100)))) * jnp.arange(300.0)),
        lambda a: fixed_point(a) @ jnp.arange(3.0),
    ],
    ids=["one", "entries", "vmap", "many entries", "a fixed point"],
)
def test_the_curvature_of_what_iterates_is_that_of_its_rule(loss):
    a = jnp.array([0.3, 0.8, 0.5])
    grad, hess_diag = jax.jit(hs.hesscale(loss))(a)
    assert_close(grad, jax.grad(loss)(a))
    np.testing.assert_allclose(hess_diag, jnp.diag(jax.jacrev(jax.grad(loss))(a)), rtol=1e-8)
    assert "taken as linear" not in str(hs.explain(loss)(a))


def test_what_is_taken_as_linear_is_named():
    def loss(a):
        return jnp.sum(fixed_point(jnp.tile(a, 20)) ** 2)

    a = jnp.array([0.3, 0.8, 0.5])
    assert_close(hs.hesscale(loss)(a)[0], jax.grad(loss)(a))
    for taken in (loss, lambda w: jnp.sum(with_rule(jnp.round, lambda x, g: g)(w) ** 2)):
        assert "taken as linear" in str(hs.explain(taken)(a))


def root_by_newton(fun, start):
    def slope(z):
        return jax.jvp(fun, (z,), (jnp.ones_like(z),))[1]

    def steps(fun, z):
        return lax.fori_loop(0, 30, lambda _, z: z - fun(z) / slope(z), z)

    return lax.custom_root(fun, start, steps, lambda linear, y: y / linear(jnp.ones_like(y)))


def cubic(a, b):
    return root_by_newton(lambda z: z**3 + a * z - b, jnp.ones_like(a))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a: root_by_newton(lambda e: e - a * jnp.sin(e) - 1, jnp.ones_like(a)).sum(),
        lambda a: jnp.sum(jnp.sin(cubic(a, 2.0)) * a),
        lambda a: jnp.sum(jnp.sin(cubic(a, jnp.exp(a)))),
    ],
    ids=["Kepler", "a cubic", "both coefficients"],
)
def test_a_root_varies_with_what_its_solver_closes_over(loss):
    # Its rule has no slope there, though the other slopes vary with it: a derivative in two
    # operands depends on their order.
    for a in (jnp.array(0.3), jnp.array([0.3, 0.8, 0.5])):
        grad, hess_diag = hs.hesscale(loss)(a)
        assert_close(grad, jax.grad(loss)(a))
        if any("call_hi_primitive" in step.primitives for step in hs.explain(loss)(a).steps):
            # As of JAX 0.12 a root is a primitive of whole arrays: each operand counts by itself.
            assert hs.explain(loss)(a).dropped
            continue
        exact = jax.hessian(loss)(a)
        np.testing.assert_allclose(hess_diag, jnp.diag(exact) if a.ndim else exact, rtol=1e-9)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solved(fun, a, start):
    def goes_on(zs):
        return jnp.abs(zs[0] - zs[1]).max() > 1e-12

    return lax.while_loop(goes_on, lambda zs: (zs[1], fun(a, zs[1])), (start, fun(a, start)))[1]


def solved_backward(fun, saved, g):
    a, z = saved
    of_z = jax.vjp(lambda z: fun(a, z), z)[1]
    u = solved(lambda g, u: g + of_z(u)[0], g, g)
    return jax.vjp(lambda a: fun(a, z), a)[1](u)[0], jnp.zeros_like(z)


solved.defvjp(lambda fun, a, start: ((z := solved(fun, a, start)), (a, z)), solved_backward)


def test_a_backward_pass_that_keeps_tracers_is_taken_as_linear():
    # JAX has no second derivative of it: `jax.hessian` raises.
    def loss(w):
        z = solved(lambda a, z: jnp.tanh(0.2 * z @ a[0] + a[1]), (w, normal(3)), jnp.zeros(3))
        return jnp.sum(z**2)

    w = normal(3, 3, seed=1)
    grad, hess_diag = jax.jit(hs.hesscale(loss))(w)
    assert_close(grad, jax.grad(loss)(w))
    assert np.isfinite(hess_diag).all()
    assert np.abs(hess_diag).min() > 0
    assert "taken as linear" in str(hs.explain(loss)(w))


EXPONENTIAL_INTEGRALS = {
    "cannot differentiate its deriv": jax.scipy.special.exp1,
    "of another trace": lambda x: jax.scipy.special.expn(jnp.arange(1.0, 3.0), x),
}


@pytest.mark.parametrize("reason", EXPONENTIAL_INTEGRALS)
def test_a_rule_without_a_derivative_is_named(reason):
    def loss(x):
        return EXPONENTIAL_INTEGRALS[reason](x).sum()

    x = jnp.array([0.5, 1.7])
    try:
        exact = jnp.diag(jax.hessian(loss)(x))
    except TypeError:  # until JAX 0.12, whose rule of exp1 has a derivative
        with pytest.raises(hs.UnsupportedPrimitiveError, match=reason):
            hs.hesscale(loss)(x)
    else:
        assert_close(hs.hesscale(loss)(x)[1], exact)


@jax.custom_jvp
def share(z):
    return jnp.exp(z) / jnp.exp(z).sum()


@share.defjvp
def share_jvp(primals, tangents):
    y = share(*primals)
    return y, y * (tangents[0] - y @ tangents[0])


def test_a_rule_of_the_users_comes_before_that_of_a_function_that_mixes_entries():
    z = normal(4)
    called = []

    def rule(eqn, operands, recurse):
        called.append(eqn.name)
        return hs.RULES["custom_jvp_call"].choose(eqn, lambda _: None)(eqn, operands, recurse)

    def loss(z):
        return share(z) @ z

    def in_a_loop(z):
        return lax.scan(lambda c, _: (c + loss(z), None), 0.0, None, length=600)[0] / 600

    _, exact = hs.hesscale(loss)(z)
    assert_close(exact, jnp.diag(jax.hessian(loss)(z)))
    for fun in (loss, in_a_loop):
        hs.hesscale(fun, rules=hs.RULES | {"custom_jvp_call[share]": rule})(z)
        assert called
        called.clear()


def test_a_result_that_does_not_move_before_a_function_without_a_derivative():
    """A ``custom_vjp`` whose body has no derivative is not differentiable along known zeros."""
    c = jnp.array([0.3, 2.0, 1.0])

    def pair(x, y):
        return jnp.sin(x), jnp.tanh(y)

    def loss(x):
        u, v = with_jvp(pair)(x, c)
        return jnp.sum(u**2) + jnp.sum((v - straight_through(lambda x: x)(v)) ** 2)

    x = jnp.array([0.5, -1.0, 2.0])
    for transform in (hs.hesscale(loss), jax.jit(hs.hesscale(loss))):
        grad, hess_diag = transform(x)
        np.testing.assert_allclose(grad, jax.grad(loss)(x), rtol=1e-12)
        np.testing.assert_allclose(hess_diag, 2 * jnp.cos(2 * x), rtol=1e-12)


def test_in_a_checkpoint_whose_block_reads_the_result_and_the_operand():
    # With a slope of 1 the result's spread is the operand's, the same array.
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    def loss(x, around=lambda fun: fun):
        return jnp.sum(around(lambda y: jnp.arctan2(rounded(x), y + 2.0))(0.5 * x) ** 2)

    x = normal(4)
    remat = functools.partial(loss, around=jax.checkpoint)
    assert_close(hs.hesscale(remat)(x), hs.hesscale(loss)(x))
