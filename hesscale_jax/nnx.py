"""``hesscale`` for ``flax.nnx``: modules in, States of gradients and diagonals out.

It stands to :mod:`hesscale_jax` as ``nnx.grad`` to ``jax.grad``: a module is split into the
Variables to differentiate and the rest, the loss becomes a pure function of the former, and what it
changes in the modules (statistics, random counts, new Variables) is written back to them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from hesscale_jax import every, factors, transform
from hesscale_jax.rules import RULES

__all__ = [
    "hesscale",
    "layouts",
    "value_and_factors",
    "value_and_factors_every",
    "value_and_hesscale",
    "value_and_hesscale_every",
]

CONTEXT = "hesscale"  # Names nnx's record of which object outside is which inside.

Argnum = int | nnx.DiffState


def hesscale(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """``nnx.grad`` with HesScale's approximation of the Hessian's diagonal.

    It takes the same arguments as :func:`value_and_hesscale`.

    Returns:
      A function with the arguments of ``fun`` that returns ``(grads, hess_diag)``, or
      ``((grads, hess_diag), aux)`` if ``has_aux``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import hesscale_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> def loss(model, x):
      ...     return jnp.sum(model(x) ** 2)
      >>> grads, hess_diag = hesscale_jax.nnx.hesscale(loss)(model, jnp.array([[1.0, 3.0]]))
      >>> hess_diag["kernel"][...]
      Array([[ 2.],
             [18.]], dtype=float32)
    """
    value_and = value_and_hesscale(
        fun, argnums, has_aux, curvature=curvature, product_dtype=product_dtype, rules=rules
    )
    return transform.without_value(value_and, has_aux)


def value_and_hesscale(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """``nnx.value_and_grad`` with HesScale's approximation of the Hessian's diagonal.

    Args:
      fun: The loss, see :func:`hesscale_jax.value_and_hesscale`. Its arguments may be modules,
        Variables and pytrees of them, by position or by keyword. What it changes in them is
        changed after the call.
      argnums: Which positional arguments to differentiate: an int, or ``nnx.DiffState(int,
        filter)``, or a sequence of these. Of a module, the ``nnx.Param``s, or the Variables that
        pass the filter, are differentiated.
      has_aux: Whether ``fun`` returns auxiliary data besides the loss; it may hold modules.
      curvature: As for :func:`hesscale_jax.value_and_hesscale`, and so the others.
      product_dtype: See there.
      rules: See there.

    Returns:
      A function with the arguments of ``fun`` that returns ``(value, (grads, hess_diag))``, or
      ``((value, aux), (grads, hess_diag))`` if ``has_aux``. ``grads`` and ``hess_diag`` have a
      State in place of each module, in nnx's graph mode and in its tree mode alike;
      ``nnx.Optimizer.update(model, grads, hess_diag=hess_diag)`` takes them as they are.

    Raises:
      TypeError: As :func:`hesscale_jax.value_and_hesscale`.
      ValueError: As there; or a Variable appears both in an argument to differentiate and in one
        that is not.
      UnsupportedPrimitiveError: As :func:`hesscale_jax.value_and_hesscale`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import hesscale_jax as hs
      >>> import hesscale_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, hs.adahesscale(0.1), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     def loss(model):
      ...         return jnp.mean((model(x) - y) ** 2)
      ...     value, (grads, hess_diag) = hesscale_jax.nnx.value_and_hesscale(loss)(model)
      ...     optimizer.update(model, grads, hess_diag=hess_diag)
      ...     return value
      >>> x, y = jnp.array([[1.0, 3.0], [2.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> first, *_, last = [train_step(model, optimizer, x, y) for _ in range(50)]
      >>> bool(last < 0.1 * first)
      True
    """
    how = {"curvature": curvature, "product_dtype": product_dtype, "rules": rules}
    core = functools.partial(transform.value_and_hesscale, **how)

    @functools.wraps(fun)
    def value_and_hesscale_fun(*args: Any, **kwargs: Any) -> Any:
        return _call(core, fun, argnums, has_aux, args, kwargs)

    return value_and_hesscale_fun


def value_and_hesscale_every(k: int) -> Callable[..., Callable[..., Any]]:
    """:func:`value_and_hesscale` with the diagonal refreshed at every ``k``-th step alone.

    See :func:`hesscale_jax.value_and_hesscale_every`: what it returns takes the arguments of
    :func:`value_and_hesscale`, and what that returns takes the number of the step before those of
    the loss, and returns ``(value, (grads, hess_diag), refreshed)``.

    Raises:
      ValueError: ``k`` is less than 1.
    """
    return _stepping(every.value_and_hesscale_every(k))


def value_and_factors(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    **how: Any,
) -> Callable[..., Any]:
    """:func:`hesscale_jax.value_and_factors` for modules.

    Args:
      fun: The loss, as for :func:`value_and_hesscale`.
      argnums: As there.
      has_aux: As there.
      **how: The other arguments of :func:`hesscale_jax.value_and_factors`; ``bases`` has the
        structure of what is returned in place of the factors.

    Returns:
      A function with the arguments of ``fun`` that returns ``(value, (grads, factors))``, or
      ``((value, aux), (grads, factors))`` if ``has_aux``, with a State in place of each module.

    Raises:
      TypeError: As :func:`hesscale_jax.value_and_factors`, and so the others.
    """
    core = functools.partial(factors.value_and_factors, **how)

    @functools.wraps(fun)
    def value_and_factors_fun(*args: Any, **kwargs: Any) -> Any:
        return _call(core, fun, argnums, has_aux, args, kwargs)

    return value_and_factors_fun


def value_and_factors_every(k: int) -> Callable[..., Callable[..., Any]]:
    """:func:`value_and_factors` with the factors renewed at every ``k``-th step alone.

    See :func:`hesscale_jax.value_and_factors_every`, and :func:`value_and_hesscale_every`.

    Raises:
      ValueError: ``k`` is less than 1.
    """
    return _stepping(every.value_and_factors_every(k))


def _stepping(every_kth: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """A transformation of modules, whose result takes the number of the step first."""

    def transformed(
        fun: Callable[..., Any],
        argnums: Argnum | Sequence[Argnum] = 0,
        has_aux: bool = False,
        **how: Any,
    ) -> Callable[..., Any]:
        @functools.wraps(fun)
        def every_fun(step: Any, *args: Any, **kwargs: Any) -> Any:
            def core(*options: Any) -> Callable[..., Any]:
                return functools.partial(every_kth(*options, **how), step)

            return _call(core, fun, argnums, has_aux, args, kwargs)

        return every_fun

    return transformed


def layouts(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    rules: Mapping[Any, Any] = RULES,
) -> Callable[..., Any]:
    """:func:`hesscale_jax.layouts` for modules: a State of layouts in place of each.

    The modules are left as they are.

    Raises:
      TypeError: As :func:`value_and_hesscale`, and so ``ValueError``.
    """

    @functools.wraps(fun)
    @nnx.update_context(CONTEXT)
    def layouts_fun(*args: Any, **kwargs: Any) -> Any:
        pure, plain, differentiated = _pure(fun, argnums, has_aux, args, kwargs)
        return factors.layouts(pure, plain, True, rules=rules)(*differentiated)

    return layouts_fun


@nnx.update_context(CONTEXT)
def _call(
    core: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum],
    has_aux: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What ``core`` returns for the loss as a pure function of what is to be differentiated.

    ``core(fun, argnums, has_aux)`` is :func:`hesscale_jax.value_and_hesscale` or like it.
    """
    pure, plain, differentiated = _pure(fun, argnums, has_aux, args, kwargs)
    (value, after), *results = core(pure, plain, True)(*differentiated)
    _, aux = nnx.from_tree(after, is_inner=False, ctxtag=CONTEXT)  # Writes back what has changed.
    return ((value, aux) if has_aux else value), *results


def _pure(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum],
    has_aux: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Callable[..., Any], Any, list[Any]]:
    """The loss as a function of States, which of them to differentiate, and its arguments."""
    each = [argnums] if isinstance(argnums, Argnum) else list(argnums)
    indices = tuple(a.argnum if isinstance(a, nnx.DiffState) else a for a in each)
    plain = indices[0] if isinstance(argnums, Argnum) else indices
    chosen = dict(zip(transform.positions(plain, len(args)), each, strict=True))

    # As a prefix, a DiffState lets nnx see whether a Variable is differentiated at one place alone.
    prefix = [_as_prefix(chosen[i]) if i in chosen else None for i in range(len(args))]
    split_args, split_kwargs = nnx.to_tree(
        (list(args), dict(kwargs)), prefix=(prefix, None), split_fn=_split, ctxtag=CONTEXT
    )

    def pure(*args: Any) -> Any:
        joined = [
            _joined(split, x) if i in chosen else x
            for i, (split, x) in enumerate(zip(split_args, args, strict=True))
        ]
        inside = nnx.from_tree((joined, split_kwargs), is_inner=True, ctxtag=CONTEXT)
        result = fun(*inside[0], **inside[1])
        loss, aux = transform.pair(result) if has_aux else (result, None)
        after, aux = nnx.to_tree((inside, aux), ctxtag=CONTEXT)
        return loss, ([x for x in jax.tree.leaves(after, is_leaf=_is_split) if _is_split(x)], aux)

    differentiated = [
        jax.tree.map(_first_state, x, is_leaf=_is_split) if i in chosen else x
        for i, x in enumerate(split_args)
    ]
    return pure, plain, differentiated


def _as_prefix(argnum: Argnum) -> nnx.DiffState:
    return argnum if isinstance(argnum, nnx.DiffState) else nnx.DiffState(argnum, nnx.Param)


def _split(ctx: nnx.SplitContext, path: Any, prefix: nnx.DiffState | None, node: Any) -> Any:
    """A module's definition and States; what is to be differentiated of it is the first."""
    if prefix is None or isinstance(node, nnx.Variable):
        return nnx.NodeStates.from_split(*ctx.split(node))
    return nnx.NodeStates.from_split(*ctx.split(node, prefix.filter, ...))


def _is_split(x: Any) -> bool:
    return isinstance(x, nnx.NodeStates)


def _first_state(x: Any) -> Any:
    return x.states[0] if _is_split(x) else x


def _joined(split: Any, differentiated: Any) -> Any:
    """A tree with other first States."""
    return jax.tree.map(
        lambda x, first: x.replace(states=(first, *x.states[1:])) if _is_split(x) else first,
        split,
        differentiated,
        is_leaf=_is_split,
    )
