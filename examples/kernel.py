"""Curvature through a kernel that JAX cannot see into: a Pallas kernel with a gradient of its own.

    python examples/kernel.py

The layer's bias and GELU are one kernel, wrapped in `jax.custom_vjp` as kernels are. HesScale takes
the gradient from there, but the curvature from what the function computes, and a kernel does not
show that. The error says so; the same function written in JAX, passed in `rules=`, is the answer.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas

import hesscale_jax as hs


def reference(x: Array, bias: Array) -> Array:
    """What the kernel computes."""
    return jax.nn.gelu(x + bias)


@jax.custom_vjp
def bias_gelu(x: Array, bias: Array) -> Array:
    """`gelu(x + bias)` in one pass over memory, with `x` [batch, width] and `bias` [1, width]."""

    def kernel(x_ref, bias_ref, y_ref):
        y_ref[...] = jax.nn.gelu(x_ref[...] + bias_ref[...])

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    on_cpu = jax.default_backend() == "cpu"
    return pallas.pallas_call(kernel, shape, interpret=on_cpu)(x, bias)


def forward(x: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return bias_gelu(x, bias), (x, bias)


def backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(reference, *operands)[1](cotangent)


bias_gelu.defvjp(forward, backward)


def loss(params: dict[str, Array], x: Array, y: Array) -> Array:
    hidden = bias_gelu(x @ params["in"], params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"in": (8, 16), "bias": (1, 16), "out": (16, 3)}
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x, y = jnp.split(jax.random.normal(keys[3], (32, 11)), [8], axis=1)

    try:
        hs.hesscale(loss)(params, x, y)
    except hs.UnsupportedPrimitiveError as error:
        print(f"Without a rule:\n{error}\n")

    rules = hs.RULES | {"custom_vjp_call[bias_gelu]": hs.rules.defined_by(reference)}
    grad, hess_diag = jax.jit(hs.hesscale(loss, rules=rules))(params, x, y)
    print("With one: the mean absolute gradient and curvature of each parameter")
    for name in params:
        print(f"{name:>6} {jnp.abs(grad[name]).mean():.5f} {jnp.abs(hess_diag[name]).mean():.5f}")


if __name__ == "__main__":
    main()
