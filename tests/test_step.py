"""Fused decoding steps equal the reference in double precision, on a GPU or in Triton's interpreter."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS
from linearize.layers.kernels.fused import step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {
    "augmented": replace(PRESETS["augmented"], window_size=10, sinks=3, conv_taps=5, slack=7),
    "augmented-icml": replace(PRESETS["augmented-icml"], window_size=12, conv_taps=5, slack=7),
    "lolcats": replace(PRESETS["lolcats"], window_size=6, slack=5),
    "sliding": replace(PRESETS["lolcats"], window="sliding", window_size=10, slack=7, conv_taps=1),
    "t2r": replace(PRESETS["t2r"], slack=5),
}
# Sums of some dozen products in single precision. In bfloat16 features and weights of values are rounded to 2^-9, as
# is the output, whose larger parts may cancel; what the delta rule adds to the state depends on what it has read there.
TOLERANCES = {torch.float32: 1e-5} | ({torch.bfloat16: 1e-2} if DEVICE == "cuda" else {})


# Many rows go through other products than few, and wide heads are spread over programs. With as many key heads as query
# heads is how a layer comes here whose keys have a map per query head.
CASES = [*((name, 2, 2, 16) for name in CONFIGS), ("augmented", 8, 1, 16), ("augmented", 2, 1, 64)]
CASES += [("lolcats", 2, 4, 16)]


def random_layers(config, heads, kv_heads, dim, normal):
    """A layer with random parameters by torch, and the same by the reference in double precision."""
    layer = LinearAttention(config, heads, kv_heads, dim).to(DEVICE)
    for parameter in layer.parameters():
        parameter.copy_(normal(*parameter.shape) * 0.3)
    layer.backend = "torch"
    exact = deepcopy(layer).double()
    exact.backend = "reference"
    return layer, exact


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name, rows, kv_heads, dim", CASES)
def test_steps(name, rows, kv_heads, dim, dtype, without_gradients):
    """One row from its first tokens on, the others until tokens have entered the state; some are taken back, and some
    come several at once."""
    config, tolerance = CONFIGS[name], TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    heads, length, prompt = 4, 50, 20

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer, exact = random_layers(config, heads, kv_heads, dim, normal)
    tokens = {"q": heads, "k": kv_heads, "v": kv_heads}
    if config.rope == "before":
        tokens |= {"raw_q": heads, "raw_k": kv_heads, "sink_q": heads}
    tokens = {name: normal(rows, n, length, dim).to(dtype) for name, n in tokens.items()}
    caches = {layer: LinearCacheLayer(config), exact: LinearCacheLayer(config)}

    def run(layer, start, end, **kwargs):
        part = {name: x[:, :, start:end].to(torch.float64 if layer is exact else dtype) for name, x in tokens.items()}
        return layer(**part, scale=0.3, cache=caches[layer], **kwargs)

    def fused(at):
        part = {name: x[:, :, at : at + 1] for name, x in tokens.items()}
        rest = (part.get(name) for name in ("raw_q", "raw_k", "sink_q"))
        return step.step(layer, caches[layer], part["q"], part["k"], part["v"], *rest, 0.3)

    segments = torch.ones(rows, prompt, dtype=torch.long, device=DEVICE)
    segments[0, : prompt - 2] = 0
    for either in caches:
        run(either, 0, prompt, segments=segments)
    assert step.refuses(layer, caches[layer]) is None
    at = prompt
    for event in [*["step"] * 14, -4, *["step"] * 8, "tree", *["step"] * 2, -1, "step", "chunk"]:
        if event == "step":
            expected, actual = run(exact, at, at + 1), fused(at)
            assert (actual - expected).norm() <= tolerance * expected.norm(), at
            at += 1
        elif event == "chunk":
            for either in caches:
                run(either, at, at + 3)
            at += 3
        elif event == "tree":
            for either, cache in caches.items():
                run(either, at, at + 3, ancestors=torch.ones(3, 3, dtype=torch.bool, device=DEVICE).tril())
                cache.accept(torch.arange(3, device=DEVICE).expand(rows, -1))
            at += 3
        else:
            for cache in caches.values():
                cache.crop(event)
            at += event
    found, expected = caches[layer], caches[exact]
    for name in ("length", "count", "segment", "seen"):
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(expected, name)))
    for name in expected.ring:
        assert torch.equal(found.ring[name].double(), expected.ring[name])
        assert torch.equal(found.sinks[name].double(), expected.sinks[name])
    for name in ("S", "z"):
        actual, wanted = (getattr(cache.state, name) for cache in (found, expected))
        assert (actual - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    "change, kept, reason",
    [
        ({"feature_map": None}, (), "no far branch"),
        ({}, (0, 1), "no far branch"),
        ({"feature_map": "relu", "feature_expansion": 1}, (), "elu1"),
        ({"state": "decay"}, (), "delta rule"),
        ({"window": "block"}, (), "slides"),
        ({"combine": "sum", "norm": "rms"}, (), "rms"),
        ({"slack": 0}, (), "slack"),
    ],
)
def test_what_cannot_be_done_is_refused(change, kept, reason, without_gradients):
    config = replace(CONFIGS["augmented"], **change)
    layer, cache = LinearAttention(config, 4, 2, 16, kept), LinearCacheLayer(config)
    q, k, v = (torch.randn(1, heads, 3, 16) for heads in (4, 2, 2))
    layer(q, k, v, scale=0.3, raw_q=q, raw_k=k, sink_q=q, cache=cache)
    assert reason in step.refuses(layer, cache)


def test_a_step_in_training_or_without_a_branch_is_refused():
    config = CONFIGS["augmented"]
    layer, cache = LinearAttention(config, 4, 2, 16), LinearCacheLayer(config)
    q, k, v = (torch.randn(1, heads, 3, 16) for heads in (4, 2, 2))
    layer(q, k, v, scale=0.3, raw_q=q, raw_k=k, sink_q=q, cache=cache)
    assert "gradients" in step.refuses(layer, cache)
    layer.branches = frozenset({"local", "conv"})
    assert "branch" in step.refuses(layer, cache)
