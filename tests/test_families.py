"""Conformance: every model family behaves alike once its attention is linear, and no code knows the family."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from linearize.convert.models import LINEAR, train_only
from linearize.convert.transfer import IMPLEMENTATION as TRANSFER
from linearize.convert.transfer import AttentionTransfer
from linearize.hub.export import export_model
from linearize.layers.attending import UnsupportedModelError
from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import IMPLEMENTATION, install
from linearize.recipes.training import TransferSection

from .families import FAMILIES, PAD, PARTLY_ROTARY, VOCAB, WITHOUT_ROTARY, tiny_model

CONFIG = LinearAttentionConfig(
    window="sliding", window_size=8, sinks=2, sink_distance=12, conv_taps=4, feature_map="hedgehog", slack=8
)
# Sums of some 40 terms in float32, in another order, through two layers.
TOLERANCE = 1e-5

# In these the softmax model itself mixes packed documents: its masks do not look at position_ids (biogpt, opt), or
# its short convolutions run across documents (lfm2).
MIXES_DOCUMENTS = {"biogpt", "lfm2", "opt"}


def randomize(model, seed=0):
    """Weights with which every branch of every layer contributes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.linear_attentions().values():
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
            if name == "lam":
                parameter.data.abs_().add_(0.2)
    return model


def text(*shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **({"use_cache": False} | kwargs)).logits


@torch.no_grad()
def cached_logits(model, ids, prefill=20, chunk=7):
    """Prefill in chunks, then token by token."""
    cache = LinearCache(model)
    ends = [*range(chunk, prefill, chunk), *range(prefill, ids.shape[1] + 1)]
    return torch.cat(
        [
            model(ids[:, start:end], past_key_values=cache).logits
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ],
        dim=1,
    )


# Tests of one family run one after the other, so one model of each kind is alive at a time.
@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def softmax(family):
    return tiny_model(family)


@pytest.fixture(scope="module")
def linear(family):
    return randomize(install(tiny_model(family), CONFIG))


def test_cached_decode_equals_full_forward(linear):
    ids = text(2, 36)
    full = logits(linear, ids)
    assert error(cached_logits(linear, ids), full) < TOLERANCE


def test_cached_decode_equals_full_forward_with_maps_of_rotated_keys(family):
    model = randomize(install(tiny_model(family), replace(CONFIG, rope="after")))
    ids = text(2, 36)
    full = logits(model, ids)
    assert error(cached_logits(model, ids), full) < TOLERANCE
    if family not in WITHOUT_ROTARY:
        before = randomize(install(model, CONFIG))
        assert error(logits(before, ids), full) > 1e-3, "rope changes nothing"


def test_every_branch_contributes(linear, softmax):
    """Otherwise the other tests compare less than they claim to."""
    ids = text(2, 36)
    full = logits(linear, ids)
    assert error(full, logits(softmax, ids)) > 1e-2
    try:
        for branch in ("local", "linear", "conv"):
            for layer in linear.linear_attentions().values():
                layer.branches = frozenset({"local", "linear", "conv"} - {branch})
            assert error(logits(linear, ids), full) > 1e-3, branch
    finally:
        for layer in linear.linear_attentions().values():
            layer.branches = frozenset({"local", "linear", "conv"})


def test_generate(linear):
    """Greedy: with a cache as without, and a left-padded row as the same row alone."""
    ids = text(2, 14)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :5], mask[1, :5] = PAD, 0
    options = {"do_sample": False, "max_new_tokens": 10}
    cached = linear.generate(padded, attention_mask=mask, **options)
    uncached = linear.generate(padded, attention_mask=mask, use_cache=False, **options)
    alone = linear.generate(padded[1:, 5:], attention_mask=mask[1:, 5:], **options)
    assert cached.shape == (2, 24)
    assert cached.tolist() == uncached.tolist()
    assert cached[1, 5:].tolist() == alone[0].tolist()


def test_left_padding_changes_no_logits(linear):
    """Sharper than generate, which sees logits only through their argmax."""
    ids = text(1, 30)
    padded = torch.cat([torch.full((1, 6), PAD), ids], dim=1)
    mask = (torch.arange(36) >= 6).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = logits(linear, padded, attention_mask=mask, position_ids=positions)
    assert error(out[:, 6:], logits(linear, ids)) < TOLERANCE


def test_wide_window_at_initialisation_is_the_softmax_model(family, softmax):
    """The rotary detour, the scale of the scores and the masks are right."""
    ids = text(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    student = install(tiny_model(family), replace(PRESETS["augmented"], window_size=64))
    assert error(logits(student, ids), logits(softmax, ids)) < TOLERANCE
    ours, theirs = logits(student, ids, attention_mask=mask), logits(softmax, ids, attention_mask=mask)
    valid = mask.bool()
    assert error(ours[valid], theirs[valid]) < TOLERANCE


def test_rotation_is_found_layer_by_layer(family):
    model = install(tiny_model(family), CONFIG)
    logits(model, text(1, 9))
    found = [getattr(layer, "rotates", None) for layer in model.linear_attentions().values()]
    if family in WITHOUT_ROTARY:
        assert not any(found)
    else:
        assert found == PARTLY_ROTARY.get(family, [True] * len(found))


# lfm2 has a convolution before its first attention.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_ROTARY | {"lfm2"}])
def test_feature_maps_see_no_positions(name):
    """The first layer's raw keys of one repeated token are all the same; the rotated ones are not."""
    model = install(tiny_model(name), CONFIG)
    seen = {}
    layer = next(iter(model.linear_attentions().values()))
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs, k=args[1]), with_kwargs=True)
    logits(model, torch.full((1, 12), 5))
    raw, rotated = seen["raw_k"], seen["k"]
    assert error(raw, raw[:, :, :1].expand_as(raw)) < TOLERANCE
    assert error(rotated, rotated[:, :, :1].expand_as(rotated)) > 1e-2
    # Position 0 rotates by nothing, up to the factor that some scaled embeddings carry.
    assert error(rotated[:, :, :1], raw[:, :, :1]) < TOLERANCE


def test_packed_documents_are_separate(family, linear, softmax):
    ids = text(2, 40)
    position_ids = torch.cat([torch.arange(17), torch.arange(23)])[None].expand(2, -1)
    if family in MIXES_DOCUMENTS:
        mixed = logits(softmax, ids, position_ids=position_ids)[:, 17:]
        assert error(mixed, logits(softmax, ids[:, 17:])) > 1e-2, "no exception any more"
        return
    for use_cache in (False, True):  # asking for a cache is harmless
        packed = logits(linear, ids, position_ids=position_ids, use_cache=use_cache)
        assert error(packed[:, :17], logits(linear, ids[:, :17])) < TOLERANCE
        assert error(packed[:, 17:], logits(linear, ids[:, 17:])) < TOLERANCE


def test_transfer_step(family, softmax):
    """Finite gradients on the new parameters and nowhere else, and the teacher's output is passed on."""
    model = randomize(install(tiny_model(family), CONFIG))
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(TRANSFER)
    ids = text(2, 40)
    positions = torch.arange(40).expand(2, -1)
    loss = AttentionTransfer(TransferSection(steps=1), seed=0).loss(
        model, {"input_ids": ids, "position_ids": positions}, 1, 0
    )
    assert 0 < loss.item() < float("inf")
    for name, parameter in model.named_parameters():
        if LINEAR in name:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert error(logits(model, ids), logits(softmax, ids)) < TOLERANCE


def test_exported_and_loaded_again(linear, tmp_path):
    export_model(linear, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    ids = text(2, 36)
    full = logits(linear, ids)
    assert error(logits(loaded, ids), full) < 1e-6
    options = {"do_sample": False, "max_new_tokens": 10}
    assert loaded.generate(ids, **options).tolist() == linear.generate(ids, **options).tolist()


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "olmo3", "ministral"])
def test_own_sliding_window_of_the_model_no_longer_matters(name):
    ids = text(2, 36)
    wide = logits(randomize(install(tiny_model(name), CONFIG)), ids)
    model = tiny_model(name, sliding_window=5)
    assert error(logits(model, ids), wide) > 1e-3
    narrow = randomize(install(model, CONFIG))
    assert error(logits(narrow, ids), wide) < 1e-7
    assert error(cached_logits(narrow, ids), wide) < TOLERANCE


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(rope):
    ids = text(2, 40)
    model = tiny_model("llama", rope_parameters=rope)
    softmax = logits(model, ids)
    assert error(softmax, logits(tiny_model("llama"), ids)) > 1e-3
    student = install(model, replace(PRESETS["augmented"], window_size=64))
    assert error(logits(student, ids), softmax) < TOLERANCE


# Model type -> what its tiny configuration needs, and the attention class that the message has to name.
REFUSED = {
    "falcon": ({}, "FalconAttention"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "BloomAttention"),
    "gptj": ({"rotary_dim": 8}, "GPTJAttention"),
    "codegen": ({"rotary_dim": 8}, "CodeGenAttention"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptAttention"),
    "deepseek_v3": (
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
        "DeepseekV3Attention",
    ),
    "gemma2": ({"attn_logit_softcapping": 50.0}, "Gemma2Attention"),
    "gpt_oss": ({}, "GptOssAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_untouched(name):
    overrides, attention_class = REFUSED[name]
    model = tiny_model(name, **overrides)
    model_class, implementation = type(model), model.config._attn_implementation
    modules = [(key, type(module)) for key, module in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=attention_class):
        install(model, CONFIG)
    assert type(model) is model_class and model.config._attn_implementation == implementation != IMPLEMENTATION
    assert [(key, type(module)) for key, module in model.named_modules()] == modules
    assert not hasattr(model.config, "linear_attention")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_config_that_does_not_fit_the_heads_leaves_the_model_untouched():
    model = tiny_model("llama")
    before = logits(model, text(1, 9))
    with pytest.raises(ValueError, match="feature_dim"):
        install(model, replace(CONFIG, feature_map="relu", feature_dim=5))
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "linear_attention")
    assert not any(isinstance(module, LinearAttention) for module in model.modules())
    assert torch.equal(logits(model, text(1, 9)), before)


def test_install_again_replaces():
    ids = text(1, 20)
    model = randomize(install(tiny_model("qwen3"), replace(CONFIG, window_size=4, conv_taps=0)))
    install(model, CONFIG)
    assert error(logits(randomize(model), ids), logits(randomize(install(tiny_model("qwen3"), CONFIG)), ids)) < 1e-7
    attention = model.model.layers[0].self_attn
    assert len(attention._forward_pre_hooks) == 1 and len(model._forward_pre_hooks) == 1


def test_softmax_can_be_switched_back_on():
    ids = text(2, 20)
    model = tiny_model("smollm3")
    softmax = logits(model, ids)
    randomize(install(model, CONFIG))
    assert error(logits(model, ids), softmax) > 1e-2
    model.set_attn_implementation("sdpa")
    assert error(logits(model, ids), softmax) < 1e-6


def test_softmax_cache_and_4d_mask_are_refused():
    model = install(tiny_model("llama"), CONFIG)
    with pytest.raises(TypeError, match="LinearCache"):
        model(text(1, 9), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="4-D"):
        model(text(1, 9), attention_mask=torch.ones(1, 1, 9, 9).tril().log(), use_cache=False)


def test_beam_search_equals_beam_search_without_cache():
    model = randomize(install(tiny_model("qwen2"), CONFIG))
    options = {"do_sample": False, "max_new_tokens": 10, "num_beams": 3}
    cached = model.generate(text(2, 12), **options)
    assert cached.tolist() == model.generate(text(2, 12), use_cache=False, **options).tolist()


def test_state_survives_half_precision():
    """Everything around the layer in bfloat16, sums in float32."""
    model = randomize(install(tiny_model("llama").to(torch.bfloat16), CONFIG))
    cache = LinearCache(model)
    with torch.no_grad():
        assert model(text(1, 40), past_key_values=cache).logits.dtype == torch.bfloat16
    assert cache.layers[0].state.S.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.linear_attentions()[0].parameters())
