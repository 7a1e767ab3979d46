"""The decoding loop without guesses does what transformers' own loop does."""

import gc
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    TopKLogitsWarper,
)

from linearize.layers import decoding, graphs, reading
from linearize.layers.cache import LinearCache, copy_all
from linearize.layers.config import PRESETS
from linearize.layers.draft import DraftTree
from linearize.layers.seam import LinearizedMixin

from .layers import assert_same_memory, memory_of, row_of
from .test_speculative import SMALL, make, prompts

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def use_ours(monkeypatch) -> None:
    """Also where `generate` would take transformers' loop: on a CPU."""

    def sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs,
    ):  # fmt: skip
        assert decoding.knows(logits_processor, stopping_criteria, generation_config, model_kwargs)
        choose = decoding.Choice(logits_processor, generation_config.do_sample)
        return decoding.decode(
            self, input_ids, choose, stopping_criteria, generation_config, model_kwargs, streamer=streamer
        )

    monkeypatch.setattr(LinearizedMixin, "_sample", sample)


def test_it_returns_what_transformers_loop_returns(monkeypatch):
    model, inputs = make(SMALL["augmented"]), prompts()
    text = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    end = int(text[1, 20])
    settings = [
        {"eos_token_id": None},
        {"eos_token_id": [end, int(text[2, 15])], "pad_token_id": 0},
        {"eos_token_id": None, "prefill_chunk_size": 4},
        {"eos_token_id": None, "return_dict_in_generate": True},
    ]
    expected = [model.generate(**inputs, max_new_tokens=30, do_sample=False, **x) for x in settings]
    use_ours(monkeypatch)
    for setting, plain in zip(settings, expected, strict=True):
        found = model.generate(**inputs, max_new_tokens=30, do_sample=False, **setting)
        if "return_dict_in_generate" in setting:
            for x, y in zip(plain.past_key_values.layers, found.past_key_values.layers, strict=True):
                assert torch.equal(x.length, y.length) and x.seen == y.seen
                torch.testing.assert_close(x.state.S, y.state.S)
            plain, found = plain.sequences, found.sequences
        assert torch.equal(plain, found), setting


def test_a_conversation_goes_on_from_its_cache(monkeypatch):
    model = make(SMALL["augmented"])
    use_ours(monkeypatch)
    ids = prompts(1)["input_ids"]
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=9, **settings)
    longer = torch.cat([first.sequences, ids], dim=1)
    cached = model.generate(longer, max_new_tokens=9, past_key_values=first.past_key_values, **settings)
    assert torch.equal(cached.sequences, model.generate(longer, max_new_tokens=9, **settings).sequences)


class Listener:
    """A streamer that calls `then` when it has so many tokens."""

    def __init__(self, count=None, then=None):
        self.tokens, self.count, self.then = [], count, then

    def put(self, value):
        self.tokens += value.flatten().tolist()
        if len(self.tokens) == self.count:
            self.then()

    def end(self):
        pass


def test_a_streamer_gets_each_token_once(monkeypatch):
    model, listener = make(SMALL["augmented"]), Listener()
    use_ours(monkeypatch)
    text = model.generate(prompts(1)["input_ids"], max_new_tokens=9, do_sample=False, streamer=listener)
    assert listener.tokens == text[0].tolist()


def test_what_it_does_not_know():
    ids = prompts(1)["input_ids"]
    kwargs = {"past_key_values": LinearCache(make(SMALL["augmented"]))}
    config = GenerationConfig()
    assert decoding.knows([TopKLogitsWarper(3)], [MaxLengthCriteria(9)], config, kwargs)
    assert not decoding.knows([MinLengthLogitsProcessor(3, 1)], [], config, kwargs)
    assert not decoding.knows([], [MaxTimeCriteria(1.0)], config, kwargs)
    assert not decoding.knows([], [], GenerationConfig(output_scores=True), kwargs)
    assert not decoding.knows([], [], config, {"past_key_values": DynamicCache()})
    assert not decoding.knows([], [], config, {**kwargs, "inputs_embeds": ids})


def test_typical_acceptance_takes_likely_guesses():
    """At a node that gives one token nearly all, guesses of that token are right and others are wrong."""
    tree = DraftTree.of([[0], [1]])
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])
    tokens, parents = torch.tensor([[1, 0, 2]]), torch.tensor([0, 0, 0])
    _, right = decoding.Choice([], True, typical=0.1)(logits, None, tokens, tree, parents)
    assert right[:, 1:].tolist() == [[True, False]]
    # Where all are as likely, their share is above sqrt(epsilon) exp(-entropy) = .32 x .25.
    _, right = decoding.Choice([], True, typical=0.1)(torch.zeros(1, 3, 4), None, tokens, tree, parents)
    assert right[:, 1:].all()


@torch.inference_mode(False)
@torch.no_grad()
def stand_in(step, place):
    """For `graphs.capture` where there is no GPU: a step that is run by Python, which moves what it changes; from and
    to tensors that stay where they are, those of `step`, its cache, and what it returns."""
    moving = step.twin(deepcopy(place.cache))
    cache = moving.cache

    @torch.inference_mode(False)
    @torch.no_grad()
    def run():
        copy_all([*cache.tensors(), *moving.tensors()], [*place.cache.tensors(), *step.tensors()])
        memories = [x for layer in cache.layers for x in layer.memory.tensors()]
        for layer in cache.layers:
            layer.seen = int(layer.length.max())
        found = moving()
        after = [x for layer in cache.layers for x in layer.memory.tensors()]
        assert all(x is y for x, y in zip(memories, after, strict=True)), "kept heads' memory has moved"
        copy_all([*place.cache.tensors(), *step.tensors()], [*cache.tensors(), *moving.tensors()])
        return found

    first = run()
    found = deepcopy(first)

    def replay():
        for x, new in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, run())), strict=True):
            x.copy_(new)

    return first, graphs.Captured(SimpleNamespace(replay=replay), step, place, found)


def use_stand_ins(monkeypatch, capture=stand_in) -> None:
    """Graphs without a GPU; linear heads are done by torch then."""
    monkeypatch.setattr(graphs, "survey", lambda model: (None, tuple(x.data_ptr() for x in model.parameters())))
    monkeypatch.setattr(graphs, "capture", capture)
    kernels = SimpleNamespace(remember=lambda *_: None, refuses=lambda *_: None, accepts=lambda *_: True)
    monkeypatch.setattr(graphs.triton_kernels, "step", kernels)


def use_steps(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "survey", lambda model: ("not now", ()))


HYBRID = {0: (1,), 1: (0, 1)}


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize("kept_window", [None, 7], ids=["all tokens", "window"])
def test_kept_heads_go_on_in_slots(kept_window, speculate, monkeypatch):
    """Several texts from the same graphs, which follow each other as slots fill; then by steps from what they leave."""
    config = replace(SMALL["augmented"], kept_window=kept_window)
    model = make(config, kept=HYBRID)
    use_ours(monkeypatch)
    how = {"custom_generate": model.speculate} if speculate else {}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    captures = {reading.Reading: [], decoding.Step: []}

    def capture(step, place):
        captures[type(step)].append(place.cache.layers[1].memory.k.shape[2])
        return stand_in(step, place)

    for seed, length, new_tokens in ((0, 11, 70), (1, 20, 9), (2, 35, 40)):
        inputs = prompts(3, length, seed)
        steps = model.generate(**inputs, max_new_tokens=new_tokens, **settings, **how)
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "SLOTS", 32 if speculate else 16)
            use_stand_ins(patch, capture)
            found = model.generate(**inputs, max_new_tokens=new_tokens, **settings, **how)
        assert torch.equal(found.sequences, steps.sequences)
        for ours, theirs in zip(found.past_key_values.layers, steps.past_key_values.layers, strict=True):
            assert ours.seen == theirs.seen
            # In a ring, rows of different lengths have forgotten different slots.
            assert ours.memory.k.shape[2] <= theirs.memory.k.shape[2] + (0 if kept_window is None else graphs.NODES)
            for row in range(3):
                assert_same_memory(row_of(ours, row), row_of(theirs, row))
        more = prompts(3, 9, seed + 9)["input_ids"]
        cut = [x.past_key_values for x in (found, steps)]
        for cache in cut:
            cache.crop(-4)
        positions = cut[0].length[:, None] + torch.arange(9)
        ours, theirs = (model(more, position_ids=positions, past_key_values=cache).logits for cache in cut)
        torch.testing.assert_close(ours, theirs)
    if kept_window is None:
        assert captures[decoding.Step] == ([] if speculate else [16]) + [32, 64, 128]
        # A chain has more nodes than a prompt has tokens.
        assert captures[reading.Reading] == [64]
    else:
        assert captures == dict.fromkeys(captures, [config.kept_tokens + graphs.NODES])


def test_a_model_that_nobody_holds_is_freed(monkeypatch):
    """Graphs are kept for as long as their model is, and no longer."""
    use_stand_ins(monkeypatch, graphs.capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    model = make(SMALL["augmented"])
    use_ours(monkeypatch)
    model.generate(**prompts(), max_new_tokens=2, do_sample=False, eos_token_id=None)
    (captured,) = graphs._graphs[model].values()
    model = weakref.ref(model)
    gc.collect()
    assert captured.graph is not None and model() is None


@pytest.mark.parametrize("kept", [None, {0: (0,)}], ids=["pure", "hybrid"])
@pytest.mark.parametrize("name", SMALL)
def test_a_prompt_can_be_read_in_chains(name, kept, monkeypatch):
    """Rows of 35, 32 and 29 tokens, then 40 more of each, part by part: as read whole."""
    monkeypatch.setattr(reading, "CHAIN", 6)
    model = make(SMALL[name], kept=kept)
    whole, chained, other = LinearCache(model), LinearCache(model), LinearCache(model)
    inputs = prompts(3, 35)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        reading.read(graphs.Replay(model, other), prompts(3, 50)["input_ids"], None, None)
        chained.take(other)
        chained.clear()
        for more in (0, 40):
            ids = torch.cat([ids, prompts(3, 40, seed=1)["input_ids"][:, :more]], dim=1)
            mask = torch.nn.functional.pad(mask, (0, more), value=1)
            past = 35 if more else 0
            expected = reading.read(graphs.Replay(model, whole), ids, mask, None)
            some = reading.Reading.of(model, chained, ids[:, past:], mask[:, past:].bool())
            found = reading.in_chains(some, graphs.Replay(model, chained), ids.shape[1] - past)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y)
    for x, y in zip(whole.layers, chained.layers, strict=True):
        assert torch.equal(x.length, y.length)


@ON_GPU
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize("kept_window", [None, 20], ids=["all tokens", "window"])
def test_graphs_of_kept_heads(kept_window, speculate, monkeypatch):
    monkeypatch.setattr(graphs, "SLOTS", 64)
    model = make(replace(PRESETS["augmented"], kept_window=kept_window), kept=HYBRID).float().cuda()
    how = {"custom_generate": model.speculate} if speculate else {}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, **how}
    for seed, length, new_tokens in ((0, 11, 200), (1, 150, 30)):
        inputs = {name: x.cuda() for name, x in prompts(3, length, seed).items()}
        captured = model.generate(**inputs, max_new_tokens=new_tokens, **settings)
        with monkeypatch.context() as patch:
            use_steps(patch)
            steps = model.generate(**inputs, max_new_tokens=new_tokens, **settings)
        assert torch.equal(captured.sequences, steps.sequences)
        for ours, theirs in zip(captured.past_key_values.layers, steps.past_key_values.layers, strict=True):
            assert torch.equal(ours.length, theirs.length) and ours.seen == theirs.seen
            for row in range(3):
                for x, y in zip(memory_of(row_of(ours, row)), memory_of(row_of(theirs, row)), strict=True):
                    torch.testing.assert_close(x, y)
    found = [each for key, each in graphs._graphs[model].items() if decoding.Step in key]
    assert len(found) == (3 if kept_window is None else 1) and all(each.graph is not None for each in found)


@ON_GPU
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "tree"])
@pytest.mark.parametrize("name", ["augmented", "augmented-icml", "lolcats"])
def test_graphs_go_on_as_steps_do(name, speculate, monkeypatch):
    """Several texts from one capture: other prompts, lengths and ends, in float32."""
    model = make(PRESETS[name]).float().cuda()
    how = {"custom_generate": model.speculate} if speculate else {}
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, **how}
    for seed, length, new_tokens, end in ((0, 11, 90, None), (1, 150, 30, None), (2, 40, 50, 7)):
        inputs = {name: x.cuda() for name, x in prompts(3, length, seed).items()}
        captured = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=end, **settings)
        assert any(found.graph is not None for found in graphs._graphs[model].values())
        with monkeypatch.context() as patch:
            use_steps(patch)
            steps = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=end, **settings)
        assert torch.equal(captured.sequences, steps.sequences)
        for x, y in zip(captured.past_key_values.layers, steps.past_key_values.layers, strict=True):
            assert torch.equal(x.length, y.length) and x.seen == y.seen
        # A prompt that was read by a graph left more of its tokens in the ring, and fewer in the state.
        more = prompts(3, 9, seed + 9)["input_ids"].cuda()
        caches = [captured.past_key_values, steps.past_key_values]
        positions = caches[0].length[:, None] + torch.arange(9, device="cuda")
        ours, theirs = (model(more, position_ids=positions, past_key_values=cache).logits for cache in caches)
        # Sums of float32 in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # One without a token that ends rows, one with, and one that reads prompts after the first.
    assert len(graphs._graphs[model]) == 3


@ON_GPU
def test_graphs_draw_anew_at_every_step():
    model = make(PRESETS["augmented"]).float().cuda()
    ids = prompts(1)["input_ids"].repeat(64, 1).cuda()
    found = model.generate(ids, max_new_tokens=20, do_sample=True, temperature=5.0, eos_token_id=None)[:, 11:]
    assert len({tuple(row) for row in found.tolist()}) > 32 and len(set(found[0].tolist())) > 5


@ON_GPU
def test_what_is_not_captured():
    model = make(PRESETS["augmented"]).float().cuda()
    ids = prompts(1)["input_ids"].cuda()
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert len(calls) == 9
    hook.remove()
    model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert len(calls) == 9 and len(graphs._graphs[model]) == 1


@ON_GPU
def test_what_cannot_be_captured_goes_on(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not here")

    model = make(PRESETS["augmented"], kept=HYBRID).float().cuda()
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for seed in (0, 1):
        ids = prompts(1, seed=seed)["input_ids"].cuda()
        with monkeypatch.context() as patch:
            use_steps(patch)
            expected = model.generate(ids, **settings)
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="goes on without a CUDA graph"):
            patch.setattr(torch.cuda, "graph", refuse)
            assert torch.equal(model.generate(ids, **settings), expected)
