"""Regions: functions that are one step of the propagation, however they are written inside.

``exact`` and ``sampled`` are used like ``jax.checkpoint``. For any other transformation, and where
nothing asks for a diagonal, a region is the function itself.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from hesscale_jax import _jaxpr

__all__ = ["MAX_ENTRIES", "REGION", "Exact", "Sampled", "exact", "sampled"]

# 8 MB in float64; each operand's entry takes one pass.
MAX_ENTRIES = 2**20

REGION = core.Primitive("region")
REGION.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Exact:
    """What is known of an exact region."""

    max_entries: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What is known of a sampled region; the key is its last operand, if there is one."""

    samples: int
    seed: int
    keyed: bool


def exact(
    fun: Callable[..., Any] | None = None, *, max_entries: int = MAX_ENTRIES
) -> Callable[..., Any]:
    r"""A function whose own curvature is exact: a decorator like ``jax.checkpoint``.

    What ``fun`` computes, matrix functions, attention or a whole loss, is one step of the
    propagation: no off-diagonal term is dropped inside of it. For a function :math:`y = f(x)` of
    all entries of its arguments,

    .. math::

        \delta y_j = \sum_i J_{ji} \, \delta x_i + \sum_i \partial_i^2 f_j \, v_i, \qquad
        v_{y_j} = \sum_i J_{ji}^2 \, v_i

    with the Jacobian and the second derivatives as they are. Between regions, and what is around
    them, terms are dropped as ever: the entries of its arguments count as independent, those of its
    results too. A whole loss as one region has the Hessian's diagonal.

    It costs one evaluation of ``fun`` with two derivatives for each entry of its arguments that
    depends on a parameter, 128 at a time, and memory for the Jacobian and as many second
    derivatives. In the model under ``curvature="gauss_newton"``, where second derivatives are not
    needed, it costs a backward pass for each entry of the results instead, if there are fewer.
    Under ``jax.vmap`` it has a Jacobian for each example, so that
    ``jax.vmap(exact(fun), (None, 0))(params, x)`` costs far less than a region of the batch.

    As in ``jax.checkpoint``, the state of an ``nnx`` module, of which ``fun`` is a method, does not
    advance: statistics of BatchNorm, counts of Dropout.

    Args:
      fun: A function of pytrees of arrays to a pytree of arrays, that ``jax.grad`` differentiates
        twice; three times if it holds a ``custom_vjp`` and returns more than one number. Parameters
        it closes over are arguments like the others. It has no effects and no collectives.
        Without it, the result is a decorator: ``@hs.exact(max_entries=2**22)``.
      max_entries: The largest Jacobian that is written out, in numbers; for each example.

    Returns:
      A function with the arguments and the results of ``fun``. Gauss-Newton takes it as belonging
      to the model or to the loss's head as a whole.

    Raises:
      TypeError: ``fun`` has an effect: a print, a mutable array, a collective; or ``max_entries``
        is no integer.
      ValueError: While :func:`hesscale` is traced: the Jacobian has more than ``max_entries``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> @hs.exact
      ... def determinant(x):
      ...     return jnp.linalg.det(jnp.outer(x, x) + jnp.diag(x))
      >>> grad, hess_diag = hs.hesscale(determinant)(jnp.array([1.0, 2.0, 3.0]))
      >>> print(grad, hess_diag)
      [48. 27. 20.] [12.  6.  4.]
    """
    _check_integer("max_entries", max_entries)
    if fun is None:
        return functools.partial(exact, max_entries=max_entries)
    return _region(fun, Exact(max_entries))


def sampled(
    fun: Callable[..., Any] | None = None, *, samples: int = 1, seed: int = 0, key: Any = None
) -> Callable[..., Any]:
    r"""A function whose own curvature is estimated without bias, at the cost of a few derivatives.

    It is to :func:`exact` what Hutchinson's estimate is to the diagonal. With one array of random
    signs :math:`z` for all entries of the arguments, in the mean over ``samples``,

    .. math::

        \delta y = J \, \delta x + f''[z, z \odot v], \qquad
        v_y = (J z) \odot (J (z \odot v))

    whose expectation is what :func:`exact` computes. A whole loss as one region has the estimate
    ``z * (H z)`` of Hutchinson. The gradient is not sampled. The estimate is noisy, and may be
    negative where the diagonal isn't.

    Args:
      fun: As for :func:`exact`.
      samples: How many arrays of signs are averaged over, each at one evaluation with two
        derivatives.
      seed: What the signs are drawn from where there is no ``key``: they are the same each time.
      key: A ``jax.random.key`` to draw the signs from, which may be traced: another at each step
        of training makes the average over the steps unbiased as well. In a loop, each step needs a
        key of its own.

    Returns:
      A function with the arguments and the results of ``fun``. Regions at different places of a
      loss have other signs, and so have the examples of a batch under ``jax.vmap``.

    Raises:
      TypeError: As for :func:`exact`; or ``samples`` or ``seed`` is no integer, or ``key`` no key.
      ValueError: ``samples`` is less than 1; or, while :func:`hesscale` is traced, the region is in
        a loop and has no ``key``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import hesscale_jax as hs
      >>> def loss(x, key):
      ...     inverse = hs.sampled(jnp.linalg.inv, samples=4, key=key)
      ...     return jnp.sum(inverse(jnp.outer(x, x) + jnp.eye(3)))
      >>> grad, hess_diag = jax.jit(hs.hesscale(loss))(jnp.ones(3), jax.random.key(0))
    """
    _check_integer("samples", samples)
    _check_integer("seed", seed)
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    if key is not None and not _is_key(key):
        raise TypeError(
            f"key must be one key, as jax.random.key(0) is, got {key!r}. For signs that are the "
            "same each time, pass seed=."
        )
    if fun is None:
        return functools.partial(sampled, samples=samples, seed=seed, key=key)
    return _region(fun, Sampled(samples, seed, key is not None), *(() if key is None else (key,)))


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _is_key(key: Any) -> bool:
    """Whether it is one key: of ``jax.random.key``, or the numbers of ``jax.random.PRNGKey``."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.dtype == np.uint32 and key.ndim == 1


def _region(fun: Callable[..., Any], how: Exact | Sampled, *more: Any) -> Callable[..., Any]:
    name = getattr(fun, "__name__", type(fun).__name__)

    @functools.wraps(fun)
    def region(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        leaves = list(map(jnp.asarray, leaves))
        results: list[Any] = []

        def of_leaves(*leaves: Any) -> list[Any]:
            args, kwargs = jax.tree.unflatten(tree, leaves)
            found, structure = jax.tree.flatten(fun(*args, **kwargs))
            results[:] = [structure]
            return found

        jaxpr, constants = _jaxpr.with_constants(_jaxpr.trace(of_leaves, *leaves))
        if jaxpr.effects:
            raise TypeError(
                f"{name} has effects, {', '.join(map(str, jaxpr.effects))}, which a region would "
                "repeat. Take prints, mutable arrays and collectives out of it."
            )
        params = {"jaxpr": jaxpr, "layers": (), "how": how, "name": name}
        found = REGION.bind(*constants, *leaves, *more, **params)
        return jax.tree.unflatten(results[0], found)

    return region


# The primitive. Each of its `layers` maps it over examples, the innermost first


def _run(*operands: Any, jaxpr: Any, layers: Sequence[Any], how: Any, name: str) -> list[Any]:
    count = len(jaxpr.in_avals)

    def fun(*operands: Any) -> list[Any]:
        return core.jaxpr_as_fun(jaxpr)(*operands[:count])  # without the key

    mapped = fun
    for axes in layers:
        mapped = jax.vmap(mapped, axes)
    return mapped(*operands)


def _batched(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
    results = REGION.bind(*operands, **params | {"layers": (*params["layers"], tuple(axes))})
    return results, [0] * len(results)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    """As of the function itself: what is differentiated is no longer a region."""
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def along(*xs: Any) -> list[Any]:
        operands = list(primals)
        for i, x in zip(moving, xs, strict=True):
            operands[i] = x
        return _run(*operands, **params)

    return jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])


REGION.def_impl(_run)
REGION.def_abstract_eval(
    lambda *avals, **params: _jaxpr.trace(functools.partial(_run, **params), *avals).out_avals
)
mlir.register_lowering(REGION, mlir.lower_fun(_run, multiple_results=True))
batching.primitive_batchers[REGION] = _batched
ad.primitive_jvps[REGION] = _differentiated
