"""Speed: what is timed is what `generate` does, by a clock that counts the tokens that go through the model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from linearize.convert import speed
from linearize.convert.models import merged, with_adapters
from linearize.layers.cache import LinearCache
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.seam import install
from linearize.recipes.schema import FinetuneSection

CONFIG = LinearAttentionConfig(window_size=16, sinks=2, conv_taps=4, slack=8)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def random_ids(length):
    return torch.randint(2, 240, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["softmax", "linear", "kept"])
def test_seconds_are_those_of_the_context_and_of_one_token(model, monkeypatch, kind):
    if kind != "softmax":
        install(model, CONFIG, {1: (0,)} if kind == "kept" else None)
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(sum(read)))
    # Whatever the model says would end a text.
    model.generation_config.eos_token_id = [*range(256)]
    own, ids = model.generation_config, random_ids(100)
    found = speed.speed(model, ids)
    assert (found["prefill_seconds"], found["decode_seconds"]) == (100, 1)
    assert read == ([100] + ([100] + [1] * speed.DECODED) * speed.REPEATS)
    assert model.generation_config is own

    cache = DynamicCache(config=model.config) if kind == "softmax" else LinearCache(model)
    with torch.no_grad():
        model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    # k and v of 2 layers, 2 heads of 8 numbers.
    kept = 2 * 2 * 2 * 8 * 4 * 100
    own_count = cache.nbytes if kind != "softmax" else kept
    assert found["cache_bytes"] == own_count
    if kind == "kept":
        linear = speed.speed(install(model, CONFIG, {1: (0,)}), random_ids(200))["cache_bytes"]
        assert linear - found["cache_bytes"] == kept // 4
    elif kind == "linear":
        assert speed.speed(model, random_ids(200))["cache_bytes"] == own_count


def test_adapters_are_merged_and_come_back_as_they_were(model):
    adapted = with_adapters(model, FinetuneSection(steps=1)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    ids, base = random_ids(50)[None], adapted.get_base_model()
    with torch.no_grad():
        before = {name: value.clone() for name, value in adapted.state_dict().items()}
        expected = base(ids).logits
        with merged(base):
            layer = base.model.layers[0].self_attn.q_proj
            assert layer.merged and not torch.equal(layer.base_layer.weight, before[
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
            ])
            # fp32: one product instead of three.
            torch.testing.assert_close(base(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(base(ids).logits, expected) and not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_the_teacher_and_the_final_model_are_timed(linearize, recipe, tiny_model, tmp_path):
    evaluate = {"tokens": 128, "lengths": [64], "copying": None, "speed": [32, 300]}
    result = linearize("convert", recipe(transfer=None, medusa=None, export=None, evaluate=evaluate))
    assert result.code == 0, result.stderr
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    timed = {name: figures["speed"] for name, figures in results["models"].items() if "speed" in figures}
    assert [*timed] == ["teacher (softmax)", "after finetune"]
    for figures in timed.values():
        # A text that is shorter than the context is repeated.
        assert [*figures] == ["32", "300"]
        assert all(x["prefill_seconds"] > 0 and x["decode_seconds"] > 0 for x in figures.values())
    assert not any("speed" in figures for figures in results["ablations"].values())
    softmax, linear = (figures["300"]["cache_bytes"] for figures in timed.values())
    assert softmax > 2 * linear
    assert "one sequence after 300 tokens" in result.stdout and f"{softmax / 2**20:.1f} MiB" in result.stdout

    options = ["--tokens", 64, "--lengths", 64, "--copying", 0, "--speed", 300]
    alone = json.loads(linearize("evaluate", tiny_model, *options, "--json").stdout)["models"]["teacher (softmax)"]
    assert alone["speed"]["300"]["cache_bytes"] == softmax
