"""Measures: the same in pieces, in batches and at once, and right where the answer is known."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from linearize.convert import measures, probes
from linearize.convert.far_mass import attention_weights, divides_mass, far_mass
from linearize.convert.measures import make_measures, score
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import install
from linearize.layers.tokens import near
from linearize.recipes.evaluation import EvaluateSection

CONFIG = LinearAttentionConfig(window_size=16, sinks=2, conv_taps=4, slack=8)
# fp32; pieces and batches sum in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def linear(model, config=CONFIG, kept=None):
    """`model` linearized, with weights with which every branch contributes."""
    install(model, config, kept)
    generator = torch.Generator().manual_seed(0)
    for layer in model.linear_attentions().values():
        for name, parameter in layer.named_parameters():
            if name in ("lam", "lam_query", "conv", "alpha"):
                parameter.data = torch.rand(parameter.shape, generator=generator) * 0.3 + 0.1
    return model


def whole(weights):
    return weights


def random_ids(rows, length, seed=0):
    return torch.randint(2, 240, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("length", [129, 150])
def test_pieces_are_one_forward(model, monkeypatch, kind, length):
    model = linear(model) if kind == "linear" else model
    ids = random_ids(3, length)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    monkeypatch.setattr(measures, "PIECE", 32)
    losses, hits = score(model, ids)
    assert losses.shape == hits.shape == (3, length - 1)
    torch.testing.assert_close(losses, expected, **CLOSE)
    assert torch.equal(hits, logits.argmax(-1) == ids[:, 1:])


def test_batches_do_not_matter(model, monkeypatch):
    ids = random_ids(5, 100)
    expected, _ = score(model, ids)
    for tokens in (1, 200, 10**6):
        monkeypatch.setitem(measures.BATCH_TOKENS, "cpu", tokens)
        torch.testing.assert_close(score(model, ids)[0], expected, **CLOSE)


def test_pieces_bound_what_is_read_at_once(model, monkeypatch):
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    monkeypatch.setattr(measures, "PIECE", 32)
    monkeypatch.setitem(measures.BATCH_TOKENS, "cpu", 64)
    score(model, random_ids(5, 97))
    score(model, random_ids(5, 20))
    monkeypatch.setattr(measures, "CACHED_TOKENS", 100)
    score(model, random_ids(5, 97))
    assert shapes == [(2, 32)] * 6 + [(1, 32)] * 3 + [(3, 20), (2, 20)] + [(1, 32)] * 15


def test_adapters_do_not_stand_in_the_way_of_the_cache(model, monkeypatch):
    """PEFT calls the model past its hooks; the stage takes the model out of it, adapters in place."""
    from linearize.convert.models import with_adapters
    from linearize.recipes.schema import FinetuneSection

    adapted = with_adapters(linear(model), FinetuneSection(steps=1))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    ids = random_ids(1, 100)
    with torch.no_grad():
        logits = adapted(ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    monkeypatch.setattr(measures, "PIECE", 32)
    torch.testing.assert_close(score(adapted.get_base_model(), ids)[0], expected, **CLOSE)


class Known(torch.nn.Module):
    """A model whose next token is what followed the last occurrence of the present token: an induction head that
    reaches `reach` tokens back, with certainty `logit`; it knows nothing else."""

    def __init__(self, reach=10**6, logit=20.0):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.reach, self.logit = reach, logit

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, 300)
        for row, ids in enumerate(input_ids.tolist()):
            for i, token in enumerate(ids):
                before = [j for j in range(max(0, i - self.reach), i) if ids[j] == token]
                if before:
                    logits[row, i, ids[before[-1] + 1]] = self.logit
        return type("Out", (), {"logits": logits, "past_key_values": None})


def test_text_of_a_uniform_model():
    windows = random_ids(2, 200)
    figures = measures.text(Known(logit=0.0), windows, reach=15)
    assert figures["perplexity"] == pytest.approx(300, rel=1e-5)
    assert figures["by_position"] == pytest.approx({"0-64": 300, "64-128": 300, "128-256": 300}, rel=1e-5)


def test_text_by_position_and_by_repeats():
    # 100 tokens that are all different, twice: the second time everything but the first token is known.
    text = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100]
    windows = text.repeat(2)[None]
    figures = measures.text(Known(), windows, reach=15)
    assert figures["by_position"]["0-64"] == pytest.approx(300, rel=1e-5)
    # Of 64 .. 127 the tokens up to 100 are news.
    assert figures["by_position"]["64-128"] == pytest.approx(300 ** (37 / 64), rel=1e-5)
    assert figures["by_position"]["128-256"] == pytest.approx(1, rel=1e-5)
    # Tokens 102 .. 199 end a 3-gram that was there before; token 101 is known too, but only by a 2-gram.
    assert figures["far_share"] == pytest.approx(98 / 199)
    assert figures["far_repeats"] == pytest.approx(1, rel=1e-5)
    assert figures["other_tokens"] == pytest.approx(300 ** (100 / 101), rel=1e-5)
    near_only = measures.text(Known(reach=15), windows, reach=15)
    assert near_only["far_repeats"] == pytest.approx(300, rel=1e-5)
    assert measures.text(Known(), windows, reach=150)["far_repeats"] is None


def test_copying_tells_a_model_that_looks_back_from_one_that_does_not():
    stream = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    asking = probes.copies(stream, 3, 40)
    assert measures.copying(Known(), asking) == pytest.approx({"accuracy": 1, "perplexity": 1}, rel=1e-5)
    blind = measures.copying(Known(reach=20), asking)
    assert blind["accuracy"] < 0.1 and blind["perplexity"] == pytest.approx(300, rel=1e-5)


def test_recall_by_distance():
    """A model that reaches 100 tokens back knows the values that were told within 100."""
    generator = torch.Generator().manual_seed(0)
    asking = []
    for seed in range(3):
        keys = torch.randperm(120, generator=generator)[:60]
        again = torch.randperm(60, generator=generator)
        pairs = torch.stack([keys, keys + 120], dim=1)
        ids = torch.cat([pairs.flatten(), pairs[again].flatten()])
        asked = 120 + 2 * torch.arange(60) + 1
        asking.append(probes.Probe(ids, asked, asked - (2 * again + 1)))
        assert torch.equal(ids[asked], ids[asked - asking[-1].distance]), seed
    assert measures.recall(Known(), asking)["accuracy"] == 1
    figures = measures.recall(Known(reach=64), asking)
    assert figures["by_distance"]["0-64"] == 1 and figures["by_distance"]["128-256"] < 0.1
    distance = torch.cat([probe.distance for probe in asking])
    assert figures["accuracy"] == pytest.approx((distance <= 64).double().mean().item(), abs=0.05)


def test_passkey_is_what_greedy_decoding_gives(model):
    """Whatever the random model continues with is found; anything else is not."""
    prompts = random_ids(2, 40)
    answers = [
        model.generate(prompt[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)[0, 40:]
        for prompt in prompts
    ]
    asked = torch.arange(40, 44)
    right, other = (probes.Probe(torch.cat([p, a]), asked, asked) for p, a in zip(prompts, answers, strict=True))
    wrong = probes.Probe(right.ids.clone(), asked, asked)
    wrong.ids[-1] = (wrong.ids[-1] + 1) % 240
    figures = measures.passkey(model, {"0.1": [right, wrong], "0.9": [other, other]})
    losses = torch.cat([losses for losses, _ in measures.answers(model, [right, wrong, other, other])])
    assert figures == {
        "accuracy": 0.75,
        "by_depth": {"0.1": 0.5, "0.9": 1.0},
        "perplexity": pytest.approx(losses.double().mean().exp().item()),
    }


def test_measures_of_a_section(model, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    stream = random_ids(1, 600)[0]
    section = EvaluateSection(
        tokens=600, lengths=[64, 128], copying={"texts": 2, "length": 32}, passkey=[100], recall=[4]
    )
    listed = make_measures(section, stream, tokenizer, CONFIG)
    assert [(measure.name, measure.size) for measure in listed] == [
        ("text", "64"),
        ("text", "128"),
        ("copying", "32"),
        ("passkey", "100"),
        ("recall", "4"),
        ("far_mass", "128"),
    ]
    read = []
    model = linear(model)
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for measure in listed:
        read.clear()
        measure.run(model)
        assert sum(read) == measure.tokens
    without = make_measures(section, stream, tokenizer, PRESETS["swa"])
    assert "far_mass" not in [measure.name for measure in without]


@pytest.mark.parametrize("window", ["sliding", "block", "terrace"])
@pytest.mark.parametrize("state", ["additive", "decay", "delta"])
@pytest.mark.parametrize("far_weight", ["one", "learned", "query"])
def test_attention_weights_sum_to_one_and_give_the_output(model, window, state, far_weight):
    config = LinearAttentionConfig(
        window=window, window_size=16, sinks=2, state=state, far_weight=far_weight, conv_taps=0
    )
    model = linear(model, config)
    ids = random_ids(1, 80)[0]
    seen = {}
    for index, layer in model.linear_attentions().items():
        layer.register_forward_hook(lambda _, args, out, index=index: seen.update({index: (args[2], out)}))
    weights = attention_weights(model, ids, whole)
    assert weights.keys() == {0, 1}
    for index, (v, out) in seen.items():
        assert weights[index].shape == (4, 80, 80)
        # fp32 sums of 80 weights.
        torch.testing.assert_close(weights[index].sum(-1), torch.ones(4, 80), rtol=0, atol=1e-5)
        assert (weights[index].triu(1) == 0).all()
        expected = weights[index] @ v[0].repeat_interleave(2, dim=0)
        torch.testing.assert_close(out[0], expected, **CLOSE)


def test_far_mass(model):
    ids = random_ids(1, 80)[0]
    started = install(model, CONFIG)
    # lam = 0: nothing is far yet, up to fp32 sums of 18 weights.
    assert far_mass(started, ids, CONFIG)["mean"] == pytest.approx(0, abs=1e-6)
    branches = [layer.branches for layer in started.linear_attentions().values()]
    model = linear(model)
    measured = far_mass(model, ids, CONFIG)
    assert branches == [layer.branches for layer in model.linear_attentions().values()]
    position = torch.arange(80)
    far = ~near(CONFIG, position, position) & torch.ones(80, 80).tril().bool()
    # Sinks 0, 1 and the own window of 16 are near, so query 18 is the first with a far key: 2.
    assert far.any(-1).nonzero()[0].item() == 18
    for index, weights in attention_weights(model, ids, whole).items():
        expected = torch.stack([weights[:, i, far[i]].sum(-1) for i in range(18, 80)]).mean(0)
        torch.testing.assert_close(torch.tensor(measured["layers"][str(index)]), expected, **CLOSE)
        assert ((expected > 0.01) & (expected < 1)).all()
    assert measured["mean"] == pytest.approx(torch.tensor(list(measured["layers"].values())).mean().item())


def test_far_mass_leaves_out_heads_that_stay_softmax(model):
    ids = random_ids(1, 80)[0]
    measured = far_mass(linear(model, kept={0: (1,), 1: (0, 1)}), ids, CONFIG)
    first, second = measured["layers"]["0"], measured["layers"]["1"]
    assert first[2:] == [None] * 2 and second == [None] * 4
    assert measured["mean"] == pytest.approx(sum(first[:2]) / 2)


@pytest.mark.parametrize("sliding_window", [None, 40])
def test_far_mass_of_softmax_heads(model, sliding_window):
    """Against the weights that transformers' eager attention hands out."""
    if sliding_window is not None:
        torch.manual_seed(0)
        config = model.config.to_dict() | {"model_type": "mistral", "sliding_window": sliding_window}
        model = MistralForCausalLM(MistralConfig(**config)).eval()
    ids = random_ids(1, 80)[0]
    with torch.no_grad():
        before = model(ids[None]).logits
        measured = far_mass(model, ids, CONFIG)
        assert torch.equal(model(ids[None]).logits, before)
        model.set_attn_implementation("eager")
        weights = model(ids[None], output_attentions=True).attentions
    position = torch.arange(80)
    far = ~near(CONFIG, position, position) & torch.ones(80, 80).tril().bool()
    expected = [(x[0] * far)[:, 18:].sum(-1).mean(-1) for x in weights]
    for index, shares in enumerate(expected):
        torch.testing.assert_close(torch.tensor(measured["layers"][str(index)]), shares, **CLOSE)
        assert ((shares > 0.1) & (shares < 0.9)).all()
    assert measured["mean"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_far_mass_of_the_delta_rule_is_never_negative(model):
    """Where what the rule corrects overshoots, the far weights sum to less than 0, but have no share."""
    ids = random_ids(1, 80)[0]
    model = linear(model, replace(CONFIG, state="delta", feature_map="relu"))
    for layer in model.linear_attentions().values():
        layer.gates.bias.data[..., 1] = 4.0
        layer.lam.data.fill_(100.0)
    position = torch.arange(80)
    far = ~near(CONFIG, position, position)
    # The first query with a far key is 18.
    sums = {index: (weights * far).sum(-1)[:, 18:] for index, weights in attention_weights(model, ids, whole).items()}
    unbounded = min((x.clamp(max=0).mean(-1)).min() for x in sums.values())
    for index, shares in far_mass(model, ids, CONFIG)["layers"].items():
        # fp32 sums of up to 18 weights; the bound matters a hundred times as much.
        torch.testing.assert_close(torch.tensor(shares), sums[int(index)].clamp(min=0).mean(-1), rtol=0, atol=1e-6)
    assert unbounded < -1e-4


def test_only_layers_with_one_denominator_divide_mass():
    divided = {name for name, config in PRESETS.items() if divides_mass(config)}
    assert divided == {"augmented", "augmented-encoder", "lolcats"}


def test_perplexity_of_nothing():
    assert measures.perplexity(torch.zeros(0)) is None
    assert measures.perplexity(torch.tensor([math.log(8.0)])) == pytest.approx(8)
