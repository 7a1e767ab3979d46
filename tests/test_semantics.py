"""One semantics: the formulas, and the same outputs however the tokens arrive."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.kernels.chunked import Layout, chunk_size
from linearize.layers.tokens import Tokens, locate, segments_from_cu_seqlens

from .formula import documents_and_positions, naive
from .layers import (
    COMBINES,
    HEADS,
    NONNEGATIVE,
    SIGNED,
    STATES,
    WINDOWS,
    Sequence,
    ancestors_of,
    assert_same_memory,
    error,
    make_layer,
    row_of,
    run,
    run_split,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


PADDED_AND_PACKED = torch.tensor([[1] * 22, [0] * 3 + [1] * 7 + [2] * 1 + [0] * 2 + [2] * 5 + [1] * 3 + [0]])


def states_of(config):
    """The state's rules that go with the rest of a configuration."""
    no_delta = config["window"] is None if config["combine"] == "shared" else config["norm"] == "sum"
    return STATES[:2] if no_delta else STATES


@pytest.mark.parametrize("conv_taps", [0, 4])
@pytest.mark.parametrize("combine", COMBINES, ids=lambda combine: "-".join(combine.values()))
@pytest.mark.parametrize(("window", "sinks"), [*((window, s) for window in WINDOWS[:3] for s in (0, 2)), (None, 0)])
def test_reference_is_the_formula(window, sinks, combine, conv_taps):
    for state in states_of({"window": window, **combine}):
        config = LinearAttentionConfig(
            window=window,
            window_size=5,
            sinks=sinks,
            sink_distance=10 if conv_taps else None,
            state=state,
            conv_taps=conv_taps,
            **combine,
        )
        layer = make_layer(config, backend="reference")
        for segments in (None, PADDED_AND_PACKED):
            x = Sequence.random(2, 22, segments=segments)
            assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


def test_reference_without_far_branch_is_the_formula():
    layer = make_layer(LinearAttentionConfig(window_size=5, sinks=2, feature_map=None, conv_taps=3))
    layer.backend = "reference"
    x = Sequence.random(2, 22, segments=PADDED_AND_PACKED)
    assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


@pytest.mark.parametrize("state", STATES)
def test_a_map_of_the_keys_per_query_head_is_the_formula(state):
    config = LinearAttentionConfig(
        window="terrace", window_size=5, sinks=0, key_maps="query_head", state=state, conv_taps=3
    )
    layer = make_layer(config, backend="reference")
    assert len(layer.phi_k.weight) == HEADS
    x = Sequence.random(2, 22, segments=PADDED_AND_PACKED)
    assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


@pytest.mark.parametrize("combine", COMBINES[2:], ids=lambda combine: combine["norm"])
def test_squared_relu_of_cosines_is_the_formula(combine):
    config = LinearAttentionConfig(window="block", window_size=5, sinks=2, sink_distance=6, local="relu2", **combine)
    layer = make_layer(config, backend="reference")
    x = Sequence.random(2, 22, segments=PADDED_AND_PACKED)
    assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


def test_large_scores_do_not_overflow():
    layer = make_layer(LinearAttentionConfig(window_size=8, sinks=2, conv_taps=0), dtype=torch.float32)
    x = Sequence.random(1, 100, dtype=torch.float32)
    x.q, x.k = x.q * 100, x.k * 100
    for backend in ("reference", "torch"):
        layer.backend = backend
        assert run(layer, x).isfinite().all()


# One semantics


def draw_config(draw, window, feature_maps, norms=("sum", "count", "rms", "none"), combine=("shared", "sum")):
    window_size = draw(st.integers(1, 9))
    none = [] if window is None else [None]
    combine, norm = draw(st.sampled_from(combine)), draw(st.sampled_from(norms))
    states = states_of({"window": window, "combine": combine, "norm": norm})
    return LinearAttentionConfig(
        window=window,
        window_size=window_size,
        sinks=0 if window is None else draw(st.integers(0, window_size)),
        sink_distance=draw(st.sampled_from([None, 20])),
        local=draw(st.sampled_from(["softmax", "softmax", "relu2"])) if combine == "sum" else "softmax",
        feature_map=draw(st.sampled_from([*feature_maps, *none])),
        key_maps=draw(st.sampled_from(["key_head", "key_head", "query_head"])),
        state=draw(st.sampled_from(states)),
        combine=combine,
        norm=norm,
        far_weight=draw(st.sampled_from(["one", "learned", "query"])),
        conv_taps=draw(st.integers(0, 5)),
        slack=draw(st.integers(0, 6)),
    )


def draw_kept(draw):
    """Key heads that stay softmax: none, one or all."""
    return draw(st.sampled_from([(), (0,), (1,), (0, 1)]))


def draw_segments(draw, batch, length):
    """None, or [B, T] with every kind of padding and packing."""
    kind = draw(st.sampled_from(["none", "left", "right", "both", "packed", "interior", "packed and padded"]))
    if kind == "none":
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    segments = np.ones((batch, length), int)
    if kind.startswith("packed"):
        starts = rng.random((batch, length)) < rng.choice([0.02, 0.1, 0.5])
        segments += starts.cumsum(1)
    if kind in ("left", "both", "packed and padded"):
        for row in segments:
            row[: rng.integers(0, length + 1)] = 0
    if kind in ("right", "both", "packed and padded"):
        for row in segments:
            row[length - rng.integers(0, length + 1) :] = 0
    if kind in ("interior", "packed and padded"):
        segments[rng.random((batch, length)) < 0.2] = 0
    return torch.from_numpy(segments)


def draw_length(draw, config):
    """Short ones around the window, or some that cross chunks of the chunked backend."""
    size = chunk_size(config)
    return draw(st.one_of(st.integers(1, 5 * config.window_size), st.integers(size - 2, 200)))


def draw_ends(draw, length):
    inner = draw(st.lists(st.integers(1, length - 1), max_size=5, unique=True)) if length > 1 else []
    return [*sorted(inner), length]


def check_one_semantics(draw, config, dtype, tolerance):
    seed = draw(st.integers(0, 2**32 - 1))
    batch, length = draw(st.integers(1, 3)), draw_length(draw, config)
    x = Sequence.random(batch, length, seed, dtype, draw_segments(draw, batch, length))
    layer = make_layer(config, seed, dtype, "reference", draw_kept(draw))
    expected = run(layer, x)

    def same(actual, name):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert error(actual, expected, x.valid) < tolerance, name

    ends = draw_ends(draw, length)
    # Token by token as far as time allows, the whole text where it is short.
    single = [*range(max(1, length - 30), length + 1)]
    same(run_split(layer, x, ends), "reference, cached")
    layer.backend = "torch"
    same(run(layer, x), "torch")
    same(run_split(layer, x, ends), "torch, cached")
    same(run_split(layer, x, single), "token by token")

    if x.segments is None:
        cache, outputs = LinearCacheLayer(config), []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            chain = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            outputs.append(run(layer, x[start:end], cache=cache, ancestors=chain))
            cache.accept(torch.arange(end - start).expand(batch, -1))
        same(torch.cat(outputs, dim=2), "chain of tree nodes")


def property_test(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("window", WINDOWS)
@property_test(100)
@given(data=st.data())
def test_one_semantics(window, data):
    config = draw_config(data.draw, window, NONNEGATIVE)
    check_one_semantics(data.draw, config, torch.float64, 1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@property_test(20)
@given(data=st.data())
def test_one_semantics_of_signed_feature_maps(window, data):
    """A sum of signed numbers is no denominator, so only the other norms."""
    config = draw_config(data.draw, window, SIGNED, norms=("none", "rms", "count"), combine=["sum"])
    check_one_semantics(data.draw, config, torch.float64, 1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@property_test(25)
@given(data=st.data())
def test_one_semantics_in_single_precision(window, data):
    config = draw_config(data.draw, window, NONNEGATIVE)
    check_one_semantics(data.draw, config, torch.float32, 1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@property_test(60)
@given(data=st.data())
def test_tree_is_its_branches(window, data):
    """Each node's output is that of decoding its branch; accepting a path is having decoded it."""
    draw = data.draw
    config = draw_config(draw, window, NONNEGATIVE)
    seed = draw(st.integers(0, 2**32 - 1))
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, 5 * config.window_size + 5))
    layer = make_layer(config, seed, kept=draw_kept(draw))
    cache = LinearCacheLayer(config)
    prefix = Sequence.random(batch, length, seed, segments=draw_segments(draw, batch, length))
    run_split(layer, prefix, draw_ends(draw, length), cache)

    nodes = draw(st.integers(1, 8))
    parents = [draw(st.integers(-1, node - 1)) for node in range(nodes)]
    order = ancestors_of(parents)
    x = Sequence.random(batch, nodes, seed + 1)
    before = deepcopy(cache)
    verified = run(layer, x, cache=cache, ancestors=order)
    for node in range(nodes):
        branch = x[order[node].nonzero().squeeze(1)]
        sequential = run_split(layer, branch, [*range(1, branch.shape[1] + 1)], deepcopy(before))
        assert error(verified[:, :, node], sequential[:, :, -1]) < 1e-10, f"node {node} of {parents}"

    # Every row goes its own way, or nowhere.
    ways = [draw(st.integers(-1, nodes - 1)) for _ in range(batch)]
    paths = [order[way].nonzero().squeeze(1).tolist() if way >= 0 else [] for way in ways]
    longest = max(1, *map(len, paths))
    cache.accept(torch.tensor([path + [-1] * (longest - len(path)) for path in paths]))
    rest = Sequence.random(batch, config.window_size + 3, seed + 2)
    continued = run(layer, rest, cache=deepcopy(cache))
    for row, path in enumerate(paths):
        one, alone = row_of(cache, row), row_of(before, row)
        if path:
            run_split(layer, x.map(lambda y, r=row: y[r : r + 1])[path], [*range(1, len(path) + 1)], alone)
        assert_same_memory(one, alone)
        after = run(layer, rest.map(lambda y, r=row: y[r : r + 1]), cache=alone)
        assert error(continued[row : row + 1], after) < 1e-10


def test_tree_needs_a_cache():
    layer = make_layer(LinearAttentionConfig(window_size=4, sinks=1))
    with pytest.raises(ValueError, match="cache"):
        run(layer, Sequence.random(1, 3), ancestors=torch.ones(3, 3, dtype=torch.bool).tril())


def test_missing_backend_is_named():
    layer = make_layer(LinearAttentionConfig(window_size=4, sinks=1), backend="abacus")
    with pytest.raises(ValueError, match="abacus.*reference"):
        run(layer, Sequence.random(1, 3))


def test_work_does_not_grow_with_the_past():
    """Between the sinks and the ring of a long document there may be a million tokens; they get no slots."""
    position = torch.cat([torch.arange(3), torch.arange(10**6, 10**6 + 150)])[None]
    layout = Layout(Tokens(torch.zeros_like(position), position), 64, sinks=3)
    assert layout.chunks <= 5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40))
def test_locate_counts_as_one_would(segments, split):
    """Also in two parts, the second told where the first ended."""
    split = min(split, len(segments) - 1)
    expected = documents_and_positions(segments)
    whole = locate(torch.tensor([segments]), torch.tensor([0]), torch.tensor([0]))
    found = zip(whole.document[0].tolist(), whole.position[0].tolist(), strict=True)
    found = [None if document < 0 else position for document, position in found]
    assert found == [place and place[1] for place in expected]
    past = [(segment, place) for segment, place in zip(segments[:split], expected[:split], strict=True) if segment]
    past_segment, past_length = (past[-1][0], past[-1][1][1] + 1) if past else (0, 0)
    rest = locate(torch.tensor([segments[split:]]), torch.tensor([past_segment]), torch.tensor([past_length]))
    for document, position, place in zip(rest.document[0], rest.position[0], expected[split:], strict=True):
        assert (document < 0) == (place is None)
        if place is not None:
            assert position == place[1]
            # Document 0 of the rest is the one that the past ended with.
            assert (document == 0) == (bool(past) and place[0] == past[-1][1][0])


def test_cu_seqlens_are_segments():
    assert segments_from_cu_seqlens(torch.tensor([0, 3, 4, 9]), 9).tolist() == [[1, 1, 1, 2, 3, 3, 3, 3, 3]]


# What must not be seen


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", WINDOWS)
def test_future_changes_nothing(window, backend):
    config = LinearAttentionConfig(window=window, window_size=6, sinks=2 if window else 0, conv_taps=4)
    layer = make_layer(config, backend=backend)
    x, other = Sequence.random(1, 150), Sequence.random(1, 150, seed=1)
    out = run(layer, x)
    for token in (1, 5, 63, 66, 131, 149):
        mixed = Sequence(*(torch.cat([a[:, :, :token], b[:, :, token:]], dim=2) for a, b in pairs(x, other)))
        changed = run(layer, mixed)
        torch.testing.assert_close(changed[:, :, :token], out[:, :, :token], rtol=1e-12, atol=1e-12)
        assert error(changed[:, :, token:], out[:, :, token:]) > 1e-2


def pairs(x, y):
    return [(getattr(x, name), getattr(y, name)) for name in ("q", "k", "v", "raw_q", "raw_k", "sink_q")]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", WINDOWS)
def test_documents_and_padding_do_not_leak(window, backend):
    config = LinearAttentionConfig(window=window, window_size=6, sinks=2 if window else 0, conv_taps=4)
    layer = make_layer(config, backend=backend)
    segments = torch.tensor([[1] * 70 + [2] * 9 + [0] * 4 + [3] * 80])
    x, other = Sequence.random(1, 163, segments=segments), Sequence.random(1, 163, seed=1)
    out = run(layer, x)
    for segment in range(4):
        own = (segments == segment)[:, None, :, None]
        mixed = Sequence(*(torch.where(own, b, a) for a, b in pairs(x, other)), segments)
        rest = (segments != segment) & (segments > 0)
        changed = run(layer, mixed)
        assert error(changed, out, rest) < 1e-14
        if segment:
            assert error(changed, out, segments == segment) > 1e-2
