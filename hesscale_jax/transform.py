"""``hesscale`` and ``value_and_hesscale``: pytrees and argnums in, (gradient, diagonal) out.

HesScale is the transpose of forward moment propagation: the loss's shift is linear in the shifts
and spreads of the parameters, and its transpose, applied to 1, is

    d loss_shift / d shift  = gradient
    d loss_shift / d spread = HesScale's approximation of the Hessian's diagonal
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hesscale_jax import _jaxpr
from hesscale_jax.factored import Factored
from hesscale_jax.gauss_newton import gauss_newton
from hesscale_jax.moments import Moments, spread_dtype
from hesscale_jax.propagate import Kept, propagate
from hesscale_jax.rules import RULES
from hesscale_jax.rules.multilinear import products_in

__all__ = ["hesscale", "value_and_hesscale"]

CURVATURES = ("hessian", "gauss_newton")
EXACT = ("exact_gauss_newton", "refined")  # of a diagonal alone


def hesscale(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """The gradient of a loss and HesScale's approximation of its Hessian's diagonal.

    It stands to :func:`value_and_hesscale` as ``jax.grad`` to ``jax.value_and_grad``, and takes the
    same arguments.

    Returns:
      A function with the arguments of ``fun`` that returns ``(grad, hess_diag)``, or
      ``((grad, hess_diag), aux)`` if ``has_aux``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(w, x):
      ...     return jnp.sum((x @ w) ** 2)
      >>> grad, hess_diag = hs.hesscale(loss)(jnp.array([1.0, 2.0]), jnp.eye(2))
      >>> print(grad, hess_diag)
      [2. 4.] [2. 2.]
    """
    value_and = value_and_hesscale(
        fun, argnums, has_aux, curvature=curvature, product_dtype=product_dtype, rules=rules
    )
    return without_value(value_and, has_aux)


def value_and_hesscale(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """A loss's value, gradient and HesScale's approximation of its Hessian's diagonal.

    The loss is traced once; one forward and one backward pass give all three. The gradient is that
    of ``jax.grad``. The diagonal is exact inside a block (pointwise equations and the reductions
    between them, such as a softmax with its cross-entropy, or a normalisation) and drops
    off-diagonal terms only between blocks.

    Args:
      fun: The loss: returns a real scalar, or ``(scalar, aux)`` if ``has_aux``. It is traced with
        respect to the differentiated arguments, as under ``jax.jit``.
      argnums: Which positional arguments to differentiate: an int, or a sequence of ints. Each is a
        pytree of real floating-point arrays.
      has_aux: Whether ``fun`` returns auxiliary data besides the loss.
      curvature: ``"hessian"``, or ``"gauss_newton"`` to keep second derivatives only in the loss's
        head, after the last parameter: at least 0 where the head is convex. The head starts after
        ``jax.ad_checkpoint.checkpoint_name(y, "model_output")`` where there is one. Or for more
        passes, ``"exact_gauss_newton"``, the diagonal of the generalised Gauss-Newton matrix
        without approximation, or ``"refined"``, that and what HesScale has of the Hessian besides:
        exact for networks of up to two plain dense hidden layers, that use each weight once for an
        example and normalise nothing over units. For C outputs of the model they take about 1.2 C
        gradients more. With a batch, C is the number of one example's, if by the structure of the
        program the examples along the outputs' leading axis do not depend on one another, else that
        of all examples. What a loss has of parameters alone, a penalty, is HesScale's. In
        float32 on a CPU, jaxlib 0.10 may compute it wrongly, as other programs that take many
        gradients at once: see docs/reference/versions.md.
      product_dtype: What the diagonal's own matrix products and convolutions, of spreads and
        squares, are rounded to: ``jnp.bfloat16`` or ``jnp.float32``. None takes bfloat16 where both
        factors of the loss's product are in half precision and the platform is no CPU, else
        float32. bfloat16 changes the diagonal by about 1 %, the gradient not at all; on a GPU it
        pays in float32 models too. Products of float64 stay in float64.
      rules: The rule of each primitive; a table of your own is ``hesscale_jax.RULES | {...}``.

    Returns:
      A function with the arguments of ``fun`` that returns ``(value, (grad, hess_diag))``, or
      ``((value, aux), (grad, hess_diag))`` if ``has_aux``. ``grad`` and ``hess_diag`` have the
      structure, shapes and dtypes of the differentiated argument, and are tuples if ``argnums`` is
      a sequence.

    Raises:
      TypeError: An argument to differentiate is not floating point or the loss is not a real
        scalar. Raised while tracing, as are the others.
      ValueError: ``curvature`` or ``product_dtype`` is unknown, or ``argnums`` does not fit the
        arguments; an exact Gauss-Newton diagonal would take too many passes, or the loss has
        effects or ends its model within a loop.
      UnsupportedPrimitiveError: A primitive on the way from the arguments to the loss has no rule.

    References:
      Elsayed and Mahmood, `HesScale: Scalable Computation of Hessian Diagonals
      <https://arxiv.org/abs/2210.11639>`_, 2022

      Elsayed et al., `Revisiting Scalable Hessian Diagonal Approximations for Applications in
      Reinforcement Learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
    """

    def diagonals(program: _jaxpr.Program, inputs: Sequence[Any], tree: Any) -> _Structure:
        def finish(spreads: Sequence[Any]) -> list[Any]:
            return [h.astype(x.dtype) for h, x in zip(spreads, inputs, strict=True)]

        return [None] * len(inputs), finish

    check_curvature(curvature, (*CURVATURES, *EXACT))
    rules = products_in(rules, product_dtype)
    return differentiated(fun, argnums, has_aux, curvature, rules, diagonals)


# How each input's spread varies, and what is made of the cotangents of all.
_Structure = tuple[Sequence[Factored | None], Callable[[Sequence[Any]], list[Any]]]


def differentiated(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    curvature: str,
    rules: Mapping[Any, Any],
    structure: Callable[[_jaxpr.Program, Sequence[Any], Any], _Structure],
) -> Callable[..., Any]:
    """A loss's value, gradient and curvature, the latter by ``structure(program, inputs, tree)``.

    ``tree`` is the structure of the list of the arguments to differentiate.
    """
    check_loss_and_argnums(fun, argnums)

    @functools.wraps(fun)
    def differentiated_fun(*args: Any, **kwargs: Any) -> Any:
        program, loss, chosen = traced(fun, argnums, has_aux, args, kwargs, rules)
        leaves, tree = jax.tree.flatten(list(chosen.values()))
        inputs = list(map(jnp.asarray, leaves))  # Python's numbers have no dtype
        structures, finish = structure(program, inputs, tree)
        kept: str | Kept = curvature
        exact = None
        if curvature in EXACT:
            kept, exact = gauss_newton(program, rules, residual=curvature == "refined")

        def run(inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
            primals, transpose = transposed(program, inputs, rules, kept, structures=structures)
            value, *aux = map(jnp.asarray, primals)
            grads, spreads = transpose(lax.full_like(value, 1))
            if exact is not None:
                spreads = list(map(jnp.add, spreads, exact(inputs)))
            return [value, *aux], grads, finish(spreads)

        if _jaxpr.stops_at_nans():
            # Written out, the functions of jax.numpy show numbers that they then do not choose.
            run = jax.jit(run)
        (value, *aux), grads, curvatures = run(inputs)
        result = tuple(
            found[0] if isinstance(argnums, int) else tuple(found)
            for found in (jax.tree.unflatten(tree, grads), jax.tree.unflatten(tree, curvatures))
        )
        return ((value, loss.with_aux(aux)) if has_aux else value), result

    return differentiated_fun


def without_value(value_and_fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """What ``jax.grad`` is to ``jax.value_and_grad``."""

    @functools.wraps(value_and_fun)
    def fun(*args: Any, **kwargs: Any) -> Any:
        value, result = value_and_fun(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return fun


def traced(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rules: Mapping[Any, Any],
) -> tuple[_jaxpr.Program, "_Loss", dict[int, Any]]:
    """A loss as a program of the leaves of the arguments to differentiate.

    Returns:
      The program, the function that was traced, and the arguments to differentiate by position.
    """
    check_loss_and_argnums(fun, argnums)
    chosen = {i: args[i] for i in positions(argnums, len(args))}
    leaves, tree = jax.tree.flatten(list(chosen.values()))
    _check_differentiable(chosen, argnums)

    def flat_fun(*leaves: Any) -> Any:
        replaced = list(args)
        for i, arg in zip(chosen, jax.tree.unflatten(tree, leaves), strict=True):
            replaced[i] = arg
        return fun(*replaced, **kwargs)

    loss = _Loss(flat_fun, has_aux)
    return _jaxpr.flatten(_jaxpr.trace(loss, *leaves), ruled=rules), loss, chosen


def of_shapes(analysed: Callable[[Sequence[Any], Mapping[str, Any]], Any]) -> Callable[..., Any]:
    """A function of arguments, in which ``jax.ShapeDtypeStruct`` may stand for any array.

    ``analysed(args, kwargs)`` traces and computes nothing.
    """

    def of_shapes_fun(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        abstract = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
        if not abstract:
            return analysed(args, kwargs)
        results = []

        def with_arrays(*arrays: Any) -> None:
            for i, array in zip(abstract, arrays, strict=True):
                leaves[i] = array
            results.append(analysed(*jax.tree.unflatten(tree, leaves)))

        jax.eval_shape(with_arrays, *(leaves[i] for i in abstract))
        return results[0]

    return of_shapes_fun


def transposed(
    program: _jaxpr.Program,
    inputs: Sequence[Any],
    rules: Mapping[Any, Any],
    curvature: str | Kept,
    spreads: bool = False,
    structures: Sequence[Factored | None] | None = None,
) -> tuple[list[Any], Callable[..., tuple[list[Any], list[Any]]]]:
    """A program's outputs, and the transpose of its moment propagation.

    The transpose takes a cotangent of the first output's shift, and one of its spread if
    ``spreads``, and returns the cotangents of the inputs' shifts and spreads: entry by entry, or
    those of the arrays of a structure where there is one.
    """
    if structures is None:
        structures = [None] * len(inputs)
    # What does not depend on the moments is computed outside of the transposed program, so that it
    # may be handed out of it.
    primals: list[Any] = []

    def propagated(shifts: Sequence[Any], half_variances: Sequence[Any]) -> list[Any]:
        spread = [
            v if kind is None else dataclasses.replace(kind, **v)
            for v, kind in zip(half_variances, structures, strict=True)
        ]
        moments = list(map(Moments, inputs, shifts, spread))
        outputs = propagate(program, moments, rules, curvature, spreads)
        primals.extend(x.primal for x in outputs)
        y, shift, scatter = outputs[0]
        dtype = jnp.result_type(y)
        results = [(shift, dtype), (scatter, spread_dtype(dtype))][: 2 if spreads else 1]
        return [jnp.zeros(jnp.shape(y), d) if x is None else x for x, d in results]

    wide = [
        jnp.asarray(x, spread_dtype(jnp.result_type(x))) if kind is None else kind.varied
        for x, kind in zip(inputs, structures, strict=True)
    ]
    transpose = jax.linear_transpose(propagated, list(inputs), wide)
    return primals, lambda *cotangents: transpose(list(cotangents))


class _Loss:
    """The function to trace: its loss first, then the arrays of its auxiliary data."""

    def __init__(self, fun: Callable[..., Any], has_aux: bool) -> None:
        self._fun = fun
        self._has_aux = has_aux

    def __call__(self, *leaves: Any) -> list[Any]:
        result = self._fun(*leaves)
        aux: Any = ()
        if self._has_aux:
            result, aux = pair(result)
        _check_loss(result)
        found, self._tree = jax.tree.flatten(aux)
        self._traced = [isinstance(leaf, jax.core.Tracer) for leaf in found]
        self._known = [leaf for leaf, t in zip(found, self._traced, strict=True) if not t]
        return [result, *(leaf for leaf, t in zip(found, self._traced, strict=True) if t)]

    def with_aux(self, arrays: Sequence[Any]) -> Any:
        """The auxiliary data, with the computed arrays in place of the traced ones."""
        computed, known = iter(arrays), iter(self._known)
        leaves = [next(computed if t else known) for t in self._traced]
        return jax.tree.unflatten(self._tree, leaves)


# Input checks, in the user's terms


def check_curvature(curvature: str, among: Sequence[str] = CURVATURES) -> None:
    """Raise ``ValueError`` if there is no such curvature."""
    if curvature not in among:
        raise ValueError(f"curvature must be one of {among}, got {curvature!r}")


def check_loss_and_argnums(fun: Any, argnums: Any) -> None:
    """Raise ``TypeError`` for the loss's value in place of the loss, or parameters beside it."""
    if not callable(fun):
        raise TypeError(
            f"hesscale takes the loss itself, a function, got {type(fun).__name__}. Write "
            "hesscale(loss)(params, ...), not hesscale(loss(params, ...))."
        )
    each = argnums if isinstance(argnums, Sequence) else (argnums,)
    if not all(isinstance(argnum, int) for argnum in each):
        raise TypeError(
            f"argnums must be an int or a sequence of ints, got {type(argnums).__name__}. For the "
            "parameters themselves, write hesscale(loss)(params, ...), not "
            "hesscale(loss, params, ...)."
        )


def pair(result: Any) -> tuple[Any, Any]:
    """The result of a loss with auxiliary data; raises ``TypeError`` if it is no pair."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "with has_aux=True the loss must return a pair (scalar, aux), "
            f"got {type(result).__name__}"
        )
    return result


def positions(argnums: int | Sequence[int], count: int) -> list[int]:
    """The differentiated arguments among ``count`` positional ones."""
    found: list[int] = []
    for argnum in (argnums,) if isinstance(argnums, int) else tuple(argnums):
        if not -count <= argnum < count:
            raise ValueError(
                f"differentiating with respect to argnums={argnums} requires more positional "
                f"arguments than the {count} that were passed; arguments passed by keyword are "
                "not differentiated"
            )
        if argnum % count in found:
            raise ValueError(f"argnums={argnums} names an argument twice")
        found.append(argnum % count)
    return found


def _check_differentiable(chosen: Mapping[int, Any], argnums: int | Sequence[int]) -> None:
    if not jax.tree.leaves(list(chosen.values())):
        raise TypeError(
            f"the argument at argnums={argnums} has no floating-point array to differentiate"
        )
    for i, arg in chosen.items():
        for path, leaf in jax.tree.leaves_with_path(arg):
            dtype = _dtype(leaf)
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                described = type(leaf).__name__ if dtype is None else f"dtype {dtype.name}"
                raise TypeError(
                    "hesscale requires real floating-point inputs to differentiate, got "
                    f"{described} at args[{i}]{jax.tree_util.keystr(path)}. {_remedy(dtype)}"
                )


def _remedy(dtype: Any) -> str:
    """What to do with a leaf that is not to be differentiated."""
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return (
            "Of a module, pass its parameters alone: with hesscale_jax.nnx for one of nnx, or "
            "split by equinox.partition for one of Equinox. Pass other data in arguments that "
            "argnums leaves out."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (
            "Pass the real and the imaginary part as two real arrays, and join them in the loss "
            "with jax.lax.complex."
        )
    return (
        "If it is a parameter, make it floating point with .astype(float); if it is data, or a "
        "module's counter, pass it in an argument that argnums leaves out. hesscale_jax.nnx does "
        "that for modules of nnx."
    )


def _check_loss(loss: Any) -> None:
    dtype = _dtype(loss)
    if loss is None:
        raise TypeError(
            "hesscale requires a loss that returns a real scalar, got None. Does it lack a return?"
        )
    if dtype is None:
        raise TypeError(
            f"hesscale requires a loss that returns a real scalar, got {type(loss).__name__}. "
            "If it returns auxiliary data too, pass has_aux=True."
        )
    if jnp.shape(loss):
        raise TypeError(
            f"hesscale requires a loss that returns a scalar, got shape {jnp.shape(loss)}. If "
            "that is one loss per example, return their jnp.mean; for the diagonal of each, map "
            "the transformed function: jax.vmap(hesscale(loss), in_axes=(None, 0))."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        of_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        raise TypeError(
            f"hesscale requires a loss that returns a real scalar, got dtype {dtype.name}. "
            + ("Return its .real, or jnp.abs of it." if of_complex else "It has no derivative.")
        )


def _dtype(x: Any) -> Any:
    """The dtype of an array or number, ``None`` for anything else."""
    if isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        return jnp.result_type(x)
    return None
