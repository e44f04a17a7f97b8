"""Oracles: exact derivatives next to what the library computes.

:func:`check_hesscale` is for whoever has a model: it compares the diagonal with exact entries of
the Hessian's. :func:`check_rule` is for whoever adds a rule: for a function ``y = f(x)`` that is
one rule, or one block, with dense Jacobian ``J`` and second derivatives ``H``, and random
cotangents ``g`` of the shift and ``h`` of the spread,

    grad = J^T g,   hess_diag = (J*J)^T h + sum_j g_j H_jii
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hesscale_jax import _jaxpr, transform
from hesscale_jax.moments import spread_dtype
from hesscale_jax.rules import RULES
from hesscale_jax.transform import hesscale, transposed

__all__ = ["Agreement", "Report", "check_hesscale", "check_rule", "compare"]

# How many Hessian-vector products are computed at a time.
BATCH = 8

# How many parameters a table shows.
SHOWN = 30


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well an estimate of the Hessian's diagonal agrees with exact entries.

    Attributes:
      path: Where the parameter stands in the differentiated argument, as in ``layers.0.kernel``.
      size: How many entries it has.
      compared: How many of them were compared.
      error: Relative L1 error, ``sum |estimate - exact| / sum |exact|``: 1 for an estimate of zero.
        It is 0 where there is no difference. Where the exact entries are 0 but for rounding, at
        most ``min(128 eps, 0.01)`` of the largest of all parameters, it is
        ``mean |estimate - exact|`` relative to ``mean |exact|`` over all parameters: infinite if
        those are all 0. It is NaN where the difference is.
      sign_agreement: The fraction of entries with the same sign; 0 agrees with 0 alone.
      rank_correlation: Spearman's: 1 if the estimate orders the entries as the exact ones are. NaN
        where there is no order: one entry, or all of the estimate or of the exact entries equal, or
        one that is not finite.
      note: That the exact entries are about 0, and how large the estimate is there; which of the
        gradient, the estimate and the exact entries has a NaN or an infinity. Else empty.
    """

    path: str
    size: int
    compared: int
    error: float
    sign_agreement: float
    rank_correlation: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`check_hesscale` finds. It prints as a table.

    Attributes:
      leaves: The agreement of each parameter, in the order of the tree.
      total: The agreement of the whole. Its error and sign agreement estimate those of the whole
        diagonal: a parameter counts by its size, however many of its entries were compared. Its
        rank correlation is that of all compared entries together.
    """

    leaves: tuple[Agreement, ...]
    total: Agreement

    @property
    def worst_first(self) -> tuple[Agreement, ...]:
        """The leaves, those without a finite error first, then by their error."""
        return tuple(sorted(self.leaves, key=lambda row: _worst(row.error), reverse=True))

    def __str__(self) -> str:
        """A table: a line for each parameter, the worst first, then their median and the total."""
        rows = [_cells(row) for row in self.worst_first[:SHOWN]]
        more = [f"... {len(self.leaves) - SHOWN} more"] * (len(self.leaves) > SHOWN)
        header = ["", "size", "compared", "error", "sign", "rank", ""]
        last = [self._median(), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(header, *rows, *last, strict=True)]
        table = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), note]).rstrip()
            for name, *cells, note in (header, *rows, *last)
        ]
        return "\n".join([*table[:-2], *more, *table[-2:]])

    def _median(self) -> list[str]:
        """The median of each figure, without those that are NaN; such an error counts as inf."""
        figures = [
            [_worst(row.error) for row in self.leaves],
            [row.sign_agreement for row in self.leaves],
            [row.rank_correlation for row in self.leaves],
        ]
        known = [[x for x in column if not np.isnan(x)] or [np.nan] for column in figures]
        error, sign, rank = map(np.median, known)
        return ["median", "", "", f"{error:.3f}", f"{sign:.2f}", f"{rank:.2f}", ""]


def _worst(error: float) -> float:
    return np.inf if np.isnan(error) else error


def _cells(row: Agreement) -> list[str]:
    figures = f"{row.error:.3f}", f"{row.sign_agreement:.2f}", f"{row.rank_correlation:.2f}"
    return [row.path, f"{row.size}", f"{row.compared}", *figures, row.note]


def check_hesscale(
    fun: Callable[..., Any],
    *args: Any,
    key: Any,
    num_coordinates: int = 256,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    curvature: str = "hessian",
    product_dtype: Any = None,
    rules: Mapping[Any, Any] = RULES,
) -> Report:
    """How good the diagonal is on a model of yours, by exact entries of the Hessian.

    Entry ``i`` of the Hessian's diagonal is ``e_i^T H e_i``, a Hessian-vector product that costs a
    few gradients: a derivative of what ``jax.grad`` returns, so that of a function with a rule of
    its own it is that rule's. At most ``num_coordinates`` are computed for every array of
    parameters, a few at a time, so a small batch is advisable. The gradient is compared with that
    of ``jax.grad``, too. Everything is compiled, with matrix products in the highest precision.

    Args:
      fun: The loss, as for :func:`hesscale_jax.hesscale`.
      *args: Its arguments; in float64, rounding plays no part.
      key: A ``jax.random.key``, to choose the entries by.
      num_coordinates: How many entries to compare of each array of parameters, chosen at random; of
        an array that has no more, all. It is a number for each, so that small arrays are known as
        well as large ones.
      argnums: As for :func:`hesscale_jax.hesscale`.
      has_aux: As for :func:`hesscale_jax.hesscale`.
      curvature: The estimate to compare: ``"gauss_newton"`` is compared with the Hessian as well.
      product_dtype: As for :func:`hesscale_jax.value_and_hesscale`.
      rules: The rule of each primitive.

    Returns:
      A :class:`Report`: the :class:`Agreement` of each array of parameters, and of all together.

    Raises:
      AssertionError: The gradient is not that of ``jax.grad``: an entry is off by more than
        ``sqrt(eps)`` of the largest entry of its array, or of 0.01 of the largest of all, or is
        NaN or infinite where that of ``jax.grad`` is not.
      TypeError: ``jax.grad`` of the loss has itself no derivative in JAX: the rule of a
        ``jax.custom_vjp`` is a kernel or a callback, say.
      UnsupportedPrimitiveError: As from :func:`hesscale_jax.hesscale`.
      ValueError: ``num_coordinates`` is less than 1.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from hesscale_jax.testing import check_hesscale
      >>> def loss(params, x):
      ...     hidden = jax.nn.gelu(jax.nn.gelu(x @ params["first"]) @ params["second"])
      ...     return jnp.mean(jnp.square(hidden @ params["out"]))
      >>> keys = jax.random.split(jax.random.key(1), 4)
      >>> draw = jax.nn.initializers.lecun_normal(dtype=jnp.float32)
      >>> params = {
      ...     "first": draw(keys[0], (8, 10)),
      ...     "second": draw(keys[1], (10, 6)),
      ...     "out": draw(keys[2], (6, 3)),
      ... }
      >>> x = jax.random.normal(keys[3], (20, 8), jnp.float32)
      >>> print(check_hesscale(loss, params, x, key=jax.random.key(0), num_coordinates=50))
              size  compared  error  sign  rank
      first     80        50  0.220  0.96  0.98
      second    60        50  0.000  1.00  1.00
      out       18        18  0.000  1.00  1.00
      median                  0.000  1.00  1.00
      total    158       118  0.104  0.98  0.99
    """
    if num_coordinates < 1:
        raise ValueError(f"num_coordinates must be at least 1, got {num_coordinates}")
    positions = transform.positions(argnums, len(args))
    differentiated = [args[i] for i in positions]
    leaves, tree = jax.tree.flatten(differentiated)
    paths = _paths(differentiated[0] if isinstance(argnums, int) else differentiated)

    def loss(leaves: Any) -> Any:
        replaced = list(args)
        for i, arg in zip(positions, jax.tree.unflatten(tree, leaves), strict=True):
            replaced[i] = arg
        result = fun(*replaced)
        return result[0] if has_aux else result

    with jax.default_matmul_precision("highest"):
        how = {"curvature": curvature, "product_dtype": product_dtype, "rules": rules}
        grads, diagonal = jax.jit(hesscale(loss, **how))(leaves)
        expected = jax.jit(jax.grad(loss))(leaves)
        _assert_gradients_close(paths, grads, expected)
        chosen = _choose(key, [h.size for h in diagonal], num_coordinates)
        exact = _exact_entries(loss, leaves, chosen)

    return _report(paths, diagonal, chosen, exact, expected)


def compare(estimate: Any, exact: Any) -> Report:
    """How well an estimate of the Hessian's diagonal agrees with the exact one.

    Args:
      estimate: A pytree of arrays, from whatever method.
      exact: The same of the exact diagonal.

    Returns:
      A :class:`Report`, as :func:`check_hesscale` has it, with every entry compared.

    Raises:
      ValueError: The trees, or the shapes of their arrays, differ.

    Examples:
      >>> import numpy as np
      >>> from hesscale_jax.testing import compare
      >>> exact = {"b": np.array([1.0, -2.0]), "w": np.array([3.0, 4.0, 5.0])}
      >>> print(compare({"b": np.array([1.0, 2.0]), "w": exact["w"]}, exact))
              size  compared  error  sign   rank
      b          2         2  1.333  0.50  -1.00
      w          3         3  0.000  1.00   1.00
      median                  0.667  0.75   0.00
      total      5         5  0.267  0.80   0.90
    """
    leaves, others = jax.tree.leaves(estimate), jax.tree.leaves(exact)
    trees: list[Any] = [jax.tree.structure(tree) for tree in (estimate, exact)]
    shapes = [list(map(np.shape, arrays)) for arrays in (leaves, others)]
    if trees[0] != trees[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"the estimate is not like the exact diagonal: {trees[0]} of shapes {shapes[0]}, and "
            f"{trees[1]} of shapes {shapes[1]}"
        )
    every = [np.arange(np.size(x)) for x in leaves]
    of_leaves = [np.asarray(x, np.float64).ravel() for x in others]
    return _report(_paths(estimate), leaves, every, of_leaves, list(map(np.zeros_like, leaves)))


def _report(
    paths: Sequence[str],
    diagonal: Sequence[Any],
    chosen: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    grads: Sequence[Any],
) -> Report:
    """Of the entries at the ``chosen`` positions of each array; ``exact`` has only these."""
    sizes = [h.size for h in diagonal]
    of_leaves = [np.asarray(h, np.float64).ravel() for h in diagonal]
    estimates = [h[at] for h, at in zip(of_leaves, chosen, strict=True)]
    # How many entries of its array each of the compared ones stands for.
    weights = [np.full(len(at), n / max(len(at), 1)) for n, at in zip(sizes, chosen, strict=True)]
    estimate, every, weight = map(np.concatenate, (estimates, exact, weights))
    magnitude = np.where(np.isfinite(every), np.abs(every), 0)
    mean, largest = weight @ magnitude / max(weight.sum(), 1), np.max(magnitude, initial=0)
    return Report(
        tuple(
            _agreement(
                path,
                *(h, e, x, w),
                # What sums of many terms that cancel leave; in bfloat16, entries of use come near.
                zero=min(128 * float(jnp.finfo(grad.dtype).eps), 0.01) * largest,
                mean=mean,
                grad=np.asarray(grad, np.float64),
            )
            for path, h, e, x, w, grad in zip(
                paths, of_leaves, estimates, exact, weights, grads, strict=True
            )
        ),
        _agreement(
            "total",
            *(np.concatenate(of_leaves), estimate, every, weight),
            zero=0.0,
            mean=mean,
            grad=np.concatenate([np.asarray(grad, np.float64).ravel() for grad in grads]),
        ),
    )


def _paths(tree: Any) -> list[str]:
    """Where each leaf stands, without the ``value`` in which a variable of Flax NNX holds it."""
    value = (jax.tree_util.GetAttrKey("value"),)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    stripped = [path[:-1] if path[-1:] == value else path for path in paths]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in stripped]


def _assert_gradients_close(
    paths: Sequence[str], received: Sequence[Any], expected: Sequence[Any]
) -> None:
    wide = [np.asarray(grad, np.float64) for grad in expected]
    largest = [np.max(np.abs(e), where=np.isfinite(e), initial=0) for e in wide]
    for path, r, e, known, scale in zip(paths, received, wide, expected, largest, strict=True):
        # Where a gradient is zero but for rounding, only the others tell how much that is.
        atol = float(jnp.finfo(known.dtype).eps) ** 0.5 * max(scale, 0.01 * max(largest))
        r = np.asarray(r, np.float64)
        np.testing.assert_allclose(r, e, rtol=0, atol=atol, err_msg=f"gradient in {path}")


def _choose(key: Any, sizes: Sequence[int], count: int) -> list[np.ndarray]:
    """Positions in each flattened array: ``count`` of them, or all where there are no more."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    return [
        np.arange(n) if n <= count else generator.choice(n, count, replace=False) for n in sizes
    ]


def _exact_entries(
    loss: Callable[..., Any], leaves: Sequence[Any], chosen: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """``e_i^T H e_i`` at the chosen positions ``i`` of each array."""

    def forward(leaves: Sequence[Any], along: Sequence[Any]) -> Any:
        return jax.jvp(jax.grad(loss), (leaves,), (along,))[1]

    def reverse(leaves: Sequence[Any], along: Sequence[Any]) -> Any:
        """As precise: no function has to have a forward derivative."""
        return jax.vjp(jax.grad(loss), leaves)[1](along)[0]

    def entry(column: Any, leaves: Sequence[Any], number: Any, position: Any) -> Any:
        units = [
            ((jnp.arange(leaf.size) == position) & (number == n)).reshape(leaf.shape)
            for n, leaf in enumerate(leaves)
        ]
        along = [unit.astype(leaf.dtype) for unit, leaf in zip(units, leaves, strict=True)]
        return sum(
            jnp.sum(part, where=unit, dtype=float)
            for part, unit in zip(column(leaves, along), units, strict=True)
        )

    counts = [len(at) for at in chosen]
    numbers, positions = np.repeat(np.arange(len(counts)), counts), np.concatenate(chosen)
    # Whole batches: a smaller one at the end would be compiled as another program.
    coordinates = tuple(np.pad(x, (0, -len(x) % BATCH)) for x in (numbers, positions))
    args = list(map(jnp.asarray, leaves)), coordinates
    failures: list[Exception] = []
    for column, batch in itertools.product((forward, reverse), (BATCH, None)):

        def entries(leaves: Any, coordinates: Any, column: Any = column, batch: Any = batch) -> Any:
            of = functools.partial(entry, column, leaves)
            return jax.lax.map(lambda at: of(*at), coordinates, batch_size=batch)

        compiled = jax.jit(entries)
        try:
            compiled.lower(*args)
        except Exception as error:  # whatever a derivative or a batching rule raises.
            failures.append(error)
            continue
        exact = np.asarray(compiled(*args)[: len(numbers)], np.float64)
        return np.split(exact, np.cumsum(counts)[:-1])
    raise TypeError(
        "give the functions with a rule of their own a derivative of that rule, in tests by the "
        "same written in JAX: exact entries of the Hessian are derivatives of jax.grad(loss), "
        "and it has none in JAX, neither forward nor reverse"
    ) from ExceptionGroup("forward and reverse, in batches and one by one", failures)


def _agreement(
    path: str,
    diagonal: np.ndarray,
    estimate: np.ndarray,
    exact: np.ndarray,
    weights: np.ndarray,
    *,
    zero: float,
    mean: float,
    grad: np.ndarray,
) -> Agreement:
    """Entries up to ``zero`` are rounding; ``mean`` is that of the exact entries of all arrays."""
    notes = [
        f"{kind} in the {what}"
        for what, x in (("gradient", grad), ("estimate", diagonal), ("exact entries", exact))
        for kind, found in (("NaN", np.isnan), ("inf", np.isinf))
        if found(x).any()
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, magnitude = weights @ np.abs(estimate - exact), weights @ np.abs(exact)
        if len(exact) and np.max(np.abs(exact)) <= zero:
            magnitude = weights.sum() * mean
            notes.insert(0, f"exact ~ 0, estimate {np.max(np.abs(estimate)):.1g}")
        same_sign = weights @ (np.sign(estimate) == np.sign(exact))
        ordered = np.isfinite(estimate).all() and np.isfinite(exact).all()
        return Agreement(
            path=path,
            size=len(diagonal),
            compared=len(exact),
            error=float(difference / magnitude) if difference else 0.0,
            sign_agreement=float(same_sign / weights.sum()),
            rank_correlation=_correlation(_ranks(estimate), _ranks(exact)) if ordered else np.nan,
            note=", ".join(notes),
        )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.sum() / x.size, y - y.sum() / y.size
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Where each entry stands in sorted order; equal entries share the mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def check_rule(
    fun: Callable[..., Any],
    *args: Any,
    key: Any,
    rules: Mapping[Any, Any] = RULES,
    rtol: float = 1e-9,
) -> None:
    """Compare a rule, or a block as a whole, with dense algebra at random cotangents.

    Args:
      fun: A function of floating-point arrays that returns one array, small enough for its dense
        Hessian. It is exact if it is one rule or one block.
      *args: The arrays to evaluate it at, better in float64 and away from kinks.
      key: A ``jax.random.key`` for the cotangents.
      rules: The table under test.
      rtol: How far an entry may be off, relative to the largest entry of the same array.

    Raises:
      AssertionError: The gradient or the diagonal differs.
    """
    out = jax.eval_shape(fun, *args)
    of_shift, of_spread = jax.random.split(key)
    g = jax.random.normal(of_shift, out.shape, out.dtype)
    h = jax.random.normal(of_spread, out.shape, spread_dtype(out.dtype))

    @jax.jit
    def received(args: Any) -> Any:
        program = _jaxpr.flatten(_jaxpr.trace(fun, *args), ruled=rules)
        (value,), transpose = transposed(program, args, rules, "hessian", spreads=True)
        return value, *transpose(g, h)

    @jax.jit
    def expected(args: Any) -> Any:
        """The gradient and the diagonal in each argument, and the size of the terms in each."""
        results = []
        for i, x in enumerate(args):
            jacobian = jax.jacobian(fun, i)(*args).reshape(out.size, *x.shape)
            hessian = jax.hessian(fun, i)(*args).reshape(out.size, x.size, x.size)
            bends = jnp.einsum("jii->ji", hessian).reshape(jacobian.shape)
            per_output = (out.size, *(1,) * x.ndim)
            g_j, h_j = (c.reshape(per_output).astype(x.dtype) for c in (g, h))
            results.append((g_j * jacobian, jnp.concatenate([h_j * jacobian**2, g_j * bends])))
        return results

    value, grads, diagonals = received(args)
    assert_close(value, fun(*args)[None], rtol, "value")
    for i, (grad, diagonal) in enumerate(expected(args)):
        assert_close(grads[i], grad, rtol, f"gradient in argument {i}")
        assert_close(diagonals[i], diagonal, rtol, f"hess_diag in argument {i}")


def assert_close(received: Any, terms: Any, rtol: float, what: str) -> None:
    """Compare with the sum of the terms along axis 0.

    An entry may be off by ``rtol`` times the largest sum of the terms' absolute values: where the
    terms cancel, rounding is measured against them and not against what is left.
    """
    scale = np.max(np.abs(terms).sum(0), initial=1e-3)
    np.testing.assert_allclose(received, np.sum(terms, 0), rtol=0, atol=rtol * scale, err_msg=what)
