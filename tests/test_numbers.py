"""Numbers at the edge: no NaN or infinity where ``jax.hessian`` has none, and half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from cases import normal
from jax import lax, nn

import hesscale_jax as hs

MASK = np.array([[True, True, False], [False, True, False]])
SEGMENTS = np.array([0, 2, 2])  # of four: the second and the fourth are empty
PADDED = np.array([0, 0, 7, 1])  # of three: one is out of bounds, and the last is empty


def exact(loss, x):
    """The diagonal of the dense Hessian."""
    return jnp.diag(jax.hessian(loss)(x).reshape(x.size, x.size)).reshape(x.shape)


def safe_norm(x):
    positive = jnp.sum(x * x) > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, jnp.sum(x * x), 1.0)), 0.0)


def masked_cross_entropy(x):
    # One class is masked with -inf, another with a large negative number.
    logits = jnp.where(MASK, x, -jnp.inf)
    return -jnp.sum(nn.log_softmax(logits)[:, 1])


def softmax_of_copies(copy):
    """Over the copies of positive entries: of a column, there are none."""

    def loss(x):
        copies = copy(x)
        return jnp.sum(nn.softmax(copies, 0, where=copies > 0) ** 2)

    return loss, jnp.array([[0.5, -0.3], [0.2, -0.1]])


# Every loss is such that its Hessian is diagonal, or one block.
def log_where_positive(x):
    return jnp.where(x > 0, jnp.log(x), 0.0)


def lennard_jones(x):
    """The distance of a particle from itself is 0, and its energy is masked."""
    other = ~np.eye(len(x), dtype=bool)
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    sixth = 1 / jnp.sqrt(jnp.where(other, squares, 0.0)) ** 6
    return jnp.where(other, 4 * (sixth**2 - sixth), 0.0).sum() / 2


FINITE = {
    "cumprod of zeros": (lambda x: jnp.sum(jnp.cumprod(x)), jnp.array([2.0, 0.0, 3.0, 0.0, 5.0])),
    "reduce_prod of a zero": (lambda x: jnp.sin(jnp.prod(x)), jnp.array([2.0, 0.0, 3.0])),
    "reduce_prod of zeros": (lambda x: jnp.prod(x), jnp.array([2.0, 0.0, 0.0])),
    "scatter-mul of zero": (
        lambda x: jnp.sum(x.at[np.array([0, 1])].multiply(0.0, unique_indices=True) ** 2),
        normal(3),
    ),
    "segment_sum, empty segments": (
        lambda x: jnp.sum(jax.ops.segment_sum(jnp.exp(x), SEGMENTS, 4)),
        normal(3),
    ),
    "segment norm, padded, the nearest segment empty": (
        lambda x: jnp.sum(x[:2] / jnp.sqrt(jax.ops.segment_sum(x**2, PADDED, 3))[PADDED][:2]),
        normal(4),
    ),
    "segment_max, empty segments": (
        lambda x: jnp.sum(nn.sigmoid(jax.ops.segment_max(x, SEGMENTS, 4))),
        normal(3),
    ),
    "segment_max of ties": (
        lambda x: jnp.sum(jax.ops.segment_max(x, SEGMENTS, 4)[::2] ** 2),
        jnp.array([1.0, 2.0, 2.0]),
    ),
    "cummax of ties": (lambda x: jnp.sum(lax.cummax(x) ** 2), jnp.array([1.0, 2.0, 2.0])),
    "sqrt at zero, behind two wheres": (safe_norm, jnp.zeros(3)),
    "sqrt, behind two wheres": (safe_norm, normal(3)),
    "log at zero, behind two wheres": (
        lambda x: jnp.sum(jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)),
        jnp.array([0.0, 0.3, 2.0]),
    ),
    "softmax, masked": (masked_cross_entropy, normal(2, 3)),
    "softmax, a column masked whole": softmax_of_copies(lambda x: 2 * x),
    "softmax, a column of copies masked whole": softmax_of_copies(lambda x: jnp.tile(x, (2, 1))),
    "softmax, a column of rows masked whole": softmax_of_copies(
        lambda x: jnp.broadcast_to(x[:1], (2, 2))
    ),
    "softmax of large logits": (
        lambda x: -jnp.sum(nn.log_softmax(x)[:, 1]),
        1e4 * normal(2, 3),
    ),
    "logsumexp with -inf": (
        lambda x: jnp.sum(nn.logsumexp(x, axis=1, where=jnp.asarray(MASK))),
        normal(2, 3),
    ),
    "sigmoid cross-entropy of large logits": (
        lambda x: jnp.sum(nn.softplus(x) - x * 0.3),
        jnp.array([-800.0, -3.0, 0.0, 800.0]),
    ),
    "power at zero": (lambda x: jnp.sum(x**3 + x**2 + jnp.abs(x)), jnp.zeros(3)),
    "power of a float at zero": (lambda x: jnp.sum(x**2.0 + x**3.5), jnp.zeros(3)),
    "maximum of ties": (lambda x: jnp.sum(jnp.maximum(x, 0.0) ** 2), jnp.array([-1.0, 1.0])),
    "gather out of bounds": (
        lambda x: jnp.sum(x.at[np.array([1, 7])].get(mode="fill", fill_value=0.0) ** 2),
        normal(3),
    ),
    "log of a masked square, behind one where": (
        lambda x: jnp.sum(jnp.where(x > 0, jnp.log(jnp.where(x > 0, x**2, 0.0)), 0.0)),
        jnp.array([0.7, -0.4, 0.0]),
    ),
    "log of relu": (lambda x: jnp.sum(log_where_positive(nn.relu(x))), jnp.array([0.7, -0.4, 0.0])),
    "entropy of relu": (
        lambda x: jnp.sum(nn.relu(x) * log_where_positive(nn.relu(x))),
        jnp.array([0.7, -0.4, 0.0]),
    ),
    "log of a clamped value": (
        lambda x: jnp.sum(log_where_positive(lax.clamp(0.0, x, 1.0))),
        jnp.array([0.7, -0.4, 1.3]),
    ),
    "a power of masked distances": (lennard_jones, normal(3, 2)),
    "no entries": (lambda x: jnp.sum(x[:0] ** 2) + jnp.sum(x**2), normal(3)),
}


@pytest.mark.parametrize("name", FINITE)
def test_finite_where_the_hessian_is(name):
    loss, x = FINITE[name]
    grad, diagonal = hs.hesscale(loss)(x)
    expected = exact(loss, x)
    assert jnp.isfinite(expected).all()
    np.testing.assert_allclose(grad, jax.grad(loss)(x), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-9, atol=1e-12)


# A choice, an infinite slope where it is 0, and images of both that meet
CHOICES = {
    "relu": nn.relu,
    "clamp": lambda x: lax.clamp(0.0, x, 1.0),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "where of constants": lambda x: jnp.where(np.array([True, False, True, True]), x, 0.0),
    "sorted": lambda x: nn.relu(jnp.sort(x)),
    "product": lambda x: nn.relu(x) * np.array([1.0, 1.0, 0.5, 2.0]),
}
MEETINGS = {
    "copies": lambda v, c: jnp.sum(jnp.broadcast_to(v[:, None], (4, 3))) + jnp.sum((v + c) ** 2),
    "reversed": lambda v, c: jnp.sum((v + c[::-1]) ** 2),
    "rolled": lambda v, c: jnp.sum((jnp.roll(c, 1) - v) ** 2),
    "at positions": lambda v, c: jnp.sum((v + c[np.array([1, 1, 0, 3])]) ** 2),
    "side by side": lambda v, c: jnp.sum((jnp.concatenate([v, c]) - jnp.tile(c, 2)) ** 2),
    "product": lambda v, c: jnp.sum(v * c[::-1]),
    "sums": lambda v, c: jnp.sum((jnp.cumsum(c) + v) ** 2),
    "root of a sum": lambda v, c: jnp.sum(v) + jnp.sqrt(jnp.sum(c) + jnp.sum(c[::-1] ** 2)),
}


def of_each(losses, x):
    """The gradient and the diagonal of each loss, each in a parameter of its own, and the exact."""

    def loss(xs):
        return sum(fun(x) for fun, x in zip(losses, xs, strict=True))

    def computed(xs):
        diagonals = [exact(fun, x) for fun, x in zip(losses, xs, strict=True)]
        with programs.whole():  # They are many losses, of small programs each.
            return hs.hesscale(loss)(xs), (jax.grad(loss)(xs), diagonals)

    return jax.tree.map(np.stack, jax.jit(computed)([x] * len(losses)), is_leaf=is_list)


def is_list(x):
    return isinstance(x, list)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_choice_discards_stays_away_where_its_images_meet(choice):
    def of_meeting(meeting):
        def loss(x):
            c = CHOICES[choice](x)
            return meeting(log_where_positive(c), c)

        return loss

    x = jnp.array([0.7, -0.4, 0.2, 0.9])
    (grads, diagonals), expected = of_each(list(map(of_meeting, MEETINGS.values())), x)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(grads, expected[0], rtol=1e-9, atol=1e-12)
    assert np.isfinite(diagonals).all()
    # Of what a choice lets through, images do not meet exactly if slopes may be infinite.
    np.testing.assert_allclose(diagonals[:, 1], expected[1][:, 1], rtol=1e-9, atol=1e-9)


# Sums of what a choice closes, all of it or some
SUMS = {
    "segments": lambda c: jax.ops.segment_sum(c, np.array([0, 0, 1, 1]), 3),
    "added": lambda c: jnp.zeros((2, 2)).at[np.array([1, 1, 0, 0]), np.array([0, 0, 1, 0])].add(c),
    "so far": jnp.cumsum,
    "from here": lambda c: lax.cumsum(c[::-1], reverse=True),
    "convolution": lambda c: jnp.convolve(c, np.array([0.5, 2.0])),
    "steps": lambda c: lax.scan(lambda s, x: ((s + x) / 2, s + x), 0.0, c)[1],
    "spectrum": lambda c: jnp.fft.irfft(jnp.fft.rfft(c[:2])),
    "two ways": lambda c: jnp.sum(c[:2] * np.array([0.5, 2.0])) + jnp.sum(c[1::-1] * jnp.pi),
    "with one": lambda c: jnp.vdot(c[:2], np.array([0.5, 2.0])) + c[0],
    "of neighbours": lambda c: c + jnp.roll(c, 1),
    "of pairs": lambda c: c[:, None] + c[None, np.array([1, 0])],
    "of rows": lambda c: jnp.sum(jnp.stack([c, jnp.roll(c, 1)]), 0),
    "of known rows": lambda c: np.array([[1.0, 2.0], [0.5, 1.0]]) @ c[:2] + c[1::-1],
    "sorted": lambda c: jnp.cumsum(jnp.sort(c)),
    "at positions": lambda c: jnp.cumsum(c)[jnp.argsort(c)],
}


@pytest.mark.parametrize("choice", ["relu", "where", "where of constants", "sorted"])
def test_what_is_added_up_behind_a_choice_stays_away(choice):
    def of_sum(add_up):
        def loss(w):
            c = CHOICES[choice](np.array([1.0, -2.0, 0.5, 1.0]) * w[0] + w[1:])
            return jnp.sum(log_where_positive(add_up(c)))

        return loss

    w = jnp.array([0.3, -1.4, 0.2, 0.1, 0.5])
    (grads, diagonals), expected = of_each(list(map(of_sum, SUMS.values())), w)
    # With a mask that is known, entries of the spectrum are left with one of both, and 0 * inf.
    finite = np.isfinite(expected[1]).all(1)
    assert finite.sum() >= len(SUMS) - 1
    np.testing.assert_allclose(grads, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diagonals[finite], expected[1][finite], rtol=1e-9, atol=1e-9)


# What a choice closes of a last layer's images, where a value of the program is infinite
ROWS = np.array([[1.0, 0.5], [-1.0, 0.3]])
FIRST = np.array([True, False])


def closed(fun):
    """What ``fun`` makes of units that are all dead."""
    return lambda z: fun(nn.relu(z - 5))


INFINITE = {
    "entropy": lambda z: jnp.where(FIRST, (a := jnp.where(FIRST, jnp.exp(z), 0)) * jnp.log(a), 0),
    "entropy of relu": lambda z: jnp.where((a := nn.relu(z)) > 0, a * jnp.log(a), 0.0),
    "two powers": lambda z: jnp.where((a := nn.relu(z)) > 0, a * a**-0.5, 0.0),
    "exponential": lambda z: jnp.where(FIRST, jnp.exp(a := jnp.where(FIRST, z, -jnp.inf)) * a, 0.0),
    "square": lambda z: jnp.where(FIRST, jnp.where(FIRST, z, -jnp.inf) ** 2, 0.0),
    "normalised": closed(lambda a: jnp.where((s := a.sum()) > 0, a / s, 0.0)),
    "by a norm": closed(lambda a: jnp.where((s := jnp.linalg.norm(a)) > 0, a / s, 0.0)),
    "by a mean": closed(lambda a: jnp.where((s := jnp.mean(a**2)) > 0, a * lax.rsqrt(s), 0.0)),
    "by another": lambda z: jnp.where((a := nn.relu(z)) > 0, a / a[::-1], 0.0),
    "root": closed(jnp.sqrt),
    "root, added up": closed(lambda a: jnp.where(FIRST, jnp.cumsum(jnp.sqrt(a)) ** 2, 0.0)),
    "norms": closed(lambda a: jnp.linalg.norm(a[:, None] * np.ones((1, 2)), axis=1)),
    "log of roots": closed(lambda a: log_where_positive(jnp.sqrt(a) + jnp.sqrt(a)[::-1])),
}  # fmt: skip
READERS = {
    "difference": lambda b: (b[0] - b[1]) ** 2,
    "sums": lambda b: jnp.sum(jnp.cumsum(b) ** 2),
    "by ids": lambda b: jax.ops.segment_sum(b, np.array([1, 1]), 3)[1] ** 2,
    "bilinear": lambda b: b @ ROWS @ b,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_infinite_behind_a_choice_stays_away(reader):
    losses = [lambda w, f=f: READERS[reader](f(ROWS @ w)) for f in INFINITE.values()]
    (grads, diagonals), expected = of_each(losses, jnp.array([0.7, -0.4]))
    finite = np.isfinite(expected[1]).all(1)
    assert finite.sum() >= len(INFINITE) - 2
    np.testing.assert_allclose(grads, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diagonals[finite], expected[1][finite], rtol=1e-9, atol=1e-9)


# Entries that no parameter reaches, beside one that some do
FILLS = {
    "pad": lambda x: jnp.pad(x[:1], (0, 1)),
    "reversed": lambda x: jnp.pad(x[:1], (1, 0))[::-1],
    "taken": lambda x: jnp.take(x, np.array([0, 7])),
    "at": lambda x: x.at[np.array([0, 7])].get(mode="fill", fill_value=0.0),
    "set": lambda x: jnp.zeros(2).at[0].set(x[0]),
    "update": lambda x: lax.dynamic_update_slice(jnp.zeros(2), x[:1], (0,)),
    "overwritten": lambda x: x[:2].at[1].set(np.nan),
    "concatenate": lambda x: jnp.concatenate([x[:1], jnp.zeros(1)]),
    "stack": lambda x: jnp.stack([x[0], 0.0]),
    "segments": lambda x: jax.ops.segment_sum(x, np.array([0, 0, 0]), 2),
    "added": lambda x: jnp.zeros(2).at[np.array([0, 0, 0])].add(x),
    "diagonal": lambda x: jnp.diag(x[:2])[0],
    "layer": lambda x: jnp.pad(jnp.exp(np.ones((1, 3)) @ x), (0, 1)),
}
SINGULAR = {"log": jnp.log, "root": jnp.sqrt, "inverse": lambda x: 1 / x, "sine": jnp.sin}


@pytest.mark.parametrize("fill", FILLS)
def test_what_is_filled_in_and_discarded_leaves_nothing(fill):
    def of(singular):
        def loss(x):
            kept = jnp.where(np.array([True, False]), singular(FILLS[fill](x)), 0.0)
            return jnp.sum(kept) ** 2

        return loss

    received, expected = of_each(list(map(of, SINGULAR.values())), jnp.array([0.7, 0.4, 0.2]))
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


def test_cumlogsumexp_from_minus_infinity():
    # jax.hessian gives NaN here: the expected values are those without the entries of -inf.
    def loss(x):
        return jnp.sum(nn.sigmoid(lax.cumlogsumexp(jnp.where(np.arange(4) < 2, -jnp.inf, x))))

    x = normal(4)
    _, diagonal = hs.hesscale(loss)(x)
    _, expected = hs.hesscale(lambda x: jnp.sum(nn.sigmoid(lax.cumlogsumexp(x))))(x[2:])
    np.testing.assert_allclose(diagonal, jnp.concatenate([jnp.zeros(2), expected]), rtol=1e-9)


# Half precision: spreads are carried in float32, or in float64 beside it

HALF = (jnp.float16, jnp.bfloat16)
FLOATS = (*HALF, jnp.float32, jnp.float64)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight", [300.0, 1e-5])
def test_squares_beyond_half_precision(dtype, weight):
    # 300 squared is more than float16 holds, and 1e-5 squared less.
    w = jnp.full((1, 2), weight, dtype)

    def loss(x, scale):
        return jnp.sum((x @ w).astype(jnp.float32) ** 2) * scale

    x = jnp.full((1, 1), 1e-3, dtype)
    # Scaled so that the result is in range. Each part of the sum is rounded to half precision.
    square = float(w[0, 0]) ** 2
    diagonal = hs.hesscale(loss)(x, jnp.float32(1 / square))[1]
    assert diagonal.dtype == dtype
    np.testing.assert_allclose(np.float32(diagonal), 4.0, rtol=1e-2)


SHAPE = (4, 3)
FAMILIES = {
    "pointwise": lambda x, w: jnp.tanh(x) * w / (1 + w * w) + jnp.log1p(x * x),
    "block": lambda x, w: nn.softmax(x * w),
    "reduction": lambda x, w: x.max(1) * w.sum(1),
    "dot_general": lambda x, w: x @ w.T,
    "conv_general_dilated": lambda x, w: lax.conv(x[None], w[:2, None].repeat(4, 1), (1,), "SAME"),
    "selection": lambda x, w: jnp.concatenate([jnp.sort(x, 1), w[::-1]], 1)[:, 2:5],
    "cumulative": lambda x, w: lax.cumlogsumexp(x, 1) * lax.cummax(w, 0),
    "product": lambda x, w: jnp.cumprod(x, 1) * jnp.prod(w, 0)[None],
    "scatter": lambda x, w: x.at[np.array([1, 1])].add(w[:2]).at[np.array([0, 2])].max(w[2:]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [*HALF, jnp.float32])
def test_results_in_the_dtype_of_the_parameter(name, dtype):
    def loss(x, w):
        return jnp.sum(jnp.sin(FAMILIES[name](x, w).astype(jnp.float64)))

    x, w = 1 + 0.3 * normal(*SHAPE), normal(*SHAPE, seed=1)
    x, w = (v.astype(dtype) for v in (x, w))
    received = jax.jit(hs.hesscale(loss, (0, 1)))(x, w)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(received))
    double = x.astype(jnp.float64), w.astype(jnp.float64)
    expected = jax.jit(hs.hesscale(loss, (0, 1)))(*double)
    # The values are rounded to the dtype at each step.
    tolerance = 30 * float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda a, b: close(a, b, tolerance), received, expected)


def close(a, b, tolerance):
    b = np.asarray(b)
    np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("of_x", FLOATS)
@pytest.mark.parametrize("of_w", FLOATS)
def test_mixtures_of_dtypes(of_x, of_w):
    def loss(x, w):
        y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        y = lax.reduce_precision(y, 8, 23) + lax.sort((x, w), num_keys=1)[1].astype(y.dtype).sum()
        return jnp.mean(nn.softplus(y) * x.astype(y.dtype).sum(1)[:, None])

    x, w = normal(*SHAPE).astype(of_x), normal(*SHAPE, seed=1).astype(of_w)
    received = jax.jit(hs.hesscale(loss, (0, 1)))(x, w)
    assert [leaf.dtype for leaf in received[1]] == [of_x, of_w]
    single = x.astype(jnp.float32), w.astype(jnp.float32)
    expected = jax.jit(hs.hesscale(loss, (0, 1)))(*single)
    tolerance = 30 * max(float(jnp.finfo(dtype).eps) for dtype in (of_x, of_w, jnp.float32))
    jax.tree.map(lambda a, b: close(a, b, tolerance), received, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("fun", "x"),
    [
        (jnp.log, 1e-3),
        (jnp.log1p, 300.0),
        (jnp.sqrt, 1e-3),
        (lax.rsqrt, 1e-3),
        (lambda x: 1 / x, 300.0),
        (lambda x: 1 / x, 1e-2),
        (lambda x: x**-1, 250.0),
        (lambda x: jnp.power(x, -1.5), 100.0),
    ],
)
def test_second_derivatives_beyond_half_precision(dtype, fun, x):
    x = jnp.asarray(x, dtype)
    expected = jax.hessian(fun)(x.astype(jnp.float64))

    def loss(x, scale):
        return (fun(x).astype(jnp.float32) * scale).astype(jnp.float32)

    # What is passed back is in half precision: scaled so that this and the result are in range.
    scale = jnp.clip(1 / jnp.abs(expected), 1e-3, 3e4)
    _, diagonal = hs.hesscale(loss)(x, scale.astype(jnp.float32))
    np.testing.assert_allclose(np.float64(diagonal), expected * scale, rtol=2e-2)


def test_an_algorithm_for_half_precision_factors():
    def loss(x, w):
        precision = lax.DotAlgorithmPreset.BF16_BF16_F32
        return jnp.sum(lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32) ** 2)

    x, w = normal(2, 3).astype(jnp.bfloat16), normal(3, 2).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own derivative needs it
        _, diagonal = hs.hesscale(loss)(x, w)
    expected = np.broadcast_to(2 * (np.float32(w) ** 2).sum(1), (2, 3))
    np.testing.assert_allclose(np.float32(diagonal), expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.log(jnp.sum(jnp.exp(8 * x))),
        lambda x: jnp.sum(jnp.square(jnp.tanh(3 * x).astype(jnp.float32))),
        lambda x: jnp.sum(jnp.square(nn.sigmoid(6 * x).astype(jnp.float32))),
    ],
    ids=("exp", "tanh", "logistic"),
)
def test_slopes_of_saturated_entries_in_half_precision(dtype, fun):
    x = jnp.array([0.7, -0.4, 1.0], dtype)
    with jax.numpy_dtype_promotion("standard"):
        _, diagonal = hs.hesscale(fun)(x)
        expected = np.diag(jax.hessian(fun)(x.astype(jnp.float64)))
    # The values between are rounded to half precision; slopes that lose theirs are off by a half.
    np.testing.assert_allclose(
        np.float64(diagonal), expected, rtol=50 * float(jnp.finfo(dtype).eps)
    )
