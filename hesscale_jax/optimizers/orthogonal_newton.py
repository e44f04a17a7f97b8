r"""Orthogonal Newton: a damped Newton step in the inputs and outputs of each layer, orthogonalised.

.. math::

    S = \mathrm{orth}\!\left((A / \bar a + \delta I)^{-1} M\,
        \mathrm{diag}(h / \bar h + \delta)^{-1}\right)

for a layer's weights, with the momentum :math:`M`, the second moment :math:`A` of the layer's
inputs, weighted by curvature, and the curvature :math:`h` of its outputs, which arrive as the extra
argument ``factors``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hesscale_jax._mesh import automatically, on_mesh
from hesscale_jax.factored import MAX_INPUTS, Factors, Layout
from hesscale_jax.optimizers.hess_diag import accumulator_dtype, keep_unless, usable

# Jordan's coefficients: five steps bring the singular values between .7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5

# An orthogonal matrix is scaled to this root mean square, about that of Adam's updates
# (Liu et al., 2025), so that one learning rate serves all parameters.
RMS = 0.2

# A matrix that takes more steps to invert has a condition number that its dtype does not bear.
MOST = 40

# Layers' steps differ in length by this factor from their geometric mean, at most.
LOG_SPREAD = math.log(3.0)


ADVICE = (
    "Make it with hesscale_jax.layouts(loss)(params, *batch), and put a transformation that "
    "changes the parameters' structure or shapes, such as optax.flatten, after this one."
)

# What the state holds of each leaf.
PER_LEAF = ("mu", "nu", "inputs", "outputs", "inverse")


class ScaleByOrthogonalNewtonState(NamedTuple):
    """State of :func:`scale_by_orthogonal_newton`; a tree has None where a leaf has no such."""

    count: jax.Array  # type: ignore[assignment]  # Updates so far; shape=(), dtype=jnp.int32.
    mu: optax.Updates  # EMA of the updates, in their dtype.
    nu: optax.Updates  # EMA of the squared updates, of what is no layer's weights.
    inputs: optax.Updates  # EMA of each layer's second moment of inputs, (count, n, n).
    outputs: optax.Updates  # EMA of each layer's curvature of outputs, (count, m).
    inverse: optax.Updates  # Of the damped second moment over its mean, (count, n, n).
    refreshed: jax.Array  # Factors taken in so far; shape=(), dtype=jnp.int32.


def scale_by_orthogonal_newton(
    layouts: Any,
    b1: ArrayLike = 0.9,
    decay: ArrayLike = 0.8,
    damping: ArrayLike = 0.2,
    *,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates by the curvature of each layer's inputs and outputs, and orthogonalise them.

    See :func:`orthogonal_newton` for the formula, the arguments and an example.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` requires the argument
      ``factors``, as :func:`hesscale_jax.value_and_factors` returns them, and takes ``refreshed``:
      with False, the factors are left out and the averages stay as they are. It ignores extra
      arguments unknown to it. The updates keep their dtypes; the arithmetic is done in float32 at
      least. Where the updates hold :class:`optax.MaskedNode`, as inside :func:`optax.masked`,
      layouts and factors are not looked at.

    Raises:
      ValueError: ``layouts`` or ``factors`` differ from the parameters in structure or shape.
      TypeError: From ``update``, if ``factors`` are missing.
    """

    def init_fn(params: optax.Params) -> ScaleByOrthogonalNewtonState:
        def of(layout: Layout, p: Any, kind: str) -> Any:
            dtype = accumulator_dtype(p)
            if not _is_matrix(layout):
                return jnp.zeros_like(p, dtype=dtype) if kind == "nu" else None
            count, n, m = layout.counts
            if kind == "nu" or (kind != "outputs" and n > MAX_INPUTS):
                return None
            if kind == "outputs":
                return jnp.zeros((count, m), dtype)
            start = jnp.zeros if kind == "inputs" else _identities
            return start((count, n, n), dtype)

        found = matched(layouts, params)
        kinds = ("nu", "inputs", "outputs", "inverse")
        made = {
            kind: jax.tree.map(lambda layout, p, kind=kind: of(layout, p, kind), found, params)
            for kind in kinds
        }
        return ScaleByOrthogonalNewtonState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            refreshed=jnp.zeros([], jnp.int32),
            **made,
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByOrthogonalNewtonState,
        params: optax.Params | None = None,
        *,
        factors: Any = None,
        refreshed: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByOrthogonalNewtonState]:
        del params, extra_args
        found = matched(layouts, updates)
        tree: Any = jax.tree.structure(updates)
        each = [
            jax.tree.leaves(found),
            jax.tree.leaves(updates),
            _factors(factors, updates),
            *(tree.flatten_up_to(getattr(state, kind)) for kind in PER_LEAF),
        ]
        count = optax.safe_increment(state.count)
        if not each[0]:  # All are masked.
            return updates, state._replace(count=count)
        used = [f[1:] for layout, f in zip(each[0], each[2], strict=True) if _is_matrix(layout)]
        looks = skip_nonfinite and refreshed is not False and bool(jax.tree.leaves(used))
        fresh = usable(used, refreshed, looks)
        number = state.refreshed + (1 if fresh is None else jnp.asarray(fresh, jnp.int32))
        t = count.astype(float)
        steps: list[Any] = []
        new = []
        for layout, g, factor, mu, nu, *curvature in zip(*each, strict=True):
            held: Any = tuple(curvature)
            wide = jnp.asarray(g, accumulator_dtype(g))
            mean: Any = jnp.asarray(mu, wide.dtype)
            if _is_matrix(layout):
                held = _renewed(layout, factor, held, decay, damping, fresh)
                mean = b1 * mean + (1 - b1) * wide
                ahead, now = (layout.matrices(x) for x in (b1 * mean + (1 - b1) * wide, wide))
                steps.append(_newton(ahead, now, held, damping))
            else:
                mean = adam_b1 * mean + (1 - adam_b1) * wide
                nu = (adam_b2 * nu + (1 - adam_b2) * wide * wide).astype(wide.dtype)
                root = jnp.sqrt(nu / (1 - adam_b2**t))
                steps.append(mean / (1 - adam_b1**t) / (root + eps))
            new.append((mean.astype(jnp.result_type(mu)), nu, *held))
        scaled = [
            step if not _is_matrix(layout) else layout.leaf(step)
            for layout, step in zip(each[0], _balanced(steps), strict=True)
        ]
        scaled = tree.unflatten([u.astype(g.dtype) for u, g in zip(scaled, each[1], strict=True)])
        kept = zip(PER_LEAF, map(tree.unflatten, zip(*new, strict=True)), strict=True)
        moved = ScaleByOrthogonalNewtonState(count=count, refreshed=number, **dict(kept))
        if skip_nonfinite:
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in each[1]]))
            scaled = jax.tree.map(lambda u: jnp.where(finite, u, 0), scaled)
            moved = keep_unless(finite, moved, state)
        return scaled, moved

    return optax.GradientTransformationExtraArgs(init_fn, _anywhere(update_fn))


def _anywhere(update_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same for arrays on a mesh of explicit axes, which products of matrices may not divide."""

    @functools.wraps(update_fn)
    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        def compute() -> Any:
            given = jax.tree.map(on_mesh, (updates, state, extra_args))
            return update_fn(*given[:2], params, **given[2])

        leaf = next(iter(jax.tree.leaves(updates)), state.count)
        found: tuple[optax.Updates, Any] = automatically(compute, leaf, (updates, state))
        return found

    return update


def matched(layouts: Any, tree: optax.Updates) -> Any:
    """The layouts with the structure of the updates, some of which may be masked."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        found = jax.tree.map(
            lambda x, layout: x if is_masked(x) else layout, tree, layouts, is_leaf=is_masked
        )
    except ValueError as error:
        raise ValueError(
            "'layouts' has a different structure from the parameters: "
            f"{jax.tree.structure(layouts)} against {jax.tree.structure(tree)}. {ADVICE}"
        ) from error
    for layout, (path, x) in zip(
        jax.tree.leaves(found), jax.tree.leaves_with_path(tree), strict=True
    ):
        if not isinstance(layout, Layout) or layout.shape != jnp.shape(x):
            raise ValueError(
                f"'layouts' has {layout} for the parameter{jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(x)}. {ADVICE}"
            )
    return found


def _is_matrix(layout: Layout) -> bool:
    return layout.factored and min(layout.counts[1:]) > 1


def _identities(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


def _factors(factors: Any, updates: optax.Updates) -> list[Factors]:
    """One for each of the updates."""
    if factors is None:
        raise TypeError(
            "scale_by_orthogonal_newton needs the extra argument 'factors', not 'hess_diag': call "
            "update(grad, state, params, factors=factors) with what "
            "value, (grad, factors) = hesscale_jax.value_and_factors(loss)(params, ...) returns. "
            "If you do pass it, some wrapper on the way does not hand extra arguments on."
        )

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode | Factors)

    try:
        found = jax.tree.map(
            lambda u, f: u if isinstance(u, optax.MaskedNode) else f,
            updates,
            jax.tree.map(
                lambda f: f if isinstance(f, optax.MaskedNode) else _Held(f),
                factors,
                is_leaf=is_leaf,
            ),
            is_leaf=is_leaf,
        )
    except ValueError as error:
        raise ValueError(
            "'factors' has a different structure from 'updates': "
            f"{jax.tree.structure(factors)} against {jax.tree.structure(updates)}"
        ) from error
    return [held.factors for held in jax.tree.leaves(found)]


class _Held:
    """Factors as a leaf."""

    def __init__(self, factors: Any) -> None:
        if not isinstance(factors, Factors):
            raise TypeError(
                "'factors' must hold what hesscale_jax.value_and_factors returns, got "
                f"{type(factors).__name__}"
            )
        self.factors = factors


def _renewed(
    layout: Layout, factors: Factors, held: Any, decay: Any, damping: Any, fresh: Any
) -> tuple[Any, Any, Any]:
    """The averages with new factors, and the inverse that goes with them."""
    if fresh is False:
        return held
    count, n, m = layout.counts
    sizes = [0 if x is None else jnp.size(x) for x in (factors.inputs, factors.outputs)]
    if sizes[1] != count * m or (held[0] is not None and sizes[0] != count * n * n):
        raise ValueError(f"'factors' are not those of a layer of layout {layout}")

    def renew(held: Any) -> Any:
        inputs, outputs, inverse = held
        h = jnp.abs(factors.outputs).reshape(count, m).astype(outputs.dtype)
        outputs = (decay * outputs + (1 - decay) * h).astype(h.dtype)
        if inputs is not None:
            new = factors.inputs.reshape(count, n, n).astype(inputs.dtype)
            inputs = (decay * inputs + (1 - decay) * new).astype(new.dtype)
            inverse = damped_inverse(inputs, damping).astype(new.dtype)
        return inputs, outputs, inverse

    if fresh is None or fresh is True:
        return renew(held)
    return jax.lax.cond(fresh, renew, lambda held: held, held)


def damped_inverse(a: jax.Array, damping: ArrayLike) -> jax.Array:
    """Of each matrix over its mean eigenvalue, plus the damping: by matrix products.

    Newton and Schulz's iteration squares the error ``I - A X``, until it is that of rounding after
    one more step. Its norm is 1 less ``damping / n`` at first, at worst. It does not converge for a
    matrix with negative eigenvalues, as of a loss that is not convex in the model's outputs: there,
    the moduli of the eigenvalues take their place.
    """
    n, given = a.shape[-1], a
    eye = jnp.eye(n, dtype=a.dtype)[None]
    mean = jnp.trace(a, axis1=-2, axis2=-1)[:, None, None] / n
    a = a / jnp.maximum(mean, jnp.finfo(a.dtype).tiny) + jnp.asarray(damping, a.dtype) * eye
    bound = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
    enough = float(jnp.finfo(a.dtype).eps) ** 0.5

    def goes_on(held: Any) -> Any:
        _, error, count = held
        return (error > enough) & (count < MOST)

    def step(held: Any) -> Any:
        x, _, count = held
        error = eye - jnp.matmul(a, x, precision="highest")
        x = x + jnp.matmul(x, error, precision="highest")
        size = jnp.max(jnp.linalg.norm(error, axis=(-2, -1))) / n**0.5
        return x, size, count + 1

    def by_moduli(_: Any) -> Any:
        values, vectors = jnp.linalg.eigh(given)
        values = jnp.abs(values)
        mean = jnp.mean(values, axis=-1, keepdims=True)
        inverse = 1 / (values / jnp.maximum(mean, jnp.finfo(a.dtype).tiny) + damping)
        x = (vectors * inverse[:, None, :].astype(a.dtype)) @ jnp.swapaxes(vectors, -1, -2)
        return x, jnp.zeros([], bool)

    start = jnp.broadcast_to(eye, a.shape) / bound
    x, error, _ = jax.lax.while_loop(goes_on, step, (start, jnp.ones([], a.dtype), 0))
    # Run at most once: a branch would be taken at every step under vmap.
    indefinite = jnp.all(jnp.isfinite(given)) & ~(error <= enough)
    return jax.lax.while_loop(lambda held: held[1], by_moduli, (x, indefinite))[0]


class _Step(NamedTuple):
    """Steps of the matrices of a leaf."""

    matrices: jax.Array  # (count, n, m), of a root mean square of RMS, or 0 where the gradient is.
    descent: jax.Array  # (count,): the loss's slope along each.
    bend: jax.Array  # (count,): its curvature along each, 0 where that is not known.


def _newton(momentum: jax.Array, gradient: jax.Array, curvature: Any, damping: ArrayLike) -> _Step:
    """The damped Newton step, orthogonalised; none where the gradient is 0, as of a dead layer."""
    inputs, outputs, inverse = curvature
    newton = momentum if inverse is None else inverse @ momentum
    tiny = jnp.finfo(outputs.dtype).tiny
    mean = jnp.maximum(jnp.mean(outputs, axis=-1, keepdims=True), tiny)
    relative = (outputs / mean)[:, None, :]
    s = orthogonalised(newton / (relative + damping))
    square = jnp.mean(jnp.square(s), axis=(-2, -1), keepdims=True)
    alive = jnp.any(gradient != 0, axis=(-2, -1), keepdims=True)
    s = jnp.where(alive, RMS * s / jnp.sqrt(jnp.maximum(square, tiny)), 0)
    along = jnp.zeros_like(s) if inputs is None else (inputs @ s) * s * relative
    # The weights of the inputs are sums over the outputs: their mean is what each has.
    return _Step(s, jnp.sum(momentum * s, (-2, -1)), jnp.sum(along, (-2, -1)) / s.shape[-1])


def _balanced(steps: list[Any]) -> list[Any]:
    """Each layer's step in proportion to Newton's length along it, within a factor of 3.

    A step ``s`` of slope ``g^T s`` and curvature ``s^T H s`` is best of length ``g^T s / s^T H s``.
    The lengths are taken relative to their geometric mean.
    """
    layers = [step for step in steps if isinstance(step, _Step)]
    if not layers:
        return steps
    logs = []
    for step in layers:
        known = (step.bend > 0) & (step.descent > 0)
        ratio = jnp.where(known, step.descent, 1) / jnp.where(known, step.bend, 1)
        logs.append((known, jnp.log(ratio)))
    number = sum(jnp.sum(known, dtype=length.dtype) for known, length in logs)
    mean = sum(jnp.sum(length) for _, length in logs) / jnp.maximum(number, 1)
    factors = iter(
        jnp.where(known, jnp.exp(jnp.clip(length - mean, -LOG_SPREAD, LOG_SPREAD)), 1)
        for known, length in logs
    )
    return [
        next(factors)[:, None, None] * step.matrices if isinstance(step, _Step) else step
        for step in steps
    ]


def orthogonalised(x: jax.Array) -> jax.Array:
    """About the nearest matrix with singular values of 1, by matrix products alone.

    References:
      Jordan et al., `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # Squares neither overflow nor vanish.
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1)
    for _ in range(STEPS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def orthogonal_newton(
    learning_rate: optax.ScalarOrSchedule,
    layouts: Any,
    b1: ArrayLike = 0.9,
    decay: ArrayLike = 0.8,
    damping: ArrayLike = 0.2,
    *,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    skip_nonfinite: bool = True,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A damped Newton step in the inputs and outputs of each layer, orthogonalised.

    The loss's curvature in a layer's weights :math:`W`, inputs by outputs, is nearly a product: the
    second moment :math:`A` of the inputs, weighted by curvature, times the curvature :math:`h` of
    the outputs, both from the one pass of :func:`hesscale_jax.value_and_factors`. With the
    gradient :math:`G_t` and the learning rate :math:`\alpha_t`,

    .. math::

        \begin{align*}
          A &\leftarrow \rho A + (1 - \rho) A_t, \quad h \leftarrow \rho h + (1 - \rho) |h_t|
            \quad \text{where the factors are new} \\
          M &\leftarrow \beta_1 M + (1 - \beta_1) G_t, \quad
            \tilde M = \beta_1 M + (1 - \beta_1) G_t \\
          N &= (A / \bar a + \delta I)^{-1} \, \tilde M \,
            \mathrm{diag}(h / \bar h + \delta)^{-1} \\
          S &= 0.2\, \mathrm{orth}(N) / \mathrm{rms}(\mathrm{orth}(N)), \quad
            \lambda = \langle \tilde M, S \rangle /
            \langle A S\, \mathrm{diag}(h / \textstyle\sum h), S \rangle \\
          W &\leftarrow W - \alpha_t\, \mathrm{clip}(\lambda / \bar\lambda, \tfrac13, 3)\, S
        \end{align*}

    where :math:`\bar a` is the mean of the eigenvalues of :math:`A`, :math:`\bar h` that of
    :math:`h`, and orth gives about the nearest matrix with singular values of 1, by five steps
    of Newton and Schulz. :math:`\lambda` is the length of Newton's step along :math:`S`, and
    :math:`\bar\lambda` the geometric mean of all layers': the curvature says how far each layer
    goes relative to the others, and the learning rate how far all go. The loss's scale does not
    matter. What is no layer's weights (biases, norms, embeddings, weights of one input or output)
    is updated by Adam, at the same learning rate.

    Only products of matrices are computed, nothing is decomposed, unless :math:`A / \bar a +
    \delta I` is not positive, as of a loss that is not convex in the model's outputs: there
    :math:`|A| = (A^2)^{1/2}` takes the place of :math:`A`. The inputs of a layer with more than
    8192 of them are taken as isotropic, its :math:`A` as the identity. Factors renewed at every
    tenth step, by :func:`hesscale_jax.value_and_factors_every`, serve as well as new ones.

    Args:
        learning_rate: A global scaling factor, either fixed or evolving along iterations with a
            scheduler, see :func:`optax.scale_by_learning_rate`. 0.02 is a good start for any model;
            warm up over the first few percent of the steps, and decay to 0.
        layouts: Which axes of each parameter are a layer's inputs and outputs, a tree like the
            parameters: ``hesscale_jax.layouts(loss)(params, *batch)``.
        b1: Decay rate of the average of a layer's gradients.
        decay: Decay rate of the averages of the factors, :math:`\rho`, for each renewal.
        damping: :math:`\delta`, relative to the mean curvature.
        adam_b1: Decay rate of the average of the other gradients.
        adam_b2: Decay rate of the average of their squares.
        eps: Term added to the root of the latter.
        skip_nonfinite: Whether to leave out factors with an infinity or NaN anywhere, and to skip
            the whole step, with updates of 0, where a gradient has one.
        weight_decay: Strength of the weight decay, decoupled as in :func:`optax.adamw`: multiplied
            by the learning rate, not by the curvature. None for no decay.
        mask: A tree with the structure of the parameters or a prefix of it, or a callable that
            returns one given the parameters: True where the weight decay applies.

    Returns:
        An :class:`optax.GradientTransformationExtraArgs`, whose ``update`` requires ``factors``,
        see :func:`scale_by_orthogonal_newton`; and ``params``, if there is weight decay.

    Raises:
        ValueError: As :func:`scale_by_orthogonal_newton`.
        TypeError: As :func:`scale_by_orthogonal_newton`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import hesscale_jax as hs
        >>> def loss(params, x, y):
        ...     return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> x = jax.random.normal(keys[0], (64, 8))
        >>> y = jnp.sin(x[:, :2] + x[:, 2:4])
        >>> params = {
        ...     "hidden": jax.random.normal(keys[1], (8, 32)) / 3,
        ...     "out": jax.random.normal(keys[2], (32, 2)) / 6,
        ... }
        >>> schedule = optax.cosine_decay_schedule(0.02, 300)
        >>> solver = hs.orthogonal_newton(schedule, hs.layouts(loss)(params, x, y))
        >>> state = solver.init(params)
        >>> @jax.jit
        ... def step(params, state, number):
        ...     with_factors = hs.value_and_factors_every(10)(loss)
        ...     value, (grad, factors), refreshed = with_factors(number, params, x, y)
        ...     updates, state = solver.update(
        ...         grad, state, params, factors=factors, refreshed=refreshed
        ...     )
        ...     return optax.apply_updates(params, updates), state, value
        >>> values = []
        >>> for number in range(300):
        ...     params, state, value = step(params, state, number)
        ...     values.append(value)
        >>> bool(values[-1] < 0.1 * values[0])
        True

    References:
        Jordan et al., `Muon: An optimizer for hidden layers in neural networks
        <https://kellerjordan.github.io/posts/muon/>`_, 2024: the orthogonalisation

        Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature <https://arxiv.org/abs/1503.05671>`_, 2015: the factors

        Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025:
        the scale

    .. warning::
        :func:`optax.MultiSteps` averages the updates of its micro-batches but hands on only the
        last one's factors.
    """
    decayed = (
        optax.identity()
        if weight_decay is None
        else optax.add_decayed_weights(weight_decay, mask=mask)
    )
    return optax.chain(
        scale_by_orthogonal_newton(
            layouts,
            b1,
            decay,
            damping,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
            eps=eps,
            skip_nonfinite=skip_nonfinite,
        ),
        decayed,
        optax.scale_by_learning_rate(learning_rate),
    )
