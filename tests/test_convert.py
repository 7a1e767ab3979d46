"""The user's way through the command line, on real files: convert, interrupt, resume."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.convert import finetune, own_text, transfer
from linearize.convert.context import Context
from linearize.convert.models import merged_model, model_after, save_weights
from linearize.convert.own_text import own_prompts, own_texts
from linearize.recipes.loader import load_recipe

from .runs import FIGURES, LOCAL_STAGES, converted, state


def test_every_stage_finishes_and_the_table_is_shown(finished):
    run, printed, _ = finished
    assert [state(run, stage)["status"] for stage in LOCAL_STAGES] == ["done"] * len(LOCAL_STAGES)
    shown = ["teacher (softmax)", "sliding window 64 + 4 sinks, untrained", "sliding window 16 + 2 sinks, untrained"]
    shown += ["installed", "after transfer", "after finetune", "local only", "linear only", "conv off", "linear state"]
    shown += ["a text of 32 tokens said again", "pass keys found in 100 tokens", "values recalled from 4 pairs"]
    shown += ["perplexity by position in windows of 128", "last seen beyond", "attention beyond the window, "]
    assert all(name in printed for name in shown)
    assert not list(run.glob("*/checkpoints"))


def perplexities(run: Path, length: int = 128) -> dict[str, float]:
    models = state(run, "evaluate")["metrics"]["models"]
    return {name: figures["text"][str(length)]["perplexity"] for name, figures in models.items()}


def test_augmented_starts_as_window_and_sinks(linearize, finished, tmp_path, recipe):
    run, *_ = finished
    measured = perplexities(run, 64)
    assert measured["installed"] == pytest.approx(measured["sliding window 16 + 2 sinks, untrained"], rel=1e-6)
    path = recipe(attention={"preset": "augmented"}, transfer=None, finetune=None, medusa=None, export=None)
    converted(linearize, path)
    models = perplexities(tmp_path / "run")
    assert models["installed"] == pytest.approx(models["sliding window 64 + 4 sinks, untrained"], rel=1e-6)


def test_training_lowers_the_losses(finished):
    run, *_ = finished
    transfer = state(run, "transfer")["metrics"]["loss"]
    finetune = state(run, "finetune")["metrics"]["loss"]
    medusa = state(run, "medusa")["metrics"]["loss"]
    assert len(transfer) == len(finetune) == len(medusa) == 6
    assert all(sum(losses[3:]) < sum(losses[:3]) for losses in (transfer, finetune, medusa))
    accuracy = state(run, "medusa")["metrics"]["head_accuracy"]
    assert len(accuracy) == 2 and all(0 <= head["top1"] <= head["top5"] <= 1 for head in accuracy)


def test_second_convert_does_nothing(linearize, finished):
    run, _, recipe = finished
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    printed = converted(linearize, recipe)
    assert printed.count("finished before, skipped") == len(LOCAL_STAGES)
    assert files == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_another_recipe_is_refused_and_nothing_lost(linearize, finished):
    run, _, recipe = finished
    result = linearize("convert", recipe, "finetune.lr=0.5")
    assert result.code == 2 and "Traceback" not in result.stderr
    assert "stage finetune of another recipe (finetune.lr was 0.01, is 0.5)" in result.stderr
    assert "--from finetune" in result.stderr
    assert state(run, "finetune")["status"] == "done"


def test_from_redoes_a_stage_and_those_after_it(linearize, tmp_path, recipe):
    path = recipe(medusa=None, finetune=None)
    converted(linearize, path)
    before = perplexities(tmp_path / "run")
    converted(linearize, path, "transfer.steps=3", "--from", "transfer")
    assert len(state(tmp_path / "run", "transfer")["metrics"]["loss"]) == 3
    assert before != perplexities(tmp_path / "run")


def test_heads_learn_from_the_models_own_text(linearize, tmp_path, recipe):
    path = recipe(transfer=None, finetune=None, evaluate=None, export=None)
    text = ("medusa.own_text=150", "medusa.length=50")
    converted(linearize, path, *text)
    written = tmp_path / "run" / "medusa" / "own_text" / "000000.safetensors"
    rows = [row for _, row in sorted(load_file(written).items())]
    context = Context(load_recipe(str(tmp_path / "run" / "resolved.yaml")), tmp_path / "run", Console(quiet=True))
    base, (prompts, _) = merged_model(context), own_prompts(context, 50)
    assert len(rows) == len(prompts) == 3
    arguments = {"max_new_tokens": 50 - max(map(len, prompts)), "do_sample": False}
    for row, prompt in zip(rows, prompts, strict=True):
        mask = torch.ones_like(prompt)[None]
        assert torch.equal(base.generate(prompt[None], attention_mask=mask, **arguments)[0], row)
    document = next(iter(context.training_documents[0]))
    piece, asked, data = (context.tokenizer.decode(x, skip_special_tokens=True) for x in (*prompts[:2], document))
    assert piece in data
    # What the chat template makes of it.
    assert asked.startswith("user ") and asked.removeprefix("user ").strip() in data

    # What is written already is not written again.
    base.generate = None
    assert all(map(torch.equal, own_texts(context, base, prompts, "own_text"), rows))


def test_the_model_answers_prompts(linearize, tmp_path, recipe):
    """One in 32 is kept out, what is too long is left out, and pieces of the data follow."""
    short = [f"the {word}" for word in ("of", "and", "to", "a", "in", "that", "he", "was", "it", "his") * 4]
    words = tmp_path / "words.jsonl", [*short, "the " * 60]
    chat = [{"from": "human", "value": "of"}, {"from": "gpt", "value": "and"}, {"from": "human", "value": "to"},
            {"from": "gpt", "value": "his"}]  # fmt: skip
    for path, rows in (words, (tmp_path / "chats.jsonl", [chat])):
        path.write_text("\n".join(json.dumps({"said": row}) for row in rows), "utf-8")
    sources = [{"source": str(path), "field": "said"} for path in sorted(tmp_path.glob("*.jsonl"))]
    medusa = {"steps": 1, "batch_size": 1, "heads": 2, "length": 48, "own_text": 48 * 60, "prompts": sources}
    converted(linearize, recipe(transfer=None, finetune=None, export=None, medusa=medusa))
    context = Context(load_recipe(str(tmp_path / "run" / "resolved.yaml")), tmp_path / "run", Console(quiet=True))
    texts, measured = (
        [context.tokenizer.decode(row) for _, row in sorted(load_file(file).items())]
        for file in (tmp_path / "run" / "medusa").glob("own_*/*.safetensors")
    )
    if len(texts) < len(measured):
        texts, measured = measured, texts
    assert len(texts) == 60 and len(measured) == 2
    asked = [text for text in (*texts, *measured) if text.startswith("user the ")]
    assert len(asked) >= 40 and not any("the the the the" in text for text in texts)
    (told,) = (text for text in (*texts, *measured) if text.startswith("user of assistant"))
    assert told.startswith("user of assistant and user to ")


def test_own_text_that_was_interrupted_goes_on(linearize, tmp_path, recipe, monkeypatch):
    """Three batches for the heads to learn from, three to measure them on, in this order."""
    path = recipe(
        transfer=None, finetune=None, export=None,
        medusa={"steps": 1, "heads": 1, "batch_size": 1, "length": 50, "own_text": 300},
        evaluate={"tokens": 250, "lengths": [50], "copying": None},
    )  # fmt: skip
    for stage in ("load", "install"):
        converted(linearize, path, "--only", stage)
    monkeypatch.setattr(own_text, "ROWS", 2)
    real, asked = own_text.generate, []

    def counted(model, prompts, *rest):
        asked.append([prompt.ids.tolist() for prompt in prompts])
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return real(model, prompts, *rest)

    monkeypatch.setattr(own_text, "generate", counted)
    with pytest.raises(RuntimeError, match="out of memory"):
        linearize("convert", path, "--only", "medusa")
    texts = tmp_path / "run" / "medusa" / "own_text"
    before = {file: file.stat().st_mtime_ns for file in texts.iterdir()}
    assert sorted(file.name for file in before) == ["000000.safetensors", "000002.safetensors"]
    # A disk that forgot the end of one.
    damaged = texts / "000002.safetensors"
    os.truncate(damaged, damaged.stat().st_size - 8)
    del before[damaged]
    converted(linearize, path, "--only", "medusa", "--resume")
    # The damaged one and the third again, and what came behind it.
    assert len(asked) == 8 and asked[3:5] == asked[1:3]
    assert before.items() <= {file: file.stat().st_mtime_ns for file in texts.iterdir()}.items()


def test_a_stage_gives_its_model_back(linearize, recipe, monkeypatch):
    real, kept = transfer.model_after, []

    def noted(*arguments):
        model = real(*arguments)
        kept.append(weakref.ref(model))
        return model

    tune = finetune.run

    def run(context):
        assert kept.pop()() is None
        return tune(context)

    monkeypatch.setattr(transfer, "model_after", noted)
    monkeypatch.setattr(finetune, "run", run)
    converted(linearize, recipe(medusa=None, evaluate=None, export=None))


def test_only_needs_the_stages_before(linearize, recipe):
    path = recipe()
    result = linearize("convert", path, "--only", "finetune")
    assert result.code == 2
    assert "--only finetune: needs stage load first" in result.stderr
    for stage in ("load", "install"):
        converted(linearize, path, "--only", stage)
    result = linearize("convert", path, "--only", "finetune")
    assert "needs stage transfer first" in result.stderr


# Everything that draws, and that changes with the steps.
RANDOM = ["recall=0.5", "position_offset=100", "curriculum=[{length: 32, share: 0.5}, {length: 64, share: 0.5}]"]
ALL_OPTIONS = {
    "transfer": [
        *RANDOM,
        "window_dropout=0.9",
        "objectives={output_mse: 1.0, linear_mse: 0.5, weights_kl: 0.1, far_mass: 0.5}",
        "layers={0: {lr: 3e-3, steps: 50}}",
    ],
    "finetune": [
        *RANDOM[:2],
        "curriculum=[{length: 32, share: 0.5}, {length: 256, share: 0.5}]",
        "facts=0.5",
        "attention_lr=3e-3",
        "distill=0.5",
        "micro_batch_size=1",
        "length=256",
    ],
}


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["default", "all options"])
def test_killed_and_resumed_equals_uninterrupted(linearize, recipe, tmp_path, stage, options):
    changes = [f"{stage}.steps=60", "medusa=null", "export=null", *(["finetune=null"] if stage == "transfer" else [])]
    changes += [f"{stage}.{option}" for option in options.get(stage, [])]
    # Learned maps of rotated keys are what an offset of the positions changes.
    changes += ["attention.rope=after", "attention.state=decay", "attention.sink_distance=null"] if options else []
    path = recipe()
    converted(linearize, path, *changes, "--out", tmp_path / "whole")

    run = tmp_path / "killed"
    command = [sys.executable, "-m", "linearize.cli", "convert", path, *changes, "--out", run]
    # One thread, as this process has: with several, torch sums gradients in no fixed order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    while not list(run.glob(f"{stage}/checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it wrote a checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(run, stage)["status"] == "running"

    refused = linearize("convert", path, *changes, "--out", run)
    assert refused.code == 2 and f"stage {stage} was interrupted; --resume" in refused.stderr
    converted(linearize, path, *changes, "--out", run, "--resume")
    whole, resumed = (state(tmp_path / name, stage)["metrics"] for name in ("whole", "killed"))
    figures = FIGURES if stage == "transfer" else FIGURES[:1]
    assert [whole[name] for name in figures] == [resumed[name] for name in figures]
    saved = [load_file(tmp_path / name / stage / "weights.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    results = [perplexities(tmp_path / name) for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_check_recipes_and_env_speak_json(linearize, recipe):
    plan = json.loads(linearize("check", recipe(), "--json").stdout)
    assert plan["layers"] == 2 and plan["kv_heads"] == 2 and [s["stage"] for s in plan["stages"]] == [
        "transfer",
        "finetune",
        "medusa",
    ]
    assert plan["kv_bytes"]["2048"] == 2 * 2 * 2 * 8 * 4 * 2048
    assert "demo" in json.loads(linearize("recipes", "--json").stdout)
    facts = json.loads(linearize("env", "--json").stdout)
    assert "torch" in facts["linear attention backends"] and "torch" in facts["backend of augmented"]


def test_plan_counts_the_tokens_of_every_phase(linearize, recipe):
    phases = "curriculum=[{length: 32, share: 0.5}, {length: 128, share: 0.5}]"
    plan = json.loads(linearize("check", recipe(), f"transfer.{phases}", f"finetune.{phases}", "--json").stdout)
    assert [stage["tokens"] for stage in plan["stages"]] == [6 * 2 * 64, 6 * 2 * 64, 4 * 2 * 64]


def weights_of(run: Path, stage: str, layer: int) -> dict[str, torch.Tensor]:
    """What the stage left of a layer's linear attention, by the parameter's own name."""
    mark = f".layers.{layer}.self_attn.linear_attention."
    saved = load_file(run / stage / "weights.safetensors")
    return {name.split(mark)[1]: weight for name, weight in saved.items() if mark in name}


def moved(before: dict, after: dict) -> bool:
    return any((before[name] - after[name]).abs().max() > 1e-4 for name in before)


def test_layers_have_their_own_learning_rates_and_steps(linearize, recipe, tmp_path):
    path = recipe(finetune=None, medusa=None, evaluate=None, export=None)
    common = ["transfer.schedule=constant", "transfer.weight_decay=0.1"]
    converted(linearize, path, *common, "transfer.steps=3", "--out", tmp_path / "short")
    converted(linearize, path, *common, "transfer.layers={0: {steps: 3}, 1: {lr: 1e-12}}", "--out", tmp_path / "long")
    short, long, start = tmp_path / "short", tmp_path / "long", tmp_path / "long"
    # Layer 0 is after 6 steps what it was after 3, in spite of momentum and weight decay.
    stopped, expected = (weights_of(run, "transfer", 0) for run in (long, short))
    assert all(torch.equal(stopped[name], expected[name]) for name in expected)
    assert moved(weights_of(start, "install", 1), weights_of(short, "transfer", 1))
    assert not moved(weights_of(start, "install", 1), weights_of(long, "transfer", 1))
    metrics = state(long, "transfer")["metrics"]
    assert list(metrics["last_loss_of_layer"]) == ["1"] and list(metrics["error_of_head"]) == ["0", "1"]
    # The loss is the mean over the layers that still learn.
    first, second = metrics["loss_of_layer"]["0"], metrics["loss_of_layer"]["1"]
    assert (len(first), len(second)) == (3, 6) and second[3:] == pytest.approx(metrics["loss"][3:], rel=1e-6)
    assert [(x + y) / 2 for x, y in zip(first, second, strict=False)] == pytest.approx(metrics["loss"][:3], rel=1e-6)


def test_attention_has_its_own_learning_rate_in_finetuning(linearize, recipe, tmp_path):
    path = recipe(medusa=None, evaluate=None, export=None)
    converted(linearize, path)
    assert moved(*(weights_of(tmp_path / "run", stage, 0) for stage in ("transfer", "finetune")))
    converted(linearize, path, "finetune.attention_lr=1e-12", "--from", "finetune")
    assert not moved(*(weights_of(tmp_path / "run", stage, 0) for stage in ("transfer", "finetune")))
    saved = load_file(tmp_path / "run" / "finetune" / "weights.safetensors")
    assert any(weight.abs().max() > 1e-3 for name, weight in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "preset", ["augmented-icml", "augmented-relu2", "lolcats", "hedgehog", "t2r", "swa", "performer+conv+group"]
)
def test_every_preset_converts(linearize, recipe, tmp_path, preset):
    sections = {"attention": {"preset": preset}, "medusa": None}
    if preset == "swa":
        sections["transfer"] = None
    converted(linearize, recipe(**sections), "transfer.steps=2" if preset != "swa" else "finetune.steps=2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "model", trust_remote_code=True)
    ids = torch.arange(1, 151).view(1, -1)
    arguments = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


def test_full_finetune(linearize, recipe, tmp_path):
    path = recipe(medusa=None, transfer=None)
    converted(linearize, path, "finetune.method=full", "finetune.gradient_checkpointing=true")
    assert "model.embed_tokens.weight" in load_file(tmp_path / "run" / "finetune" / "weights.safetensors")


def test_stages_begin_from_what_install_saved(linearize, recipe, tmp_path):
    path = recipe()
    for stage in ("load", "install"):
        assert linearize("convert", path, "--only", stage).code == 0
    context = Context(load_recipe(str(path)), tmp_path / "run", Console(quiet=True))
    directory = context.stage_directory("install")
    other = {name: value + 1 for name, value in load_file(directory / "weights.safetensors").items()}
    save_weights(other, directory)
    parameters = dict(model_after(context, "install").named_parameters())
    assert other and all(torch.equal(parameters[name], value) for name, value in other.items())


def test_half_precision_keeps_masters_in_fp32(linearize, recipe, tmp_path):
    path = recipe(medusa=None)
    precise = ["transfer.bf16=true", "finetune.bf16=true", "model.dtype=bfloat16", "export.dtype=bfloat16"]
    precise += ["attention.state=decay"]  # the delta rule's far branch has no output of its own to learn from
    precise += ["transfer.objectives={linear_mse: 1.0, weights_kl: 1.0, far_mass: 1.0}", "finetune.distill=0.5"]
    converted(linearize, path, *precise)
    run = tmp_path / "run"
    losses = state(run, "transfer")["metrics"]["loss"] + state(run, "finetune")["metrics"]["loss"]
    assert all(0 < loss < 20 for loss in losses)
    assert {w.dtype for w in load_file(run / "finetune" / "weights.safetensors").values()} == {torch.float32}
    exported = load_file(run / "export" / "model" / "model.safetensors")
    for name, weight in exported.items():
        assert weight.dtype == (torch.float32 if ".linear_attention." in name else torch.bfloat16), name
