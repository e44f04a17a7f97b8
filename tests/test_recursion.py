"""The published recursion in plain NumPy, against the library, for multilayer perceptrons.

For layers ``a_l = W_l x_{l-1} + b_l``, ``x_l = s(a_l)`` and a loss ``L(a_L)``, with ``g`` for
gradients and ``h`` for the diagonal:

    top         h_a = diag d2L/da2            cross-entropy: p - p^2, squared error: 2
    linear      h_x = (W*W)^T h_a             h_W = h_a (x*x)^T,  h_b = h_a, summed over the batch
    activation  h_a = s'(a)^2 h_x + s''(a) g_x

HesScaleGN leaves out the ``s''`` term (arXiv 2210.11639).
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import hesscale_jax as hs

RTOL = 1e-9
Layers = list[tuple[np.ndarray, np.ndarray]]


class Activation(NamedTuple):
    """An activation in JAX, and in NumPy its value, first and second derivative."""

    jax: Callable[[jax.Array], jax.Array]
    numpy: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def tanh(a: np.ndarray) -> tuple[np.ndarray, ...]:
    t = np.tanh(a)
    return t, 1 - t**2, -2 * t * (1 - t**2)


def sigmoid(a: np.ndarray) -> tuple[np.ndarray, ...]:
    p = 1 / (1 + np.exp(-a))
    return p, p * (1 - p), p * (1 - p) * (1 - 2 * p)


def relu(a: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.maximum(a, 0), (a > 0).astype(a.dtype), np.zeros_like(a)


def gelu(a: np.ndarray) -> tuple[np.ndarray, ...]:
    """``a Phi(a)``, whose derivatives are ``Phi + a phi`` and ``(2 - a^2) phi``."""
    phi = np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    capital_phi = 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    return a * capital_phi, capital_phi + a * phi, (2 - a**2) * phi


def silu(a: np.ndarray) -> tuple[np.ndarray, ...]:
    p, dp, ddp = sigmoid(a)
    return a * p, p + a * dp, 2 * dp + a * ddp


ACTIVATIONS = {
    "tanh": Activation(jnp.tanh, tanh),
    "sigmoid": Activation(jax.nn.sigmoid, sigmoid),
    "relu": Activation(jax.nn.relu, relu),
    "gelu": Activation(lambda a: jax.nn.gelu(a, approximate=False), gelu),
    "silu": Activation(jax.nn.silu, silu),
}


class Loss(NamedTuple):
    """A loss per example in JAX; in NumPy its gradient and Hessian diagonal in the logits."""

    jax: Callable[[jax.Array, jax.Array], jax.Array]
    numpy: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def cross_entropy(logits: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = weights / weights.sum(axis=1, keepdims=True)
    return p - target, p - p**2


def squared_error(output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 2 * (output - target), np.full_like(output, 2)


LOSSES = {
    "cross_entropy": Loss(optax.softmax_cross_entropy, cross_entropy),
    "squared_error": Loss(lambda z, t: optax.squared_error(z, t).sum(axis=1), squared_error),
}


def recursion(
    layers: Layers,
    x: np.ndarray,
    target: np.ndarray,
    activation: Activation,
    loss: Loss,
    curvature: str,
    *,
    activate_output: bool = False,
) -> tuple[Layers, Layers]:
    """``(grad, hess_diag)`` of the loss averaged over the batch, by this module's docstring."""
    inputs, derivatives = [], []
    for weight, bias in layers:
        inputs.append(x)
        value, first, second = activation.numpy(x @ weight.T + bias)
        derivatives.append((first, second))
        x = value
    if not activate_output:
        x = inputs[-1] @ layers[-1][0].T + layers[-1][1]
        derivatives[-1] = np.ones_like(x), np.zeros_like(x)

    g, h = (d / len(x) for d in loss.numpy(x, target))
    grad, hess_diag = [], []
    for (weight, _), x, (first, second) in zip(
        reversed(layers), reversed(inputs), reversed(derivatives), strict=True
    ):
        h = first**2 * h + (second * g if curvature == "hessian" else 0)
        g = first * g
        grad.insert(0, (g.T @ x, g.sum(axis=0)))
        hess_diag.insert(0, (h.T @ x**2, h.sum(axis=0)))
        g, h = g @ weight, h @ weight**2
    return grad, hess_diag


def problem(widths: tuple[int, ...], batch: int) -> tuple[Layers, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([*widths, batch])
    layers = [
        (rng.normal(size=(n_out, n_in)) * 1.5 / math.sqrt(n_in), rng.normal(size=n_out) / 2)
        for n_in, n_out in itertools.pairwise(widths)
    ]
    target = rng.dirichlet(np.ones(widths[-1]), size=batch)
    return layers, rng.normal(size=(batch, widths[0])), target


def objective(
    activation: Activation, loss: Loss, *, activate_output: bool, name: str | None
) -> Callable[..., jax.Array]:
    def mean_loss(layers: Layers, x: jax.Array, target: jax.Array) -> jax.Array:
        for index, (weight, bias) in enumerate(layers):
            x = x @ weight.T + bias[None]
            if index + 1 < len(layers) or activate_output:
                x = activation.jax(x)
        if name is not None:
            x = checkpoint_name(x, name)
        return loss.jax(x, target).mean()

    return mean_loss


def assert_layers_close(received: Layers, expected: Layers) -> None:
    """Entry by entry; ``atol`` is the rounding of the summands of an entry that cancels."""
    for index, (got, want) in enumerate(zip(received, expected, strict=True)):
        for kind, a, b in zip(("weight", "bias"), got, want, strict=True):
            np.testing.assert_allclose(
                a, b, rtol=RTOL, atol=1e-13 * np.abs(b).max(), err_msg=f"layer {index} {kind}"
            )


every_curvature = pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])


@every_curvature
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("widths", "batch", "activation"),
    [
        ((4, 3), 5, "tanh"),  # no hidden layer, so no activation
        *(
            (widths, batch, activation)
            for widths, batch in [((5, 7, 3), 6), ((6, 5, 8, 7, 4), 3)]
            for activation in ACTIVATIONS
        ),
    ],
    ids=str,
)
def test_mlp_follows_the_published_recursion(
    widths: tuple[int, ...], batch: int, activation: str, loss: str, curvature: str
) -> None:
    layers, x, target = problem(widths, batch)
    expected = recursion(layers, x, target, ACTIVATIONS[activation], LOSSES[loss], curvature)
    fun = objective(ACTIVATIONS[activation], LOSSES[loss], activate_output=False, name=None)
    grad, hess_diag = jax.jit(hs.hesscale(fun, curvature=curvature))(layers, x, target)
    assert_layers_close(grad, expected[0])
    assert_layers_close(hess_diag, expected[1])


@every_curvature
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu"])
def test_activated_output_follows_the_recursion_when_named(activation: str, curvature: str) -> None:
    layers, x, target = problem((5, 6, 4), 7)
    act, loss = ACTIVATIONS[activation], LOSSES["squared_error"]
    expected = recursion(layers, x, target, act, loss, curvature, activate_output=True)
    fun = objective(act, loss, activate_output=True, name="model_output")
    grad, hess_diag = jax.jit(hs.hesscale(fun, curvature=curvature))(layers, x, target)
    assert_layers_close(grad, expected[0])
    assert_layers_close(hess_diag, expected[1])


@pytest.mark.parametrize("name", [None, "hidden"])
def test_only_model_output_takes_an_activation_out_of_the_head(name: str | None) -> None:
    """Unnamed, the activation is part of the loss: its last layer keeps the ``s''`` term."""
    layers, x, target = problem((5, 6, 4), 7)
    act, loss = ACTIVATIONS["tanh"], LOSSES["squared_error"]
    exact_at_the_top = recursion(layers, x, target, act, loss, "hessian", activate_output=True)
    fun = objective(act, loss, activate_output=True, name=name)
    _, hess_diag = jax.jit(hs.hesscale(fun, curvature="gauss_newton"))(layers, x, target)
    assert_layers_close(hess_diag[-1:], exact_at_the_top[1][-1:])


def test_recursion_is_exact_where_theory_says_so() -> None:
    """The NumPy side on its own: with one unit a layer nothing is dropped."""
    layers, x, target = problem((1, 1, 1, 1), 6)
    act, loss = ACTIVATIONS["gelu"], LOSSES["squared_error"]
    fun = objective(act, loss, activate_output=False, name=None)
    grad, hess_diag = recursion(layers, x, target, act, loss, "hessian")
    hessian = jax.jit(jax.hessian(fun))(layers, x, target)
    diagonal = [
        tuple(hessian[i][kind][i][kind].reshape(leaf.shape) for kind, leaf in enumerate(layer))
        for i, layer in enumerate(layers)
    ]
    assert_layers_close(grad, jax.jit(jax.grad(fun))(layers, x, target))
    assert_layers_close(hess_diag, diagonal)
