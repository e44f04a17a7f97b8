"""Every layer of Flax, every function of ``jax.nn`` and every loss of Optax, found by inspection.

Each stands in a small model. What is new in a version of these packages is tested with it, or fails
until it is given arguments, or a reason in ``EXCLUDED``.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen, nnx

from hesscale_jax import _jaxpr

BATCH, TIME, WIDTH = 2, 3, 4
EXCLUDED = {
    "linen.Module": "the base class",
    "linen.RNNCellBase": "a base class",
    "nnx.Module": "the base class",
    "nnx.RNNCellBase": "a base class",
    "nnx.Dict": "a container",
    "nnx.List": "a container",
    "jax.nn.get_scaled_dot_general_config": "makes no array",
    "jax.nn.scaled_matmul": "runs on some GPUs alone",
}


# Every member, by what it is


def modules(package: types.ModuleType) -> list[str]:
    return [
        name
        for name, member in inspect.getmembers(package, inspect.isclass)
        if issubclass(member, package.Module) and not name.startswith("_")
    ]


def functions(package: types.ModuleType) -> list[str]:
    return [name for name, _ in inspect.getmembers(package, callable) if not name.startswith("_")]


def members() -> Iterator[tuple[str, Callable[[], tuple[Callable[..., Any], list[Any]]]]]:
    """The name of each, and what makes its model."""
    for name in modules(linen):
        yield f"linen.{name}", functools.partial(linen_model, getattr(linen, name))
    for name in modules(nnx):
        yield f"nnx.{name}", functools.partial(nnx_model, getattr(nnx, name))
    for name in functions(jax.nn):
        yield f"jax.nn.{name}", functools.partial(function_model, getattr(jax.nn, name))
    for name in functions(optax.losses):
        yield f"optax.losses.{name}", functools.partial(function_model, getattr(optax.losses, name))


# Data


def data(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def parameters(tree: Any) -> tuple[list[jax.Array], Any]:
    """Parameters away from where they start, at zeros and ones."""
    leaves, structure = jax.tree.flatten(tree)
    moved = [x + 0.3 * data(*x.shape, seed=i) for i, x in enumerate(leaves)]
    return moved, structure


def squared_error(result: Any) -> jax.Array:
    """The distance of all that the result holds from a target."""
    arrays = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(jnp.mean((x - data(*x.shape)) ** 2) for x in arrays)


# Arguments, by the names of parameters


def given(callable: Callable[..., Any], table: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that the table has for parameters of the callable."""
    found = {k: p for k, p in inspect.signature(callable).parameters.items() if k in table}
    in_order = [k for k, p in found.items() if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    return [table[k] for k in in_order], {k: table[k] for k in found if k not in in_order}


def linen_arguments() -> dict[str, Any]:
    cell = linen.GRUCell(WIDTH, param_dtype=float)
    dense = linen.Dense(WIDTH, param_dtype=float)
    return {
        "backward_rnn": linen.RNN(linen.SimpleCell(WIDTH, param_dtype=float)),
        "cell": cell,
        "deterministic": False,
        "dtype": float,
        "einsum_str": "bti,ij->btj",
        "features": WIDTH,
        "forward_rnn": linen.RNN(cell),
        "kernel_size": (2,),
        "layer_instance": dense,
        "layers": [dense, jnp.tanh],
        "num_embeddings": 5,
        "num_groups": 2,
        "num_heads": 2,
        "param_dtype": float,
        "rate": 0.4,
        "shape": (WIDTH, WIDTH),
        "use_running_average": False,
    }


def nnx_arguments() -> dict[str, Any]:
    usual = {"dtype": float, "param_dtype": float, "rngs": nnx.Rngs(0)}
    linear = nnx.Linear(WIDTH, WIDTH, **usual)
    return {
        **dict.fromkeys(("features", "hidden_features", "in_features"), WIDTH),
        **dict.fromkeys(("num_features", "out_features"), WIDTH),
        "backward_rnn": nnx.RNN(nnx.SimpleCell(WIDTH, WIDTH, **usual), rngs=nnx.Rngs(0)),
        "bias_shape": (WIDTH,),
        "cell": nnx.GRUCell(WIDTH, WIDTH, **usual),
        "decode": False,
        "einsum_str": "bti,ij->btj",
        "fns": linear,
        "forward_rnn": nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, **usual), rngs=nnx.Rngs(0)),
        "kernel_shape": (WIDTH, WIDTH),
        "kernel_size": (2,),
        "layer_instance": linear,
        "lora_param_dtype": float,
        "lora_rank": 2,
        "num_embeddings": 5,
        "num_groups": 2,
        "num_heads": 2,
        "rate": 0.4,
        **usual,
    }


DOMAINS = {"log1mexp": jnp.exp}
MADE_WITH = {"make_fenchel_young_loss": jax.nn.logsumexp}
CLASSES = {  # functions whose labels are integers
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "ntxent",
    "softmax_cross_entropy_with_integer_labels",
}


def function_arguments(name: str, hidden: jax.Array) -> dict[str, Any]:
    """What the function of this name takes for its required parameters, at a hidden value."""
    rows = DOMAINS.get(name, lambda x: x)(hidden.reshape(-1, WIDTH))
    heads = hidden.reshape(BATCH, TIME, 2, -1)
    targets = jax.nn.softmax(data(*rows.shape, seed=1))
    labels = np.arange(len(rows)) % WIDTH if name in CLASSES else targets
    in_time = {}
    if name.startswith("ctc_loss"):
        in_time = {
            "logits": hidden,
            "logit_paddings": np.zeros((BATCH, TIME)),
            "labels": np.array([[1, 2], [3, 1]]),
            "label_paddings": np.zeros((BATCH, 2)),
        }
    return {
        **dict.fromkeys(("a", "anchors", "embeddings", "logits", "predictions"), rows),
        **dict.fromkeys(("predictor_outputs", "scores", "x"), rows),
        **dict.fromkeys(("key", "query", "value"), heads),
        "alpha": 0.1,
        "dimension_numbers": (((2,), (2,)), ((0,), (0,))),
        "labels": labels,
        "lhs": hidden,
        "log_predictions": jax.nn.log_softmax(rows),
        "log_targets": jnp.log(targets),
        "negatives": data(*rows.shape, seed=2),
        "num_classes": 3,
        "positives": data(*rows.shape, seed=3),
        "rhs": data(*hidden.shape),
        "targets": targets,
        **in_time,
    }


# Models: a linear layer, then the member


def linen_model(cls: type[linen.Module]) -> tuple[Callable[..., Any], list[Any]]:
    layer = cls(**given(cls, linen_arguments())[1])
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    update = given(cls.__call__, {"update_stats": True})[1]
    x = data(BATCH, TIME, WIDTH)
    state = layer.init(rngs, *inputs(layer, x, rngs["params"]), **update)
    state, leaves, structure = {**state}, *parameters(state.get("params", {}))

    def fun(w: jax.Array, *leaves: jax.Array) -> jax.Array:
        variables = {**state, "params": jax.tree.unflatten(structure, leaves)}
        read = inputs(layer, x @ w, rngs["params"])
        return squared_error(layer.apply(variables, *read, rngs=rngs, mutable=True, **update)[0])

    return fun, [data(WIDTH, WIDTH, seed=1), *leaves]


def nnx_model(cls: type[nnx.Module]) -> tuple[Callable[..., Any], list[Any]]:
    in_order, by_name = given(cls.__init__, nnx_arguments())
    layer = cls(*in_order, **by_name)
    graph, state, rest = nnx.split(layer, nnx.Param, ...)
    leaves, structure = parameters(state)
    x = data(BATCH, TIME, WIDTH)

    def fun(w: jax.Array, *leaves: jax.Array) -> jax.Array:
        layer = nnx.merge(graph, jax.tree.unflatten(structure, leaves), rest, copy=True)
        return squared_error(layer(*inputs(layer, x @ w, nnx.Rngs(2))))

    return fun, [data(WIDTH, WIDTH, seed=1), *leaves]


def inputs(layer: Any, x: jax.Array, rngs: Any) -> tuple[Any, ...]:
    """What the layer is called with: tokens, a carry and an input, operands, or an input."""
    if hasattr(layer, "amax_history_length"):
        operands = x, data(WIDTH, WIDTH, seed=2)
        if isinstance(layer, linen.Fp8Einsum):
            return "bti,ij->btj", *operands
        return *operands, (((2,), (0,)), ((), ()))
    if hasattr(layer, "num_embeddings"):
        return (np.arange(BATCH * TIME).reshape(BATCH, TIME) % 5,)
    if isinstance(layer, (linen.RNNCellBase, nnx.RNNCellBase)):
        _, arguments = given(
            layer.initialize_carry, {"input_shape": x.shape, "rng": rngs, "rngs": rngs}
        )
        carry = layer.initialize_carry(**arguments)
        return jax.tree.map(lambda c: c + data(*c.shape), carry), x
    return (x,)


def function_model(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    name = function.__name__
    if name in MADE_WITH:
        function = function(MADE_WITH[name])

    def fun(w: jax.Array) -> jax.Array:
        table = function_arguments(name, data(BATCH, TIME, WIDTH) @ w)
        parameters = inspect.signature(function).parameters.values()
        required = [p for p in parameters if p.default is p.empty and str(p)[0] != "*"]
        arguments = [table[p.name] for p in required]
        return squared_error(function(*arguments))

    return fun, [data(WIDTH, WIDTH, seed=1)]


# Tests


MEMBERS = dict(members())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in EXCLUDED])
def test_member(name: str) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fun, args = MEMBERS[name]()
        oracle.check(fun, *args, rtol=tolerance(fun, args))


def tolerance(fun: Callable[..., Any], args: list[Any]) -> float:
    """Some members compute in part in single precision, whatever they are given."""
    precisions = {
        str(v.aval.dtype)
        for eqn in _jaxpr.flatten(_jaxpr.trace(fun, *args)).equations
        for v in eqn.outputs
    }
    return 1e-5 if "float32" in precisions else 1e-9


def test_what_is_excluded_exists() -> None:
    assert EXCLUDED.keys() <= MEMBERS.keys()
