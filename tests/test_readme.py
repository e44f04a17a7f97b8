"""The code in the README runs, in order, as a reader would paste it."""

import re
from pathlib import Path

import jax
import numpy as np
from cases import normal

README = Path(__file__).parent.parent / "README.md"


def test_code_blocks_run_and_the_loss_falls():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    names = {
        "params": {"hidden": normal(5, 8), "out": normal(8, 3, seed=1)},
        "x": normal(20, 5, seed=2),
        "labels": np.arange(20) % 3,
    }
    names = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, names)
    first, *others = (compile(block, README, "exec") for block in blocks)
    exec(first, names)
    params, state = names["params"], names["optimizer"].init(names["params"])
    losses = []
    for _ in range(50):
        params, state, value = names["step"](params, state, names["x"], names["labels"])
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]

    with jax.numpy_dtype_promotion("standard"):  # Flax needs it, and it is what a reader has.
        for block in others:
            exec(block, names)
    names["optimizer"].init(params)
    assert names["hess_diag"]["out"].shape == (8, 3)
