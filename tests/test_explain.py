"""What `explain` says of a loss. What it does not run is tested here too."""

import io
import random
import re
import time

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Struct
from jax import nn
from jax.experimental import sparse

import hesscale_jax as hs
from benchmarks import models
from hesscale_jax.grouping import PART, WHOLE
from hesscale_jax.report import Group, folded, source


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(5, int)).mean()


def array(*shape):
    return Struct(shape, jnp.float64)


def branches(report):
    return [(entry.value, entry.read_by, entry.meet_in) for entry in report.dropped]


def rules(report):
    return [step.rule for step in report.steps]


def line_of(function, text):
    """The line of this file that has a text in a function."""
    code = function.__code__
    with open(code.co_filename) as file:
        lines = file.readlines()
    found = (n for n, line in enumerate(lines, 1) if n > code.co_firstlineno and text in line)
    return f"{code.co_filename}:{next(found)}"


# Steps


def residual(params, x):
    y = jnp.tanh(x @ params["first"])
    z = y + jnp.tanh(y @ params["second"])
    return cross_entropy(z @ params["out"])


RESIDUAL = {"first": array(6, 4), "second": array(4, 4), "out": array(4, 3)}


def test_steps_come_with_their_rules_results_and_lines():
    report = hs.explain(residual)(RESIDUAL, array(5, 6))
    assert rules(report)[:6] == ["multilinear", "block"] * 3
    first, activation, *_ = report.steps
    assert (first.primitives, first.results) == (("dot_general",), ("f64[5,4]",))
    assert (activation.primitives, activation.results) == (("tanh",), ("f64[5,4]",))
    assert first.lines == (line_of(residual, "x @ params"),)
    assert report.steps[3].lines == (line_of(residual, "z = y + "),)


def test_a_step_comes_after_those_it_reads_from():
    # The block of the first tanh reads the product that comes after it.
    def loss(w, x):
        y = jnp.tanh(x @ w["a"])
        return jnp.sum((y * (x @ w["b"])) ** 2)

    report = hs.explain(loss)({"a": array(3, 2), "b": array(3, 2)}, array(5, 3))
    assert rules(report) == ["multilinear", "multilinear", "block"]


def test_equations_inside_of_checkpoint_are_marked():
    report = hs.explain(lambda w, x: jnp.sum(jax.checkpoint(jnp.sin)(x @ w) ** 2))(
        array(3, 2), array(5, 3)
    )
    assert [step.marks for step in report.steps] == [(), ("checkpoint",)]


def test_gauss_newton_marks_the_head():
    report = hs.explain(residual, curvature="gauss_newton")(RESIDUAL, array(5, 6))
    marks = [step.marks for step in report.steps]
    assert marks[:5] == [("model",)] * 5
    assert set(marks[5:]) == {("head",)}
    assert not any(step.marks for step in hs.explain(residual)(RESIDUAL, array(5, 6)).steps)


def test_rules_of_other_kinds_have_names():
    def my_product(eqn, operands, recurse):
        raise AssertionError

    @jax.custom_vjp
    def half(x):
        return (x @ x.T) / 2

    half.defvjp(lambda x: (half(x), x), lambda x, g: (g @ x,))
    table = hs.RULES | {"dot_general": my_product}
    loss = lambda w: jnp.sum(jnp.sort(w) @ w) + jnp.sum(half(w) ** 2)  # noqa: E731
    found = rules(hs.explain(loss, rules=table)(array(3, 3)))
    assert {"selection", "your rule my_product", "custom rule"} <= set(found)


def attention_stack(layers):
    model = nnx.List([nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(i)) for i in layers])
    graphdef, params = nnx.split(model)

    def loss(params, x):
        for layer in nnx.merge(graphdef, params):
            x = layer(x)
        return jnp.mean(x**2)

    with jax.numpy_rank_promotion("allow"):
        return loss, hs.explain(loss)(params, jnp.ones((2, 4, 8), jnp.float32))


def test_a_library_s_line_is_shown_with_the_user_s():
    loss, report = attention_stack(range(1))
    user = line_of(loss, "x = layer(x)")
    scores = next(step for step in report.steps if "exp" in step.primitives)
    assert re.search(r"flax/nnx/nn/attention\.py:\d+$", scores.library)
    assert scores.lines[0] == user
    shown = source(scores)
    number = scores.library.rsplit(":", 1)[1]
    assert (
        shown == f"flax/nnx/nn/attention.py:{number} (via test_explain.py:{user.rsplit(':', 1)[1]})"
    )
    assert shown in str(report)
    (first, *_) = hs.explain(residual)(RESIDUAL, array(5, 6)).steps
    assert first.library == ""
    assert source(first).startswith("tests/test_explain.py:")


def test_layers_of_a_library_are_folded_wherever_they_are_called():
    _, report = attention_stack(range(12))
    assert len(report.steps) > 12 * 8
    assert len(re.findall(r"^x 12", str(report), re.MULTILINE)) == 1
    assert len(str(report).splitlines()) < 40

    def loss(params, x):
        first = nnx.relu(nnx.merge(graphdef, params[0])(x))
        second = nnx.relu(nnx.merge(graphdef, params[1])(first))
        third = nnx.relu(nnx.merge(graphdef, params[2])(second))
        return jnp.sum((third @ jnp.ones((5, 3), x.dtype)) ** 2)

    layers = [nnx.Linear(5, 5, rngs=nnx.Rngs(i)) for i in range(3)]
    graphdef = nnx.split(layers[0])[0]
    params = [nnx.split(layer)[1] for layer in layers]
    with jax.numpy_rank_promotion("allow"):
        text = str(hs.explain(loss)(params, jnp.ones((2, 5), jnp.float32)))
    assert re.search(r"^x 3", text, re.MULTILINE)


# What has no rule


def test_all_equations_without_a_rule_are_listed():
    def loss(w, x):
        y = jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * y, jnp.tanh(x @ w))
        return jnp.sum(jax.pure_callback(jnp.sin, y, y) ** 2)

    report = hs.explain(loss)(array(3, 2), array(5, 3))
    names = [step.primitives[0] for step in report.missing]
    assert names[0] == "while"
    assert len(names) > 1
    assert all(step.rule == "no rule: raises" for step in report.missing)
    assert "Without a rule" in str(report)
    assert "Without a rule" not in str(hs.explain(residual)(RESIDUAL, array(5, 6)))


def test_what_a_loop_hands_out_is_named():
    def loss(w, scale):
        def step(c, i):
            return jnp.sin(c) * scale[i], c.sum()

        return jax.lax.scan(step, w, jnp.arange(2))[1].sum() ** 2

    report = hs.explain(loss)(array(2), jnp.array([1.0, 2.0]))
    assert report.mixing
    assert "Between the entries of one result" in str(report)


@pytest.mark.parametrize("steps", ["last", "each"])
def test_what_a_loop_hands_out_is_named_within_its_block(steps):
    def loss(x):
        def step(c, x):
            return c + jnp.tanh(x), jnp.exp(x) if steps == "each" else c

        last, each = jax.lax.scan(step, 0.0, x)
        return jnp.sum(each) * last

    report = hs.explain(loss)(array(3))
    assert len(report.steps) == 1
    assert not report.is_exact


def test_what_has_no_rule_inside_of_a_loop_is_listed():
    def loss(w, x):
        def step(c, _):
            return jax.pure_callback(jnp.sin, c, c @ w), ()

        return jnp.sum(jax.lax.scan(step, x, length=2)[0])

    report = hs.explain(loss)(array(3, 3), array(5, 3))
    assert report.missing
    assert f"  1.2  {report.missing[0].primitives[0]}" in str(report)


def test_an_option_names_the_user_s_function_and_its_key_works():
    @equinox.filter_custom_vjp
    def kernel(x):
        return jax.pure_callback(np.sin, x, x)

    kernel.def_fwd(lambda perturbed, x: (kernel(x), x))
    kernel.def_bwd(lambda x, g, perturbed, same: g * jnp.cos(x))

    def loss(w):
        return jnp.sum(kernel(w) ** 2)

    w = jnp.array([0.3, 0.7])
    with pytest.raises(hs.UnsupportedPrimitiveError, match=r"^JAX has no derivative") as caught:
        hs.hesscale(loss)(w)
    (key,) = set(re.findall(r"RULES \| \{'(.*?)'", str(caught.value)))
    assert key == "custom_vjp_call[kernel]"
    rules = hs.RULES | {key: hs.rules.defined_by(jnp.sin)}
    _, received = hs.hesscale(loss, rules=rules)(w)
    np.testing.assert_allclose(received, 2 * jnp.cos(2 * w), rtol=1e-9)


# What is dropped


def test_a_residual_s_branches_meet_in_its_sum():
    report = hs.explain(residual)(RESIDUAL, array(5, 6))
    (entry,) = report.dropped
    assert (entry.made_by, entry.read_by, entry.meet_in) == (1, (2, 3), 3)
    assert entry.line == line_of(residual, "y = jnp.tanh")
    assert re.search(r"f64\[5,4\] at \S+:\d+ +2 +3, 4 +4\n", str(report))


def test_a_residual_read_in_its_own_block_branches_too():
    # The sum and its sine leave the block that makes both.
    def loss(w, x):
        y = jnp.tanh(x @ w["a"])
        return jnp.sum((y + jnp.sin(y) @ w["b"]) ** 2)

    report = hs.explain(loss)({"a": array(3, 2), "b": array(2, 2)}, array(5, 3))
    assert branches(report) == [("f64[5,2]", (2, 3), 3)]


def test_results_of_a_block_without_a_common_origin_do_not_meet():
    def loss(w, x):
        a, b = jnp.sin(x @ w["a"]), jnp.cos(x @ w["b"])
        return jnp.sum(jnp.exp(a @ b.T)) + jnp.sum(a * b)

    report = hs.explain(loss)({"a": array(3, 2), "b": array(3, 2)}, array(5, 3))
    assert any({"sin", "cos"} <= set(step.primitives) for step in report.steps)  # one block
    assert branches(report) == []


def test_tied_weights_meet():
    def loss(params, tokens):
        x = jnp.tanh(params["embed"][tokens] @ params["w"])
        return cross_entropy(x @ params["embed"].T)

    params = {"embed": array(7, 4), "w": array(4, 4)}
    report = hs.explain(loss)(params, Struct((5,), jnp.int32))
    assert branches(report) == [("params['embed']", (0, 3), 3)]
    assert re.search(r"params\['embed'\] +argument +1, 4 +4\n", str(report))


def test_a_value_multiplied_with_itself_drops_nothing():
    report = hs.explain(lambda w: jnp.sum((w @ w) ** 2))(array(3, 3))
    assert branches(report) == []  # They meet in the product, which knows both.


def test_nothing_is_lost_in_the_affine_end():
    def penalised(params, x):
        return residual(params, x) + 0.1 * sum(jnp.sum(p**2) for p in params.values())

    def squared(params, x, t):
        return jnp.mean((x @ params - t) ** 2) + 0.1 * jnp.sum(params**2)

    assert [entry.value for entry in hs.explain(penalised)(RESIDUAL, array(5, 6)).dropped] == [
        "f64[5,4]"
    ]
    report = hs.explain(squared)(array(3, 2), array(5, 3), array(5, 2))
    assert branches(report) == []


def test_a_penalty_under_a_root_is_exact():
    def loss(w, x):
        return jnp.sqrt(jnp.sum((x @ w) ** 2) + jnp.sum(w**2))

    assert branches(hs.explain(loss)(array(3, 2), array(5, 3))) == []  # both are images of w


def test_an_exact_loss_drops_nothing():
    report = hs.explain(lambda w: jnp.sum(jax.nn.gelu(w)))(array(3, 2))
    assert str(report).endswith("No off-diagonal terms between steps are dropped.")
    assert report.is_exact


def added_up(start, xs):
    return jax.lax.scan(lambda c, x: (c - x, None), start, xs)[0]


def in_a_branch(fun, x):
    return jax.lax.cond(x[0] > -9, fun, lambda x: x, x)


def by_segments(x):
    ids = np.array([0, 0, 1])
    return jax.ops.segment_sum(x, ids, 2)[ids]


NOT_KNOWN = {
    "scanned over, and read": lambda x: added_up(0.0, x) * x[0],
    "scanned over, and where it starts": lambda x: added_up(x[0], x) ** 2,
    "scanned over, of entries that share some": lambda x: added_up(0.0, x + jnp.sin(x[::-1])) ** 2,
    "scanned over twice": lambda x: added_up(added_up(0.0, x), jnp.sin(x[::-1])) ** 2,
    "by segments, beside an entry": lambda x: jnp.sin(by_segments(x) * x[1]).sum(),
    "by segments, beside a mean": lambda x: jnp.exp(by_segments(x) * x.mean()).sum(),
    "by segments, of entries that share some": lambda x: jnp.exp(
        by_segments(x.at[0].set(x[1]))
    ).sum(),
    "the largest by place, of a product": lambda x: jax.nn.logsumexp(
        jnp.zeros(3).at[np.array([1, 0, 1])].max(x * x[::-1])
    ),
    "beside a branch of it": lambda x: jax.nn.logsumexp(
        jnp.concatenate([x, in_a_branch(jnp.sin, x)])
    ),
    "beside the largest by place": lambda x: (
        jnp.concatenate([x, jnp.zeros(3).at[np.array([1, 0, 1])].max(x)]).sum() ** 2
    ),
    "a product in a branch": lambda x: jax.nn.logsumexp(in_a_branch(lambda x: x * x[::-1], x)),
    "an entry set in a branch": lambda x: jax.nn.logsumexp(
        in_a_branch(lambda x: x.at[0].set(x[1]), x)
    ),
    "a product before a branch": lambda x: jax.nn.logsumexp(in_a_branch(jnp.sin, x * x[::-1])),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_is_not_known_is_not_said_to_be_exact(name):
    loss, x = NOT_KNOWN[name], jnp.array([0.7, -0.4, 1.3])
    exact = jnp.diag(jax.hessian(loss)(x))
    assert not np.allclose(hs.hesscale(loss)(x)[1], exact, rtol=1e-3)
    assert not hs.explain(loss)(x).is_exact


def test_a_number_that_a_loop_closes_over_has_a_name():
    @jax.checkpoint
    def run(x, one):
        return jax.lax.scan(lambda c, x: ((x**2, one + c[1]), c[0]), (1.0, 0.3), x)

    def loss(x):
        (a, b), each = run(x, 1.0)
        return jnp.sum(each**2) + a + b

    assert hs.explain(loss)(array(3)).steps


def test_what_a_branch_drops_is_in_its_own_report():
    def loss(w):
        p = jax.lax.cond(w.sum() > -9, jax.nn.softmax, lambda w: w, w)
        return jnp.sum(jnp.arange(3.0) * p) ** 2

    report = hs.explain(loss)(array(3))
    assert (report.dropped, report.shared, report.mixing) == ((), (), (0,))
    assert [body.is_exact for body in report.steps[0].bodies] == [True, False]
    assert not report.is_exact


def test_where_nothing_is_dropped_the_diagonal_is_exact():
    found = 0
    for seed in range(10):
        fun, args, *_ = programs.anything(random.Random(seed))
        every = tuple(range(len(args)))
        if not hs.explain(fun, every)(*args).is_exact:
            continue
        found += 1
        _, received = jax.jit(hs.hesscale(fun, every))(*args)
        hessians = jax.jit(jax.hessian(fun, every))(*args)
        for i, (arg, diagonal) in enumerate(zip(args, received, strict=True)):
            hessian = hessians[i][i].reshape(arg.size, arg.size)
            expected = jnp.diagonal(hessian).reshape(arg.shape)
            np.testing.assert_allclose(diagonal, expected, rtol=1e-9, atol=1e-9)
    assert found


def pooled(x, by):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), by, "VALID")


COPYING = {  # an entry of the operand may be several of the result
    "cummax": lambda x: jax.lax.cummax(x, 1),
    "cummin": lambda x: jax.lax.cummin(x, 0),
    "pooling": lambda x: pooled(x, (2, 1)),
    "sparse": lambda x: sparse.BCOO((x[0], np.array([[0], [1], [0]])), shape=(2,)).todense(),
}


@pytest.mark.parametrize("name", COPYING)
def test_what_copies_entries_is_named(name):
    report = hs.explain(lambda x: jax.nn.logsumexp(COPYING[name](x)))(array(4, 3))
    assert report.mixing


def test_windows_that_share_no_entry_copy_none():
    assert hs.explain(lambda x: jax.nn.logsumexp(pooled(x, (2, 2))))(array(4, 4)).is_exact


def test_arguments_go_by_their_path():
    def loss(x, params, *more):
        (w,) = params["layer"]
        return jnp.sum((jnp.tanh(x @ w) @ more[0] @ w @ more[0]) ** 2)

    report = hs.explain(loss, argnums=(2, 1))(array(5, 3), {"layer": [array(3, 3)]}, array(3, 3))
    assert {entry.value for entry in report.dropped} == {"params['layer'][0]", "args[2]"}


# Loops


def scanned(params, x):
    def step(carry, w):
        h, c = carry
        g = jnp.tanh(h @ w + c @ params["shared"])
        return (h + g, c * g), None

    (h, _), _ = jax.lax.scan(step, (x, x), params["layers"])
    return jnp.sum(h**2)


SCANNED = {"layers": array(6, 3, 3), "shared": array(3, 3)}


def test_the_steps_of_a_loop_are_shown_below_it():
    report = hs.explain(scanned)(SCANNED, array(5, 3))
    assert rules(report) == ["scan", "block"]
    (body,) = report.steps[0].bodies
    assert rules(body) == ["multilinear", "multilinear", "block"]
    assert body.title == "each of 6 steps"
    assert "\n  each of 6 steps:\n  1.1" in str(report)


def test_what_the_steps_of_a_loop_share_is_listed():
    report = hs.explain(scanned)(SCANNED, array(5, 3))
    values = [entry.value for entry in report.shared]
    assert values == [
        "params['shared'], read at every step",
        "carries f64[5,3], f64[5,3], which one step hands to the next",
    ]
    assert {entry.value for entry in report.steps[0].bodies[0].dropped} == {"carry f64[5,3]"}


def test_branches_are_shown_one_by_one():
    def loss(w, x):
        return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda y: y @ w, jnp.sin, x @ w) ** 2)

    report = hs.explain(loss)(array(3, 3), array(5, 3))
    titles = {body.title: rules(body) for body in report.steps[1].bodies}
    assert titles == {"branch 0": ["block"], "branch 1": ["multilinear"]}


# The text


def gpt(layers):
    task = models.gpt_task(2, vocabulary=50, length=16, width=32, heads=2, layers=layers)
    params, batch = task.draw(0, jnp.float64)

    def loss(*args):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return task.loss(*args)

    return loss, (params, *batch)


def test_the_layers_of_a_gpt_are_folded():
    loss, args = gpt(4)
    text = str(hs.explain(loss)(*args))
    assert text.count("\nx 4\n") == 1
    assert len(text.splitlines()) < 45
    assert re.findall(r"(?<=  x )\d+$", text, re.MULTILINE) == ["4", "4", "3"]
    assert all(len(line) <= 140 for line in text.splitlines())


def test_a_large_program_takes_no_time():
    loss, args = gpt(24)
    start = time.perf_counter()
    jax.make_jaxpr(jax.grad(loss))(*args)
    tracing = time.perf_counter() - start
    start = time.perf_counter()
    str(hs.explain(loss)(*args))
    assert time.perf_counter() - start < tracing + 2


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("abc", [0, 1, 2]),
        ("aaa", [(3, [0])]),
        ("xababab", [0, (3, [1, 2])]),
        ("aabaabx", [(2, [(2, [0]), 2]), 6]),
        ("abcabcabx", [(3, [0, 1, 2], 1), 8]),
        ("abcabcax", [(2, [0, 1, 2]), 6, 7]),
    ],
)
def test_consecutive_repeats_are_folded(keys, shown):
    nodes, places = folded([ord(key) for key in keys])
    assert nodes == grouped(shown)
    assert [keys[place.step] for place in places] == list(keys)


def grouped(nodes):
    made = (
        node if isinstance(node, int) else Group(node[0], grouped(node[1]), *node[2:])
        for node in nodes
    )
    return list(made)


def test_rich_prints_the_same_text():
    rich = pytest.importorskip("rich.console")
    report = hs.explain(residual)(RESIDUAL, array(5, 6))
    file = io.StringIO()
    rich.Console(file=file, width=160).print(report)
    assert file.getvalue().rstrip() == str(report)


# Nothing is run


def test_nothing_is_run():
    def loss(w, x):
        jax.debug.callback(called.append, x)
        return jnp.sum(jnp.tanh(x @ w) ** 2) + jax.pure_callback(
            called.append, Struct((), x.dtype), x
        )

    called = []
    hs.explain(loss)(jnp.ones((3, 2)), jnp.ones((5, 3)))
    hs.explain(loss)(array(10**6, 10**6), array(10**6, 10**6))
    jax.effects_barrier()
    assert called == []


def test_errors_are_those_of_hesscale():
    with pytest.raises(ValueError, match="curvature"):
        hs.explain(residual, curvature="fisher")
    with pytest.raises(TypeError, match="floating-point"):
        hs.explain(jnp.sum)(Struct((3,), jnp.int32))
    with pytest.raises(TypeError, match="scalar"):
        hs.explain(jnp.sin)(array(3))


def test_a_block_that_is_cut_short_says_so_and_drops_terms():
    def loss(x, steps):
        for _ in range(steps):
            x = x - nn.softmax(x)
        return jnp.sum(x**2)

    whole, cut = (hs.explain(loss)(array(4, 6), steps=steps) for steps in (WHOLE, 2 * WHOLE))
    assert "No off-diagonal terms" in str(whole)
    assert [step.marks for step in cut.steps] == [("cut short",)] * -(-2 * WHOLE // PART) + [()]
    assert re.search(r"something not affine follows: \d block", str(cut))
