"""Every rule and every block, alone, against dense algebra at random cotangents."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, PAIRS, normal
from jax import lax
from jax.ad_checkpoint import checkpoint_name

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


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_same_in_other_words(name):
    fun, other, *args = PAIRS[name]
    argnums = tuple(range(len(args)))

    def loss(fun):
        return lambda *args: jnp.sum(jnp.sin(fun(*args)) * 1.7)

    received = hs.hesscale(loss(fun), argnums)(*args)
    expected = hs.hesscale(loss(other), argnums)(*args)
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
        (lambda x: jnp.sum(jnp.linalg.cholesky(jnp.diag(x))), "cholesky", r"rules\.dense"),
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


def positive_definite(x):
    return x @ x.T + 2 * jnp.eye(x.shape[0])


MATRIX = positive_definite(normal(3, 3))
DENSE = {
    "cholesky": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), MATRIX),
    "cumprod": (lambda x: jnp.cumprod(x, 1), normal(2, 3)),
    "custom_linear_solve": (
        lambda b: lax.custom_linear_solve(
            lambda x: MATRIX @ x, b, lambda _, b: jnp.linalg.inv(MATRIX) @ b, symmetric=True
        ),
        normal(3),
    ),
    "dot_general": (jnp.matmul, normal(2, 3), normal(3, 2)),
    "eigh": (lambda x: lax.linalg.eigh(x, symmetrize_input=False)[1], MATRIX),
    "lu": (lambda x: lax.linalg.lu(x)[0], normal(3, 3)),
    "qr": (lambda x: lax.linalg.qr(x, full_matrices=False)[1], normal(4, 3)),
    "reduce": (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b + a * b, (1,)), normal(2, 3)),
    "svd": (lambda x: lax.linalg.svd(x, full_matrices=False)[1], normal(4, 3)),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True), MATRIX, normal(3, 2),
    ),
    "tridiagonal_solve": (lax.linalg.tridiagonal_solve, *normal(3, 4), normal(4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_is_exact_for_any_equation(name):
    fun, *args = DENSE[name]
    check_rule(fun, *args, key=jax.random.key(3), rules=hs.RULES | {name: hs.rules.dense})


def test_dense_drops_second_derivatives_in_the_model():
    def cholesky(x):
        return lax.linalg.cholesky(x, symmetrize_input=False)

    def loss(x):
        return jnp.sum(checkpoint_name(cholesky(x), "model_output") ** 2)

    rules = hs.RULES | {"cholesky": hs.rules.dense}
    _, diagonal = hs.hesscale(loss, curvature="gauss_newton", rules=rules)(MATRIX)
    expected = 2 * (jax.jacobian(cholesky)(MATRIX) ** 2).sum((0, 1))
    np.testing.assert_allclose(diagonal, expected, rtol=1e-9)


def test_cumlogsumexp_drops_second_derivatives_in_the_model():
    def loss(x):
        return jnp.sum(checkpoint_name(lax.cumlogsumexp(x), "model_output") ** 2)

    x = normal(4)
    _, diagonal = hs.hesscale(loss, curvature="gauss_newton")(x)
    expected = 2 * (jax.jacobian(lax.cumlogsumexp)(x) ** 2).sum(0)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-9)
