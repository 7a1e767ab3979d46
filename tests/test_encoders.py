"""Encoders: every family through the same seam, both ways, without a cache, and out to disk and back."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from linearize.hub.export import export_model
from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS
from linearize.layers.seam import install

from .encoders import FAMILIES, VOCAB, tiny_encoder
from .test_families import error, randomize

ENCODER = replace(PRESETS["augmented-encoder"], window_size=8, conv_taps=4)
WHOLE = replace(ENCODER, window_size=64, feature_map=None, conv_taps=0)


def texts(rows=2, length=60) -> dict[str, torch.Tensor]:
    """The first is 10 tokens shorter than the others."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def states(model, **inputs) -> torch.Tensor:
    """Hidden states of the tokens that are no padding."""
    out = model(**inputs).last_hidden_state
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_looks_both_ways(family):
    model, batch = tiny_encoder(family), texts()
    alone = {"input_ids": batch["input_ids"][:1, :50]}
    softmax = states(model, **batch), states(model, **alone)
    install(model, WHOLE)
    assert model.is_encoder and [*model.linear_attentions()] == [*range(len(model.linear_attentions()))]
    for found, expected in zip((states(model, **batch), states(model, **alone)), softmax, strict=True):
        assert error(found, expected) < 1e-5

    randomize(install(model, ENCODER))
    found = states(model, **batch)
    assert error(found, softmax[0]) > 1e-2
    # Neither padding nor other rows are seen, on either side.
    assert error(states(model, **alone).flatten(0, 1), found[:50]) < 1e-5


@pytest.mark.parametrize("family", ["albert", "bert", "electra"])
def test_padding_on_the_left(family):
    """Of families that take positions."""
    model, batch = randomize(install(tiny_encoder(family), ENCODER)), texts()
    left = {name: x[:1].roll(10, dims=1) for name, x in batch.items()}
    found = states(model, **left, position_ids=(torch.arange(60) - 10).clamp(min=0)[None])
    assert error(found, states(model, **batch)[:50]) < 1e-5


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "modernbert"])
def test_exported_and_loaded(family, tmp_path):
    model, batch = randomize(install(tiny_encoder(family), ENCODER)), texts()
    export_model(model, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        AutoModel.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__mro__[1].__module__.startswith("transformers_modules")
    torch.testing.assert_close(states(loaded, **batch), states(model, **batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_classifiers_are_exported_and_loaded(family, tmp_path):
    model = tiny_encoder(family, AutoModelForSequenceClassification, num_labels=3)
    randomize(install(model, ENCODER))
    export_model(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        expected, found = model(**texts()).logits, loaded(**texts()).logits
    assert expected.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_there_is_no_cache():
    model = install(tiny_encoder("bert"), ENCODER)
    assert getattr(model(**texts()), "past_key_values", None) is None
    with pytest.raises(ValueError, match="looks both ways"):
        LinearCache(model)


def test_gradients_go_through_recomputed_blocks_too():
    model, batch = randomize(install(tiny_encoder("bert"), ENCODER)), texts()
    model.train_linear_attention()

    def gradients():
        model.zero_grad()
        model(**batch).last_hidden_state.square().mean().backward()
        layers = model.linear_attentions().values()
        return [parameter.grad.clone() for layer in layers for parameter in layer.parameters()]

    expected = gradients()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_what_looks_both_ways_has_no_order_for_the_delta_rule():
    model = tiny_encoder("bert")
    with pytest.raises(ValueError, match="^state: .*augmented-encoder"):
        install(model, PRESETS["augmented"])
    assert not hasattr(model.config, "linear_attention")
