"""Attention that looks both ways, as encoders have it: every backend, every layout, padding and packed documents."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.kernels import BACKENDS, chunked, triton_kernels

from .layers import COMBINES, DIM, HEADS, KV_HEADS, SCALE, VALUE_DIM, WINDOWS, Sequence, error, run

SEGMENTS = torch.tensor([[1] * 200, [0] * 9 + [1] * 120 + [2] * 60 + [0] * 11])


def make(config, backend="torch", kept=(), causal=False) -> LinearAttention:
    layer = LinearAttention(config, HEADS, KV_HEADS, DIM, kept, causal=causal).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
        if name == "lam":
            parameter.data.abs_().add_(0.1)
    layer.backend = backend
    return layer


def bias_of(reach: int) -> torch.Tensor:
    return torch.randn(HEADS, 2 * reach - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("combine", COMBINES, ids=lambda combine: "-".join(combine.values()))
@pytest.mark.parametrize("window", WINDOWS)
def test_linear_in_length_is_the_reference(window, combine):
    """Outputs and gradients, with sinks and with a bias."""
    config = LinearAttentionConfig(window=window, window_size=7, sinks=3 if window else 0, conv_taps=5, **combine)
    x, bias = Sequence.random(2, 200, segments=SEGMENTS), bias_of(9)
    direction = torch.randn(2, HEADS, 200, VALUE_DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction *= x.valid[:, None, :, None]

    def results(backend):
        layer = make(config, backend)
        inputs, added = x.map(lambda y: y.clone().requires_grad_()), bias.clone().requires_grad_()
        out = run(layer, inputs, bias=added)
        (out * direction).sum().backward()
        named = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"bias": added.grad}
        named |= {name: getattr(inputs, name).grad for name in ("q", "k", "v", "raw_q", "raw_k")}
        return out.detach(), {name: grad for name, grad in named.items() if grad is not None and grad.norm() > 1e-9}

    (expected, gradients), (actual, found) = results("reference"), results("torch")
    assert error(actual, expected, x.valid) < 1e-10
    assert gradients.keys() == found.keys() and {"phi_q.weight", "conv", "v"} < found.keys()
    assert window is None or "bias" in found
    for name, gradient in gradients.items():
        assert error(found[name], gradient) < 1e-8, name


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_length_padding_and_packing(data):
    window = data.draw(st.sampled_from(WINDOWS))
    size, taps = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 70))
    length = data.draw(st.integers(1, 300))
    config = LinearAttentionConfig(window=window, window_size=size, sinks=0, conv_taps=taps)
    ends = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    segments = torch.bucketize(torch.arange(length), torch.tensor(ends, dtype=torch.long), right=True)[None]
    x = Sequence.random(1, length, segments=segments)
    assert error(run(make(config), x), run(make(config, "reference"), x), x.valid) < 1e-9


def test_a_window_around_everything_is_softmax_attention():
    x, bias = Sequence.random(2, 50), bias_of(50)
    layer = make(LinearAttentionConfig(window_size=50, sinks=0, feature_map=None, conv_taps=0))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (x.k, x.v))
    distance = torch.arange(50) - torch.arange(50)[:, None]
    scores = SCALE * x.q @ k.mT
    assert error(run(layer, x), scores.softmax(-1) @ v) < 1e-12
    assert error(run(layer, x, bias=bias), (scores + bias[:, distance + 49]).softmax(-1) @ v) < 1e-12


def test_the_convolution_reaches_both_ways():
    config = LinearAttentionConfig(window_size=4, sinks=0, conv_taps=3)
    layer, x = make(config), Sequence.random(1, 150)
    layer.branches = frozenset({"conv"})
    v = torch.nn.functional.pad(x.v.repeat_interleave(HEADS // KV_HEADS, dim=1), (0, 0, 2, 2))
    expected = sum(layer.conv[None, :, 2 + lag, None, None] * v[:, :, 2 - lag : 152 - lag] for lag in range(-2, 3))
    assert layer.conv.shape == (HEADS, 5) and error(run(layer, x), expected) < 1e-12


@pytest.mark.parametrize("kept", [(), (1,)])
def test_documents_and_padding_stay_apart(kept):
    """Each document is what it would be alone, and what stands behind counts."""
    layer, x = make(PRESETS["augmented-encoder"], kept=kept), Sequence.random(2, 200, segments=SEGMENTS)
    packed = run(layer, x)
    for row, start, end in ((1, 9, 129), (1, 129, 189)):
        alone = x.map(lambda y, row=row, start=start, end=end: y[row : row + 1, :, start:end])
        alone.segments = None
        assert error(packed[row : row + 1, :, start:end], run(layer, alone)) < 1e-9
    other = x.map(torch.clone)
    other.v[:, :, 199] += 1
    assert (run(layer, other) - packed)[0, :, :120].abs().amax() > 1e-6


def test_kept_heads_look_both_ways():
    layer, x = make(PRESETS["augmented-encoder"], kept=(0, 1)), Sequence.random(2, 60)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (x.k, x.v))
    assert error(run(layer, x), (SCALE * x.q @ k.mT).softmax(-1) @ v) < 1e-12


def test_augmented_encoder_starts_as_its_window():
    layer = LinearAttention(PRESETS["augmented-encoder"], HEADS, KV_HEADS, DIM, causal=False)
    window = replace(PRESETS["augmented-encoder"], feature_map=None, conv_taps=0)
    local = LinearAttention(window, HEADS, KV_HEADS, DIM, causal=False)
    x = Sequence.random(2, 300, dtype=torch.float32)
    assert error(run(layer, x), run(local, x)) < 1e-6


@pytest.mark.parametrize(
    ("field", "preset"), [("state", "augmented"), ("sink_distance", "swa")], ids=["delta", "sink_distance"]
)
def test_what_depends_on_an_order_is_refused(field, preset):
    with pytest.raises(ValueError, match=f"^{field}: "):
        LinearAttention(PRESETS[preset], HEADS, KV_HEADS, DIM, causal=False)


def test_there_is_no_cache():
    layer = make(PRESETS["augmented-encoder"])
    with pytest.raises(ValueError, match="looks both ways"):
        run(layer, Sequence.random(1, 9), cache=LinearCacheLayer(layer.config))


@pytest.mark.parametrize("what", ["both ways", "bias"])
def test_fused_kernels_leave_it_to_others(what):
    layer, x, seen = make(PRESETS["lolcats"], causal=what == "bias"), Sequence.random(1, 90), []
    patched = replace(BACKENDS["torch"], run=lambda problem: seen.append(problem) or chunked(problem))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "torch", patched)
        run(layer, x.map(torch.Tensor.float), bias=bias_of(9) if what == "bias" else None)
    word = "behind" if what == "both ways" else "bias"
    assert all(word in kernels.refuses(problem) for problem in seen for kernels in triton_kernels.layers) and seen
