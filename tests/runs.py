"""What tests of whole runs share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


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
