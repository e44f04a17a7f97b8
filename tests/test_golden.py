"""The authors' PyTorch figures, reproduced: ``golden/configs.json`` rebuilt in plain JAX.

Each network has two spellings, because the diagonal must not depend on how a function is written:
``library`` uses what ``jax.nn`` and Optax offer, ``formula`` definitions from ``exp``, ``where``
and ``max``.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import hesscale_jax as hs

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {c["name"]: c for c in json.loads((GOLDEN / "configs.json").read_text())["configs"]}
GOLDEN_NAME = {"hessian": "hesscale", "gauss_newton": "hesscale_gn"}
TOLERANCE = 1e-10  # max |received - expected| / max |expected|, per parameter

Layer = Mapping[str, Any]
Params = dict[str, jax.Array]

# ------------------------------------------------------------------------------------------- layers


def linear(layer: Layer, params: Params, x: jax.Array) -> jax.Array:
    return _add_bias(layer, params, x @ params["weight"].T)


def conv(layer: Layer, params: Params, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
        x,
        params["weight"],
        window_strides=layer["stride"],
        padding=_symmetric(layer["padding"]),
        rhs_dilation=layer["dilation"],
        feature_group_count=layer["groups"],
    )
    return _add_bias(layer, params, y)


def conv_transpose(layer: Layer, params: Params, x: jax.Array) -> jax.Array:
    """A convolution of the input spread by the stride with the flipped kernel."""
    groups, spatial = layer["groups"], tuple(layer["kernel"])
    weight = params["weight"].reshape(groups, layer["in"] // groups, -1, *spatial)
    weight = jnp.swapaxes(weight, 1, 2).reshape(layer["out"], layer["in"] // groups, *spatial)
    reach = [d * (k - 1) for d, k in zip(layer["dilation"], spatial, strict=True)]
    y = lax.conv_general_dilated(
        x,
        jnp.flip(weight, axis=range(2, weight.ndim)),
        window_strides=[1] * len(spatial),
        padding=[
            (r - p, r - p + extra)
            for r, p, extra in zip(reach, layer["padding"], layer["output_padding"], strict=True)
        ],
        lhs_dilation=layer["stride"],
        rhs_dilation=layer["dilation"],
        feature_group_count=groups,
    )
    return _add_bias(layer, params, y)


def max_pool(layer: Layer, params: Params, x: jax.Array) -> jax.Array:
    return _pool(layer, x, -jnp.inf, lax.max)


def avg_pool(layer: Layer, params: Params, x: jax.Array) -> jax.Array:
    return _pool(layer, x, 0.0, lax.add) / math.prod(layer["kernel"])


def _pool(layer: Layer, x: jax.Array, init: float, combine: Callable[..., jax.Array]) -> jax.Array:
    return lax.reduce_window(
        x,
        init,
        combine,
        window_dimensions=(1, 1, *layer["kernel"]),
        window_strides=(1, 1, *layer["stride"]),
        padding=((0, 0), (0, 0), *_symmetric(layer["padding"])),
    )


def _symmetric(padding: list[int]) -> list[tuple[int, int]]:
    return [(p, p) for p in padding]


def _add_bias(layer: Layer, params: Params, y: jax.Array) -> jax.Array:
    if not layer["bias"]:
        return y
    return y + params["bias"].reshape(1, -1, *[1] * (y.ndim - 2))


LAYERS = {
    "linear": linear,
    "conv1d": conv,
    "conv2d": conv,
    "conv_transpose2d": conv_transpose,
    "max_pool1d": max_pool,
    "max_pool2d": max_pool,
    "avg_pool2d": avg_pool,
    "flatten": lambda layer, params, x: x.reshape(x.shape[0], -1),
}

# --------------------------------------------------------------------------- activations and losses


def tanh_formula(x: jax.Array) -> jax.Array:
    return (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x))


def selu_formula(x: jax.Array) -> jax.Array:
    alpha, scale = 1.6732632423543772848, 1.0507009873554804934
    return scale * jnp.where(x > 0, x, alpha * (jnp.exp(jnp.minimum(x, 0.0)) - 1.0))


def cross_entropy_formula(logits: jax.Array, labels: jax.Array) -> jax.Array:
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=1, keepdims=True)))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    return -jnp.log((probabilities * jax.nn.one_hot(labels, logits.shape[1])).sum(axis=1))


ACTIVATIONS = {
    "library": {
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "relu": jax.nn.relu,
        "leaky_relu": jax.nn.leaky_relu,
        "selu": jax.nn.selu,
    },
    "formula": {
        "tanh": tanh_formula,
        "sigmoid": lambda x: 1.0 / (1.0 + jnp.exp(-x)),
        "relu": lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)),
        "leaky_relu": lambda x: jnp.maximum(x, 0.01 * x),
        "selu": selu_formula,
    },
}
LOSSES = {
    "library": {
        "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
        "mse": optax.squared_error,
    },
    "formula": {
        "cross_entropy": cross_entropy_formula,
        "mse": lambda prediction, target: (prediction - target) * (prediction - target),
    },
}
REDUCTIONS = {"mean": jnp.mean, "sum": jnp.sum}
SPELLINGS = tuple(LOSSES)

# ----------------------------------------------------------------------------------------- networks


def predict(config: Mapping[str, Any], spelling: str, params: Params, x: jax.Array) -> jax.Array:
    for index, layer in enumerate(config["layers"]):
        if layer["type"] in LAYERS:
            own = {kind: params.get(f"{index}.{kind}") for kind in ("weight", "bias")}
            x = LAYERS[layer["type"]](layer, own, x)
        else:
            x = ACTIVATIONS[spelling][layer["type"]](x)
    return x


def objective(config: Mapping[str, Any], spelling: str, *, named: bool) -> Callable[..., jax.Array]:
    """The loss of ``(params, x, y)``; ``named`` marks the network's output for Gauss-Newton."""

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = predict(config, spelling, params, x)
        if named:
            logits = checkpoint_name(logits, "model_output")
        return REDUCTIONS[config["reduction"]](LOSSES[spelling][config["loss"]](logits, y))

    return loss


def ends_in_activation(config: Mapping[str, Any]) -> bool:
    return config["layers"][-1]["type"] not in LAYERS


@functools.cache
def load(name: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / CONFIGS[name]["file"]) as file:
        return dict(file)


def arguments(name: str) -> tuple[Params, jax.Array, jax.Array]:
    data = load(name)
    params = {p: jnp.asarray(data[f"param/{p}"]) for p in CONFIGS[name]["params"]}
    return params, jnp.asarray(data["x"]), jnp.asarray(data["y"])


def assert_golden(name: str, group: str, received: Params) -> None:
    assert received.keys() == CONFIGS[name]["params"].keys()
    for parameter, value in received.items():
        assert_close(value, load(name)[f"{group}/{parameter}"], f"{group}/{parameter}")


def assert_close(received: jax.Array, expected: np.ndarray, what: str) -> None:
    assert received.shape == expected.shape, what
    assert received.dtype == np.float64, what
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(received) - expected).max()
    assert error <= TOLERANCE * scale, f"{what}: relative error {error / scale:.1e}"


# -------------------------------------------------------------------------------------------- tests

every_network = pytest.mark.parametrize("name", CONFIGS)
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS)
every_curvature = pytest.mark.parametrize("curvature", GOLDEN_NAME)


@every_network
@every_spelling
def test_rebuilt_network_has_the_golden_logits_loss_and_gradient(name: str, spelling: str) -> None:
    config = CONFIGS[name]
    loss_of = objective(config, spelling, named=False)

    @jax.jit
    def outputs(params: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        return predict(config, spelling, params, x), *jax.value_and_grad(loss_of)(params, x, y)

    logits, loss, grad = outputs(*arguments(name))
    assert_close(logits, load(name)["logits"], "logits")
    assert_close(loss, load(name)["loss"], "loss")
    assert_golden(name, "grad", grad)


@every_spelling
@pytest.mark.parametrize(
    "name", ["mlp_d2_sigmoid_mse_sum_b1", "cnn1d_maxpool_ce_mean_b8", "mlp_d0_ce_mean_b8"]
)
def test_rebuilt_network_has_the_golden_hessian(name: str, spelling: str) -> None:
    params, x, y = arguments(name)
    loss = objective(CONFIGS[name], spelling, named=False)
    hessian = jax.jit(jax.hessian(loss))(params, x, y)
    diagonal = {
        p: jnp.diagonal(hessian[p][p].reshape(v.size, v.size)).reshape(v.shape)
        for p, v in params.items()
    }
    assert_golden(name, "hess_diag", diagonal)


@every_network
@every_spelling
@every_curvature
def test_hesscale_matches_the_authors_code(name: str, spelling: str, curvature: str) -> None:
    config = CONFIGS[name]
    loss = objective(config, spelling, named=ends_in_activation(config))
    grad, hess_diag = jax.jit(hs.hesscale(loss, curvature=curvature))(*arguments(name))
    assert_golden(name, "grad", grad)
    assert_golden(name, config["expected"][GOLDEN_NAME[curvature]], hess_diag)


@every_curvature
@pytest.mark.parametrize(
    "name", ["mlp_d2_tanh_ce_sum_b8", "mlp_d4_tanh_mse_mean_b8", "cnn2d_groups_tanh_ce_mean_b8"]
)
def test_naming_an_output_that_is_a_layer_changes_nothing(name: str, curvature: str) -> None:
    config = CONFIGS[name]
    assert not ends_in_activation(config)
    loss = objective(config, "library", named=True)
    _, hess_diag = jax.jit(hs.hesscale(loss, curvature=curvature))(*arguments(name))
    assert_golden(name, config["expected"][GOLDEN_NAME[curvature]], hess_diag)


def test_hessian_ignores_the_name_of_the_output() -> None:
    """``model_output`` moves the border of the loss head, which only Gauss-Newton asks for."""
    name = "mlp_act_before_loss_mse_mean_b8"
    loss = objective(CONFIGS[name], "library", named=False)
    _, hess_diag = jax.jit(hs.hesscale(loss))(*arguments(name))
    assert_golden(name, CONFIGS[name]["expected"]["hesscale"], hess_diag)


def test_unnamed_gauss_newton_counts_a_last_activation_as_loss() -> None:
    """Without the name the last tanh joins the loss head, where its second derivative is kept."""
    name = "mlp_act_before_loss_mse_mean_b8"
    loss = objective(CONFIGS[name], "library", named=False)
    _, hess_diag = jax.jit(hs.hesscale(loss, curvature="gauss_newton"))(*arguments(name))
    last_layer = {p: v for p, v in hess_diag.items() if p.startswith("2.")}
    for parameter, value in last_layer.items():
        assert_close(value, load(name)[f"hess_diag/{parameter}"], parameter)
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(name, "hesscale_gn", hess_diag)
