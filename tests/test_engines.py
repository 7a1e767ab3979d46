"""One process, several, ZeRO-2 and ZeRO-3 train alike in bfloat16: masters in fp32, and checkpoints to go on from."""

import io
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from linearize.convert import checkpoints, finetune
from linearize.recipes.loader import load_recipe

from .runs import TWO_PROCESSES, assert_same_results, converted, small_parts, state, until

pytestmark = TWO_PROCESSES
# Engine -> (processes, DeepSpeed configuration).
ENGINES = {"one process": (1, None), "two processes": (2, None), "zero2": (2, "zero2"), "zero3": (2, "zero3")}
STEPS = 6
# Of a recipe for large models, which are loaded in bfloat16.
RATES = load_recipe("lora")


@pytest.fixture(scope="module")
def transferred(ranks, tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """(A recipe, a run of it in which all but stage finetune is done.)"""
    directory = tmp_path_factory.mktemp("transferred")
    training = {"steps": STEPS, "batch_size": 2, "length": 32, "save_every": 1, "schedule": "constant", "bf16": True}
    content = {
        "output": str(directory / "run"),
        "model": {"source": str(tiny_model), "dtype": "bfloat16"},
        "attention": {"preset": "augmented", "window_size": 8, "sinks": 2, "conv_taps": 4, "slack": 8},
        "data": {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}},
        "transfer": {**training, "lr": RATES.transfer.lr},
        "finetune": {**training, "lr": RATES.finetune.lr, "distill": 0.5},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    ranks.finish(1, "convert", path, "finetune=null")
    return path, directory / "run"


@dataclass
class Engine:
    """Runs that one has done of stage finetune.

    Attributes:
        count: of processes.
        deepspeed: its configuration, or None.
        arguments: of a run but for its directory.
        whole: a run.
        interrupted: one that was killed behind its third checkpoint.
    """

    count: int
    deepspeed: Path | None
    arguments: list
    whole: Path
    interrupted: Path

    @property
    def checkpoints(self) -> list[Path]:
        """The two newest ones of the interrupted run, the last one first."""
        return sorted((self.interrupted / "finetune" / "checkpoints").glob("checkpoint-*"), reverse=True)[:2]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, ranks, transferred, tmp_path_factory) -> Engine:
    (path, before), (count, deepspeed) = transferred, ENGINES[request.param]
    directory = tmp_path_factory.mktemp("engine")
    if deepspeed:
        deepspeed = small_parts(deepspeed, directory)
    arguments = ["convert", path, f"finetune.deepspeed={deepspeed or 'null'}", "--out"]
    made = Engine(count, deepspeed, arguments, directory / "whole", directory / "interrupted")
    for run in (made.whole, made.interrupted):
        shutil.copytree(before, run)
    ranks.finish(count, *arguments, made.whole)
    # It may be faster than whoever kills it.
    while not made.checkpoints or made.checkpoints[0].name == f"checkpoint-{STEPS}":
        run = ranks.start(count, *arguments, made.interrupted, "--from", "finetune")
        until(run, (made.interrupted / "finetune" / "checkpoints" / "checkpoint-3").is_dir)
        run.kill(*[signal.SIGKILL] * count)
    return made


def test_damage_is_found_in_every_file(engine):
    """Truncated, garbled or missing; then the checkpoint before it is taken."""
    newest, before = engine.checkpoints
    console = Console(file=io.StringIO())
    for file in [file for file in newest.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            file.write_bytes(damaged)
            assert checkpoints.newest(newest.parent, console) == before, file
        file.unlink()
        assert checkpoints.newest(newest.parent, console) == before, file
        file.write_bytes(content)
    assert checkpoints.newest(newest.parent, console) == newest


def test_a_full_disk_and_a_damaged_checkpoint_lose_nothing(ranks, engine, tmp_path):
    """The run is the one that was not interrupted, to the bit."""
    run, (newest, before) = tmp_path / "run", engine.checkpoints
    shutil.copytree(engine.interrupted, run)
    # What the last process writes does not fit; it may be the only one that finds so.
    last = engine.count - 1
    pattern = f"*_rank_{last}_*optim_states.pt" if engine.deepspeed else f"rng_state{f'_{last}' if last else ''}.pth"
    size = next(newest.rglob(pattern)).stat().st_size
    resumed = ranks.start(engine.count, *engine.arguments, run, "--resume", limits={last: size - 1})
    codes, said = resumed.wait(), resumed.text(last)
    assert codes[last] == 2 and "Traceback" not in said
    reason = "(File too large|torch could not write a file to its end)"
    advice = "make room, and --resume goes on from what was saved before"
    assert re.fullmatch(rf"linearize: {run}: cannot be written \({reason}\); {advice}", said.splitlines()[-1]), said

    checkpoint = run / "finetune" / "checkpoints" / newest.name
    # It had gone on from there.
    assert [path.name for path in (checkpoint.parent / "part").iterdir()] == [f"checkpoint-{int(newest.name[-1]) + 1}"]
    assert checkpoints.newest(checkpoint.parent, Console(file=io.StringIO())) == checkpoint
    (checkpoint / "trainer_state.json").write_text("{}")
    printed = ranks.finish(engine.count, *engine.arguments, run, "--resume")
    assert f"{checkpoint}: trainer_state.json is damaged; going on from {before.name}\n" in printed
    assert_same_results(run, engine.whole)


def test_another_number_of_processes_goes_on_or_is_refused(ranks, engine, tmp_path):
    run, other = tmp_path / "run", 3 - engine.count
    shutil.copytree(engine.interrupted, run)
    resumed = ranks.start(other, *engine.arguments, run, "--resume")
    codes = resumed.wait()
    if engine.deepspeed is None:
        assert codes == [0] * other, resumed.text()
        losses = [state(directory, "finetune")["metrics"]["loss"] for directory in (run, engine.whole)]
        # Sums in other orders differ in the 8 bits of bfloat16.
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    else:
        newest, *_ = engine.checkpoints
        assert codes == [2] and resumed.text().splitlines()[-1] == (
            f"linearize: finetune: {newest.name} is of 2 processes, and DeepSpeed's parts of it fit no other number, 1 "
            "for one; use --gpus 2, or --from finetune to start again"
        )
        before, after = ({file.name for file in d.rglob("*")} for d in (engine.interrupted, run))
        assert before == after


def updates_are_kept(run: Path, stage: str, before: str, lr: float) -> bool:
    """Whether every number of the attention layers has moved, by what Adam's steps may come to, and none is rounded."""
    old, new = (load_file(run / name / "weights.safetensors") for name in (before, stage))
    # Adapters put the model's names behind a prefix.
    names = {name: name[name.index("model.layers.") :] for name in new if ".linear_attention." in name}
    moved = torch.cat([(new[name] - old[own]).abs().flatten() for name, own in names.items()])
    rounded = [torch.equal(value, value.bfloat16().float()) for value in new.values()]
    # Each of the first steps is the rate times a number of at most about 1.
    return bool((moved > 0).all() and (moved < 1.1 * STEPS * lr).all()) and not any(rounded)


def floating(value) -> list[torch.Tensor]:
    """All floating-point tensors that something holds."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in values for tensor in floating(item)]


def test_no_update_is_lost(engine):
    """Masters and the state of the optimizer are in fp32, though the model is in bfloat16."""
    assert updates_are_kept(engine.whole, "transfer", "install", RATES.transfer.lr)
    assert updates_are_kept(engine.whole, "finetune", "transfer", RATES.finetune.lr)
    newest, _ = engine.checkpoints
    states = [*newest.glob("optimizer.pt"), *newest.rglob("*optim_states.pt")]
    held = floating([torch.load(state, weights_only=False) for state in states])
    assert len(held) > 1 and {tensor.dtype for tensor in held} == {torch.float32}


def test_updates_are_lost_in_pure_bfloat16(linearize, transferred, tmp_path, monkeypatch):
    """So the test above can fail."""
    (path, before), run = transferred, tmp_path / "run"
    shutil.copytree(before, run)
    prepare = finetune.prepare_finetune
    monkeypatch.setattr(finetune, "prepare_finetune", lambda *arguments: prepare(*arguments).bfloat16())
    converted(linearize, path, "--launch", "none", "--out", run)
    assert not updates_are_kept(run, "finetune", "transfer", RATES.finetune.lr)
