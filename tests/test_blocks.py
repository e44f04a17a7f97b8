"""Which equations form a block. That blocks are computed rightly is tested in test_rules.py."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import normal
from jax import lax, nn
from jax.ops import segment_sum

import hesscale_jax as hs
from hesscale_jax._jaxpr import flatten, trace
from hesscale_jax.grouping import PART, WHOLE
from hesscale_jax.planning import plan
from hesscale_jax.rules.table import find


def blocks(fun, *args):
    """The names of the equations of each block, in program order."""
    program = flatten(trace(fun, *args))
    found = plan(program, program.inputs, program.outputs, lambda eqn: find(hs.RULES, eqn)).blocks
    names = {}
    for eqn, block in found.items():
        names.setdefault(block, []).append(eqn.name)
    return list(names.values())


def test_a_normalisation_is_one_block():
    for fun in (nn.softmax, nn.standardize, nn.gelu, lambda x: nn.logsumexp(nn.silu(x), 0)):
        assert len(blocks(fun, normal(4, 6))) == 1


def test_a_linear_layer_ends_a_block():
    found = blocks(lambda x, w: jnp.cos(jnp.sin(x) @ w), normal(4, 6), normal(6, 3))
    assert found == [["sin"], ["cos"]]


def test_a_residual_stream_is_not_one_block():
    def stream(x, w):
        for _ in range(3):
            x = x + jnp.tanh(x) @ w
        return x

    found = blocks(stream, normal(4, 6), normal(6, 6))
    assert found == [["tanh"], ["add", "tanh"], ["add", "tanh"], ["add"]]


def test_a_second_set_of_axes_starts_a_block():
    def fun(x):
        y = jnp.sin(x) - jnp.sin(x).sum(0, keepdims=True)
        return y - y.sum(1, keepdims=True)

    assert [names.count("reduce_sum") for names in blocks(fun, normal(4, 6))] == [1, 1]


def test_a_transposition_is_no_view():
    found = blocks(lambda x: jnp.sin(x) + jnp.cos(x).T, normal(4, 4))
    assert found == [["sin"], ["cos"], ["add"]]


def test_what_does_not_depend_on_the_arguments_is_in_none():
    found = blocks(lambda x: x * jnp.sin(jnp.arange(6.0)), normal(6))
    assert found == [["mul"]]


def test_a_row_taken_as_a_column_is_another_view():
    # Of a square array, sums of rows are put where those of columns would be.
    found = blocks(lambda x: jnp.sin(x) - jnp.sin(x).sum(1)[None], normal(4, 4))
    assert [names[-1] for names in found][-1] == "sub"
    assert len(found) > 1


def test_a_vector_along_rows_and_along_columns_is_not_at_two_places():
    def fun(x, r):
        u = jnp.sin(x)
        return u * r[None] + (u.sum(1) * r)[:, None]

    found = blocks(fun, normal(4, 4), normal(4, seed=1))
    assert len(found) > 1


def test_a_broadcast_lies_as_the_value_that_it_meets():
    def fun(x, w):
        mean, sine = jnp.mean(x, axis=0, keepdims=True), jnp.sin(w)
        return mean * sine * mean * jnp.broadcast_to(sine, mean.shape)

    assert len(blocks(fun, normal(2, 3, 2), normal(1, 1, 1))) == 1


def test_a_long_block_is_cut_where_one_value_goes_on():
    def steps(x, count):
        for _ in range(count):
            x = x - nn.softmax(x)
        return x

    (whole,) = blocks(lambda x: steps(x, WHOLE), normal(4, 6))
    found = blocks(lambda x: steps(x, WHOLE + 1), normal(4, 6))
    assert [names.count("reduce_sum") for names in found] == [PART, PART, WHOLE + 1 - 2 * PART]
    assert all(names[-1] == "sub" for names in (whole, *found))
    assert len({tuple(names) for names in found[:2]}) == 1


def test_reductions_that_share_nothing_do_not_make_a_block_long():
    def norm(*xs):
        return jnp.sqrt(sum(jnp.sum(jnp.sin(x) ** 2) for x in xs))

    assert len(blocks(norm, *[normal(5)] * 3 * WHOLE)) == 1


OPERATIONS = [
    lambda a, b: nn.softmax(a, axis=0),
    lambda a, b: nn.softmax(a, axis=1),
    lambda a, b: jnp.broadcast_to(a.sum(0)[:, None], a.shape),
    lambda a, b: jnp.broadcast_to(a.sum(1)[:, None], a.shape),
    lambda a, b: jnp.tanh(a),
    lambda a, b: a @ b,
    lambda a, b: a.T,
    *[jnp.multiply, jnp.subtract] * 2,
]


def random_program(seed):
    """Products, and functions of which some reduce over rows or over columns."""
    rng = random.Random(seed)
    steps = [rng.choice(OPERATIONS) for _ in range(rng.randint(4, 16))]

    def fun(*values):
        for step in steps:
            values = (*values, step(*rng.choices(values[-6:], k=2)))
        return sum(values)

    return fun, [normal(3, 3, seed=i) for i in range(rng.randint(1, 4))]


def first_of_a_block_and_last(x, y, w):
    """Of each of two blocks, the other leads to a value that it might take in."""
    first, second = nn.softmax(x), nn.softmax(y @ w @ w)
    return first * jnp.tanh(second @ w) + second * (first @ w)


@pytest.mark.parametrize("seed", range(100))
def test_no_block_comes_before_itself(seed):
    fun, args = random_program(seed)
    if not seed:
        fun, args = first_of_a_block_and_last, [normal(3, 3, seed=i) for i in range(3)]
    program = flatten(trace(fun, *args))
    found = plan(program, program.inputs, program.outputs, lambda eqn: find(hs.RULES, eqn))
    oracle.units(found)  # in order, or raises


def test_what_is_clean_is_cut_off_and_not_what_shares_sources():
    """Of a mixture's terms, the sums of squares have no common source, the weights have."""

    def joint(weights, means, x):
        return nn.log_softmax(weights)[None] - jnp.sum((x[:, None] - means[None]) ** 2, -1)

    def fun(*args):
        return nn.logsumexp(joint(*args), axis=-1)

    found = blocks(fun, normal(3), normal(3, 2), normal(5, 2))
    assert [names.count("reduce_sum") for names in found] == [2, 1]

    # Also if they are not of one level, and wherever in the program the weights come.
    def later(weights, means, x, w):
        return nn.logsumexp(nn.log_softmax(weights)[None] - jnp.tanh(x @ w) @ means.T, axis=-1)

    found = blocks(later, normal(3), normal(3, 2), normal(5, 2), normal(2, 2))
    assert [names.count("reduce_sum") for names in found] == [2, 0]


def test_what_leads_to_the_other_operand_is_not_joined():
    def fun(x, w):
        p = nn.softmax(x)
        return nn.softmax(p + jnp.tanh(p @ w))

    found = blocks(fun, normal(4, 3), normal(3, 3))
    assert [names[-1] for names in found] == ["div", "div"]


def test_a_leaf_s_diagonal_does_not_depend_on_what_else_is_differentiated():
    x, w = normal(5, 2), normal(2, 3)

    def mixture(weights, means):
        misfit = jnp.sum((x[:, None] - means[None]) ** 2, -1)
        return -nn.logsumexp(nn.log_softmax(weights)[None] - misfit, axis=-1).sum()

    def experts(gates, v):
        outputs = jnp.tanh(jnp.tanh(x @ w) @ v)
        return jnp.sum(jnp.sum(nn.softmax(x @ gates) * outputs, -1) ** 2)

    for loss, leaf, other in (
        (mixture, normal(3), normal(3, 2)),
        (experts, normal(2, 3), normal(3, 3)),
    ):
        hessian = jax.hessian(loss)(leaf, other).reshape(leaf.size, leaf.size)
        alone, (both, _) = (hs.hesscale(loss, argnums)(leaf, other)[1] for argnums in (0, (0, 1)))
        for found in (alone, both):
            np.testing.assert_allclose(found.ravel(), jnp.diag(hessian), rtol=1e-9)


IDS, OTHERS = jnp.array([2, 0, 2, 1]), jnp.array([1, 1, 0, 0])


def test_what_is_taken_back_by_segments_is_one_block_with_the_sums():
    def fun(x, ids):
        e = jnp.exp(x)
        s = segment_sum(e, ids, 3)
        return e / s[ids] * jnp.log1p(s)[ids], segment_sum(e * x, ids, 3) / s

    assert len(blocks(lambda x: fun(x, IDS), normal(4))) == 1
    assert len(blocks(fun, normal(4), IDS)) == 1
    assert len(blocks(fun, normal(4), IDS.astype(jnp.uint8))) == 1


def test_sums_by_segments_that_nothing_takes_back_are_in_none():
    found = blocks(lambda x, w: jnp.tanh(segment_sum(x[IDS] * w, OTHERS, 2)), normal(3), normal(4))
    assert found == [["mul"], ["tanh"]]


def test_ids_are_the_same_if_they_are_written_so():
    def count(change, ids=IDS):
        def fun(x, ids):
            e = jnp.exp(x)
            return e / segment_sum(e, ids, 3)[change(ids)]

        return len(blocks(fun, normal(4), ids))

    others = (lambda ids: ids + 0, jnp.flip, lambda ids: jnp.where(ids < 0, ids + 4, ids))
    assert [count(change) for change in others] == [2] * 3
    same = (jnp.array, lambda ids: ids.reshape(2, 1, 2).reshape(4), lambda ids: ids.astype(int))
    assert [count(change, IDS.astype(jnp.int16)) for change in same] == [1] * 3
    assert count(lambda ids: ids.astype(jnp.int8)) == 2


def test_constant_ids_are_the_same_if_their_entries_are():
    def count(others):
        return len(blocks(lambda x: jnp.exp(x) / segment_sum(x * x, IDS, 3)[others], normal(4)))

    assert count(np.array(IDS)) == 1
    assert count(np.array(IDS, np.int16)) == 1
    assert count(OTHERS) > 1


def test_a_negative_id_is_the_same_for_all():
    def fun(x, ids, from_end):
        s = segment_sum(jnp.exp(x), ids, 3)
        nearest = jnp.take(s, ids, mode="clip")
        return x * nearest * s[ids] if from_end else x * nearest

    assert len(blocks(lambda x, ids: fun(x, ids, False), normal(4), IDS)) == 1
    assert len(blocks(lambda x, ids: fun(x, ids, True), normal(4), IDS)) > 1


def test_sums_by_other_segments_start_a_block():
    def fun(x):
        y = x - segment_sum(x, IDS, 3)[IDS]
        return y - segment_sum(y, OTHERS, 3)[OTHERS]

    assert [names.count("scatter-add") for names in blocks(fun, normal(4))] == [1, 1]


def test_sums_over_segments_or_all_entries_start_a_block():
    def fun(x):
        e = jnp.exp(x)
        s = segment_sum(e, IDS, 3)
        return (e / s[IDS]).sum() + s.sum()

    first, *others = blocks(fun, normal(4))
    assert "scatter-add" in first
    assert "reduce_sum" not in first
    assert others == [["reduce_sum"], ["reduce_sum"], ["add"]]


def test_segments_are_not_the_entries_that_are_as_many():
    def fun(x):
        s = segment_sum(jnp.exp(x), IDS, 4)
        return s[IDS] * jnp.exp(x) + s * jnp.exp(x)

    assert len(blocks(fun, normal(4))) == 2


def test_what_is_taken_waits_for_the_block_that_adds_it_up():
    def fun(z, a, b):
        e = jnp.exp((z @ a)[OTHERS] + (z @ b)[IDS])
        return e / segment_sum(e, IDS, 3)[IDS]

    (names,) = blocks(fun, normal(3, 2), normal(2), normal(2))
    assert names.count("gather") == 2


def test_a_loop_has_no_sums_by_segments_beside_it():
    def fun(x, xs):
        e = jnp.exp(x)
        s = segment_sum(lax.scan(lambda c, x: (jnp.sin(c) * x, None), e, xs)[0], IDS, 3)
        return s[IDS] * e

    found = blocks(fun, normal(4), normal(30, 4))
    assert [names for names in found if {"scan", "scatter-add"} <= set(names)] == []


def test_a_block_does_not_lead_through_a_loop_with_sums_by_segments():
    def step(c, x):
        e = jnp.exp(c * x)
        return e / segment_sum(e, IDS, 3)[IDS], None

    assert blocks(lambda x, xs: lax.scan(step, x, xs)[0], normal(4), normal(30, 4)) == []
