"""The Flax doors: whatever ``nnx.grad`` does with modules, and linen's ``TrainState``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close
from flax import linen, nnx
from flax.core import freeze
from flax.training import train_state

import hesscale_jax as hs
import hesscale_jax.linen
import hesscale_jax.nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
Y = jnp.asarray(np.random.default_rng(1).normal(size=(7, 2)))


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # the arithmetic of Flax needs it
        yield


BOTH_MODES = pytest.mark.parametrize("graph", [True, False])


class Net(nnx.Module):
    """With statistics and random numbers, unless it is told to have none."""

    def __init__(self, rngs, noisy=True):
        f64 = {"param_dtype": jnp.float64, "rngs": rngs}
        self.hidden = nnx.Linear(3, 4, **f64)
        self.norm = nnx.BatchNorm(4, **f64) if noisy else jnp.tanh
        self.dropout = nnx.Dropout(0.25, rngs=rngs) if noisy else jnp.sin
        self.out = nnx.Linear(4, 2, **f64)
        if noisy:  # else they are float32
            self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


@functools.cache
def initialized(noisy, seed):
    return Net(nnx.Rngs(seed), noisy)


def net(noisy=True, seed=0):
    return nnx.clone(initialized(noisy, seed))


def loss(model, x=X, y=Y):
    return jnp.mean((model(x) - y) ** 2)


def pure(tree):
    """The arrays of a tree of modules and States, in the structure that they have."""
    return nnx.to_pure_dict(nnx.state(tree))


def same_as_nnx(fun, *models, argnums=0, has_aux=False):
    """Compares with ``nnx.value_and_grad`` on copies, and returns the diagonal."""
    copies = nnx.clone(models)
    ours = hesscale_jax.nnx.value_and_hesscale(fun, argnums, has_aux)
    value, (grads, hess_diag) = nnx.jit(ours)(*models)
    theirs = nnx.value_and_grad(fun, argnums=argnums, has_aux=has_aux)
    expected, expected_grads = nnx.jit(theirs)(*copies)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    assert jax.tree.structure(hess_diag) == jax.tree.structure(grads)
    assert_close(grads, expected_grads)
    assert_close(jax.tree.leaves(value), jax.tree.leaves(expected))
    assert nnx.graphdef(models) == nnx.graphdef(copies)
    assert_close(arrays(models), arrays(copies))
    return hess_diag


def arrays(model):
    """All arrays of a module, random keys as the numbers that they are."""
    leaves = jax.tree.leaves(nnx.state(model))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]


def as_function(model):
    """A loss of the parameters alone, to compare with."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda p: loss(nnx.merge(graphdef, p, rest, copy=True))


# nnx, graph mode


def test_statistics_and_random_counts_advance():
    model = net()
    params, function = as_function(nnx.clone(model))
    _, expected = hs.hesscale(function)(params)
    assert_close(pure(same_as_nnx(loss, model)), pure(expected))
    assert model.norm.mean[...].any()
    assert model.dropout.rngs.count[...] == 1


def test_hesscale_is_to_value_and_hesscale_as_grad_is():
    results = hesscale_jax.nnx.hesscale(loss)(net())
    value, expected = hesscale_jax.nnx.value_and_hesscale(loss)(net())
    assert_close(jax.tree.leaves(results), jax.tree.leaves(expected))
    with_aux = hesscale_jax.nnx.hesscale(lambda m: (loss(m), value), has_aux=True)(net())
    assert_close(jax.tree.leaves(with_aux), [*jax.tree.leaves(expected), value])


def test_auxiliary_data_may_hold_modules():
    def with_aux(model):
        return loss(model), (model.hidden, {"power": 2, "mean": model.norm.mean})

    model = net()
    same_as_nnx(with_aux, nnx.clone(model), has_aux=True)
    (_, (hidden, rest)), _ = hesscale_jax.nnx.value_and_hesscale(with_aux, has_aux=True)(model)
    assert hidden is model.hidden
    assert rest["power"] == 2
    assert rest["mean"] is model.norm.mean


@pytest.mark.parametrize(
    "argnums",
    [
        1,
        (1, 0),
        nnx.DiffState(0, nnx.PathContains("kernel")),
        (nnx.DiffState(1, (nnx.Param, nnx.BatchStat)), 0),
        nnx.DiffState(0, nnx.BatchStat),
    ],
    ids=repr,
)
def test_several_modules_and_filters(argnums):
    def both(first, second):
        return loss(lambda x: first(x) * second(x))

    first, second = net(seed=0), net(seed=1)
    first.eval()  # so that the loss depends on its statistics
    same_as_nnx(both, first, second, argnums=argnums)


def test_containers_variables_and_arrays():
    def mixed(models, weight, scale):
        first, second = models["pair"]
        return scale["w"] * loss(first) + jnp.sum(weight[...] * loss(second)) ** 2

    args = ({"pair": (net(), net(seed=1))}, nnx.Param(jnp.arange(1.0, 3.0)), {"w": jnp.float64(3)})
    hess_diag = same_as_nnx(mixed, *args, argnums=(0, 1, 2))
    assert_close(hess_diag[2], {"w": jnp.zeros(())})


def test_modules_by_keyword_and_other_arguments():
    model, other = net(), net(seed=1)

    def fun(model, x, *, other, power):
        return jnp.mean((model(x) + other(x)) ** power)

    transformed = hesscale_jax.nnx.value_and_hesscale(fun)
    value, (grads, _) = transformed(model, np.asarray(X), other=other, power=2)
    with_other = nnx.value_and_grad(lambda m, o: fun(m, X, other=o, power=2))
    expected, expected_grads = with_other(net(), net(seed=1))
    assert_close(value, expected)
    assert_close(pure(grads), pure(expected_grads))
    assert other.norm.mean[...].any()


def test_new_variables_and_attributes_appear():
    class Growing(Net):
        def __call__(self, x):
            self.activations = nnx.Intermediate(self.hidden(x))
            self.called = True
            return super().__call__(x)

    same_as_nnx(loss, model := Growing(nnx.Rngs(0)))
    assert model.called
    assert model.activations.shape == (7, 4)


def test_shared_parameters():
    class Tied(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))[:, :2]

    same_as_nnx(loss, Tied())


def test_a_module_differentiated_at_one_place_alone_is_an_error():
    model = net()
    with pytest.raises(ValueError, match="aliasing"):
        hesscale_jax.nnx.hesscale(lambda a, b: loss(a) + loss(b))(model, model)


def test_errors_are_those_of_hesscale():
    with pytest.raises(ValueError, match=r"argnums=1 requires more"):
        hesscale_jax.nnx.hesscale(loss, argnums=nnx.DiffState(1, nnx.Param))(net())
    with pytest.raises(TypeError, match="must return a pair"):
        hesscale_jax.nnx.hesscale(loss, has_aux=True)(net())
    with pytest.raises(TypeError, match="pass has_aux=True"):
        hesscale_jax.nnx.hesscale(lambda m: (loss(m), 1))(net())
    with pytest.raises(TypeError, match="argnums=0 has no floating-point"):
        hesscale_jax.nnx.hesscale(lambda m, x: x.sum())(nnx.Dropout(0.1), X)
    with pytest.raises(ValueError, match="curvature must be one of"):
        hesscale_jax.nnx.hesscale(loss, curvature="fisher")(net())


def test_gauss_newton():
    model = net(noisy=False)
    params, function = as_function(model)
    _, expected = hs.hesscale(function, curvature="gauss_newton")(params)
    _, received = hesscale_jax.nnx.hesscale(loss, curvature="gauss_newton")(model)
    assert_close(pure(received), pure(expected))


# nnx, tree mode


def test_states_in_tree_mode_too():
    expected = hesscale_jax.nnx.value_and_hesscale(loss)(net())
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model = net()
        received = hesscale_jax.nnx.value_and_hesscale(loss)(model)
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(received), jax.tree.leaves(expected))
    assert model.norm.mean[...].any()
    assert model.dropout.rngs.count[...] == 1


# Training


@BOTH_MODES
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_twenty_steps_are_compiled_once(graph, curvature):
    model = net()
    optimizer = nnx.Optimizer(model, hs.adahesscale(0.02, eps=1e-2), wrt=nnx.Param, graph=graph)
    traces = []

    @nnx.jit(graph=graph)
    def train_step(model, optimizer, x, y):
        traces.append(None)
        transformed = hesscale_jax.nnx.value_and_hesscale(loss, curvature=curvature)
        value, (grads, hess_diag) = transformed(model, x, y)
        optimizer.update(model, grads, hess_diag=hess_diag)
        return value

    seen, before = [], model.norm.mean[...]
    for _ in range(20):
        seen.append(train_step(model, optimizer, X, Y))
        assert not np.array_equal(model.norm.mean[...], before)
        assert model.dropout.rngs.count[...] == len(seen)
        before = model.norm.mean[...]
    assert len(traces) == 1
    assert optimizer.step[...] == 20
    assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:2])


@BOTH_MODES
def test_the_diagonal_at_every_kth_step(graph):
    model = net()
    optimizer = nnx.Optimizer(model, hs.adahesscale(0.1), wrt=nnx.Param, graph=graph)
    every = hesscale_jax.nnx.value_and_hesscale_every(3)(loss)

    @nnx.jit(graph=graph)
    def train_step(model, optimizer):
        value, (grads, hess_diag), refreshed = every(optimizer.step[...], model)
        optimizer.update(model, grads, hess_diag=hess_diag, refreshed=refreshed)
        return value, refreshed

    for step in range(7):
        expected = loss(nnx.clone(model))
        value, refreshed = train_step(model, optimizer)
        assert_close(value, expected)
        assert refreshed == (step % 3 == 0)
    assert optimizer.opt_state[0].count[...] == 7
    assert optimizer.opt_state[0].nu_count[...] == 3
    assert model.dropout.rngs.count[...] == 7


def test_a_kernel_alone_is_trained():
    model = net(noisy=False)
    filter_ = nnx.PathContains("kernel")
    before = nnx.clone(model)
    optimizer = nnx.Optimizer(model, hs.adahesscale(0.1), wrt=filter_)
    for argnums in (nnx.DiffState(0, filter_), 0):
        grads, hess_diag = hesscale_jax.nnx.hesscale(loss, argnums)(model)
        if argnums == 0:  # kwargs are not filtered by `wrt`
            hess_diag = nnx.state(hess_diag, filter_)
        optimizer.update(model, grads, hess_diag=hess_diag)
    assert_close(model.hidden.bias[...], before.hidden.bias[...])
    assert not np.allclose(model.hidden.kernel[...], before.hidden.kernel[...])


# linen


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(4, param_dtype=x.dtype)(x)
        x = jnp.tanh(linen.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x))
        return linen.Dense(2, param_dtype=x.dtype)(linen.Dropout(0.25, deterministic=not train)(x))


class BatchNormState(hesscale_jax.linen.TrainState):
    batch_stats: dict


def linen_state(tx):
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, train=False)
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)  # statistics too
    return BatchNormState.create(apply_fn=model.apply, tx=tx, **variables)


def test_linen_twenty_steps_are_compiled_once():
    traces = []

    @jax.jit
    def train_step(state, x, y):
        traces.append(None)

        def fun(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = {"dropout": jax.random.fold_in(jax.random.key(0), state.step)}
            out, changed = state.apply_fn(variables, x, True, mutable="batch_stats", rngs=rngs)
            return jnp.mean((out - y) ** 2), changed["batch_stats"]

        (value, stats), (grads, hess_diag) = hs.value_and_hesscale(fun, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, hess_diag=hess_diag, batch_stats=stats), value

    state = linen_state(tx := hs.adahesscale(0.02, eps=1e-2))
    seen, statistics = [], [state.batch_stats["BatchNorm_0"]["mean"]]
    state = state.replace(step=jnp.array(0))
    for _ in range(20):
        state, value = train_step(state, X, Y)
        seen.append(value)
        statistics.append(state.batch_stats["BatchNorm_0"]["mean"])
        assert not np.array_equal(*statistics[-2:])
    assert len(traces) == 1
    assert state.step == 20
    assert state.tx is tx
    assert np.mean(seen[-5:]) < 0.8 * np.mean(seen[:2])


def test_linen_updates_are_the_optimizers():
    state = linen_state(hs.adahesscale(0.1))
    grads, hess_diag = (jax.tree.map(lambda p, s=s: s + p**2, state.params) for s in (1, 2))
    after = state.apply_gradients(grads=grads, hess_diag=hess_diag)
    updates, opt_state = state.tx.update(grads, state.opt_state, hess_diag=hess_diag)
    assert_close(after.params, optax.apply_updates(state.params, updates))
    assert_close(after.opt_state, opt_state)
    kept = after.apply_gradients(grads=grads, hess_diag=grads, refreshed=False)
    assert_close(kept.opt_state[0].nu, opt_state[0].nu)


def test_linen_state_serves_other_optimizers_too():
    state = linen_state(optax.sgd(0.1))
    after = state.apply_gradients(grads=state.params, hess_diag=state.params)
    assert_close(after.params, jax.tree.map(lambda p: 0.9 * p, state.params))
    with pytest.raises(TypeError, match="hess_diag"):
        linen_state(hs.adahesscale(0.1)).apply_gradients(grads=state.params)


# linen, 8-bit training


class Fp8Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(jnp.tanh(linen.Dense(8, dot_general_cls=linen.Fp8DotGeneralOp)(x)))


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_fp8_scales_are_overwritten_with_their_gradient(frozen, every):
    """As Flax's own state does with Adam; the rest is trained as without that collection."""
    x = jax.random.normal(jax.random.key(1), (16, 4), jnp.float32)
    model, owg = Fp8Net(), "_overwrite_with_gradient"
    variables = model.init(jax.random.key(0), x)
    variables = freeze(variables) if frozen else variables
    tx = hs.adahesscale(1e-2)
    state = hesscale_jax.linen.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    def fun(variables):
        return jnp.mean((model.apply(variables, x) - 1) ** 2)

    refreshed = None
    if every:
        _, (grads, hess_diag), refreshed = hs.value_and_hesscale_every(2)(fun)(0, variables)
    else:
        grads, hess_diag = hs.hesscale(fun)(variables)
    after = state.apply_gradients(grads=grads, hess_diag=hess_diag, refreshed=refreshed)
    assert_close(dict(after.params[owg]), dict(grads[owg]))
    expected, opt_state = tx.update(
        grads["params"], tx.init(variables["params"]), hess_diag=hess_diag["params"]
    )
    assert_close(after.params["params"], optax.apply_updates(variables["params"], expected))
    assert_close(after.opt_state, opt_state)
    theirs = train_state.TrainState.create(apply_fn=None, params=variables, tx=optax.sgd(0.1))
    theirs = theirs.apply_gradients(grads=grads)
    assert jax.tree.structure(theirs.params) == jax.tree.structure(after.params)
    with pytest.raises(ValueError, match="different structure"):
        state.apply_gradients(grads=grads, hess_diag={"params": hess_diag["params"]})


def test_linen_frozen_parameters():
    plain = linen_state(hs.adahesscale(0.1))
    expected = plain.apply_gradients(grads=plain.params, hess_diag=plain.params)
    params = freeze(plain.params)
    frozen = hesscale_jax.linen.TrainState.create(apply_fn=None, params=params, tx=plain.tx)
    received = frozen.apply_gradients(grads=params, hess_diag=params)
    assert_close(received.params.unfreeze(), expected.params)


# linen, other extra arguments


def by_loss():
    def update(updates, state, params=None, *, loss, **extra_args):
        return jax.tree.map(lambda u: loss * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_linen_hands_extra_arguments_on():
    tx = optax.chain(hs.adahesscale(0.1), optax.contrib.reduce_on_plateau(patience=1), by_loss())
    state = linen_state(tx)
    params, opt_state = state.params, state.opt_state
    step = jax.jit(
        lambda state, value: state.apply_gradients(
            grads=state.params, hess_diag=state.params, value=value, loss=2.0
        )
    )
    for value in (1.0, 2.0, 3.0, 4.0):
        state = step(state, value)
        updates, opt_state = tx.update(params, opt_state, hess_diag=params, value=value, loss=2.0)
        params = optax.apply_updates(params, updates)
    assert_close(state.params, params)
    assert state.opt_state[1].scale < 1


@pytest.mark.parametrize("with_curvature", [False, True])
def test_linen_line_search(with_curvature):
    # A line search refuses what its function doesn't take.
    def value_fn(params, hess_diag=None):
        return optax.tree.norm(params, squared=True)

    direction = hs.adahesscale(1.0) if with_curvature else optax.sgd(1.0)
    state = linen_state(optax.chain(direction, optax.scale_by_backtracking_linesearch(10)))
    value, grads = jax.value_and_grad(value_fn)(state.params)
    curvature = {"hess_diag": grads} if with_curvature else {}
    arguments = {"value": value, "grad": grads, "value_fn": value_fn} | curvature
    after = state.apply_gradients(grads=grads, **arguments)
    updates, _ = state.tx.update(grads, state.opt_state, state.params, **arguments)
    assert_close(after.params, optax.apply_updates(state.params, updates))
    assert value_fn(after.params) < value


def test_linen_attributes_come_before_extra_arguments():
    class WithLoss(BatchNormState):
        loss: float = 0.0

    state = linen_state(optax.sgd(0.1))
    state = WithLoss(**{name: getattr(state, name) for name in vars(state)})
    after = state.apply_gradients(grads=state.params, loss=2.0, batch_stats={}, tx=optax.adam(1.0))
    assert (after.loss, after.batch_stats) == (2.0, {})
    assert after.tx is not state.tx


@pytest.mark.parametrize("tx", [hs.adahesscale(0.1), optax.scale(0.1)], ids=["chain", "plain"])
def test_linen_loses_no_keyword(tx):
    state = linen_state(tx)
    with pytest.raises(
        TypeError, match=r"'batch_stat', which is neither an attribute of BatchNorm"
    ):
        state.apply_gradients(grads=state.params, hess_diag=state.params, batch_stat={})
