"""The cache: exact crop, rows moved about, constant memory, single-precision sums."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer, Shared
from linearize.layers.config import LinearAttentionConfig

from .layers import (
    DIM,
    HEADS,
    KV_HEADS,
    VALUE_DIM,
    WINDOWS,
    Sequence,
    assert_same_memory,
    make_layer,
    row_of,
    run,
    run_split,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


CACHED = LinearAttentionConfig(window_size=5, sinks=3, conv_taps=4, slack=6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 4, 7, 9, 11, 13, 30])
def test_crop_is_never_having_seen(window, length):
    """Near the document's start too, where sinks are not folded yet; and again after going on."""
    config = replace(CACHED, window=window, sinks=3 if window else 0)
    layer = make_layer(config)
    for remove in range(min(config.slack, length) + 1):
        x, wrong = Sequence.random(2, length + 20), Sequence.random(2, length + 20, seed=1)
        expected = run(layer, x)
        cache = LinearCacheLayer(config)
        kept = length - remove
        run_split(layer, x[:kept], [kept], cache) if kept else None
        run_split(layer, wrong[kept:length], [*range(1, remove + 1)], cache) if remove else None
        assert cache.get_seq_length() == length
        cache.crop(-remove)
        assert cache.get_seq_length() == kept and cache.length.tolist() == [kept, kept]
        # Twice more: some tokens, a wrong guess, and back.
        for start, end in ((kept, kept + 2), (kept + 2, kept + 9)):
            torch.testing.assert_close(run(layer, x[start:end], cache=cache), expected[:, :, start:end])
            guess = min(end, config.slack)
            run(layer, wrong[end : end + guess], cache=cache)
            cache.crop(-guess)
        torch.testing.assert_close(run(layer, x[kept + 9 :], cache=cache), expected[:, :, kept + 9 :])


def test_crop_in_steps_is_crop_at_once():
    layer = make_layer(CACHED)
    x = Sequence.random(2, 60)
    cache = LinearCacheLayer(CACHED)
    run(layer, x[:40], cache=cache)
    for _ in range(CACHED.slack):
        cache.crop(-1)
    torch.testing.assert_close(run(layer, x[34:], cache=cache), run(layer, x)[:, :, 34:])


def test_crop_of_too_much_is_refused():
    layer = make_layer(CACHED)
    x = Sequence.random(2, 60)
    cache = LinearCacheLayer(CACHED)
    cache.crop(-1)  # nothing seen yet, nothing to take back
    run(layer, x[:40], cache=cache)
    before = deepcopy(cache)
    with pytest.raises(ValueError, match="slack"):
        cache.crop(-CACHED.slack - 1)
    with pytest.raises(ValueError, match="minus"):
        cache.crop(1)
    assert_same_memory(row_of(cache, 1), row_of(before, 1))
    torch.testing.assert_close(run(layer, x[40:], cache=cache), run(layer, x)[:, :, 40:])
    short = LinearCacheLayer(CACHED)
    run(layer, x[:3], cache=short)
    with pytest.raises(ValueError):
        short.crop(-4)


def test_crop_of_too_much_in_one_row_is_refused():
    """Rows of different lengths: the shorter one decides."""
    layer = make_layer(CACHED)
    segments = torch.tensor([[1] * 30, [0] * 28 + [1] * 2])
    cache = LinearCacheLayer(CACHED)
    run(layer, Sequence.random(2, 30, segments=segments), cache=cache)
    with pytest.raises(ValueError):
        cache.crop(-3)


@pytest.mark.parametrize("length", [3, 8, 40])
def test_rows_can_be_reordered_selected_and_repeated(length):
    layer = make_layer(CACHED)
    segments = torch.ones(3, length + 10, dtype=torch.long)
    segments[1, : length // 2] = 0
    x = Sequence.random(3, length + 10, segments=segments)
    expected = run(layer, x)[:, :, length:]
    start = LinearCacheLayer(CACHED)
    run(layer, x[:length], cache=start)
    for rows, move in [
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([0, 1], lambda cache: cache.batch_select_indices(torch.tensor([True, True, False]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ]:
        cache = deepcopy(start)
        move(cache)
        rest = x[length:]
        rest.segments = None
        out = run(layer, rest.map(lambda y, r=rows: y[r]), cache=cache)
        torch.testing.assert_close(out, expected[rows])


def test_reset_forgets():
    layer = make_layer(CACHED)
    x = Sequence.random(2, 30)
    cache = LinearCacheLayer(CACHED)
    run(layer, Sequence.random(3, 50, seed=1), cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run_split(layer, x, [17, 30], cache), run(layer, x))
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("length", [3, 30])
def test_layers_share_what_they_have_in_common_alone(length):
    """Some stand alike by the same numbers, some by equal ones, as after fused steps, and some stand elsewhere."""
    layer, shared = make_layer(CACHED), Shared()
    x = Sequence.random(2, length + 60)
    caches, alone = ([LinearCacheLayer(CACHED, *one) for _ in range(4)] for one in ((shared,), ()))
    for cache in (*caches, *alone):
        run(layer, x[:length], cache=cache)
    assert all(cache.length is caches[0].length for cache in caches)
    caches[1].length, caches[1].count, caches[1].segment = (
            y.clone() for y in (caches[0].length, caches[0].count, caches[0].segment)
        )
    for several in (caches, alone):
        several[2].crop(-2)
        several[3].seen += 1  # a column of padding
    for start, end in ((length, length + 4), (length + 4, length + 5), (length + 5, length + 60)):
        for cache, expected in zip(caches, alone, strict=True):
            torch.testing.assert_close(
                run(layer, x[start:end], cache=cache), run(layer, x[start:end], cache=expected), rtol=0, atol=0
            )
    for cache, expected in zip(caches, alone, strict=True):
        assert_same_memory(row_of(cache, 1), row_of(expected, 1))
    assert caches[1].length is caches[0].length
    assert caches[2].length is not caches[0].length is not caches[3].length


def test_memory_does_not_grow():
    layer = make_layer(CACHED, dtype=torch.float32)
    cache = LinearCacheLayer(CACHED)
    sizes = []
    for _ in range(10):
        run(layer, Sequence.random(1, 200, dtype=torch.float32), cache=cache)
        sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 2000 and len(set(sizes)) == 1
    slots = CACHED.ring_size + CACHED.sinks
    assert sizes[0] == 4 * KV_HEADS * (slots * (2 * DIM + VALUE_DIM) + layer.features * (VALUE_DIM + 1))


def test_sums_are_single_precision_whatever_the_model():
    """A bfloat16 sum of ones ends at 256."""
    config = LinearAttentionConfig(window_size=4, sinks=0, conv_taps=0, feature_map="relu", slack=0)
    layer = LinearAttention(config, HEADS, KV_HEADS, DIM)
    x = Sequence.random(1, 1, dtype=torch.bfloat16).map(torch.ones_like)
    cache = LinearCacheLayer(config)
    for _ in range(300):
        assert run(layer, x, cache=cache).dtype == torch.bfloat16
    assert cache.state.S.dtype == cache.state.z.dtype == torch.float32
    assert cache.ring["k"].dtype == torch.bfloat16
    torch.testing.assert_close(cache.state.z, torch.full_like(cache.state.z, 300 - config.ring_size))
