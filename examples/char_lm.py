"""A small transformer language model in flax.nnx, on the source code of Python's standard library.

    python examples/char_lm.py --optimizer adahesscale-gn

Reads and predicts characters. The layers are scanned, so that there is one to compile however many
there are. The run leaves its curves and checkpoints in a directory, and `--resume` goes on from
there, with the numbers that it would have had without the interruption.

The lines that matter are in `train_step`: what a HesScale optimizer changes in a training loop.
"""

import argparse
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from runs import OPTIMIZERS, Curvature, Run, optimizer
from tqdm import tqdm

from hesscale_jax.nnx import value_and_hesscale

VOCABULARY = 128  # ASCII
OUTPUT = Path(__file__).parent / "out" / "char_lm"
SMOKE = {
    "steps": 100,
    "batch_size": 4,
    "sequence_length": 16,
    "width": 16,
    "heads": 2,
    "checkpoint_every": 10,
    "evaluate_every": 20,
}


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, dtype=dtype, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs),
            nnx.gelu,
            nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs),
        )

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """Reads tokens, and returns the logits of each one's successor."""

    def __init__(
        self,
        sequence_length: int,
        width: int,
        layers: int,
        heads: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, dtype, rngs)

        self.tokens = nnx.Embed(VOCABULARY, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(sequence_length, width, dtype=dtype, rngs=rngs)
        self.blocks = blocks(rngs)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.logits = nnx.Linear(width, VOCABULARY, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def blocks(block: Block, x: Array) -> Array:
            return block(x)

        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        x = blocks(self.blocks, x)
        # What Gauss-Newton takes for the loss's head, whose second derivatives it keeps.
        return checkpoint_name(self.logits(self.norm(x)), "model_output")


def cross_entropy(model: Transformer, text: Array) -> Array:
    logits = model(text[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


@nnx.jit(static_argnames="curvature")
def train_step(
    model: Transformer,
    optimizer: nnx.Optimizer,
    train_loss: nnx.metrics.Average,
    text: Array,
    curvature: Curvature | None,
) -> None:
    if curvature is None:
        value, grads = nnx.value_and_grad(cross_entropy)(model, text)
        optimizer.update(model, grads)
    else:
        transform = value_and_hesscale(cross_entropy, curvature=curvature)
        value, (grads, hess_diag) = transform(model, text)
        optimizer.update(model, grads, hess_diag=hess_diag)
    train_loss.update(values=value)


evaluate = nnx.jit(cross_entropy)


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns the text to train on and the one to validate on: every twentieth module."""
    modules = sorted(Path(os.__file__).parent.glob("[a-z]*.py"))
    texts = [m.read_text("utf-8").encode("ascii", "ignore") for m in modules]
    validation = b"".join(texts[::20])
    train = b"".join(text for i, text in enumerate(texts) if i % 20)
    return np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)


def batch(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


@nnx.jit
def next_token(model: Transformer, tokens: Array, key: Array) -> Array:
    return jax.random.categorical(key, model(tokens)[-1])


def generate(model: Transformer, prompt: np.ndarray, length: int, rngs: nnx.Rngs) -> str:
    """Goes on from a prompt that is as long as the model's sequences."""
    text = list(prompt)
    for _ in range(length):
        tokens = np.array(text[-len(prompt) :], np.int32)
        text.append(int(next_token(model, tokens, rngs())))
    return bytes(text[len(prompt) :]).decode("ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adahesscale-gn")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its highest value")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the batches")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the directory of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="only try it: a tiny model")
    if parser.parse_args().smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args()

    train_text, validation_text = load()
    length = args.sequence_length + 1  # The last character is only predicted.
    starts = np.linspace(0, len(validation_text) - length, 256, dtype=int)
    validation = batch(validation_text, starts, length)

    dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    rngs = nnx.Rngs(args.seed)
    model = Transformer(args.sequence_length, args.width, args.layers, args.heads, dtype, rngs)
    learning_rate = optax.warmup_cosine_decay_schedule(
        0, args.learning_rate, args.steps // 20, args.steps
    )
    tx, curvature = optimizer(args.optimizer, learning_rate)
    nodes = (model, nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.metrics.Average())
    *_, train_loss = nodes

    with (
        Run(args.output, args.resume) as run,
        tqdm(initial=run.step, total=args.steps, unit="step") as progress,
    ):
        nnx.update(nodes, run.restore(nnx.state(nodes)))
        for step in range(run.step + 1, args.steps + 1):
            # Drawn from the step alone, so that a resumed run goes on with the batches due.
            rng = np.random.default_rng([args.seed, step])
            starts = rng.integers(len(train_text) - length, size=args.batch_size)
            train_step(*nodes, batch(train_text, starts, length), curvature)
            if step % args.evaluate_every == 0 or step == args.steps:
                losses = {
                    "train_loss": float(train_loss.compute()),
                    "validation_loss": float(evaluate(model, validation)),
                }
                train_loss.reset()
                run.record(step, **losses)
                progress.set_postfix(losses)
            if step % args.checkpoint_every == 0 or step == args.steps:
                run.save(step, nnx.state(nodes))
            progress.update()
        run.draw()

    bits = float(evaluate(model, validation)) / math.log(2)
    print(generate(model, validation[0, :-1], 300, rngs))
    print(f"Validation loss: {bits:.3f} bits per character")
    print(f"The curves and the checkpoints are in {args.output}")


if __name__ == "__main__":
    main()
