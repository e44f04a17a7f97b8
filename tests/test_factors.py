"""Factors of layers: each against sums over examples, and the diagonal against dense blocks."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from cases import assert_close, normal
from jax import lax
from jax.sharding import PartitionSpec as P

import hesscale_jax as hs

# float64, sums of some hundred terms: 1e-10 is far above rounding and far below any error.
RTOL = 1e-10


class Layer(NamedTuple):
    """A layer, written with its inputs as rows.

    Attributes:
      shape: Of the leaf.
      stack, inputs, outputs: Its axes of each kind.
      apply: ``(w, x, e) -> (y, rows)`` with ``e`` of shape ``(count, N, m)`` added to the outputs,
        and rows of shape ``(count, N, n)``.
      data: The shape of ``x``.
      examples: N.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    apply: Callable[..., Any]
    data: tuple[int, ...]
    examples: int

    def sizes(self, axes):
        return tuple(self.shape[i] for i in axes)


def plain(w, x, e):
    return x @ w + e[0], x[None]


def transposed(w, x, e):
    return (w @ x.T).T + e[0], x[None]


def from_the_left(w, x, e):
    return (w.T @ x.T).T + e[0], x[None]


def cast(w, x, e):
    return lax.dot_general(x, w.astype(jnp.float64), (((1,), (0,)), ((), ()))) + e[0], x[None]


def reshaped(w, x, e):
    return x @ w.reshape(6, 4) + e[0], x[None]


def transposed_and_reshaped(w, x, e):
    # Leaf (outputs, 2, 3): its inputs are read in another order.
    y = x @ jnp.transpose(w, (2, 1, 0)).reshape(6, 4)
    rows = x.reshape(-1, 3, 2).transpose(0, 2, 1).reshape(-1, 6)
    return y + e[0], rows[None]


def several_axes(w, x, e):
    y = lax.dot_general(x, w, (((1, 2), (0, 1)), ((), ())))
    return y + e[0].reshape(y.shape), x.reshape(1, -1, 6)


def axes_in_another_order(w, x, e):
    y = jnp.einsum("nab,bca->nc", x, w)
    return y + e[0], x.transpose(0, 2, 1).reshape(1, -1, 6)


def heads(w, x, e):
    y = jnp.einsum("btd,dhk->bthk", x, w)
    return y + e[0].reshape(y.shape), x.reshape(1, -1, x.shape[-1])


def out_projection(w, x, e):
    y = jnp.einsum("bthk,hkd->btd", x, w)
    return y + e[0].reshape(y.shape), x.reshape(1, -1, 6)


def experts(w, x, e):
    y = jax.vmap(jnp.matmul)(x, w)
    return y + e, x


def experts_in_the_middle(w, x, e):
    y = jnp.einsum("eni,ieo->eno", x, w)
    return y + e, x


def patches(x, window, strides, padding, dilation):
    """By slices, not by the convolution that the library takes."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    span = [(k - 1) * dilation + 1 for k in window]
    rows = []
    for i in range(0, x.shape[1] - span[0] + 1, strides):
        for j in range(0, x.shape[2] - span[1] + 1, strides):
            patch = x[:, i : i + span[0] : dilation, j : j + span[1] : dilation]
            rows.append(patch.reshape(x.shape[0], -1))
    return jnp.stack(rows, 1).reshape(-1, rows[0].shape[-1])


def convolution(strides=1, padding=(0, 0), dilation=1):
    def apply(w, x, e):
        y = lax.conv_general_dilated(
            x,
            w,
            (strides, strides),
            (padding, padding),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        rows = patches(x, w.shape[:2], strides, padding, dilation)
        return y + e[0].reshape(y.shape), rows[None]

    return apply


def channels_first(w, x, e):
    y = lax.conv_general_dilated(x, w, (1, 1), "VALID")  # NCHW, OIHW
    rows = patches(x.transpose(0, 2, 3, 1), w.shape[2:], 1, (0, 0), 1)
    rows = rows.reshape(-1, *w.shape[2:], w.shape[1]).transpose(0, 3, 1, 2).reshape(len(rows), -1)
    e = e[0].reshape(y.shape[0], *y.shape[2:], y.shape[1]).transpose(0, 3, 1, 2)
    return y + e, rows[None]


def scanned(w, x, e):
    def step(y, layer):
        w, e = layer
        return jnp.tanh(y @ w + e), y

    return lax.scan(step, x, (w, e))


def scanned_rematerialised(w, x, e):
    @jax.checkpoint
    def step(y, layer):
        w, e = layer
        return jnp.tanh(y @ w.T + e), y

    return lax.scan(step, x, (w, e))


def scanned_in_groups(w, x, e):
    def step(y, layer):
        return jnp.tanh(y @ layer[0] + layer[1]), y

    def group(y, layers):
        return lax.scan(step, y, layers)

    y, rows = lax.scan(group, x, (w.reshape(2, 2, 4, 4), e.reshape(2, 2, *e.shape[1:])))
    return y, rows.reshape(4, -1, 4)


def recurrent(w, x, e):
    def step(y, e):
        return jnp.tanh(y @ w + e), y

    y, rows = lax.scan(step, x, e.reshape(3, -1, 4))
    return y, rows.reshape(1, -1, 4)


def twice(w, x, e):
    y = jnp.tanh(x @ w + e[0, :5])
    return y @ w + e[0, 5:], jnp.concatenate([x, y])[None]


def in_a_branch(w, x, e):
    y = lax.cond(x.sum() > -1e9, lambda w: x @ w, lambda w: jnp.zeros((5, 4)), w)
    return y + e[0], x[None]


def under_jit_and_checkpoint(w, x, e):
    return jax.jit(jax.checkpoint(lambda w, x: x @ w))(w, x) + e[0], x[None]


def one_output(w, x, e):
    return (x @ w)[:, None] + e[0], x[None]


LAYERS = {
    "plain": Layer((6, 4), (), (0,), (1,), plain, (5, 6), 5),
    "transposed": Layer((4, 6), (), (1,), (0,), transposed, (5, 6), 5),
    "from the left": Layer((6, 4), (), (0,), (1,), from_the_left, (5, 6), 5),
    "cast": Layer((6, 4), (), (0,), (1,), cast, (5, 6), 5),
    "reshaped": Layer((2, 3, 2, 2), (), (0, 1), (2, 3), reshaped, (5, 6), 5),
    "transposed and reshaped": Layer(
        (4, 2, 3), (), (1, 2), (0,), transposed_and_reshaped, (5, 6), 5
    ),
    "several axes": Layer((2, 3, 4), (), (0, 1), (2,), several_axes, (5, 2, 3), 5),
    "axes in another order": Layer(
        (3, 4, 2), (), (0, 2), (1,), axes_in_another_order, (5, 2, 3), 5
    ),
    "heads": Layer((6, 2, 3), (), (0,), (1, 2), heads, (2, 3, 6), 6),
    "out projection": Layer((2, 3, 4), (), (0, 1), (2,), out_projection, (2, 3, 2, 3), 6),
    "experts": Layer((3, 6, 4), (0,), (1,), (2,), experts, (3, 5, 6), 5),
    "experts in the middle": Layer(
        (6, 3, 4), (1,), (0,), (2,), experts_in_the_middle, (3, 5, 6), 5
    ),
    "convolution": Layer((2, 3, 2, 4), (), (0, 1, 2), (3,), convolution(), (2, 4, 5, 2), 18),
    "convolution, strides": Layer(
        (2, 2, 2, 3), (), (0, 1, 2), (3,), convolution(2, (1, 0)), (2, 4, 5, 2), 12
    ),
    "convolution, dilated": Layer(
        (2, 2, 1, 3), (), (0, 1, 2), (3,), convolution(1, (1, 1), 2), (1, 4, 4, 1), 16
    ),
    "channels first": Layer((4, 2, 2, 2), (), (1, 2, 3), (0,), channels_first, (2, 2, 3, 4), 12),
    "scanned": Layer((3, 4, 4), (0,), (1,), (2,), scanned, (5, 4), 5),
    "scanned, rematerialised": Layer(
        (3, 4, 4), (0,), (2,), (1,), scanned_rematerialised, (5, 4), 5
    ),
    "scanned in groups": Layer((4, 4, 4), (0,), (1,), (2,), scanned_in_groups, (5, 4), 5),
    "recurrent": Layer((4, 4), (), (0,), (1,), recurrent, (5, 4), 15),
    "twice": Layer((4, 4), (), (0,), (1,), twice, (5, 4), 10),
    "in a branch": Layer((6, 4), (), (0,), (1,), in_a_branch, (5, 6), 5),
    "jit and checkpoint": Layer((6, 4), (), (0,), (1,), under_jit_and_checkpoint, (5, 6), 5),
    "one output": Layer((6,), (), (0,), (), one_output, (5, 6), 5),
}


def counts(layer: Layer) -> tuple[int, int, int]:
    groups = layer.stack, layer.inputs, layer.outputs
    return tuple(int(np.prod(layer.sizes(axes), dtype=int)) for axes in groups)


def losses(layer: Layer):
    """The loss of the leaf, and the same with what is added to the outputs of its products."""
    count, _, m = counts(layer)

    def of_both(w, e, x):
        y, rows = layer.apply(w, x, e)
        return jnp.mean(jnp.sin(y) ** 2 + jax.nn.softmax(y)), rows

    def of_leaf(w, x):
        return of_both(w, jnp.zeros((count, layer.examples, m)), x)[0]

    return of_leaf, of_both


def expected(layer: Layer, w, x, curvature, basis):
    """By sums over examples, of the curvature that HesScale has in each output."""
    count, _, m = counts(layer)
    _, of_both = losses(layer)
    e = jnp.zeros((count, layer.examples, m))
    (_, h), rows = jax.jit(hs.hesscale(of_both, 1, has_aux=True, curvature=curvature))(w, e, x)
    blocks = jnp.einsum("kni,knl,knj->kjil", rows, rows, h)  # One for each output.
    along = jnp.einsum("kia,kjil,kla->kaj", basis, blocks, basis)
    return along, blocks.sum(1), h.sum(1), jnp.einsum("kni,knl->kil", rows, rows)


BY_HESSIAN = ("plain", "convolution", "scanned", "twice")


@pytest.mark.parametrize(
    ("name", "curvature"),
    [*((name, "gauss_newton") for name in LAYERS), *((name, "hessian") for name in BY_HESSIAN)],
)
def test_factors_of_a_layer(name, curvature):
    layer = LAYERS[name]
    loss, _ = losses(layer)
    w, x = normal(*layer.shape) / 2, normal(*layer.data, seed=1)
    count, n, m = counts(layer)
    (layout,) = jax.tree.leaves(hs.layouts(loss)(w, x))
    assert (layout.stack, layout.inputs, layout.outputs) == layer[1:4]
    assert layout.factored

    basis, of_outputs = (
        jnp.linalg.qr(normal(count, size, size, seed=seed))[0] for seed, size in ((2, n), (3, m))
    )
    stack = layer.sizes(layer.stack)
    given = hs.Bases(basis.reshape(*stack, n, n), of_outputs.reshape(*stack, m, m))
    along, inputs, outputs, unweighted = expected(layer, w, x, curvature, basis)
    value, (grad, factors) = jax.jit(hs.value_and_factors(loss, curvature=curvature, bases=given))(
        w, x
    )
    assert_close(value, loss(w, x))
    assert_close(grad, jax.grad(loss)(w, x))
    assert factors.hess_diag.shape == layer.shape
    assert factors.inputs.shape == (*layer.sizes(layer.stack), n, n)
    assert factors.outputs.shape == layer.sizes((*layer.stack, *layer.outputs))
    # Of a block for each output, in their basis: diag(W^T B W), B diagonal.
    close(layout.matrices(factors.hess_diag), jnp.einsum("kaj,kjb->kab", along, of_outputs**2))
    close(factors.inputs.reshape(inputs.shape), inputs)
    close(factors.outputs.reshape(outputs.shape), outputs)
    assert_close(layout.leaf(layout.matrices(grad)), grad)

    plain = hs.value_and_factors(loss, curvature=curvature, weighted=False)
    _, (_, factors) = jax.jit(plain)(w, x)
    close(factors.inputs.reshape(inputs.shape), unweighted)
    with programs.limits(MOST_DEEP=-1):  # Forms would follow two uses of a small matrix.
        close(factors.hess_diag, jax.jit(hs.hesscale(loss, curvature=curvature))(w, x)[1])
    _, (_, factors) = jax.jit(hs.value_and_factors(loss, curvature=curvature, bases=given.inputs))(
        w, x
    )
    close(layout.matrices(factors.hess_diag), along)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RTOL * np.abs(expected).max())


def test_which_layers_are_last():
    def loss(p, x):
        h = jnp.tanh(x @ p["hidden"] + p["bias"])
        policy, value = h @ p["policy"], h @ p["value"]
        return jnp.mean(jax.nn.log_softmax(policy)[:, 0] + value[:, 0] ** 2)

    p = {
        "hidden": normal(3, 4),
        "bias": normal(1, 4),
        "policy": normal(4, 2),
        "value": normal(4, 1),
    }
    layouts = hs.layouts(loss)(p, normal(5, 3))
    assert [name for name in p if layouts[name].last] == ["policy", "value"]
    assert not layouts["bias"].factored
    assert layouts["value"].outputs == (1,)


def embedded(w, x):
    return jnp.tanh(w[jnp.array([0, 2, 2])])


OTHERS = {
    "embedding": (embedded, "'gather' reads it"),
    "tied": (lambda w, x: embedded(w, x) @ w, "'gather' reads it"),
    "bias": (lambda w, x: x[:4] + w, "'add' reads it"),
    "penalty": (lambda w, x: x @ w + jnp.sum(w**2), "reads it"),
    "scaled": (lambda w, x: x @ (0.5 * w), "'mul' reads it"),
    "both axes": (lambda w, x: jnp.tanh(x @ w) @ w.T, "over different axes"),
    "outer": (lambda w, x: jnp.einsum("n,io->nio", x[0], w), "over none of its axes"),
    "itself": (lambda w, x: w.T @ w, "reads it|multiplied by itself"),
    "carried": (
        lambda w, x: lax.scan(lambda w, _: (jnp.tanh(x @ w)[:4], None), w, length=2)[0],
        "hands it",
    ),
    "grouped": (
        lambda w, x: lax.conv_general_dilated(
            x[:2, :, None], w[:, :2, None], (1,), "SAME", feature_group_count=2
        ),
        "reads it|grouped",
    ),
    "unused": (lambda w, x: x, "nothing"),
    "half of an axis": (
        lambda w, x: jnp.einsum("abd,nb->nad", w.reshape(2, 2, 4), x[:, :2]),
        "a part of axis 0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_leaves_keep_their_coordinates(name):
    apply, reason = OTHERS[name]

    def loss(w, x):
        return jnp.mean(jnp.tanh(apply(w, x)) ** 2)

    w, x = normal(4, 4), normal(5, 4, seed=1)
    layout = hs.layouts(loss)(w, x)
    assert not layout.factored
    assert re.search(reason, layout.reason), layout.reason
    _, (grad, factors) = jax.jit(hs.value_and_factors(loss))(w, x)
    assert factors.inputs is None
    assert factors.outputs is None
    expected = jax.jit(hs.hesscale(loss, curvature="gauss_newton"))(w, x)
    assert_close((grad, factors.hess_diag), expected)
    with pytest.raises(ValueError, match="has no basis"):
        hs.value_and_factors(loss, bases=jnp.eye(4))(w, x)


def test_bad_bases():
    def loss(p, x):
        return jnp.mean((x @ p["w"]) ** 2)

    p, x = {"w": normal(4, 3)}, normal(5, 4)
    with pytest.raises(ValueError, match=r"of shape \(4, 4\), got \(3, 3\)"):
        hs.value_and_factors(loss, bases={"w": jnp.eye(3)})(p, x)
    with pytest.raises(ValueError, match=r"outputs of a leaf.* of shape \(3, 3\), got \(4, 4\)"):
        hs.value_and_factors(loss, bases={"w": hs.Bases(outputs=jnp.eye(4))})(p, x)
    with pytest.raises(ValueError, match="different structure"):
        hs.value_and_factors(loss, bases={"v": jnp.eye(4)})(p, x)
    with pytest.raises(ValueError, match="curvature must be"):
        hs.value_and_factors(loss, curvature="fisher")


def test_too_many_inputs_have_no_second_moment():
    def loss(p, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)

    p, x = {"a": normal(5, 3), "b": normal(3, 2, seed=1)}, normal(4, 5, seed=2)
    _, (_, whole) = hs.value_and_factors(loss)(p, x)
    _, (_, factors) = hs.value_and_factors(loss, max_inputs=4)(p, x)
    assert factors["a"].inputs is None
    assert_close(factors | {"a": None}, whole | {"a": None})
    assert_close(factors["a"][::2], whole["a"][::2])


def test_bases_beside_none():
    def loss(p, x):
        return jnp.sum((x @ p["w"]) ** 2)

    p, basis = {"w": normal(3, 2), "bias": None}, jnp.linalg.qr(normal(3, 3, seed=1))[0]
    bases = {"w": basis, "bias": None}
    x = normal(5, 3, seed=2)
    _, (_, factors) = hs.value_and_factors(loss, bases=bases)(p, x)
    assert factors["bias"] is None
    along = 2 * jnp.sum((x @ basis) ** 2, axis=0)
    assert_close(factors["w"].hess_diag, jnp.stack([along, along], axis=1))


def test_explain_names_matrices_without_a_basis():
    def loss(p, x):
        h = jnp.tanh(p["tokens"][jnp.array([0, 1])] @ p["w"] + p["bias"])
        return jnp.mean((h @ p["tokens"].T) ** 2)

    p = {"tokens": normal(4, 3), "w": normal(3, 3), "bias": normal(1, 3)}
    report = hs.explain(loss)(p, None)
    found = dict(report.layouts)
    assert found["p['w']"].inputs == (0,)
    _, _, listed = str(report).partition("without a basis of its inputs:")
    assert "p['tokens']" in listed
    assert "'gather' reads it" in listed
    assert "p['w']" not in listed


def test_layouts_of_shapes_alone():
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    w, x = jax.ShapeDtypeStruct((4, 3), "float32"), jax.ShapeDtypeStruct((5, 4), "float32")
    assert hs.layouts(loss)(w, x) == hs.Layout((4, 3), (), (0,), (1,), last=True)
    assert hs.layouts(loss, (0, 1))(w, x)[1].inputs == (1,)


def test_arguments_that_are_no_arrays():
    def loss(w, x, power, how="tanh"):
        return jnp.mean(getattr(jnp, how)(x @ w) ** power) if power > 1 else jnp.sum(x)

    found = hs.layouts(loss)(normal(4, 3), normal(5, 4), 2, how="sin")
    assert found.inputs == (0,)


@pytest.mark.parametrize("weighted", [True, False])
def test_shard_map(weighted):
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def plain(w1, w2, x):
        return jnp.mean((jnp.tanh(x @ w1) @ w2) ** 3)

    def on_each(w1, w2, x):
        y = lax.psum(jnp.tanh(x @ w1) @ w2, "m")
        return lax.pmean(jnp.mean(y**3), "d")

    specs = P(None, "m"), P("m", None), P("d", None)
    sharded = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P())
    args = normal(5, 6), normal(6, 3), normal(8, 5)
    columns, rows = hs.layouts(sharded, (0, 1))(*args)
    assert columns.factored
    assert "shards" in rows.reason
    transform = functools.partial(hs.value_and_factors, argnums=(0, 1), weighted=weighted)
    value, (grad, found) = jax.jit(transform(sharded))(*args)
    whole, (whole_grad, wanted) = jax.jit(transform(plain))(*args)
    assert_close((value, grad, found[0]), (whole, whole_grad, wanted[0]))
    assert_close(found[1].hess_diag, wanted[1].hess_diag)


def test_composes():
    def loss(w, x):
        return jnp.mean(jnp.sin(x @ w) ** 2), {"sum": x.sum()}

    w, x = normal(2, 4, 3), normal(5, 4)
    transform = hs.value_and_factors(loss, has_aux=True)
    (value, aux), (grad, factors) = jax.vmap(transform, (0, None))(w, x)
    for i in range(2):
        expected = transform(w[i], x)
        got = jax.tree.map(lambda y, i=i: y[i], ((value, aux), (grad, factors)))
        assert_close(got, expected)
    slope = jax.grad(lambda w: transform(w, x)[1][1].inputs.sum())(w[0])
    step = 1e-6 * normal(4, 3, seed=3)
    after, before = (transform(w[0] + s, x)[1][1].inputs.sum() for s in (step, -step))
    np.testing.assert_allclose(2 * jnp.vdot(slope, step), after - before, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_wide(dtype):
    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w).astype("float32") ** 2)

    w, x = normal(4, 3).astype(dtype), normal(5, 4).astype(dtype)
    _, (grad, factors) = hs.value_and_factors(loss)(w, x)
    assert grad.dtype == dtype
    assert {y.dtype for y in jax.tree.leaves(factors)} == {jnp.dtype("float32")}
    wide = hs.value_and_factors(loss)(w.astype("float64"), x.astype("float64"))[1][1]
    for got, want in zip(jax.tree.leaves(factors), jax.tree.leaves(wide), strict=True):
        # The slopes of tanh are those of values with 8 bits.
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * np.abs(want).max())
