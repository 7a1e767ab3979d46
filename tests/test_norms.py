"""RMS norms by one kernel are those of the families."""

import pytest
import torch
from torch import nn

from linearize.layers.norms import fused_norm, fused_norms

from .families import tiny_model


def norms(model):
    return [module for module in model.modules() if "Norm" in type(module).__name__]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "olmo2"])
def test_they_do_the_same(family):
    model = tiny_model(family)
    for norm in norms(model):
        norm.weight.data.uniform_(-1, 2)
    ids = torch.arange(12)[None]
    own = type(norms(model)[0]).forward
    with torch.no_grad():
        expected = model(ids).logits
        with fused_norms(model):
            assert all("forward" in vars(norm) for norm in norms(model))
            found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert all(norm.forward.__func__ is own for norm in norms(model))


# 1 + weight, and LayerNorm.
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_others_are_left_alone(family):
    model = tiny_model(family)
    assert not any(fused_norm(norm) for norm in norms(model))


def test_what_only_has_the_name_is_left_alone():
    class HalfRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return nn.functional.rms_norm(x, (8,), self.weight, self.eps) / 2

    assert fused_norm(HalfRMSNorm()) is None
