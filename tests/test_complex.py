"""Complex values inside a real loss of real parameters: whole programs, in all situations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import normal
from jax import lax
from jax.flatten_util import ravel_pytree

import hesscale_jax as hs

DATA, TARGET = normal(3, 8, seed=9), normal(3, 8, seed=10)


def spectral_filter(p):
    """A filter in half the spectrum: linear in it."""
    spectrum = jnp.fft.rfft(DATA) * lax.complex(p["re"], p["im"])[None]
    return jnp.mean((jnp.fft.irfft(spectrum, 8) - TARGET) ** 2)


def power(x):
    return jnp.sum(jnp.abs(jnp.fft.fft(x)) ** 2 * jnp.arange(1, 7).astype(x.dtype))


def short_time(x):
    return jnp.sum(jnp.abs(jnp.fft.rfft(x.reshape(4, 4) * jnp.hanning(4)[None])) ** 2)


def log_power(x):
    return jnp.sum((jnp.log(jnp.abs(jnp.fft.rfft(x)) ** 2) - 1.0) ** 2)


def phase_retrieval(x):
    return jnp.sum((jnp.abs(jnp.fft.fft2(x)) ** 2 - 3.0) ** 2)


def fourier_operator(p):
    """A layer of a Fourier neural operator: low modes mixed, beside a skip connection."""
    lifted = DATA[:, :, None] * p["lift"][None, None]
    low = jnp.fft.rfft(lifted, axis=1)[:, :3]
    mixed = jnp.einsum("bkc,kcd->bkd", low, lax.complex(p["re"], p["im"]))
    spectrum = jnp.zeros((3, 5, 2), complex).at[:, :3].set(mixed)
    y = jax.nn.gelu(jnp.fft.irfft(spectrum, 8, axis=1) + lifted @ p["skip"])
    return jnp.mean((y @ p["out"] - TARGET) ** 2)


def recurrence(p, parallel=False):
    """A linear recurrent unit: ``h = lambda h + b u`` with a complex diagonal."""
    decay = jnp.exp(lax.complex(-jnp.exp(p["nu"]), jnp.exp(p["theta"])))
    u = DATA[0][:, None].astype(complex) * lax.complex(p["b_re"], p["b_im"])[None]
    if parallel:
        decays = jnp.broadcast_to(decay, u.shape)
        _, h = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decays, u))
    else:
        _, h = lax.scan(lambda h, u: (decay * h + u,) * 2, jnp.zeros(3, complex), u)
    return jnp.mean(((h @ lax.complex(p["c_re"], p["c_im"])).real - TARGET[0]) ** 2)


def circuit(angles):
    """The expectation of Z after rotations of one qubit."""
    x, z = (np.array(m, complex) for m in ([[0, 1], [1, 0]], [[1, 0], [0, -1]]))
    state = jnp.array([1, 0], complex)
    for a, b in angles:
        turn = jnp.cos(a).astype(complex) * np.eye(2, dtype=complex)
        state = (turn - 1j * jnp.sin(a).astype(complex) * x) @ state
        state = jnp.exp(-1j * b.astype(complex) * np.array([1, -1], complex)) * state
    return jnp.vdot(state, z @ state).real


def gaussian(p):
    """The likelihood of complex numbers with a complex mean."""
    z = lax.complex(DATA[0], DATA[1])
    return jnp.sum(jnp.abs(z - lax.complex(p[0], p[1])) ** 2 / jnp.exp(p[2]) + p[2])


def coherence(t):
    return jnp.abs(jnp.sum(jnp.exp(1j * t.astype(complex)))) ** 2


def branches(x):
    z = lax.complex(x[1], x[2])
    return lax.cond(x[0] > 0, lambda z: z * z, jnp.exp, z).imag


def within(x):
    """A derivative of a function with complex values, taken inside the loss."""
    return jnp.sum(jax.grad(lambda y: jnp.sum(jnp.abs(jnp.fft.fft(y) ** 2)))(x) ** 2)


@jax.custom_vjp
def squared(z):
    return z * z


squared.defvjp(lambda z: (z * z, z), lambda z, g: (2 * z * g,))


@jax.custom_jvp
def cubed(z):
    return z * z * z


cubed.defjvp(lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


def own_rules(x):
    return jnp.sum(jnp.sin(cubed(squared(lax.complex(x[0], x[1]))).real))


SQUARE, TURN = normal(3, 3, seed=7), normal(3, 3, seed=8)


def of_matrix(fun, p=SQUARE, shift=0.0):
    """A loss of a complex matrix function, and where to take it."""
    return lambda p: jnp.sum(jnp.abs(fun(lax.complex(p + shift * jnp.eye(len(p)), TURN))) ** 3), p


def hermitian(z):
    return z @ z.conj().T + lax.complex(jnp.eye(3), 0.0 * TURN)


def solved_by(solve):
    """A loss of the solution for a right-hand side: linear in it."""
    matrix = lax.complex(SQUARE + 4 * jnp.eye(3), jnp.tril(TURN))
    return lambda p: jnp.sum(jnp.abs(solve(matrix, lax.complex(p, 2 * p))) ** 2), normal(3, 2)


def banded(p):
    one, on = jnp.ones(3, complex), lax.complex(p, 3 + 0 * p)
    return jnp.sum(jnp.abs(lax.linalg.tridiagonal_solve(one, on, one, one[:, None])) ** 2)


PIECES = {"nu": 3, "theta": 3, "b_re": 3, "b_im": 3, "c_re": 3, "c_im": 3}
UNIT = {name: 0.3 * normal(n, seed=i) for i, (name, n) in enumerate(PIECES.items())}
LAYER = {
    "lift": normal(2),
    "re": normal(3, 2, 2),
    "im": normal(3, 2, 2, seed=1),
    "skip": normal(2, 2),
    "out": normal(2, seed=3),
}
EXACT = {
    "spectral filter": (spectral_filter, {"re": normal(5), "im": normal(5, seed=2)}),
    "power": (power, normal(6)),
    "short time": (short_time, normal(16)),
    "complex Gaussian": (gaussian, normal(3)),
    "coherence": (coherence, normal(4)),
    "solve": solved_by(jnp.linalg.solve),
    "triangular solve": solved_by(jax.scipy.linalg.solve_triangular),
    "tridiagonal solve": (banded, normal(3)),
    "singular values": of_matrix(lambda z: jnp.linalg.svd(z, compute_uv=False)),
}
PROGRAMS: dict[str, Any] = EXACT | {
    "log power": (log_power, normal(6)),
    "phase retrieval": (phase_retrieval, normal(3, 4)),
    "Fourier neural operator": (fourier_operator, LAYER),
    "recurrence": (recurrence, UNIT),
    "recurrence in parallel": (lambda p: recurrence(p, True), UNIT),
    "recurrence, checkpointed": (lambda p: jax.checkpoint(recurrence)(p), UNIT),
    "circuit": (circuit, normal(3, 2)),
    "branches": (branches, normal(3)),
    "a derivative within": (within, normal(3)),
    "rules of their own": (own_rules, normal(2, 3)),
    "inverse": of_matrix(jnp.linalg.inv, shift=4.0),
    "singular vectors": of_matrix(lambda z: jnp.abs(jnp.linalg.svd(z, full_matrices=False)[0])),
    "QR": of_matrix(lambda z: jnp.linalg.qr(z)[1]),
    "LU": of_matrix(lambda z: jax.scipy.linalg.lu(z)[2], shift=4.0),
    "Cholesky": of_matrix(lambda z: jnp.linalg.cholesky(hermitian(z))),
    "eigenvalues": of_matrix(lambda z: jnp.linalg.eigvalsh(hermitian(z))),
    "eigenvectors": of_matrix(lambda z: jnp.abs(jnp.linalg.eigh(hermitian(z))[1])),
    "matrix exponential": of_matrix(jax.scipy.linalg.expm),
}


def assert_close(received: Any, expected: Any, rtol: float = 1e-9) -> None:
    for got, want in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        scale = max(1e-3, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_gradient_are_those_of_jax(name):
    loss, p = PROGRAMS[name]
    value, (grad, diagonal) = jax.jit(hs.value_and_hesscale(loss))(p)
    assert_close((value, grad), jax.value_and_grad(loss)(p))
    assert all(np.isfinite(h).all() for h in jax.tree.leaves(diagonal))
    assert hs.explain(loss)(p).steps


@pytest.mark.parametrize("name", EXACT)
def test_the_diagonal_is_exact(name):
    loss, p = EXACT[name]
    flat, unravel = ravel_pytree(p)
    exact = np.diag(jax.hessian(lambda flat: loss(unravel(flat)))(flat))
    assert_close(ravel_pytree(hs.hesscale(loss)(p)[1])[0], exact)


@pytest.mark.parametrize("name", ["log power", "phase retrieval", "circuit", "branches"])
def test_equals_the_dense_reference(name):
    oracle.check(*PROGRAMS[name])


def test_a_loop_and_its_parallel_form_have_one_diagonal():
    # Each linear in the state: what is dropped is the same.
    loop, parallel, remade = (
        hs.hesscale(PROGRAMS[name][0])(UNIT)
        for name in ("recurrence", "recurrence in parallel", "recurrence, checkpointed")
    )
    assert_close(loop, remade)
    assert_close(loop[0], parallel[0])


@pytest.mark.parametrize(
    "fun",
    [
        *(jnp.abs, jnp.tanh, jnp.reciprocal, jnp.fft.fft),
        *(pytest.param(fun, marks=pytest.mark.slow) for fun in (jnp.cumprod, jnp.prod)),
    ],
)
def test_in_a_loop_nothing_complex_is_kept(fun):
    def loss(x, loop=True):
        def step(carry, t):
            return carry, jnp.abs(fun(jnp.exp(lax.complex(0.1 * x, x * t)) + 2.0)) ** 2

        t = jnp.arange(1.0, 3)
        steps = lax.scan(step, None, t)[1] if loop else jnp.stack([step(None, i)[1] for i in t])
        return jnp.sum(steps)

    x = normal(3)
    assert_close(hs.hesscale(loss)(x), hs.hesscale(lambda x: loss(x, False))(x))


def test_under_vmap_and_in_float32():
    x = normal(4, 6)
    of_each = jax.jit(hs.hesscale(log_power))
    batched = jax.jit(jax.vmap(hs.hesscale(log_power)))(x)
    assert_close(batched, jax.tree.map(lambda *r: jnp.stack(r), *map(of_each, x)))
    single = jax.jit(hs.hesscale(power))(x[0].astype(jnp.float32))
    assert {y.dtype for y in single} == {jnp.dtype(jnp.float32)}
    assert_close(single, jax.jit(hs.hesscale(power))(x[0]), rtol=1e-5)  # of float32


def test_gauss_newton_takes_a_transform_as_linear():
    # The head is the squares: all that comes before them is linear in the filter.
    p = EXACT["spectral filter"][1]
    assert_close(
        hs.hesscale(spectral_filter, curvature="gauss_newton")(p), hs.hesscale(spectral_filter)(p)
    )


@pytest.mark.parametrize("fun", [jnp.abs, jnp.square, jnp.exp, jnp.log, jnp.sqrt])
def test_zeros_have_the_gradient_of_jax(fun):
    def loss(x):
        return jnp.sum(jnp.sin(fun(lax.complex(x, 0 * x)).real + x))

    x = jnp.array([0.0, 1.0, -2.0])
    expected = jax.grad(loss)(x)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(hs.hesscale(loss)(x)[0][finite], expected[finite], rtol=1e-12)


def test_no_entries():
    x = normal(3)
    loss = lambda x: jnp.sum(x**2) + jnp.abs(jnp.prod(lax.complex(x[:0], x[:0])))  # noqa: E731
    assert_close(hs.hesscale(loss)(x), (2 * x, jnp.full(3, 2.0)))


def test_complex_auxiliary_data_comes_out_as_it_is():
    def loss(x):
        spectrum = jnp.fft.fft(x)
        return jnp.sum(jnp.abs(spectrum) ** 2), (spectrum, x.astype(complex))

    x = normal(5)
    _, aux = hs.hesscale(loss, has_aux=True)(x)
    assert_close(aux, (jnp.fft.fft(x), x.astype(complex)), rtol=1e-12)


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="real"):
        hs.hesscale(lambda z: jnp.sum(jnp.abs(z)))(jnp.ones(3, complex))


def test_a_transform_of_many_entries_has_no_dense_jacobian():
    n = 1 << 16
    loss = jax.jit(hs.hesscale(lambda x: jnp.sum(jnp.abs(jnp.fft.rfft(x)) ** 2)))
    memory = loss.lower(jax.ShapeDtypeStruct((n,), float)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100 * 8 * n
