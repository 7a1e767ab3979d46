"""Models without weights: made of a configuration and the seed, trained, exported, and converted by another recipe."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from linearize.convert import training
from linearize.convert.batches import TrainingBatches
from linearize.convert.hiding import MaskedTokens
from linearize.recipes.training import Training

from .runs import converted, results, state

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 128}
BERT = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
FLASH = {"model_type": "linearize_flash", "num_hidden_layers": 2, "hidden_size": 32, "head_dim": 16, "rotary_dim": 8}
TRAINING = {"method": "full", "steps": 6, "batch_size": 4, "length": 32, "save_every": 2, "lr": 1e-2}


@pytest.fixture
def scratch(recipe, tiny_model):
    """Writes a recipe without weights."""

    def write(config, attention=None, head="causal-lm", **changes) -> Path:
        model = {"config": config, "tokenizer": str(tiny_model), "head": head}
        sections = {"transfer": None, "medusa": None, "evaluate": None, "finetune": TRAINING}
        path = recipe(model=model, **(sections | changes))
        if attention is None:
            # `recipe` takes None for a section that is left out, where attention is the default.
            text = path.read_text()
            begin = text.index("attention:")
            end = text.index("data:")
            path.write_text(text[:begin] + "attention: null\n" + text[end:])
        else:
            path.write_text(path.read_text().replace("preset: augmented", f"preset: {attention}"))
        return path

    return write


def interrupt(monkeypatch, step: int):
    """Training ends as by a full disk after so many steps."""
    real = training.StageTrainer.training_step

    def ending(self, *arguments):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(training.StageTrainer, "training_step", ending)


def test_a_softmax_model_is_an_ordinary_checkpoint_that_another_recipe_converts(
    linearize, scratch, recipe, tmp_path
):
    path = scratch(GPT2, evaluate={"tokens": 256, "lengths": [64], "copying": None})
    printed = converted(linearize, path, "finetune.steps=20", "--out", tmp_path / "softmax")
    assert "install" not in printed and "KV cache" not in printed.split("done in")[-1]
    trained = state(tmp_path / "softmax", "finetune")["metrics"]
    assert trained["loss"][0] > 5 and trained["loss"][-1] < trained["loss"][0] - 0.5
    assert list(state(tmp_path / "softmax", "evaluate")["metrics"]["models"]) == ["after finetune"]
    exported = tmp_path / "softmax" / "export" / "model"
    assert not list(exported.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "GPT2LMHeadModel"
    # 244 tokens are filled up to a multiple of 64, and what begins and ends texts is the tokenizer's.
    assert (model.config.vocab_size, model.config.eos_token_id) == (256, 1)

    path = recipe(model={"source": str(exported)}, finetune=None, medusa=None, evaluate=None)
    converted(linearize, path, "transfer.steps=2", "--out", tmp_path / "linear")
    exported = tmp_path / "linear" / "export" / "model"
    linear = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert len(linear.linear_attentions()) == 2


def test_the_seed_makes_the_weights(linearize, scratch, tmp_path):
    path = scratch(GPT2)
    for run, seed in (("one", 3), ("two", 3), ("other", 4)):
        converted(linearize, path, f"seed={seed}", "--only", "load", "--out", tmp_path / run)
    files = (tmp_path / run / "load/model/model.safetensors" for run in ("one", "two", "other"))
    one, two, other = (file.read_bytes() for file in files)
    assert one == two != other
    refused = linearize("convert", path, "seed=4", "--only", "load", "--out", tmp_path / "one")
    assert refused.code == 2 and "seed was 3, is 4" in refused.stderr


@pytest.mark.parametrize(
    ("config", "attention", "head"), [(FLASH, "flash", "causal-lm"), (BERT, None, "masked-lm")]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    linearize, scratch, tmp_path, monkeypatch, config, attention, head
):
    """Linear attention from the beginning, and masked tokens."""
    path = scratch(config, attention, head)
    converted(linearize, path, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert linearize("convert", path, "--out", tmp_path / "killed").code
    assert state(tmp_path / "killed", "finetune")["status"] == "running"
    converted(linearize, path, "--out", tmp_path / "killed", "--resume")
    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    assert {"load", "finetune", "export"} <= {path.name for path in (tmp_path / "whole").iterdir()}


def test_flash_learns_from_scratch(linearize, scratch, tmp_path):
    """From the loss of 256 equally likely words, ln 256, to far less."""
    converted(linearize, scratch(FLASH, "flash", export=None), "finetune.steps=60")
    losses = state(tmp_path / "run", "finetune")["metrics"]["loss"]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1) and sum(losses[-10:]) / 10 < losses[0] - 1.5


def test_masked_tokens_are_predicted_and_loaded_by_transformers(linearize, scratch, tmp_path):
    training = ("finetune.steps=30", "finetune.batch_size=32", "finetune.lr=5e-3")
    converted(linearize, scratch(BERT, head="masked-lm"), *training)
    losses = state(tmp_path / "run", "finetune")["metrics"]["loss"]
    # A sequence of which no token is masked counts as 0.
    assert losses[0] == pytest.approx(math.log(256), abs=0.5) and sum(losses[-5:]) / 5 < losses[0] - 0.4
    exported = tmp_path / "run" / "export" / "model"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<mask>", 244)
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the <mask> of")
    assert len(guesses) == 5
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "linear-attention" not in card


def test_masks_follow_the_rule_and_depend_on_the_place_alone(linearize, scratch, tmp_path):
    converted(linearize, scratch(BERT, head="masked-lm"), "--only", "load")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "load" / "tokenizer")
    text = torch.arange(4, 204).repeat(200)

    def batches(micro_batch_size):
        section = Training(steps=4, batch_size=16, micro_batch_size=micro_batch_size, length=500, lr=1)
        items = [*TrainingBatches([iter([text])], section, 7, hide=MaskedTokens(tokenizer))]
        return {name: torch.cat([item[name] for item in items]) for name in items[0]}

    whole, parts = batches(16), batches(2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    ids, labels = whole["input_ids"], whole["labels"]
    chosen = labels != -100
    # 32000 tokens: four standard deviations of a share of them.
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.008)
    masked = (ids == tokenizer.mask_token_id)[chosen].float().mean().item()
    kept = (ids == labels)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.023) and kept == pytest.approx(0.1, abs=0.02)
    assert (ids[~chosen] != tokenizer.mask_token_id).all()
    assert (whole["position_ids"] == torch.arange(500)).all()


@pytest.mark.parametrize(
    ("model", "rest", "expected"),
    [
        ("{}", "", "2: model.source: required, but missing"),
        ("{source: a/b, config: {model_type: gpt2}}", "", "model.source: config makes a model without weights; drop"),
        ("{config: {model_type: gpt2}}", "", "model.tokenizer: required, as a model without weights brings none"),
        ("{config: {n_layer: 2}, tokenizer: a/b}", "", "model.config: names no model_type, such as gpt2, llama, bert"),
        ("{config: none.json, tokenizer: a/b}", "", "model.config: no such file: none.json; name a config.json, or"),
        ("{config: {model_type: gpt2}, tokenizer: a/b}", "finetune: {steps: 1}", "finetune.method: adapters of random"),
        ("{config: {model_type: gpt2}, tokenizer: a/b}", "transfer: {steps: 1}", "transfer: a model without weights t"),
        ("{source: a/b}", "attention: null\ntransfer: {steps: 1}", "transfer: attention: null leaves no linear atten"),
        ("{source: a/b}", "attention: null\nmedusa: {steps: 1}", "medusa: attention: null leaves no linear attention"),
        ("{source: a/b}", "attention: null\nkeep: {kv_budget: 0.1}", "keep: attention: null keeps all heads softmax"),
        ("{source: a/b, head: masked-lm}", "", "attention: model.head: masked-lm is of softmax models; set attention"),
        (
            "{source: a/b, head: masked-lm}", "attention: null\nevaluate: {}",
            "evaluate: its measures are of next tokens, and the model predicts masked ones; leave it out",
        ),
        (
            "{source: a/b, head: masked-lm}", "attention: null\nfinetune: {steps: 1, recall: 0.5}",
            "finetune.recall: repeats parts of a text to have them predicted; set it to 0.0",
        ),
        ("{source: a/b, head: encoder}", "attention: null", "attention: null leaves an encoder nothing to learn; use"),
        (
            "{config: {model_type: bert}, tokenizer: a/b, head: encoder}", "",
            "model.head: an encoder learns from its softmax self, which knows nothing yet; use masked-lm",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(linearize, tmp_path, model, rest, expected):
    path = tmp_path / "recipe.yaml"
    data = 'data: {train: {source: "builtin:train"}, heldout: {source: "builtin:heldout"}}'
    path.write_text(f"output: runs/test\nmodel: {model}\n{data}\n{rest}\n")
    result = linearize("check", path)
    assert result.code == 2 and expected in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        (GPT2 | {"n_layers": 2}, [], "model.config.n_layers: gpt2 has no such field, did you mean n_layer?"),
        (GPT2 | {"model_type": "gpt22"}, [], "model.config: transformers knows no model_type gpt22"),
        (GPT2 | {"vocab_size": 100}, [], "model.tokenizer: tokenizer has 244 tokens but the model's embedding has 100"),
        (GPT2, ["finetune.length=200"], "finetune.length: 200 is longer than the 128 positions that the model has"),
        (BERT, ["model.head=masked-lm", "model.config.model_type=gpt2"], "model.config."),
        (FLASH, ["attention={preset: flash}", "keep={layers: [0]}"], "keep: is about softmax attention, which FLASH"),
    ],
)
def test_what_a_model_cannot_be_is_said_before_it_is_made(linearize, scratch, tmp_path, config, change, expected):
    result = linearize("convert", scratch(config), *change)
    assert result.code == 2 and expected in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "load").exists()


def test_a_configuration_may_be_a_file(linearize, scratch, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2 | {"transformers_version": "4.0", "n_special": 0}))
    plan = json.loads(linearize("check", scratch(str(path)), "--json").stdout)
    assert plan["model"] == "new gpt2" and plan["layers"] == 2 and plan["state_bytes"] == 0
