"""Programs exported for any size of the batch, any length, or both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, normal, normalised
from flax import linen
from jax import export, lax, nn

import hesscale_jax as hs
from hesscale_jax import _jaxpr


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def dense(p, x, labels):
    return jnp.mean(jnp.tanh(x @ p["in"]) ** 2)


def classifier(p, x, labels):
    return cross_entropy(nn.gelu(normalised(x @ p["in"], -1)) @ p["out"], labels)


def by_label(p, x, labels):
    picked = jnp.take_along_axis(nn.log_softmax(x @ p["in"] @ p["out"]), labels[..., None], -1)
    return -picked.sum() / labels.size


def attention(p, x, labels):
    h = x @ p["in"]
    scores = jnp.einsum("btd,bsd->bts", h, h @ p["mix"])
    seen = jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])[None]
    h = h + jnp.einsum("bts,bsd->btd", nn.softmax(jnp.where(seen[None], scores, -1e9)), h)
    return cross_entropy(h @ p["out"], labels)


def rows(p, x, labels):
    """Batch and length as one axis, and back."""
    h = normalised(x.reshape(-1, x.shape[-1]) @ p["in"], -1)
    return jnp.mean(jnp.tanh(h).reshape(*x.shape[:2], 4).sum(1) ** 2)


def over_time(p, x, labels):
    def step(h, x):
        return jnp.tanh(h @ p["mix"] + x @ p["in"]), None

    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
    return jnp.mean(h**2)


def pooled(p, x, labels):
    h = lax.conv_general_dilated(
        x[:, None] @ p["in"],
        p["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    h = nn.relu(normalised(h, (0, 1, 2)))
    return jnp.mean(linen.max_pool(h, (1, 2), (1, 2)).reshape(x.shape[0], -1) ** 2)


def dropped(p, x, labels):
    h = jnp.tanh(x @ p["in"])
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)
    return jnp.mean(jnp.where(kept, h, 0.0) @ p["out"]) ** 2


def sums(p, x, labels):
    """The batch within a softmax, a mean and a variance: the frame has symbolic axes."""
    h = x @ p["in"]
    return jnp.sum(nn.softmax(h.ravel()) ** 2) + jnp.var(h) + nn.logsumexp(h)


PARAMS = {
    "in": jnp.asarray(normal(3, 4)),
    "mix": jnp.asarray(normal(4, 4, seed=1)) / 2,
    "out": jnp.asarray(normal(4, 5, seed=2)),
    "kernel": jnp.asarray(normal(3, 3, 4, 2, seed=3)),
}
X, LABELS = jnp.asarray(normal(2, 6, 3, seed=4)), jnp.arange(12).reshape(2, 6) % 5


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("shape", ["b, 6", "b, t"])
@pytest.mark.parametrize(
    "loss",
    [dense, classifier, by_label, attention, rows, over_time, pooled, dropped, sums],
    ids=lambda loss: loss.__name__,
)
def test_a_program_for_any_size(loss, shape, curvature):
    if loss is pooled and shape == "b, t":
        pytest.skip("a rest that a window leaves out has no symbolic size")
    if curvature == "gauss_newton" and shape == "b, 6":
        pytest.skip("the other shape has this axis and more")
    batch, length = export.symbolic_shape(shape)
    args = (
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS),
        jax.ShapeDtypeStruct((batch, length, 3), X.dtype),
        jax.ShapeDtypeStruct((batch, length), LABELS.dtype),
    )
    transformed = jax.jit(hs.hesscale(loss, curvature=curvature))
    program = export.export(transformed)(*args)
    received, expected = program.call(PARAMS, X, LABELS), transformed(PARAMS, X, LABELS)
    if loss in (dropped, rows, sums):
        # Images of one leaf meet along a symbolic axis, where they have no form.
        assert_close(received[0], expected[0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(received[1]))
    else:
        assert_close(received, expected)


def test_sizes_are_ordered_and_divided():
    b, t = export.symbolic_shape("b, t")
    one, rows, all_ = _jaxpr.sizes((1, b, 4 * b * t))
    assert 1 == one < rows < all_
    assert _jaxpr.dimension(all_ // rows) == 4 * t
    assert all_ % rows == 0
    assert all(remainder for remainder in (all_ % 3, rows % 2, 12 % rows))
    assert rows * 4 == _jaxpr.sizes((4 * b,))[0] != rows * 3
    assert (4 * rows) // rows == 4
    assert rows != int(rows)
    assert _jaxpr.sizes((2, 3)) == (2, 3)
    assert np.prod(_jaxpr.sizes((b, t))) == int(rows) * int(_jaxpr.sizes((t,))[0])
