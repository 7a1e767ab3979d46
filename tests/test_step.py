"""A fused decoding step equals a step of the layer, on a GPU or in Triton's interpreter."""

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
    "augmented-icml": replace(PRESETS["augmented-icml"], window_size=12, conv_taps=5, slack=7),
    "lolcats": replace(PRESETS["lolcats"], window_size=8, slack=9),
    "sliding": replace(PRESETS["lolcats"], window="sliding", window_size=10, slack=20, conv_taps=1),
    "t2r": replace(PRESETS["t2r"], slack=5),
}
# Sums of some dozen products in single precision; bfloat16 rounds the inputs to products and the output.
TOLERANCES = {torch.float32: 1e-5} | ({torch.bfloat16: 1e-2} if DEVICE == "cuda" else {})


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_steps(name, dtype, without_gradients):
    """Rows of different lengths, from the first tokens on until the ring has gone round."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, length, prompt = 4, 2, 16, 60, 6

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer = LinearAttention(config, heads, kv_heads, dim).to(DEVICE)
    for parameter in layer.parameters():
        parameter.copy_(normal(*parameter.shape) * 0.3)
    layer.backend = "torch"
    q, k, v = normal(2, heads, length, dim), normal(2, kv_heads, length, dim), normal(2, kv_heads, length, dim)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    cache = LinearCacheLayer(config)
    segments = torch.tensor([[1] * prompt, [0] * (prompt - 2) + [1] * 2]).to(DEVICE)
    layer(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], scale=0.3, segments=segments, cache=cache)
    fused = deepcopy(cache)
    assert step.refuses(layer, fused) is None
    for at in range(prompt, length):
        new = [x[:, :, at : at + 1] for x in (q, k, v)]
        expected = layer(*new, scale=0.3, cache=cache)
        actual = step.step(layer, fused, *new, 0.3)
        assert (actual - expected).norm() <= TOLERANCES[dtype] * expected.norm(), at
    assert fused.length.tolist() == cache.length.tolist() and fused.count.tolist() == cache.count.tolist()
    for name in cache.ring:
        assert torch.equal(fused.ring[name], cache.ring[name])
    torch.testing.assert_close(fused.state.S, cache.state.S, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    torch.testing.assert_close(fused.state.z, cache.state.z, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
