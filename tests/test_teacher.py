"""Attention transfer from a frozen model that no device holds whole is that from one that is."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linearize.convert import sources, transfer
from linearize.convert.blocks import Blocks, decoder_blocks
from linearize.convert.sources import Source, load_model
from linearize.convert.training import StageTrainer
from linearize.convert.transfer import AttentionTransfer

from .families import tiny_model
from .runs import converted, state
from .transfers import errors, step, student

# On a GPU, memory is another.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="devices are simulated on CPUs")
FAMILIES = ["llama", "gpt2", "gemma3_text"]
ALONE = ["finetune=null", "medusa=null", "evaluate=null", "export=null", "transfer.batch_size=4"]
PLACES = {
    "spread": ["transfer.teacher=spread"],
    "blocks": ["transfer.blocks_at_once=1", "transfer.micro_batch_size=1"],
}


@pytest.fixture
def little_memory(monkeypatch):
    """Memory for all but one block of the tiny model; the devices that a model was spread over since."""
    found = []

    def load(*arguments, **placing):
        model = load_model(*arguments, **placing)
        found.append({*getattr(model, "hf_device_map", {}).values()})
        return model

    monkeypatch.setattr(transfer, "get_max_memory", lambda: {"cpu": 160_000})
    monkeypatch.setattr(sources, "load_model", load)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spread_model_leaves_the_same_gradients(family, tmp_path):
    whole = tiny_model(family)
    whole.save_pretrained(tmp_path)
    memory = {"cpu": int(0.9 * whole.get_memory_footprint())}
    model = student(load_model(Source(str(tmp_path)), "float32", device_map="auto", max_memory=memory))
    assert any(parameter.is_meta for block in decoder_blocks(model) for parameter in block.parameters())
    whole = student(whole)
    found, expected = step(model) | errors(model), step(whole) | errors(whole)
    assert all(parameter.is_meta != parameter.requires_grad for parameter in decoder_blocks(model)[1].parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_the_same_and_goes_on_after_an_interruption(
    linearize, recipe, tmp_path, monkeypatch, little_memory, place
):
    path, curriculum = recipe(), "transfer.curriculum=[{length: 32, share: 0.5}, {length: 64, share: 0.5}]"
    converted(linearize, path, *ALONE, curriculum, "--out", tmp_path / "replicated")
    changes, loss = (*ALONE, curriculum, *PLACES[place], "--out", tmp_path / place), AttentionTransfer.loss

    def interrupted(self, model, batch, accumulation, step):
        if step == 3:
            raise InterruptedError
        return loss(self, model, batch, accumulation, step)

    def checked(self, *arguments):
        # Which it would move to its device.
        assert all(parameter.requires_grad for parameter in self.model.parameters())
        return training_step(self, *arguments)

    training_step = StageTrainer.training_step
    monkeypatch.setattr(StageTrainer, "training_step", checked)
    passes, run = [], Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, inputs: passes.append(len(inputs)) or run(self, inputs))
    monkeypatch.setattr(AttentionTransfer, "loss", interrupted)
    with pytest.raises(InterruptedError):
        linearize("convert", path, *changes)
    monkeypatch.setattr(AttentionTransfer, "loss", loss)
    converted(linearize, path, *changes, "--resume")
    # Steps 0 to 2, and, after the checkpoint, 2 to 5: each once through the blocks, all micro batches together;
    # and the held-out text.
    assert passes == ([4] * 8 if place == "blocks" else [])
    assert little_memory[-1] == ({"cpu", "disk"} if place == "spread" else set())
    runs = [state(tmp_path / name, "transfer")["metrics"] for name in ("replicated", place)]
    # Gradients of a step are summed up in another order if it has more micro batches.
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-5) and len(runs[0]["loss"]) == 6
    for name, layer in product(("loss_of_layer", "error_of_head"), "01"):
        assert runs[0][name][layer] == pytest.approx(runs[1][name][layer], rel=1e-4), (name, layer)
    saved = [load_file(tmp_path / name / "transfer" / "weights.safetensors") for name in ("replicated", place)]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=1e-4, atol=1e-5)


def test_zero3_leaves_the_same_gradients_and_no_process_with_the_whole_model(tmp_path):
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, Path(__file__).with_name("zero3.py"), tmp_path, *FAMILIES],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(done.stdout.count(f"{family}: ") == 2 for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["transfer.teacher=zero3"], "transfer.teacher: zero3 gives each of several processes a part, and this"),
        (["transfer.teacher=spread", "--gpus", 2], "transfer.teacher: spread gives all devices to one process, not"),
        (["transfer.teacher=spread", "transfer.blocks_at_once=1"], "transfer.blocks_at_once: whole blocks come from"),
    ],
)
def test_where_it_cannot_be(linearize, recipe, tmp_path, changes, sentence):
    result = linearize("convert", recipe(), *changes)
    assert result.code == 2 and sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
