"""Keeping heads, the user's way: named or measured, from the recipe to the exported model."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from linearize.convert import calibrate as calibration
from linearize.convert.calibrate import calibrate, recall_loss, retrieval_scores, said_in_pieces
from linearize.convert.keep import head_budget, heads_by_layer
from linearize.layers.config import PRESETS, LinearAttentionConfig, window_alone
from linearize.layers.seam import install
from linearize.recipes.attention import KeepSection

from .families import VOCAB, tiny_model

CONFIG = LinearAttentionConfig(window_size=8, sinks=2, conv_taps=4, slack=8)


def random_texts(count, length):
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_retrieval_score_is_the_attention_on_the_token_to_copy(name):
    model, texts, length = tiny_model(name), random_texts(2, 20).repeat(1, 2), 20
    scores = retrieval_scores(model, texts)
    attentions = model(texts, output_attentions=True, use_cache=False).attentions
    for (layer, head), score in scores.items():
        groups = attentions[layer].shape[1] // (len(scores) // 2)
        mass = [
            sum(attentions[layer][row, query, i, i - length + 1].item() for row in range(2) for i in range(20, 39))
            for query in range(head * groups, (head + 1) * groups)
        ]
        assert score == pytest.approx(max(mass) / 38, rel=1e-4)


@pytest.mark.parametrize("affordable", [3, 4])
def test_calibration_keeps_the_head_that_is_missed_most(monkeypatch, affordable):
    monkeypatch.setattr(calibration, "AFFORDABLE", affordable)
    texts = random_texts(2, 20)
    measured = calibrate(tiny_model("llama"), CONFIG, texts, 1, Console(quiet=True))
    model = tiny_model("llama")

    def loss(*heads):
        return recall_loss(install(model, window_alone(CONFIG), heads_by_layer(list(heads))), texts)

    def costs(heads):
        return {head: loss(*(heads - {head})).total - loss(*heads).total for head in heads}

    heads = set(measured.retrieval)
    if affordable == 4:
        cost = costs(heads)
        left_out = min(cost, key=cost.get)
    else:
        cost, left_out = {}, min(measured.retrieval, key=measured.retrieval.get)
    cost |= costs(heads - {left_out})
    # Differences of single-precision sums near 5.
    assert measured.cost == pytest.approx(cost, abs=1e-5)
    cost.pop(left_out, None)
    assert measured.kept == [max(cost, key=cost.get)]
    assert (measured.before, measured.after) == (loss(), loss(*measured.kept))


@given(length=st.integers(2, 100))
def test_pieces_are_said_again_whole(length):
    texts = torch.arange(2 * length).view(2, length)
    ids, asked = said_in_pieces(texts)
    assert torch.equal(ids[:, :length], texts)
    again = ids[:, length:]
    size = min(16, length // 2)
    # All but an incomplete last piece, each once and whole.
    assert again[0].sort().values.tolist() == list(range(length // size * size))
    assert all((piece - piece[0]).tolist() == list(range(size)) for piece in again[0].split(size))
    assert torch.equal(again[1], again[0] + length)
    # Within its piece, each token asked for has a quarter before it.
    assert ((asked - length) % size >= size // 4).all() and len(asked) == len(again[0]) // size * (size - size // 4)


def test_loss_is_that_of_the_tokens_it_names():
    model, texts = tiny_model("llama"), random_texts(1, 20)

    def by_token(ids):
        """The token at 1, at 2, .."""
        nats = -model(ids).logits[0].log_softmax(-1)
        return [nats[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])]

    loss = recall_loss(model, texts)
    twice = by_token(texts.repeat(1, 2))
    assert loss.likelihood == pytest.approx(sum(twice[:19]) / 19, rel=1e-5)
    assert loss.recall == pytest.approx(sum(twice[20:]) / 19, rel=1e-5)
    ids, asked = said_in_pieces(texts)
    in_pieces = by_token(ids)
    assert loss.cued_recall == pytest.approx(sum(in_pieces[t - 1] for t in asked) / len(asked), rel=1e-5)


def test_budget_is_rounded_down_and_no_further():
    heads = dict.fromkeys(range(25), 4)
    assert [head_budget(KeepSection(kv_budget=share), heads) for share in (0.29, 0.299, 0.01)] == [29, 29, 1]


def test_window_of_presets_without_one_is_the_published_one():
    assert window_alone(PRESETS["hedgehog"]) == PRESETS["swa"]
    assert window_alone(CONFIG).ring_size < CONFIG.ring_size + 64 and window_alone(CONFIG).window_size == 8


def kept_of(run):
    return json.loads((run / "export" / "model" / "config.json").read_text())["kept_heads"]


def test_convert_with_named_heads(linearize, recipe, tmp_path):
    result = linearize("convert", recipe(keep={"heads": {1: [0]}}, medusa=None))
    assert result.code == 0, result.stderr
    run = tmp_path / "run"
    assert kept_of(run) == {"1": [0]}
    plan = json.loads((run / "plan.json").read_text())
    assert "1 of 4 key heads stay softmax: 25.0% of the KV cache" in result.stdout
    assert "linear state + kept heads" in result.stdout
    assert "layer 1: 0" in (run / "export" / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True)
    for tokens in (50, 400):
        ids = torch.randint(2, 200, (1, tokens), generator=torch.Generator().manual_seed(0))
        cache = model(ids, use_cache=True).past_key_values
        assert cache.nbytes == plan["state_bytes"] + plan["kept_bytes"] * tokens
    losses = json.loads((run / "transfer" / "state.json").read_text())["metrics"]["loss"]
    assert sum(losses[3:]) < sum(losses[:3])


def test_convert_with_a_window_of_kept_heads(linearize, recipe, tmp_path):
    """Constant memory, and as the plan has it."""
    stages = {"transfer": None, "finetune": None, "medusa": None}
    result = linearize("convert", recipe(keep={"layers": [0]}, **stages), "attention.kept_window=100")
    assert result.code == 0, result.stderr
    run = tmp_path / "run"
    plan = json.loads((run / "plan.json").read_text())
    # Sinks, window and slack; the console breaks lines.
    assert f"of the KV cache, of {2 + 100 + 8} tokens at most" in " ".join(result.stdout.split())
    assert "softmax over\nthe last 100 tokens (layer 0: 0, 1)" in (run / "export" / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True)
    ids = torch.randint(2, 200, (1, 400), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True).past_key_values
    assert cache.nbytes == plan["state_bytes"] + plan["kept_bytes"] * plan["kept_tokens"]
    assert "whatever the length" in linearize("chat", run, "--prompt", "hello", "--max-new-tokens", 1).stdout


def test_convert_with_whole_layers_in_half_precision(linearize, recipe, tmp_path):
    half = ["transfer.bf16=true", "finetune.bf16=true", "finetune.distill=0.5", "model.dtype=bfloat16"]
    result = linearize("convert", recipe(keep={"layers": [0]}, medusa=None), *half)
    assert result.code == 0, result.stderr
    assert kept_of(tmp_path / "run") == {"0": [0, 1]}


def test_calibration_is_kept_and_repeatable(linearize, recipe, tmp_path):
    path = recipe(keep={"kv_budget": 0.5, "texts": 2, "length": 60}, medusa=None, finetune=None)
    measured = []
    for name in ("once", "again"):
        result = linearize("convert", path, "--out", tmp_path / name)
        assert result.code == 0, result.stderr
        assert "kept heads: recall" in result.stdout
        measured.append(json.loads((tmp_path / name / "install" / "kept.json").read_text()))
    assert measured[0] == measured[1]
    assert sum(map(len, measured[0]["kept"].values())) == 2
    assert {(head["layer"], head["head"]) for head in measured[0]["heads"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert kept_of(tmp_path / "once") == measured[0]["kept"]
    # The measurement follows from the training data; without one, the layers do not.
    other = linearize("convert", path, "--out", tmp_path / "once", "data.train.source=builtin:heldout")
    assert other.code == 2 and "stage install of another recipe" in other.stderr
    (tmp_path / "once" / "install" / "kept.json").unlink()
    gone = linearize("convert", path, "--out", tmp_path / "once", "--from", "transfer")
    assert gone.code == 2 and "kept.json: is gone; --from install makes it again" in gone.stderr
