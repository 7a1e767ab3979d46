"""What tests of whole runs share."""

import json
import time
from pathlib import Path

from safetensors.torch import load_file

from .ranks import Run


def state(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "state.json").read_text())


def converted(linearize, *arguments) -> str:
    result = linearize("convert", *arguments)
    assert result.code == 0, result.stderr
    return result.stdout


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
