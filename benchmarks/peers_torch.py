"""BackPACK's diagonals and Kronecker factors, in PyTorch, of the networks that it can do.

They are compared with forward and backward passes of the same network, batch and type in PyTorch.
Of the models here, BackPACK 1.7 has what MLPs with ReLU or tanh and the 3C3D network are made of,
and neither GELU nor LayerNorm, nor attention.
"""

import functools
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

# Threads that wait must not spin while others are timed. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import backpack
import jax
import jax.numpy as jnp
import numpy as np
import torch
from backpack import extensions
from models import MLP, Activation, Task, ThreeConvThreeDense
from timing import TORCH_BASELINE, Maker, Program
from torch import nn

EXTENSIONS = {
    f"{extension.__name__}, BackPACK": extension
    for extension in (
        extensions.DiagHessian,
        extensions.DiagGGNExact,
        extensions.DiagGGNMC,
        extensions.KFAC,
    )
}

_ACTIVATIONS = {jax.nn.relu: nn.ReLU, jnp.tanh: nn.Tanh}

warnings.filterwarnings("ignore", message="Full backward hook is firing")


def methods(task: Task, dtype: str) -> dict[str, Maker]:
    """None where BackPACK does not have the layers."""
    if not list(_layers(task)):
        return {}
    chosen: dict[str, Any] = {TORCH_BASELINE: None, **EXTENSIONS}
    return {name: functools.partial(_program, task, dtype, e) for name, e in chosen.items()}


def _program(task: Task, dtype: str, extension: Any) -> Program:
    """Raises NotImplementedError if the extension does not have a layer."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    _, (_, inputs, labels) = task.draw(0, jnp.float32)
    x = torch.tensor(np.asarray(inputs), dtype=getattr(torch, dtype), device=device)
    y = torch.tensor(np.asarray(labels), dtype=torch.long, device=device)
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    network, loss = nn.Sequential(*_layers(task)).to(x), nn.CrossEntropyLoss()
    extensions = []
    if extension is not None:
        network, loss = backpack.extend(network), backpack.extend(loss)
        extensions.append(extension())

    def call() -> torch.Tensor:
        network.zero_grad()
        value = loss(network(x), y)
        with backpack.backpack(*extensions):
            value.backward()
        return value

    call()
    return Program([call], baseline=TORCH_BASELINE, wait=_wait)


def _layers(task: Task) -> Iterator[nn.Module]:
    """Those of the same network, or none."""
    model = task.model
    if model.func is MLP and not model.keywords and model.args[1] in _ACTIVATIONS:
        yield from _mlp(*model.args)
    elif model.func is ThreeConvThreeDense and model.args[1] in _ACTIVATIONS:
        classes, activation = model.args
        for shape, padding in [((3, 64, 5), 0), ((64, 96, 3), 0), ((96, 128, 3), 1)]:
            yield nn.Conv2d(*shape, padding=padding)
            yield _ACTIVATIONS[activation]()
            yield nn.MaxPool2d(3, 2, ceil_mode=True)
        yield nn.Flatten()
        yield from _mlp((3 * 3 * 128, 512, 256, classes), activation)


def _mlp(widths: Sequence[int], activation: Activation) -> Iterator[nn.Module]:
    for index, (m, n) in enumerate(itertools.pairwise(widths)):
        if index:
            yield _ACTIVATIONS[activation]()
        yield nn.Linear(m, n)


def _wait(value: torch.Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize()
