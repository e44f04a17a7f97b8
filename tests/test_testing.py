"""What `check_hesscale` reports, and that it notices what is wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import linen, nnx

import hesscale_jax as hs
from hesscale_jax.testing import Agreement, _choose, check_hesscale

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
    header, *rows, total = str(report).splitlines()
    assert header.split() == ["size", "compared", "error", "sign", "rank"]
    assert [row.split()[:3] for row in rows] == [
        ["a", "18", "18"],
        ["b", "30", "20"],
        ["c", "20", "20"],
    ]
    assert total.startswith("total")
    assert len({len(line) for line in (header, *rows, total)}) == 1


def test_agreement_is_plain_data():
    row = check_hesscale(deep, deep_parameters(), key=KEY).leaves[0]
    assert isinstance(row, Agreement)
    assert type(row.error) is type(row.rank_correlation) is type(row.sign_agreement) is float
