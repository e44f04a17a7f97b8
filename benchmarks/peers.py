"""Other ways to a diagonal in JAX, each with the value and the gradient, as a step of training has.

    Hutchinson, optax      what `optax.contrib.sophia` calls, beside the gradient that it is handed
    Hutchinson, somax      what somax makes AdaHessian and Sophia-H of
    GNB, somax             Sophia-G: squared gradients for labels drawn from the model's own
    exact                  a Hessian-vector product for every parameter; small models alone

All take a random key before the arguments of the loss. optax 0.2.8 has no AdaHessian. somax is
`python-somax` on PyPI, where `somax` is another project. Its estimators scan over their samples,
even one, and convolutions within a loop are slow on a CPU (jax-ml/jax#12868).
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from models import Task

Method = Callable[..., Any]

EXACT_PARAMETERS = 5000  # at most


def methods(task: Task, params: Any) -> dict[str, Method]:
    """Those that are installed, and affordable with so many parameters."""
    found = {"Hutchinson, optax": hutchinson_by_optax(task)}
    if importlib.util.find_spec("somax"):
        found["Hutchinson, somax"] = hutchinson_by_somax(task)
        found["GNB, somax"] = gauss_newton_bartlett_by_somax(task)
    if optax.tree.size(params) <= EXACT_PARAMETERS:
        found["exact"] = exact(task)
    return found


def hutchinson_by_optax(task: Task) -> Method:
    def method(key: jax.Array, params: Any, *batch: Any) -> Any:
        estimator = optax.contrib.hutchinson_estimator_diag_hessian(key)
        value, grad = jax.value_and_grad(task.loss)(params, *batch)
        diagonal, _ = estimator.update(
            grad, estimator.init(params), params, obj_fn=lambda p: task.loss(p, *batch)
        )
        return value, (grad, diagonal)

    return method


def hutchinson_by_somax(task: Task) -> Method:
    from somax.curvature.hessian import ExactHessian
    from somax.estimators import Hutchinson

    operator = ExactHessian(loss_fn=lambda params, batch: task.loss(params, *batch))
    return _by_somax(operator, Hutchinson(n_probes=1), lambda *batch: batch)


def gauss_newton_bartlett_by_somax(task: Task) -> Method:
    from somax.curvature.ggn_ce import GGNCE
    from somax.estimators import GaussNewtonBartlett

    def predict(params: Any, x: Any) -> jax.Array:
        logits = task.predict(params, *x)
        return logits.reshape(-1, logits.shape[-1])

    def as_somax_has_it(rest: Any, inputs: jax.Array, labels: jax.Array) -> dict[str, Any]:
        return {"x": (rest, inputs), "y": labels.reshape(-1)}

    return _by_somax(GGNCE(predict_fn=predict), GaussNewtonBartlett(n_samples=1), as_somax_has_it)


def _by_somax(operator: Any, estimator: Any, as_somax_has_it: Callable[..., Any]) -> Method:
    from somax.curvature.with_estimators import CurvatureOpWithEstimators

    curvature = CurvatureOpWithEstimators(operator, estimator)

    def method(key: jax.Array, params: Any, *batch: Any) -> Any:
        data = as_somax_has_it(*batch)
        state, grad = curvature.init(params, data, with_grad=True)
        diagonal = curvature.diagonal(params, state, key)
        return curvature.loss(params, state, data), (grad, diagonal)

    return method


def exact(task: Task) -> Method:
    def method(key: jax.Array, params: Any, *batch: Any) -> Any:
        flat, unravel = ravel_pytree(params)

        def gradient(flat: jax.Array) -> jax.Array:
            return ravel_pytree(jax.grad(task.loss)(unravel(flat), *batch))[0]

        def entry(index: jax.Array) -> jax.Array:
            unit = jnp.zeros_like(flat).at[index].set(1.0)
            return jax.jvp(gradient, (flat,), (unit,))[1][index]

        diagonal = jax.lax.map(entry, jnp.arange(flat.size), batch_size=32)
        value, grad = jax.value_and_grad(task.loss)(params, *batch)
        return value, (grad, unravel(diagonal))

    return method
