"""What the stages minimise: whose teacher, which labels, and no dropout where a frozen model teaches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linearize.convert import finetune
from linearize.convert.finetune import LabelsAndDistillation
from linearize.convert.medusa import MedusaModel
from linearize.convert.models import prepare_finetune
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.seam import IMPLEMENTATION, install
from linearize.recipes.schema import FinetuneSection, MedusaSection

WIDE = LinearAttentionConfig(window_size=64, sinks=4, conv_taps=4)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def test_distillation_is_zero_where_student_and_teacher_are_one(batch):
    """A window wider than the text and adapters that start at zero change nothing."""
    section = FinetuneSection(steps=1, next_token=0.0, distill=1.0)
    model = prepare_finetune(install(llama(), WIDE), section)
    assert LabelsAndDistillation(section).loss(model.train(), batch, 1, 0).item() == pytest.approx(0, abs=1e-6)


def test_distillation_teacher_is_the_softmax_model_without_adapters(batch):
    section = FinetuneSection(steps=1, next_token=0.0, distill=1.0)
    softmax = llama().eval()
    model = prepare_finetune(install(llama(), LinearAttentionConfig(window_size=4, sinks=1)), section).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    objective = LabelsAndDistillation(section)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    torch.testing.assert_close(objective._teacher_logits(model, inputs), softmax(**inputs).logits)
    assert model.training and model.config._attn_implementation == IMPLEMENTATION
    assert objective.loss(model, batch, 1, 0).item() > 0.01


class Wrapper(nn.Module):
    """A model as distributed launches wrap it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_distillation_under_a_wrapper(batch):
    section = FinetuneSection(steps=1, distill=1.0)
    model = prepare_finetune(install(llama(), LinearAttentionConfig(window_size=4, sinks=1)), section).train()
    # Dropout would not be the same twice.
    for module in model.modules():
        module.attention_dropout = 0.0
    losses = [LabelsAndDistillation(section).loss(each, batch, 1, 0) for each in (model, Wrapper(model))]
    assert torch.equal(*losses)


def gradients(loss, model):
    """The loss, and the gradient of every trainable parameter."""
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("next_token", "distill"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_loss_in_chunks_is_the_loss(batch, monkeypatch, next_token, distill):
    """Sums of 80 terms in another order: 1e-6 in fp32."""
    monkeypatch.setattr(finetune, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(finetune, "LOGITS_AT_ONCE", 0)
    section = FinetuneSection(steps=1, next_token=next_token, distill=distill)
    softmax = llama().eval()
    model = prepare_finetune(install(llama(), LinearAttentionConfig(window_size=4, sinks=1)), section)
    # Dropout would not be the same twice.
    for module in model.modules():
        module.attention_dropout = 0.0
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    logits = model.train()(**inputs).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    learned = labels != -100
    with torch.no_grad():
        teacher = softmax(**inputs).logits[:, :-1].flatten(0, 1)
    cross_entropy = nn.functional.cross_entropy(logits, labels)
    divergence = nn.functional.kl_div(
        logits[learned].log_softmax(-1), teacher[learned].log_softmax(-1), reduction="batchmean", log_target=True
    )
    expected = gradients(next_token * cross_entropy + distill * divergence, model)
    actual = gradients(LabelsAndDistillation(section).loss(model, batch, 1, 0), model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-6)


def test_a_batch_without_labels_has_no_loss(batch):
    section = FinetuneSection(steps=1)
    model = prepare_finetune(install(llama(), WIDE), section)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert LabelsAndDistillation(section).loss(model, batch, 1, 0).item() == 0


class Logits(nn.Module):
    """A model that is nothing but its logits."""

    def __init__(self, tokens: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(1, tokens, 1000, generator=generator))

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.logits.bfloat16())


def test_memory_of_the_loss_is_the_logits_and_one_chunk(monkeypatch):
    """Held for the backward pass: the logits as they came; while it runs: fp32 copies of so many tokens."""
    monkeypatch.setattr(finetune, "TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(finetune, "LOGITS_AT_ONCE", 0)
    objective = LabelsAndDistillation(FinetuneSection(steps=1, distill=1.0))
    monkeypatch.setattr(objective, "_teacher_logits", lambda model, inputs: model(**inputs).logits.detach())
    labels = torch.arange(200).view(1, -1)
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = Logits(200)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = objective.loss(model, {"input_ids": labels, "position_ids": labels, "labels": labels}, 1, 0)
    # Student and teacher in bf16, and the labels.
    assert sum(saved.values()) < 1.1 * 2 * model.logits.numel() * 2
    loss.backward()
    assert model.logits.grad.abs().sum() > 0


def test_medusa_head_predicts_the_token_after_the_next(batch):
    """Head i at token t is scored against token t + i + 2, within the document."""
    model = MedusaModel(install(llama().eval(), WIDE), MedusaSection(steps=1, heads=2))
    for i, (logits, labels) in enumerate(model(batch)):
        ahead = i + 2
        assert logits.shape == (2, 40 - ahead, 50)
        for t in range(40 - ahead):
            inside = not t < 15 <= t + ahead
            expected = batch["input_ids"][:, t + ahead] if inside else torch.full((2,), -100)
            assert torch.equal(labels[:, t], expected), (i, t)


@pytest.mark.parametrize("projection", ["shared", "own"])
def test_medusa_starts_from_the_models_own_guess(batch, projection):
    base = install(llama().eval(), WIDE)
    model = MedusaModel(base, MedusaSection(steps=1, heads=1, projection=projection)).train()
    expected = base(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    ((logits, _),) = model(batch)
    torch.testing.assert_close(logits, expected[:, :-2])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


def test_frozen_models_teach_without_dropout():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, resid_pdrop=0.5, embd_pdrop=0.5))
    model = MedusaModel(install(base, WIDE), MedusaSection(steps=1, heads=1)).train()
    ids = torch.arange(30).view(1, -1)
    batch = {"input_ids": ids, "position_ids": torch.arange(30).view(1, -1), "labels": ids}
    assert torch.equal(model(batch)[0][0], model(batch)[0][0])
