"""What `check_hesscale` reports, and that it notices what is wrong."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import linen, nnx

import hesscale_jax as hs
from hesscale_jax.testing import Agreement, Report, _choose, _exact_entries, check_hesscale, compare

KEY = jax.random.key(2)
X = normal(7, 3, seed=8)
LABELS = np.arange(7) % 4


def cross_entropy(logits):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def regression(params, x=X):
    return cross_entropy(x @ params["w"] + params["b"][None])


def regression_parameters():
    return {"w": normal(3, 4), "b": normal(4, seed=1)}


def deep(params):
    h = jnp.tanh(jnp.tanh(X @ params["a"]) @ params["b"])
    return cross_entropy(h @ params["c"])


def deep_parameters():
    return {"a": normal(3, 6), "b": normal(6, 5, seed=1), "c": normal(5, 4, seed=2)}


def by_path(report):
    return {row.path: row for row in report.leaves}


def exact_diagonal(fun, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(jnp.diagonal(jax.hessian(lambda p: fun(unravel(p)))(flat)))


def test_exact_where_the_method_is():
    report = check_hesscale(regression, regression_parameters(), key=KEY)
    assert [(row.path, row.size, row.compared) for row in report.leaves] == [
        ("b", 4, 4),
        ("w", 12, 12),
    ]
    for row in (*report.leaves, report.total):
        assert row.error < 1e-12
        assert row.sign_agreement == 1
        np.testing.assert_allclose(row.rank_correlation, 1)
    assert (report.total.path, report.total.size, report.total.compared) == ("total", 16, 16)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_figures_are_those_of_the_whole_diagonal(curvature):
    params = deep_parameters()
    report = check_hesscale(deep, params, key=KEY, curvature=curvature)
    _, estimate = hs.hesscale(deep, curvature=curvature)(params)
    exact = exact_diagonal(deep, params)
    flat = {name: (estimate[name].ravel(), exact[name].ravel()) for name in params}
    flat["total"] = tuple(map(jnp.concatenate, zip(*flat.values(), strict=True)))
    for row in (*report.leaves, report.total):
        e, x = flat[row.path]
        np.testing.assert_allclose(row.error, jnp.abs(e - x).sum() / jnp.abs(x).sum(), atol=1e-12)
        np.testing.assert_allclose(row.sign_agreement, np.mean(np.sign(e) == np.sign(x)))
        ranks = [jax.scipy.stats.rankdata(v) for v in (e, x)]
        np.testing.assert_allclose(row.rank_correlation, jnp.corrcoef(*ranks)[0, 1], rtol=1e-9)
    assert report.total.error > 0.01


def test_number_of_coordinates():
    report = by_path(check_hesscale(deep, deep_parameters(), key=KEY, num_coordinates=19))
    assert {path: row.compared for path, row in report.items()} == {"a": 18, "b": 19, "c": 19}
    with pytest.raises(ValueError, match="num_coordinates must be at least 1, got 0"):
        check_hesscale(deep, deep_parameters(), key=KEY, num_coordinates=0)


def test_coordinates_are_drawn_by_the_key_without_replacement():
    first, again, other = (_choose(jax.random.key(seed), [50, 60], 49) for seed in (0, 0, 1))
    for chosen, size in zip(first, [50, 60], strict=True):
        assert len(set(chosen.tolist())) == 49
        assert 0 <= min(chosen) <= max(chosen) < size
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_total_weighs_parameters_by_their_size():
    def fun(params):
        return deep(params) + jnp.sum(params["many"] ** 2) / 1000

    params = deep_parameters() | {"many": normal(1000, seed=3)}
    rows = by_path(report := check_hesscale(fun, params, key=KEY, num_coordinates=30))
    assert [row.compared for row in report.leaves] == [18, 30, 20, 30]
    magnitude = jax.tree.map(lambda x: jnp.abs(x).sum(), exact_diagonal(fun, params))
    wrong = sum(rows[path].error * magnitude[path] for path in params)
    np.testing.assert_allclose(report.total.error, wrong / sum(magnitude.values()), rtol=1e-9)


def test_compare_is_the_check_of_every_entry():
    params = deep_parameters()
    _, estimate = hs.hesscale(deep)(params)
    received = compare(estimate, exact_diagonal(deep, params))
    expected = check_hesscale(deep, params, key=KEY)
    assert received.total.error > 0.01
    for row, other in zip(
        (*received.leaves, received.total), (*expected.leaves, expected.total), strict=True
    ):
        assert (row.path, row.compared) == (other.path, other.compared)
        np.testing.assert_allclose(
            (row.error, row.sign_agreement, row.rank_correlation),
            (other.error, other.sign_agreement, other.rank_correlation),
            rtol=1e-9,
            atol=1e-12,
        )


def test_compare_of_unlike_trees_raises():
    x = np.ones(3)
    for estimate in ({"a": x}, {"b": np.ones(4)}, {"b": x, "c": x}):
        with pytest.raises(ValueError, match="not like the exact diagonal"):
            compare(estimate, {"b": x})


def test_a_wrong_diagonal_shows():
    halved = hs.rules.unary(lambda x, y: (1 - y**2, -y * (1 - y**2)))
    right, wrong = (
        by_path(check_hesscale(deep, deep_parameters(), key=KEY, rules=rules))
        for rules in (hs.RULES, hs.RULES | {"tanh": halved})
    )
    assert wrong["a"].error > right["a"].error + 0.05
    assert wrong["b"].error > right["b"].error + 0.05
    assert wrong["c"].error < 1e-12


def test_a_wrong_gradient_raises():
    doubled = hs.rules.unary(lambda x, y: (2 * (1 - y**2), -2 * y * (1 - y**2)))
    with pytest.raises(AssertionError, match="gradient in a"):
        check_hesscale(deep, deep_parameters(), key=KEY, rules=hs.RULES | {"tanh": doubled})


def test_parameters_of_no_order_and_of_no_curvature():
    def fun(params):
        return (
            jnp.sum(params["constant"] ** 2)
            + jnp.sum(params["linear"] * jnp.arange(3.0))
            + params["scalar"] ** 2
            + jnp.sum(params["empty"])
        )

    params = {
        "constant": normal(5),
        "empty": normal(0, 3),
        "linear": normal(3, seed=1),
        "scalar": normal(seed=2),
    }
    rows = by_path(check_hesscale(fun, params, key=KEY))
    assert (rows["constant"].error, rows["constant"].sign_agreement) == (0, 1)
    assert (rows["linear"].error, rows["linear"].sign_agreement) == (0, 1)
    assert (rows["scalar"].error, rows["scalar"].compared) == (0, 1)
    assert (rows["empty"].size, rows["empty"].compared, rows["empty"].error) == (0, 0, 0)
    assert math.isnan(rows["empty"].sign_agreement)
    assert all(math.isnan(row.rank_correlation) for row in rows.values())


def test_curvature_where_there_is_none_is_infinitely_wrong():
    bent = hs.rules.unary(lambda x, y: (-1.0, 1.0))
    report = check_hesscale(
        lambda p: jnp.sum(-p), normal(3), key=KEY, rules=hs.RULES | {"neg": bent}
    )
    assert (report.total.error, report.total.sign_agreement) == (math.inf, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_dtypes(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), regression_parameters())
    report = check_hesscale(lambda p: regression(p, X.astype(dtype)), params, key=KEY)
    # Sums of seven, in a few operations.
    assert report.total.error < 16 * float(jnp.finfo(dtype).eps)


def test_arguments_are_those_of_hesscale():
    def fun(scale, params, x, flag):
        if flag != "mean":  # Only the differentiated arguments are traced.
            raise ValueError(flag)
        return scale**2 * regression(params, x), {"flag": flag}

    args = jnp.asarray(1.5), regression_parameters(), X, "mean"
    one = check_hesscale(fun, *args, key=KEY, argnums=1, has_aux=True)
    assert [row.path for row in one.leaves] == ["b", "w"]
    both = check_hesscale(fun, *args, key=KEY, argnums=(1, 0), has_aux=True)
    assert [row.path for row in both.leaves] == ["0.b", "0.w", "1"]
    assert one.total.error < 1e-12
    np.testing.assert_allclose([row.error for row in both.leaves], 0, atol=1e-12)
    with pytest.raises(ValueError, match="more positional arguments than the 4"):
        check_hesscale(fun, *args, key=KEY, argnums=4)


def test_jitted_losses():
    report = check_hesscale(jax.jit(regression), regression_parameters(), X, key=KEY)
    assert report.total.error < 1e-12


def test_flax_nnx():
    model = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    report = check_hesscale(
        lambda params: cross_entropy(nnx.merge(graphdef, params)(X)), params, key=KEY
    )
    assert [row.path for row in report.leaves] == ["bias", "kernel"]
    assert report.total.error < 1e-12


def test_flax_linen():
    model = linen.Dense(4, param_dtype=jnp.float64)
    variables = model.init(jax.random.key(0), X)
    report = check_hesscale(
        lambda variables: cross_entropy(model.apply(variables, X)), variables, key=KEY
    )
    assert [row.path for row in report.leaves] == ["params.bias", "params.kernel"]
    assert report.total.error < 1e-12


def test_prints_an_aligned_table():
    report = check_hesscale(deep, deep_parameters(), key=KEY, num_coordinates=20)
    header, *rows, median, total = str(report).splitlines()
    assert header.split() == ["size", "compared", "error", "sign", "rank"]
    assert [row.split()[:3] for row in rows] == [
        ["b", "30", "20"],
        ["a", "18", "18"],
        ["c", "20", "20"],
    ]
    assert median.split()[:2] == ["median", f"{by_path(report)['a'].error:.3f}"]
    assert total.startswith("total")
    assert len({len(line) for line in (header, *rows, median, total)}) == 1


def test_the_worst_leaves_come_first_and_no_more_than_thirty():
    leaves = [Agreement(f"p{i}", 2, 2, float(i), 1.0, 1.0) for i in range(33)]
    leaves[7] = dataclasses.replace(leaves[7], error=math.nan, note="NaN in the estimate")
    report = Report(tuple(leaves), Agreement("total", 66, 66, 9.0, 1.0, 1.0))
    assert [row.path for row in report.leaves] == [f"p{i}" for i in range(33)]
    worst = ["p7", *(f"p{i}" for i in range(32, -1, -1) if i != 7)]
    assert [row.path for row in report.worst_first] == worst
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:31]] == worst[:30]
    assert lines[1].endswith("NaN in the estimate")
    assert lines[31] == "... 3 more"
    assert lines[32].split() == ["median", "17.000", "1.00", "1.00"]  # the NaN is above them
    assert lines[33].split()[:4] == ["total", "66", "66", "9.000"]
    assert len(lines) == 34


# Where the exact entries are 0


def attention(params):
    """The softmax does not change with the bias of the keys: no curvature there."""
    x = X.astype(params["q"].dtype)
    q, k, v = (x @ params[name] + params["of_" + name][None] for name in ("q", "k", "v"))
    return jnp.sum((jax.nn.softmax(q @ k.T) @ v) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_error_of_rounding_alone_is_relative_to_the_whole(dtype):
    params = {name: normal(3, 5, seed=i) for i, name in enumerate("qkv")}
    params |= {f"of_{name}": normal(5, seed=3 + i) for i, name in enumerate("qkv")}
    exact = exact_diagonal(attention, params)
    assert jnp.abs(exact["of_k"]).max() < 1e-12
    _, estimate = hs.hesscale(attention)(params)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    rows = by_path(report := check_hesscale(attention, params, key=KEY))
    flat = jax.flatten_util.ravel_pytree(exact)[0]
    expected = jnp.abs(estimate["of_k"]).mean() / jnp.abs(flat).mean()
    rtol = 1e-9 if dtype == jnp.float64 else 1e-3  # float32, through a softmax
    np.testing.assert_allclose(rows["of_k"].error, expected, rtol=rtol)
    assert 0.01 < rows["of_k"].error < 10
    size = float(f"{jnp.abs(estimate['of_k']).max():.1g}")
    assert rows["of_k"].note == f"exact ~ 0, estimate {size:.1g}"
    assert not any(row.note for path, row in rows.items() if path != "of_k")
    assert rows["of_k"].note in str(report)
    assert not report.total.note


# NaN and infinities


def wild(params):
    return jnp.sum(jnp.sqrt(params["root"])) + jnp.sum(params["clean"] ** 4)


WILD = {"clean": normal(5), "root": jnp.array([4.0, 0.0, 1.0])}


def test_infinities_of_jax_grad_too_are_named():
    rows = by_path(report := check_hesscale(wild, WILD, key=KEY))
    assert (rows["clean"].error, rows["clean"].note) == (0, "")
    assert rows["root"].note == "inf in the gradient, inf in the estimate, inf in the exact entries"
    assert math.isnan(rows["root"].error)
    assert rows["root"].sign_agreement == 1
    assert math.isnan(report.total.error)
    assert report.worst_first[0].path == "root"
    assert "nan" in str(report)


def test_nans_of_jax_grad_too_are_named():
    def fun(params):
        return wild(params) + jnp.sum(jnp.sqrt(params["root"] - 1))

    rows = by_path(check_hesscale(fun, WILD, key=KEY))
    assert (rows["clean"].error, rows["clean"].note) == (0, "")
    assert "NaN in the gradient" in rows["root"].note
    assert rows["root"].sign_agreement < 1


def test_a_nan_of_the_estimate_alone_is_named():
    curved = hs.rules.unary(lambda x, y: (2 * x, jnp.where(x > 0, jnp.nan, 2.0)))
    rules = hs.RULES | {"square": curved}
    params = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([-2.0])}
    rows = by_path(
        report := check_hesscale(
            lambda p: jnp.sum(jnp.square(p["a"])) + jnp.sum(jnp.square(p["b"])),
            params,
            key=KEY,
            rules=rules,
        )
    )
    assert (rows["a"].note, rows["a"].sign_agreement) == ("NaN in the estimate", 0.5)
    assert math.isnan(rows["a"].error)
    assert (rows["b"].error, rows["b"].note) == (0, "")
    assert math.isnan(report.total.error)


def test_a_nan_of_our_gradient_alone_raises():
    broken = hs.rules.unary(lambda x, y: (2 * x + jnp.where(x > 0, jnp.nan, 0), 2.0))
    with pytest.raises(AssertionError, match="gradient in root"):
        check_hesscale(
            lambda p: wild(p) + jnp.sum(jnp.square(p["root"])),
            WILD,
            key=KEY,
            rules=hs.RULES | {"square": broken},
        )


def test_an_infinity_does_not_hide_a_wrong_gradient_elsewhere():
    doubled = hs.rules.unary(lambda x, y: (4 * x**3 * 2, 12 * x**2))
    with pytest.raises(AssertionError, match="gradient in clean"):
        check_hesscale(wild, WILD, key=KEY, rules=hs.RULES | {"integer_pow": doubled})


# Wherever jax.grad goes


@jax.custom_vjp
def own_tanh(x):
    return jnp.tanh(x)


# Its forward rule calls it: JAX has no forward derivative of its gradient.
own_tanh.defvjp(lambda x: (own_tanh(x), own_tanh(x)), lambda y, g: (g * (1 - y**2),))


@jax.custom_vjp
def host_sine(x):
    return jax.pure_callback(np.sin, x, x)


@jax.custom_vjp
def host_cosine(x):
    return jax.pure_callback(np.cos, x, x)


# No callback here can be batched, either.
host_sine.defvjp(lambda x: (host_sine(x), x), lambda x, g: (g * host_cosine(x),))
host_cosine.defvjp(lambda x: (host_cosine(x), x), lambda x, g: (-g * host_sine(x),))
ON_HOST = hs.RULES | {
    "custom_vjp_call[host_sine]": hs.rules.defined_by(jnp.sin),
    "custom_vjp_call[host_cosine]": hs.rules.defined_by(jnp.cos),
}


@pytest.mark.parametrize(
    ("own", "same", "rules"),
    [(own_tanh, jnp.tanh, hs.RULES), (host_sine, jnp.sin, ON_HOST)],
    ids=["calls itself", "on the host"],
)
def test_derivatives_that_are_reverse_only(own, same, rules):
    def loss(f):
        return lambda u, v, w: jnp.sum(f(f(f(X @ u) @ v) @ w) ** 2)

    args, at = (normal(3, 4), normal(4, 5), normal(5, 2)), (0, 1, 2)
    received = check_hesscale(loss(own), *args, argnums=at, key=KEY, rules=rules)
    expected = check_hesscale(loss(same), *args, argnums=at, key=KEY)
    assert expected.total.error > 0.01
    np.testing.assert_allclose(received.total.error, expected.total.error, rtol=1e-9)


def test_the_exact_entries_are_derivatives_of_a_rule_that_is_not_the_function_s():
    @jax.custom_vjp
    def reversed_sine(x):
        return jnp.sin(x)

    reversed_sine.defvjp(lambda x: (reversed_sine(x), x), lambda x, g: (-g * jnp.cos(x),))
    (exact,) = _exact_entries(
        lambda leaves: jnp.sum(reversed_sine(leaves[0])), [X[0]], [np.arange(3)]
    )
    np.testing.assert_allclose(exact, jnp.sin(X[0]), rtol=1e-9)


def test_products_that_are_not_batched():
    def loss(w):
        return jnp.sum(jnp.tanh(jax.lax.ragged_dot(X, w, jnp.array([2, 5]))) ** 2)

    assert check_hesscale(loss, normal(2, 3, 4), key=KEY).total.error < 1e-12


def test_references_that_are_written():
    ref = jax.new_ref(jnp.zeros((7, 4)))

    def loss(w):
        h = jnp.tanh(X @ w)
        ref[...] = jax.lax.stop_gradient(h)
        return jnp.sum(h**2)

    w = normal(3, 4)
    assert check_hesscale(loss, w, key=KEY).total.error < 1e-12
    np.testing.assert_allclose(ref[...], jnp.tanh(X @ w), rtol=1e-9)


def test_a_gradient_without_a_derivative_says_so():
    @jax.custom_vjp
    def sine(x):
        return jax.pure_callback(np.sin, x, x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (g * jax.pure_callback(np.cos, x, x),))
    rules = hs.RULES | {"custom_vjp_call[sine]": hs.rules.defined_by(jnp.sin)}
    with pytest.raises(TypeError, match=r"^give the functions .* a derivative of that") as caught:
        check_hesscale(lambda w: jnp.sum(sine(w) ** 2), X[0], key=KEY, rules=rules)
    assert "Pure callbacks do not support JVP" in str(caught.value.__cause__.exceptions)


def test_agreement_is_plain_data():
    row = check_hesscale(deep, deep_parameters(), key=KEY).leaves[0]
    assert isinstance(row, Agreement)
    assert type(row.error) is type(row.rank_correlation) is type(row.sign_agreement) is float
