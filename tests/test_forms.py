"""What is exact, by structure: each line of docs/explanation/exact.md, with programs of its kind.

Each program is written in ways that do not look alike; the Hessian's diagonal is the same.
"""

import functools
import math
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import programs
import pytest
from jax.flatten_util import ravel_pytree
from jax.lax import add, fori_loop, psum, reduce_window, scan
from jax.lax import dynamic_update_slice as update
from jax.ops import segment_sum
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.signal import convolve
from jax.scipy.stats import multivariate_normal

import hesscale_jax as hs
from hesscale_jax.arrays import Factor, Reader, known
from hesscale_jax.terms import Term

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "exact.md"


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


A, B, X, W = normal(0, 4, 4), normal(1, 4, 2), normal(2, 5, 4), normal(3, 3, 3)
x, pairs = normal(4, 4), normal(5, 6, 2)
chosen, rejected = X + 2, X + 2 + 0.1 * normal(6, 5, 4)
STEPS = jnp.arange(3.0)
SOURCE, TARGET = np.array([0, 1, 2, 3, 4, 0, 2]), np.array([1, 0, 2, 4, 3, 3, 0])
WEIGHTS, HALVES = normal(14, 7, 1), np.array([[0, 1, 1], [1, 0, 0], [1, 1, 2]])
PAIRED = np.array([0, 0, 1, 1])
PLACES, PLACES_APART = np.array([1, 2, 2, 0, 9]), np.array([1, 7, 2, 0, 5])
labels, tokens = np.array([0, 2, 1, 2, 0]), np.array([[0, 0, 2], [1, 3, 3]])
CORNERS = np.array([[0, 1, 2], [1, 0, 1]])  # the last is out of bounds, and moved


def finite_differences(w):
    def u(t):
        return jnp.tanh(t * normal(7, 1, 6) + normal(8, 1, 6)) @ w

    t, h = normal(9, 7, 1), 1e-2
    return (((u(t + h) - 2 * u(t) + u(t - h)) / h**2 - 1) ** 2).mean()


def ordered_logit(p):
    cuts, score = jnp.cumsum(p["steps"]), X @ p["w"]
    probability = jax.nn.sigmoid(cuts[labels % 2 + 1] - score)
    return -jnp.log(probability - jax.nn.sigmoid(cuts[labels % 2] - score)).mean()


def mixture(p):
    likelihoods = jnp.exp(-((X[:, :1] - p["means"]) ** 2))
    return -jnp.log(likelihoods @ jax.nn.softmax(p["weights"])).sum()


def experts(p):
    of_each = jnp.tanh(jnp.einsum("ni,iko->nko", X, p["experts"]))
    return jnp.mean((jnp.einsum("nk,nko->no", jax.nn.softmax(X @ p["gate"]), of_each) - 1) ** 2)


def of_one_sum(p):
    row = jnp.repeat(jax.nn.logsumexp(X @ p["w"], 1, keepdims=True), 2, 1)
    return jnp.tanh(jnp.sin(row) @ p["t"]).sum()


def after_a_norm(p):
    units = p["scale"] * jax.nn.standardize(jnp.tanh(X @ p["w"])) + p["shift"]
    return jax.nn.softplus(units @ p["head"]).mean()


def contrastive(p):
    logits = p["scale"] * A + p["bias"]
    rows, columns = (jax.nn.log_softmax(each, -1).diagonal() for each in (logits, logits.T))
    return -(rows + columns).mean()


def dice(z):
    return dice_of(jax.nn.softmax(z))


def dice_of(prob):
    hot = jax.nn.one_hot(labels, prob.shape[1], dtype=prob.dtype)
    return (1 - (2 * (prob * hot).sum(0) + 1) / ((prob + hot).sum(0) + 1)).mean()


def unit(z):
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def gradient_penalty(w):
    slope = jax.grad(lambda x: jnp.tanh(x @ w).sum())(x.astype(w.dtype))
    return (jnp.linalg.norm(slope) - 1) ** 2


def distances(r):
    return jnp.sqrt(((r[None] - r[:, None]) ** 2).sum(-1) + 1e-2).sum()


def factorisation_machine(v):
    return ((((X @ v) ** 2 - (X**2) @ (v**2)).sum(-1) - 1) ** 2).sum()


def checkpointed(w):
    both = jax.checkpoint(lambda w: (chosen @ w, rejected @ w))
    a, b = both(w)
    return -jax.nn.log_sigmoid(a - b).mean()


def checkpointed_in_part(w):
    a, b = X @ w, chosen @ w

    @jax.checkpoint
    def sums(a, b):
        both = jnp.sin(a * b)
        return both, jnp.exp(both + a).sum()

    both, total = sums(a, b)
    return jnp.sum(both * jnp.tanh(a - b) / total + (both - a).mean() ** 2)


def in_a_loop(w):
    a, b = X @ w, chosen @ w
    y, _ = scan(lambda y, t: (jnp.tanh(y + t * a), None), b, STEPS)
    return jnp.sum(y * a / jnp.sum(jnp.exp(b)))


def advantages(v):
    residuals = 0.9 * v[1:] - v[:-1] + 0.3

    def step(total, residual):
        total = residual + 0.8 * total
        return total, total

    return scan(step, jnp.zeros((), v.dtype), residuals, reverse=True)[1]


def sparsemax(p):
    scores = X @ p.get("w", 0.3 * A[:, :3]) + p["b"] if "b" in p else p["scores"]
    return optax.losses.multiclass_sparsemax_loss(scores, labels).mean()


@jax.custom_jvp
def softmax(z):
    return jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)


@softmax.defjvp
def softmax_jvp(primals, tangents):
    y = softmax(*primals)
    return y, y * (tangents[0] - (y * tangents[0]).sum(-1, keepdims=True))


def rows(a):
    return a.sum(1, keepdims=True)


def graph_convolution(w):
    h = X @ w
    return -jax.nn.log_softmax(h + segment_sum(WEIGHTS * h[SOURCE], TARGET, 5))[:, 0].sum()


def of_sequences(w):
    """A preference between two sequences, by the log-probabilities of their tokens."""
    tokens = jax.nn.log_softmax(X @ w)[:, 1]
    return -jax.nn.log_sigmoid(tokens[:2].sum() - tokens[2:].sum())


def of_sequences_after_a_layer(p):
    return of_sequences(p["w"] - 0.1 * jnp.sin(p["w"]))


def windows(w, size):
    """All of its windows, one after the other."""
    starts = np.arange(len(w) - size + 1)
    return jax.vmap(lambda i: jax.lax.dynamic_slice(w, (i,), (size,)))(starts)


def pair(w, i):
    """Two entries in a row; zeros, if one of them is out of bounds."""
    numbers = jax.lax.GatherDimensionNumbers((0,), (), (0,))
    return jax.lax.gather(w, i[None], numbers, (2,), mode="fill", fill_value=0.0)


def filled(w, i):
    return w.at[i].get(mode="fill", fill_value=0.0)


def corner(w, i, j):
    return jnp.vdot(jax.lax.dynamic_slice(w, (i, j), (2, 2)), A[1:3, 1:3])


def ordinal(gaps):
    """The likelihood of each class, by cutpoints in order."""
    return jnp.log(jnp.diff(jax.nn.sigmoid(jnp.cumsum(gaps)))).sum()


def distances_by_products(r):
    squares = jnp.diag(products := r @ r.T)
    return jnp.sqrt(squares[:, None] + squares[None] - 2 * products + 1).sum()


def of_the_rest(p):
    first, second = jax.lax.sort(((X @ p["w"])[:, 0], (X @ p["w"])[:, 1]), num_keys=1)
    return (jnp.diff(first) * jnp.diff(second)).sum() ** 2


def simplex(z):
    """The projection on the simplex: sparsemax by its algorithm."""
    ordered, count = jnp.sort(z)[::-1], jnp.arange(1.0, 5.0)
    sums = jnp.cumsum(ordered)
    size = (1 + count * ordered > sums).astype(z.dtype).sum()
    threshold = (sums[size.astype("int32") - 1] - 1) / size
    return jnp.maximum(z - threshold, 0.0)


def log_where_positive(y):
    return jnp.where(y > 0, jnp.log(y), 0.0)


def log_of_masked(add_up, w):
    exponentials = jnp.exp(jnp.where(labels > 0, X @ w, -jnp.inf))
    masked = jnp.where(labels > 0, jnp.exp(X @ w), 0.0)
    return (log_where_positive(add_up(masked)) - add_up(exponentials)).sum()


def partial_likelihood(w):
    """Cox's, of events in order."""
    risk = X @ w
    risk = risk - risk.max()
    return (jnp.log(jnp.cumsum(jnp.exp(risk)[::-1])[::-1]) - risk).sum()


def after_diffusion(w):
    for _ in range(6):
        w = w + 0.1 * (jnp.roll(w, 1) + jnp.roll(w, -1) - 2 * w)
    return (jnp.sin(w) * w[::-1]).sum()


def of_three_shapes(s):
    y = jnp.sqrt(1 + s**2)
    row, matrix = (1 + B[:1] ** 2) ** jnp.tanh(y), jnp.atan2(y, 1.5 + B**2)
    # Infinite where it is not chosen: no form goes through it, the block alone knows.
    power = jnp.where(s > 0.3, jnp.where(s > 0.3, s, 0.0) ** -2, 0.0)
    return (row * matrix / (1.5 + power**2)).sum()


def after_a_loop(w):
    v = A[:1] @ jax.nn.elu(w)
    y = fori_loop(0, 3, lambda _, y: jnp.tanh(y + 0.1 * v), v)
    return (y * jax.nn.logsumexp(jnp.tanh(v), 1, keepdims=True)).sum()


def of_two_products(w):
    a, b = (segment_sum(each @ w, labels, 3) for each in (X, chosen))
    return (jnp.sin(a) * jnp.cos(b)).sum()


def in_a_loop_of_two(p):
    def step(_, carry):
        return 0.5 * (p["a"] - carry[0]), 0.5 * p["b"]

    a, b = fori_loop(0, 4, step, (p["a"], jnp.ones_like(p["b"])))
    return (jnp.exp(a) * b**2).sum()


OUTER = (
    jnp.outer,
    lambda a, b: a[:, None] * b[None],
    lambda a, b: a[:, None] @ b[None],
    lambda a, b: jnp.einsum("j,i->ij", b, a),
)

LINES = {
    "A bilinear form of a value with a linear image of it": [
        (lambda x: x @ A @ x, x),
        (lambda x: jnp.vdot(x, A @ x) ** 2, x),
        (lambda x: jnp.einsum("i,ij,j->", x, A, x), x),
        (lambda x: jnp.einsum("i,ij,j,k->", x, A, x, x), x),
        (lambda x: (jnp.dot(x[0], x) ** 2).sum() + jnp.tensordot(x[1], x[2], 0) ** 2, x),
        (lambda x: jnp.sum(A * jnp.outer(x, x)), x),
        (lambda x: (x @ A @ x) / (x @ x), x),
        (lambda w: jnp.trace(w @ w), W),
        (lambda w: jnp.sum((w @ w.T - jnp.eye(3)) ** 2), W),
        (lambda x: jnp.sum((y := x[:, None] + jnp.cumsum(x)[None]) @ y.T), x),
        (lambda p: jnp.log1p(jnp.einsum("ni,ij,nj->n", p, A, p) ** 2).sum(), X),
        (lambda x: jnp.tanh(x) @ A @ jax.nn.gelu(x), x),
        (factorisation_machine, B),
        (lambda x: scan(lambda c, t: (c + t * (x @ A @ x) ** 2, None), 0.0, STEPS)[0], x),
    ],
    "Small convolutions with a constant, and sums over windows": [
        (lambda u: (u[1:] * jnp.convolve(u, jnp.array([1.0, -2.0]), "valid")).sum(), x),
        (lambda u: (u * jnp.convolve(jnp.array([1.0, -2.0, 0.5]), u, "same")).sum() ** 2, x),
        (lambda u: jax.nn.logsumexp(u[1:, 1:] * convolve(u, W[:2, :2], "valid")), A),
        (lambda u: (u[1:] * reduce_window(u, 0.0, add, (2,), (1,), "VALID")).sum(), x),
        (
            lambda u: jnp.exp(u[:3] * reduce_window(u, 0.0, add, (2, 2), (1, 1), "SAME")).sum(),
            B[:3],
        ),
        (lambda u: jax.vmap(lambda a: a * psum(a, "i"), axis_name="i")(u).sum(), x),
    ],
    "A product of an image with a product of a value with itself": [
        (lambda w: ((X[:3, :3] @ (w @ w.T)) ** 2).sum(), W),
        (lambda w: (((X[:3, :3] @ w) @ w.T) ** 2).sum(), W),
        (lambda w: jnp.sin(w @ w.T @ w).sum(), W),
        (lambda w: jnp.trace(w @ w @ w), W),
        (
            lambda r: jnp.sqrt((n := (r * r).sum(-1))[:, None] + n[None] - 2 * (r @ r.T) + 1).sum(),
            B,
        ),
    ],
    "The outer product of two views of a value, before other trained weights": [
        *(
            (lambda p, of=of: jnp.tanh(of(p["v"], p["v"][::-1]) @ p["a"]).sum(), {"v": x, "a": x})
            for of in OUTER
        ),
        *(
            (lambda p, of=of: jnp.sin(of(p["v"], p["v"]) @ p["a"]).sum(), {"v": x, "a": x})
            for of in OUTER
        ),
        (lambda p: jnp.tanh((p["w"] @ p["w"].mT) @ p["a"]).sum(), {"w": A[:, None], "a": x[:1]}),
        (lambda p: jnp.tanh((p["w"].mT @ p["w"]) @ p["a"]).sum(), {"w": A[..., None], "a": x[:1]}),
    ],
    "Entries written to places that differ": [
        (lambda w: (jnp.diff(jnp.zeros(8).at[1:6].set(X @ w)) ** 2).sum(), x),
        (lambda w: jnp.sin(jnp.diff(jnp.zeros(9).at[PLACES_APART].set(X @ w))).sum(), x),
        (lambda w: (jnp.diff(jnp.zeros((5, 3)).at[:, 1].set(X @ w)) ** 2).sum(), x),
        (lambda w: (jnp.diff(jnp.zeros((7, 2)).at[1:6, 1].set(X @ w), axis=0) ** 2).sum(), x),
        (lambda w: jnp.tanh((z := X @ w).at[1:].set(z[1:] - z[:-1])).sum() ** 2, x),
        (lambda w: jnp.zeros((5, 9)).at[np.arange(5), PLACES_APART].set(X @ w).sum() ** 2, x),
        (lambda w: jnp.fill_diagonal(jnp.eye(5), X @ w, inplace=False).sum() ** 2, x),
        (lambda w: jnp.eye(4).at[jnp.tril_indices(4, -1)].set(pairs @ w).sum() ** 2, x[:2]),
        (lambda w: jnp.eye(4).at[np.tril_indices(4, -1)].set(jnp.exp(pairs @ w)).sum() ** 2, x[:2]),
        (lambda w: (z := jnp.sin(X @ w)).at[np.array([0, 3])].set(2 * z[1:3]).sum() ** 2, x),
        (lambda w: jnp.diff(update((z := X @ w).cumsum(), z[:3], (1,))) @ jnp.sin(z[1:]), x),
    ],
    "A loop whose steps are affine": [
        (lambda w: scan(lambda y, _: (A.astype(y.dtype) @ y, None), w, None, 3)[0] @ w, x),
        (lambda w: (scan(lambda y, _: (A.astype(y.dtype) @ y, y), w, None, 3)[1] ** 2).sum(), x),
        (lambda w: fori_loop(0, 12, lambda _, y: 0.3 * A.astype(y.dtype) @ y + w, w) @ w, x),
        (lambda w: jnp.sin(scan(lambda y, r: (0.5 * A @ y + r * w, y), 0 * x, X)[1]).sum(), x),
        (lambda w: (advantages(X @ w) ** 2).mean(), x),
        (lambda w: jnp.cosh(advantages(jnp.tanh(X @ w))).mean(), x),
        (lambda w: jnp.exp(0.1 * scan(lambda s, d: (s + d, s + d), 0.0, X @ w)[1]).sum(), x),
        (lambda w: math.prod(map(jnp.sum, scan(lambda c, x: (c + x, c), 0.0, w))), x),
        (lambda w: jnp.exp(operator.sub(*scan(lambda s, a: (s + a, s), 0.0, w))).sum(), x),
        (
            lambda w: (
                jnp.diff(fori_loop(0, 5, lambda i, b: b.at[i].set(X[i] @ w), X[:, 0])) @ (X @ w)[1:]
            ),
            x,
        ),
    ],
    "A solve, in its right-hand side": [
        (lambda w: w @ jnp.linalg.solve(A, w), x),
        (lambda w: jnp.tanh(jnp.linalg.solve(A, w) - w).sum(), x),
        (lambda w: w @ cho_solve((jnp.linalg.cholesky(A @ A.T), True), w), x),
        (lambda w: jnp.tanh(solve_triangular(A, w[:, None]) - w[:, None]).sum(), x),
        (lambda w: -multivariate_normal.logpdf(X[0], w, A @ A.T), x),
    ],
    "A Fourier transform": [
        (lambda w: (jnp.abs(jnp.fft.rfft(w)) ** 4).sum(), x),
        (lambda w: jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(X @ w)[::-1], 5) - X @ w).sum(), x),
        (lambda w: jnp.log1p(jnp.abs(jnp.fft.fft2(w)) ** 2).sum(), W),
    ],
    "A convolution of a value with itself": [
        (lambda u: jnp.convolve(u, u).sum() + jnp.convolve(u, u[::-1], "same") @ x, x),
        (lambda u: (jnp.correlate(u, u, "full") ** 2).sum(), x),
        (lambda u: jnp.tanh(jnp.polymul(u, u)).sum(), x),
    ],
    "Running products of a few entries, and running sums on a logarithmic scale": [
        (lambda s: jnp.cumprod(jnp.full(4, s)) @ x, x[0]),
        (lambda s: jax.lax.cumprod(jnp.full(4, s), reverse=True) @ x, x[0]),
        (lambda w: (jax.lax.cumlogsumexp(X @ w, reverse=True) - X @ w).sum(), x),
        (lambda w: jnp.tanh(jax.lax.cumlogsumexp(X[:4] @ w, axis=1)).sum(), A[:, :3]),
    ],
    "An image, and what a loop with affine steps makes of it": [
        (in_a_loop_of_two, {"a": x[:1], "b": x}),
        (lambda x: scan(lambda c, t: (c + t * x, None), jnp.zeros(4), STEPS)[0] @ A @ x, x),
        (lambda x: (y := fori_loop(0, 3, lambda _, y: 0.5 * y + x, x)) @ A @ y, x),
        (lambda x: jax.nn.logsumexp(X @ fori_loop(0, 3, lambda _, y: y - x[0], x) - X @ x), x),
        (lambda w: jnp.vdot(fori_loop(0, 2, lambda _, y: 2 * y - w[:1], w), A[:3, :3] @ w), W),
    ],
    "A product of a few entries": [
        (lambda s: jnp.prod(jnp.stack([s, s, jnp.array(3.0)])), jnp.array(0.7)),
        (lambda w: jnp.prod(jnp.stack([w, jnp.flip(w)]), 0).sum(), x),
        (lambda s: jnp.prod(jnp.stack([s, 2 * s])[:0]) * s**2, jnp.array(0.7)),
    ],
    "Linear images of a leaf that meet before anything curved": [
        (lambda w: -jax.nn.log_sigmoid(chosen @ w - rejected @ w).mean(), x),
        (checkpointed, x),
        (checkpointed_in_part, x),
        (in_a_loop, x),
        (lambda w: ((X @ w - 0.9 * (chosen @ w) - 1) ** 2).mean(), x),
        (finite_differences, normal(10, 6)),
        (ordered_logit, {"steps": jnp.array([-0.5, 1.0, 0.7]), "w": x}),
        (lambda w: jax.nn.logsumexp((X @ w).mean(0)), normal(11, 4, 3)),
        (lambda up: jax.nn.logsumexp(X @ (A + B @ up), -1).sum(), normal(12, 2, 4)),
        (contrastive, {"scale": jnp.array(1.3), "bias": jnp.array(0.2)}),
        (after_diffusion, x),
    ],
    "An image that a block adds up itself, and what follows it": [
        (lambda w: jax.nn.logsumexp((X * w[None]).sum(1)), x),
        (lambda w: jnp.sqrt((((X * w[None]).sum(1) - 1) ** 2).mean()), x),
        (lambda w: jax.nn.logsumexp(jnp.where(np.tri(4, dtype=bool), w[None], 0.0).sum(1)), x),
        (lambda w: jax.nn.logsumexp((X[..., None] * w[None]).sum(1).max(1)), B),
        (lambda w: jnp.sqrt(((X[..., None] * w[None]).sum(1) ** 2).sum(0)).sum(), B),
        (lambda r: jax.nn.logsumexp(-((r[:, None] - r[None]) ** 2).sum(-1)), X),
    ],
    "Entries of a leaf chosen, moved, repeated and added up": [
        (lambda w: ((jnp.flip(jnp.flip(w)) * w) ** 2).sum(), x),
        (lambda w: jnp.exp(w * jnp.roll(w, 1)).sum(), x),
        (lambda w: jax.nn.logsumexp(jnp.tile(w, 2) * jnp.arange(8.0)), x),
        (lambda w: (w[tokens].sum(1) ** 3).sum(), x),
        (lambda w: jnp.sqrt(((w[1:] - w[:-1]) ** 2).sum()), x),
        (lambda w: jax.nn.logsumexp(jax.lax.cumsum(w, reverse=True)), x),
        (lambda w: (jnp.convolve(w, jnp.array([1.0, -2.0, 1.0])) ** 2).sum(), x),
        (lambda w: (jnp.pad(w, 1)[1:-1] * w).sum(), x),
        (lambda w: jnp.exp(jnp.concatenate([w, w]) * jnp.arange(8.0)).sum(), x),
        (lambda r: -jax.nn.log_sigmoid(r[tokens[0]] - r[tokens[1]]).sum(), x),
        (lambda r: -jax.nn.log_sigmoid(r[jnp.asarray(tokens[0])] - r[0]).sum(), x),
        (lambda w: jax.nn.logsumexp(jax.vmap(lambda i: w[i] @ B[:3])(labels[:2])), W),
        (lambda w: jax.nn.logsumexp(jax.vmap(lambda i: w.T[i])(labels[:2]) @ B[:3]), W),
        (lambda w: jax.nn.logsumexp(jax.vmap(lambda i: filled(w, i) @ B[:3])(labels[:2] + 1)), W),
        (lambda w: jax.nn.logsumexp(jax.vmap(lambda i: pair(w, i) @ B[:2])(labels[:2] + 1)), x),
        (lambda w: jax.nn.logsumexp(windows(w, 3) @ B[:3]), x),
        (lambda w: jnp.linalg.norm(jnp.diff(windows(w, 2), axis=1)), x),
        (lambda w: jax.nn.logsumexp(jax.vmap(corner, (None, 0, 0))(w, *CORNERS)), W),
    ],
    "Images that are added up by ids": [
        (lambda w: jax.nn.logsumexp(jnp.r_[segment_sum(w, PAIRED, 2)[PAIRED], A @ w]), x),
        (lambda w: (segment_sum(X @ w, labels, 3) ** 2).sum(), x),
        (lambda w: (jnp.zeros(3).at[jnp.asarray(labels)].subtract(X @ w) ** 2).sum(), x),
        (lambda w: (jax.nn.one_hot(labels, 3).T @ (X @ w)).sum() ** 2, x),
        (graph_convolution, normal(11, 4, 3)),
        (lambda w: (jax.vmap(lambda a, i: segment_sum(a, i, 2))(W @ w, HALVES) ** 3).sum(), W),
        (lambda w: (jnp.zeros((3, 4)).at[labels, PLACES].add(X @ w) ** 2).sum(), x),
        (lambda w: jnp.exp(w.at[1:3].add(2 * w[:2]) * w).sum(), x),
        (lambda w: jnp.exp(w.at[1].add(w[0]) * w).sum(), x),
        (of_two_products, B),
        (lambda w: jnp.exp(W.at[:, labels[:3]].add(w) * w.at[0].subtract(w[1])).sum(), W),
    ],
    "Entries of an image chosen or moved, beside something curved in it": [
        (lambda w: (jnp.sin(X @ w) * (X @ w)[::-1]).sum(), x),
        (lambda w: (jax.checkpoint(jnp.sin)(a := X @ w + w[0]) * jnp.roll(a, 1)).sum(), x),
        (lambda w: (jnp.sin(a := X @ w) * jnp.logaddexp(2 * a, jnp.roll(a, 1))).sum(), x),
        (lambda w: jnp.tanh(X @ w).sum() * (X @ w).at[0].add(2.0).sum() ** 2, x),
        (lambda w: (X @ w).at[1].subtract(A[0, 0]).sum() ** 2, x),
        (lambda w: (X @ w).at[1:3].multiply(2.0).sum() ** 2, x),
        (lambda w: jnp.exp((a := X @ w + 1).at[0].set(0.4) * a).sum(), x),
        (lambda w: (jnp.sin(a := X @ w) * a[jnp.argmax(w).astype("int32")][None]).sum(), x),
        (lambda w: (rows(a := B.T @ w + 1) ** 2 * jnp.log(rows(jnp.exp(a[::-1])))).sum(), B),
    ],
    "Entries in order, and the largest": [
        (lambda w: ((jnp.sort(X @ w) - jnp.arange(5.0)) ** 2).sum(), x),
        (lambda w: jnp.sort(jax.nn.logsumexp(X @ w, -1))[-2:].mean() ** 2, B),
        (lambda w: jnp.median(X @ w) * jnp.tanh(X @ w).sum(), x),
        (lambda w: jnp.sin(jax.lax.top_k(X @ w, 2)[0].prod()) * (X @ w).sum(), x),
        (of_the_rest, {"w": B}),
        (lambda w: jnp.median(jnp.tanh(X @ w)) ** 2, x),
        (lambda w: (jnp.quantile((X @ w - 1) ** 2, np.array([0.3, 0.6])) ** 2).sum(), x),
        (lambda w: (simplex(w) ** 3).sum(), x),
        (lambda w: jnp.exp(X @ w - (X @ w).max()).sum() ** 2, x),
    ],
    "What a choice takes of images of a last layer, infinite as it may be elsewhere": [
        (lambda w: jnp.sum(jnp.diff(jnp.maximum(jnp.hypot(X @ w, 0.1), jnp.exp(X @ w))) ** 2), x),
        (lambda w: log_of_masked(lambda e: segment_sum(e, np.array([0, 0, 1, 2, 1]), 4), w), x),
        (lambda w: log_of_masked(jnp.cumsum, w), x),
        (lambda w: (jnp.sum(jnp.where(labels > 0, X @ w, -jnp.inf)[labels > 0]) - 1) ** 2, x),
        (lambda w: jnp.sum(jnp.diff(log_where_positive(X @ w)) ** 2), x),
    ],
    "A cumulative sum of what a block makes": [
        (partial_likelihood, x),
        (lambda t: ordinal(jnp.where(np.arange(4) == 0, t, jnp.exp(t))), x),
        (lambda t: ordinal(jnp.where(jnp.arange(4) == 0, t, jnp.exp(t))), x),
        (lambda t: ordinal(jnp.concatenate([t[:1], jnp.exp(t[1:])])), x),
        (lambda p: partial_likelihood(p["w"][:, 0]), {"w": B}),
    ],
    "One value at several places of a block": [
        (distances_by_products, pairs),
        (lambda w: (w.T @ w / jnp.outer(n := jnp.sqrt(jnp.diag(w.T @ w) + 1), n)).sum() ** 2, W),
        (distances, pairs),
        (lambda w: (w * w.T * W).sum(), W),
        (lambda w: jnp.tanh((w + w.T) / 2).sum(), W),
        (lambda p: jnp.tanh(jnp.outer(p[0], p[1]) + jnp.outer(p[1], p[0])).sum(), pairs.T[:, :4]),
    ],
    "Images, entry by entry, of what leaves a block": [
        (dice, normal(13, 5, 3)),
        (lambda w: (jnp.tanh(w) * jnp.flip(jnp.tanh(w))).sum(), x),
    ],
    "A function of `jax.custom_jvp` that mixes entries": [
        (lambda z: jnp.vdot(softmax(z), z), x),
        (lambda z: -jnp.log(softmax(jnp.stack([z, 2 * z])))[:, 1].sum(), x),
    ],
    "What a block makes of images of a leaf, chosen and added up in another": [
        (lambda w: jnp.tanh(X @ w)[:3].sum() ** 2, x),
        (lambda w: (jnp.diff(jnp.tanh(X @ w)) ** 2).sum(), x),
        (lambda w: ((y := jnp.tanh(X @ w))[1:] * y[:-1]).sum() ** 2, x),
        (lambda w: jnp.exp(-jax.nn.log_softmax(X @ w)[:, 0].mean()), B),
        (lambda w: jnp.exp(jax.nn.logsumexp(X @ w, -1).mean()), B),
        (of_sequences, B),
        (of_sequences_after_a_layer, {"w": B}),
        (lambda w: jax.lax.map(jnp.tanh, X @ w).sum() ** 2, x),
        (lambda w: jnp.log1p(jnp.prod(jax.nn.sigmoid(X @ w))), x),
        (lambda w: -jnp.sum((p := jax.nn.softmax(X @ w).mean(0)) * jnp.log(p)), B),
        (lambda w: dice_of(jnp.exp(jax.nn.log_softmax(X @ w))), A[:, :3]),
    ],
    "What a block makes, weighted by a constant vector": [
        (lambda w: jnp.sum((jax.nn.softmax(X @ w) @ B[1]) ** 2), B),
        (
            lambda w: jnp.sum(jnp.einsum("j,ij->i", B[1], jax.nn.softmax(w @ B)) ** 2),
            W[:, :1] + A[:3],
        ),
        (lambda w: jnp.sum((jax.nn.softmax(w) @ B) ** 2), x),
        (lambda w: -jnp.log(jnp.abs(X) @ jax.nn.softmax(w)).sum(), x),
        (lambda w: ((X @ (w / jnp.linalg.norm(w)) - 1) ** 2).sum(), x),
    ],
    "What shares a reduction, weighted by a vector that is trained too": [
        (mixture, {"weights": x[:3], "means": A[:1, :3]}),
        (lambda p: jnp.tanh(jax.nn.softmax(X @ p["w"]) @ p["t"]).sum(), {"w": B, "t": B[0]}),
        (of_one_sum, {"w": B, "t": B[0]}),
        (experts, {"gate": B, "experts": normal(22, 4, 2, 3)}),
        (after_a_norm, {"w": A, "scale": x[None], "shift": A[:1], "head": A[:, :1]}),
        (lambda p: jnp.sum((jax.nn.standardize(X @ p["w"]) @ p["v"] - 1) ** 2), {"w": A, "v": x}),
    ],
    "One sum of functions of single entries, and what is made of it in any block": [
        (lambda w: (jnp.tanh(v := jnp.sin(w).sum(0)) * v.sum() ** 2).sum(), W),
        (lambda w: (jnp.tanh(v := A[0] @ jax.nn.elu(w)) * v.max()).sum(), A),
        (after_a_loop, A),
        (
            lambda w: jnp.logaddexp(v := (X.T * jnp.cos(w)).sum(1), 2 * jnp.cumsum(v)).sum() ** 2,
            x[:, None],
        ),
    ],
    "What blocks make of images one after the other": [
        (lambda w: dice(X @ w), A[:, :3]),
        (lambda w: (jax.nn.softmax(z := X @ w, 0) * jax.nn.softmax(z, 1)).sum(), A),
        (lambda w: ((jax.nn.softmax(X @ w) @ A - X) ** 2).sum(), A),
        (lambda w: jax.nn.logsumexp(3 * unit(X @ w) @ A, -1).sum(), A),
        (lambda w: (jax.nn.relu(jnp.tanh(X @ w) @ A) @ B).var(), A),
        (gradient_penalty, A),
    ],
    "Bilinear forms of what a block makes": [
        (lambda w: (p := jax.nn.softmax(w)) @ A @ p, x),
        (lambda w: (B[:, 0] @ (p := jax.nn.softmax(w))) / jnp.sqrt(p @ A @ A.T @ p), x),
        (lambda w: (p := w / jnp.linalg.norm(w)) @ A @ p, x),
        (lambda w: jnp.trace((p := jax.nn.softmax(X @ w)).T @ (X @ X.T) @ p), A),
        (lambda w: ((jnp.tanh(X @ w) @ w.T - X) ** 2).sum(), A),
        (lambda w: jnp.tanh(w @ w @ w @ w).sum(), A / 4),
    ],
    "A scalar that is read along several axes": [
        (lambda s: (jnp.logaddexp(B[:1], y := jnp.sin(s)) * (B * y)).sum(), x[:1, None]),
        (lambda s: ((1 + B[:1] ** 2) ** (y := jnp.sqrt(1 + s**2)) * jnp.atan2(y, B)).sum(), x[0]),
        (of_three_shapes, jnp.full((1, 1), 1.5)),
    ],
    "An axis of size 1": [
        (lambda w: ((jax.nn.softmax(w) @ B[:, :1] - 0.3) ** 2).sum(), x),
        (lambda w: ((jax.nn.softmax(w)[None] @ B[:, :1] - 0.3) ** 2).sum(), x),
    ],
}
PROGRAMS = [
    pytest.param(*program, id=f"{line}-{i}")
    for line, programs in LINES.items()
    for i, program in enumerate(programs)
]


def of_jax(loss, params):
    """The gradient and the diagonal of ``jax.hessian``, flat."""
    flat, unravel = ravel_pytree(params)
    grads, diagonals = programs.hessian_diagonals(lambda p: loss(unravel(p)), [flat], [0])
    return grads[0], diagonals[0]


def computed(loss, params, **options):
    """Value, gradient and diagonal under test, the latter two flat."""
    value, trees = oracle.computed(hs.value_and_hesscale(loss, **options), params)
    return value, *(ravel_pytree(tree)[0] for tree in trees)


# What cancels, as a bias added to all logits, is 0 up to rounding: the scale is that of its terms.
@pytest.mark.parametrize(("loss", "params"), PROGRAMS)
def test_the_diagonal_is_exact(loss, params):
    _, grad, received = computed(loss, params)
    expected_grad, expected = of_jax(loss, params)
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-9, atol=1e-9)


# Finite differences cancel: their rounding is 1e4 of a step of 1e-2, twice.
@pytest.mark.parametrize(("loss", "params"), PROGRAMS)
def test_in_single_precision(loss, params):
    if loss is finite_differences:
        pytest.skip("the differences themselves have three digits")
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    with jax.numpy_dtype_promotion("standard"):
        _, received = jax.jit(hs.hesscale(loss))(params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    _, expected = of_jax(loss, wide)
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(ravel_pytree(received)[0], expected, rtol=0, atol=1e-4 * scale)


def test_the_page_has_every_line():
    text = PAGE.read_text()
    assert [line for line in LINES if line not in text] == []


def test_the_difference_of_two_images_does_not_cancel():
    # The factors are subtracted, not the variances, of which nothing would be left.
    a = normal(20, 8, 6).astype(jnp.float32) * 100
    b = a + 1e-2 * normal(21, 8, 6).astype(jnp.float32)
    w = jnp.zeros(6, jnp.float32)
    _, received = hs.hesscale(lambda w: -jax.nn.log_sigmoid(a @ w - b @ w).sum())(w)
    np.testing.assert_allclose(received, 0.25 * ((a - b) ** 2).sum(0), rtol=1e-5)


def test_a_loop_that_multiplies_what_moves_is_not_affine():
    def loss(w):
        return (scan(lambda y, t: (A @ y + t * w, y @ w), w, STEPS)[1] ** 2).sum()

    report = hs.explain(loss)(x)
    assert [entry.value for entry in report.shared] == ["w, read at every step"]
    assert np.abs(hs.hesscale(loss)(x)[1] / of_jax(loss, x)[1] - 1).max() > 0.01


@pytest.mark.parametrize("rows", [1, 5])
def test_what_cancels_does_not_vary(rows):
    def loss(w):
        z = X[:rows] @ w
        return jnp.sum(jnp.exp(z.at[0].subtract(z[0])) * jnp.sin(z))

    _, grad, received = computed(loss, x)
    expected_grad, expected = of_jax(loss, x)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-9)
    np.testing.assert_allclose(received, expected, rtol=1e-9)


def test_products_of_the_same_factors_are_one_if_each_is_there_as_often():
    f, g = (Factor((2,), frozenset(), lambda read, x=x: jnp.asarray(x)) for x in ([2, 3], [5, 7]))
    row = known(np.arange(2))
    once, twice = (Term(1.0, factors, (row,)) for factors in ((f, f, g), (f, g, g)))

    def entries(term):
        read = Reader(lambda value: value, jnp.float64, lambda *dtypes: jnp.float64)
        return functools.reduce(operator.mul, map(read.numbers, term.factors))

    both = once.plus(once)
    assert both.scale == 2
    np.testing.assert_array_equal(entries(both), entries(once))
    np.testing.assert_array_equal(entries(once.plus(twice)), entries(once) + entries(twice))


def test_of_entries_written_over_one_another_one_counts():
    def loss(w):
        return (jnp.zeros(5).at[np.array([1, 2, 2, 0, 4])].set(X @ w) ** 2).sum()

    _, grad, received = computed(loss, x)
    expected_grad, expected = of_jax(loss, x)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-9)
    np.testing.assert_allclose(received, expected, rtol=1e-9)


@pytest.mark.parametrize("k", range(len(programs.IDENTITIES)))
def test_identities_make_no_difference(k):
    same = programs.IDENTITIES[k]

    def loss(v):
        z = same(A @ v)
        y = same(jnp.tanh(z))
        return jnp.sum(same(same(y * z) / (1 + y**2)))

    with jax.numpy_dtype_promotion("standard"):
        _, _, received = computed(loss, x)
        _, expected = of_jax(loss, x)
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


ELSEWHERE = {
    "transposed": lambda w: jnp.stack(list(w), 1),
    "transposed by parts": lambda w: jnp.concatenate([w[:1].T, w[1:2].T, w[2:].T], 1),
    "another order": lambda w: jnp.concatenate([w[1:], w[:1]]),
    "the second of two": lambda w: jnp.concatenate([w, 2 * w])[3:],
    "the first of two tiles": lambda w: jnp.tile(w, (2, 1))[1:4],
    "less than was padded": lambda w: jnp.pad(w, 1)[:3, :3],
    "reversed along one": lambda w: jnp.flip(jnp.flip(w), 0),
    "a permutation twice": lambda w: w[np.array([1, 2, 0])][np.array([1, 2, 0])],
    "pieces of others": lambda w: jnp.concatenate([w[:1], (2 * w)[1:2], w[2:]]),
}


@pytest.mark.parametrize("move", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_moves_entries_is_no_identity(move):
    def loss(w):
        return jnp.sum(jnp.sin(A[:3, :3] * move(w)))

    value, grad, received = computed(loss, W)
    expected_grad, expected = of_jax(loss, W)
    np.testing.assert_allclose(value, loss(W), rtol=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("of", ["scores", "bias", "layer"])
def test_sparsemax(of, curvature):
    # What reads the scores again, by their label, comes between the two factors of a product.
    params = {
        "scores": {"scores": 0.3 * normal(22, 5, 3)},
        "bias": {"b": jnp.zeros((1, 3))},
        "layer": {"w": 0.3 * normal(22, 4, 3), "b": jnp.zeros((1, 3))},
    }[of]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, grad, received = computed(sparsemax, params, curvature=curvature)
        expected_grad, expected = of_jax(sparsemax, params)
    np.testing.assert_allclose(received, expected, rtol=1e-9)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)


def test_what_is_infinite_does_not_vary():
    def loss(z):
        masked = jnp.where(jnp.arange(4) < 3, z, -jnp.inf)
        return -jnp.log(softmax(masked)[:3]) @ A[0, :3]

    value, grad, received = computed(loss, x)
    expected_grad, expected = of_jax(loss, x)
    np.testing.assert_allclose(value, loss(x))
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


KINKED = {
    "elu": jax.nn.elu,
    "abs": jnp.abs,
    "tanh": jnp.tanh,
    "ldexp": lambda w: jnp.ldexp(w, 1),
    "reciprocal": lambda w: jnp.where(w > 0, w, 1 / w),
}


@pytest.mark.parametrize("f", KINKED.values(), ids=KINKED)
def test_what_its_block_knows_of_a_value_is_not_lost(f):
    # Of a choice between infinities there is no form: its value and ``w`` covary all the same.
    def loss(w):
        return jnp.tanh(A @ (f(w) - w)).sum()

    _, _, received = computed(loss, x)
    np.testing.assert_allclose(received, of_jax(loss, x)[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_images_in_half_precision(dtype):
    def loss(w, b):
        return jnp.mean((jnp.roll(jax.nn.softplus(w), 1) - b) ** 2)

    _, received = hs.hesscale(loss, (0, 1))(x.astype(dtype), x.astype(dtype))
    for of, i in zip(received, (0, 1), strict=True):
        expected = jnp.diag(jax.hessian(loss, i)(x, x))
        rtol = 16 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(of.astype(float), expected, rtol=0, atol=rtol)


@pytest.mark.parametrize("other", ["frozen", "moving"])
def test_it_does_not_depend_on_what_else_is_differentiated(other):
    params = {"down": B, "up": normal(12, 2, 4)}

    def loss(up, down):
        return jax.nn.logsumexp(X @ (A + down @ up), -1).sum()

    argnums = 0 if other == "frozen" else (0, 1)
    _, received = oracle.computed(hs.hesscale(loss, argnums), params["up"], params["down"])
    received = received if other == "frozen" else received[0]
    _, expected = of_jax(lambda up: loss(up, params["down"]), params["up"])
    np.testing.assert_allclose(received.ravel(), expected, rtol=1e-9, atol=1e-12)


def within(report):
    yield report
    for body in (body for step in report.steps for body in step.bodies):
        yield from within(body)


@pytest.mark.parametrize(("loss", "params"), PROGRAMS)
def test_explain_says_that_nothing_is_lost_where_images_meet(loss, params):
    reports = list(within(hs.explain(loss)(params)))
    assert [(report.dropped, report.shared) for report in reports] == [((), ())] * len(reports)


def test_explain_names_what_meets_out_of_reach():
    # The root of a masked logarithm is no image of w: its slopes may be infinite.
    def loss(w):
        return jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 0.0)), 0.0) @ A @ w

    (entry,) = hs.explain(loss)(x).dropped
    assert entry.value == "w"
