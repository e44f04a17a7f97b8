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

from hesscale_jax import every, transform
from hesscale_jax.rules import RULES

__all__ = ["hesscale", "value_and_hesscale", "value_and_hesscale_every"]

CONTEXT = "hesscale"  # Names nnx's record of which object outside is which inside.

Argnum = int | nnx.DiffState


def hesscale(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    rules: Mapping[Any, Any] = RULES,
    graph: bool | None = None,
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
        fun, argnums, has_aux, curvature=curvature, rules=rules, graph=graph
    )

    @functools.wraps(fun)
    def hesscale_fun(*args: Any, **kwargs: Any) -> Any:
        value, result = value_and(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return hesscale_fun


def value_and_hesscale(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    curvature: str = "hessian",
    rules: Mapping[Any, Any] = RULES,
    graph: bool | None = None,
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
      curvature: As for :func:`hesscale_jax.value_and_hesscale`, and so ``rules``.
      rules: See there.
      graph: True for nnx's graph mode, False for its tree mode, in which modules are pytrees: all
        of an argument is differentiated, and no Variable may appear twice. None for the mode that
        is set.

    Returns:
      A function with the arguments of ``fun`` that returns ``(value, (grads, hess_diag))``, or
      ``((value, aux), (grads, hess_diag))`` if ``has_aux``. In graph mode ``grads`` and
      ``hess_diag`` are a State for each module, in tree mode a module; in either,
      ``nnx.Optimizer.update(model, grads, hess_diag=hess_diag)`` takes them as they are.

    Raises:
      TypeError: As :func:`hesscale_jax.value_and_hesscale`.
      ValueError: As there; or a Variable appears both in an argument to differentiate and in one
        that is not; or twice, in tree mode; or ``nnx.DiffState`` is passed in tree mode.
      UnsupportedPrimitiveError: As :func:`hesscale_jax.value_and_hesscale`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import hesscale_jax as hs
      >>> import hesscale_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, hs.adahesscale(0.5), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     def loss(model):
      ...         return jnp.mean((model(x) - y) ** 2)
      ...     value, (grads, hess_diag) = hesscale_jax.nnx.value_and_hesscale(loss)(model)
      ...     optimizer.update(model, grads, hess_diag=hess_diag)
      ...     return value
      >>> x, y = jnp.array([[1.0, 3.0], [2.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> first, *_, last = [train_step(model, optimizer, x, y) for _ in range(30)]
      >>> bool(last < 0.01 * first)
      True
    """
    core = functools.partial(transform.value_and_hesscale, curvature=curvature, rules=rules)

    @functools.wraps(fun)
    def value_and_hesscale_fun(*args: Any, **kwargs: Any) -> Any:
        return _call(core, fun, argnums, has_aux, graph, args, kwargs)

    return value_and_hesscale_fun


def value_and_hesscale_every(k: int) -> Callable[..., Callable[..., Any]]:
    """:func:`value_and_hesscale` with the diagonal refreshed at every ``k``-th step alone.

    See :func:`hesscale_jax.value_and_hesscale_every`: what it returns takes the arguments of
    :func:`value_and_hesscale`, and what that returns takes the number of the step before those of
    the loss, and returns ``(value, (grads, hess_diag), refreshed)``.

    Raises:
      ValueError: ``k`` is less than 1.
    """
    every_kth = every.value_and_hesscale_every(k)

    def transformed(
        fun: Callable[..., Any],
        argnums: Argnum | Sequence[Argnum] = 0,
        has_aux: bool = False,
        *,
        curvature: str = "hessian",
        rules: Mapping[Any, Any] = RULES,
        graph: bool | None = None,
    ) -> Callable[..., Any]:
        @functools.wraps(fun)
        def every_fun(step: Any, *args: Any, **kwargs: Any) -> Any:
            def core(*options: Any) -> Callable[..., Any]:
                stepping = every_kth(*options, curvature=curvature, rules=rules)
                return functools.partial(stepping, step)

            return _call(core, fun, argnums, has_aux, graph, args, kwargs)

        return every_fun

    return transformed


def _call(
    core: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum],
    has_aux: bool,
    graph: bool | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What ``core``'s transform of the loss as a pure function returns.

    ``core(fun, argnums, has_aux)`` is :func:`hesscale_jax.value_and_hesscale` or like it.
    """
    each = (argnums,) if isinstance(argnums, Argnum) else tuple(argnums)
    indices = [a.argnum if isinstance(a, nnx.DiffState) else a for a in each]
    filters = [a.filter if isinstance(a, nnx.DiffState) else nnx.Param for a in each]
    wanted = dict(zip(transform.positions(indices, len(args)), filters, strict=True))

    if nnx.set_graph_mode.current_value() if graph is None else graph:
        mode = _graph_mode
    elif any(isinstance(a, nnx.DiffState) for a in each):
        raise ValueError("nnx.DiffState needs graph=True: in tree mode all of an argument counts")
    else:
        mode = _tree_mode

    def with_aux(*args: Any, **kwargs: Any) -> Any:
        result = fun(*args, **kwargs)
        return transform.pair(result) if has_aux else (result, None)

    def transformed(pure: Callable[..., Any]) -> Callable[..., Any]:
        return core(pure, indices[0] if isinstance(argnums, Argnum) else indices, True)

    (value, aux), *results = mode(transformed, with_aux, wanted, args, kwargs)
    return ((value, aux) if has_aux else value), *results


# Graph mode


@nnx.update_context(CONTEXT)
def _graph_mode(
    transformed: Callable[..., Any],
    fun: Callable[..., Any],
    wanted: Mapping[int, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    # As a prefix, a DiffState lets nnx see whether a Variable is wanted at one place alone.
    prefix = [nnx.DiffState(i, wanted[i]) if i in wanted else None for i in range(len(args))]
    args, kwargs = nnx.to_tree(
        (list(args), dict(kwargs)), prefix=(prefix, None), split_fn=_split, ctxtag=CONTEXT
    )

    def pure(*inner: Any) -> Any:
        replaced = [
            _joined(*pair) if i in wanted else pair[0]
            for i, pair in enumerate(zip(args, inner, strict=True))
        ]
        call, options = nnx.from_tree((replaced, kwargs), is_inner=True, ctxtag=CONTEXT)
        loss, aux = fun(*call, **options)
        *call, aux = nnx.to_tree((call, options, aux), ctxtag=CONTEXT)
        changed = [x for x in jax.tree.leaves(call, is_leaf=_is_split) if _is_split(x)]
        return loss, (changed, aux)

    outer = [
        jax.tree.map(_wanted, x, is_leaf=_is_split) if i in wanted else x
        for i, x in enumerate(args)
    ]
    (value, after), *results = transformed(pure)(*outer)
    _, aux = nnx.from_tree(after, is_inner=False, ctxtag=CONTEXT)  # Writes back what has changed.
    return (value, aux), *results


def _split(ctx: nnx.SplitContext, path: Any, wanted: nnx.DiffState | None, node: Any) -> Any:
    """A module's definition and States, what is to be differentiated first."""
    if wanted is None or isinstance(node, nnx.Variable):
        return nnx.NodeStates.from_split(*ctx.split(node))
    return nnx.NodeStates.from_split(*ctx.split(node, wanted.filter, ...))


def _is_split(x: Any) -> bool:
    return isinstance(x, nnx.NodeStates)


def _wanted(x: Any) -> Any:
    """What is to be differentiated of a module; all of anything else."""
    return x.states[0] if _is_split(x) else x


def _joined(tree: Any, wanted: Any) -> Any:
    """The tree with other values of what is to be differentiated."""
    return jax.tree.map(
        lambda x, w: x.replace(states=(w, *x.states[1:])) if _is_split(x) else w,
        tree,
        wanted,
        is_leaf=_is_split,
    )


# Tree mode


def _tree_mode(
    transformed: Callable[..., Any],
    fun: Callable[..., Any],
    wanted: Mapping[int, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    outer = _variables((args, kwargs))
    if len({id(variable) for variable in outer}) < len(outer):
        raise ValueError("a Variable appears twice in the arguments, which needs graph=True")

    def pure(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(lambda x: x, (args, kwargs))  # New Variables, ours to change.
        variables = _variables((args, kwargs))
        before = list(map(jax.tree.leaves, variables))
        loss, aux = fun(*args, **kwargs)
        changed = {
            i: variable
            for i, variable in enumerate(variables)
            if any(
                new is not old
                for new, old in zip(jax.tree.leaves(variable), before[i], strict=True)
            )
        }
        return loss, (changed, aux)

    (value, (changed, aux)), *results = transformed(pure)(*args, **kwargs)
    for i, variable in changed.items():
        outer[i].update_from_state(variable)
    return (value, aux), *results


def _variables(tree: Any) -> list[Any]:
    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return [x for x in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(x)]
