"""One model, written in many ways, has one diagonal, also where that is not exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax import lax, nn

import hesscale_jax as hs

B, T, D, H, V = 2, 4, 6, 2, 8
PARAMS = {
    "scale": jnp.ones(D),
    "qkv": 0.5 * normal(D, 3 * D, seed=1),
    "out": 0.5 * normal(D, D, seed=2),
    "head": 0.5 * normal(D, V, seed=3),
}
TOKENS = 0.5 * normal(B, T, D, seed=4)
LABELS = jnp.array([[1, 2, 3, 0], [4, 5, 6, 7]])
PAST = jnp.tril(jnp.ones((T, T), bool))[None, None]

WAYS = {
    "parts": {
        "split": lambda z: jnp.split(z, 3, -1),
        "slices": lambda z: [z[..., i * D : (i + 1) * D] for i in range(3)],
        "dynamic slices": lambda z: [lax.dynamic_slice_in_dim(z, i * D, D, -1) for i in range(3)],
        "moveaxis": lambda z: jnp.moveaxis(z.reshape(B, T, 3, D), 2, 0),
    },
    "scores": {
        "einsum": lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k),
        "matmul": lambda q, k: q.swapaxes(1, 2) @ k.swapaxes(1, 2).swapaxes(-1, -2),
    },
    "masked": {
        "where": lambda s: jnp.where(PAST, s, -1e9),
        "added": lambda s: s + jnp.where(PAST, 0.0, -1e9),
    },
    "softmax": {
        "nn": lambda s: nn.softmax(s),
        "by logsumexp": lambda s: jnp.exp(s - nn.logsumexp(s, -1, keepdims=True)),
    },
    "loss": {
        "taken": lambda z: -taken(nn.log_softmax(z)).mean(),
        "one-hot": lambda z: -(nn.one_hot(LABELS, V) * nn.log_softmax(z)).sum(-1).mean(),
        "logsumexp": lambda z: (nn.logsumexp(z, -1) - taken(z)).mean(),
    },
    "around": {
        "nothing": lambda fun: fun,
        "checkpoint": jax.checkpoint,
        "barrier": lambda fun: lambda *xs: lax.optimization_barrier(fun(*xs)),
    },
}
FIRST = {part: next(iter(ways)) for part, ways in WAYS.items()}
OTHERS = [{part: way} for part, ways in WAYS.items() for way in list(ways)[1:]]


def taken(z):
    return jnp.take_along_axis(z, LABELS[..., None], -1)[..., 0]


def diagonal(**chosen):
    way = {part: WAYS[part][name] for part, name in (FIRST | chosen).items()}

    def attention(params, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        qkv = (x * params["scale"][None, None]) @ params["qkv"]
        q, k, v = (z.reshape(B, T, H, D // H) for z in way["parts"](qkv))
        weights = way["softmax"](way["masked"](way["scores"](q, k) / np.sqrt(D / H)))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        return mixed.reshape(B, T, D) @ params["out"]

    def loss(params):
        x = TOKENS + way["around"](attention)(params, TOKENS)
        return way["loss"](x @ params["head"])

    return jax.jit(hs.hesscale(loss))(PARAMS)[1]


@pytest.mark.parametrize("chosen", OTHERS, ids=lambda chosen: " ".join(*chosen.items()))
def test_the_same_however_it_is_written(chosen):
    received, expected = diagonal(**chosen), diagonal()
    for name, want in expected.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(received[name], want, rtol=0, atol=1e-12 * scale, err_msg=name)
