"""Encoder-decoders: every family through the same seam, with their relative bias and both kinds of cross attention."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from linearize.convert.transfer import IMPLEMENTATION as TRANSFER
from linearize.hub.export import export_model
from linearize.layers.attending import UnsupportedModelError, attention_modules
from linearize.layers.config import PRESETS
from linearize.layers.cross import CrossAttention
from linearize.layers.seam import IMPLEMENTATION, install, new_cache

from .seq2seq import FAMILIES, REFUSED, VOCAB, tiny_seq2seq
from .test_families import error, randomize

CONFIG = replace(PRESETS["augmented-encoder"], window_size=8, conv_taps=4, slack=8)
WHOLE = replace(CONFIG, window_size=64, feature_map=None, conv_taps=0)
CROSS = ["softmax", "linear"]
# Sums of some 40 terms in float32, in another order, through four layers.
TOLERANCE = 1e-5


def pairs(length=40, answer=30) -> dict[str, torch.Tensor]:
    """Two; the first text is 10 tokens shorter than the other."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -10:] = 0
    answers = torch.randint(3, VOCAB, (2, answer), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers}


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


@torch.no_grad()
def cached_logits(model, input_ids, attention_mask, decoder_input_ids, prefill=(12, 20)) -> torch.Tensor:
    """Prefill in two parts, then token by token."""
    states = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
    ends = [*prefill, *range(prefill[-1] + 1, decoder_input_ids.shape[1] + 1)]
    cache, found = None, []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        ids = decoder_input_ids[:, start:end]
        out = model(
            encoder_outputs=states, attention_mask=attention_mask, decoder_input_ids=ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, batch = tiny_seq2seq(family), pairs()
    softmax = logits(model, **batch)
    install(model, WHOLE)
    # The window sees all there is, with whatever bias the family adds.
    assert error(logits(model, **batch), softmax) < TOLERANCE
    for cross in CROSS:
        randomize(install(model, replace(CONFIG, cross=cross)))
        assert [*model.linear_attentions()] == [*range(4 if cross == "softmax" else 6)]
        assert not model.is_encoder
        found = logits(model, **batch)
        assert error(found, softmax) > 1e-2
        assert error(cached_logits(model, **batch), found) < TOLERANCE
        # Neither the padding of the text nor the other row is seen.
        alone = {"input_ids": batch["input_ids"][:1, :30], "decoder_input_ids": batch["decoder_input_ids"][:1]}
        assert error(logits(model, **alone), found[:1]) < TOLERANCE
        # What comes later in the answer changes nothing before it.
        changed = batch["decoder_input_ids"].clone()
        changed[:, 25:] = 3
        assert torch.equal(logits(model, **batch | {"decoder_input_ids": changed})[:, :25], found[:, :25])


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        attention_modules(tiny_seq2seq(family))


@pytest.mark.parametrize("family", ["t5", "umt5", "bart"])
@pytest.mark.parametrize("implementation", [TRANSFER, "sdpa"])
def test_the_softmax_model_is_still_there(family, implementation):
    """As the teacher of attention transfer, and for distillation."""
    model, batch = tiny_seq2seq(family), pairs()
    softmax = logits(model, **batch)
    randomize(install(model, replace(CONFIG, cross="linear")))
    for layer in model.linear_attentions().values():
        layer.task = None
    model.set_attn_implementation(implementation)
    # Padding sees padding in one of them, and nothing reads what comes of it.
    assert error(logits(model, **batch), softmax) < TOLERANCE
    model.set_attn_implementation(IMPLEMENTATION)
    assert error(logits(model, **batch), softmax) > 1e-2


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_and_without_cache(cross, beams):
    model, batch = randomize(install(tiny_seq2seq("t5"), replace(CONFIG, cross=cross))), pairs()
    del batch["decoder_input_ids"]
    arguments = {"max_new_tokens": 24, "num_beams": beams, "decoder_start_token_id": 0, "do_sample": False}
    cached = model.generate(**batch, **arguments)
    assert cached.shape[1] > 10
    assert torch.equal(cached, model.generate(**batch, **arguments, use_cache=False))


def test_the_cache_of_linear_cross_attention_does_not_grow_with_the_text():
    model = randomize(install(tiny_seq2seq("t5"), replace(CONFIG, cross="linear")))
    sizes = []
    for length in (20, 200):
        ids = torch.randint(3, VOCAB, (1, length))
        with torch.no_grad():
            cache = model(input_ids=ids, decoder_input_ids=ids[:, :40], use_cache=True).past_key_values
        assert isinstance(cache, EncoderDecoderCache)
        layers = cache.cross_attention_cache.layers
        assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in layers)
        sizes.append(sum(layer.nbytes for layer in layers) + cache.self_attention_cache.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_linear_cross_attention_is_its_formula():
    for preset in ("lolcats", "performer", "flash-global", "transnormer", "yoso+group"):
        if PRESETS[preset].feature_map is None:
            with pytest.raises(ValueError, match="^cross: linear needs a feature_map"):
                CrossAttention(PRESETS[preset], 4, 2, 8)
            continue
        torch.manual_seed(0)
        layer = CrossAttention(PRESETS[preset], 4, 2, 8).double()
        q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads, length in ((4, 5), (2, 9), (2, 9)))
        segments = torch.ones(2, 9, dtype=torch.long)
        segments[0, 6:] = 0
        found = layer(q, k, v, segments)
        for row, head, query in ((0, 1, 3), (1, 3, 0)):
            keys = [key for key in range(9) if segments[row, key]]
            phi_q = layer.phi_q(q)[row, head, query]
            b = torch.stack([phi_q @ layer.phi_k(k)[row, head // 2, key] for key in keys])
            expected = sum(weight * v[row, head // 2, key] for weight, key in zip(b, keys, strict=True))
            if layer.norm == "sum":
                expected = expected / b.sum()
            elif layer.norm == "count":
                expected = expected / len(keys)
            else:
                assert layer.norm == "rms"
                expected = expected / (expected.square().mean() + 1e-6).sqrt()
            torch.testing.assert_close(found[row, head, query], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_exported_and_loaded(family, cross, tmp_path):
    model, batch = randomize(install(tiny_seq2seq(family), replace(CONFIG, cross=cross))), pairs()
    export_model(model, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__mro__[1].__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(loaded, **batch), logits(model, **batch), rtol=1e-5, atol=1e-5)
    arguments = {"input_ids": batch["input_ids"], "max_new_tokens": 12, "num_beams": 2, "decoder_start_token_id": 0}
    assert torch.equal(loaded.generate(**arguments), model.generate(**arguments))


def test_classifiers_are_exported_and_loaded(tmp_path):
    model = tiny_seq2seq("t5", AutoModelForSequenceClassification, num_labels=3)
    ids = pairs()["input_ids"]
    ids[:, -1] = 2
    randomize(install(model, CONFIG))
    export_model(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert expected.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_bias_and_everything_that_is_new():
    model, batch = randomize(install(tiny_seq2seq("t5"), replace(CONFIG, cross="linear"))), pairs()
    model(**batch, use_cache=False).logits.square().mean().backward()
    wanted = [p for name, p in model.named_parameters() if "relative_attention_bias" in name or "linear_att" in name]
    assert len(wanted) > 20 and all(p.grad is not None and p.grad.any() for p in wanted)


def test_what_does_not_fit_is_refused():
    model = tiny_seq2seq("t5")
    with pytest.raises(ValueError, match="^state: .*augmented-encoder"):
        install(model, PRESETS["augmented"])
    with pytest.raises(ValueError, match="^cross: linear needs a feature_map"):
        install(model, replace(WHOLE, cross="linear"))
    assert not hasattr(model.config, "linear_attention")
    install(model, CONFIG)
    batch = pairs()
    with pytest.raises(TypeError, match="cannot continue from"):
        model(**batch, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    assert new_cache(model).self_attention_cache.get_seq_length() == 0
