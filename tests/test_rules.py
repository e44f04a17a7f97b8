"""Every rule and every block, alone, against dense algebra at random cotangents."""

import functools
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BINARY, CASES, MATRIX, ORDERS_COMPLEX, PAIRS, UNARY, assert_close, bcoo, normal
from equinox.internal import nondifferentiable_backward, while_loop
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import sparse
from jax.experimental.sparse.linalg import spsolve
from jax.scipy.linalg import cho_solve, expm, solve_triangular
from jax.scipy.sparse.linalg import cg, gmres

import hesscale_jax as hs
from hesscale_jax import _complex, _jaxpr
from hesscale_jax.testing import check_rule

PRIMITIVES = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "primitives.py"))


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_algebra(name):
    fun, *args = CASES[name]
    # float32 in the middle of a float64 program leaves float32's rounding.
    rtol = 1e-6 if name in ("convert_element_type", "dot_general to another dtype") else 1e-9
    check_rule(fun, *args, key=jax.random.key(3), rtol=rtol)


def test_the_gradient_is_rounded_where_jax_rounds_it():
    def loss(x):
        return jnp.sum(lax.reduce_precision(jnp.sin(x), 5, 2) ** 2)

    x = jnp.linspace(0.1, 1.3, 7)
    grad, hess_diag = hs.hesscale(loss)(x)
    np.testing.assert_array_equal(grad, jax.grad(loss)(x))
    rounded = lax.reduce_precision(jnp.sin(x), 5, 2)
    assert_close(hess_diag, 2 * (jnp.cos(x) ** 2 - rounded * jnp.sin(x)))


# Of these, the functions fix a shape, or one line of them reads entries of another.
OF_ONE_SHAPE = {"igamma", "igammac", "regularized_incomplete_beta", "select_n of three"}
OF_ONE_SHAPE |= {"select_n with a scalar predicate"}


@pytest.mark.parametrize("name", sorted((UNARY | BINARY).keys() - OF_ONE_SHAPE))
def test_pointwise_of_rank_0_of_size_1_and_of_nothing(name):
    """As a sum over one of each: its Hessian in all of them together is diagonal by blocks."""
    fun, *args = CASES[name]
    scalars = [x.ravel()[0] for x in args]
    ones = [x[..., :1][:1] if x.ndim else x for x in args]
    nothing = [x[:0] if x.ndim else x for x in args]

    def loss(scalars, ones):
        results = [fun(*scalars), fun(*ones), fun(*nothing)]
        return sum(jnp.sum(jnp.sin(y.astype(float)) * 1.3) for y in results)

    def flat(x):
        return loss(
            list(x[: len(args)]),
            [x.reshape(y.shape) for x, y in zip(x[len(args) :], ones, strict=True)],
        )

    x = jnp.stack([*scalars, *(y.ravel()[0] for y in ones)]).astype(float)
    grad, hess_diag = jax.jit(hs.hesscale(loss, (0, 1)))(scalars, ones)
    received = [jnp.stack([y.ravel()[0] for y in (*z[0], *z[1])]) for z in (grad, hess_diag)]
    rtol = 1e-6 if name == "convert_element_type" else 1e-9  # float32 in between
    expected = jax.jit(lambda x: (jax.grad(flat)(x), jnp.diag(jax.hessian(flat)(x))))(x)
    for got, want in zip(received, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_same_in_other_words(name):
    fun, other, *args = PAIRS[name]
    argnums = tuple(range(len(args)))

    def loss(fun):
        return lambda *args: jnp.sum(jnp.sin(fun(*args)) * 1.7)

    received = jax.jit(hs.hesscale(loss(fun), argnums))(*args)
    expected = jax.jit(hs.hesscale(loss(other), argnums))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), received, expected)


# These need a mesh: tests/test_sharding.py has them.
COLLECTIVES = {
    *("all_gather", "all_gather_invariant", "all_to_all", "pbroadcast", "ppermute", "psum"),
    *("psum_invariant", "pvary", "reduce_scatter", "shard_map"),
}


def test_every_rule_has_a_case():
    tested = set()
    for fun, *args in (*CASES.values(), *((fun, *args) for fun, _, *args in PAIRS.values())):
        for eqn in _jaxpr.flatten(_jaxpr.trace(fun, *args)).equations:
            tested.update((eqn.name, _jaxpr.label(eqn)))
    differentiable = {name for name, rule in hs.RULES.items() if rule is not hs.rules.constant}
    # add_any only arises from derivatives inside the loss, tested in test_transform.py; while has a
    # rule that raises, tested in test_control_flow.py; the others are primitives of newer versions
    # of JAX that no public function of this one makes.
    unmade = {"add_any", "one_minus_square", "while"}
    # jnp.cbrt takes no complex values, and some are written with another primitive in JAX.
    unmade |= {"custom_jvp_call[complex.cbrt]"}
    # Those of matrices are in programs of test_complex.py.
    unmade |= {f"custom_jvp_call[{_complex.own(name)}]" for name in _complex.MATRIX}
    if not ORDERS_COMPLEX:
        unmade |= {"custom_jvp_call[complex.max]", "custom_jvp_call[complex.min]"}
    # In the loops of Equinox, and sampled: each has a test below.
    unmade |= {"maybe_set", "nondifferentiable_backward", "select_if_vmap", "spsolve", "vprim"}
    unmade |= {_jaxpr.HIGH}  # tested in test_custom_derivatives.py
    if not hasattr(lax, "polynomial"):
        unmade |= {"log2", "polynomial", "xla_metadata_call"}
    assert differentiable - tested - COLLECTIVES <= unmade


def test_a_wrong_rule_is_found():
    spread_forgotten = hs.rules.unary(lambda x, y: (2 * x, None))
    rules = hs.RULES | {"square": spread_forgotten}
    with pytest.raises(AssertionError, match="hess_diag in argument 0"):
        check_rule(jnp.square, normal(3, 2), key=jax.random.key(0), rules=rules)


# What has a rule, and what raises


def test_every_differentiable_primitive_has_a_rule_or_a_reason():
    # In a process of its own: other libraries in this one have primitives too.
    listing = """
import jax.experimental.pallas
from jax.interpreters import ad
print(*(primitive.name for primitive in ad.primitive_jvps))
"""
    printed = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    differentiable = set(printed.stdout.split())
    assert len(differentiable) > 100
    assert differentiable <= {*hs.RULES, *hs.rules.UNSUPPORTED, *_jaxpr.CALLS, *_complex.FORMS}
    assert not hs.RULES.keys() & hs.rules.UNSUPPORTED.keys()


def test_the_page_of_primitives_is_up_to_date():
    assert PRIMITIVES["PAGE"].read_text() == PRIMITIVES["page"]()


def in_a_reference(x):
    ref = jax.new_ref(jnp.zeros_like(x))
    ref[...] = jnp.sin(x)
    return jnp.sum(ref[...] ** 2)


@pytest.mark.parametrize(
    ("loss", "primitive", "reason"),
    [
        (lambda x: jnp.sum(jnp.abs(jnp.linalg.eigvals(jnp.diag(x)))), "eig", "^complex values"),
        (lambda x: jnp.sum(jnp.sort(x.astype(complex)).real), "sort", "^complex values"),
        (in_a_reference, "swap", "mutable arrays"),
        (lambda x: jnp.sum(jax.new_ref(x)[...]), "new_ref", "mutable arrays"),
        (
            lambda x: jnp.sum(jax.pure_callback(np.sin, x, x)),
            "pure_callback",
            "cannot see what it computes",
        ),
    ],
)
def test_what_raises_says_why(loss, primitive, reason):
    with pytest.raises(hs.UnsupportedPrimitiveError, match=reason) as caught:
        hs.hesscale(loss)(jnp.arange(1.0, 4.0))
    assert caught.value.primitive == primitive


def test_complex_values_off_the_path_are_evaluated():
    def loss(x):
        return jnp.sum(x**2) * jnp.abs(jnp.fft.fft(lax.stop_gradient(x)))[0]

    x = normal(3)
    np.testing.assert_allclose(hs.hesscale(loss)(x)[1], 2 * abs(x.sum()), rtol=1e-9)


# One equation by its dense Jacobian


POSITIVE = MATRIX @ MATRIX.T


def cholesky(x):
    return lax.linalg.cholesky(x, symmetrize_input=False)


DENSE = {
    "custom_linear_solve": (lambda b: jnp.linalg.solve(MATRIX, b), normal(3, 2)),
    "cumprod": (lambda x: jnp.cumprod(x, 1), normal(2, 3)),
    "dot_general": (jnp.matmul, normal(2, 3), normal(3, 2)),
    "triangular_solve": (lax.linalg.triangular_solve, MATRIX, normal(2, 3)),
    "tridiagonal_solve": (lax.linalg.tridiagonal_solve, *normal(3, 4), normal(4, 2)),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_is_exact_for_any_equation(name):
    fun, *args = DENSE[name]
    check_rule(fun, *args, key=jax.random.key(3), rules=hs.RULES | {name: hs.rules.dense})


def test_dense_drops_second_derivatives_in_the_model():
    def loss(x):
        return jnp.sum(checkpoint_name(cholesky(x), "model_output") ** 2)

    _, diagonal = hs.hesscale(loss, curvature="gauss_newton")(POSITIVE)
    expected = 2 * (jax.jacobian(cholesky)(POSITIVE) ** 2).sum((0, 1))
    np.testing.assert_allclose(diagonal, expected, rtol=1e-9)


def test_cumlogsumexp_drops_second_derivatives_in_the_model():
    def loss(x):
        return jnp.sum(checkpoint_name(lax.cumlogsumexp(x), "model_output") ** 2)

    x = normal(65)
    _, diagonal = jax.jit(hs.hesscale(loss, curvature="gauss_newton"))(x)
    expected = 2 * (jax.jacobian(lax.cumlogsumexp)(x) ** 2).sum(0)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-9)


def test_large_matrices_are_sampled():
    def loss(x):
        return jnp.sum(cholesky(x))

    (step,) = (s for s in hs.explain(loss)(POSITIVE).steps if "cholesky" in s.primitives)
    assert step.rule == "dense"
    (step, *_) = hs.explain(loss)(jax.ShapeDtypeStruct((40, 40), float)).steps
    assert step.rule == "sampled"
    rules = hs.RULES | {"cholesky": hs.rules.matrix_function(max_entries=80)}
    assert hs.explain(loss, rules=rules)(POSITIVE).steps[0].rule == "sampled"


SAMPLED = {
    "cholesky": (cholesky, POSITIVE),
    "cholesky of a batch": (cholesky, jnp.stack([POSITIVE, 2 * POSITIVE])),
    "custom_linear_solve": (lambda m: jnp.linalg.solve(m, jnp.arange(3.0)), MATRIX),
    "svd": (lambda x: lax.linalg.svd(x, full_matrices=False)[1], normal(4, 3)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_mean_of_samples_is_the_dense_result(name):
    fun, x = SAMPLED[name]
    samples = 40_000

    def loss(x):
        return jnp.sum(jnp.sin(fun(x)))

    def diagonal(**options):
        rules = hs.RULES | {
            "custom_linear_solve": hs.rules.linear_solve(**options),
            **dict.fromkeys(("cholesky", "svd"), hs.rules.matrix_function(**options)),
        }
        return jax.jit(hs.hesscale(loss, rules=rules))(x)

    (grad, expected), (same, received) = diagonal(), diagonal(max_entries=0, samples=samples)
    np.testing.assert_allclose(same, grad, rtol=1e-9)
    assert not np.array_equal(received, expected)
    # One sample of an entry scatters by about the size of all of them; five such deviations.
    scatter = np.linalg.norm(expected) / samples**0.5
    np.testing.assert_allclose(received, expected, rtol=0, atol=5 * scatter)


# Whole programs of linear algebra: the gradient is that of jax.grad, the diagonal finite


def spd(x):
    return x @ jnp.swapaxes(x, -1, -2) + 2 * jnp.eye(x.shape[-1])


def marginal_likelihood(x, by):
    points = jnp.linspace(0.0, 1.0, 6)
    scale, length, noise = jnp.exp(x[0, :3])
    kernel = scale * jnp.exp(-((points[:, None] - points[None]) ** 2) / length) + noise * jnp.eye(6)
    y = jnp.sin(5 * points)
    if by == "cholesky":
        factor = jnp.linalg.cholesky(kernel)
        fit = y @ cho_solve((factor, True), y)
        return fit / 2 + jnp.log(jnp.diagonal(factor)).sum()
    values, vectors = jnp.linalg.eigh(kernel)
    return jnp.sum((vectors.T @ y) ** 2 / values + jnp.log(values)) / 2


def kalman_filter(x):
    def step(state, y):
        mean, cov = state
        mean, cov = x @ mean, x @ cov @ x.T + jnp.eye(3)
        gain = jnp.linalg.solve(cov + jnp.eye(3), cov).T
        residual = y - mean
        logdet = jnp.linalg.slogdet(cov + jnp.eye(3))[1]
        error = residual @ jnp.linalg.solve(cov + jnp.eye(3), residual)
        return (mean + gain @ residual, cov - gain @ cov), logdet + error

    return lax.scan(step, (jnp.zeros(3), jnp.eye(3)), normal(4, 3))[1].sum()


def graph_network(x):
    adjacency = sparse.BCOO.fromdense((np.arange(16).reshape(4, 4) % 3 == 0) * 0.5, nse=6)
    hidden = jnp.tanh(adjacency @ (normal(4, 3) @ x))
    return jnp.sum((adjacency @ (hidden @ x)) ** 2)


PROGRAMS = {
    "marginal likelihood by cholesky": functools.partial(marginal_likelihood, by="cholesky"),
    "marginal likelihood by eigh": functools.partial(marginal_likelihood, by="eigh"),
    "Kalman filter": lambda x: kalman_filter(x / 3),
    "graph network": graph_network,
    "whitening": lambda x: jnp.sum(
        solve_triangular(jnp.linalg.cholesky(jnp.cov(x)), x, lower=True)[0] ** 3
    ),
    "spectral norm": lambda x: jnp.linalg.norm(x, ord=2),
    "nuclear norm": lambda x: jnp.linalg.norm(x, ord="nuc"),
    "least squares": lambda x: jnp.sum(jnp.linalg.lstsq(x, jnp.ones(3))[0] ** 2),
    "pinv": lambda x: jnp.sum(jnp.linalg.pinv(x[:, :2]) ** 2),
    "det": lambda x: jnp.linalg.det(spd(x)),
    "det, 4 by 4": lambda x: jnp.linalg.det(jnp.pad(spd(x), ((0, 1), (0, 1)), constant_values=0.3)),
    "slogdet": lambda x: jnp.linalg.slogdet(spd(x))[1],
    "expm": lambda x: jnp.sum(expm(x / 4) ** 2),
    "matrix_power": lambda x: jnp.sum(jnp.linalg.matrix_power(x, -3) ** 2),
    "eigvalsh": lambda x: jnp.sum(jnp.sin(jnp.linalg.eigvalsh(spd(x)))),
    "qr": lambda x: jnp.sum(jnp.sin(jnp.linalg.qr(x)[0])),
    "cho_solve of a batch": lambda x: jnp.sum(
        jax.vmap(lambda a: cho_solve((jnp.linalg.cholesky(spd(a)), True), a))(jnp.stack([x, 2 * x]))
        ** 2
    ),
    "cg": lambda x: jnp.sum(cg(lambda v: spd(x) @ v, x[0], tol=1e-12)[0] ** 2),
    "cg of a composed operator": lambda x: jnp.sum(
        cg(lambda v: x.T @ (x @ v) + v, x[0], tol=1e-12)[0] ** 2
    ),
    "gmres": lambda x: jnp.sum(gmres(lambda v: spd(x) @ v, x[0], tol=1e-12)[0] ** 2),
    "multivariate normal": lambda x: jnp.sum(
        jax.random.multivariate_normal(jax.random.key(0), x[0], spd(x)) ** 2
    ),
    "spsolve": lambda x: jnp.sum(
        spsolve(x.ravel(), np.int32([0, 1, 2] * 3), np.int32([0, 3, 6, 9]), x[0]) ** 2
    ),
    "a trained sparse array": lambda x: jnp.sum(jnp.tanh(bcoo(x.ravel()[:6]) @ x) ** 2),
    "igammac": lambda x: jnp.sum(lax.igammac(x**2 + 1, x**2 + 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_linear_algebra_goes_where_grad_goes(name):
    loss = PROGRAMS[name]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(jax.grad(loss))(MATRIX)
        grad, diagonal = jax.jit(hs.hesscale(loss))(MATRIX)
    np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(diagonal).all()
    assert np.any(diagonal != 0)


def test_log_determinants_are_exact():
    def loss(x):
        sign, value = jnp.linalg.slogdet(x)
        return jnp.sum(sign * value**3)

    x = normal(2, 3, 3)
    grad, diagonal = hs.hesscale(loss)(x)
    hessian = jax.hessian(loss)(x).reshape(18, 18)
    np.testing.assert_allclose(grad, jax.grad(loss)(x), rtol=1e-12)
    np.testing.assert_allclose(diagonal.ravel(), jnp.diagonal(hessian), rtol=1e-9)


@pytest.mark.parametrize("of_matrix", [lambda x: jnp.linalg.slogdet(x)[1], jnp.linalg.det])
def test_determinants_of_large_matrices_take_few_times_their_memory(of_matrix):
    """Second derivatives in each entry by themselves would be the square of a matrix's entries."""
    traced = _jaxpr.trace(hs.hesscale(of_matrix), jnp.eye(128))
    assert _jaxpr.work(traced.jaxpr.eqns).largest <= 16 * 128**2  # signs


def test_equal_eigenvalues_have_the_gradient_of_jax():
    def loss(x):
        return jnp.sum(jnp.linalg.eigvalsh(x) ** 2)

    x = jnp.eye(3)
    grad, _ = hs.hesscale(loss)(x)
    np.testing.assert_allclose(grad, jax.grad(loss)(x), rtol=1e-9)


@pytest.mark.parametrize("function", [lax.igamma, lax.igammac])
def test_incomplete_gamma_functions_in_their_order(function):
    def loss(a):
        return jnp.sum(jnp.sin(function(a, x)))

    a, x = 2 + normal(5) ** 2, 2 + normal(5, seed=1) ** 2
    grad, diagonal = hs.hesscale(loss)(a)
    np.testing.assert_allclose(grad, jax.grad(loss)(a), rtol=1e-9)
    # JAX has no second derivative: a difference of gradients loses half of the digits.
    step = 1e-5
    expected = (jax.grad(loss)(a + step) - jax.grad(loss)(a - step)) / (2 * step)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-7, atol=1e-9)


# Equinox


def doubled(x, steps):
    def body(state):
        i, y = state
        return i + 1, y.at[i].set(y[i - 1] * x[i])

    def more(state):
        return state[0] < steps

    start = 1, jnp.zeros(4).at[0].set(x[0])  # JAX's gradient is right for what is written once
    return while_loop(more, body, start, kind="bounded", max_steps=4, buffers=lambda s: s[1])[1]


def test_a_bounded_loop_of_equinox_is_that_loop_written_out():
    def loss(x):
        return jnp.sum(jnp.sin(doubled(x, 3)))

    def written_out(x):
        y = jnp.zeros(4).at[0].set(x[0]).at[1].set(x[0] * x[1])
        return jnp.sum(jnp.sin(y.at[2].set(y[1] * x[2])))

    def of_batch(loss):
        return lambda x: jnp.sum(jax.vmap(loss)(jnp.stack([x, 2 * x])))

    x = normal(4)
    for received, expected in ((loss, written_out), (of_batch(loss), of_batch(written_out))):
        grad, diagonal = hs.hesscale(received)(x)
        np.testing.assert_allclose(grad, jax.grad(expected)(x), rtol=1e-9)
        assert np.isfinite(diagonal).all()


def test_what_equinox_forbids_to_differentiate_raises_as_in_grad():
    def loss(x):
        return jnp.sum(nondifferentiable_backward(x) ** 2)

    for transform in (jax.grad, hs.hesscale):
        with pytest.raises(RuntimeError, match="cannot be reverse-mode autodifferentiated"):
            transform(loss)(normal(3))
