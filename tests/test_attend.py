"""The fused tile equals the reference in float64, on a GPU or in Triton's interpreter."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch

from linearize.layers import kernels
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.kernels.fused.attend import attend
from linearize.layers.kernels.reference import Weights
from linearize.layers.kernels.reference import attend as plain_attend
from linearize.layers.tokens import Tokens, visible_keys

from .layers import Sequence, error, make_layer, run_split
from .layers import run as run_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SHARED = LinearAttentionConfig(window="sliding", window_size=20, sinks=3)
CONFIGS = {
    "augmented": replace(PRESETS["augmented"], window_size=24),
    "decay": replace(SHARED, state="decay"),
    "additive": SHARED,
    "lolcats": replace(PRESETS["lolcats"], window_size=16),
    "hedgehog": PRESETS["hedgehog"],
    "swa": replace(PRESETS["swa"], window_size=24),
}


def make(
    config, tiles=2, heads=2, kv_heads=1, queries=70, keys=100, dim=16, value_dim=12, features=24, with_state=True
):  # fmt: skip
    """Arguments of `attend` as of a sequence's last `queries` tokens; padding in the last tile."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    far = config.feature_map is not None
    fades = far and config.state != "additive"
    position = torch.arange(keys).expand(tiles, keys)
    document = torch.zeros(tiles, keys, dtype=torch.long)
    document[-1, -9:] = -1
    tokens = Tokens(document, position)
    decay = -torch.rand(tiles, kv_heads, keys, generator=generator, dtype=torch.float64).cumsum(-1) * 0.1
    leaves = {
        "q": normal(tiles, heads, queries, dim), "k": normal(tiles, kv_heads, keys, dim),
        "v": normal(tiles, kv_heads, keys, value_dim),
        "phi_q": normal(tiles, heads, queries, features).abs() * 0.3 if far else None,
        "phi_k": normal(tiles, kv_heads, keys, features).abs() if far else None,
        "u": torch.cat([normal(tiles, kv_heads, keys, value_dim), normal(tiles, kv_heads, keys, 1).abs()], -1)
        if far else None,
        "G_q": decay[:, :, -queries:].clone() if fades else None, "G_k": decay if fades else None,
        "M": normal(tiles, kv_heads, features, value_dim + 1).abs() if far and with_state else None,
        "sink_q": normal(tiles, heads, queries, dim) if config.sink_distance is not None else None,
        "near": torch.rand(heads, generator=generator, dtype=torch.float64) + 0.5,
        "far": torch.rand(heads, generator=generator, dtype=torch.float64) + 0.5,
    }  # fmt: skip
    if config.state == "delta" and far:
        # Some far masses are negative: what the rule corrects may overshoot.
        leaves["u"][..., -1] -= 1.0
        leaves["M"] = None if leaves["M"] is None else leaves["M"] - 0.4
    visible = visible_keys(tokens, queries, None) & (document[:, None] >= 0)
    return leaves, (position[:, -queries:], position, visible), document[:, -queries:] >= 0


def run(function, config, leaves, places, recalls, dtype):
    x = {name: None if y is None else y.to(DEVICE, dtype).requires_grad_() for name, y in leaves.items()}
    q_position, k_position, visible = (y.to(DEVICE) for y in places)
    out = function(
        x["q"], x["k"], x["v"], x["phi_q"], x["phi_k"], x["u"], x["G_q"], x["G_k"], q_position, k_position, visible,
        x["M"], config, Weights(x["near"], x["far"], None), 0.4, None if recalls is None else recalls.to(DEVICE),
        x["sink_q"],
    )  # fmt: skip
    return out, {name: y for name, y in x.items() if y is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name, tolerance):
    check(CONFIGS[name], tolerance)


@pytest.mark.parametrize(
    "sizes", [{"queries": 1, "keys": 90}, {"queries": 17, "keys": 17, "with_state": False}, {"heads": 3, "kv_heads": 3}]
)
def test_sizes(sizes, tolerance):
    check(CONFIGS["augmented"], tolerance, **sizes)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in the interpreter")
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_large_heads(dim, groups, tolerance):
    check(CONFIGS["augmented"], tolerance, heads=groups, dim=dim, value_dim=dim, features=2 * dim, queries=64, keys=132)


def check(config, tolerance, **sizes):
    leaves, places, valid = make(config, **sizes)
    recalls = torch.ones(places[0].shape, dtype=torch.bool)
    recalls[0, : recalls.shape[1] // 2] = False  # of another document than the state's
    expected, exact = run(plain_attend, config, leaves, places, recalls, torch.float64)
    actual, inputs = run(attend, config, leaves, places, recalls, torch.float32)
    valid = valid[:, None, :, None].to(DEVICE)
    weights = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE) * valid
    assert ((actual - expected) * valid).norm() <= tolerance * (expected * valid).norm()

    def gradients(out, x):
        loss = (out * weights.to(out.dtype)).where(valid, 0).sum()
        return torch.autograd.grad(loss, list(x.values()), allow_unused=True)

    for key, found, wanted in zip(exact, gradients(actual, inputs), gradients(expected, exact), strict=True):
        if wanted is None:
            assert found is None or not found.any(), key
        else:
            # Where all weights are near ones, or far ones, those of g, or lam, are 0 but for rounding.
            assert (found - wanted).norm() <= tolerance * wanted.norm().clamp(min=1), key


@pytest.mark.parametrize("name", ["augmented", "decay", "hedgehog", "swa"])
def test_chunks_of_a_sequence_by_tiles(name, tolerance):
    """The layer's outputs are those of torch: documents, padding, a state, and sequences of many chunks."""
    layer = make_layer(CONFIGS[name], dtype=torch.float32).to(DEVICE)
    segments = torch.tensor([[1] * 150 + [2] * 40 + [0] * 10, [0] * 30 + [1] * 170])
    x = Sequence.random(2, 200, dtype=torch.float32, segments=segments)
    x = x.map(lambda y: y.to(DEVICE))
    x.segments = segments.to(DEVICE)
    outputs = {}
    for attends in (plain_attend, attend):
        backend = kernels.Backend(partial(kernels.chunked, attend=attends))
        with patch.dict(kernels.BACKENDS, {"chosen": backend}):
            layer.backend = "chosen"
            outputs[attends] = torch.cat([run_layer(layer, x), run_split(layer, x, [90, 120, 121, 200])], dim=1)
    assert error(outputs[attend], outputs[plain_attend], x.valid.to(DEVICE)) <= max(tolerance, 1e-4)
