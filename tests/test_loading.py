"""What people do with a model that they loaded: sharded files, devices, precision, torch.compile, copies."""

import json
import pickle
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, PreTrainedModel

from .exports import GREEDY, assert_same_behaviour, behaviour, export_tiny, load, some_ids

IDS = some_ids(2, 40)


@pytest.fixture(scope="module")
def model(exported):
    return load(exported)


@pytest.fixture(scope="module")
def expected(model):
    return behaviour(model, IDS)


def test_shards_load_and_are_checked(tiny_model, expected, tmp_path, monkeypatch):
    directory = export_tiny(tiny_model, tmp_path / "shards", max_shard_size="20KB")
    shards = {*json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values()}
    assert {file.name for file in directory.glob("model*.safetensors")} == shards and len(shards) > 3
    assert_same_behaviour(load(directory), expected, IDS)

    save = PreTrainedModel.save_pretrained

    def lose(model, directory, **arguments):
        save(model, directory, **arguments)
        shard = sorted(directory.glob("model*.safetensors"))[1]
        weights = load_file(shard)
        lost.append(weights.popitem()[0])
        save_file(weights, shard)

    lost = []
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lose)
    with pytest.raises(ValueError) as error:
        export_tiny(tiny_model, tmp_path / "lost", max_shard_size="20KB")
    assert str(error.value).startswith(lost[0]) and str(error.value).endswith("was saved as nothing")


@pytest.mark.parametrize(
    ("device_map", "offloaded"),
    [
        ({"": "cpu"}, False),
        ("auto", False),
        # What is on disk comes for each call; the output projection, from which draft heads guess, too.
        ({"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
          "model.norm": "disk", "lm_head": "disk"}, True),
    ],
    ids=["cpu", "auto", "disk"],
)  # fmt: skip
def test_device_maps(exported, expected, tmp_path, device_map, offloaded):
    model = load(exported, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters()) == offloaded
    assert_same_behaviour(model, expected, IDS)


def test_memory_too_small_for_all_of_it(exported, expected, tmp_path):
    model = load(exported, device_map="auto", max_memory={"cpu": 110_000}, offload_folder=tmp_path)
    assert {*model.hf_device_map.values()} == {"cpu", "disk"}
    assert_same_behaviour(model, expected, IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(exported, model, expected, dtype):
    half = load(exported, dtype=dtype)
    assert half.dtype == dtype and half.lm_head.weight.dtype == dtype
    assert {p.dtype for layer in half.linear_attentions().values() for p in layer.parameters()} == {torch.float32}
    with torch.no_grad():
        out = half(IDS, use_cache=True)
        text = half.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        scores = model(text).logits[:, IDS.shape[1] - 1 : -1]
        theirs = half(text, use_cache=False).logits[:, IDS.shape[1] - 1 : -1].float()
    assert {layer.state.S.dtype for layer in out.past_key_values.layers} == {torch.float32}
    # Some ten roundings to the dtype on the way through two layers.
    rounding = 10 * torch.finfo(dtype).eps
    assert ((theirs - scores).norm() / scores.norm()) < rounding
    # What it chose is in fp32 the best, up to what rounding does to either of two logits.
    chosen = scores.gather(-1, text[:, IDS.shape[1] :, None]).squeeze(-1)
    assert (scores.amax(-1) - chosen).max() <= 2 * rounding * scores.abs().max()


def test_compiled(exported, expected):
    """Attention is left to its kernels, and the rest is traced; a token more is no reason to trace it again."""
    model = load(exported)
    torch._dynamo.reset()
    # What a backend makes of the graphs is torch's own business.
    model.compile(backend="eager")
    try:
        with torch.no_grad():
            logits = model(IDS, use_cache=False).logits
        torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] > 2
        mask = torch.ones_like(IDS)
        assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY), expected[1])
        graphs = counters["stats"]["unique_graphs"]
        longer = model.generate(IDS, attention_mask=mask, **GREEDY | {"max_new_tokens": 48, "min_new_tokens": 48})
        assert torch.equal(longer[:, : expected[1].shape[1]], expected[1])
        assert counters["stats"]["unique_graphs"] == graphs
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"])
def test_copies_stand_alone(exported, expected, copied):
    model = load(exported)
    behaviour(model, IDS[:1])  # which leaves caches, draft heads and notes of the seam behind
    copy = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same_behaviour(copy, expected, IDS)


def test_moved_and_cast_after_loading(exported, expected):
    model = load(exported)
    double = behaviour(model.to("cpu", torch.float64), IDS)
    assert double[0].dtype == torch.float64
    # What fp32 rounds differently, and what it does not.
    torch.testing.assert_close(double[0].float(), expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(double[1], double[2])
    assert_same_behaviour(model.float(), expected, IDS)


def test_two_exports_in_one_process(tiny_model, model, expected, tmp_path):
    other = load(export_tiny(tiny_model, tmp_path / "other", seed=3))
    assert type(other) is not type(model) and type(other).__name__ == type(model).__name__
    theirs = behaviour(other, IDS)
    assert not torch.allclose(theirs[0], expected[0])
    assert_same_behaviour(model, expected, IDS)
    # Softmax models of the family stay what they are.
    softmax = LlamaForCausalLM.from_pretrained(tiny_model)
    assert softmax.config.model_type == "llama" and not hasattr(softmax, "linear_attentions")
    assert softmax.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY).shape == expected[1].shape


def test_saved_again(exported, expected, tmp_path):
    """With its code and its draft heads, in place too."""
    load(exported).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_behaviour(again, expected, IDS)
    # `transformers serve` loads it by this one.
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0] == "AutoModelForCausalLM"
    again.save_pretrained(tmp_path)
    assert_same_behaviour(load(tmp_path), expected, IDS)
    written = again.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY, custom_generate=str(tmp_path),
                             trust_remote_code=True)  # fmt: skip
    assert torch.equal(written, expected[1])


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="continuous batching needs: use `generate`, which takes batches"):
        model.generate_batch([[5, 6, 7]])
