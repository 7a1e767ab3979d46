"""The layer: its formulas, one semantics however the tokens arrive, feature maps, gradients, cache, presets."""

from copy import deepcopy
from dataclasses import dataclass, replace
from math import exp, sqrt

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.feature_maps import FEATURE_MAPS
from linearize.layers.kernels import BACKENDS
from linearize.layers.kernels.chunked import Layout, chunk_size
from linearize.layers.tokens import Tokens, locate, segments_from_cu_seqlens

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 4, 6
SCALE = 0.6
WINDOWS = ["sliding", "block", "terrace", None]
# What these give is never negative, so their sum can be a denominator.
NONNEGATIVE = ["relu", "elu1", "exp", "hedgehog", "t2r", "favor", "cosine", "taylor", "dpfp"]
SIGNED = ["identity", "l2", "rfa"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def make_layer(config, seed=0, dtype=torch.float64, backend="torch"):
    """A layer with random weights, so that every branch contributes."""
    layer = LinearAttention(config, HEADS, KV_HEADS, DIM).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.7
        if name == "lam":
            parameter.data.abs_().add_(0.1)
    layer.backend = backend
    return layer


@dataclass
class Sequence:
    """q, k, v and their un-rotated forms (here: any other numbers), with segments or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    raw_q: torch.Tensor
    raw_k: torch.Tensor
    segments: torch.Tensor | None = None

    @classmethod
    def random(cls, batch, length, seed=0, dtype=torch.float64, segments=None):
        generator = torch.Generator().manual_seed(seed)

        def normal(heads, dim):
            return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)

        q, raw_q = normal(HEADS, DIM), normal(HEADS, DIM)
        k, raw_k = normal(KV_HEADS, DIM), normal(KV_HEADS, DIM)
        return cls(q, k, normal(KV_HEADS, VALUE_DIM), raw_q, raw_k, segments)

    def map(self, function):
        """`function` on every tensor of tokens; they are [B, H, T, ..]."""
        tensors = (self.q, self.k, self.v, self.raw_q, self.raw_k)
        return Sequence(*(function(x) for x in tensors), self.segments)

    def __getitem__(self, index):
        """Tokens `index`. As a model's padding mask does, segments vanish where they say nothing."""
        part = self.map(lambda x: x[:, :, index])
        if self.segments is not None:
            part.segments = self.segments[:, index]
            if (self.segments <= 1).all() and (part.segments == 1).all():
                part.segments = None
        return part

    @property
    def shape(self):
        return self.q.shape[0], self.q.shape[2]

    @property
    def valid(self):
        return torch.ones(self.shape, dtype=torch.bool) if self.segments is None else self.segments > 0


def run(layer, x, **kwargs):
    return layer(x.q, x.k, x.v, scale=SCALE, raw_q=x.raw_q, raw_k=x.raw_k, segments=x.segments, **kwargs)


def run_split(layer, x, ends, cache=None):
    """The same with a cache, in chunks that end at `ends`."""
    cache = LinearCacheLayer(layer.config) if cache is None else cache
    return torch.cat(
        [run(layer, x[start:end], cache=cache) for start, end in zip([0, *ends[:-1]], ends, strict=True)], dim=2
    )


def error(actual, expected, valid=None):
    """Norm of the difference over the norm of what is expected."""
    if valid is not None:
        actual, expected = actual.transpose(1, 2)[valid], expected.transpose(1, 2)[valid]
    if not actual.numel():
        return 0.0
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# The formulas, one number at a time


def documents_and_positions(segments):
    """One row of segments -> (document, position) of each token, None for padding."""
    out, previous, document, position = [], None, -1, 0
    for segment in segments:
        if segment == 0:
            out.append(None)
            continue
        if segment != previous:
            previous, document, position = segment, document + 1, 0
        out.append((document, position))
        position += 1
    return out


def is_near(config, i, j):
    size = config.window_size
    near = {
        None: lambda: False,
        "sliding": lambda: i - j < size,
        "block": lambda: i // size == j // size,
        "terrace": lambda: j // size >= i // size - 1,
    }[config.window]()
    return near or j < config.sinks


def naive(layer, x):
    """[B, H, T, D_v] by loops over rows, heads, queries and keys."""
    config, weights = layer.config, layer.weights(torch.device("cpu"))
    phi_q = phi_k = None
    if config.feature_map is not None:
        phi_q, phi_k = (phi.detach().numpy() for phi in (layer.phi_q(x.raw_q), layer.phi_k(x.raw_k)))
    q, k, v = (y.numpy() for y in (x.q, x.k, x.v))
    batch, length = x.shape
    segments = np.ones((batch, length), int) if x.segments is None else x.segments.numpy()
    out = np.zeros((batch, HEADS, length, VALUE_DIM))
    for row in range(batch):
        place = documents_and_positions(segments[row])
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            g, lam = weights.near[head].item(), weights.far[head].item()
            for i in range(length):
                if place[i] is None:
                    continue
                near, far, convolved = [], [], np.zeros(VALUE_DIM)
                for j in range(i + 1):
                    if place[j] is None or place[j][0] != place[i][0]:
                        continue
                    distance = place[i][1] - place[j][1]
                    (near if is_near(config, place[i][1], place[j][1]) else far).append(j)
                    if distance < config.conv_taps:
                        convolved += weights.conv[head, distance].item() * v[row, kv_head, j]
                a = {j: exp(SCALE * (q[row, head, i] @ k[row, kv_head, j])) for j in near}
                b = {j: phi_q[row, head, i] @ phi_k[row, kv_head, j] for j in far} if phi_q is not None else {}
                if config.combine == "shared":
                    # g and lam b are relative to exp(-m): the maximum is taken out of the near weights.
                    m = max((SCALE * (q[row, head, i] @ k[row, kv_head, j]) for j in near), default=0.0)
                    mix = {j: g * w / exp(m) for j, w in a.items()} | {j: lam * w for j, w in b.items()}
                    total = sum(mix.values())
                    attended = sum(w * v[row, kv_head, j] for j, w in mix.items()) / total if total else 0
                else:
                    attended = g * sum(w * v[row, kv_head, j] for j, w in a.items()) / (sum(a.values()) or 1)
                    remembered = sum(w * v[row, kv_head, j] for j, w in b.items()) + np.zeros(VALUE_DIM)
                    norm = {
                        "sum": sum(b.values()) or 1,
                        "count": max(len(far), 1),
                        "rms": sqrt(np.mean(remembered**2) + 1e-6),
                        "none": 1,
                    }[config.norm]
                    attended = attended + lam * remembered / norm
                out[row, head, i] = attended + convolved
    return torch.from_numpy(out)


COMBINES = [{"combine": "shared", "far_weight": far_weight} for far_weight in ("one", "learned")]
COMBINES += [{"combine": "sum", "norm": norm} for norm in ("sum", "count", "rms", "none")]
PADDED_AND_PACKED = torch.tensor([[1] * 22, [0] * 3 + [1] * 7 + [2] * 1 + [0] * 2 + [2] * 5 + [1] * 3 + [0]])


@pytest.mark.parametrize("conv_taps", [0, 4])
@pytest.mark.parametrize("combine", COMBINES, ids=lambda combine: "-".join(combine.values()))
@pytest.mark.parametrize(("window", "sinks"), [*((window, s) for window in WINDOWS[:3] for s in (0, 2)), (None, 0)])
def test_reference_is_the_formula(window, sinks, combine, conv_taps):
    config = LinearAttentionConfig(window=window, window_size=5, sinks=sinks, conv_taps=conv_taps, **combine)
    layer = make_layer(config, backend="reference")
    for segments in (None, PADDED_AND_PACKED):
        x = Sequence.random(2, 22, segments=segments)
        assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


def test_reference_without_far_branch_is_the_formula():
    layer = make_layer(LinearAttentionConfig(window_size=5, sinks=2, feature_map=None, conv_taps=3))
    layer.backend = "reference"
    x = Sequence.random(2, 22, segments=PADDED_AND_PACKED)
    assert error(run(layer, x), naive(layer, x), x.valid) < 1e-10


def test_large_scores_do_not_overflow():
    layer = make_layer(LinearAttentionConfig(window_size=8, sinks=2, conv_taps=0), dtype=torch.float32)
    x = Sequence.random(1, 100, dtype=torch.float32)
    x.q, x.k = x.q * 100, x.k * 100
    for backend in BACKENDS:
        layer.backend = backend
        assert run(layer, x).isfinite().all()


# One semantics


def draw_config(draw, window, feature_maps, norms=("sum", "count", "rms", "none"), combine=("shared", "sum")):
    window_size = draw(st.integers(1, 9))
    none = [] if window is None else [None]
    return LinearAttentionConfig(
        window=window,
        window_size=window_size,
        sinks=0 if window is None else draw(st.integers(0, window_size)),
        feature_map=draw(st.sampled_from([*feature_maps, *none])),
        combine=draw(st.sampled_from(combine)),
        norm=draw(st.sampled_from(norms)),
        far_weight=draw(st.sampled_from(["one", "learned"])),
        conv_taps=draw(st.integers(0, 5)),
        slack=draw(st.integers(0, 6)),
    )


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
    layer = make_layer(config, seed, dtype, "reference")
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


def row_of(cache, row):
    """A copy of the cache with one row."""
    copy = deepcopy(cache)
    copy.batch_select_indices(torch.tensor([row]))
    return copy


def assert_same_memory(actual, expected):
    """Two caches of one row, up to what their unused slots hold."""
    assert actual.length.tolist() == expected.length.tolist()
    assert actual.count.tolist() == expected.count.tolist()
    count = actual.count.item()
    folded_sinks = min(actual.config.sinks, actual.length.item() - count)
    for name in expected.ring:
        assert torch.equal(actual.ring[name][:, :, :count], expected.ring[name][:, :, :count])
        assert torch.equal(actual.sinks[name][:, :, :folded_sinks], expected.sinks[name][:, :, :folded_sinks])
    if expected.state is not None:
        torch.testing.assert_close(actual.state.S, expected.state.S, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(actual.state.z, expected.state.z, rtol=1e-10, atol=1e-12)


def ancestors_of(parents):
    """[n, n] bool from the parent of each node, -1 at a root."""
    order = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            order[node] |= order[parent]
    return order


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
    layer = make_layer(config, seed)
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


@pytest.mark.parametrize("backend", BACKENDS)
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
    return [(getattr(x, name), getattr(y, name)) for name in ("q", "k", "v", "raw_q", "raw_k")]


@pytest.mark.parametrize("backend", BACKENDS)
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


# Feature maps


def feature_map(name, dim=None, head_dim=DIM, heads=1, seed=0):
    phi = FEATURE_MAPS[name](heads, head_dim, dim).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in phi.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return phi


def vectors(count=5, dim=DIM, size=1.0, seed=0):
    return size * torch.randn(1, 1, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SIZES = [(name, None) for name in FEATURE_MAPS] + [
    ("hedgehog", 6),
    ("t2r", 5),
    ("favor", 9),
    ("rfa", 10),
    ("taylor", 7),
    ("dpfp", 24),
]
DEFAULT_SIZES = {"cosine": DIM + 1, "taylor": 1 + DIM + DIM**2, "dpfp": 2 * DIM}


@pytest.mark.parametrize(("name", "dim"), SIZES)
@torch.enable_grad()
def test_feature_map_shapes_and_gradients(name, dim):
    phi = feature_map(name, dim, heads=3)
    assert phi.dim == (dim or DEFAULT_SIZES.get(name, DIM))
    x = torch.stack([vectors(7, size=1), vectors(7, size=30), vectors(7, size=0)], dim=1).squeeze(2).requires_grad_()
    out = phi(x)
    assert out.shape == (1, 3, 7, phi.dim) and out.isfinite().all()
    if name in NONNEGATIVE and name not in ("cosine", "taylor"):
        assert (out >= 0).all()
    out.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in (x.grad, *(p.grad for p in phi.parameters())))
    assert x.grad.any()


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_nonnegative_maps_have_a_sum_to_divide_by(name):
    phi = feature_map(name)
    assert (phi(vectors(50)) @ phi(vectors(50, seed=1)).mT >= 0).all()


@pytest.mark.parametrize(
    ("name", "dim"),
    [("identity", 5), ("l2", 3), ("relu", 5), ("elu1", 8), ("exp", 5), ("hedgehog", 5), ("hedgehog", 2), ("rfa", 7)]
    + [("cosine", 4), ("taylor", 8), ("dpfp", 9)],
)
def test_impossible_size_is_told(name, dim):
    with pytest.raises(ValueError, match=f"feature_dim.* {dim} features"):
        FEATURE_MAPS[name](2, DIM, dim)
    with pytest.raises(ValueError, match="feature_dim"):
        LinearAttention(LinearAttentionConfig(feature_map=name, feature_dim=dim), HEADS, KV_HEADS, DIM)


def test_maps_as_published():
    x = vectors()
    weight = {name: feature_map(name, seed=3) for name in ("hedgehog", "t2r")}
    hedgehog, t2r = weight["hedgehog"], weight["t2r"]
    r = torch.cat([x, -x], dim=-1).clamp(min=0)
    expected = {
        "identity": x,
        "l2": x / x.norm(dim=-1, keepdim=True),
        "relu": x.clamp(min=0),
        "elu1": torch.where(x > 0, x + 1, x.exp()),
        "exp": (x / sqrt(sqrt(DIM))).exp(),
        "dpfp": torch.stack([r[..., i] * r[..., i - 1] for i in range(2 * DIM)], dim=-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(feature_map(name)(x), value)
    y = x @ hedgehog.weight[0]
    exps = torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(hedgehog(x), exps)
    torch.testing.assert_close(t2r(x), (x @ t2r.weight[0] + t2r.bias[0]).clamp(min=0))


def test_cosine_kernel():
    phi, q, k = feature_map("cosine"), vectors(6), vectors(6, seed=1)
    cos = torch.nn.functional.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1)
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + cos)


@pytest.mark.parametrize("dim", [None, 7])
def test_taylor_kernel(dim):
    phi, q, k = feature_map("taylor", dim), vectors(6), vectors(6, seed=1)
    rank = phi.weight.shape[-1]
    s = (q @ phi.weight) @ (k @ phi.weight).mT / sqrt(rank)
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + s + s**2 / 2)


def test_favor_approximates_softmax_kernel():
    phi = feature_map("favor", 4096)
    q, k = vectors(12, size=0.4), vectors(12, size=0.4, seed=1)
    torch.testing.assert_close(phi(q) @ phi(k).mT, (q @ k.mT / sqrt(DIM)).exp(), rtol=0.15, atol=0)


def test_rfa_approximates_gaussian_kernel():
    phi = feature_map("rfa", 4096)
    q, k = vectors(12), vectors(12, seed=1)
    unit = torch.nn.functional.normalize
    gaussian = (-torch.cdist(unit(q, dim=-1), unit(k, dim=-1)).square() / 2).exp()
    torch.testing.assert_close(phi(q) @ phi(k).mT, gaussian, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["favor", "rfa"])
def test_random_maps_of_queries_and_keys_agree(name):
    """Drawn apart, in processes apart: phi(q).phi(k) needs one projection, which checkpoints may not carry."""
    torch.manual_seed(1)
    first = FEATURE_MAPS[name](4, DIM, 8)
    torch.manual_seed(2)
    assert torch.equal(first.weight, FEATURE_MAPS[name](2, DIM, 8).weight)
    many = FEATURE_MAPS[name](1, DIM, 4096).weight
    # Rows of a standard normal matrix, whatever the sign or the axis.
    assert many.mean(1).abs().max() < 0.1 and (many.var(1) - 1).abs().max() < 0.1


# Gradients


@pytest.mark.parametrize("combine", COMBINES, ids=lambda combine: "-".join(combine.values()))
@pytest.mark.parametrize("window", WINDOWS)
@torch.enable_grad()
def test_gradients_of_backends_agree(window, combine):
    config = LinearAttentionConfig(window=window, window_size=7, sinks=3 if window else 0, conv_taps=5, **combine)
    segments = torch.tensor([[1] * 170, [0] * 9 + [1] * 100 + [2] * 50 + [0] * 11])
    x = Sequence.random(2, 170, segments=segments)
    direction = Sequence.random(2, 170, seed=5).q.new_zeros(2, HEADS, 170, VALUE_DIM)
    direction.normal_(generator=torch.Generator().manual_seed(5))
    direction *= x.valid[:, None, :, None]

    def gradients(backend):
        layer = make_layer(config, backend=backend)
        inputs = x.map(lambda y: y.clone().requires_grad_())
        (run(layer, inputs) * direction).sum().backward()
        named = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return named | {name: getattr(inputs, name).grad for name in ("q", "k", "v", "raw_q", "raw_k")}

    expected, actual = gradients("reference"), gradients("torch")
    assert {"phi_q.weight", "phi_k.weight", "conv"} < expected.keys()
    for name, gradient in expected.items():
        if window is None and name in ("q", "k", "gate"):
            assert gradient is None or not gradient.any(), name
            continue
        if name != "lam" or window is not None:  # without a window the far branch's weight cancels
            assert gradient.norm() > 1e-6, name
            assert error(actual[name], gradient) < 1e-8, name


@torch.enable_grad()
def test_far_weight_at_zero_still_learns():
    """The bound lam >= 0 passes the gradient, or the far branch would never wake."""
    config = LinearAttentionConfig(window_size=4, sinks=1, conv_taps=0)
    layer = LinearAttention(config, HEADS, KV_HEADS, DIM).double()
    x = Sequence.random(1, 40)
    for start in (0.0, -0.5):
        layer.zero_grad()
        layer.lam.data.fill_(start)
        run(layer, x).square().sum().backward()
        assert (layer.lam.grad != 0).all()
        assert torch.equal(layer.weights(torch.device("cpu")).far, torch.zeros(HEADS).double())


# The cache

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


# Configuration


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct_and_run(name):
    layer = LinearAttention(PRESETS[name], HEADS, KV_HEADS, DIM)
    x = Sequence.random(2, 200, dtype=torch.float32)
    out = run(layer, x)
    assert out.shape == (2, HEADS, 200, VALUE_DIM) and out.isfinite().all()
    assert LinearAttentionConfig(**PRESETS[name].to_dict()) == PRESETS[name]


def test_augmented_starts_as_window_and_sinks():
    augmented = LinearAttention(PRESETS["augmented"], HEADS, KV_HEADS, DIM)
    swa = LinearAttention(PRESETS["swa"], HEADS, KV_HEADS, DIM)
    x = Sequence.random(2, 300, dtype=torch.float32)
    assert error(run(augmented, x), run(swa, x)) < 1e-6
    for parameter in (augmented.lam, augmented.conv):
        before = run(augmented, x)
        torch.nn.init.constant_(parameter, 0.5)
        assert error(run(augmented, x), before) > 1e-2


def test_sum_starts_as_local_softmax():
    layer = LinearAttention(PRESETS["augmented-icml"], HEADS, KV_HEADS, DIM)
    local = LinearAttention(
        replace(PRESETS["augmented-icml"], feature_map=None, conv_taps=0), HEADS, KV_HEADS, DIM
    )
    x = Sequence.random(2, 200, dtype=torch.float32)
    assert error(run(layer, x), run(local, x)) < 1e-6


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("window_size", {"window_size": 0}),
        ("feature_dim", {"feature_dim": 0}),
        ("sinks", {"window_size": 4, "sinks": 5}),
        ("sinks", {"sinks": -1}),
        ("sinks", {"window": None, "sinks": 1}),
        ("conv_taps", {"conv_taps": -1}),
        ("slack", {"slack": -1}),
        ("feature_map", {"window": None, "sinks": 0, "feature_map": None}),
    ],
)
def test_contradictions_name_their_field(field, values):
    with pytest.raises(ValueError, match=f"^{field}: "):
        LinearAttentionConfig(**values)


@pytest.mark.parametrize("combine", COMBINES[1:3], ids=lambda combine: combine["combine"])
def test_branches_can_be_switched_off(combine):
    config = LinearAttentionConfig(window_size=5, sinks=2, conv_taps=3, **combine)
    layer = make_layer(config)
    x = Sequence.random(1, 90)
    layer.branches = frozenset({"local"})
    local = make_layer(replace(config, feature_map=None, conv_taps=0))
    assert error(run(layer, x), run(local, x)) < 1e-10
    layer.branches = frozenset({"linear"})
    out = run(layer, x)
    assert not out[:, :, : config.window_size].any() and out[:, :, config.window_size + 2 :].any()
    layer.branches = frozenset({"conv"})
    out = run(layer, x)
    expected = sum(
        layer.conv[None, :, lag, None, None]
        * torch.nn.functional.pad(x.v.repeat_interleave(2, dim=1), (0, 0, lag, 0))[:, :, :90]
        for lag in range(3)
    )
    assert error(out, expected) < 1e-10
