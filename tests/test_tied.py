"""What an equation takes at several of its places may be one value: it varies once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, normal
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import hesscale_jax as hs

X = normal(3)


def with_jvp(fun):
    wrapped = jax.custom_jvp(fun)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fun, primals, tangents))
    return wrapped


def with_vjp(fun):
    wrapped = jax.custom_vjp(fun)
    wrapped.defvjp(lambda *args: (fun(*args), args), lambda args, g: jax.vjp(fun, *args)[1](g))
    return wrapped


def in_a_branch(fun):
    return lambda a, b: lax.cond(jnp.sum(a) < 100, fun, lambda a, b: 0 * fun(a, b), a, b)


def at_every_step(fun):
    def run(a, b):
        return lax.scan(lambda c, _: (fun(a, b), None), 0 * fun(a, b), None, length=1)[0]

    return run


def on_a_mesh(fun):
    mesh = Mesh(jax.devices()[:1], "data")
    return jax.shard_map(fun, mesh=mesh, in_specs=(P(), P()), out_specs=P())


def of_a_kernel(fun):
    """A function that JAX cannot look into, with what it computes given by a rule."""

    def apply(a, b):
        y = jax.eval_shape(fun, a, b)
        return jax.pure_callback(lambda a, b: np.asarray(fun(a, b)), y, a, b)

    kernel = jax.custom_vjp(apply)
    kernel.defvjp(lambda *args: (kernel(*args), args), lambda args, g: jax.vjp(fun, *args)[1](g))
    return kernel


WRAPS = [with_jvp, with_vjp, in_a_branch, at_every_step, on_a_mesh, jax.checkpoint, jax.jit]


def dot(a, b):
    return jnp.sum(a * b)


def difference(a, b):
    return jnp.sin(a - 2 * b)


def outer(a, b):
    return jnp.outer(a, b)


def running(a, b):
    return jnp.cumsum(a[::-1]) * b


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("fun", [dot, difference, outer, running])
def test_a_value_that_a_function_takes_twice(fun, wrap):
    def loss(x, fun):
        y = jnp.sin(x) * x
        return jnp.sum(fun(y, y) ** 2)

    received, expected = (hs.hesscale(lambda x, f=f: loss(x, f))(X) for f in (wrap(fun), fun))
    assert_close(received, expected)
    assert_close(received[0], jax.grad(loss)(X, fun))


def test_a_function_whose_definition_is_given():
    kernel = of_a_kernel(difference)
    rules = hs.RULES | {"custom_vjp_call[apply]": hs.rules.defined_by(difference)}
    received = hs.hesscale(lambda x: jnp.sum(kernel(x, x) ** 2), rules=rules)(X)
    assert_close(received, hs.hesscale(lambda x: jnp.sum(difference(x, x) ** 2))(X))


@pytest.mark.parametrize("other", [jnp.positive, jnp.square, jnp.flip])
def test_a_reduction_of_an_array_and_an_image_of_it(other):
    def loss(x):
        y = jnp.sin(x) + 1

        def multiply(a, b):
            return a[0] * b[0], a[1] + b[1]

        starts = jnp.array(1.0), jnp.array(0.0)
        return jnp.sum(lax.reduce((y, other(y)), starts, multiply, [0])[0] ** 2)

    _, hess_diag = hs.hesscale(loss)(X)
    assert_close(hess_diag, jnp.diag(jax.hessian(loss)(X)))


def rooted(a, b):
    def step(state):
        x, count = state
        return 0.5 * x + b, count + 1

    return lax.while_loop(lambda state: state[1] < 5, step, (a, 0))[0]


def rounded(a, b):
    return jnp.round(a) * b


@pytest.mark.parametrize("fun", [rooted, rounded])
def test_a_rule_of_its_own_is_that_of_one_value(fun):
    """The rule's Jacobians in both operands are added up, where the body has none."""
    twice, once = jax.custom_vjp(fun), jax.custom_vjp(lambda a: fun(a, a))
    twice.defvjp(lambda a, b: (fun(a, b), (a, b)), lambda args, g: (g * args[1], -3 * g * args[0]))
    once.defvjp(lambda a: (fun(a, a), a), lambda a, g: (-2 * g * a,))
    received, expected = (
        hs.hesscale(lambda x, f=f: jnp.sum(f(jnp.sin(x)) ** 2))(X)
        for f in (lambda a: twice(a, a), once)
    )
    assert_close(received, expected)


@pytest.mark.parametrize("specs", [(P("data"), P()), (P("data"), P("data"))])
def test_what_is_split_in_two_ways_is_two_values(specs):
    mesh = Mesh(jax.devices()[:2], "data")

    def fun(a, b):
        return lax.psum(jnp.sum(a) * jnp.sum(b**2), "data")

    def loss(x):
        y = jnp.tanh(x)
        return jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=P())(y, y)

    x = normal(4)
    grad, hess_diag = jax.jit(hs.hesscale(loss))(x)
    assert_close(grad, jax.grad(loss)(x))
    assert np.isfinite(hess_diag).all()
