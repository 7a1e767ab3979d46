"""FLASH, the family that transformers does not have: one model in all the ways it can be run."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from linearize.hub.export import export_model
from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS
from linearize.layers.flash import FlashConfig, eager_attention_forward
from linearize.layers.seam import install

from .layers import ancestors_of

VOCAB = 99
# Groups of 16, four of which are a chunk of the torch backend.
FLASH = replace(PRESETS["flash"], window_size=16, conv_taps=4, slack=16)
VARIANTS = {
    "all": FLASH,
    "local": replace(FLASH, feature_map=None, conv_taps=0),
    "local + group": replace(FLASH, conv_taps=0),
    "group": replace(FLASH, window=None, conv_taps=0),
    "softmax": replace(FLASH, local="softmax"),
    "relu2": replace(FLASH, local="relu2"),
    "quadratic": None,
    "quadratic softmax": None,
}
# Sums of some hundred terms in double precision, in another order, through two layers.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make_model(variant: str, dtype=torch.float64):
    """Two layers whose weights are large enough for every branch to contribute."""
    torch.manual_seed(0)
    kernel = "softmax" if variant == "quadratic softmax" else "laplace"
    config = FlashConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, head_dim=16, rotary_dim=8, kernel=kernel, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if VARIANTS[variant] is not None:
        install(model, VARIANTS[variant])
        for layer in model.linear_attentions().values():
            layer.to(dtype)
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def text(*shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def cache_of(model):
    return LinearCache(model) if hasattr(model, "linear_attentions") else DynamicCache()


def split_logits(model, ids, ends, cache=None):
    cache = cache_of(model) if cache is None else cache
    pieces = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([model(ids[:, start:end], past_key_values=cache).logits for start, end in pieces], dim=1)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return make_model(request.param)


def test_decoding_equals_the_full_forward(model, without_gradients):
    """Prefill in pieces, then token by token, over many groups and past the ring; and the oracle."""
    ids = text(2, 150)
    full = model(ids, use_cache=False).logits
    torch.testing.assert_close(split_logits(model, ids, [9, 70, *range(71, 151)]), full, **EXACT)
    for layer in getattr(model, "linear_attentions", dict)().values():
        layer.backend = "reference"
        torch.testing.assert_close(model(ids, use_cache=False).logits, full, **EXACT)
        layer.backend = "torch"


def test_nothing_sees_what_is_to_come(model, without_gradients):
    ids, other = text(1, 100), text(1, 100, seed=2)
    for place in (1, 15, 16, 63, 64, 65):
        changed = torch.cat([ids[:, :place], other[:, place:]], dim=1)
        before = [model(x, use_cache=False).logits[:, :place] for x in (ids, changed)]
        torch.testing.assert_close(*before, **EXACT)


def test_padding_and_packed_documents_change_nothing(model, without_gradients):
    """Token shift neither: a document's first token has none before it."""
    ids = text(1, 40)
    alone = model(ids, use_cache=False).logits
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(47) >= 7).long()[None]
    torch.testing.assert_close(model(padded, attention_mask=mask, use_cache=False).logits[:, 7:], alone, **EXACT)
    packed = torch.cat([text(1, 23, seed=5), ids], dim=1)
    positions = torch.cat([torch.arange(23), torch.arange(40)])[None]
    torch.testing.assert_close(model(packed, position_ids=positions, use_cache=False).logits[:, 23:], alone, **EXACT)


def test_generate_and_crop(model, without_gradients):
    """With a cache as without, a padded row as alone; and what is taken back was never there."""
    ids = text(2, 20)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :5], mask[1, :5] = 0, 0
    arguments = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    cached = model.generate(padded, attention_mask=mask, **arguments)
    assert cached.tolist() == model.generate(padded, attention_mask=mask, use_cache=False, **arguments).tolist()
    assert cached[1, 5:].tolist() == model.generate(ids[1:, 5:], **arguments)[0].tolist()

    cache = cache_of(model)
    split_logits(model, ids, [15, 20], cache)
    cache.crop(-4)
    rest = model(ids[:, 16:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 16:], **EXACT)


def test_draft_trees(without_gradients):
    """Each node as if its path had been said, the shifted channels too; then the accepted ones are the text."""
    model, ids, parents = make_model("all"), text(1, 46), [-1, 0, 0, 1, 3, -1]
    nodes, ancestors = text(1, len(parents), seed=3), ancestors_of(parents)
    cache = LinearCache(model)
    split_logits(model, ids, [30, 46], cache)
    positions = (46 + ancestors.sum(-1) - 1)[None]
    with cache.verifying(ancestors):
        out = model(nodes, position_ids=positions, past_key_values=cache).logits
    for node in range(len(parents)):
        path = ancestors[node].nonzero().flatten()
        said = torch.cat([ids, nodes[:, path]], dim=1)
        torch.testing.assert_close(out[:, node], model(said, use_cache=False).logits[:, -1], **EXACT)
    path = torch.tensor([[0, 1, 3]])
    cache.accept(path)
    said = torch.cat([ids, nodes[:, path[0]], text(1, 5, seed=4)], dim=1)
    rest = model(said[:, 49:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(said, use_cache=False).logits[:, 49:], **EXACT)


def test_the_quadratic_kernel_is_the_laplace_function(without_gradients):
    unit = make_model("quadratic").model.layers[0]
    q, k, v = (torch.randn(1, 1, 9, dim, dtype=torch.float64) for dim in (16, 16, 64))
    sigma = math.sqrt(1 / (4 * math.pi))
    scores = (q @ k.mT / 4 - math.sqrt(1 / 2)) / (sigma * math.sqrt(2))
    expected = ((1 + torch.erf(scores)) / 2).tril() @ v
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    out, _ = eager_attention_forward(unit, q, k, v, mask, 16**-0.5)
    # transformers has the mean and the deviation to six digits.
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_the_published_size():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("linearize_flash"))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(110, rel=0.03)


def test_exports_load_without_the_package(tmp_path):
    """The quadratic model as an ordinary checkpoint that brings its family, the linear one with all of its code."""
    ids, expected = text(1, 40), {}
    for name in ("quadratic", "all"):
        model = make_model(name, torch.float32)
        export_model(model, tmp_path / name)
        with torch.no_grad():
            expected[name] = model(ids, use_cache=False).logits
        written = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0)[0].tolist()
        expected[name] = expected[name], written
    code = f"""
import sys; sys.modules["linearize"] = None
import json, torch
from transformers import AutoModelForCausalLM
ids, found = torch.tensor({ids.tolist()}), {{}}
for name in ("quadratic", "all"):
    model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/{{name}}", trust_remote_code=True)
    torch.save(model(ids, use_cache=False).logits.detach(), f"{tmp_path}/{{name}}.pt")
    found[name] = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0)[0].tolist()
print(json.dumps(found))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for name, (logits, written) in expected.items():
        # The same code, on the same machine.
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=1e-6, atol=1e-6)
        assert found[name] == written
    model_types = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in expected]
    assert model_types == ["linearize_flash", "linearized_linearize_flash"]
    assert not list((tmp_path / "quadratic").glob("linearize_seam.py"))
