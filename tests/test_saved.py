"""What is saved is whole, or is not there, and whoever could not save it says so."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from linearize.convert import load, pipeline
from linearize.convert.context import STAGES, DiskError, StageError, disk_errors_named
from linearize.convert.models import save_weights
from linearize.hub.saved import check_saved

from .ranks import Ranks
from .runs import converted, state


def test_headers_are_compared(tmp_path):
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "tied": torch.zeros(5)}
    weights["tied too"] = weights["tied"]
    shards = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({"a": weights["a"]}, shards[0])
    save_file({"b": weights["b"], "tied too": weights["tied"]}, shards[1])
    check_saved(shards, weights)
    for wrong, sentence in [
        (weights | {"b": torch.zeros(2, 2)}, r"b is \(2, 2\), but was saved as \(4,\)"),
        (weights | {"c": torch.zeros(1)}, r"c is \(1,\), but was saved as nothing"),
        ({"a": weights["a"], "tied": weights["tied"], "tied too": weights["tied"]}, r"b is nothing, but was saved as"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_saved(shards, wrong)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match="2.safetensors is not a whole safetensors file"):
        check_saved(shards, weights)


def test_a_part_of_a_weight_is_not_taken_for_it(tmp_path):
    """As ZeRO-3 gives each process, under the whole one's name; what was saved before stays."""
    whole = torch.nn.Parameter(torch.arange(6.0))
    save_weights({"weight": whole}, tmp_path)
    part = torch.nn.Parameter(torch.zeros(3))
    part.ds_shape = torch.Size([6])
    with pytest.raises(StageError, match=r"not saved whole: weight is \(6,\), but was saved as \(3,\)"):
        save_weights({"weight": part}, tmp_path)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["weight"], whole)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_an_export_that_lacks_a_weight_is_not_done(linearize, finished, run, monkeypatch):
    recipe, save = finished[2], PreTrainedModel.save_pretrained
    exported = (run / "export" / "model" / "model.safetensors").read_bytes()

    def lose(model, directory, **arguments):
        save(model, directory, **arguments)
        weights = load_file(directory / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lose)
        result = linearize("convert", recipe, "--out", run, "--from", "export")
    assert result.code == 2
    assert result.stderr == (
        f"linearize: {run}/export/model: the model could not be saved: model.norm.weight is (32,), but was saved as "
        "nothing\n"
    )
    assert state(run, "export")["status"] == "running" and not (run / "export" / "model").exists()
    converted(linearize, recipe, "--out", run, "--resume")
    assert (run / "export" / "model" / "model.safetensors").read_bytes() == exported


@pytest.mark.parametrize("file", ["transfer/weights.safetensors", "transfer/state.json"])
def test_damaged_results_of_a_stage_are_named(linearize, finished, run, file):
    (run / file).write_bytes((run / file).read_bytes()[:100])
    result = linearize("convert", finished[2], "--out", run, "--from", "export")
    assert result.code == 2 and result.stderr.startswith(f"linearize: {run}/{file}: is damaged (")
    assert result.stderr.endswith("; --from transfer makes it again\n")


def test_stages_whose_results_are_half_gone_are_not_done(linearize, finished, run, monkeypatch):
    """Where --from is killed while it removes them: by the time that a file goes, the stage is not done any more, nor
    is one that follows from it."""
    remove = shutil.rmtree

    def killed(directory, **arguments):
        if directory.name == "finetune":
            (directory / "weights.safetensors").unlink()
            raise KeyboardInterrupt
        remove(directory, **arguments)

    monkeypatch.setattr(pipeline.shutil, "rmtree", killed)
    assert linearize("convert", finished[2], "--out", run, "--from", "transfer").code == 2
    done = [stage for stage in STAGES if (run / stage / "state.json").exists()]
    assert done == ["load", "install", "transfer"]


@pytest.mark.parametrize(
    "error",
    [
        # As they were raised on a file system of 1 MiB.
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_told(error):
    with pytest.raises(DiskError, match="^run: cannot be written .*; make room"), disk_errors_named(Path("run")):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
    ],
)
def test_other_errors_are_no_full_disk(error):
    with pytest.raises(type(error), match=re.escape(str(error))), disk_errors_named(Path("run")):
        raise error


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are of CPUs")
@pytest.mark.parametrize(
    ("stage", "size"), [("load", 3000), ("install", 3000), ("medusa", 3000), ("evaluate", 3000), ("export", 30000)]
)
def test_a_stage_whose_results_do_not_fit_is_not_done(ranks: Ranks, finished, run, stage, size):
    arguments = ["convert", finished[2], "--out", run]
    failed = ranks.start(1, *arguments, "--from", stage, limits={0: size})
    assert failed.wait() == [2]
    assert f"linearize: {run}: cannot be written (File too large); make room" in failed.text()
    assert "Traceback" not in failed.text() and state(run, stage)["status"] == "running"


def test_sigterm_is_told(linearize, finished, run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(load, "run", lambda context: os.kill(os.getpid(), signal.SIGTERM))
    result = linearize("convert", finished[2], "--out", run, "--from", "load")
    assert result.code == 2
    assert result.stderr == (
        f"linearize: {run}: stopped before its work was done; --resume goes on from what was saved before\n"
    )
    assert state(run, "load")["status"] == "running" and signal.getsignal(signal.SIGTERM) == before
