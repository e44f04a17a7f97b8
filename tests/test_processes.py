"""Two processes with four devices each train as one process with one device does."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import processes
import pytest
from cases import assert_close
from jax.sharding import SingleDeviceSharding
from jaxlib import _jax
from processes import HALF, INPUTS, LABELS, LAYOUTS, MESH, PARAMS, STEPS

import hesscale_jax.optimizers

ROOT = Path(__file__).parents[1]
CHILD = {  # What a process is told; of two flags for one thing, the last holds.
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={MESH[1]}",
}
OPTIMIZERS = [
    "adahesscale",
    "diagonal_newton",
    "hess_diag_as_estimator",
    "orthogonal_newton",
    "scaled_adahesscale",
    "scaled_adam",
]
SECONDS = 300  # Far more than they take. Then they are ended, as one may wait for the other.

# The entries of each parameter's gradient on a device, before what is sharded by rows is cut.
GRADIENTS = {"fully sharded": [8, 96, 12, 72], "tensor parallel": [8, 48, 6, 36]}
# Those of the cotangents inside the model that are sums over devices.
COTANGENTS = {"fully sharded": [], "tensor parallel": [32]}

needs_gloo = pytest.mark.skipif(
    not hasattr(_jax, "make_gloo_tcp_collectives"),
    reason="this jaxlib is built without gloo, by which CPU processes talk to each other",
)


@needs_gloo
@pytest.mark.parametrize(
    "names",
    [OPTIMIZERS[:1], pytest.param(OPTIMIZERS, marks=pytest.mark.slow)],
    ids=["the first optimizer", "all optimizers"],
)
def test_two_processes_do_what_one_does(names, tmp_path):
    address = free_address()
    command = [sys.executable, processes.__file__, address]
    commands = [[*command, str(number), str(tmp_path), *names] for number in range(2)]
    in_float64 = {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    run_both(tmp_path, commands, [os.environ | CHILD | in_float64] * 2)
    with jax.numpy_dtype_promotion("standard"):  # Sophia's own arithmetic needs it.
        here = SingleDeviceSharding(jax.devices()[0])
        trained = processes.start(names, jax.device_put(PARAMS, here), here)
        batch = jax.device_put((INPUTS, LABELS), here)
        train = processes.trainer(processes.loss, jax.tree.map(lambda _: here, trained))
        expected = train(trained, batch, range(STEPS))
        for layout in LAYOUTS:
            halfway, end = (
                ocp.StandardCheckpointer().restore(tmp_path / layout / str(steps), expected)
                for steps in (HALF, STEPS)
            )
            assert_close(end, expected)
            assert_close(train(halfway, batch, range(HALF, STEPS)), expected)
    for number in range(2):
        counts = json.loads((tmp_path / f"{number}.json").read_text())
        for layout, (gradient, both) in counts.items():
            again = Counter(f"all-reduce of {n}" for n in GRADIENTS[layout] + COTANGENTS[layout])
            assert again <= Counter(gradient)
            assert Counter(both) - Counter(gradient) == again


@needs_gloo
@pytest.mark.slow
def test_the_page_trains_in_two_processes_and_goes_on_in_one(tmp_path):
    page = (ROOT / "docs/how-to/more-than-one-machine.md").read_text()
    (tmp_path / "train.py").write_text(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1])
    own = os.environ | {"PYTHONPATH": str(ROOT), "CHECKPOINTS": str(tmp_path / "run")}
    command = [sys.executable, str(tmp_path / "train.py")]
    address = free_address()
    two = {"COORDINATOR": address, "MACHINES": "2", "STEPS": "20"} | CHILD
    run_both(tmp_path, [command] * 2, [own | two | {"MACHINE": str(number)} for number in range(2)])
    assert "steps 0 to 20" in logs(tmp_path)
    printed = subprocess.run(command, env=own, capture_output=True, text=True, timeout=SECONDS)
    assert printed.stdout == "steps 20 to 40, loss below 1: True\n", printed.stderr


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def run_both(folder, commands, environments):
    """Runs two commands at once, and neither for longer than the other if that fails."""
    with contextlib.ExitStack() as stack:
        children = []
        for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            log = stack.enter_context((folder / f"{number}.log").open("w"))
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(child.kill)
            children.append(child)
        start = time.monotonic()
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            assert time.monotonic() - start < SECONDS, logs(folder)
            time.sleep(0.1)
    assert not any(codes), logs(folder)


def logs(folder):
    return "\n".join((folder / f"{number}.log").read_text() for number in range(2))


def test_no_optimizer_is_left_out():
    public = hesscale_jax.optimizers.__all__
    assert set(OPTIMIZERS) == {name for name in public if not re.match("scale_by|ScaleBy", name)}
