"""Hybrids: heads that stay softmax beside linear ones, in the layer, in its cache, and in whole models."""

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from linearize.hub.export import export_model
from linearize.layers.attending import head_shapes
from linearize.layers.cache import LinearCache, LinearCacheLayer
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import install
from linearize.layers.tokens import PADDING

from .families import PAD, tiny_model
from .layers import (
    DIM,
    HEADS,
    KV_HEADS,
    SCALE,
    STATES,
    VALUE_DIM,
    Sequence,
    assert_same_memory,
    error,
    make_layer,
    row_of,
    run,
    run_split,
)
from .test_families import TOLERANCE, cached_logits, logits, randomize, text
from .test_families import error as model_error

pytestmark = pytest.mark.usefixtures("without_gradients")

CONFIG = LinearAttentionConfig(window_size=5, sinks=3, conv_taps=4, slack=6)
# Kept heads that forget; sinks see queries otherwise from the eighth token on, or as they are.
FORGETFUL = replace(CONFIG, kept_window=11, sink_distance=7)
FORGETFUL_CONFIGS = [FORGETFUL, replace(FORGETFUL, sink_distance=None)]
GROUPS = HEADS // KV_HEADS
PACKED = torch.tensor([[1] * 90, [0] * 9 + [1] * 40 + [0] * 3 + [2] * 30 + [0] * 8])


def softmax(x, config=CONFIG):
    """Softmax attention of every head by its definition, within `config.kept_window` and sinks where that is set."""
    index = torch.arange(x.shape[1])
    visible = (index <= index[:, None])[None, None]
    position = index.expand(x.shape)
    if x.segments is not None:
        visible = visible & (x.segments[:, :, None] == x.segments[:, None, :])[:, None]
        # The rank of each token within its document.
        position = (visible.squeeze(1).sum(-1) - 1)
    k, v = (y.repeat_interleave(GROUPS, dim=1) for y in (x.k, x.v))
    scores = x.q @ k.mT
    if config.kept_window is not None:
        is_sink = (position < config.sinks)[:, None, None, :]
        visible = visible & ((index[:, None] - index < config.kept_window) | is_sink)
        if config.sink_distance is not None:
            scores = torch.where(is_sink, x.sink_q @ k.mT, scores)
    return (scores * SCALE).masked_fill(~visible, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("segments", [None, PACKED], ids=["one document", "padded and packed"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kept", [(0,), (1,), (0, 1)])
def test_kept_heads_are_softmax_and_the_others_what_they_were(kept, state, segments):
    x = Sequence.random(2, 90, segments=segments)
    config = replace(CONFIG, state=state, far_weight="query")
    linear, hybrid = make_layer(config), make_layer(config, kept=kept)
    heads = [head for head in range(HEADS) if head // GROUPS not in kept]
    kv_heads = [head for head in range(KV_HEADS) if head not in kept]
    whole = dict(linear.named_parameters())
    for name, parameter in hybrid.named_parameters():
        rows = kv_heads if len(whole[name]) == KV_HEADS else heads
        parameter.data.copy_(whole[name][rows])
    out = run(hybrid, x)
    assert error(out[:, heads], run(linear, x)[:, heads], x.valid) < 1e-12
    rest = [head for head in range(HEADS) if head not in heads]
    assert error(out[:, rest], softmax(x)[:, rest], x.valid) < 1e-12


@pytest.mark.parametrize("segments", [None, PACKED], ids=["one document", "padded and packed"])
@pytest.mark.parametrize("config", FORGETFUL_CONFIGS, ids=["capped sinks", "sinks in place"])
@pytest.mark.parametrize("kept", [(0,), (0, 1)])
def test_kept_heads_with_a_window(kept, config, segments):
    """What they do by definition, at once and from a cache, in which they hold no more than that."""
    x = Sequence.random(2, 90, segments=segments)
    layer = make_layer(config, kept=kept)
    heads = [head for head in range(HEADS) if head // GROUPS in kept]
    expected = softmax(x, config)[:, heads]
    assert error(run(layer, x)[:, heads], expected, x.valid) < 1e-12
    for ends in ([90], [1, 2, 40, 41, 90], [*range(1, 91)]):
        cache = LinearCacheLayer(config)
        assert error(run_split(layer, x, ends, cache)[:, heads], expected, x.valid) < 1e-12
        held = (cache.memory.position != PADDING).sum(1)
        assert (held <= config.sinks + config.kept_window + config.slack).all()
        assert cache.memory.k.shape[2] <= 2 * held.max()  # rows of different lengths: each its own slots


def test_all_heads_kept_leave_no_parameters():
    assert not list(make_layer(CONFIG, kept=(0, 1)).parameters())
    half, whole = make_layer(CONFIG, kept=(1,)), make_layer(CONFIG)
    assert 2 * sum(p.numel() for p in half.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("config", [CONFIG, *FORGETFUL_CONFIGS], ids=["all tokens", "capped sinks", "sinks in place"])
@pytest.mark.parametrize("kept", [(1,), (0, 1)])
@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_crop_is_never_having_seen(length, kept, config):
    layer = make_layer(config, kept=kept)
    segments = torch.ones(2, length + 20, dtype=torch.long)
    segments[1, : length // 2] = 0
    x, wrong = (Sequence.random(2, length + 20, seed=seed, segments=segments) for seed in (0, 1))
    expected = run(layer, x)
    for remove in range(min(CONFIG.slack, length - length // 2) + 1):
        start = length - remove
        cache = LinearCacheLayer(config)
        run_split(layer, x[:start], [start], cache) if start else None
        run(layer, wrong[start:length], cache=cache) if remove else None
        cache.crop(-remove)
        assert error(run(layer, x[start:], cache=cache), expected[:, :, start:], x.valid[:, start:]) < 1e-10


def test_rows_can_be_reordered_selected_and_repeated():
    layer = make_layer(CONFIG, kept=(1,))
    segments = torch.ones(3, 40, dtype=torch.long)
    segments[1, :15] = 0
    x = Sequence.random(3, 40, segments=segments)
    expected = run(layer, x)[:, :, 30:]
    start = LinearCacheLayer(CONFIG)
    run(layer, x[:30], cache=start)
    rest = x[30:].map(lambda y: y)
    for rows, move in [
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ]:
        cache = deepcopy(start)
        move(cache)
        out = run(layer, replace(rest.map(lambda y, r=rows: y[r]), segments=None), cache=cache)
        torch.testing.assert_close(out, expected[rows])
    start.reset()
    torch.testing.assert_close(run(layer, x[30:], cache=start), run(layer, x[30:]))


def test_memory_is_the_kept_heads_of_this_document():
    """Bytes grow by k and v of the kept heads alone; padding and earlier documents take no place."""
    layer = make_layer(CONFIG, kept=(1,), dtype=torch.float32)
    cache = LinearCacheLayer(CONFIG)
    per_token = 4 * (DIM + VALUE_DIM)
    slots = CONFIG.ring_size + CONFIG.sinks
    constant = 4 * (slots * (2 * DIM + VALUE_DIM) + layer.features * (VALUE_DIM + 1))
    for seen in (200, 400):
        run(layer, Sequence.random(1, 200, dtype=torch.float32), cache=cache)
        assert cache.nbytes == constant + seen * per_token
    segments = torch.tensor([[0] * 5 + [1] * 30 + [2] * 7 + [0] * 3])
    run(layer, Sequence.random(1, 45, dtype=torch.float32, segments=segments), cache=cache)
    assert cache.nbytes == constant + 7 * per_token
    assert cache.memory.position.tolist() == [[*range(7)]]


def test_accepted_nodes_alone_are_remembered():
    layer = make_layer(CONFIG, kept=(0,))
    cache, alone = LinearCacheLayer(CONFIG), LinearCacheLayer(CONFIG)
    x, nodes = Sequence.random(2, 12), Sequence.random(2, 3, seed=1)
    for each in (cache, alone):
        run(layer, x, cache=each)
    fork = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    run(layer, nodes, cache=cache, ancestors=fork)
    assert cache.memory.k.shape[2] == 12
    cache.accept(torch.tensor([[0, 2], [0, -1]]))
    assert (cache.memory.position != PADDING).sum(1).tolist() == [14, 13]
    run(layer, nodes[[0, 2]], cache=alone)
    assert_same_memory(row_of(cache, 0), row_of(alone, 0))


@pytest.mark.parametrize("config", FORGETFUL_CONFIGS, ids=["capped sinks", "sinks in place"])
def test_a_tree_is_every_path_alone_in_a_window(config):
    layer = make_layer(config, kept=(0,))
    x = Sequence.random(2, 33)
    cache = LinearCacheLayer(config)
    run(layer, x[:30], cache=cache)
    fork = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    out = run(layer, x[30:], cache=deepcopy(cache), ancestors=fork)
    for node in (1, 2):
        path = [30, 30 + node]
        alone = run(layer, x[path], cache=deepcopy(cache))
        assert error(out[:, :, [0, node]], alone) < 1e-12
    grown = deepcopy(cache)
    run(layer, x[30:], cache=grown, ancestors=fork)
    grown.accept(torch.tensor([[0, 2]] * 2))
    run(layer, x[[30, 32]], cache=cache)
    for row in (0, 1):
        assert_same_memory(row_of(grown, row), row_of(cache, row))


def test_a_tree_behind_nothing_leaves_other_sequences_where_they_are():
    """Tokens of equal shape share their places; depths in a tree are its own."""
    layer, x = make_layer(CONFIG, kept=(0,)), Sequence.random(2, 3)
    expected = run(layer, x)
    fork = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    run(layer, x, cache=LinearCacheLayer(CONFIG), ancestors=fork)
    assert torch.equal(run(layer, x), expected)


class NothingIsWaitedFor(TorchDispatchMode):
    """No operation whose result's shape depends on numbers, and none that hands numbers to Python."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("nonzero", "masked_select", "_local_scalar_dense"), name
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not by_mask, "indexed by a mask"
        return function(*args, **(kwargs or {}))


FORK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("config", [CONFIG, *FORGETFUL_CONFIGS], ids=["all tokens", "capped sinks", "sinks in place"])
@pytest.mark.parametrize("kept", [(1,), (0, 1)])
@pytest.mark.parametrize("prompt", [1, 4, 30])
def test_steps_and_trees_in_reserved_slots(prompt, kept, config):
    """What they are in memory that grows, in place, with rows of different lengths; afterwards too."""
    layer = make_layer(config, kept=kept)
    segments = torch.ones(2, prompt, dtype=torch.long)
    segments[1, : prompt // 2] = 0
    x = Sequence.random(2, 120, seed=2)
    grows, placed = LinearCacheLayer(config), LinearCacheLayer(config)
    for cache in (grows, placed):
        run(layer, replace(x[:prompt], segments=segments), cache=cache)
    placed.memory.reserve(80 if config.kept_tokens is None else config.kept_tokens + len(FORK))

    def in_place():
        # Linear heads are captured in kernels of their own, not as these of torch.
        return (placed.tensors if kept == (0, 1) else placed.memory.tensors)()

    places, at = [y.data_ptr() for y in in_place()], prompt
    for path in [None] * 3 + [[[0, 2, 3], [0, -1, -1]], None, [[-1] * 3, [0, 1, -1]]] + [None] * 9 + [[[0, 2, 3]] * 2]:
        ancestors, new = (None, x[at : at + 1]) if path is None else (FORK, x[at : at + len(FORK)])
        expected = run(layer, new, cache=grows, ancestors=ancestors)
        if path is not None:
            path = torch.tensor(path)
            grows.accept(path)
        with NothingIsWaitedFor() if kept == (0, 1) else nullcontext():
            out = run(layer, new, cache=placed, ancestors=ancestors)
            if path is not None:
                placed.accept(path)
        assert error(out, expected) < 1e-12
        at += new.shape[1]
    assert placed.memory.reserved and [y.data_ptr() for y in in_place()] == places
    bigger = deepcopy(placed)
    bigger.memory.release()
    # A row's token is in the slot that its position says, so rows of different lengths share more of them.
    assert bigger.nbytes <= grows.nbytes
    bigger.memory.reserve(200)
    for cache in (placed, bigger):
        for remove in (0, 4):
            ours, theirs = deepcopy(cache), deepcopy(grows)
            for each in (ours, theirs):
                each.crop(-remove)
            outs = [run_split(layer, x[at:], [2, 3, 6], each) for each in (ours, theirs)]
            assert error(*outs) < 1e-12
            for row in (0, 1):
                assert_same_memory(row_of(ours, row), row_of(theirs, row))


# Whole models: grouped heads, as many key heads as query heads and no rotary embedding, norms of q and k.
KEPT = {"llama": {1: (0,)}, "gpt2": {0: (1, 3), 1: (0, 1, 2, 3)}, "qwen3": {0: (0, 1), 1: (1,)}}
FAMILY_CONFIG = LinearAttentionConfig(window_size=8, sinks=2, conv_taps=4, slack=8)
FAMILY_STATE = {"llama": "additive", "gpt2": "decay", "qwen3": "delta"}


def family_config(family):
    return replace(FAMILY_CONFIG, state=FAMILY_STATE[family])


@pytest.fixture(scope="module", params=KEPT)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def hybrid(family):
    return randomize(install(tiny_model(family), family_config(family), KEPT[family]))


def test_cached_decode_equals_full_forward(hybrid, family):
    ids = text(2, 36)
    full = logits(hybrid, ids)
    assert model_error(cached_logits(hybrid, ids), full) < TOLERANCE
    linear = randomize(install(tiny_model(family), family_config(family)))
    assert model_error(logits(linear, ids), full) > 1e-2, "keeping heads changes nothing"


def test_generate(hybrid):
    """Greedy: with a cache as without, and a left-padded row as the same row alone."""
    ids = text(2, 14)
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = PAD, 0
    options = {"do_sample": False, "max_new_tokens": 10}
    cached = hybrid.generate(ids, attention_mask=mask, **options)
    assert cached.tolist() == hybrid.generate(ids, attention_mask=mask, use_cache=False, **options).tolist()
    assert cached[1, 5:].tolist() == hybrid.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], **options)[0].tolist()
    beams = options | {"num_beams": 3}
    plain = hybrid.generate(ids, attention_mask=mask, use_cache=False, **beams)
    assert hybrid.generate(ids, attention_mask=mask, **beams).tolist() == plain.tolist()


def test_packed_documents_are_separate(hybrid):
    ids = text(2, 40)
    position_ids = torch.cat([torch.arange(17), torch.arange(23)])[None].expand(2, -1)
    packed = logits(hybrid, ids, position_ids=position_ids)
    assert model_error(packed[:, :17], logits(hybrid, ids[:, :17])) < TOLERANCE
    assert model_error(packed[:, 17:], logits(hybrid, ids[:, 17:])) < TOLERANCE


def test_all_heads_kept_are_the_softmax_model(family):
    ids = text(2, 40)
    student = tiny_model(family)
    everything = dict.fromkeys(range(2), tuple(range(4 if family == "gpt2" else 2)))
    install(student, PRESETS["augmented"], everything)
    assert model_error(logits(student, ids), logits(tiny_model(family), ids)) < TOLERANCE
    assert model_error(cached_logits(student, ids), logits(student, ids)) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "modernbert-decoder"])
def test_kept_heads_see_no_further_than_they_did(name):
    """The softmax model's own sliding window, of all or of some layers, still bounds its softmax heads."""
    ids = text(2, 36)
    softmax_model = tiny_model(name, sliding_window=5)
    kv_heads = head_shapes(softmax_model)[0][1]
    student = install(tiny_model(name, sliding_window=5), FAMILY_CONFIG, dict.fromkeys(range(2), range(kv_heads)))
    assert model_error(logits(student, ids), logits(softmax_model, ids)) < TOLERANCE
    assert model_error(logits(tiny_model(name), ids), logits(softmax_model, ids)) > 1e-3
    assert model_error(cached_logits(student, ids), logits(student, ids)) < TOLERANCE


def test_exported_and_loaded_again(hybrid, family, tmp_path):
    export_model(hybrid, tmp_path)
    kept = {str(index): list(heads) for index, heads in KEPT[family].items()}
    assert json.loads((tmp_path / "config.json").read_text())["kept_heads"] == kept
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert {index: layer.kept for index, layer in loaded.linear_attentions().items() if layer.kept} == KEPT[family]
    ids = text(2, 36)
    # The same operations on the same numbers.
    assert model_error(logits(loaded, ids), logits(hybrid, ids)) < 1e-6
    options = {"do_sample": False, "max_new_tokens": 10}
    assert loaded.generate(ids, **options).tolist() == hybrid.generate(ids, **options).tolist()


def test_only_kept_heads_grow():
    model = randomize(install(tiny_model("llama"), FAMILY_CONFIG, {1: (0,)}))
    sizes = []
    for length in (60, 160):
        cache = LinearCache(model)
        model(text(1, length), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[1] - sizes[0] == 100 * 2 * 8 * 4


@pytest.mark.parametrize("kept", [{1: (0,)}, {0: (0, 1), 1: (1,)}], ids=["one head", "a whole layer"])
def test_a_window_of_kept_heads_makes_memory_constant(kept):
    config = replace(FAMILY_CONFIG, kept_window=20, sink_distance=15)
    model = randomize(install(tiny_model("llama"), config, kept))
    ids = text(1, 160)
    assert model_error(cached_logits(model, ids), logits(model, ids)) < TOLERANCE
    sizes = []
    for length in (60, 160):
        cache = LinearCache(model)
        model(ids[:, :length], past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]
    everything = randomize(install(tiny_model("llama"), replace(config, kept_window=None), kept))
    assert model_error(logits(everything, ids), logits(model, ids)) > 1e-3, "the window changes nothing"


def test_heads_that_are_not_there_leave_the_model_untouched():
    model = tiny_model("llama")
    for kept in ({2: (0,)}, {1: (2,)}):
        with pytest.raises(ValueError, match="kept_heads"):
            install(model, FAMILY_CONFIG, kept)
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "linear_attention")
