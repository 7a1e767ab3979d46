"""What tests of whole runs share."""

import json
from pathlib import Path


def state(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "state.json").read_text())


def converted(linearize, *arguments) -> str:
    result = linearize("convert", *arguments)
    assert result.code == 0, result.stderr
    return result.stdout
