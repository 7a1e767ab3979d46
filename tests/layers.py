"""Random layers and sequences, and ways to run one over the other; tests import this file."""

from copy import deepcopy
from dataclasses import dataclass

import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.tokens import PADDING

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 4, 6
SCALE = 0.6
WINDOWS = ["sliding", "block", "terrace", None]
# What these give is never negative, so their sum can be a denominator.
NONNEGATIVE = ["relu", "elu1", "exp", "hedgehog", "t2r", "favor", "cosine", "taylor", "dpfp"]
SIGNED = ["identity", "l2", "rfa"]
STATES = ["additive", "decay", "delta"]
COMBINES = [{"combine": "shared", "far_weight": far_weight} for far_weight in ("one", "learned")]
COMBINES += [{"combine": "sum", "norm": norm} for norm in ("sum", "count", "rms", "none")]


def make_layer(config, seed=0, dtype=torch.float64, backend="torch", kept=()):
    """A layer with random weights, so that every branch contributes."""
    layer = LinearAttention(config, HEADS, KV_HEADS, DIM, kept).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.7
        if name == "lam":
            parameter.data.abs_().add_(0.1)
    layer.backend = backend
    return layer


@dataclass
class Sequence:
    """q, k, v, their un-rotated forms and q as sinks see it (here: any other numbers), with segments or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    raw_q: torch.Tensor
    raw_k: torch.Tensor
    sink_q: torch.Tensor
    segments: torch.Tensor | None = None

    @classmethod
    def random(cls, batch, length, seed=0, dtype=torch.float64, segments=None):
        generator = torch.Generator().manual_seed(seed)

        def normal(heads, dim):
            return torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)

        q, raw_q = normal(HEADS, DIM), normal(HEADS, DIM)
        k, raw_k = normal(KV_HEADS, DIM), normal(KV_HEADS, DIM)
        v = normal(KV_HEADS, VALUE_DIM)
        return cls(q, k, v, raw_q, raw_k, normal(HEADS, DIM), segments)

    def map(self, function):
        """`function` on every tensor of tokens; they are [B, H, T, ..]."""
        tensors = (self.q, self.k, self.v, self.raw_q, self.raw_k, self.sink_q)
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
    if layer.config.sink_distance is not None:
        kwargs["sink_q"] = x.sink_q
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


def row_of(cache, row):
    """A copy of the cache with one row."""
    copy = deepcopy(cache)
    copy.batch_select_indices(torch.tensor([row]))
    return copy


def assert_same_memory(actual, expected):
    """Two float64 caches of one row, up to what their unused slots hold, and to sums in another order: processors
    differ in which products of matrices give the same bits."""

    def close(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    assert actual.length.tolist() == expected.length.tolist()
    assert actual.count.tolist() == expected.count.tolist()
    count = actual.count.item()
    folded_sinks = min(actual.config.sinks, actual.length.item() - count)
    start = actual.length.item() - count
    slots = torch.arange(start, start + count) % max(actual.config.ring_size, 1)
    for name in expected.ring:
        close(actual.ring[name][:, :, slots], expected.ring[name][:, :, slots])
        close(actual.sinks[name][:, :, :folded_sinks], expected.sinks[name][:, :, :folded_sinks])
    if expected.state is not None:
        close(actual.state.S, expected.state.S)
        close(actual.state.z, expected.state.z)
    for ours, theirs in zip(memory_of(actual), memory_of(expected), strict=True):
        close(ours, theirs)


def memory_of(cache):
    """Positions, k and v that a cache of one row holds of its kept heads."""
    memory = cache.memory
    if memory.k is None:
        return ()
    # Slots may be in any order.
    order = memory.position[0].argsort()
    order = order[memory.position[0, order] != PADDING]
    return memory.position[:, order], memory.k[:, :, order], memory.v[:, :, order]


def ancestors_of(parents):
    """[n, n] bool from the parent of each node, -1 at a root."""
    order = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            order[node] |= order[parent]
    return order
