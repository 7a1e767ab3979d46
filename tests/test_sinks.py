"""Sinks at a capped distance: beyond it a model sees them as StreamingLLM does, so length has no end."""

from dataclasses import replace

import pytest
import torch

from linearize.layers.config import PRESETS
from linearize.layers.seam import install

from .families import tiny_model

CONFIG = replace(PRESETS["swa"], window_size=6, sinks=2, sink_distance=10)


def one_layer(family):
    model = tiny_model(family)
    base = model.base_model
    base.layers = base.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi", "glm", "olmo2", "cohere"])
@pytest.mark.parametrize("length", [8, 11, 40])
def test_last_token_sees_sinks_from_the_capped_position(family, length):
    """One layer of softmax over sinks and window alone, placed where the cap has them."""
    softmax, student = one_layer(family), install(one_layer(family), CONFIG)
    ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0))
    last = min(length - 1, CONFIG.sink_distance)
    window = torch.arange(last - CONFIG.window_size + 1, last + 1)
    seen = torch.cat([ids[:, :2], ids[:, -CONFIG.window_size :]], dim=1)
    position_ids = torch.cat([torch.arange(2), window])[None]
    mask = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -torch.inf)
    expected = softmax(seen, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[:, -1]
    # Single precision through one layer.
    torch.testing.assert_close(student(ids, use_cache=False).logits[:, -1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cap_changes_what_is_behind_it_alone():
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    capped = install(model, CONFIG)(ids, use_cache=False).logits
    true = install(model, replace(CONFIG, sink_distance=None))(ids, use_cache=False).logits
    torch.testing.assert_close(capped[:, :11], true[:, :11], rtol=1e-5, atol=1e-6)
    assert (capped[:, 11:] - true[:, 11:]).abs().amax(-1).min() > 1e-4


def test_a_rotary_embedding_without_a_module_is_refused():
    model = tiny_model("llama")
    del model.base_model.rotary_emb
    with pytest.raises(ValueError, match="sink_distance: .* no module"):
        install(model, CONFIG)
