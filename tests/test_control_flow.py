"""Loops, branches, rematerialisation: how a program is written does not change its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, normal, normalised
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.ops import segment_sum

import hesscale_jax as hs
from hesscale_jax import testing

DEPTH, BATCH, WIDTH, CLASSES = 3, 5, 4, 2
LABELS = np.array([0, 1, 1, 0, 1])
PARAMS = {
    "layers": {"w": normal(DEPTH, WIDTH, WIDTH) / 2, "b": normal(DEPTH, WIDTH, seed=1) / 3},
    "out": normal(WIDTH, CLASSES, seed=2),
}
INPUTS = normal(BATCH, WIDTH, seed=3)

every_curvature = pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])


def layer(h, p):
    return h + nn.gelu(normalised(h, -1) @ p["w"] + p["b"][None])


def head(h, out, labels=LABELS):
    logits = normalised(h, -1) @ out
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def at(params, i):
    return jax.tree.map(lambda p: p[i], params["layers"])


def looped(params, x, layer=layer, head=head, labels=LABELS):
    for i in range(DEPTH):
        x = layer(x, at(params, i))
    return head(x, params["out"], labels)


def scanned(params, x, layer=layer, **options):
    x, _ = lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"], **options)
    return head(x, params["out"])


def by_fori_loop(params, x):
    x = lax.fori_loop(0, DEPTH, lambda i, x: layer(x, at(params, i)), x)
    return head(x, params["out"])


def backwards(params, x):
    flipped = jax.tree.map(lambda p: p[::-1], params["layers"])
    x, _ = lax.scan(lambda x, p: (layer(x, p), None), x, flipped, reverse=True)
    return head(x, params["out"])


def by_cond(params, x):
    for i in range(DEPTH):
        x = lax.cond(x.sum() < 1e6, layer, lambda x, p: 2 * x, x, at(params, i))
    return head(x, params["out"])


def by_switch(params, x):
    branches = [functools.partial(layer, p=at(params, i)) for i in range(DEPTH)]

    def step(x, i):
        return lax.switch(i, branches, x), None

    return head(lax.scan(step, x, jnp.arange(DEPTH))[0], params["out"])


def with_counter(params, x):
    """A carry that is on no path, one that does not move, and a result of each step unused."""

    def step(carry, p):
        x, total, count = carry
        x = layer(x, p)
        return (x, total + x.sum(), count + 1.0), (x, count)

    (x, *_), _ = lax.scan(step, (x, 0.0, 0.0), params["layers"])
    return head(x, params["out"])


def by_example(params, x, label):
    return looped(params, x[None], labels=label[None])


def in_microbatches(params, x):
    def step(total, batch):
        return total + by_example(params, *batch), None

    return lax.scan(step, 0.0, (x, LABELS))[0] / BATCH


def results_by_step(params, x):
    return lax.map(lambda batch: by_example(params, *batch), (x, LABELS), batch_size=2).mean()


def by_vmap(params, x):
    return jax.vmap(by_example, (None, 0, 0))(params, x, LABELS).mean()


remat = jax.checkpoint
dots_saved = functools.partial(remat, policy=jax.checkpoint_policies.dots_saveable)
WAYS = {
    "scan": scanned,
    "scan, unrolled": functools.partial(scanned, unroll=DEPTH),
    "scan, reversed": backwards,
    "scan with other carries": with_counter,
    "fori_loop": by_fori_loop,
    "cond": by_cond,
    "switch in a scan": by_switch,
    "microbatches": in_microbatches,
    "map": results_by_step,
    "vmap": by_vmap,
    "checkpoint of everything": remat(looped),
    "checkpoint of layers": lambda *args: looped(*args, layer=remat(layer)),
    "checkpoint of the head": lambda *args: looped(*args, head=remat(head)),
    "checkpoint of all three": remat(lambda *args: looped(*args, remat(layer), remat(head))),
    "checkpoint with a policy": dots_saved(looped),
    "checkpoint in a scan": lambda *args: scanned(*args, layer=remat(layer)),
    "checkpoint of a scan": remat(scanned),
    "checkpoint of a loss in a cond": lambda *args: lax.cond(
        args[1].sum() < 1e6, remat(looped), lambda *args: 0.0 * args[0]["out"].sum(), *args
    ),
}


@every_curvature
@pytest.mark.parametrize("way", WAYS)
def test_the_way_it_is_written_does_not_matter(way, curvature):
    received = jax.jit(hs.hesscale(WAYS[way], curvature=curvature))(PARAMS, INPUTS)
    expected = jax.jit(hs.hesscale(looped, curvature=curvature))(PARAMS, INPUTS)
    assert_close(received, expected)
    assert_close(received[0], jax.jit(jax.grad(WAYS[way]))(PARAMS, INPUTS))


def crossing(inside):
    """``inside`` is called in the middle of blocks: of a softmax, of a GELU, of a layer norm."""

    def loss(p, q):
        h = jnp.tanh(INPUTS @ p)
        a, b = inside(lambda h: (h * nn.sigmoid(h), h.mean(-1, keepdims=True)))(h)
        h = inside(lambda a, b: (a - b) / jnp.sqrt(a.var(-1, keepdims=True) + b**2 + 0.1))(a, b)
        z = h @ q + a.sum(-1, keepdims=True)
        top = inside(lambda z: z - z.max(-1, keepdims=True))(z)
        rest = inside(lambda top: jnp.log(inside(jnp.exp)(top).sum(-1)))(top)
        return (rest - top[:, 0]).mean() + 0.1 * inside(lambda p: (p * p).sum())(p)

    return loss


@every_curvature
def test_a_block_crosses_the_border_of_a_checkpoint(curvature):
    args = normal(WIDTH, WIDTH, seed=4), normal(WIDTH, CLASSES, seed=5)
    for wrap in (remat, lambda fun: jax.jit(remat(fun))):
        received = hs.hesscale(crossing(wrap), (0, 1), curvature=curvature)(*args)
        assert_close(
            received, hs.hesscale(crossing(lambda f: f), (0, 1), curvature=curvature)(*args)
        )
        assert_close(received[0], jax.grad(crossing(wrap), (0, 1))(*args))


def by_segments(inside, known):
    """``inside`` is called in the middle of a softmax over segments, whose ids it may compute."""

    def loss(p, q):
        h = jnp.tanh(INPUTS @ p)
        ids = jnp.argsort(INPUTS[:, 0]) % 3

        def of(h, given):
            ids = given if known else jnp.argsort(INPUTS[:, 0]) % 3
            return jnp.exp(h), segment_sum(jnp.exp(h), ids, 4)

        e, s = inside(of)(h, ids)
        logs = inside(lambda s: jnp.log(1 + s) * q[0, 0])(s)
        y = inside(lambda e, s, logs: e / s[ids] * logs[ids])(e, s, logs)
        return (y**2).mean() + inside(lambda s: s / (1 + s))(s).mean()

    return loss


@pytest.mark.parametrize("known", [True, False])
def test_sums_by_segments_cross_the_border_of_a_checkpoint(known):
    args = normal(WIDTH, WIDTH, seed=4), normal(WIDTH, CLASSES, seed=5)
    received = hs.hesscale(by_segments(remat, known), (0, 1))(*args)
    assert_close(received, hs.hesscale(by_segments(lambda f: f, known), (0, 1))(*args))
    assert_close(received[0], jax.grad(by_segments(remat, known), (0, 1))(*args))


def test_a_checkpoint_saves_nothing_inside():
    def residuals(wrap):
        fun = jax.jit(hs.hesscale(lambda *args: scanned(*args, layer=wrap(wide))))
        return fun.lower(PARAMS, INPUTS).as_text().count(f"tensor<{DEPTH}x{BATCH}x8xf64>")

    def wide(h, p):
        return h + jnp.tanh(jnp.tile(h @ p["w"], 2)).sum(-1, keepdims=True)

    assert residuals(lambda fun: fun) > 0
    assert residuals(remat) == 0


def test_policy_is_kept():
    """What the policy saves is handed from the forward to the backward pass."""

    def residuals(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def named(h, p):
            wide = checkpoint_name(jnp.tanh(jnp.tile(h @ p["w"], 2)), "wide")
            return h + jnp.sin(wide).sum(-1, keepdims=True)

        fun = hs.hesscale(lambda *args: scanned(*args, layer=remat(named, policy=policy)))
        return jax.jit(fun).lower(PARAMS, INPUTS).as_text().count(f"{DEPTH}x{BATCH}x8xf64")

    assert residuals("wide") > 0
    assert residuals("other") == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_recurrent_network(reverse):
    """Parameters as constants, inputs as xs, carries that move only inside of the loop."""
    xs = normal(4, BATCH, 3, seed=6)
    params = (
        normal(3, WIDTH) / 2,
        normal(WIDTH, WIDTH, seed=1) / 2,
        normal(WIDTH, seed=2),
        normal(WIDTH, CLASSES, seed=3),
    )

    def cell(carry, x, params):
        h, c = carry
        inputs, recurrent, bias, _ = params
        a = x @ inputs + h @ recurrent + bias[None]
        c = nn.sigmoid(a + 1) * c + nn.sigmoid(a) * jnp.tanh(a)
        h = nn.sigmoid(2 * a) * jnp.tanh(c)
        return (h, c), h

    start = (jnp.zeros((BATCH, WIDTH)), jnp.zeros((BATCH, WIDTH)))

    def by_scan(params):
        (h, _), hs = lax.scan(lambda c, x: cell(c, x, params), start, xs, reverse=reverse)
        return ((hs @ params[-1]) ** 2).mean() + (h @ params[-1]).sum()

    def unrolled(params):
        carry, hs = start, []
        for x in xs[::-1] if reverse else xs:
            carry, h = cell(carry, x, params)
            hs.append(h)
        return ((jnp.stack(hs) @ params[-1]) ** 2).mean() + (carry[0] @ params[-1]).sum()

    for curvature in ("hessian", "gauss_newton"):
        received, expected = (
            jax.jit(hs.hesscale(fun, curvature=curvature))(params) for fun in (by_scan, unrolled)
        )
        assert_close(received, expected)


def test_a_carry_that_becomes_active_inside():
    def by_scan(p):
        def step(carry, _):
            a, b, c = carry
            return (p * 2.0, jnp.sin(a), b * b), c

        (_, b, c), cs = lax.scan(step, (jnp.ones(3), jnp.ones(3), jnp.ones(3)), length=4)
        return (b * c).sum() + cs.sum()

    def unrolled(p):
        a, b, c, total = jnp.ones(3), jnp.ones(3), jnp.ones(3), 0.0
        for _ in range(4):
            total += c.sum()
            a, b, c = p * 2.0, jnp.sin(a), b * b
        return (b * c).sum() + total

    p = normal(3)
    grad, hess_diag = hs.hesscale(by_scan)(p)
    assert_close(grad, jax.grad(by_scan)(p))
    # Each entry of p is on its own, but it reaches the loss by several steps, taken as independent:
    # all that can be said of the diagonal is what each step has by itself.
    assert np.isfinite(hess_diag).all()
    assert_close(jax.grad(by_scan)(p), jax.grad(unrolled)(p))


def test_results_of_branches_move_where_those_of_others_do_not():
    def fun(x, which):
        branches = [lambda x: (x * x, jnp.ones(3)), lambda x: (jnp.ones(3), jnp.sin(x))]
        a, b = lax.switch(which, branches, x)
        return a * b

    for which in (0, 1):
        testing.check_rule(lambda x, which=which: fun(x, which), normal(3), key=jax.random.key(1))


def test_loops_of_unknown_length_say_what_jax_says():
    def loss(p):
        return lax.while_loop(lambda x: x.sum() < 5, lambda x: x * 1.5, p * p).sum()

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work") as theirs:
        jax.grad(loss)(normal(3))
    with pytest.raises(hs.UnsupportedPrimitiveError, match="Reverse-mode differentiation") as ours:
        hs.hesscale(loss)(normal(3))
    assert isinstance(ours.value, ValueError)
    assert str(theirs.value)[:90] == str(ours.value)[:90]
    assert "test_control_flow.py" in str(ours.value)


def test_loops_of_unknown_length_off_the_path():
    def loss(p):
        count, _ = lax.while_loop(
            lambda c: c[1] < 5, lambda c: (c[0] + 1, c[1] * 2), (0, p.sum() ** 2)
        )
        frozen = lax.while_loop(lambda x: x < 5, lambda x: x * 1.5, lax.stop_gradient(p.sum() ** 2))
        beside = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1.0, c[1]), (0.0, p))
        return count * frozen * beside[0] * (p**3).sum()

    p = normal(3)
    grad, hess_diag = hs.hesscale(loss)(p)
    assert_close(grad, jax.grad(loss)(p))
    assert_close(hess_diag, jnp.diag(jax.hessian(loss)(p)))


def test_nested_to_any_depth():
    def deep(p, x, wrap=lambda fun: fun):
        def inner(x, w):
            return lax.cond(w.sum() < 1e6, wrap(lambda x: jnp.tanh(x @ w)), lambda x: x, x), None

        def outer(x, w):
            x, _ = lax.scan(wrap(inner), x, jnp.stack([w, 2 * w]))
            return lax.fori_loop(0, 2, lambda i, x: x + wrap(lambda x: inner(x, w)[0])(x), x), None

        x, _ = lax.scan(wrap(outer), x, p)
        return ((x @ p[0]) ** 2).sum()

    def flat(p, x):
        for w in p:
            x = jnp.tanh(jnp.tanh(x @ w) @ (2 * w))
            for _ in range(2):
                x = x + jnp.tanh(x @ w)
        return ((x @ p[0]) ** 2).sum()

    args = PARAMS["layers"]["w"], INPUTS
    for curvature in ("hessian", "gauss_newton"):
        expected = jax.jit(hs.hesscale(flat, curvature=curvature))(*args)
        assert_close(jax.jit(hs.hesscale(deep, curvature=curvature))(*args), expected)
        remated = hs.hesscale(functools.partial(deep, wrap=remat), curvature=curvature)
        assert_close(jax.jit(remated)(*args), expected)


@every_curvature
def test_the_models_output_is_named_inside(curvature):
    """The head begins where the name is, wherever that is."""

    def named(h, p):
        return checkpoint_name(layer(h, p), "model_output")

    def plain(params, x):
        return (jnp.tanh(looped_layers(params, x)) ** 2).mean()

    def wrapped(params, x):
        def step(total, x):
            return total + lax.cond(x.sum() < 1e6, plain, plain, params, x[None]), None

        return lax.scan(step, 0.0, x)[0] / BATCH

    def looped_layers(params, x):
        for i in range(DEPTH):
            x = (named if i == 1 else layer)(x, at(params, i))
        return x

    received, expected = (
        jax.jit(hs.hesscale(fun, curvature=curvature))(PARAMS, INPUTS) for fun in (wrapped, plain)
    )
    assert_close(received, expected)


def test_what_a_step_hands_to_the_next_is_not_yet_the_loss():
    """A loop whose last carry is the model's output: each step but that is before an entry."""
    weights = PARAMS["layers"]["w"]

    def by_scan(w):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), INPUTS, w)
        return (x**2).sum()

    def unrolled(w):
        x = INPUTS
        for each in w:
            x = jnp.tanh(x @ each)
        return (checkpoint_name(x, "model_output") ** 2).sum()

    received, expected = (
        jax.jit(hs.hesscale(fun, curvature="gauss_newton"))(weights) for fun in (by_scan, unrolled)
    )
    assert_close(received, expected)
    assert (received[1] >= 0).all()


def test_a_penalty_in_a_loop_keeps_its_curvature():
    def loss(params, x):
        def step(total, p):
            return total + 0.3 * sum((leaf**2).sum() for leaf in jax.tree.leaves(p)), None

        penalty, _ = lax.scan(step, 0.0, params["layers"])
        return looped(params, x) + penalty

    def plain(params, x):
        return looped(params, x) + 0.3 * sum(
            (leaf**2).sum() for leaf in jax.tree.leaves(params["layers"])
        )

    for curvature in ("hessian", "gauss_newton"):
        received, expected = (
            jax.jit(hs.hesscale(fun, curvature=curvature))(PARAMS, INPUTS) for fun in (loss, plain)
        )
        assert_close(received, expected)


def test_composes_with_transformations():
    transformed = hs.hesscale(lambda *args: scanned(*args, layer=remat(layer)))
    expected = jax.jit(transformed)(PARAMS, INPUTS)
    batch = jax.vmap(transformed, (None, 0))(PARAMS, jnp.stack([INPUTS, 2 * INPUTS]))
    assert_close(jax.tree.map(lambda x: x[0], batch), expected)
    _, steps = lax.scan(lambda _, x: (None, transformed(PARAMS, x)), None, INPUTS[None])
    assert_close(jax.tree.map(lambda x: x[0], steps), expected)
    assert_close(lax.cond(True, transformed, transformed, PARAMS, INPUTS), expected)
    assert_close(remat(transformed)(PARAMS, INPUTS), expected)


@pytest.mark.slow
def test_derivatives_of_the_diagonal_do_not_depend_on_loops():
    def trace(fun):
        return jax.jit(
            jax.grad(lambda *args: sum(map(jnp.sum, jax.tree.leaves(hs.hesscale(fun)(*args)[1]))))
        )

    assert_close(trace(scanned)(PARAMS, INPUTS), trace(looped)(PARAMS, INPUTS))
    assert_close(trace(remat(scanned))(PARAMS, INPUTS), trace(looped)(PARAMS, INPUTS))


def test_a_loop_keeps_no_more_of_a_step_than_the_gradient_does():
    def loss(w, xs):
        def step(h, x):
            z, gate = jnp.tanh(x + h @ w), nn.sigmoid(x - h @ w)
            return nn.gelu(gate * h + (1 - gate) * z), None

        return jnp.sum(lax.scan(step, xs[0], xs)[0] ** 2)

    def kept(fun):
        eqns = jax.make_jaxpr(fun)(normal(3, 3), normal(5, 2, 3)).jaxpr.eqns
        forward = next(eqn for eqn in eqns if eqn.primitive.name == "scan")
        return sum(v.aval.size for v in forward.outvars)

    assert kept(hs.hesscale(loss)) <= kept(jax.grad(loss))


# What has an effect takes place as often as under jax.grad

CALLS = []


def number(x):
    CALLS.append(1)
    return np.asarray(1.0 + len(CALLS) % 5)


def printed(x, ref):
    jax.debug.callback(lambda x: CALLS.append(1), x.sum())
    return 1.0


def from_the_host(x, ref, ordered):
    shape = jax.ShapeDtypeStruct((), x.dtype)
    return io_callback(number, shape, lax.stop_gradient(x.sum()), ordered=ordered)


def pure(x, ref):
    def scale(x):
        return 1.0 + 0.1 * x + 0.0 * number(x)

    return jax.pure_callback(scale, jax.ShapeDtypeStruct((), x.dtype), lax.stop_gradient(x.sum()))


def counted(x, ref):
    ref[...] = ref[...] + 1
    return ref[...].sum()


def stored(x, ref):
    ref[...] = ref[...] + lax.stop_gradient(x.sum())
    return 1.0


EFFECTS = {
    "print": printed,
    "host": functools.partial(from_the_host, ordered=False),
    "host, in order": functools.partial(from_the_host, ordered=True),
    "pure": pure,
    "read": counted,
    "written": stored,
}


def sine(effect, wrap):
    """A function with a derivative of its own, and an effect."""

    @wrap
    def fun(x):
        effect(x)
        return jnp.sin(x)

    if wrap is jax.custom_jvp:
        fun.defjvp(lambda primals, tangents: (fun(*primals), jnp.cos(primals[0]) * tangents[0]))
    else:
        fun.defvjp(lambda x: (fun(x), x), lambda x, g: (jnp.cos(x) * g,))
    return fun


def sine_with_an_effect_forwards(effect):
    fun = jax.custom_vjp(jnp.sin)
    fun.defvjp(lambda x: ((effect(x), fun(x))[1], x), lambda x, g: (jnp.cos(x) * g,))
    return fun


def over_time(step, w):
    return lax.scan(lambda h, x: (step(h, x), None), INPUTS[0], INPUTS)[0]


def unused(effect, w):
    lax.scan(lambda c, x: (c + effect(x), None), 0.0, INPUTS)
    lax.cond(INPUTS.sum() < 1e6, lambda: effect(INPUTS) * 1.0, lambda: 0.0)
    return INPUTS @ w


def nested(effect, w):
    def inner(h, x):
        return jnp.tanh(h @ w + effect(h) * x), None

    return over_time(lambda h, x: lax.scan(inner, h, jnp.stack([x, 2 * x]))[0], w)


PLACES = {
    "twice": lambda effect, w: jnp.tanh(INPUTS @ w * effect(INPUTS)) * effect(INPUTS),
    "scan": lambda effect, w: over_time(lambda h, x: jnp.tanh(h @ w + effect(h) * x), w),
    "scan in a scan": nested,
    "affine scan": lambda effect, w: (
        lax.scan(lambda h, x: (0.1 * w.T @ w @ h + effect(x) * x, None), w[0], INPUTS)[0] * w[0]
    ),
    "linear scan": lambda effect, w: (
        lax.scan(lambda h, x: (jnp.flip(h) + effect(x) * x, None), w[0], INPUTS)[0] * w[0]
    ),
    "cond": lambda effect, w: lax.cond(
        (INPUTS @ w).sum() < 1e6, lambda x: jnp.tanh(x @ w) * effect(x @ w), jnp.sin, INPUTS
    ),
    "not needed": unused,
    "custom_jvp": lambda effect, w: sine(effect, jax.custom_jvp)(INPUTS @ w),
    "custom_vjp": lambda effect, w: sine(effect, jax.custom_vjp)(INPUTS @ w),
    "custom_vjp in a scan": lambda effect, w: over_time(
        lambda h, x: sine_with_an_effect_forwards(effect)(h @ w + x), w
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", EFFECTS)
def test_effects_take_place_as_often_as_under_grad(kind, place):
    uses_ref = kind in ("read", "written")
    if kind == "pure" and (place == "not needed" or place.startswith("custom")):
        pytest.skip("what is pure and not needed is left out")
    if uses_ref and place in ("custom_jvp", "custom_vjp in a scan"):
        pytest.skip("under jax.grad it raises, or takes place once for all steps")

    def run(transform, shape):
        CALLS.clear()
        ref = jax.new_ref(jnp.zeros(shape))

        def fun(w, ref):
            def loss(w):
                return jnp.sum(PLACES[place](lambda x: EFFECTS[kind](x, ref), w) ** 2)

            return transform(loss)(w)

        result = jax.block_until_ready(jax.jit(fun)(weights, ref))
        jax.effects_barrier()
        return result, len(CALLS), ref[...]

    weights = jnp.asarray(PARAMS["layers"]["w"][0])
    for shape in [(), (1,)] if uses_ref else [()]:
        grad, calls, state = run(jax.grad, shape)
        assert calls or uses_ref or place == "custom_vjp in a scan"
        (found, hess_diag), found_calls, found_state = run(hs.hesscale, shape)
        assert_close(found, grad)
        assert np.isfinite(hess_diag).all()
        assert found_calls == calls
        assert_close(found_state, state)


def test_a_loop_that_computes_for_nothing_what_has_no_forward_derivative():
    rounded = jax.custom_vjp(lambda x: jnp.round(x))
    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def loss(w, unused):
        def step(h, x):
            if unused:
                rounded(w)
            return jnp.flip(h) + x, None

        h, _ = lax.scan(step, w[0], INPUTS)
        return jnp.sum((h * w[0]) ** 2)

    w = jnp.asarray(PARAMS["layers"]["w"][0])
    received, expected = (hs.hesscale(functools.partial(loss, unused=x))(w) for x in (True, False))
    assert_close(received, expected)


def test_a_loop_in_a_checkpoint_that_ignores_what_it_is_handed():
    def loss(params, wrap):
        x, w = params
        y = jnp.where(x > 0.1, x * x, x)

        def loop(y):
            def step(h, _):
                return jnp.sin(h - y), h

            return lax.scan(step, x, y)[1]

        return jnp.sum(wrap(loop)(y) ** 2) + jnp.sum(y @ w)

    params = normal(2, 3), normal(3)
    received, expected = (
        hs.hesscale(functools.partial(loss, wrap=wrap))(params)
        for wrap in (jax.checkpoint, jax.jit)
    )
    assert_close(received, expected)


def test_mutable_arrays_in_a_branch_give_the_right_diagonal():
    w = jnp.asarray(PARAMS["layers"]["w"][0])

    def loss(w, ref):
        def branch(x):
            ref[...] = ref[...] + 2.0
            return jnp.tanh(x @ w) * ref[...]

        return jnp.sum(lax.cond(INPUTS.sum() < 1e6, branch, lambda x: x, INPUTS) ** 2)

    received = hs.hesscale(loss)(w, jax.new_ref(jnp.zeros(())))
    assert_close(received, hs.hesscale(lambda w: jnp.sum((jnp.tanh(INPUTS @ w) * 2.0) ** 2))(w))


def test_what_would_take_place_twice_raises():
    def loss(w):
        fun = jax.custom_vjp(lambda x: jnp.sin(x) * from_the_host(x, None, True))
        fun.defvjp(lambda x: (fun(x), x), lambda x, g: (jnp.cos(x) * g,))
        return jnp.sum(fun(INPUTS @ w))

    def in_a_loop_in_a_branch(w, ref):
        def branch(x):
            return lax.scan(lambda h, _: (jnp.tanh(h @ w) * ref[...], None), x, length=2)[0]

        return jnp.sum(lax.cond(INPUTS.sum() < 1e6, branch, lambda x: x, INPUTS))

    w = jnp.asarray(PARAMS["layers"]["w"][0])
    with pytest.raises(
        hs.UnsupportedPrimitiveError, match=r"io_callback.* its curvature is taken from"
    ):
        hs.hesscale(loss)(w)
    with pytest.raises(hs.UnsupportedPrimitiveError, match="in a branch, mutable arrays"):
        hs.hesscale(in_a_loop_in_a_branch)(w, jax.new_ref(jnp.ones(())))
