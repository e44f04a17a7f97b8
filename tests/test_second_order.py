"""The methods of examples/second_order.py, beside SciPy, Optax and dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
scipy_optimize = pytest.importorskip("scipy.optimize")

from examples import second_order  # noqa: E402


@pytest.fixture(autouse=True)
def promotion_of_users():
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem(scales=(0.1, 1.0, 1.0, 10.0), penalty=1e-2) -> second_order.Problem:
    """Softmax regression: convex, and its Hessian is the Gauss-Newton matrix."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal([40, 4]) * scales)
    labels = jnp.asarray(rng.integers(3, size=40))
    start = jnp.asarray(0.1 * rng.standard_normal([4, 3]))
    return second_order.Problem(jnp.matmul, start, inputs, labels, penalty, 1e-3, ())


def dense(found: second_order.Problem) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the Hessian at the start."""
    flat, unravel = ravel_pytree(found.start)

    def loss(x):
        return found.loss(unravel(x))

    return np.asarray(jax.grad(loss)(flat)), np.asarray(jax.hessian(loss)(flat))


def step(found, name, setting, **curvature):
    grad, _ = dense(found)
    tx = second_order.METHODS[name].update(found, setting)
    gradient = jnp.reshape(grad, found.start.shape)
    update, _ = tx.update(gradient, tx.init(found.start), found.start, **curvature)
    return np.ravel(update)


def test_products_are_those_of_the_dense_hessian():
    found = problem()
    _, hessian = dense(found)
    product = found.product(found.start)
    columns = [np.ravel(product(jnp.reshape(e, found.start.shape))) for e in np.eye(len(hessian))]
    np.testing.assert_allclose(columns, hessian, rtol=1e-9, atol=1e-12)


def test_the_diagonal_is_that_of_the_dense_hessian():
    found = problem()
    gradient, hessian = dense(found)
    _, (grad, hess_diag) = found.value_and_hesscale(found.start)
    np.testing.assert_allclose(np.ravel(grad), gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.ravel(hess_diag), np.diag(hessian), rtol=1e-9)
    newton = step(found, "diagonal Newton", 0.5, hess_diag=hess_diag)
    expected = -0.5 * gradient / (np.diag(hessian) + found.damping)
    np.testing.assert_allclose(newton, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("products", [1, 3, 60])
def test_a_hessian_free_step_is_scipys_conjugate_gradients(products, preconditioned):
    found = problem()
    gradient, hessian = dense(found)
    damped = hessian + found.damping * np.eye(len(hessian))
    jacobi = np.diag(1 / np.diag(damped)) if preconditioned else None
    expected, _ = scipy_linalg.cg(damped, -gradient, maxiter=products, rtol=1e-12, M=jacobi)
    curvature = {}
    if preconditioned:
        curvature["hess_diag"] = jnp.reshape(np.diag(hessian), found.start.shape)
    u = step(found, "Hessian-free, diagonal", products, **curvature)
    # Both stop at a residual of 1e-12, and rounding grows with the products.
    np.testing.assert_allclose(u, expected, rtol=1e-6, atol=1e-9)
    if products == 60:  # More than the unknowns: Newton's own step.
        np.testing.assert_allclose(u, np.linalg.solve(damped, -gradient), rtol=1e-6, atol=1e-9)


def test_an_epoch_of_svrg_is_as_it_is_written():
    found, rate = problem(), 0.1
    _, for_order = jax.random.split(jax.random.key(0))
    rows = jax.random.permutation(for_order, 40)[:32]  # One batch of 32: the rest is left out.
    whole = jax.grad(found.loss)(found.start)
    one_batch = jax.grad(found.loss)(found.start, rows)
    # At the start of an epoch the batch's two gradients cancel: its first step has no noise.
    assert float(jnp.abs(whole - one_batch).max()) > 1e-2
    np.testing.assert_allclose(step(found, "SVRG", rate), -rate * np.ravel(whole), rtol=1e-9)


def quadratic() -> second_order.Problem:
    """`sum(c * x**2) / 2 - sum(x)`, by the head of a model that gives `x`: the optimum is 1 / c."""
    curvatures = jnp.array([1e-2, 1.0, 1e2])

    class Quadratic(second_order.Problem):
        def loss(self, params, rows=slice(None)):
            return jnp.sum(curvatures * params**2 / 2 - params)

    nothing = jnp.zeros(0)
    return Quadratic(jnp.matmul, jnp.zeros(3), nothing, nothing, 0.0, 0.0, ())


def test_l_bfgs_from_the_diagonal_solves_a_separable_problem_at_once():
    found = quadratic()
    tx = second_order.METHODS["L-BFGS from diagonal"].update(found, 1.0)
    params, state = found.start, tx.init(found.start)
    for _ in range(2):  # Optax's first step is along the gradient, of length 1 at most.
        update, state = tx.update(jax.grad(found.loss)(params), state, params)
        params = optax.apply_updates(params, update)
    assert float(found.loss(params)) < float(found.loss(found.start))
    direction = tx.update(jax.grad(found.loss)(params), state, params)[0]
    np.testing.assert_allclose(params + direction, [1e2, 1.0, 1e-2], rtol=1e-6)


def test_l_bfgs_from_the_diagonal_is_optaxs_in_other_units():
    found = problem()
    _, hessian = dense(found)
    root = jnp.reshape(np.sqrt(np.diag(hessian)), found.start.shape)
    ours = second_order.METHODS["L-BFGS from diagonal"].update(found, 1.0)
    x, state = found.start, ours.init(found.start)
    y, optaxs = root * found.start, second_order.LBFGS.init(root * found.start)
    for _ in range(4):
        update, state = ours.update(jax.grad(found.loss)(x), state, x)
        x = x + update
        gradient = jax.grad(lambda y: found.loss(y / root))(y)
        update, optaxs = second_order.LBFGS.update(gradient, optaxs, y)
        y = y + update
    np.testing.assert_allclose(x, y / root, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", second_order.METHODS)
def test_every_method_comes_to_scipys_optimum(name):
    found = problem((0.5, 1.0, 1.0, 2.0), penalty=0.1)  # Within reach of gradient descent.
    unravel = ravel_pytree(found.start)[1]
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: found.loss(unravel(x))))
    best = scipy_optimize.minimize(
        lambda x: tuple(map(np.asarray, value_and_grad(x))),
        np.ravel(found.start),
        jac=True,
        tol=1e-12,
    )
    method = second_order.METHODS[name]
    run = second_order.runner(found, method, second_order.Work(1, 1, 1, 1))
    excess = min(float(run(s, 2000.0).left.min()) - best.fun for s in method.settings[::2])
    assert -1e-9 < excess < 1e-4 * (float(found.loss(found.start)) - best.fun)
