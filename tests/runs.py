"""What tests of whole runs share."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linearize.convert.context import STAGES
from linearize.recipes.schema import DEEPSPEED

from .ranks import Run

# Those that need no Hub.
LOCAL_STAGES = tuple(stage for stage in STAGES if stage != "push")


def state(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "state.json").read_text())


# A tiny model on two processes is tested with gloo here, and with NCCL where there are two GPUs.
TWO_PROCESSES = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes want two GPUs, or none")
ON_GPUS = torch.cuda.is_available()

# What training leaves in `state.json`; how the last step went in each layer is not known where there was none left.
FIGURES = ("loss", "loss_of_layer", "error_of_head")


def converted(linearize, *arguments) -> str:
    result = linearize("convert", *arguments)
    assert result.code == 0, result.stderr
    return result.stdout


def assert_same_training(one: Path, other: Path, stage: str) -> None:
    """Sums in other orders differ in single precision, and Adam's first steps are signs of gradients. On GPUs, where
    factors are rounded to the 11 bits of tf32, signs of small ones are anything, and losses alone are compared."""
    metrics = [state(run, stage)["metrics"] for run in (one, other)]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-3 if ON_GPUS else 1e-4), (other, stage)
    if ON_GPUS:
        return
    for name in FIGURES[1:] if stage == "transfer" else ():
        assert metrics[0][name].keys() == metrics[1][name].keys() != set()
        for layer, values in metrics[0][name].items():
            assert values == pytest.approx(metrics[1][name][layer], rel=1e-3), (other, name, layer)
    weights = [load_file(run / stage / "weights.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


def small_parts(deepspeed: str, directory: Path) -> Path:
    """A shipped configuration with which ZeRO-3 does not leave the tiny model's parameters whole, written there."""
    configuration = json.loads((DEEPSPEED / f"{deepspeed}.json").read_text())
    configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / f"{deepspeed}.json"
    path.write_text(json.dumps(configuration))
    return path


def until(run: Run, condition) -> None:
    """Waits until it holds, or the run has ended."""
    while not condition() and not run.has_ended():
        time.sleep(0.002)


def results(run: Path) -> dict:
    """What a run comes to: losses and figures by stage, and every tensor that it has saved. The draft tree is not among
    them, which follows from how long a step takes on the machine."""
    found = {}
    for file in run.glob("*/state.json"):
        metrics = json.loads(file.read_text())["metrics"]
        found[file.parent.name] = {name: metrics[name] for name in FIGURES if name in metrics}
    found |= {file.name: json.loads(file.read_text()) for file in run.glob("evaluate/results.json")}
    for file in run.rglob("*.safetensors"):
        tensors = {name: tensor.tolist() for name, tensor in load_file(file).items()}
        found[str(file.relative_to(run))] = tensors
    return found


def assert_same_results(one: Path, other: Path) -> None:
    """To the bit; on GPUs, whose sums are in no fixed order, as `assert_same_training` has it."""
    if not ON_GPUS:
        assert results(one) == results(other)
        return
    found = [results(run) for run in (one, other)]
    assert found[0].keys() == found[1].keys()
    for stage, metrics in found[0].items():
        if "loss" in metrics:
            assert_same_training(one, other, stage)
