"""The benchmarks that are for other machines than the tests', at sizes that these can do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

import on_paper

REPOSITORY = Path(__file__).parents[1]


def run(*arguments):
    for package in ("haiku", "matplotlib"):
        pytest.importorskip(package)
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY / "benchmarks",
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def test_cost_on_a_gpu(tmp_path):
    options = ["--gpu", "--quick", "--small", "--seconds", "1e-3", "--rounds", "2"]
    run("cost.py", *options, "--methods", "HesScaleGN", "--output", tmp_path / "cost")
    results = json.loads((tmp_path / "cost.json").read_text())["results"]
    assert list(results) == [
        "mlp-4096-relu",
        "mlp-4096-relu, bfloat16",
        "gpt2-small-scanned",
        "gpt2-small-scanned, bfloat16",
        "resnet-18-256, bfloat16",
    ]
    for result in results.values():
        assert list(result["methods"]) == ["value_and_grad", "HesScaleGN"]
        for summary in result["methods"].values():
            assert summary["ratio"] > 0
            assert summary["temporary_memory_ratio"] > 0


def test_bytes_sent_on_paper():
    program = """
  %a = bf16[8,6]{1,0} all-gather(%w), channel_id=1, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
  %b = f32[10]{0} all-reduce(%g), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %c = f32[10]{0} all-reduce(%h), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %d = f32[7]{0} collective-permute(%i), channel_id=2, source_target_pairs={{0,1},{1,0}}
"""  # noqa: E501
    # Three quarters of what four share; what two add up, twice by halves; all of what is moved.
    over_data, over_model = 3 / 4 * (2 * 48 + 4 * 10), 2 * 1 / 2 * 4 * 10 + 4 * 7
    assert on_paper.sent(program, 4) == {"sent_data": over_data, "sent_model": over_model}


@pytest.mark.slow
def test_layers_on_paper_are_in_proportion(tmp_path):
    """What is concluded from one layer and two is what four that are written out have."""
    code = """
import json, sys
from pathlib import Path
import on_paper
model = on_paper.GPT(4, width=64, heads=4, parallel=2, vocabulary=96, length=32)
method, dumps = "AdaHesScale", Path(sys.argv[1])
concluded = on_paper.of_whole(model, method, dumps)
print(json.dumps([concluded, on_paper.counted(model, method, scan=False, dumps=dumps)]))
"""
    environment = on_paper.environment_of(8, str(tmp_path))
    environment["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"
    printed = subprocess.check_output([sys.executable, "-c", code, tmp_path], env=environment)
    concluded, counted = json.loads(printed)
    for key in ("sent_data", "sent_model"):
        assert concluded[key] == pytest.approx(
            counted[key], rel=1e-3
        )  # but for flags of finiteness
    # Fusions differ a little with the number of layers.
    assert concluded["flops"] == pytest.approx(counted["flops"], rel=0.01)
    assert concluded["bytes_accessed"] == pytest.approx(counted["bytes_accessed"], rel=0.05)
