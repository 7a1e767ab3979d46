"""Training goes on from an exported model with the tools of others: PEFT's adapters, transformers' Trainer."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from .exports import GREEDY, assert_same_behaviour, behaviour, load, some_ids

IDS = some_ids(2, 40)
LINEAR = ".linear_attention."


def texts(count: int) -> list[dict]:
    """Sequences that repeat a few tokens, which is soon learned."""
    ids = some_ids(count, 8, seed=2).repeat(1, 8)
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, directory, **arguments) -> list[float]:
    """Losses of each step."""
    training = TrainingArguments(
        str(directory), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **arguments,
    )  # fmt: skip
    trainer = Trainer(model, training, train_dataset=texts(32))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("asked", [False, True], ids=["as loaded", "asked"])
def test_linear_attention_is_trained_only_if_asked(exported, tmp_path, asked):
    """Checkpoints load again, draft heads included."""
    model = load(exported)
    if asked:
        model.train_linear_attention()
    before = weights(model)
    losses = train(model, tmp_path / "trained", gradient_checkpointing=True)
    assert losses[-1] < losses[0] - 0.3
    # A row of the embedding is for each token, and these are two weights.
    assert changed(model, before) == {name for name in before if asked or LINEAR not in name}
    model.eval()
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True)).save_model(tmp_path / "saved")
    assert_same_behaviour(load(tmp_path / "saved"), behaviour(model, IDS), IDS)


def test_gradient_checkpointing_changes_no_gradient(exported):
    gradients = []
    for checkpointing in (False, True):
        model = load(exported).train()
        model.train_linear_attention()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpoints_of_a_trainer_load_and_go_on(exported, tmp_path):
    arguments = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
                 "disable_tqdm": True, "save_steps": 2, "lr_scheduler_type": "constant"}  # fmt: skip

    def trainer(model, directory, steps):
        training = TrainingArguments(str(tmp_path / directory), max_steps=steps, **arguments)
        return Trainer(model, training, train_dataset=texts(32))

    whole, half = load(exported), load(exported)
    trainer(whole, "whole", 4).train()
    trainer(half, "half", 2).train()
    checkpoint = tmp_path / "half" / "checkpoint-2"
    assert_same_behaviour(load(checkpoint), behaviour(half.eval(), IDS), IDS)
    resumed = load(checkpoint)
    trainer(resumed, "half", 4).train(resume_from_checkpoint=str(checkpoint))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(resumed.get_parameter(name), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained_too", [None, ["linear_attention"]], ids=["lora", "lora and linear attention"])
def test_adapters(exported, tmp_path, trained_too):
    """PEFT freezes what it is not told to train, and linear attention is no exception."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM",
        modules_to_save=trained_too,
    )  # fmt: skip
    model = get_peft_model(load(exported), config)
    before = weights(model)
    losses = train(model, tmp_path / "trained", gradient_checkpointing=True)
    assert losses[-1] < losses[0]
    moved = changed(model, before)
    assert any("lora_" in name for name in moved)
    assert any(LINEAR in name for name in moved) == bool(trained_too)
    assert all("lora_" in name or LINEAR in name for name in moved)

    model.eval()
    expected = behaviour(model, IDS)
    uncached = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY, use_cache=False)
    assert torch.equal(expected[1], uncached)
    model.save_pretrained(tmp_path / "adapter")
    assert_same_behaviour(PeftModel.from_pretrained(load(exported), tmp_path / "adapter"), expected, IDS)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert_same_behaviour(found, expected, IDS)

    merged = found.merge_and_unload()
    logits = merged(IDS, use_cache=False).logits
    # Merging rounds once more.
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_behaviour(load(tmp_path / "merged"), behaviour(merged, IDS), IDS)
