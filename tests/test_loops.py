"""Loops whose body is one block: exact, as written out, with the same equations for any length."""

import functools

import jax
import jax.numpy as jnp
import oracle
import programs
import pytest
from cases import assert_close, normal
from jax import lax, nn
from jax.flatten_util import ravel_pytree

import hesscale_jax as hs

N = 3
LENGTH = 5


def written_out(step, carry, xs, length=None, reverse=False):
    length = length or len(jax.tree.leaves(xs)[0])
    for t in reversed(range(length)) if reverse else range(length):
        carry, _ = step(carry, jax.tree.map(lambda x, t=t: x[t], xs))
    return carry, None


def of_length(xs, length):
    return xs if length == LENGTH else jnp.resize(xs, (length, *xs.shape[1:]))


def horner(p, scan, length=LENGTH):
    coefficients = jnp.arange(1.0, length + 1)
    return scan(lambda y, c: (y * p["a"] + c, None), jnp.zeros(N), coefficients)[0].sum()


def recurrent_unit(p, scan, length=LENGTH):
    def step(h, _):
        return jnp.tanh(p["a"] * h + p["b"]), None

    return (scan(step, jnp.full(N, 0.5), None, length=length)[0] ** 2 * p["b"]).sum()


def state_space(p, scan, length=LENGTH):
    decay = jax.nn.sigmoid(p["a"])
    inputs = of_length(p["xs"], length)

    def step(h, x):
        return decay * h + p["b"] * x, None

    return jnp.sin(scan(step, jnp.zeros(N), inputs, reverse=True)[0] * decay).sum()


def momentum(p, scan, length=LENGTH):
    def step(carry, _):
        x, v = carry
        v = 0.9 * v - 0.1 * p["b"] * jnp.sin(x)
        return (x + v, v), None

    x, v = scan(step, (jnp.cos(p["a"]), p["b"]), None, length=length)[0]
    return (x * v * p["a"]).sum()


def two_chains(p, scan, length=LENGTH):
    """Neither carry reads the other, and both what is scanned over."""

    def step(carry, x):
        return (carry[0] * p["a"] + x, jnp.sin(carry[1]) * p["b"] + x * x), None

    x, y = scan(step, (jnp.zeros(N), jnp.ones(N)), of_length(p["xs"], length))[0]
    return (x * y * p["a"]).sum()


def of_two_sizes(p, scan, length=LENGTH):
    def step(carry, _):
        h, s = carry
        return (jnp.tanh(h * p["a"] * s), s * jnp.sin(p["s"])), None

    h, s = scan(step, (p["b"], p["s"]), None, length=length)[0]
    return (h * p["b"] * s).sum()


def nested(p, scan, length=LENGTH):
    def outer(h, x):
        inner = scan(lambda h, _: (jnp.tanh(p["a"] * h + x), None), h + p["b"], None, length=3)[0]
        return inner * p["a"], None

    return (scan(outer, p["a"], of_length(p["xs"], length))[0] ** 2).sum()


def streamed_log_sum_exp(p, scan, length=LENGTH):
    """The largest so far and a sum relative to it, block by block."""
    blocks = of_length(p["blocks"], length)

    def step(carry, x):
        top, total = carry
        new = jnp.maximum(top, x.max(-1))
        return (new, total * jnp.exp(top - new) + jnp.exp(x - new[:, None]).sum(-1)), None

    top, total = scan(step, (jnp.full(N, -1e9), jnp.zeros(N)), blocks)[0]
    return ((top + jnp.log(total)) ** 2).sum()


def running_variance(p, scan, length=LENGTH):
    def step(carry, x):
        n, mean, total = carry
        new = mean + (x - mean) / (n + 1)
        return (n + 1, new, total + (x - mean) * (x - new)), None

    start = (0.0, jnp.zeros(N), jnp.zeros(N))
    n, _, total = scan(step, start, of_length(p["xs"], length))[0]
    return jnp.log(total / n).sum()


def by_fori_loop(p, scan, length=LENGTH):
    def step(i, y):
        return jnp.tanh(p["a"] * y + jnp.asarray(i, float))

    if scan is lax.scan:
        y = lax.fori_loop(0, length, step, p["a"])
    else:
        y = functools.reduce(lambda y, i: step(i, y), range(length), p["a"])
    return (y**2).sum()


def reshaped(p, scan, length=LENGTH):
    """What is read at every step has more axes than what is carried."""
    table = jnp.cos(p["blocks"][0])

    def step(h, _):
        return jnp.tanh(h * table.reshape(-1)), None

    return (scan(step, table.reshape(-1), None, length=length)[0].reshape(N, 4) * table).sum()


def in_checkpoint(p, scan, length=LENGTH):
    """A block crosses the border of a checkpoint twice: around the loop, and in its body."""

    @jax.checkpoint
    def ends(a, xs):
        @jax.checkpoint
        def step(carry, x):
            return (jnp.tanh(carry[0] * a + x), carry[0] * carry[1]), None

        return scan(step, (a, a * a), xs, reverse=True)[0]

    a = jnp.sin(p["a"])
    x, y = ends(a, of_length(p["xs"], length))
    return (x * y * a).sum()


CASES = {
    fun.__name__: fun
    for fun in (
        *(horner, recurrent_unit, state_space, momentum, two_chains, of_two_sizes, nested),
        *(streamed_log_sum_exp, running_variance, by_fori_loop, reshaped, in_checkpoint),
    )
}
# Where a slice of what is scanned over is read twice in a step, each time counts as independent
# if the loop is written out.
TWICE = {"two_chains", "in_checkpoint", "nested", "running_variance"}
TWICE |= {"streamed_log_sum_exp"}
PARAMS = {
    "a": 0.7 * normal(N),
    "b": normal(N, seed=1),
    "s": jnp.asarray(0.7),
    "xs": normal(LENGTH, N, seed=2),
    "blocks": normal(LENGTH, N, 4, seed=3),
}


def exact(loss):
    flat, unravel = ravel_pytree(PARAMS)
    return unravel(jnp.diag(jax.hessian(lambda x: loss(unravel(x)))(flat)))


@pytest.mark.parametrize("name", CASES)
def test_a_loop_is_exact(name):
    loss = functools.partial(CASES[name], scan=lax.scan)
    grad, hess_diag = jax.jit(hs.hesscale(loss))(PARAMS)
    assert_close(grad, jax.grad(loss)(PARAMS))
    assert_close(hess_diag, exact(loss))


@pytest.mark.parametrize("name", sorted(CASES.keys() - TWICE))
def test_a_loop_is_as_it_is_written_out(name):
    received, expected = (
        jax.jit(hs.hesscale(functools.partial(CASES[name], scan=scan)))(PARAMS)
        for scan in (lax.scan, written_out)
    )
    assert_close(received, expected)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"horner"}))
def test_it_takes_the_same_equations_for_any_length(name):
    def count(length):
        loss = functools.partial(CASES[name], scan=lax.scan, length=length)
        return str(jax.make_jaxpr(hs.hesscale(loss))(PARAMS)).count(" = ")

    assert count(40) == count(20)


@pytest.mark.parametrize("length", [1, 2, 20])
def test_what_a_step_sums_and_hands_out_has_the_variance_that_the_contract_gives_it(length):
    # The entries of what is carried share the scalar: within its block alone is that known.
    def loss(scale, x):
        def step(h, _):
            return jnp.tanh(h), jnp.mean(h, 0)

        return jnp.sum(lax.scan(step, scale * x, None, length=length)[1] ** 2)

    oracle.check(loss, jnp.array(0.4), normal(2, N))


def test_a_loop_of_no_step_is_what_it_starts_from():
    def loss(x):
        end, ys = lax.scan(lambda c, t: (jnp.sin(c), c * t), x, jnp.zeros((0,)))
        return end @ x + ys.sum()

    x = normal(4)
    _, received = hs.hesscale(loss)(x)
    assert_close(received, jnp.full(4, 2.0))


def test_a_loop_over_rows_that_carries_nothing_is_all_rows_at_once():
    def loss(x, over=lambda fun, x: fun(x)):
        return jnp.sum(over(nn.softmax, A @ x) ** 2) + jnp.sum(over(jnp.tanh, A @ x)) ** 2

    x, A = normal(3, 2), normal(6, 3)
    looped = functools.partial(loss, over=lax.map)
    assert_close(hs.hesscale(looped)(x), hs.hesscale(loss)(x))


# Short loops: those of many steps are not written out, and what their sums share is dropped.
@pytest.mark.parametrize("total", [lambda y: jnp.sum(y, 0), jnp.sum], ids=["rows", "all"])
def test_a_loop_that_hands_out_sums(total):
    def loss(x):
        def step(y, _):
            y = jnp.arctan2(y, 1.5 + x[0] ** 2)
            return 0.5 * y, total(y)

        return jnp.sum(jnp.sin(lax.scan(step, normal(2, N), None, length=3)[1]))

    oracle.check(loss, normal(2))
    assert_close(hs.hesscale(loss)(normal(2))[1], jnp.diag(jax.hessian(loss)(normal(2))))


def test_what_each_step_of_a_loop_selects_alike_is_selected_before_it():
    def loss(x):
        return jnp.sum(lax.fori_loop(0, 3, lambda _, y: 0.5 * y - x[1] * A, 0 * A) ** 2)

    A = normal(4)
    oracle.check(loss, normal(3))
    assert_close(hs.hesscale(loss)(normal(3))[1], jnp.diag(jax.hessian(loss)(normal(3))))
    assert "rewriting.py" not in str(hs.explain(loss)(normal(3)))


def test_a_loop_in_a_loop_may_be_handed_what_no_step_reads():
    def loss(x):
        small, large = x.min(keepdims=True), jnp.stack([x[:1] + i for i in range(3)])

        def inner(i, y):
            large[i % 3]
            return 0.5 * small

        def step(carry, y):
            return (lax.fori_loop(0, 2, inner, y), jnp.tanh(large)), None

        small_end, large_end = lax.scan(step, (small, large), large)[0]
        return jnp.sum(large_end) + jnp.sum((small_end[:, None] @ small_end[None]) ** 2)

    oracle.check(loss, normal(3))


def test_a_branch_that_is_known_is_no_branch():
    def loss(x):
        double = lax.cond(True, lambda x: 2 * x, jnp.sin, x)
        return double @ x + lax.switch(1, [jnp.sum, lambda x: jnp.sum(x) ** 2], x)

    _, received = hs.hesscale(loss)(normal(4))
    assert_close(received, jnp.full(4, 6.0))


def test_a_loop_of_one_step_is_its_body():
    def step(carry, t):
        x, y = carry
        return (0.5 * y, jnp.tanh(x)), jnp.vdot(x, y) * jnp.sum(t)

    def looped(x):
        (a, b), ys = lax.scan(step, (x, x), x[None], length=1, reverse=True)
        return jnp.sum(ys**2) + jnp.vdot(a, b)

    def once(x):
        (a, b), y = step((x, x), x)
        return y**2 + jnp.vdot(a, b)

    assert_close(hs.hesscale(looped)(normal(4)), hs.hesscale(once)(normal(4)))


PPF_SLOPES = jax.grad(lambda x: jnp.sum(jax.scipy.stats.norm.ppf(0.1 + 0.8 * jax.nn.sigmoid(x))))


HORNER = {
    "nothing": PPF_SLOPES,
    "a loop": lambda x: lax.fori_loop(0, 2, lambda _, y: 0.5 * PPF_SLOPES(y), x),
    "a branch": lambda x: lax.cond(x[0, 0] < 9.0, PPF_SLOPES, jnp.sin, x),
}


@pytest.mark.parametrize("within", HORNER)
def test_the_gradient_of_horner_s_scheme_is_exact(within):
    x = normal(3, 2)

    def loss(x):
        return jnp.sum(HORNER[within](x))

    _, (expected,) = programs.hessian_diagonals(loss, [x], [0])
    assert_close(oracle.computed(hs.hesscale(loss), x)[1], expected)
