"""Whole models, each as a loss of its parameters, written the way their authors write them.

They are small enough for the exact diagonal of the Hessian, up to about 3000 parameters, and
otherwise what one trains: layers and initialisation are the defaults of their library (normal with
variance 1 / fan-in for weights, zero for biases), and embeddings are N(0, 1 / width).

    images        8 x 8 x 3, 10 classes; batch 8
    text          6 tokens out of 10, to predict the next of each; batch 8
    sequences     10 steps of 4 numbers, 5 classes; batch 8
    others        see each model

Inputs are N(0, 1) and labels uniform. Parameters and data are drawn in float32 and cast.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax import lax
from models import MLP, Batch, Params, ResNet, cross_entropy

CLASSES = 10
IMAGE = (8, 8, 3)
RESNET_WIDTHS = (6, 8)
VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 10, 6, 8, 2, 2
STEPS, FEATURES, STEP_CLASSES = 10, 4, 5


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss, and what to evaluate it at.

    Attributes:
        loss: `loss(params, *batch)`.
        initialise: parameters, and data to go first in the batch, from a random key.
        sample: the rest of the batch from a random key.
    """

    loss: Callable[..., jax.Array]
    initialise: Callable[[jax.Array], tuple[Params, tuple[Any, ...]]]
    sample: Callable[[jax.Array], tuple[Any, ...]]

    def draw(self, seed: int, dtype: jax.typing.DTypeLike) -> tuple[Params, tuple[Any, ...]]:
        """Random parameters and a random batch; floating-point arrays are of the given type."""
        params_key, batch_key = jax.random.split(jax.random.key(seed))
        params, data = self.initialise(params_key)
        return _cast((params, (*data, *self.sample(batch_key))), dtype)


def _cast(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def nnx_model(
    build: Callable[[nnx.Rngs], nnx.Module],
    objective: Callable[..., jax.Array],
    sample: Callable[[jax.Array], tuple[Any, ...]],
) -> Model:
    """`objective(module, *batch)`; what is no parameter of the module is data."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def loss(params: Params, rest: Any, *batch: Any) -> jax.Array:
        # A copy, whose running statistics may be renewed within a trace.
        return objective(nnx.merge(graphdef, params, rest, copy=True), *batch)

    def initialise(key: jax.Array) -> tuple[Params, tuple[Any, ...]]:
        params, rest = nnx.state(build(nnx.Rngs(key)), nnx.Param, ...)
        return params, (rest,)

    return Model(loss, initialise, sample)


def linen_model(
    module: linen.Module,
    objective: Callable[..., jax.Array],
    sample: Callable[[jax.Array], tuple[Any, ...]],
) -> Model:
    """`objective(apply, *batch)`; the module takes what comes first in the batch."""

    def loss(params: Params, *batch: Any) -> jax.Array:
        return objective(functools.partial(module.apply, params), *batch)

    def initialise(key: jax.Array) -> tuple[Params, tuple[Any, ...]]:
        return module.init(key, *sample(key)[:1]), ()

    return Model(loss, initialise, sample)


def classify(model: Callable[[Any], jax.Array], inputs: Any, labels: jax.Array) -> jax.Array:
    return cross_entropy(model(inputs), labels)


def images(key: jax.Array) -> Batch:
    image_key, label_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (8,), 0, CLASSES)
    return jax.random.normal(image_key, (8, *IMAGE)), labels


def text(key: jax.Array) -> Batch:
    tokens = jax.random.randint(key, (8, LENGTH + 1), 0, VOCABULARY)
    return tokens[:, :-1], tokens[:, 1:]


def sequences(key: jax.Array) -> Batch:
    input_key, label_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (8,), 0, STEP_CLASSES)
    return jax.random.normal(input_key, (8, STEPS, FEATURES)), labels


# Images


def resnet_batch_norm(*, train: bool) -> Model:
    """Evaluated with the statistics of another batch."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        norm = functools.partial(nnx.BatchNorm, momentum=0.0)
        model = ResNet(RESNET_WIDTHS, CLASSES, norm, rngs=rngs)
        model.train()
        model(rngs.normal((8, *IMAGE), jnp.float32))
        model.set_attributes(use_running_average=not train)
        return model

    return nnx_model(build, classify, images)


def resnet_group_norm() -> Model:
    norm = functools.partial(nnx.GroupNorm, num_groups=2)
    return nnx_model(lambda rngs: ResNet(RESNET_WIDTHS, CLASSES, norm, rngs=rngs), classify, images)


class SelfAttention(nnx.Module):
    """Two heads of width 4. Written out: `jax.nn.dot_product_attention` leaves float64."""

    def __init__(self, rngs: nnx.Rngs):
        self.enter = nnx.List(
            nnx.LinearGeneral(WIDTH, (HEADS, WIDTH // HEADS), rngs=rngs) for _ in range(3)
        )
        self.leave = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array, *, causal: bool) -> jax.Array:
        query, key, value = (linear(x) for linear in self.enter)
        scores = jnp.einsum("bqhw,bkhw->bhqk", query, key) / query.shape[-1] ** 0.5
        if causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        return self.leave(jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores), value))


class TransformerLayer(nnx.Module):
    """Attention and an MLP with GELU, each behind LayerNorm and a residual; width 8."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = SelfAttention(rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = MLP((WIDTH, 4 * WIDTH, WIDTH), jax.nn.gelu, rngs=rngs)

    def __call__(self, x: jax.Array, *, causal: bool) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), causal=causal)
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nnx.Module):
    """Four patches and a class token, two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(IMAGE[-1], WIDTH, (4, 4), strides=4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.position = nnx.Param(0.02 * rngs.params.normal((1, 5, WIDTH)))
        self.layers = nnx.List(TransformerLayer(rngs) for _ in range(LAYERS))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images).reshape(len(images), -1, WIDTH)
        token = jnp.broadcast_to(self.token[...], (len(images), 1, WIDTH))
        x = jnp.concatenate([token, x], axis=1) + self.position[...]
        for layer in self.layers:
            x = layer(x, causal=False)
        return self.head(self.norm(x[:, 0]))


class Mixer(linen.Module):
    """MLP-Mixer: 16 patches of width 8, two layers that mix patches, then channels."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = linen.Conv(8, (2, 2), strides=2)(images).reshape(len(images), 16, 8)
        for _ in range(2):
            y = linen.LayerNorm()(x).swapaxes(1, 2)
            y = linen.Dense(16)(linen.gelu(linen.Dense(16)(y)))
            x = x + y.swapaxes(1, 2)
            y = linen.LayerNorm()(x)
            x = x + linen.Dense(8)(linen.gelu(linen.Dense(32)(y)))
        return linen.Dense(CLASSES)(linen.LayerNorm()(x).mean(axis=1))


class UNet(linen.Module):
    """Down to 4 x 4 and up again, with the larger image beside it; a class for every pixel."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        def conv(x: jax.Array, width: int) -> jax.Array:
            return linen.silu(linen.GroupNorm(2)(linen.Conv(width, (3, 3))(x)))

        large = conv(images, 6)
        small = conv(linen.max_pool(large, (2, 2), strides=(2, 2)), 8)
        up = linen.ConvTranspose(6, (2, 2), strides=(2, 2))(small)
        return linen.Conv(4, (1, 1))(conv(jnp.concatenate([up, large], axis=-1), 6))


def unet() -> Model:
    def sample(key: jax.Array) -> Batch:
        inputs, _ = images(key)
        return inputs, jax.random.randint(key, inputs.shape[:-1], 0, 4)

    return linen_model(UNet(), classify, sample)


# Text


class GPT(nnx.Module):
    """A decoder-only transformer with learned positions: two layers.

    Its layers are a list; or, to be scanned over, one layer with stacked parameters.
    """

    def __init__(
        self, *, scan: bool = False, remat: bool = False, tied: bool = False, rngs: nnx.Rngs
    ):
        def embedding(size: int) -> nnx.Param:
            return nnx.Param(rngs.params.normal((size, WIDTH)) / WIDTH**0.5)

        self.token, self.position = embedding(VOCABULARY), embedding(LENGTH)
        if scan:
            self.layers = nnx.vmap(TransformerLayer)(rngs.split(LAYERS))
        else:
            self.layers = nnx.List(TransformerLayer(rngs) for _ in range(LAYERS))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = None if tied else nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)
        self.scan, self.remat = scan, remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def apply(x: jax.Array, layer: TransformerLayer) -> jax.Array:
            return layer(x, causal=True)

        if self.remat:
            apply = nnx.remat(apply)
        x = self.token[tokens] + self.position[...]
        if self.scan:
            x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = apply(x, layer)
        x = self.norm(x)
        return x @ self.token[...].T if self.head is None else self.head(x)


def gpt(**options: bool) -> Model:
    return nnx_model(lambda rngs: GPT(**options, rngs=rngs), classify, text)


class MixtureOfExperts(nnx.Module):
    """The two best of four experts, weighted by the softmax of their scores.

    Returns the load-balancing loss of the Switch Transformer, too.
    """

    def __init__(self, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(WIDTH, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (4, WIDTH, 12)))
        self.down = nnx.Param(init(rngs.params(), (4, 12, WIDTH)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = self.router(x)
        best, chosen = lax.top_k(scores, 2)
        one_hot = jax.nn.one_hot(chosen, 4, dtype=x.dtype)
        gates = jnp.einsum("...k,...ke->...e", jax.nn.softmax(best), one_hot)
        hidden = jax.nn.silu(jnp.einsum("...i,eih->...eh", x, self.up[...]))
        outputs = jnp.einsum("...eh,ehi->...ei", hidden, self.down[...])
        used = one_hot.sum(-2).reshape(-1, 4).mean(0)
        wanted = jax.nn.softmax(scores).reshape(-1, 4).mean(0)
        return jnp.einsum("...e,...ei->...i", gates, outputs), 4 * jnp.vdot(used, wanted)


class ExpertClassifier(nnx.Module):
    """Embeddings, a mixture of experts behind LayerNorm and a residual, a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.token = nnx.Param(rngs.params.normal((VOCABULARY, WIDTH)) / WIDTH**0.5)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.experts = MixtureOfExperts(rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.token[tokens]
        y, balance = self.experts(self.norm(x))
        return self.head(x + y), balance


def mixture_of_experts() -> Model:
    def objective(model: ExpertClassifier, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits, balance = model(tokens)
        return cross_entropy(logits, labels) + 0.01 * balance

    return nnx_model(ExpertClassifier, objective, text)


# Sequences


class Recurrent(nnx.Module):
    """A recurrent layer of 12 units, and a linear layer on its last output."""

    def __init__(self, cell: Callable[..., Any], rngs: nnx.Rngs):
        # The first carry is of the type of the parameters, as they were made.
        self.rnn = nnx.RNN(cell(FEATURES, 12, param_dtype=jnp.result_type(float), rngs=rngs))
        self.head = nnx.Linear(12, STEP_CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x, rngs=nnx.Rngs(0))[:, -1])


class LinenRecurrent(linen.Module):
    """The same in Linen."""

    cell: Callable[..., Any]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(STEP_CLASSES)(linen.RNN(self.cell(12, param_dtype=x.dtype))(x)[:, -1])


class StateSpaceLayer(nnx.Module):
    """A diagonal linear recurrence of 12 states, in parallel over time; then GELU, residual.

    `s_t = exp(-r d) s_{t-1} + d B u_t`, with rates `r` and step `d` to be learnt.
    """

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.log_rate = nnx.Param(jnp.log(1.0 + jnp.arange(12.0)))
        self.log_step = nnx.Param(jnp.full(12, np.log(0.1)))
        self.enter = nnx.Linear(width, 12, use_bias=False, rngs=rngs)
        self.leave = nnx.Linear(12, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        step = jnp.exp(self.log_step[...])
        driven = step * self.enter(self.norm(x))
        decay = jnp.broadcast_to(jnp.exp(-jnp.exp(self.log_rate[...]) * step), driven.shape)

        def compose(first: Batch, then: Batch) -> Batch:
            return then[0] * first[0], then[0] * first[1] + then[1]

        _, states = lax.associative_scan(compose, (decay, driven), axis=1)
        return x + jax.nn.gelu(self.leave(states))


class StateSpaceModel(nnx.Module):
    """Two layers of width 8, the mean over time, a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.layers = nnx.List(StateSpaceLayer(8, rngs) for _ in range(2))
        self.head = nnx.Linear(8, STEP_CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=1))


# Vectors and graphs


def vectors(key: jax.Array) -> Batch:
    input_key, label_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (8,), 0, CLASSES)
    return jax.random.normal(input_key, (8, 16)), labels


class VariationalAutoencoder(nnx.Module):
    """16 bits, 4 latent variables; a hidden layer of 16 units either way."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = MLP((16, 16, 8), jnp.tanh, rngs=rngs)
        self.decoder = MLP((4, 16, 16), jnp.tanh, rngs=rngs)

    def __call__(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        """The negative evidence lower bound."""
        mean, log_variance = jnp.split(self.encoder(x), 2, axis=-1)
        logits = self.decoder(mean + jnp.exp(log_variance / 2) * noise)
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        divergence = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1) / 2
        return jnp.mean(reconstruction + divergence)


def variational_autoencoder() -> Model:
    def sample(key: jax.Array) -> Batch:
        bit_key, noise_key = jax.random.split(key)
        bits = jax.random.bernoulli(bit_key, shape=(8, 16)).astype(float)
        return bits, jax.random.normal(noise_key, (8, 4))

    return nnx_model(VariationalAutoencoder, lambda model, *batch: model(*batch), sample)


class GraphNetwork(nnx.Module):
    """Two rounds of messages along the edges, each of an MLP with 12 hidden units; width 8."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(5, 8, rngs=rngs)
        self.message = nnx.List(MLP((16, 12, 8), jax.nn.silu, rngs=rngs) for _ in range(2))
        self.update = nnx.List(MLP((16, 12, 8), jax.nn.silu, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, nodes: jax.Array, edges: jax.Array) -> jax.Array:
        source, target = edges
        h = self.embed(nodes)
        for message, update in zip(self.message, self.update, strict=True):
            messages = message(jnp.concatenate([h[source], h[target]], axis=-1))
            received = jax.ops.segment_sum(messages, target, num_segments=len(nodes))
            h = h + update(jnp.concatenate([h, received], axis=-1))
        return self.head(h)


def graph_network() -> Model:
    """Classes of 12 nodes that 30 edges connect at random."""

    def objective(model: GraphNetwork, *batch: Any) -> jax.Array:
        nodes, edges, labels = batch
        return cross_entropy(model(nodes, edges), labels)

    def sample(key: jax.Array) -> tuple[Any, ...]:
        node_key, edge_key, label_key = jax.random.split(key, 3)
        edges = jax.random.randint(edge_key, (2, 30), 0, 12)
        labels = jax.random.randint(label_key, (12,), 0, 3)
        return jax.random.normal(node_key, (12, 5)), edges, labels

    return nnx_model(GraphNetwork, objective, sample)


def info_nce(encoders: int) -> Model:
    """Two noisy views of each of 8 inputs; cosines over a temperature that is learnt, from 0.1.

    One encoder for both views, as in SimCLR, or one for each, as in CLIP.
    """

    class Encoder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.mlps = nnx.List(MLP((16, 24, 8), rngs=rngs) for _ in range(encoders))
            self.log_scale = nnx.Param(jnp.log(jnp.asarray(10.0)))

    def objective(encoder: Encoder, *views: jax.Array) -> jax.Array:
        embeddings = (encoder.mlps[i % encoders](view) for i, view in enumerate(views))
        first, second = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in embeddings)
        logits = jnp.exp(encoder.log_scale[...]) * first @ second.T
        pairs = jnp.arange(len(logits))
        return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2

    def sample(key: jax.Array) -> tuple[Any, ...]:
        centre, *noise = (jax.random.normal(k, (8, 16)) for k in jax.random.split(key, 3))
        return tuple(centre + 0.5 * n for n in noise)

    return nnx_model(Encoder, objective, sample)


def physics_informed() -> Model:
    """The heat equation, `u_t = u_xx`, at 16 points, and the initial state at 8; 2-16-16-1."""

    def objective(model: MLP, inside: jax.Array, start: jax.Array) -> jax.Array:
        def u(t: jax.Array, x: jax.Array) -> jax.Array:
            return model(jnp.stack([t, x]))[0]

        def residual(t: jax.Array, x: jax.Array) -> jax.Array:
            _, u_t = jax.jvp(lambda t: u(t, x), (t,), (jnp.ones_like(t),))
            return u_t - jax.grad(jax.grad(u, 1), 1)(t, x)

        initial = jax.vmap(u)(jnp.zeros_like(start), start) - jnp.sin(jnp.pi * start)
        return jnp.mean(jax.vmap(residual)(*inside) ** 2) + jnp.mean(initial**2)

    def sample(key: jax.Array) -> tuple[Any, ...]:
        inside_key, start_key = jax.random.split(key)
        return jax.random.uniform(inside_key, (2, 16)), jax.random.uniform(start_key, (8,))

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return MLP((2, 16, 16, 1), jnp.tanh, rngs=rngs)

    return nnx_model(build, objective, sample)


# Reinforcement learning


class Gaussian(nnx.Module):
    """A policy of two continuous actions: a tanh network for the mean, parameters for the scale."""

    def __init__(self, rngs: nnx.Rngs):
        self.mean = MLP((6, 16, 16, 2), jnp.tanh, rngs=rngs)
        self.log_std = nnx.Param(jnp.full(2, -0.5))

    def __call__(self, observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The log-probability of an action that the noise chooses, and the entropy."""
        mean, log_std = self.mean(observations), self.log_std[...]
        actions = lax.stop_gradient(mean + jnp.exp(log_std) * noise[:, :2])
        z = (actions - mean) / jnp.exp(log_std)
        log_prob = -z * z / 2 - log_std - np.log(2 * np.pi) / 2
        return log_prob.sum(-1), jnp.sum(log_std + np.log(2 * np.pi * np.e) / 2)


class Categorical(nnx.Module):
    """A policy of three discrete actions."""

    def __init__(self, rngs: nnx.Rngs):
        self.logits = MLP((6, 16, 16, 3), jnp.tanh, rngs=rngs)

    def __call__(self, observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The log-probability of an action that the noise chooses, and the entropy."""
        log_p = jax.nn.log_softmax(self.logits(observations))
        actions = jnp.argmax(log_p + noise, axis=-1, keepdims=True)
        log_prob = jnp.take_along_axis(log_p, actions, axis=-1)[:, 0]
        return log_prob, jnp.mean(jnp.sum(-jnp.exp(log_p) * log_p, axis=-1))


def ppo(policy: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Policy and value, 16 steps: clipped ratio, squared error of the value, entropy.

    The policy has moved by some 10 % since its actions were chosen.
    """

    class ActorCritic(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.policy = policy(rngs)
            self.value = MLP((6, 16, 16, 1), jnp.tanh, rngs=rngs)

    def objective(model: ActorCritic, observations: jax.Array, *batch: jax.Array) -> jax.Array:
        noise, moved, advantages, returns = batch
        log_prob, entropy = model.policy(observations, noise)
        ratio = jnp.exp(log_prob - lax.stop_gradient(log_prob) + 0.1 * moved)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        gain = jnp.minimum(ratio * advantages, clipped * advantages)
        error = model.value(observations)[:, 0] - returns
        return -gain.mean() + 0.5 * jnp.mean(error**2) - 0.01 * entropy

    def sample(key: jax.Array) -> tuple[Any, ...]:
        shapes = (16, 6), (16, 3), (16,), (16,), (16,)
        keys = jax.random.split(key, len(shapes))
        return tuple(map(jax.random.normal, keys, shapes))

    return nnx_model(ActorCritic, objective, sample)


# Other control flow, other libraries


@jax.custom_vjp
def softplus(x: jax.Array) -> jax.Array:
    """With a backward pass of its own, as kernels have."""
    return jnp.logaddexp(x, 0.0)


# A forward pass that called `softplus` would have no forward derivative, so no exact diagonal.
softplus.defvjp(lambda x: (jnp.logaddexp(x, 0.0), x), lambda x, g: (g * jax.nn.sigmoid(x),))


def custom_vjp() -> Model:
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return MLP((16, 16, 16, CLASSES), softplus, rngs=rngs)

    return nnx_model(build, classify, vectors)


def stochastic_depth() -> Model:
    """A residual MLP of four hidden layers; the batch says which of them are skipped."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return MLP((16, 16, 16, 16, 16, CLASSES), rngs=rngs)

    def objective(model: MLP, x: jax.Array, labels: jax.Array, kept: jax.Array) -> jax.Array:
        *hidden, last = model.linear
        for index, linear in enumerate(hidden):
            x = lax.cond(
                kept[index], lambda x, f=linear: x + model.activation(f(x)), lambda x: x, x
            )
        return cross_entropy(last(x), labels)

    def sample(key: jax.Array) -> tuple[Any, ...]:
        return *vectors(key), jnp.array([True, False, True, True])

    return nnx_model(build, objective, sample)


class EquinoxTransformer(eqx.Module):
    """Of one sequence: attention and an MLP behind LayerNorm and residuals, then the mean."""

    enter: eqx.nn.Linear
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.enter = eqx.nn.Linear(FEATURES, 8, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(8) for _ in range(3)]
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.mlp = eqx.nn.MLP(8, 8, 32, 1, activation=jax.nn.gelu, key=keys[2])
        self.head = eqx.nn.Linear(8, STEP_CLASSES, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.enter)(x)
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
        return self.head(jax.vmap(self.norms[2])(x).mean(axis=0))


def equinox_transformer() -> Model:
    shapes = eqx.filter_eval_shape(EquinoxTransformer, jax.random.key(0))
    _, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def loss(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), labels)

    def initialise(key: jax.Array) -> tuple[Params, tuple[Any, ...]]:
        return eqx.filter(EquinoxTransformer(key), eqx.is_inexact_array), ()

    return Model(loss, initialise, sequences)


def haiku_cnn() -> Model:
    """Two convolutions, the second behind LayerNorm, and a linear layer."""

    def forward(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(hk.Conv2D(6, 3)(x))
        x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(hk.Conv2D(8, 3, 2)(x))
        x = hk.avg_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID")
        return hk.Linear(CLASSES)(hk.Flatten()(x))

    network = hk.without_apply_rng(hk.transform(forward))

    def loss(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(network.apply(params, x), labels)

    def initialise(key: jax.Array) -> tuple[Params, tuple[Any, ...]]:
        return network.init(key, jnp.zeros((1, *IMAGE))), ()

    return Model(loss, initialise, images)


# By name, to be built when wanted.
ZOO: dict[str, Callable[[], Model]] = {
    "ResNet, BatchNorm, training": functools.partial(resnet_batch_norm, train=True),
    "ResNet, BatchNorm, evaluation": functools.partial(resnet_batch_norm, train=False),
    "ResNet, GroupNorm": resnet_group_norm,
    "U-Net": unet,
    "MLP-Mixer": functools.partial(linen_model, Mixer(), classify, images),
    "ViT": functools.partial(nnx_model, VisionTransformer, classify, images),
    "GPT": gpt,
    "GPT, scanned": functools.partial(gpt, scan=True),
    "GPT, rematerialised": functools.partial(gpt, remat=True),
    "GPT, scanned and rematerialised": functools.partial(gpt, scan=True, remat=True),
    "GPT, tied embeddings": functools.partial(gpt, tied=True),
    "mixture of experts": mixture_of_experts,
    "LSTM": functools.partial(
        nnx_model, functools.partial(Recurrent, nnx.LSTMCell), classify, sequences
    ),
    "GRU": functools.partial(
        nnx_model, functools.partial(Recurrent, nnx.GRUCell), classify, sequences
    ),
    "LSTM, Linen": functools.partial(
        linen_model, LinenRecurrent(linen.OptimizedLSTMCell), classify, sequences
    ),
    "GRU, Linen": functools.partial(
        linen_model, LinenRecurrent(linen.GRUCell), classify, sequences
    ),
    "state-space model": functools.partial(nnx_model, StateSpaceModel, classify, sequences),
    "graph network": graph_network,
    "VAE": variational_autoencoder,
    "InfoNCE, one encoder": functools.partial(info_nce, 1),
    "InfoNCE, two encoders": functools.partial(info_nce, 2),
    "physics-informed": physics_informed,
    "PPO, Gaussian": functools.partial(ppo, Gaussian),
    "PPO, categorical": functools.partial(ppo, Categorical),
    "MLP, custom_vjp": custom_vjp,
    "MLP, stochastic depth": stochastic_depth,
    "transformer, Equinox": equinox_transformer,
    "CNN, Haiku": haiku_cnn,
}
