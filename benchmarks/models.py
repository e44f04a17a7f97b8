"""The models that the benchmarks run on, written with Flax NNX the way a user would write them.

A `Task` draws random parameters and a random batch. Its `predict` and `loss` are pure functions of
the parameters, the same objects for every draw, so that each is compiled once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Activation = Callable[[jax.Array], jax.Array]
Params = Any
Batch = tuple[Any, ...]


class MLP(nnx.Module):
    """Linear layers of the given widths; each hidden one may have LayerNorm and a residual."""

    def __init__(
        self,
        widths: Sequence[int],
        activation: Activation = jax.nn.relu,
        *,
        layer_norm: bool = False,
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.List(nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(widths))
        self.norm = nnx.List(nnx.LayerNorm(n, rngs=rngs) for n in widths[1:-1] if layer_norm)
        self.activation = activation
        self.residual = residual

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.linear
        for index, linear in enumerate(hidden):
            y = linear(x)
            if self.norm:
                y = self.norm[index](y)
            y = self.activation(y)
            x = x + y if self.residual else y
        return last(x)


class CNN(nnx.Module):
    """Twice 3x3 convolution, activation and 2x2 pooling, then a linear layer. Inputs NHWC."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        width: int,
        classes: int,
        activation: Activation,
        pool: Callable[..., jax.Array],
        *,
        group_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        height, length, channels = input_shape
        self.conv = nnx.List(nnx.Conv(c, width, (3, 3), rngs=rngs) for c in (channels, width))
        self.norm = nnx.List(
            nnx.GroupNorm(width, num_groups=2, rngs=rngs) for _ in self.conv if group_norm
        )
        self.linear = nnx.Linear(height // 4 * (length // 4) * width, classes, rngs=rngs)
        self.activation = activation
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, conv in enumerate(self.conv):
            x = conv(x)
            if self.norm:
                x = self.norm[index](x)
            x = self.pool(self.activation(x), (2, 2), strides=(2, 2))
        return self.linear(x.reshape(x.shape[0], -1))


class ThreeConvThreeDense(nnx.Module):
    """The 3C3D network of DeepOBS for 32x32 colour images. Inputs NHWC."""

    def __init__(self, classes: int, activation: Activation, *, rngs: nnx.Rngs):
        self.conv = nnx.List(
            [
                nnx.Conv(3, 64, (5, 5), padding="VALID", rngs=rngs),
                nnx.Conv(64, 96, (3, 3), padding="VALID", rngs=rngs),
                nnx.Conv(96, 128, (3, 3), padding="SAME", rngs=rngs),
            ]
        )
        self.dense = MLP((3 * 3 * 128, 512, 256, classes), activation, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.conv:
            x = nnx.max_pool(self.activation(conv(x)), (3, 3), strides=(2, 2), padding="SAME")
        return self.dense(x.reshape(x.shape[0], -1))


class ResidualBlock(nnx.Module):
    """Twice convolution and normalisation, beside a shortcut; halves the image if strided."""

    def __init__(self, m: int, n: int, stride: int, norm: Callable[..., Any], rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = conv(m, n, (3, 3), strides=stride), norm(n, rngs=rngs)
        self.conv2, self.norm2 = conv(n, n, (3, 3)), norm(n, rngs=rngs)
        self.shortcut = nnx.List([])
        if stride > 1 or m != n:
            self.shortcut = nnx.List([conv(m, n, (1, 1), strides=stride), norm(n, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(normalised(self.norm1, self.conv1(x)))
        y = normalised(self.norm2, self.conv2(y))
        if self.shortcut:
            conv, norm = self.shortcut
            x = normalised(norm, conv(x))
        return jax.nn.relu(x + y)


def normalised(norm: nnx.Module, x: jax.Array) -> jax.Array:
    """In the dtype of `x`: BatchNorm's is otherwise that of its statistics, float32."""
    return norm(x).astype(x.dtype)


class ResNet(nnx.Module):
    """A convolution, residual blocks of these widths, the mean over the image, a linear layer.

    A block that is wider than the one before it halves the image. Inputs NHWC.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        norm: Callable[..., Any] = nnx.BatchNorm,
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = nnx.Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(widths[0], rngs=rngs)
        self.blocks = nnx.List(
            ResidualBlock(m, n, 2 if n > m else 1, norm, rngs)
            for m, n in zip((widths[0], *widths), widths, strict=False)
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(normalised(self.norm, self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class LSTM(nnx.Module):
    """A recurrent layer as wide as its inputs, and a linear layer on its last output."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs))
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x)[:, -1])


class CausalSelfAttention(nnx.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.query_key_value = nnx.Linear(width, 3 * width, rngs=rngs)
        self.project = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        packed = self.query_key_value(x).reshape(batch, length, 3, self.heads, -1)
        query, key, value = (packed[:, :, i] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.project(y.reshape(batch, length, width))


class TransformerBlock(nnx.Module):
    """Attention and a GELU network four times as wide, each behind LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = CausalSelfAttention(width, heads, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = MLP((width, 4 * width, width), jax.nn.gelu, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nnx.Module):
    """A decoder-only transformer with learned positions and an untied head.

    Its layers are a list; or one layer with stacked parameters, scanned over and checkpointed.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        heads: int,
        layers: int,
        *,
        scan: bool = False,
        rngs: nnx.Rngs,
    ):
        # Not nnx.Embed: it casts its table to the type that it was made with, so to float32.
        self.token = nnx.Param(rngs.params.normal((vocabulary, width)))
        self.position = nnx.Param(rngs.params.normal((length, width)))
        if scan:
            stack = nnx.vmap(lambda rngs: TransformerBlock(width, heads, rngs=rngs))
            self.blocks = stack(rngs.split(layers))
        else:
            self.blocks = nnx.List(TransformerBlock(width, heads, rngs=rngs) for _ in range(layers))
        self.scan = scan
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token[tokens] + self.position[: tokens.shape[1]]
        if self.scan:
            apply = nnx.remat(lambda x, block: block(x))
            x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over every axis but the classes'."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over every axis, of one output for each target."""
    return optax.l2_loss(outputs[..., 0], targets).mean()


@dataclasses.dataclass(frozen=True)
class Task:
    """Classification of random inputs with random labels, by a model with random parameters.

    With one class it is regression, as a critic's, with labels N(0, 1).

    Attributes:
        model: builds the model from an `nnx.Rngs`.
        input_shape: shape of one input; of its labels too, when there is a vocabulary.
        batch: examples in a batch.
        classes: labels are integers below it.
        vocabulary: if given, inputs are integers below it; otherwise they are N(0, 1).
    """

    model: functools.partial[nnx.Module]
    input_shape: tuple[int, ...]
    batch: int
    classes: int = 10
    vocabulary: int | None = None

    def draw(self, seed: int, dtype: jax.typing.DTypeLike) -> tuple[Params, Batch]:
        """Random parameters, and a batch: the model's other state, random inputs and labels.

        Floating-point parameters and inputs are of the given type.
        """
        params, rest = nnx.state(self.model(rngs=nnx.Rngs(seed)), nnx.Param, ...)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        input_key, label_key = jax.random.split(jax.random.key(seed))
        shape = (self.batch, *self.input_shape)
        if self.classes == 1:
            inputs = jax.random.normal(input_key, shape, dtype)
            labels = jax.random.normal(label_key, (self.batch,), dtype)
        elif self.vocabulary is None:
            inputs = jax.random.normal(input_key, shape, dtype)
            labels = jax.random.randint(label_key, (self.batch,), 0, self.classes)
        else:
            inputs = jax.random.randint(input_key, shape, 0, self.vocabulary)
            labels = jax.random.randint(label_key, shape, 0, self.classes)
        return params, (rest, inputs, labels)

    @functools.cached_property
    def predict(self) -> Callable[[Params, Any, jax.Array], jax.Array]:
        """The logits, as a function of the parameters, the model's other state and the inputs."""
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: self.model(rngs=nnx.Rngs(0))))
        # A copy, whose running statistics may be renewed within a trace.
        return lambda params, rest, inputs: nnx.merge(graphdef, params, rest, copy=True)(inputs)

    @property
    def criterion(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The loss of the outputs and the labels."""
        return squared_error if self.classes == 1 else cross_entropy

    @functools.cached_property
    def loss(self) -> Callable[..., jax.Array]:
        """The mean loss, as a function of the parameters and the batch."""
        return lambda params, rest, inputs, labels: self.criterion(
            self.predict(params, rest, inputs), labels
        )


def mlp_task(
    batch: int, *widths: int, activation: Activation = jax.nn.relu, **options: Any
) -> Task:
    model = functools.partial(MLP, widths, activation, **options)
    return Task(model, input_shape=widths[:1], batch=batch, classes=widths[-1])


def cnn_task(batch: int, activation: Activation, pool: Callable[..., Any], **options: Any) -> Task:
    shape = (8, 8, 3)
    model = functools.partial(CNN, shape, 8, 10, activation, pool, **options)
    return Task(model, input_shape=shape, batch=batch)


def gpt_task(batch: int, *, vocabulary: int, length: int, **options: Any) -> Task:
    model = functools.partial(GPT, vocabulary, length, **options)
    return Task(
        model, input_shape=(length,), batch=batch, classes=vocabulary, vocabulary=vocabulary
    )


_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}

# Small enough for the exact diagonal.
QUALITY_TASKS = (
    {"softmax regression": mlp_task(8, 16, 10)}
    | {
        f"{title}, {name}": mlp_task(8, *widths, 10, activation=activation, **options)
        for title, widths, options in [
            ("MLP, 1 hidden", (16, 16), {}),
            ("MLP, 3 hidden", (16, 16, 16, 16), {}),
            ("+ LayerNorm", (16, 16, 16, 16), {"layer_norm": True}),
            ("+ residual", (16, 16, 16, 16), {"residual": True}),
        ]
        for name, activation in _ACTIVATIONS.items()
    }
    | {
        "critic, 3 hidden, tanh": mlp_task(8, 16, 16, 16, 16, 1, activation=jnp.tanh),
        "CNN, max-pool relu": cnn_task(8, jax.nn.relu, nnx.max_pool),
        "CNN, avg-pool tanh": cnn_task(8, jnp.tanh, nnx.avg_pool),
        "CNN, GroupNorm gelu": cnn_task(8, jax.nn.gelu, nnx.avg_pool, group_norm=True),
        "GPT, 1 layer": gpt_task(8, vocabulary=10, length=6, width=8, heads=2, layers=1),
        "GPT, 2 layers": gpt_task(8, vocabulary=10, length=6, width=8, heads=2, layers=2),
    }
)

# One example at a time, as in the papers: how networks and activations differ.
PAPER_TASKS = {
    f"{title}, {name}": mlp_task(1, *widths, activation=activation)
    for title, widths in [
        ("6-16-16-16-10", (6, 16, 16, 16, 10)),
        ("6-64-64-64-10", (6, 64, 64, 64, 10)),
        ("6-16 x 6-10", (6, *[16] * 6, 10)),
    ]
    for name, activation in (_ACTIVATIONS | {"elu": jax.nn.elu}).items()
} | {
    "CNN, max-pool relu": cnn_task(1, jax.nn.relu, nnx.max_pool),
    "CNN, avg-pool tanh": cnn_task(1, jnp.tanh, nnx.avg_pool),
}

# Large enough for the arithmetic to dominate, but for the first, which the exact diagonal is for.
COST_TASKS = {
    "mlp-32-tanh": mlp_task(128, 64, 32, 32, 10, activation=jnp.tanh),
    "mlp-512-relu": mlp_task(128, 784, 512, 512, 10),
    "mlp-512-tanh": mlp_task(128, 784, 512, 512, 10, activation=jnp.tanh),
    "mlp-1024-relu": mlp_task(256, *[1024] * 5, 10),
    "mlp-1024-gelu": mlp_task(256, *[1024] * 5, 10, activation=jax.nn.gelu),
    "mlp-1024-layernorm-gelu": mlp_task(
        256, *[1024] * 5, 10, activation=jax.nn.gelu, layer_norm=True
    ),
    "3c3d-relu": Task(
        functools.partial(ThreeConvThreeDense, 10, jax.nn.relu), input_shape=(32, 32, 3), batch=32
    ),
    "resnet-18": Task(
        functools.partial(ResNet, sorted([64, 128, 256, 512] * 2), 10),
        input_shape=(32, 32, 3),
        batch=16,
    ),
    "gpt-256": gpt_task(4, vocabulary=1000, length=128, width=256, heads=4, layers=4),
    "gpt-256-scanned": gpt_task(
        4, vocabulary=1000, length=128, width=256, heads=4, layers=4, scan=True
    ),
    "lstm-256": Task(functools.partial(LSTM, 256, 10), input_shape=(64, 256), batch=32),
}

# Large enough for a data centre's accelerator.
GPU_TASKS = {
    "mlp-4096-relu": mlp_task(4096, *[4096] * 5, 10),
    "resnet-18-256": dataclasses.replace(COST_TASKS["resnet-18"], batch=256),
    "gpt2-small": gpt_task(8, vocabulary=50257, length=1024, width=768, heads=12, layers=12),
    "gpt2-small-scanned": gpt_task(
        8, vocabulary=50257, length=1024, width=768, heads=12, layers=12, scan=True
    ),
}

# The same at sizes at which a CPU shows that a script runs.
SMALL_GPU_TASKS = {
    "mlp-4096-relu": mlp_task(8, *[16] * 5, 10),
    "resnet-18-256": Task(functools.partial(ResNet, (4, 8), 10), input_shape=(8, 8, 3), batch=4),
    "gpt2-small": gpt_task(2, vocabulary=32, length=8, width=16, heads=2, layers=2),
    "gpt2-small-scanned": gpt_task(
        2, vocabulary=32, length=8, width=16, heads=2, layers=2, scan=True
    ),
}
