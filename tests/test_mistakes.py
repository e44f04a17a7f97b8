"""The mistakes that are made first: each is answered by what is wrong, where, and what to do."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import hesscale_jax as hs

PARAMS = {"hidden": jnp.ones((3, 4)), "out": jnp.ones(4)}
X = jnp.ones((5, 3))
TX = hs.adahesscale(1e-2)


def of_each(params, x):
    return jnp.square(jnp.tanh(x @ params["hidden"]) @ params["out"])


def loss(params, x):
    return jnp.mean(of_each(params, x))


def update(grad, hess_diag):
    return TX.update(grad, TX.init(PARAMS), PARAMS, hess_diag=hess_diag)


def apply_gradients(**curvature):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=TX)
    return state.apply_gradients(grads=PARAMS, **curvature)


def update_of_layers(**curvature):
    tx = hs.orthogonal_newton(1e-2, hs.layouts(loss)(PARAMS, X))
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, **curvature)


def with_callback(params, x):
    return jnp.sum(jax.pure_callback(lambda w: w, params["out"], params["out"]))


def with_eigenvalues(params, x):
    return jnp.sum(jnp.abs(jnp.linalg.eigvals(params["hidden"].T @ params["hidden"])))


# By name: the call, its error, what is said of the mistake and what of the remedy.
MISTAKES = {
    "integer parameters": (
        lambda: hs.hesscale(loss)(PARAMS | {"out": jnp.ones(4, "int32")}, X),
        (TypeError, "int32 at args[0]['out']", ".astype(float)"),
    ),
    "complex parameters": (
        lambda: hs.hesscale(loss)(PARAMS | {"out": jnp.ones(4, "complex64")}, X),
        (TypeError, "complex64 at args[0]['out']", "two real arrays"),
    ),
    "a name among the parameters": (
        lambda: hs.hesscale(loss)(PARAMS | {"name": "MLP"}, X),
        (TypeError, "str at args[0]['name']", "equinox.partition"),
    ),
    "a module's random numbers": (
        lambda: hs.hesscale(lambda f: f(X).mean())(nnx.Dropout(0.1, rngs=nnx.Rngs(0))),
        (TypeError, "args[0].rngs.count", "hesscale_jax.nnx"),
    ),
    "parameters by keyword": (
        lambda: hs.hesscale(loss)(params=PARAMS, x=X),
        (ValueError, "more positional arguments", "by keyword are not differentiated"),
    ),
    "a loss for each example": (
        lambda: hs.hesscale(of_each)(PARAMS, X),
        (TypeError, "got shape (5,)", "jnp.mean"),
    ),
    "vmap of the loss": (
        lambda: hs.hesscale(jax.vmap(loss, (None, 0)))(PARAMS, X),
        (TypeError, "got shape (5,)", "jax.vmap(hesscale(loss), in_axes=(None, 0))"),
    ),
    "auxiliary data": (
        lambda: hs.hesscale(lambda p, x: (loss(p, x), x))(PARAMS, X),
        (TypeError, "got tuple", "has_aux=True"),
    ),
    "no return": (
        lambda: hs.hesscale(lambda p, x: None)(PARAMS, X),
        (TypeError, "got None", "return"),
    ),
    "a complex loss": (
        lambda: hs.hesscale(lambda p, x: jax.lax.complex(loss(p, x), loss(p, x)))(PARAMS, X),
        (TypeError, "got dtype complex", ".real"),
    ),
    "the loss's value in place of the loss": (
        lambda: hs.hesscale(loss(PARAMS, X)),
        (TypeError, "a function, got Array", "hesscale(loss)(params, ...)"),
    ),
    "parameters beside the loss": (
        lambda: hs.hesscale(loss, PARAMS),
        (TypeError, "argnums must be an int", "hesscale(loss)(params, ...)"),
    ),
    "another curvature": (
        lambda: hs.hesscale(loss, curvature="ggn"),
        (ValueError, "got 'ggn'", "'hessian', 'gauss_newton'"),
    ),
    "another dtype of products": (
        lambda: hs.hesscale(loss, product_dtype="foo"),
        (ValueError, "got 'foo'", "jnp.bfloat16"),
    ),
    "no number of the step": (
        lambda: hs.value_and_hesscale_every(10)(loss)(PARAMS, X),
        (TypeError, "got dict", "the number of the step comes first"),
    ),
    "an unsupported primitive": (
        lambda: hs.hesscale(with_callback)(PARAMS, X),
        (NotImplementedError, "no rule for 'pure_callback' (used at", "jax.lax.stop_gradient"),
    ),
    "complex values within": (
        lambda: hs.hesscale(with_eigenvalues)(PARAMS, X),
        (NotImplementedError, "complex values on the way", "write that step for real arrays"),
    ),
    "no hess_diag": (
        lambda: TX.update(PARAMS, TX.init(PARAMS), PARAMS),
        (TypeError, "needs the extra argument 'hess_diag'", "hesscale_jax.hesscale(loss)"),
    ),
    "hess_diag to Flax's own TrainState": (
        lambda: apply_gradients(hess_diag=PARAMS),
        (TypeError, "needs the extra argument 'hess_diag'", "hesscale_jax.linen.TrainState"),
    ),
    "the pair as hess_diag": (
        lambda: update(PARAMS, hs.hesscale(loss)(PARAMS, X)),
        (ValueError, "one of them is a tuple", "returns (grad, hess_diag)"),
    ),
    "the pair as gradient": (
        lambda: update(hs.hesscale(loss)(PARAMS, X), PARAMS),
        (ValueError, "one of them is a tuple", "returns (grad, hess_diag)"),
    ),
    "another structure": (
        lambda: update(PARAMS, {"hidden": PARAMS["hidden"], "bias": PARAMS["out"]}),
        (ValueError, "lacks ['out']", "has ['bias'] besides"),
    ),
    "another shape": (
        lambda: update(PARAMS, PARAMS | {"hidden": PARAMS["hidden"].T}),
        (ValueError, "hess_diag['hidden'] is (4, 3)", "updates['hidden'] is (3, 4)"),
    ),
    "hess_diag to orthogonal_newton": (
        lambda: update_of_layers(hess_diag=PARAMS),
        (TypeError, "'factors', not 'hess_diag'", "hesscale_jax.value_and_factors(loss)"),
    ),
    "layouts that were not computed": (
        lambda: hs.orthogonal_newton(1e-2, hs.layouts(loss)).init(PARAMS),
        (ValueError, "'layouts' has a different structure", "layouts(loss)(params, *batch)"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_says_what_is_wrong_and_what_to_do(name):
    call, (error, wrong, remedy) = MISTAKES[name]
    with pytest.raises(error, match=re.escape(wrong)) as caught:
        call()
    assert remedy in str(caught.value)
    assert len(str(caught.value)) < 1000  # read to the end


@pytest.mark.parametrize("method", [hs.hesscale, hs.explain, hs.layouts])
def test_a_call_on_the_value_is_answered_alike(method):
    with pytest.raises(TypeError, match="takes the loss itself"):
        method(loss(PARAMS, X))(PARAMS, X)


def test_what_works_under_jit_and_vmap_does_not_raise():
    grad, hess_diag = jax.jit(jax.vmap(hs.hesscale(loss), (None, 0)))(PARAMS, X)
    assert hess_diag["hidden"].shape == (5, 3, 4)
    mean = jax.tree.map(lambda x: x.mean(axis=0), hess_diag)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(TX.update)(PARAMS, TX.init(PARAMS), PARAMS, hess_diag=mean)
    assert jax.tree.structure(updates) == jax.tree.structure(grad)


def test_nan_is_handed_on_and_found_by_debug_nans():
    grad, hess_diag = hs.hesscale(loss)(PARAMS, jnp.nan * X)
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves((grad, hess_diag)))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        hs.hesscale(loss)(PARAMS, jnp.nan * X)


def test_nan_in_the_curvature_leaves_an_optimizers_average_as_it_was():
    state = TX.init(PARAMS)
    _, (after, *_) = TX.update(PARAMS, state, PARAMS, hess_diag=optax.tree.scale(jnp.nan, PARAMS))
    assert all((v == 0).all() for v in jax.tree.leaves(after.nu))
