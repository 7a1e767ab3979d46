"""Whatever ends a run, what it had done is kept, and going on with it comes to what it would have come to."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from .ranks import Ranks, Run
from .runs import LOCAL_STAGES, ON_GPUS, TWO_PROCESSES, assert_same_results, state, until

pytestmark = TWO_PROCESSES
TRAINING = {"batch_size": 2, "length": 32, "save_every": 1, "lr": 1e-2}
# Kills of each stage; processes with a GPU are slow to start.
KILLS = 1 if ON_GPUS else 3


@pytest.fixture(scope="module")
def path(tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    content = {
        "name": "tiny",
        "output": str(directory / "run"),
        "model": {"source": str(tiny_model), "license": "mit"},
        "attention": {"preset": "augmented", "window_size": 8, "sinks": 2, "conv_taps": 4, "slack": 8},
        "data": {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}},
        "transfer": {"steps": 5, **TRAINING},
        "finetune": {"steps": 5, **TRAINING, "deepspeed": "zero2"},
        "medusa": {"steps": 4, "heads": 2, "own_text": 64, **TRAINING},
        "evaluate": {"tokens": 256, "lengths": [128], "copying": {"texts": 2, "length": 32}},
        "export": {},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def begun(run: Run) -> list[str]:
    """The stages that a run has begun."""
    return [line for line in run.text().splitlines() if line in LOCAL_STAGES]


def test_killed_anywhere_and_resumed_is_uninterrupted(ranks: Ranks, path, tmp_path):
    """By SIGTERM or SIGKILL, of one process or both, in each stage, at random times."""
    seed = int(os.environ.get("LINEARIZE_SEED") or random.randrange(2**32))
    print(f"LINEARIZE_SEED={seed}")
    choice = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = {}
    run = ranks.start(2, "convert", path, "--out", whole)
    for stage in LOCAL_STAGES:
        until(run, lambda stage=stage: stage in begun(run))
        began[stage] = time.monotonic()
    assert run.wait() == [0, 0], run.text()
    ends = [*list(began.values())[1:], time.monotonic()]
    seconds = {stage: end - begin for (stage, begin), end in zip(began.items(), ends, strict=True)}

    kills, printed = Counter(), ""
    while missing := [stage for stage in LOCAL_STAGES if kills[stage] < KILLS]:
        stage = missing[0]
        done = (killed / stage / "state.json").is_file() and state(killed, stage)["status"] == "done"
        run = ranks.start(2, "convert", path, "--out", killed, *(["--from", stage] if done else ["--resume"]))
        until(run, lambda run=run, stage=stage: stage in begun(run))
        end = time.monotonic() + choice.uniform(0, seconds[stage])
        until(run, lambda end=end: time.monotonic() >= end)
        numbers = choice.choice([(1, 0), (0, 1), (1, 1)])
        signals = [choice.choice([signal.SIGTERM, signal.SIGKILL]) if number else None for number in numbers]
        last = begun(run)[-1]
        codes = run.kill(*signals)
        if codes != [0, 0]:
            assert any(number and code == -number for number, code in zip(signals, codes, strict=True)), run.text()
            kills[last] += 1
        printed += run.text()
    printed += ranks.finish(2, "convert", path, "--out", killed, "--resume")
    assert "is damaged" not in printed
    assert_same_results(whole, killed)
