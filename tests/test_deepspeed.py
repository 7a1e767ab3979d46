"""Processes under DeepSpeed learn what one learns without it: whole sequences or chunk by chunk, heads too."""

from pathlib import Path

import pytest
from torch import distributed

from linearize.convert import processes

from .runs import TWO_PROCESSES, assert_same_training, converted, small_parts, state

pytestmark = TWO_PROCESSES
TRAINING = {"steps": 3, "batch_size": 4, "micro_batch_size": 1, "length": 96, "lr": 1e-2}
CHUNKS = "finetune.chunk=32"
TRUNCATED = f"{CHUNKS} finetune.backward=truncated"


@pytest.fixture
def zero3(tmp_path) -> Path:
    return small_parts("zero3", tmp_path)


@pytest.fixture
def run_all(linearize, ranks, recipe, tmp_path):
    """Converts by one process, `alone`, and by two (name -> overrides): gives each one's directory."""

    def run(alone: dict[str, str], together: dict[str, str], **sections) -> dict[str, Path]:
        path = recipe(transfer=None, evaluate=None, export=None, **sections)
        runs = {name: tmp_path / name for name in (*alone, *together)}
        for name, overrides in alone.items():
            converted(linearize, path, "--launch", "none", "--out", runs[name], *overrides.split())
        for name, overrides in together.items():
            ranks.finish(2, "convert", path, "--out", runs[name], *overrides.split())
        return runs

    return run


def test_finetune(run_all, zero3):
    """Each step has two micro batches per process, and three chunks in each of these."""
    # What goes into the first layer of linear attention needs no gradient then.
    outputs = "finetune.targets=[o_proj]"
    runs = run_all(
        {"exact": f"{CHUNKS} medusa=null", "truncated": f"{TRUNCATED} medusa=null", "outputs": outputs},
        {
            "exact-zero2": f"{CHUNKS} medusa=null finetune.deepspeed=zero2",
            "exact-zero3": f"{CHUNKS} medusa=null finetune.deepspeed={zero3} finetune.gradient_checkpointing=true",
            "truncated-zero2": f"{TRUNCATED} medusa=null finetune.deepspeed=zero2",
            "truncated-zero3": f"{TRUNCATED} medusa=null finetune.deepspeed={zero3}",
            # The stage behind it knows nothing of DeepSpeed.
            "outputs-zero3": f"{outputs} finetune.deepspeed={zero3}",
        },
        finetune=TRAINING | {"distill": 0.5},
        medusa=TRAINING | {"heads": 2},
    )
    for name, run in runs.items():
        assert_same_training(runs[name.partition("-")[0]], run, "finetune")
    assert_same_training(runs["outputs"], runs["outputs-zero3"], "medusa")
    with pytest.raises(AssertionError):
        assert_same_training(runs["exact"], runs["truncated"], "finetune")


def test_first_pass_through_chunks_is_in_bfloat16_too(run_all, zero3):
    """The loss of the first step is that without DeepSpeed, which differs by 3e-6 where that pass is in fp32."""
    runs = run_all(
        {"one": ""}, {"zero3": f"finetune.deepspeed={zero3}"},
        medusa=None, finetune=TRAINING | {"steps": 1, "chunk": 32, "bf16": True},
    )  # fmt: skip
    losses = [state(run, "finetune")["metrics"]["loss"] for run in runs.values()]
    # Two shares of a mean are added in another order.
    assert losses[0] == pytest.approx(losses[1], rel=3e-7)


def test_medusa(run_all, zero3):
    """On text that the processes write, each some of it."""
    runs = run_all(
        {"one": ""},
        {"two": "", "zero2": "medusa.deepspeed=zero2", "zero3": f"medusa.deepspeed={zero3}"},
        finetune=None,
        # Two batches of texts.
        medusa=TRAINING | {"heads": 2, "length": 64, "own_text": 64 * 300},
    )
    one = runs.pop("one")
    texts = sorted(file.relative_to(one) for file in one.rglob("own_*/*"))
    assert len(texts) == 3
    for run in runs.values():
        assert_same_training(one, run, "medusa")
        assert [(run / text).read_bytes() for text in texts] == [(one / text).read_bytes() for text in texts]


def test_one_process_needs_no_launcher(run_all, zero3):
    """Nor does the next stage under DeepSpeed, which has a group of processes of its own."""
    one, *others = run_all(
        {"one": "", "zero2": "finetune.deepspeed=zero2", "zero3": f"finetune.deepspeed={zero3}"}, {},
        medusa=None, finetune=TRAINING | {"steps": 2, "length": 32},
    ).values()  # fmt: skip
    for run in others:
        assert_same_training(one, run, "finetune")
    assert not processes.launched() and not distributed.is_initialized()
