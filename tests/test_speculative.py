"""Speculative decoding returns what plain decoding returns."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria

from linearize.layers import speculative
from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.decoding import Rows, Step
from linearize.layers.draft import COPIED, COPY, DraftTree, copies
from linearize.layers.medusa import MedusaHeads
from linearize.layers.seam import install
from linearize.layers.speculative import attach_heads

from .families import tiny_model

CHAIN = DraftTree.of([[0], [0, 0], [0, 0, 0]])
COPYING = DraftTree.of([[0], [1], [0, COPY], *([COPY] * (i + 1) for i in range(5)), [COPY, 1]])
BUSHY = DraftTree.of([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 2]])
SMALL = {
    "augmented": replace(PRESETS["augmented"], window_size=5, sinks=2, conv_taps=3, slack=6, sink_distance=9),
    "augmented-icml": replace(PRESETS["augmented-icml"], window_size=4, conv_taps=3, slack=6),
    "augmented-relu2": replace(PRESETS["augmented-relu2"], window_size=4, conv_taps=3, slack=6),
    "lolcats": replace(PRESETS["lolcats"], window_size=3, slack=6),
    "published lolcats": replace(PRESETS["lolcats"], window_size=3, slack=6, key_maps="query_head"),
    "hedgehog": replace(PRESETS["hedgehog"], slack=6),
    "swa": replace(PRESETS["swa"], window_size=6, sinks=2, slack=6, sink_distance=9),
}


def make(
    config: LinearAttentionConfig, tree: DraftTree = BUSHY, kept=None, family: str = "llama", sequential: bool = False
):
    """A tiny model in float64 whose far branch and heads are at work; the heads guess right now and then."""
    model = install(tiny_model(family), config, kept).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "linear_attention" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.data *= 20  # texts that vary, and no ties
    heads = MedusaHeads(model.get_output_embeddings(), max([1, *tree.depths]), "shared", sequential).double()
    if sequential:
        for parameter in heads.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
    attach_heads(model, heads, {1: tree})
    return model


def prompts(rows=3, length=11, seed=0):
    """Left-padded rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(model, inputs, **keywords):
    keywords = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | keywords
    plain = model.generate(**inputs, **keywords)
    return plain, model.generate(**inputs, **keywords, custom_generate=model.speculate)


TREES = {"chain": CHAIN, "bushy": BUSHY, "copying": COPYING, "no guesses": DraftTree((-1,), (0,))}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", SMALL)
def test_greedy_texts_are_equal(name, tree):
    """Across every boundary of windows and rings, with rows that accept different lengths."""
    model = make(SMALL[name], tree)
    plain, speculative = both(model, prompts())
    assert torch.equal(plain, speculative)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_greedy_texts_are_equal_with_sequential_heads(tree):
    plain, speculative = both(make(SMALL["augmented"], tree, sequential=True), prompts())
    assert torch.equal(plain, speculative)


MIXED = DraftTree.of([[0], [2], [COPY], [0, 1], [2, 0], [COPY, 1], [0, 1, COPY], [COPY, 1, 2], [0, 1, COPY, 0]])


@pytest.mark.parametrize("sequential", [False, True], ids=["medusa", "sequential"])
def test_guesses_are_those_of_heads_that_were_told_the_way_to_them(sequential):
    """What is drafted level by level, as training sees it: heads over the text, were the guesses before right."""
    model = make(SMALL["augmented"], MIXED, sequential=sequential)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6]])
    last, hidden = ids[:, -1], torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads, output, embed = model.__dict__["draft"][0], model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        cache = LinearCache(model)
        tokens = Step(model, cache, None, Rows(ids, []), (heads, MIXED), last, hidden).guesses()[0].tolist()
        node = {(): int(last)} | dict(zip(map(tuple, MIXED.paths), tokens, strict=True))
        for path, token in list(node.items())[1:]:
            if path[-1] == COPY:
                assert token == [7, 8, 5, 6][len(path) - 1]
                continue
            way = torch.tensor([[0, *(node[path[:i]] for i in range(len(path)))]])
            logits = heads(hidden[:, None].expand(1, way.shape[1], -1), output, embed(way))[len(path) - 1][0, 0]
            assert token == logits.topk(path[-1] + 1).indices[-1]


@pytest.mark.parametrize("family", ["cohere", "gemma3_text", "gpt2", "qwen3", "stablelm"])
def test_families(family):
    config = SMALL["augmented"] if family != "gpt2" else replace(SMALL["augmented"], sink_distance=None)
    plain, speculative = both(make(config, family=family), prompts())
    assert torch.equal(plain, speculative)


def test_layers_that_know_no_trees():
    model = make(SMALL["augmented"], family="lfm2")
    with pytest.raises(ValueError, match="cannot verify a tree; decode without speculation"):
        model.generate(**prompts(), max_new_tokens=3, custom_generate=model.speculate)


def test_kept_heads():
    model = make(SMALL["augmented"], kept={0: (1,), 1: (0, 1)})
    plain, speculative = both(model, prompts())
    assert torch.equal(plain, speculative)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_tree_and_batch(data):
    draw = data.draw
    ranks = draw(st.lists(st.lists(st.sampled_from([0, 1, 2, COPY]), min_size=1, max_size=4), max_size=8))
    paths = {tuple(path[: i + 1]) for path in ranks for i in range(len(path))}
    tree = DraftTree.of([list(path) for path in paths])
    if not paths:
        tree = DraftTree.of([[0]])
    model = make(SMALL[draw(st.sampled_from(sorted(SMALL)))], tree)
    inputs = prompts(draw(st.integers(1, 3)), draw(st.integers(7, 30)), draw(st.integers(0, 99)))
    plain, speculative = both(model, inputs, max_new_tokens=draw(st.integers(1, 30)))
    assert torch.equal(plain, speculative)


def test_more_sequences_have_a_smaller_tree(monkeypatch):
    model, inputs = make(SMALL["augmented"]), prompts(3)
    heads = model.__dict__["draft"][0]
    attach_heads(model, heads, {1: BUSHY, 2: CHAIN, 4: COPYING})
    used = []
    monkeypatch.setattr(speculative, "decode", lambda *arguments: used.append(arguments[6][1]))
    for rows in (1, 2, 3):
        few = {name: x[:rows] for name, x in inputs.items()}
        model.generate(**few, max_new_tokens=2, do_sample=False, custom_generate=model.speculate)
    assert used == [BUSHY, CHAIN, CHAIN]


def test_guesses_are_accepted():
    """Heads that know what comes: fewer forward passes than tokens."""
    model = make(SMALL["augmented"], CHAIN)
    inputs = prompts(1)
    text = model.generate(**inputs, max_new_tokens=31, do_sample=False, eos_token_id=None)
    calls = []

    class Knowing(MedusaHeads):
        def logits(self, head, state, output):
            if head == 0:
                calls.append(inputs["input_ids"].shape[1] + 4 * len(calls))
            return torch.nn.functional.one_hot(text[:, calls[-1] + 1 + head, None], 99).double()

    model.__dict__["draft"] = Knowing(model.get_output_embeddings(), 3, "shared").double(), {1: CHAIN}
    found = model.generate(
        **inputs, max_new_tokens=29, do_sample=False, eos_token_id=None, custom_generate=model.speculate
    )
    assert torch.equal(found, text[:, : found.shape[1]])
    assert len(calls) == 7  # 1 + 7 x 4 tokens


def test_ends_processors_and_criteria_are_generates():
    model = make(SMALL["lolcats"])
    inputs = prompts()
    text, _ = both(model, inputs)
    end = int(text[1, 20])

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([bool((row == int(text[0, 25])).any()) for row in input_ids])

    for keywords in (
        {"eos_token_id": [end]},
        {"eos_token_id": [end], "min_new_tokens": 15},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[end]]},
        # Without a token that ends texts, plain decoding goes on in rows that are done.
        {"stopping_criteria": [After()], "eos_token_id": [98]},
    ):
        plain, speculative = both(model, inputs, **keywords)
        assert torch.equal(plain, speculative), keywords


def test_the_cache_afterwards_is_that_of_plain_decoding():
    model = make(SMALL["augmented"])
    caches = [x.past_key_values for x in both(model, prompts(), return_dict_in_generate=True)]
    for plain, guessed in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(plain.length, guessed.length)
        torch.testing.assert_close(plain.state.S, guessed.state.S)


def test_tokens_are_streamed_in_order():
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, inputs, streamer = make(SMALL["augmented"]), prompts(1), Streamer()
    text = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, custom_generate=model.speculate, token_streamer=streamer
    )
    assert streamer.tokens == text[0].tolist() and streamer.ended


def test_samples_are_of_the_models_distribution():
    """Chi-square of the second and third tokens against plain sampling's exact probabilities."""
    model = make(SMALL["augmented"])
    rows = 3000
    ids = torch.full((rows, 6), 7) + torch.arange(6)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 3, "temperature": 3.0, "eos_token_id": None}
    found = model.generate(ids, **settings, custom_generate=model.speculate)[:, 6:]
    probabilities = Counter({(): 1.0})
    for _ in range(3):
        longer = Counter()
        for way, share in probabilities.items():
            with torch.no_grad():
                logits = model(torch.cat([ids[0], torch.tensor(way, dtype=torch.long)])[None]).logits[0, -1] / 3.0
            top = logits.topk(3)
            for token, p in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[(*way, token)] += share * p
        probabilities = longer
    counts = Counter(map(tuple, found.tolist()))
    assert set(counts) <= set(probabilities)
    chi = sum((counts[way] - rows * p) ** 2 / (rows * p) for way, p in probabilities.items())
    # 26 degrees of freedom: mean 26, standard deviation 7.2; 5 of these away.
    assert chi < 26 + 5 * math.sqrt(52)


@pytest.mark.parametrize("how", ["prompt lookup", "softmax assistant", "linear assistant"])
@pytest.mark.parametrize("name", ["augmented", "lolcats"])
def test_speculation_of_transformers(name, how):
    """Their loops take guesses back by cropping the cache."""
    model = make(SMALL[name])
    inputs = {name: x[:1] for name, x in prompts().items()}
    keywords = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **keywords)
    if how == "prompt lookup":
        speculation = {"prompt_lookup_num_tokens": 4}
    else:
        assistant = tiny_model("llama", 1).double().eval() if how == "softmax assistant" else make(SMALL[name])
        assistant.generation_config.num_assistant_tokens = 4
        speculation = {"assistant_model": assistant}
    assert torch.equal(plain, model.generate(**inputs, **keywords, **speculation))


@pytest.mark.parametrize(
    "projection, sequential, parameters",
    [("shared", False, 2 * 72), ("own", False, 2 * (72 + 88)), ("own", True, 2 * (136 + 88))],
)
def test_heads_of_a_frozen_model_can_be_trained(projection, sequential, parameters):
    output = torch.nn.Linear(8, 11, bias=False).requires_grad_(False)
    heads = MedusaHeads(output, 2, projection, sequential)
    assert sum(x.numel() for x in heads.parameters() if x.requires_grad) == parameters


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 5))
def test_copies(tokens, room):
    """What followed the latest place where the longest run stood, said over and over."""
    text = torch.tensor([tokens + [7] * room])
    found = copies(text, torch.tensor([len(tokens)]))[0].tolist()
    best = None
    for place in range(len(tokens) - 1):
        run = 0
        while run < 4 and run <= place and tokens[place - run] == tokens[-1 - run]:
            run += 1
        if run and (best is None or run >= best[0]):
            best = run, place
    if best is not None:
        after = tokens[best[1] + 1 :]
        assert found == [after[i % len(after)] for i in range(COPIED)]


@pytest.mark.parametrize("paths", [[[0], [0]], [[0, 1]], [[]], [[-1]], [[COPY + 1]]])
def test_paths_that_are_no_tree(paths):
    with pytest.raises(ValueError, match="tree: "):
        DraftTree.of(paths)


def test_bad_input():
    model = make(SMALL["augmented"])
    inputs = prompts()
    with pytest.raises(ValueError, match="num_beams=2: speculative decoding does not do this"):
        model.generate(**inputs, num_beams=2, custom_generate=model.speculate)
    with pytest.raises(ValueError, match="typical_acceptance is for sampling"):
        model.generate(**inputs, do_sample=False, custom_generate=model.speculate, typical_acceptance=0.1)
    with pytest.raises(ValueError, match="typical_acceptance=2 is no share"):
        model.generate(**inputs, do_sample=True, custom_generate=model.speculate, typical_acceptance=2)
    deep = DraftTree.of([[0] * (i + 1) for i in range(7)])
    with pytest.raises(ValueError, match="7 guesses deep and asks 7 heads; there are 3 heads, 10 copied tokens, and 6"):
        attach_heads(model, model.__dict__["draft"][0], {1: CHAIN, 4: deep})
    other = MedusaHeads(torch.nn.Linear(8, 99), 1, "shared")
    with pytest.raises(ValueError, match="of a model with 8 hidden units, this one has 32"):
        attach_heads(model, other, {1: CHAIN})
    del model.__dict__["draft"]
    with pytest.raises(ValueError, match="no draft heads"):
        model.generate(**inputs, custom_generate=model.speculate)
