"""Flax's lifted transformations: a stack of layers by any of them has the derivatives of a loop."""

import jax
import jax.numpy as jnp
import pytest
from cases import assert_close, normal
from flax import linen, nnx

import hesscale_jax as hs

DEPTH, WIDTH, BATCH = 3, 4, 5
X = normal(BATCH, WIDTH)
every_curvature = pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # Flax's own arithmetic needs it
        yield


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        y = linen.LayerNorm(param_dtype=x.dtype)(x)
        return x + jnp.tanh(linen.Dense(WIDTH, param_dtype=x.dtype)(y)), None


class Stack(linen.Module):
    layer: type[linen.Module]

    @linen.compact
    def __call__(self, x):
        stacked = linen.scan(
            self.layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        x, _ = stacked(name="layers")(x, None)
        return linen.Dense(2, param_dtype=x.dtype, name="head")(x)


@every_curvature
@pytest.mark.parametrize("lift", [lambda layer: layer, linen.remat], ids=["scan", "remat, scan"])
def test_linen_scan(lift, curvature):
    def scanned(params):
        return (Stack(lift(Layer)).apply({"params": params}, X) ** 2).mean()

    def looped(params):
        x = X
        for i in range(DEPTH):
            layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
            x, _ = Layer().apply({"params": layer}, x)
        return (
            linen.Dense(2, param_dtype=x.dtype).apply({"params": params["head"]}, x) ** 2
        ).mean()

    params = Stack(Layer).init(jax.random.key(1), X)["params"]
    received, expected = (
        jax.jit(hs.hesscale(fun, curvature=curvature))(params) for fun in (scanned, looped)
    )
    assert_close(received, expected)


def test_linen_vmap():
    class Heads(linen.Module):
        @linen.compact
        def __call__(self, x):
            dense = linen.vmap(
                linen.Dense,
                in_axes=None,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=2,
            )
            return dense(3, param_dtype=x.dtype, name="dense")(x)

    def by_hand(params):
        kernel, bias = params["params"]["dense"]["kernel"], params["params"]["dense"]["bias"]
        return (jnp.tanh(jnp.einsum("bi,hio->hbo", X, kernel) + bias[:, None]) ** 2).mean()

    params = Heads().init(jax.random.key(0), X)
    received = jax.jit(hs.hesscale(lambda p: (jnp.tanh(Heads().apply(p, X)) ** 2).mean()))(params)
    assert_close(received, jax.jit(hs.hesscale(by_hand))(params))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, param_dtype=X.dtype, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, param_dtype=X.dtype, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


@nnx.vmap(in_axes=0, out_axes=0)
def blocks(key):
    return Block(nnx.Rngs(key))


def in_a_loop(stack, x, call=lambda block, x: block(x)):
    graphdef, state = nnx.split(stack)
    for i in range(DEPTH):
        x = call(nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], state)), x)
    return x


def scanned(stack, x, call=lambda block, x: block(x)):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return call(block, x)

    return run(x, stack)


NNX = {
    "scan": scanned,
    "remat": lambda stack, x: in_a_loop(stack, x, nnx.remat(lambda block, x: block(x))),
    "remat in a scan": lambda stack, x: scanned(stack, x, nnx.remat(lambda block, x: block(x))),
    "remat of a scan": nnx.remat(lambda stack, x: scanned(stack, x)),
    "vmap over examples": lambda stack, x: nnx.vmap(
        lambda stack, x: in_a_loop(stack, x), in_axes=(None, 0)
    )(stack, x),
    "jit": nnx.jit(scanned),
    "cond": lambda stack, x: nnx.cond(x.sum() < 1e6, in_a_loop, lambda stack, x: x, stack, x),
}


@every_curvature
@pytest.mark.parametrize("way", NNX)
def test_nnx(way, curvature):
    graphdef, state = nnx.split(blocks(jax.random.split(jax.random.key(0), DEPTH)))
    state = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape), state)
    out = normal(WIDTH, 2, seed=1)

    def loss(params, way):
        state, out = params
        return ((way(nnx.merge(graphdef, state), X) @ out) ** 2).mean()

    received, expected = (
        jax.jit(hs.hesscale(lambda p, way=way: loss(p, way), curvature=curvature))((state, out))
        for way in (NNX[way], in_a_loop)
    )
    assert_close(received, expected)
