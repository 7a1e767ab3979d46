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


def converted(linearize, *arguments) -> str:
    result = linearize("convert", *arguments)
    assert result.code == 0, result.stderr
    return result.stdout


def assert_same_training(one: Path, other: Path, stage: str) -> None:
    """Sums in other orders differ in single precision, and Adam's first steps are signs of gradients."""
    losses = [state(run, stage)["metrics"]["loss"] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), (other, stage)
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
    found = {file.parent.name: json.loads(file.read_text())["metrics"].get("loss") for file in run.glob("*/state.json")}
    found |= {file.name: json.loads(file.read_text()) for file in run.glob("evaluate/results.json")}
    for file in run.rglob("*.safetensors"):
        tensors = {name: tensor.tolist() for name, tensor in load_file(file).items()}
        found[str(file.relative_to(run))] = tensors
    return found
