"""A run on two processes is the run on one: same losses, same results, nothing lost when one of them dies."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed

from linearize.convert import processes
from linearize.convert.launch import command

from .ranks import is_running
from .runs import ON_GPUS, TWO_PROCESSES, assert_same_training, converted, state

pytestmark = TWO_PROCESSES
TRAINING = {"batch_size": 4, "length": 64, "save_every": 2, "lr": 1e-2}
SECTIONS = {
    "transfer": {"steps": 6, **TRAINING},
    "finetune": {"steps": 6, **TRAINING, "distill": 0.5},
    "medusa": {"steps": 4, "heads": 2, **TRAINING},
    "evaluate": {"tokens": 256, "lengths": [128], "copying": {"texts": 2, "length": 32}, "tuned_teacher": True},
    "export": {},
}
# The other stages share nothing.
SHORT = ["medusa=null", "evaluate=null", "export=null"]


def start(*arguments, environment=None) -> subprocess.Popen:
    """`linearize` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "linearize.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What it says: its output, or, where it is to fail, its one sentence."""
    out, err = process.communicate()
    assert process.returncode == code, err
    if code:
        assert err.startswith("linearize: ") and len(err.strip().splitlines()) == 1, err
    return err if code else out


def assert_same_run(one: Path, other: Path, *stages: str) -> None:
    for stage in ("transfer", "finetune", *stages):
        assert_same_training(one, other, stage)


@pytest.fixture(scope="module")
def single(linearize, tiny_model, tmp_path_factory):
    """(A recipe's path, the run of one process)."""
    directory = tmp_path_factory.mktemp("single")
    path = directory / "recipe.yaml"
    data = {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}}
    attention = {"preset": "augmented", "window_size": 16, "sinks": 2, "conv_taps": 4, "slack": 8}
    content = {"name": "tiny", "output": str(directory / "run"), "model": {"source": str(tiny_model), "license": "mit"}}
    path.write_text(yaml.safe_dump(content | {"attention": attention, "data": data} | SECTIONS))
    converted(linearize, path, "--launch", "none")
    return path, directory / "run"


# On CPUs both launchers start processes alike.
@pytest.mark.parametrize("launcher", ["auto", "deepspeed"] if ON_GPUS else ["auto"])
def test_two_processes_do_what_one_does(single, tmp_path, launcher):
    path, one = single
    out = finish(start("convert", path, "--launch", launcher, "--gpus", 2, "--out", tmp_path / "run"))
    assert len(re.findall("done in", out)) == 7, "one process speaks, of each stage"
    assert_same_run(one, tmp_path / "run", "medusa")
    found, expected = (state(run, "evaluate")["metrics"]["models"] for run in (tmp_path / "run", one))
    for name, figures in expected.items():
        perplexity = figures["text"]["128"]["perplexity"]
        close = pytest.approx(perplexity, rel=1e-2 if ON_GPUS else 1e-4)
        assert found[name]["text"]["128"]["perplexity"] == close, name


def test_two_processes_learn_chunk_by_chunk_and_block_by_block(ranks, single, tmp_path):
    """By the exact gradient, as if at once."""
    path, one = single
    parts = ["finetune.chunk=32", "transfer.blocks_at_once=1", "transfer.micro_batch_size=1"]
    ranks.finish(2, "convert", path, *SHORT, *parts, "--out", tmp_path / "run")
    assert_same_run(one, tmp_path / "run")


def test_work_is_shared_out(monkeypatch):
    work, count = [*range(5)], {"is_initialized": True, "get_world_size": 2}
    assert processes.share(work) == work
    for name, value in count.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(processes.share(work))
    assert shares == [[0, 2, 4], [1, 3]]


def test_a_launchers_own_environment_is_used(single, tmp_path):
    path, _ = single
    arguments = ["convert", str(path), "--out", str(tmp_path / "run"), "--only", "load"]
    subprocess.run(command("accelerate", 2, arguments), check=True, capture_output=True)
    assert state(tmp_path / "run", "load")["status"] == "done"


def workers(parent: int) -> dict[str, int]:
    """RANK -> process id of those that descend from `parent`."""
    found, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != parent:
            ancestor = parents[ancestor]
        if ancestor == parent:
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().decode()
            except OSError:
                continue
            if rank := re.search(r"(?:^|\0)RANK=(\d+)", variables):
                found[rank[1]] = pid
    return found


def with_checkpoint(process: subprocess.Popen, directory: Path) -> None:
    """Waits until a stage has one."""
    while process.poll() is None and not list((directory / "checkpoints").glob("checkpoint-*")):
        time.sleep(0.02)


@pytest.mark.parametrize(("stage", "changes"), [("finetune", []), ("transfer", ["transfer.teacher=zero3"])])
def test_a_process_that_dies_loses_nothing(ranks, single, tmp_path, stage, changes):
    path, one = single
    run = tmp_path / "run"
    process = start("convert", path, *SHORT, *changes, "--gpus", 2, "--out", run)
    with_checkpoint(process, run / stage)
    os.kill(workers(process.pid)["1"], signal.SIGKILL)
    assert "a process ended before its work was done" in finish(process, 2)
    assert state(run, stage)["status"] == "running"
    ranks.finish(2, "convert", path, *SHORT, *changes, "--out", run, "--resume")
    assert_same_run(one, run)


def test_another_number_of_processes_goes_on(linearize, single, tmp_path):
    """What two have begun, one finishes."""
    path, one = single
    run = tmp_path / "run"
    process = start("convert", path, *SHORT, "--gpus", 2, "--out", run)
    with_checkpoint(process, run / "transfer")
    process.terminate()
    assert "--resume goes on" in finish(process, 2)
    converted(linearize, path, *SHORT, "--launch", "none", "--out", run, "--resume")
    assert_same_run(one, run)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not told")
def test_no_process_goes_on_without_who_launched_it(ranks, single, tmp_path):
    """It would write what a resumed run goes on from."""
    path, one = single
    run = tmp_path / "run"
    process = start("convert", path, *SHORT, "--gpus", 2, "--out", run)
    with_checkpoint(process, run / "transfer")
    left = workers(process.pid).values()
    process.kill()
    process.communicate()
    while any(map(is_running, left)):
        time.sleep(0.02)
    # The launcher ends them, who may have come to the end of a short stage by then.
    assert not (run / "finetune").exists(), "they went on"
    ranks.finish(2, "convert", path, *SHORT, "--out", run, "--resume")
    assert_same_run(one, run)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--launch", "mpi"], "--launch mpi: expected auto, none, accelerate, deepspeed"),
        (["--launch", "none", "--gpus", 2], "--launch none: runs as one process, not as --gpus 2"),
        (["--gpus", 3], "transfer.batch_size: 3 processes cannot share the 4 sequences of a step; use")
        if not ON_GPUS
        else (["--gpus", 99], "--gpus 99: this machine has "),
    ],
)
def test_what_cannot_be_launched(linearize, single, tmp_path, arguments, sentence):
    path, _ = single
    result = linearize("convert", path, "--out", tmp_path / "run", *arguments)
    assert result.code == 2 and result.stderr.startswith(f"linearize: {sentence}")
    assert not (tmp_path / "run").exists()


def test_half_of_a_launchers_environment(single, tmp_path):
    process = start("convert", single[0], "--out", tmp_path / "run", environment={"RANK": "0", "WORLD_SIZE": "2"})
    assert "RANK is set, as a launcher sets it, but not LOCAL_RANK, MASTER_ADDR" in finish(process, 2)
    assert not (tmp_path / "run").exists()


def test_what_all_processes_find_the_first_one_says(ranks, single, tmp_path):
    path, _ = single
    run = ranks.start(2, "convert", path, "finetune.lr=1e30", "--out", tmp_path / "run")
    assert run.wait() == [2, 2]
    assert "linearize: finetune: the loss of step" in run.text(0) and "linearize: " not in run.text(1)


def test_what_one_process_finds_is_said(single, tmp_path):
    """By whoever has launched it, though it is not the first one."""
    path, _ = single
    run = tmp_path / "run"
    process = start("convert", path, *SHORT, "--gpus", 2, "--out", run)
    with_checkpoint(process, run / "transfer")
    resource.prlimit(workers(process.pid)["1"], resource.RLIMIT_FSIZE, (1024, 1024))
    assert f"linearize: {run}: cannot be written" in finish(process, 2)


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_launcher_leaves_the_arguments_alone(launcher, monkeypatch):
    """As on GPUs, though this machine may have none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = ["convert", "r.yaml", "seed=1", "--gpus", "2", "--launch", launcher, "--out", "run", "--only", "load"]
    asked += ["--from", "install", "--resume"]
    words = command(launcher, 2, asked)[3:]
    if launcher == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(words)
        assert found.training_script == "linearize.cli" and found.training_script_args == asked
    else:
        from deepspeed.launcher.runner import parse_args

        found = parse_args(words)
        assert found.user_script == "linearize.cli" and found.user_args == asked
        # What it would put in front of them.
        assert found.no_local_rank
    assert found.module
