"""One line per case: a function that is one rule or one block, and where to evaluate it.

Shapes are asymmetric, except where a square one could hide a transposition.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from equinox.debug import announce_transform
from equinox.internal import noinline
from flax import linen, nnx
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.experimental import sparse, xla_metadata
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.sparse.bcsr import bcsr_extract
from jax.experimental.xla_metadata import set_xla_metadata
from jax.flatten_util import ravel_pytree
from jax.ops import segment_max, segment_min, segment_sum
from jax.scipy import special

import hesscale_jax as hs

LABELS = np.array([0, 3, 2, 5])
NUMBERS = np.array([0.3, -0.2, 0.7, 0.1])
SEGMENTS = np.array([2, 0, 2, 1])
PERMUTED = np.array([[2, 0, 2, 1], [1, 1, 0, 2], [0, 0, 0, 0]])
COLUMNS = np.array([1, 0, 1, 1, 0, 1])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal entries."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def positive(*shape: int, seed: int = 0) -> jax.Array:
    """Uniform entries in [0.3, 1.3)."""
    return 0.3 + jax.random.uniform(jax.random.key(seed), shape, jnp.float64)


def inside(*shape: int) -> jax.Array:
    """Uniform entries in [-0.9, 0.9)."""
    return jax.random.uniform(jax.random.key(7), shape, jnp.float64, -0.9, 0.9)


x, w = normal(4, 6), normal(4, 6, seed=1)
a, b = positive(4, 6), positive(4, 6, seed=1)
image = normal(2, 3, 2, 6)

ON_ONE_DEVICE = jax.NamedSharding(jax.make_mesh((1,), ("all",)), jax.P())
TIES = jnp.round(normal(4, 6, seed=2))
OUTSIDE = np.array([3, 4, -9])  # of 4 rows: the last of them, and two that are not there
MODES = ("clip", "fill")
SCATTERS = {
    "": lambda at, u, mode: at.set(u, mode=mode),
    "-add": lambda at, u, mode: at.add(u, mode=mode),
    "-sub": lambda at, u, mode: at.subtract(u, mode=mode),
}

Case = tuple[Callable[..., Any], *tuple[Any, ...]]

UNARY: dict[str, Case] = {
    "abs": (jnp.abs, x),
    "acos": (jnp.arccos, inside(4, 6)),
    "acosh": (jnp.arccosh, 1 + a),
    "asin": (jnp.arcsin, inside(4, 6)),
    "asinh": (jnp.arcsinh, x),
    "atan": (jnp.arctan, x),
    "atanh": (jnp.arctanh, inside(4, 6)),
    "bessel_i0e": (lax.bessel_i0e, a),
    "bessel_i1e": (lax.bessel_i1e, a),
    "cbrt": (jnp.cbrt, a),
    "clamp": (lambda x: lax.clamp(-0.5, x * x, 0.5) * x, x),
    "clamp, of bounds too": (
        lambda low, x, high: lax.clamp(low * low, x * high, high) * x,
        a - 1,
        x,
        a,
    ),
    "convert_element_type": (lambda x: x.astype(jnp.float32) * 2, x),
    "copy": (lambda x: jnp.array(x, copy=True), x),
    "cos": (jnp.cos, x),
    "cosh": (jnp.cosh, x),
    "digamma": (special.digamma, a),
    "erf": (lax.erf, x),
    "erf_inv": (lax.erf_inv, inside(4, 6)),
    "erfc": (lax.erfc, x),
    "exp": (jnp.exp, x),
    "exp2": (jnp.exp2, x),
    "expm1": (jnp.expm1, x),
    "igamma": (lambda x: lax.igamma(b, x), a),
    "igammac": (lambda x: lax.igammac(b, x), a),
    "integer_pow": (lambda x: x**3 + x**-2 + x**5, a),
    "integer_pow of degree 0 and 1": (lambda x: x * lax.integer_pow(x, 0) + x**1, a),
    "lgamma": (special.gammaln, a),
    "log": (jnp.log, a),
    "log1p": (jnp.log1p, a),
    "log2": (jnp.log2, a),
    "logistic": (nn.sigmoid, x),
    "name": (lambda x: checkpoint_name(x * x, "square"), x),
    "neg": (lambda x: -x, x),
    "polygamma": (lambda x: special.polygamma(1, x), a),
    "random_gamma": (lambda a: jax.random.gamma(jax.random.key(0), 1 + a), a),
    "reduce_precision": (lambda x: lax.reduce_precision(x * x, 11, 52), x),
    "regularized_incomplete_beta": (lambda x: lax.betainc(a, b, x), a - 0.3),
    "rsqrt": (lax.rsqrt, a),
    "sharding_constraint": (lambda x: constrained(x) ** 2, x),
    "sin": (jnp.sin, x),
    "sinh": (jnp.sinh, x),
    "sqrt": (jnp.sqrt, a),
    "square": (jnp.square, x),
    "tan": (jnp.tan, inside(4, 6)),
    "tanh": (jnp.tanh, x),
    "tanh of a scalar": (jnp.tanh, normal()),
    "tanh of size 1": (jnp.tanh, normal(1, 1)),
    "1 - x^2": (lambda x: 1 - x * x, x),
}

BINARY: dict[str, Case] = {
    "add": (jnp.add, x, w),
    "add of one value twice": (lambda x: x + x, x),
    "add with broadcasting": (jnp.add, x, normal(1, 6)),
    "atan2": (jnp.arctan2, x, w),
    "div": (jnp.divide, x, a),
    "div of and by functions of one value": (lambda x: jnp.sin(x) / (2 + jnp.cos(x)), x),
    "logaddexp": (jnp.logaddexp, x, w),
    "max": (jnp.maximum, x, w),
    "max and min times their operands": (
        lambda x, w: jnp.maximum(x, w) * x + jnp.minimum(x * w, w),
        x,
        w,
    ),
    "min": (jnp.minimum, x, w),
    "mul": (jnp.multiply, x, w),
    "mul of one value twice": (lambda x: x * x * x, x),
    "mul with a column and a row": (
        lambda c, r: jnp.tanh(jnp.exp(c) * r),
        positive(4, 1),
        normal(1, 6),
    ),
    "mul with a scalar": (lambda x, t: x * jnp.exp(t), x, normal()),
    "pow": (jnp.power, a, w),
    "pow by a constant": (lambda a: a**1.7, a),
    "rem": (lambda x: lax.rem(x, jnp.full_like(x, 0.7)) * x, x),
    "select_n": (lambda x, w: jnp.where(x > 0, x * w, w * w), x, w),
    "select_n of three": (
        lambda x, w: lax.select_n(np.arange(24).reshape(4, 6) % 3, x, w, x * w),
        x,
        w,
    ),
    "select_n with a scalar predicate": (lambda x, w: lax.select_n(x[0, 0] > 0, x, w * w), x, w),
    "sub": (jnp.subtract, x, w),
    "xlogy": (lambda x: special.xlogy(x, x + 2), a),
}

SELECTION: dict[str, Case] = {
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (3, 4, 5, 6), (1, 3)), x),
    "concatenate": (lambda x, w: jnp.concatenate([x, w], 1), x, w),
    "approx_top_k": (lambda x: lax.approx_max_k(x, 3)[0], x),
    "cummax": (lambda x: lax.cummax(x, 1), x),
    "cummax, backwards": (lambda x: lax.cummax(x, 1, reverse=True), x),
    "cummax of ties": (lambda x: lax.cummax(x, 0), TIES),
    "cummin": (lambda x: lax.cummin(x, 0), x),
    "cumsum": (lambda x: jnp.cumsum(x, 0), x),
    "cumsum, backwards": (lambda x: lax.cumsum(x, 1, reverse=True), x),
    "device_put": (lambda x, w: jax.device_put((x, w), jax.devices()[0])[1], x, w),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (1, 2), (2, 3)), x),
    "dynamic_slice, out of bounds": (lambda x: lax.dynamic_slice(x, (3, -2), (2, 3)), x),
    "dynamic_update_slice": (lambda x, u: lax.dynamic_update_slice(x, u, (1, 2)), x, normal(2, 3)),
    "gather": (lambda x: x[np.array([0, 0, 2])], x),
    "gather by label": (lambda x: jnp.take_along_axis(x, LABELS[:, None], 1), x),
    **{f"gather, {mode}": (lambda x, mode=mode: x.at[OUTSIDE].get(mode=mode, fill_value=0.0), x) for mode in MODES},
    "gather by label, out of bounds": (
        lambda x: jnp.take_along_axis(x, 2 * LABELS[:, None], 1, mode="clip"),
        x,
    ),
    "gather by label, filled": (
        lambda x: jnp.take_along_axis(x, 2 * LABELS[:, None], 1, mode="fill", fill_value=0.0),
        x,
    ),
    "gather by small label": (
        lambda x: jnp.take_along_axis(jnp.tile(x, 60), LABELS[:, None].astype(np.int8), 1),
        x,
    ),
    "gather, promise_in_bounds": (lambda x: x.at[LABELS % 4].get(mode="promise_in_bounds"), x),
    "gather of several": (
        lambda x: jnp.take_along_axis(x, LABELS[:2, None] * np.array([[0, 1]]), 1),
        x[:2],
    ),
    "layout_constraint": (lambda x: with_layout_constraint(x, Layout((1, 0))), x),
    "optimization_barrier": (lambda x, w: lax.optimization_barrier((x, w))[1], x, w),
    "pad": (lambda x: lax.pad(x, 0.0, ((1, 2, 1), (-1, 0, 0))), x),
    "reduce_max": (lambda x: x.max(1), x),
    "reduce_max, squared": (lambda x: x.max(1) ** 2, x),
    "reduce_min": (lambda x: x.min(0), x),
    "reduce_sum": (lambda x: x.sum(1), x),
    "reduce_sum over nothing": (lambda x: x.sum(0) ** 2, normal(1, 6)),
    "reduce_window_max": (lambda x: linen.max_pool(x, (2, 2), (1, 2), "SAME"), normal(2, 5, 4, 3)),
    "reduce_window_min": (lambda x: linen.pooling.min_pool(x, (2, 2), (1, 2)), normal(2, 5, 4, 3)),
    "reduce_window_sum": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 2, 1), "VALID"),
        normal(2, 5, 4, 3),
    ),
    "reduce_window_max, padded": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 2), ((1, 0), (0, 1))),
        x,
    ),
    "reduce_window_sum, dilated": (
        lambda x: lax.reduce_window(
            x, 0.0, lax.add, (2, 2), (1, 2), ((1, 0), (0, 2)), (3, 1), (1, 2)
        ),
        x,
    ),
    "reshape": (lambda x: x.reshape(3, 8), x),
    "reshape of axes in another order": (lambda x: lax.reshape(x, (3, 8), (1, 0)), x),
    "reshape of axes in another order, to the same shape": (lambda x: lax.reshape(x * x, (4, 6), (1, 0)), x),
    "rev": (lambda x: x[:, ::-1], x),
    "reshard": (lambda x: jax.sharding.reshard(x, ON_ONE_DEVICE), x),
    "scatter": (lambda x, u: x.at[np.array([0, 2])].set(u), x, normal(2, 6)),
    "scatter of one row twice": (lambda x, u: x.at[np.array([2, 2])].set(u), x, normal(2, 6)),
    "scatter-add": (lambda x, u: x.at[np.array([2, 2])].add(u), x, normal(2, 6)),
    **{
        f"scatter{kind}, {mode}": (
            lambda x, u, kind=kind, mode=mode: SCATTERS[kind](x.at[OUTSIDE], u, mode=mode), x, normal(3, 6, seed=1)
        )
        for kind in SCATTERS
        for mode in MODES
    },
    "scatter-max": (lambda x, u: x.at[np.array([2, 2])].max(u), x, normal(2, 6, seed=1)),
    "scatter-max of ties": (lambda x, u: x.at[np.array([1, 1, 2])].max(u), TIES, TIES[:3]),
    "scatter-min": (lambda x, u: x.at[np.array([2, 2])].min(u), x, normal(2, 6, seed=1)),
    "scatter-sub": (lambda x, u: x.at[np.array([2, 2])].subtract(u), x, normal(2, 6)),
    "scatter-sub from data": (lambda u: w.at[np.array([2, 2])].subtract(u), normal(2, 6)),
    "segment_max": (lambda x: segment_max(x, np.array([0, 2, 2, 0]), 4)[::2], x),
    "segment_sum": (lambda x: segment_sum(x, np.array([0, 2, 2, 0]), 4), x),
    "select_and_gather_add": (lambda t: jax.jvp(pooled, (image[..., 0],), (t,))[1], normal(2, 3, 2)),
    "select_and_scatter_add": (lambda g: jax.vjp(pooled, image[..., 0])[1](g)[0], normal(2, 2, 1)),
    "slice": (lambda x: x[1:4:2, 2:], x),
    "sort": (lambda x: jnp.sort(x, 0), x),
    "sort of several, by one": (
        lambda x, w: jnp.stack(lax.sort((x, w, np.arange(24).reshape(4, 6)), num_keys=1)[:2]),
        x,
        w,
    ),
    "sort of several, by two": (lambda x, w: lax.sort((x, w), dimension=0, num_keys=2)[1], TIES, w),
    "split": (lambda x: jnp.split(x, (1, 3), axis=1)[1], x),
    "squeeze": (lambda x: lax.squeeze(x, (0,)), normal(1, 6)),
    "stack": (lambda x, w: jnp.stack([x, w], 1), x, w),
    "tile": (lambda x: jnp.tile(x, (2, 3)), x),
    "top_k": (lambda x: lax.top_k(x, 3)[0], x),
    "transpose": (lambda x: x.T, x),
    "unstack": (lambda x: jnp.unstack(x, axis=1)[2], x),
    "xla_metadata_value": (lambda x: set_xla_metadata(x, tag="x"), x),
}  # fmt: skip

MULTILINEAR: dict[str, Case] = {
    "dot_general": (jnp.matmul, normal(3, 5), normal(5, 2, seed=1)),
    "dot_general, square": (jnp.matmul, normal(3, 3), normal(3, 3, seed=1)),
    "dot_general with a batch": (lambda x, w: jnp.einsum("bij,bkj->bik", x, w), normal(2, 3, 4), normal(2, 5, 4)),
    "dot_general of a value with itself": (lambda x: x.T @ x, x),
    "dot_general of a value with itself, with a batch": (lambda x: jnp.einsum("ibjk,iblk->bjl", x, x), normal(2, 3, 4, 2)),
    "dot_general of a value with itself, two axes left": (lambda x: jnp.einsum("ijk,ilm->jklm", x, x), normal(3, 2, 4)),
    "dot_general of transposed values": (lambda x, w: jnp.einsum("ij,kj->ki", x.T, w), normal(5, 3), normal(2, 5)),
    "dot_general over two axes": (lambda x, w: jnp.einsum("ijk,kjl->il", x, w), normal(2, 3, 4), normal(4, 3, 5)),
    "dot_general with several axes of each kind": (
        lambda x, w: jnp.einsum("ijkl,klmn->ijmn", x, w), normal(2, 3, 2, 4), normal(2, 4, 2, 3),
    ),
    "dot_general to another dtype": (
        lambda x, w: lax.dot(x.astype(jnp.float32), w.astype(jnp.float32), preferred_element_type=jnp.float64),
        normal(3, 5), normal(5, 2, seed=1),
    ),
    "dot_general of high precision": (lambda x, w: lax.dot(x, w, precision="highest"), normal(3, 5), normal(5, 2)),
    "conv_general_dilated": (lambda x, k: convolved(x, k, (1, 2), "SAME"), normal(2, 3, 6, 5), normal(4, 3, 3, 2)),
    "conv in groups, dilated": (
        lambda x, k: convolved(x, k, (1, 2), "VALID", rhs_dilation=(2, 1), feature_group_count=2),
        normal(2, 4, 6, 5), normal(6, 2, 3, 2),
    ),
    "conv in groups of the batch": (
        lambda x, k: convolved(x, k, (1, 2), "SAME", batch_group_count=2), normal(4, 3, 4, 5), normal(6, 3, 3, 2),
    ),
    "conv transposed": (
        lambda x, k: convolved(x, k, (1, 1), ((2, 1), (1, 1)), lhs_dilation=(2, 3)),
        normal(2, 3, 3, 2), normal(4, 3, 3, 2),
    ),
    "reduce_prod": (lambda x: jnp.prod(x, 1), x),
    "reduce_prod of zeros": (lambda x: jnp.prod(x, 0), x.at[1].set(0).at[2, 3].set(0)),
    "reduce_prod of everything": (jnp.prod, normal(2, 3)),
    "cumprod": (lambda x: jnp.cumprod(x, 0), normal(9, 2).at[1, 1].set(0)),
    "cumprod, backwards": (lambda x: lax.cumprod(x, 1, reverse=True), normal(2, 9)),
    "cumprod of a few": (lambda x: lax.cumprod(x, 1), x.at[1, 2].set(0)),
    "scatter-mul": (
        lambda x, u: x.at[np.array([0, 2])].multiply(u, unique_indices=True), x, normal(2, 6).at[0].set(0),
    ),
    "scatter-mul of one row twice": (lambda x: x.at[np.array([2, 2])].multiply(w[:2]), x),
}  # fmt: skip

OTHER: dict[str, Case] = {
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), normal(1, 65)),
    "cumlogsumexp, backwards": (lambda x: lax.cumlogsumexp(x, 0, reverse=True), normal(65)),
    "cumlogsumexp of a few": (lambda x: lax.cumlogsumexp(x, 1), x),
    "pointwise, of another trace": (lambda x: jax.jit(lambda x: jnp.sin(x) * x).trace(x)(x), x),
    **({"polynomial": (lambda x, c: lax.polynomial(x, [1.0, c, 3.0]), x, w)} if hasattr(lax, "polynomial") else {}),
    **(
        {"xla_metadata_call": (xla_metadata.xla_metadata_call(lambda x: jnp.sin(x) * x, tag="x"), x)}
        if hasattr(xla_metadata, "xla_metadata_call")
        else {}
    ),
}  # fmt: skip

ACTIVATIONS = (
    "celu elu gelu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu log_sigmoid mish "
    "relu relu6 selu sigmoid silu soft_sign softplus sparse_plus sparse_sigmoid squareplus swish tanh"
).split()

CONTROL: dict[str, Case] = {
    "cond": (lambda x: lax.cond(x[0, 0] < 9, jnp.sin, jnp.cos, x), x),
    "scan": (lambda x: lax.scan(lambda c, x: (c, x * c), 2.0, x)[1], x),
    "scan with a carry": (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0], x),
    "custom_vjp_call": (lambda x: halved(x), x),
    "custom_jvp_call, not entry by entry": (lambda x: reversed_sine(x), x),
}  # fmt: skip

BLOCKS: dict[str, Case] = {
    **{name: (getattr(nn, name), x) for name in ACTIVATIONS},
    "gelu, exact": (lambda x: nn.gelu(x, approximate=False), x),
    "glu": (nn.glu, x),
    "log1mexp": (nn.log1mexp, a),
    "logmeanexp": (lambda x: nn.logmeanexp(x, 1), x),
    "relu squared": (lambda x: nn.relu(x) ** 2, x),
    # Softmax and relatives
    "softmax": (nn.softmax, x),
    "softmax over axis 0": (lambda x: nn.softmax(x, 0), x),
    "softmax, square": (lambda x: nn.softmax(x, 0), normal(4, 4)),
    "softmax, masked": (lambda x: nn.softmax(x, where=np.arange(6) < 4), x),
    "softmax with temperatures": (lambda x, t: nn.softmax(x / t), x, positive(4, 1)),
    "softmax with a temperature": (lambda x, t: nn.softmax(x / t), x, positive()),
    "softmax with scales": (lambda x, t: nn.softmax(x * jnp.exp(t)), x, normal(1, 6)),
    "softmax of a parameter, times a batch": (lambda p, x: nn.softmax(p)[None] * x, normal(6), x),
    "softmax of a softmax": (lambda p, x: nn.softmax(nn.softmax(p)[None] * x), normal(6), x),
    "log_softmax": (nn.log_softmax, x),
    "logsumexp": (lambda x: nn.logsumexp(x, 1), x),
    "logsumexp over everything": (nn.logsumexp, x),
    "logsumexp with keepdims": (lambda x: nn.logsumexp(x, 1, keepdims=True), x),
    # Normalisations
    "layer norm": (lambda x: normalised(x, -1), x),
    "batch norm": (lambda x: normalised(x, 0), x),
    "batch norm of an image": (lambda x: normalised(x, (0, 1, 2)), image),
    "batch norm with a bias before": (lambda x, b: normalised(x + b, 0), x, normal(1, 6)),
    "group norm, grouped": (lambda x: normalised(x.reshape(2, 3, 2, 2, 3), (1, 2, 4)).reshape(x.shape), image),
    "instance norm": (lambda x: normalised(x, (1, 2)), image),
    "linen.BatchNorm": (lambda x: initialised(linen.BatchNorm(use_running_average=False), x), image),
    "linen.GroupNorm": (lambda x: initialised(linen.GroupNorm(3), x), image),
    "linen.InstanceNorm": (lambda x: initialised(linen.InstanceNorm(), x), image),
    "linen.LayerNorm": (lambda x: initialised(linen.LayerNorm(), x), x),
    "linen.RMSNorm": (lambda x: initialised(linen.RMSNorm(), x), x),
    "nnx.GroupNorm": (lambda x: built(nnx.GroupNorm, x, 2), image),
    "nnx.LayerNorm": (lambda x: built(nnx.LayerNorm, x), x),
    "nnx.RMSNorm": (lambda x: built(nnx.RMSNorm, x), x),
    "standardize": (nn.standardize, x),
    "std": (lambda x: x.std(0), x),
    "var": (lambda x: x.var(1), x),
    "l2-normalise": (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), x),
    "l2-normalise, as a whole": (lambda x: x / jnp.linalg.norm(x), x),
    "layer norm, then softmax": (lambda x: nn.softmax(normalised(x, -1) * x.mean(-1, keepdims=True)), x),
    "divided by the maximum": (lambda a: a / a.max(-1, keepdims=True), a),
    "between minimum and maximum": (lambda x: (x - low(x)) / (x.max(1, keepdims=True) - low(x)), x),
    "sum of a column repeated": (lambda x, b: jnp.tanh((x + b).sum(1, keepdims=True)) * x, normal(2, 3), normal(2, 1)),
    "sum of everything beside one entry": (lambda p, q: (jnp.sin(p) + q.sum()) * p * q, normal(1, 1), normal(3, 2)),
    # By segments
    "segment softmax": (lambda x: by_segments(x), x),
    "segment softmax, ids computed": (lambda x: by_segments(x, unknown(SEGMENTS)), x),
    "segment softmax, some empty": (lambda x: by_segments(x, SEGMENTS, 9), x),
    "segment softmax, as many segments as ids": (lambda x: by_segments(x, SEGMENTS, 4), x),
    "segment softmax, of one segment": (lambda x: by_segments(x, 0 * SEGMENTS, 1), x),
    "segment softmax, of small ids": (lambda x: by_segments(x, unknown(SEGMENTS.astype(np.int8))), x),
    "segment softmax, of unsigned ids": (lambda x: by_segments(x, unknown(SEGMENTS.astype(np.uint32))), x),
    "segment softmax, of each column": (lambda x: jax.vmap(by_segments, 1, 1)(x), x),
    "segment softmax, of each row by its own": (lambda x: jax.vmap(by_segments)(x[:3, :4], PERMUTED), x),
    "segment softmax, averaged": (lambda x: segment_sum(by_segments(x) * w, SEGMENTS, 3), x),
    "segment softmax, averaged, then divided": (lambda x: ratio(x, w, unknown(SEGMENTS)), x),
    "segment softmax, with temperatures": (lambda x, t: by_segments(x / t[SEGMENTS]), x, positive(3, 6)),
    "segment softmax, with a temperature": (lambda x, t: by_segments(x / t, SEGMENTS, 9), x, positive()),
    "segment softmax, with a bias for each segment": (
        lambda x, b: jnp.exp(x) / (segment_sum(jnp.exp(x), SEGMENTS, 4) * b + b)[SEGMENTS], x, positive(4, 6),
    ),
    "segment softmax, with a function of a bias for each segment": (
        lambda x, b: jnp.exp(x) / (segment_sum(jnp.exp(x), SEGMENTS, 4) * nn.softplus(b) + b * b)[SEGMENTS],
        x, normal(4, 6),
    ),
    "segment log-softmax, some empty": (
        lambda x: x - jnp.log(segment_sum(jnp.exp(x), SEGMENTS, 5))[SEGMENTS], x,
    ),
    "segment log-softmax, some empty, with a temperature": (
        lambda x, t: x * t - jnp.log(segment_sum(jnp.exp(x * t), SEGMENTS, 5))[SEGMENTS], x, positive(),
    ),
    "segment norm": (lambda x: normalised_by_segments(x, SEGMENTS, 3), x),
    "segment norm, with scales": (lambda x, p: p * normalised_by_segments(x, SEGMENTS, 5), x, normal(1, 6)),
    "segment sum, of negative ids that are dropped": (
        lambda x: jnp.exp(x) / (1 + sums_at(jnp.exp(x), unknown(SEGMENTS - 1), None)), x,
    ),
    "segment norm, of negative ids": (lambda x: normalised_by_segments(x, unknown(SEGMENTS - 3), 3), x),
    "segment maximum": (lambda x: jnp.exp(x - segment_max(x, SEGMENTS, 3)[SEGMENTS] ** 2), x),
    "segment minimum, of ties": (lambda x: x * segment_min(x, SEGMENTS, 3)[SEGMENTS], TIES),
    "segment sum, subtracted": (
        lambda x: x * jnp.full((3, 6), 2.0).at[SEGMENTS].subtract(jnp.sin(x))[SEGMENTS], x,
    ),
    **{
        f"segment sum, out of bounds, {mode}": (
            lambda x, mode=mode: jnp.exp(x) / (3 + sums_at(jnp.exp(x), unknown(OUTSIDE), mode)), normal(3, 6),
        )
        for mode in ("fill", "clip")
    },
    "segment sum of the second axis": (
        lambda x: jnp.exp(x) * jnp.zeros((4, 3)).at[:, COLUMNS].add(jnp.sin(x))[:, COLUMNS], x,
    ),
    "segment sum, reshaped": (
        lambda x: jnp.exp(x)[..., None] * segment_sum(jnp.sin(x), SEGMENTS, 3).reshape(3, 6, 1)[SEGMENTS], x,
    ),
    # Row by row
    "cosine": (optax.losses.cosine_similarity, x, w),
    "cosine by sums": (lambda x, w: (x * w).sum(1) / jnp.sqrt((x * x).sum(1) * (w * w).sum(1)), x, w),
    "cosine by dot products": (lambda x, w: dots(x, w) / jnp.sqrt(dots(x, x) * dots(w, w)), x, w),
    "cosine of columns": (lambda x, w: dots(x.T, w.T) / jnp.sqrt(dots(w.T, w.T)), x, w),
    "vdot": (lambda x, w: jnp.tanh(jnp.vdot(x, w) / jnp.vdot(x, x)), x, w),
    "row dot products in another order": (
        lambda x, w: lax.dot_general(jnp.sin(x), w, (((1,), (0,)), ((2, 0), (1, 2)))),
        normal(2, 4, 3), normal(4, 3, 2),
    ),
    # Side by side
    "stack of the rows of one array": (lambda x: nn.softmax(jnp.stack(jnp.sin(x), 1), 0), x),
    "stack of two": (lambda x: nn.softmax(jnp.stack([jnp.sin(x) * jnp.exp(x), jnp.exp(x)], 2), 2), x),
    "stack of two, in front": (lambda x: nn.softmax(jnp.stack([jnp.sin(x) * jnp.exp(x), jnp.exp(x)]), 0), x),
    "stack of two, between": (lambda x: nn.softmax(jnp.stack([jnp.sin(x) * jnp.exp(x), jnp.exp(x)], 1), 1), x),
    "concatenate of one-wide": (lambda x: nn.logsumexp(jnp.concatenate([x**2, jnp.sin(x**2)], 1), 1), normal(4, 1)),
    # Broadcasts
    "broadcast behind": (lambda p, x: nn.softmax(jnp.broadcast_to(jnp.exp(p)[:, None], x.shape) * x, 0), normal(4), x),
    "broadcast in front": (lambda p, x: nn.softmax(jnp.broadcast_to(jnp.exp(p), x.shape) * x, 0), normal(6), x),
    "row mean subtracted from a square": (lambda x: x - x.mean(1)[:, None], normal(4, 4)),
    "no entries": (lambda x, e: x + e.sum(), x, normal(0, 3)),
    "a long chain that takes in a reduction at each step": (lambda x: shrunk(x, 60), x),
    # Steps of a loop side by side
    "steps added up": (lambda x: in_steps(x).sum(0), x),
    "steps added up, over other axes too": (lambda x: jnp.exp(in_steps(x).sum((0, 2))), x),
    "the last step": (lambda x: in_steps(x)[-1], x),
    "steps multiplied": (lambda x: in_steps(x)[::2].prod(0) - in_steps(x)[1], x),
    "steps by the carry, transposed": (lambda x: by_carry(x), x),
    "a function of each number of a table": (
        lambda x: jnp.tanh(lax.map(lambda k: jnp.sin(k * x), NUMBERS).sum(0)),
        x,
    ),
    "a branch that is not taken, and not defined": (
        lambda x: lax.map(lambda k: lax.cond(k < 9, jnp.sin, jnp.log, k * x), NUMBERS).sum(0),
        x,
    ),
    "bessel_jn": (lambda x: special.bessel_jn(x, v=2, n_iter=12)[1], a),
    # Losses by example
    "cross-entropy by label": (lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(x, LABELS), x),
    "cross-entropy, one-hot": (lambda x: optax.losses.softmax_cross_entropy(x, nn.one_hot(LABELS, 6)), x),
    "focal by label": (lambda x: focal(optax.losses.softmax_cross_entropy_with_integer_labels(x, LABELS)), x),
    "focal, one-hot": (lambda x: focal(optax.losses.softmax_cross_entropy(x, nn.one_hot(LABELS, 6))), x),
    "focal, sigmoid": (lambda x: optax.losses.sigmoid_focal_loss(x, nn.one_hot(LABELS, 6), alpha=0.3), x),
    "binary cross-entropy": (lambda x: optax.losses.sigmoid_binary_cross_entropy(x, nn.one_hot(LABELS, 6)), x),
    "huber": (optax.losses.huber_loss, x, w),
    "RMSE": (lambda x: jnp.sqrt(jnp.mean((x - w) ** 2)), x),
    "Gaussian NLL": (lambda m, s: ((m - w) / jnp.exp(s)) ** 2 / 2 + s, x, normal(4, 6, seed=2)),
    "KL divergence": (lambda x: optax.losses.kl_divergence(nn.log_softmax(x), nn.softmax(w)), x),
    "policy ratio": (lambda x: jnp.exp(jnp.take_along_axis(nn.log_softmax(x), LABELS[:, None], 1)), x),
}  # fmt: skip

MATRIX = normal(3, 3) + 3 * np.eye(3)
MATRICES = normal(2, 3, 3) + np.broadcast_to(3 * np.eye(3), (2, 3, 3))
LEFT = {"left_side": True}

LINEAR_ALGEBRA: dict[str, Case] = {
    "cholesky": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), MATRIX @ MATRIX.T),
    "cholesky of a batch": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), jnp.broadcast_to(MATRIX @ MATRIX.T, (2, 1, 3, 3))),
    "cholesky of one entry": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), positive(1, 1)),
    "cholesky of no entries": (lambda x: lax.linalg.cholesky(x, symmetrize_input=False), normal(0, 0)),
    "slogdet": (lambda x: jnp.linalg.slogdet(x)[1], MATRIX),
    "slogdet of a batch": (lambda x: jnp.linalg.slogdet(x)[1], MATRICES),
    "eigh": (lambda x: lax.linalg.eigh(x, symmetrize_input=False)[1], MATRIX @ MATRIX.T),
    "eigh, vectors": (lambda x: lax.linalg.eigh(x, symmetrize_input=False)[0], MATRIX @ MATRIX.T),
    "eigh of a batch": (lambda x: lax.linalg.eigh(x, symmetrize_input=False)[1], MATRICES + jnp.swapaxes(MATRICES, 1, 2)),
    "lu": (lambda x: lax.linalg.lu(x)[0], normal(4, 3)),
    "lu of a batch": (lambda x: lax.linalg.lu(x)[0], normal(2, 3, 4)),
    "qr": (lambda x: lax.linalg.qr(x, full_matrices=False)[1], normal(4, 3)),
    "qr of a batch": (lambda x: lax.linalg.qr(x, full_matrices=False)[0], normal(2, 4, 3)),
    "svd": (lambda x: lax.linalg.svd(x, full_matrices=False)[1], normal(4, 3)),
    "svd of a batch": (lambda x: lax.linalg.svd(x, full_matrices=False)[0], normal(2, 4, 3)),
    "reduce": (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b + a * b, (1,)), normal(2, 3, 2)),
    **{
        f"triangular_solve, {options}": (
            lambda m, b, options=options: lax.linalg.triangular_solve(m, b, **options),
            MATRIX, normal(3, 2) if options["left_side"] else normal(2, 3),
        )
        for flags in itertools.product((False, True), repeat=4)
        for options in [dict(zip(("left_side", "lower", "transpose_a", "unit_diagonal"), flags, strict=True))]
    },
    "triangular_solve of a batch": (lambda m, b: lax.linalg.triangular_solve(m, b, **LEFT), MATRICES, normal(2, 3, 4)),
    "triangular_solve of one entry": (lambda m, b: lax.linalg.triangular_solve(m, b, **LEFT), positive(1, 1), normal(1, 1)),
    "triangular_solve of no entries": (lambda b: lax.linalg.triangular_solve(normal(0, 0), b, **LEFT), normal(0, 2)),
    "tridiagonal_solve": (lax.linalg.tridiagonal_solve, *normal(3, 4), normal(4, 2)),
    "tridiagonal_solve of a batch": (lax.linalg.tridiagonal_solve, *(normal(3, 2, 4) + 2), normal(2, 4, 3)),
    "solve": (jnp.linalg.solve, MATRIX, normal(3)),
    "solve of one entry": (jnp.linalg.solve, positive(1, 1), normal(1)),
    "solve for a matrix": (jnp.linalg.solve, MATRIX, normal(3, 2)),
    "solve of a batch": (jnp.linalg.solve, MATRICES, normal(2, 3, 4)),
    "inv": (jnp.linalg.inv, MATRICES),
    "region": (hs.exact(lambda m, b: jnp.tanh(jnp.linalg.solve(m, jnp.tanh(m) @ b))), MATRIX, normal(3, 2)),
    "region of a batch": (
        jax.vmap(hs.exact(lambda m, b: jnp.linalg.solve(m @ m.T, b)), (0, None), 1), MATRICES, normal(3, 2),
    ),
    "custom_linear_solve": (
        lambda b: lax.custom_linear_solve(
            lambda x: MATRIX @ MATRIX.T @ x, b, lambda _, b: jnp.linalg.inv(MATRIX @ MATRIX.T) @ b, symmetric=True
        ),
        normal(3),
    ),
}  # fmt: skip

# Sparse arrays: entries of 4 rows and 3 columns, of which two lie at one position, one outside.
AT = np.array([[0, 1], [2, 0], [2, 0], [3, 2], [1, 1], [4, 3]])
STARTS, COLUMNS = np.array([0, 2, 2, 5, 6]), np.array([0, 2, 1, 1, 2, 0])
ROWS = np.repeat(np.arange(4), np.diff(STARTS))
NUMBERS, WEIGHTS = normal(6), normal(3, 2, seed=1)


def bcoo(numbers: jax.Array, **options: bool) -> sparse.BCOO:
    """A sparse array of these numbers."""
    return sparse.BCOO((numbers, jnp.array(AT)), shape=(4, 3), **options)


def bcsr(numbers: jax.Array) -> sparse.BCSR:
    """Another."""
    return sparse.BCSR((numbers, jnp.array(COLUMNS), jnp.array(STARTS)), shape=(4, 3))


def coo(numbers: jax.Array) -> sparse.COO:
    """The same in another format."""
    return sparse.COO((numbers, jnp.array(ROWS), jnp.array(COLUMNS)), shape=(4, 3))


def csr(numbers: jax.Array) -> sparse.CSR:
    """The same in another format."""
    return sparse.CSR((numbers, jnp.array(COLUMNS), jnp.array(STARTS)), shape=(4, 3))


def in_rows(numbers: jax.Array, rows: Any = ROWS, columns: Any = COLUMNS) -> jax.Array:
    """The same as a dense array."""
    return jnp.zeros((4, 3)).at[rows, columns].add(numbers, mode="drop")


def in_dense(numbers: jax.Array) -> jax.Array:
    """The dense array of ``bcoo``."""
    return in_rows(numbers, *AT.T)


def batched(numbers: jax.Array) -> sparse.BCOO:
    """A batch of two of them."""
    return sparse.BCOO((numbers, jnp.stack([AT, AT[::-1]])), shape=(2, 4, 3))


BATCHED = (((2,), (1,)), ((0,), (0,)))
MATMUL = (((1,), (0,)), ((), ()))

# A function, the same of dense arrays, and where to evaluate both.
SPARSE: dict[str, tuple[Callable[..., Any], Callable[..., Any], *tuple[Any, ...]]] = {
    "bcoo_dot_general": (lambda d, w: bcoo(d) @ w, lambda d, w: in_dense(d) @ w, NUMBERS, WEIGHTS),
    "bcoo_dot_general, unique": (
        lambda d, w: sparse.BCOO((d, jnp.array(AT[2:])), shape=(4, 3), unique_indices=True) @ w,
        lambda d, w: in_rows(d, *AT[2:].T) @ w, normal(4), WEIGHTS,
    ),
    "bcoo_dot_general, of data": (lambda w: bcoo(NUMBERS) @ w, lambda w: in_dense(NUMBERS) @ w, WEIGHTS),
    "bcoo_dot_general with a vector": (lambda d, w: bcoo(d) @ w, lambda d, w: in_dense(d) @ w, NUMBERS, normal(3)),
    "bcoo_dot_general from the right": (lambda d, w: w @ bcoo(d), lambda d, w: w @ in_dense(d), NUMBERS, normal(2, 4)),
    "bcoo_dot_general of a batch": (
        lambda d, w: sparse.bcoo_dot_general(batched(d), w, dimension_numbers=BATCHED),
        lambda d, w: jnp.stack([in_dense(d[0]), in_rows(d[1], *AT[::-1].T)]) @ w,
        normal(2, 6), normal(2, 3, 2),
    ),
    "bcoo_dot_general_sampled": (
        lambda a, b: sparse.bcoo_dot_general_sampled(a, b, jnp.array(AT[:5]), dimension_numbers=MATMUL),
        lambda a, b: (a @ b)[AT[:5, 0], AT[:5, 1]], normal(4, 5), normal(5, 3),
    ),
    "bcoo_todense": (lambda d: bcoo(d).todense(), in_dense, NUMBERS),
    "bcoo_fromdense": (lambda x: sparse.BCOO.fromdense(x, nse=12).todense(), lambda x: 1 * x, normal(4, 3)),
    # Without the place that two numbers are at, of which the other spelling knows how they vary.
    "bcoo_extract": (
        lambda d, x: (sparse.BCOO((d, jnp.array(AT[2:])), shape=(4, 3)) * x).todense(),
        lambda d, x: in_rows(d * x[AT[2:, 0], AT[2:, 1]], *AT[2:].T), NUMBERS[2:], normal(4, 3)),
    "bcoo_transpose": (lambda d: bcoo(d).T.todense(), lambda d: in_dense(d).T, NUMBERS),
    "bcoo_sum_duplicates": (lambda d: bcoo(d).sum_duplicates(nse=6).todense(), in_dense, NUMBERS),
    "bcoo_sort_indices": (lambda d: bcoo(d).sort_indices().todense(), in_dense, NUMBERS),
    "bcoo_reduce_sum": (
        lambda d: sparse.bcoo_reduce_sum(bcoo(d), axes=(1,)).todense(), lambda d: in_dense(d).sum(1), NUMBERS,
    ),
    "bcoo_concatenate": (
        lambda d: sparse.bcoo_concatenate([bcoo(d), bcoo(2 * d)], dimension=0).todense(),
        lambda d: jnp.concatenate([in_dense(d), in_dense(2 * d)]), NUMBERS,
    ),
    "bcoo_slice": (lambda d: bcoo(d)[1:3].todense(), lambda d: in_dense(d)[1:3], NUMBERS),
    "bcsr_dot_general": (lambda d, w: bcsr(d) @ w, lambda d, w: in_rows(d) @ w, NUMBERS, WEIGHTS),
    "bcsr_todense": (lambda d: bcsr(d).todense(), in_rows, NUMBERS),
    "bcsr_fromdense": (lambda x: sparse.BCSR.fromdense(x, nse=12).data, jnp.ravel, normal(4, 3)),
    "bcsr_extract": (
        lambda x: bcsr_extract(jnp.array(COLUMNS), jnp.array(STARTS), x), lambda x: x[ROWS, COLUMNS], normal(4, 3),
    ),
    "coo_matmat": (lambda d, w: coo(d) @ w, lambda d, w: in_rows(d) @ w, NUMBERS, WEIGHTS),
    "coo_matvec": (lambda d, w: coo(d).T @ w, lambda d, w: in_rows(d).T @ w, NUMBERS, normal(4)),
    "coo_todense": (lambda d: coo(d).todense(), in_rows, NUMBERS),
    "coo_fromdense": (lambda x: sparse.COO.fromdense(x, nse=12).data, jnp.ravel, normal(4, 3)),
    "csr_matmat": (lambda d, w: csr(d) @ w, lambda d, w: in_rows(d) @ w, NUMBERS, WEIGHTS),
    "csr_matvec": (lambda d, w: csr(d) @ w, lambda d, w: in_rows(d) @ w, NUMBERS, normal(3)),
    "csr_todense": (lambda d: csr(d).todense(), in_rows, NUMBERS),
    "csr_fromdense": (lambda x: sparse.CSR.fromdense(x, nse=12).data, jnp.ravel, normal(4, 3)),
    "todense": (lambda d: sparse.todense(bcoo(d)), in_dense, NUMBERS),
}  # fmt: skip


def solved_in_parts(m: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The solution of a system of two arrays, with an auxiliary result."""

    def multiplied(x: Any) -> Any:
        return {"p": m @ x["p"] + x["q"].sum(), "q": 3 * x["q"] + x["p"][:2]}

    def solve(multiply: Any, b: Any) -> Any:
        flat, unravel = ravel_pytree(b)
        matrix = jax.jacobian(lambda flat: ravel_pytree(multiply(unravel(flat)))[0])(flat)
        return unravel(jnp.linalg.solve(matrix, flat)), {
            "steps": jnp.array(1),
            "error": jnp.array(0.0),
        }

    x, _ = lax.custom_linear_solve(
        multiplied, {"p": b, "q": c}, solve, transpose_solve=solve, has_aux=True
    )
    return jnp.concatenate([x["p"], x["q"]])  # fmt: skip


def solved_as_a_whole(m: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The same by one matrix."""
    matrix = jnp.block([[m, jnp.ones((3, 2))], [jnp.eye(2, 3), 3 * jnp.eye(2)]])
    return jnp.linalg.solve(matrix, jnp.concatenate([b, c]))


partitioned_sine = custom_partitioning(lambda x: jnp.sin(x) * x)
partitioned_sine.def_partition(
    partition=lambda mesh, args, out: (mesh, jnp.sin, out.sharding, (args[0].sharding,)),
    infer_sharding_from_operands=lambda mesh, args, out: args[0].sharding,
    sharding_rule="i j -> i j",
)


# What cannot be vectorised, as dense algebra is, or what is written without a derivative in JAX: a
# function, the same in other words, and where to evaluate both.
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], *tuple[Any, ...]]] = {
    "clamp, of a scalar bound": (
        lambda low, x: lax.clamp(low, x, 0.5) * x, lambda low, x: jnp.clip(x, low, 0.5) * x, normal() - 1, x,
    ),
    "custom_vmap_call": (
        lambda x: sine_times(x), lambda x: jnp.sin(x) * x, x,
    ),
    "linear_call": (
        lambda x: linear_call(lambda w, x: w @ x, lambda w, y: w.T @ y, w, x), lambda x: w @ x, normal(6),
    ),
    "custom_linear_solve of several arrays": (
        solved_in_parts, solved_as_a_whole, MATRIX, normal(3), normal(2),
    ),
    "custom_partitioning": (
        lambda x: partitioned_sine(x), lambda x: jnp.sin(x) * x, x,
    ),
    "announce_jaxpr": (
        lambda x: announce_transform(x**2, announce=lambda transform: None), lambda x: x**2, x,
    ),
    "noinline": (
        lambda x: noinline(jnp.sin)(x), jnp.sin, normal(4),
    ),
    "ragged_dot_general": (
        lambda x, w: lax.ragged_dot(x, w, np.array([2, 0, 3])),
        lambda x, w: jnp.einsum("bi,bij->bj", x, w[np.array([0, 0, 2, 2, 2])]),
        normal(5, 2), normal(3, 2, 4),
    ),
}  # fmt: skip


# From JAX 0.11 on, neither is differentiated: its comparisons take no complex values.
ORDERS_COMPLEX = jax.__version_info__ < (0, 11)


def on_complex(fun: Callable[..., Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A combination of both parts of a function of ``x + i w``."""

    def of_parts(x: jax.Array, w: jax.Array) -> jax.Array:
        y = fun(lax.complex(x, w))
        return y.real * 0.7 + y.imag * 0.3 if jnp.iscomplexobj(y) else y

    return of_parts


def on_circle(t: jax.Array) -> jax.Array:
    """``exp(i t)``."""
    return jnp.exp(1j * t.astype(complex))


HOLOMORPHIC = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "exp", "exp2", "expm1"),
    *("log", "log1p", "reciprocal", "sin", "sinh", "sqrt", "square", "tan", "tanh"),
)
# Either part of a Fourier transform. Lengths that are odd and even, 1 and 2; one and more axes.
FOURIER: dict[str, Case] = {
    f"{name} over {shape}, {part}": (
        lambda x, w, fun=fun, part=part: getattr(fun(lax.complex(x, w)), part), normal(2, *shape), normal(2, *shape, seed=1),
    )
    for shape in ((1,), (2,), (5,), (6,), (3, 4), (2, 3, 5))
    for name, fun in (("fft", jnp.fft.fftn), ("ifft", jnp.fft.ifftn))
    for part in ("real", "imag")
} | {
    f"rfft over {shape}, {part}": (
        lambda x, part=part, shape=shape: getattr(jnp.fft.rfftn(x, axes=tuple(range(1, 1 + len(shape)))), part), normal(2, *shape),
    )
    for shape in ((1,), (2,), (5,), (6,), (3, 4), (2, 3, 5))
    for part in ("real", "imag")
} | {
    f"irfft over {shape}": (
        lambda x, w, shape=shape: jnp.fft.irfftn(lax.complex(x, w), shape, tuple(range(1, 1 + len(shape)))),
        normal(2, *shape[:-1], shape[-1] // 2 + 1), normal(2, *shape[:-1], shape[-1] // 2 + 1, seed=1),
    )
    for shape in ((1,), (2,), (5,), (6,), (3, 4), (2, 3, 5))
}  # fmt: skip

# Complex values inside: z is x + i w.
COMPLEX: dict[str, Case] = FOURIER | {
    **{f"complex {name}": (on_complex(getattr(jnp, name)), x, w) for name in HOLOMORPHIC},
    "complex abs": (on_complex(jnp.abs), x, w),
    "complex angle": (on_complex(jnp.angle), x, w),
    "complex cbrt": (on_complex(lambda z: lax.pow(z, jnp.full_like(z, 1 / 3))), x, w),
    "complex conj": (on_complex(lambda z: jnp.conj(z) * z * z), x, w),
    "complex division": (on_complex(lambda z: (z * z + 2) / (1j - z)), x, w),
    "complex division by real": (on_complex(lambda z: z * z / (1.5 + z.real**2).astype(complex)), x, w),
    "complex integer_pow": (on_complex(lambda z: z**3 + z**-2 + lax.integer_pow(z, 1)), x, w),
    "complex logistic": (on_complex(nn.silu), x, w),
    **({"complex max": (on_complex(lambda z: lax.max(z, z * z) + lax.min(z, z * z)), x, w)} if ORDERS_COMPLEX else {}),
    "complex mul": (on_complex(lambda z: z * lax.complex(z.imag, -2 * z.real) - 1j), x, w),
    "complex pow": (on_complex(lambda z: z**1.7), x, w),
    "complex pow of two": (on_complex(lambda z: z ** (z + 1)), x, w),
    "complex rsqrt": (on_complex(lax.rsqrt), x, w),
    "complex select": (on_complex(lambda z: jnp.where(z.real > 0, z * z, 2j)), x, w),
    "complex phase": (lambda x: on_circle(x).real * on_circle(2 * x).imag, x),
    "complex root of a real": (lambda x: jnp.sqrt(x.astype(complex)).imag + jnp.sqrt(-x.astype(complex)).real, x),
    "complex power": (lambda x, w: jnp.abs(lax.complex(x, w)) ** 2, x, w),
    "complex softmax of sizes": (lambda x, w: nn.softmax(jnp.abs(lax.complex(x, w)), 1), x, w),
    "complex sum": (lambda x: jnp.abs(on_circle(x).sum(1)) ** 2, x),
    "complex mean": (lambda x, w: jnp.var(lax.complex(x, w), 1), x, w),
    # One after the other, off the diagonal of either part
    "complex dot_general": (lambda x, w: (lax.complex(x, np.full((3, 5), 2.0)) @ (w.astype(complex) - 1j)).imag, normal(3, 5), normal(5, 2, seed=1)),
    "complex dot_general with real data": (lambda x: (x.astype(complex) @ on_circle(w.T)).imag, x),
    "complex conv": (lambda x: jnp.convolve(x.astype(complex), on_circle(w[0]), "same").imag, normal(5)),
    "complex gather": (on_complex(lambda z: z[np.array([0, 0, 2])]), x, w),
    "complex gather, filled": (on_complex(lambda z: z.at[OUTSIDE].get(mode="fill", fill_value=1 + 2j)), x, w),
    "complex scatter": (on_complex(lambda z: jnp.zeros((5, 6), complex).at[1:4].set(z[:3])), x, w),
    "complex scatter-add": (on_complex(lambda z: (z * 0.5).at[np.array([2, 2])].add(z[:2])), x, w),
    "complex scatter-sub": (on_complex(lambda z: jnp.ones((4, 6), complex).at[np.array([2, 2])].subtract(z[:2])), x, w),
    "complex scatter-mul": (on_complex(lambda z: z.at[np.array([0, 2])].multiply(2.0, unique_indices=True)), x, w),
    "complex scatter-mul by complex": (on_complex(lambda z: z.at[np.array([0, 2])].multiply(2 - 1j, unique_indices=True)), x, w),
    "complex slices": (on_complex(lambda z: jnp.concatenate([z[1:4:2, ::-1], 2 * z[:1]]).T), x, w),
    "complex dynamic_slice": (on_complex(lambda z: lax.dynamic_slice(z, (1, 2), (2, 3))), x, w),
    "complex pad": (on_complex(lambda z: lax.pad(z, 0j, ((1, 2, 1), (-1, 0, 0)))), x, w),
    "complex cumsum": (on_complex(lambda z: jnp.cumsum(z, 0)), x, w),
    "complex split": (on_complex(lambda z: jnp.split(z, (1, 3), axis=1)[1]), x, w),
    "complex barrier": (lambda x, w: lax.optimization_barrier((x, lax.complex(x, w)))[1].imag * 2, x, w),
    "complex to real": (lambda x, w: lax.convert_element_type(lax.complex(x, w), complex).real, x, w),
}  # fmt: skip

one, none = normal(1, 1), normal(0, 3)

# Operands of rank 0, of size 1 and without entries. The pointwise ones are tested by themselves.
SMALL: dict[str, Case] = {
    "broadcast_in_dim of rank 0": (lambda t: jnp.broadcast_to(t * t, (2, 3)), normal()),
    "concatenate with nothing": (lambda x, n: jnp.concatenate([x * x, n]), normal(2, 3), none),
    "concatenate of size 1": (lambda x, y: jnp.concatenate([x, y]) ** 2, normal(1), normal(1, seed=1)),
    "conv of size 1": (lambda x, k: convolved(x, k, (1, 1), "VALID"), normal(1, 1, 1, 1), normal(1, 1, 1, 1, seed=1)),
    "conv without a batch": (lambda x, k: convolved(x, k, (1, 1), "SAME"), normal(0, 2, 3, 3), normal(4, 2, 1, 1)),
    "cond of rank 0": (lambda t: lax.cond(t < 9, jnp.sin, jnp.cos, t), normal()),
    "cumlogsumexp of size 1": (lambda x: lax.cumlogsumexp(x, 1), one),
    "cummax of size 1": (lambda x: lax.cummax(x, 0) ** 1, one),
    "cumprod of size 1": (lambda x: lax.cumprod(x, 0), one),
    "cumsum of nothing": (lambda x: lax.cumsum(x, 0), none),
    "dot_general of a scalar and a vector": (lambda t, x: jnp.tensordot(t, x, 0), normal(), normal(3)),
    "dot_general of a matrix and a scalar": (lambda x, t: jnp.tensordot(x, t, 0), normal(2, 3), normal()),
    "dot_general of two scalars": (lambda s, t: jnp.tensordot(s, t, 0), normal(), normal(seed=1)),
    "dot_general of an outer product": (lambda x, y: jnp.tensordot(x, y, 0), normal(2), normal(3)),
    "dot_general of size 1": (jnp.matmul, one, normal(1, 1, seed=1)),
    "dot_general over nothing": (jnp.matmul, normal(2, 0), normal(0, 3)),
    "dot_general without rows": (jnp.matmul, normal(0, 3), normal(3, 2)),
    "dot_general without a batch": (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), normal(0, 2, 3), normal(0, 3, 2)),
    "dynamic_slice of size 1": (lambda x: lax.dynamic_slice(x * x, (0, 0), (1, 1)), one),
    "gather of nothing": (lambda x: (x * x)[np.zeros(0, int)], normal(2, 3)),
    "gather from size 1": (lambda x: (x * x)[np.array([0, 0])], one),
    "pad of nothing": (lambda x: lax.pad(x, 0.0, ((1, 0, 0), (0, 1, 0))), none),
    "reduce_max of size 1": (lambda x: x.max(1) ** 2, one),
    "reduce_prod of size 1": (lambda x: jnp.prod(x, 0), one),
    "reduce_prod of nothing": (lambda x: jnp.prod(x, 0), none),
    "reduce_sum of nothing": (lambda x: (x * x).sum(0), none),
    "reduce_sum of rank 0": (lambda t: (t * t).sum() ** 2, normal()),
    "reshape of rank 0": (lambda t: (t * t).reshape(1, 1), normal()),
    "rev of rank 0": (lambda t: jnp.flip(t * t), normal()),
    "rev of size 1": (lambda x: x[::-1] ** 2, normal(1)),
    "scan of rank 0": (lambda t: lax.scan(lambda c, _: (jnp.sin(c * t), None), t, length=2)[0], normal()),
    "scan of no steps": (lambda x: lax.scan(lambda c, y: (c * y, None), x, jnp.zeros((0, 3)))[0], normal(3)),
    "scatter of nothing": (lambda x, u: x.at[np.zeros(0, int)].set(u) ** 1, normal(2, 3), none),
    "scatter-add to size 1": (lambda x, u: x.at[np.array([0, 0])].add(u), one, normal(2, 1)),
    "sort of size 1": (lambda x: jnp.sort(x, 0), normal(1, 3)),
    "sort of nothing": (lambda x: jnp.sort(x, 1), none),
    "split with nothing": (lambda x: jnp.split(x * x, (0, 1))[1], normal(2, 3)),
    "squeeze to rank 0": (lambda x: lax.squeeze(x * x, (0, 1)), one),
    "stack of rank 0": (lambda s, t: jnp.stack([s, t, s * t]), normal(), normal(seed=1)),
    "top_k of size 1": (lambda x: lax.top_k(x, 1)[0], one),
    "transpose of rank 0": (lambda t: jnp.transpose(t * t), normal()),
    "transpose of nothing": (lambda x: (x * x).T, none),
}  # fmt: skip

PAIRS |= SPARSE
CASES = (
    UNARY
    | BINARY
    | SELECTION
    | MULTILINEAR
    | LINEAR_ALGEBRA
    | OTHER
    | CONTROL
    | BLOCKS
    | COMPLEX
    | SMALL
)


@jax.custom_vjp
def halved(x: jax.Array) -> jax.Array:
    """The cube of half of ``x``, with a rule that gives its gradient."""
    return (x / 2) ** 3


halved.defvjp(lambda x: ((x / 2) ** 3, x), lambda x, g: (3 / 8 * x**2 * g,))


@jax.custom_jvp
def reversed_sine(x: jax.Array) -> jax.Array:
    """The sine, in the other order."""
    return jnp.sin(x[::-1])


reversed_sine.defjvp(lambda xs, ts: (reversed_sine(*xs), (jnp.cos(xs[0]) * ts[0])[::-1]))


def constrained(x: jax.Array) -> jax.Array:
    """An array with a sharding that it has anyway."""
    return lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@jax.custom_batching.custom_vmap
def sine_times(x: jax.Array) -> jax.Array:
    """``x sin(x)`` with its own way to be vectorised."""
    return jnp.sin(x) * x


@sine_times.def_vmap
def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.sin(x) * x, batched[0]


def shrunk(x: jax.Array, steps: int) -> jax.Array:
    """More roots than covariances are followed through one by one."""
    size = jnp.exp(x).sum(1, keepdims=True)
    y = nn.softmax(x)
    for _ in range(steps):
        y = y + x / size
    return y


def pooled(x: jax.Array) -> jax.Array:
    """The maxima of overlapping windows."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 1, 1), "VALID")


def convolved(x: Any, kernel: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """``lax.conv_general_dilated``, channels first."""
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)


def normalised(x: jax.Array, axes: Any) -> jax.Array:
    """Zero mean and unit variance along axes."""
    centred = x - x.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def by_segments(x: jax.Array, ids: Any = SEGMENTS, count: int = 3) -> jax.Array:
    """The softmax over the rows of each segment."""
    e = jnp.exp(x - segment_max(x, ids, count)[ids])
    return e / segment_sum(e, ids, count)[ids]


def normalised_by_segments(x: jax.Array, ids: Any, count: int) -> jax.Array:
    """Zero mean and unit variance over the rows of each segment."""

    def mean(x: jax.Array) -> jax.Array:
        return added(x) / jnp.maximum(added(jnp.ones_like(x)), 1)

    def added(x: jax.Array) -> jax.Array:
        return jnp.zeros((count, *x.shape[1:])).at[ids].add(x)

    centred = x - mean(x)[ids]
    return centred * lax.rsqrt(mean(centred**2) + 1e-5)[ids]


def ratio(x: jax.Array, w: jax.Array, ids: Any) -> jax.Array:
    """The average of ``w`` over the rows of each segment, weighted by the softmax of ``x``."""
    e = jnp.exp(x)
    return segment_sum(e * w, ids, 3) / segment_sum(e, ids, 3)


def sums_at(x: jax.Array, ids: Any, mode: str | None) -> jax.Array:
    """For each row, the sum of those of its segment."""
    return segment_sum(x, ids, 4).at[ids].get(mode=mode, fill_value=0.0)


def unknown(ids: Any) -> jax.Array:
    """Ids that are no constant."""
    return lax.optimization_barrier(jnp.asarray(ids))


@jax.numpy_dtype_promotion("standard")  # Flax's own arithmetic needs it
def initialised(module: linen.Module, x: jax.Array) -> jax.Array:
    """The module's output with fresh parameters."""
    module = module.clone(param_dtype=x.dtype, dtype=x.dtype)
    return module.init_with_output(jax.random.key(1), x)[0]


@jax.numpy_dtype_promotion("standard")
def built(module: type[nnx.Module], x: jax.Array, *args: Any) -> jax.Array:
    """The output of a new module for the last axis of ``x``."""
    features = x.shape[-1]
    return module(features, *args, dtype=x.dtype, param_dtype=x.dtype, rngs=nnx.Rngs(0))(x)


def steps(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A loop with a branch, its last carry and what it hands out at each step."""

    def step(c: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = lax.cond(k > 0, lambda c: c * x + k, lambda c: c - x * x, c)
        return c, c * x

    return lax.scan(step, x, NUMBERS, reverse=True)


def in_steps(x: jax.Array) -> jax.Array:
    """What a loop hands out at each step."""
    return steps(x)[1]


def by_carry(x: jax.Array) -> jax.Array:
    """Some of what a loop hands out, on the last axis, by what it carries."""
    last, each = steps(x)
    return jnp.moveaxis(each[1:3], 0, -1) / (2 + last * last)[..., None]


def low(x: jax.Array) -> jax.Array:
    """The smallest entry of each row."""
    return x.min(1, keepdims=True)


def dots(x: jax.Array, w: jax.Array) -> jax.Array:
    """The dot product of each row of one with that of the other."""
    return jnp.einsum("bd,bd->b", x, w)


def focal(cross_entropy: jax.Array) -> jax.Array:
    """Cross-entropy, weighted down where the prediction is right."""
    return (1 - jnp.exp(-cross_entropy)) ** 2 * cross_entropy


def assert_close(received: Any, expected: Any) -> None:
    """Up to rounding, relative to the largest entry of each array."""
    for got, want in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * max(1e-3, np.abs(want).max()))
