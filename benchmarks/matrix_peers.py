"""Optimizers of others that work on whole matrices, each after its authors' description.

They take the layouts of :func:`hesscale_jax.layouts`, so that all of them see the same matrices.
What is no layer's weights, and the last layer where the authors leave it out, goes to Adam, at the
same learning rate. An update is scaled to a root mean square of 0.2, about Adam's (Liu et al.,
arXiv 2502.16982), where it is orthogonal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hesscale_jax as hs
from hesscale_jax.optimizers.orthogonal_newton import damped_inverse, orthogonalised

Matrices = jax.Array  # (count, inputs, outputs)


class Rule(NamedTuple):
    """What an optimizer does with the matrices of a layer."""

    init: Callable[[int, int, int], dict[str, jax.Array]]
    # (state, gradient, count of steps, whether to renew, factors) -> (update, state)
    update: Callable[..., tuple[Matrices, dict[str, jax.Array]]]
    last: bool  # Whether it serves the last layer, too.


class State(NamedTuple):
    count: jax.Array
    each: tuple[dict[str, jax.Array], ...]


def transformation(layouts: Any, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The rule for the layers, and Adam for the rest."""
    kinds: list[hs.Layout] = jax.tree.leaves(layouts)

    def serves(layout: hs.Layout) -> bool:
        large = layout.factored and min(layout.counts[1:]) > 1
        return large and (rule.last or not layout.last)

    def init_fn(params: Any) -> State:
        each = [
            rule.init(*layout.counts)
            if serves(layout)
            else {"m": jnp.zeros_like(p), "v": jnp.zeros_like(p)}
            for layout, p in zip(kinds, jax.tree.leaves(params), strict=True)
        ]
        return State(jnp.zeros([], jnp.int32), tuple(each))

    def update_fn(
        updates: Any,
        state: State,
        params: Any = None,
        *,
        refreshed: bool = True,
        factors: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, State]:
        del params, extra_args
        leaves, tree = jax.tree.flatten(updates)
        given = (
            [None] * len(leaves)
            if factors is None
            else jax.tree.leaves(factors, is_leaf=lambda x: isinstance(x, hs.Factors))
        )
        t = (state.count + 1).astype(jnp.float32)
        results = []
        for layout, g, held, factor in zip(kinds, leaves, state.each, given, strict=True):
            if serves(layout):
                u, new = rule.update(held, layout.matrices(g), t, refreshed, factor)
                results.append((layout.leaf(u), new))
            else:
                results.append(adam(held, g, t))
        scaled, each = zip(*results, strict=True)
        return jax.tree.unflatten(tree, scaled), State(state.count + 1, each)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam(
    state: dict[str, jax.Array], g: jax.Array, t: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    b1, b2 = 0.9, 0.99
    m, v = b1 * state["m"] + (1 - b1) * g, b2 * state["v"] + (1 - b2) * g * g
    return m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + 1e-8), {"m": m, "v": v}


def scaled(x: Matrices) -> Matrices:
    square = jnp.mean(x * x, axis=(-2, -1), keepdims=True)
    return 0.2 * x / jnp.sqrt(jnp.maximum(square, 1e-30))


def with_chain(rule: Rule) -> Callable[[Any, Any], optax.GradientTransformation]:
    return lambda rate, layouts: optax.chain(
        transformation(layouts, rule), optax.scale_by_learning_rate(rate)
    )


# SOAP: Adam in the eigenbasis of the gradients' covariances (Vyas et al., arXiv 2409.11321), and
# its step orthogonalised.


def soap_rule(orthogonal: bool) -> Rule:
    b1, b2, shampoo = 0.95, 0.95, 0.95

    def init(count: int, n: int, m: int) -> dict[str, jax.Array]:
        def square(k: int) -> jax.Array:
            return jnp.zeros((count, k, k))

        bases = (jnp.broadcast_to(jnp.eye(k), (count, k, k)) for k in (n, m))
        zero = jnp.zeros((count, n, m))
        left, right = bases
        return {
            "m": zero,
            "v": zero,
            "of_inputs": square(n),
            "of_outputs": square(m),
            "left": left,
            "right": right,
        }

    def update(
        state: dict[str, jax.Array], g: Matrices, t: jax.Array, refreshed: bool, _: Any
    ) -> tuple[Matrices, dict[str, jax.Array]]:
        new = dict(state)
        new["of_inputs"] = shampoo * state["of_inputs"] + (1 - shampoo) * g @ transposed(g)
        new["of_outputs"] = shampoo * state["of_outputs"] + (1 - shampoo) * transposed(g) @ g
        if refreshed:
            new["left"] = orthonormal(new["of_inputs"] @ state["left"], state["left"])
            new["right"] = orthonormal(new["of_outputs"] @ state["right"], state["right"])
        left, right = new["left"], new["right"]
        new["m"] = b1 * state["m"] + (1 - b1) * g
        new["v"] = b2 * state["v"] + (1 - b2) * (transposed(left) @ g @ right) ** 2
        ahead = b1 * new["m"] + (1 - b1) * g if orthogonal else new["m"] / (1 - b1**t)
        inside = transposed(left) @ ahead @ right
        u = left @ (inside / (jnp.sqrt(new["v"] / (1 - b2**t)) + 1e-8)) @ transposed(right)
        return (scaled(orthogonalised(u)) if orthogonal else u), new

    return Rule(init, update, last=not orthogonal)


def transposed(x: Matrices) -> Matrices:
    return jnp.swapaxes(x, -1, -2)


def orthonormal(x: Matrices, before: Matrices) -> Matrices:
    """The Q of a QR decomposition, by Gram and Schmidt, twice for each column.

    LAPACK's may wait for ever within a compiled program on few cores.
    """
    size = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(size, 1e-30) + 1e-9 * before
    columns = jnp.arange(x.shape[-1])

    def step(i: Any, q: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_index_in_dim(q, i, axis=-1, keepdims=False)
        for _ in range(2):
            along = jnp.einsum("kab,ka->kb", q, column) * (columns < i)
            column = column - jnp.einsum("kab,kb->ka", q, along)
        column = column / jnp.maximum(jnp.linalg.norm(column, axis=-1, keepdims=True), 1e-30)
        return jax.lax.dynamic_update_index_in_dim(q, column[..., None], i, axis=-1)

    return jax.lax.fori_loop(0, x.shape[-1], step, x)


# Newton-Muon: the inverse of the inputs' second moment before the orthogonalisation, outputs taken
# as isotropic (Du and Su, 2026). The second moment is that of `hesscale_jax.value_and_factors`
# without weights.


def newton_muon_rule() -> Rule:
    b1, decay, damping = 0.95, 0.8, 0.2

    def init(count: int, n: int, m: int) -> dict[str, jax.Array]:
        eye = jnp.broadcast_to(jnp.eye(n), (count, n, n))
        return {"m": jnp.zeros((count, n, m)), "inputs": jnp.zeros_like(eye), "inverse": eye}

    def update(
        state: dict[str, jax.Array], g: Matrices, t: jax.Array, refreshed: bool, factors: Any
    ) -> tuple[Matrices, dict[str, jax.Array]]:
        new = dict(state)
        if refreshed:
            a = factors.inputs.reshape(state["inputs"].shape)
            new["inputs"] = decay * state["inputs"] + (1 - decay) * a
            new["inverse"] = damped_inverse(new["inputs"], damping)
        new["m"] = b1 * state["m"] + (1 - b1) * g
        ahead = b1 * new["m"] + (1 - b1) * g
        return scaled(orthogonalised(new["inverse"] @ ahead)), new

    return Rule(init, update, last=False)


soap = with_chain(soap_rule(orthogonal=False))
soap_muon = with_chain(soap_rule(orthogonal=True))
newton_muon = with_chain(newton_muon_rule())


def muon(rate: Any, layouts: Any) -> optax.GradientTransformation:
    """Optax's, for the same matrices, with the same Adam and the same scale."""

    def dimensions(layout: hs.Layout) -> Any:
        if not layout.factored or layout.last or min(layout.counts[1:]) == 1:
            return None
        return optax.contrib.MuonDimensionNumbers(layout.inputs, layout.outputs)

    return optax.contrib.muon(
        rate,
        adam_b2=0.99,
        adam_weight_decay=0.0,
        weight_decay=0.0,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.map(dimensions, layouts),
    )
