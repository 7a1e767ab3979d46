"""The layer: gradients of its backends, where it starts, presets and contradictions."""

from dataclasses import replace

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.config import PRESETS, LinearAttentionConfig

from .layers import COMBINES, DIM, HEADS, KV_HEADS, VALUE_DIM, WINDOWS, Sequence, error, make_layer, run

pytestmark = pytest.mark.usefixtures("without_gradients")


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
    local = LinearAttention(replace(PRESETS["augmented-icml"], feature_map=None, conv_taps=0), HEADS, KV_HEADS, DIM)
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
        ("local", {"local": "relu2"}),
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
