"""``value_and_factors``: the curvature of each layer by its inputs and outputs, in a basis."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hesscale_jax import _jaxpr
from hesscale_jax.factored import MAX_INPUTS, Bases, Factored, Factors, Layout, row_major
from hesscale_jax.layout import layouts as find_layouts
from hesscale_jax.moments import spread_dtype
from hesscale_jax.rules import RULES
from hesscale_jax.rules.multilinear import products_in
from hesscale_jax.rules.table import find
from hesscale_jax.transform import check_curvature, differentiated, of_shapes, traced

__all__ = ["layouts", "value_and_factors"]


def layouts(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """Which axes of each parameter are a layer's inputs, and which its outputs.

    A parameter is a layer's weights if all that reads it are products that sum over the same axes
    of it: ``dot_general``, which ``@`` and ``einsum`` become, or ``conv_general_dilated``; through
    casts, transposes and reshapes, in loops, branches, ``checkpoint`` and ``shard_map``. Nothing is
    computed, only traced, so that ``jax.ShapeDtypeStruct`` may stand for any array.

    Args:
      fun: The loss, as for :func:`value_and_hesscale`, and so ``argnums`` and ``has_aux``.
      argnums: See there.
      has_aux: See there.
      rules: See there.

    Returns:
      A function with the arguments of ``fun`` that returns a :class:`Layout` for each array of the
      argument to differentiate, in its structure.

    Raises:
      TypeError: As :func:`value_and_hesscale`, and so ``ValueError``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(params, x):
      ...     return jnp.sum(jnp.tanh(jnp.einsum("nd,dhk->nhk", x, params["w"]) + params["b"]) ** 2)
      >>> params = {"w": jnp.ones((3, 2, 4)), "b": jnp.zeros((1, 2, 4))}
      >>> found = hs.layouts(loss)(params, jnp.ones((5, 3)))
      >>> found["w"].inputs, found["w"].outputs
      ((0,), (1, 2))
      >>> found["b"].factored, found["b"].reason
      (False, "'add' reads it")
    """

    def found(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        program, _, chosen = traced(fun, argnums, has_aux, args, kwargs, rules)
        structure = jax.tree.structure(list(chosen.values()))
        trees = jax.tree.unflatten(structure, _of_program(program, rules))
        return trees[0] if isinstance(argnums, int) else tuple(trees)

    return of_shapes(found)


def _of_program(program: _jaxpr.Program, rules: Mapping[Any, Any]) -> list[Layout]:
    return find_layouts(program, program.outputs[:1], lambda eqn: find(rules, eqn), program.inputs)


def value_and_factors(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "gauss_newton",
    bases: Any = None,
    weighted: bool = True,
    max_inputs: int = MAX_INPUTS,
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    r"""A loss's value, gradient and curvature: the diagonal in a basis, and each layer's factors.

    A layer :math:`z_n = x_n W` has, by HesScale, the curvature :math:`h_{nj}` in its outputs. One
    pass gives, at about the cost of :func:`value_and_hesscale` and a product a layer,

    .. math::

        D_{aj} = \sum_n (x_n V)_a^2 \, h_{nj}, \qquad
        A = \sum_n \Big(\sum_j h_{nj}\Big) x_n^T x_n, \qquad
        h_j = \sum_n h_{nj}

    the diagonal in an orthonormal basis :math:`V` of the layer's inputs (in the coordinates, it is
    HesScale's; in a basis :math:`W` of the outputs too, it is :math:`\sum_j D_{aj} W_{jb}^2`), the
    second moment of the inputs, weighted by curvature, and the curvature of the outputs. They are
    the factors of K-FAC, with the outputs' curvature deterministic and diagonal. A convolution's
    inputs are its patches; where several products share the weights, sums run over all.

    Args:
      fun: The loss, as for :func:`value_and_hesscale`.
      argnums: As there.
      has_aux: As there.
      curvature: As there, but by default ``"gauss_newton"``: weights that are negative make no
        second moment.
      bases: A tree like the argument to differentiate (a tuple of them if ``argnums`` is a
        sequence), with the basis of each layer's inputs as columns, of shape ``(*stack, n, n)``;
        or :class:`Bases` of its inputs and outputs; or None for the coordinates.
      weighted: Whether to weight the second moment by curvature, or each input by 1.
      max_inputs: Of a layer with more inputs, the second moment is left out: it would be too large.
      product_dtype: As there, of the products between layers; the factors are computed in float32.
      rules: As there.

    Returns:
      A function with the arguments of ``fun`` that returns ``(value, (grad, factors))``, or
      ``((value, aux), (grad, factors))`` if ``has_aux``. ``factors`` has a :class:`Factors` in
      place of each array of the argument to differentiate, in float32 at least.

    Raises:
      TypeError: As :func:`value_and_hesscale`.
      ValueError: As there; or a basis is of the wrong shape, or of what is no layer's weights.
      UnsupportedPrimitiveError: As there.

    Examples:
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(w, x):
      ...     return jnp.sum((x @ w) ** 2) / 2
      >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> value, (grad, factors) = hs.value_and_factors(loss)(jnp.ones((2, 3)), x)
      >>> print(factors.inputs)  # 3 x^T x: each output has a curvature of 1
      [[ 3.  6.]
       [ 6. 15.]]
      >>> print(factors.outputs)
      [2. 2. 2.]

    References:
      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015

      George et al., `Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis
      <https://arxiv.org/abs/1806.03884>`_, 2018
    """

    def factors(program: _jaxpr.Program, inputs: Sequence[Any], tree: Any) -> Any:
        found = _of_program(program, rules)
        given = _bases(bases, argnums, tree, found)
        structures = [
            _structure(x, layout, basis.inputs, weighted, max_inputs)
            for x, layout, basis in zip(inputs, found, given, strict=True)
        ]
        outputs = [basis.outputs for basis in given]
        return structures, lambda spreads: list(map(_factors, found, spreads, outputs))

    check_curvature(curvature)
    rules = products_in(rules, product_dtype)
    return differentiated(fun, argnums, has_aux, curvature, rules, factors)


def _bases(
    bases: Any, argnums: int | Sequence[int], tree: Any, layouts: Sequence[Layout]
) -> list[Bases]:
    """One for each leaf, as ``(count, n, n)`` and ``(count, m, m)``."""
    if bases is None:
        return [Bases()] * len(layouts)
    chosen = [bases] if isinstance(argnums, int) else list(bases)
    try:
        leaves = tree.flatten_up_to(chosen)
    except ValueError as error:
        raise ValueError(
            "'bases' has a different structure from the argument to differentiate: "
            f"{jax.tree.structure(chosen)} against {tree}"
        ) from error
    each = [x if isinstance(x, Bases) else Bases(x) for x in leaves]
    return [_checked(basis, layout) for basis, layout in zip(each, layouts, strict=True)]


def _checked(bases: Bases, layout: Layout) -> Bases:
    if bases.inputs is None and bases.outputs is None:
        return bases
    if not layout.factored:
        raise ValueError(f"a leaf of shape {layout.shape} has no basis: {layout.reason}")
    count, *sizes = layout.counts
    found = []
    for kind, basis, size in zip(Bases._fields, bases, sizes, strict=True):
        wanted = (*layout.sizes(layout.stack), size, size)
        if basis is not None and jnp.shape(basis) != wanted:
            raise ValueError(
                f"the basis of the {kind} of a leaf of shape {layout.shape} must be of shape "
                f"{wanted}, got {jnp.shape(basis)}"
            )
        found.append(None if basis is None else jnp.reshape(basis, (count, size, size)))
    return Bases(*found)


def _structure(
    x: Any, layout: Layout, basis: Any, weighted: bool, max_inputs: int
) -> Factored | None:
    if not layout.factored:
        return None
    dtype = spread_dtype(x.dtype)
    count, n, m = layout.counts
    basis = None if basis is None else jnp.asarray(basis, dtype)
    axes = row_major(layout.shape)
    return Factored(
        diagonal=jnp.zeros((count, n, m), dtype),
        inputs=jnp.zeros((count, n, n), dtype) if n <= max_inputs else None,
        outputs=jnp.zeros((count, m), dtype),
        basis=basis,
        axes=axes,
        stack=tuple(span for i in layout.stack for span in axes[i]),
        weight=None if weighted else 1.0,
    )


def _factors(layout: Layout, spreads: Any, of_outputs: Any) -> Factors:
    if not layout.factored:
        return Factors(spreads)
    diagonal = spreads["diagonal"]
    if of_outputs is not None:  # No entries of the curvature couple two outputs.
        diagonal = diagonal @ jnp.square(jnp.asarray(of_outputs, diagonal.dtype))
    stack, n = layout.sizes(layout.stack), layout.counts[1]
    inputs = spreads.get("inputs")
    return Factors(
        layout.leaf(diagonal),
        None if inputs is None else inputs.reshape(*stack, n, n),
        spreads["outputs"].reshape(*stack, *layout.sizes(layout.outputs)),
    )
