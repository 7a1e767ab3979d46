"""The kernel for rotary embeddings against the families' own function."""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from linearize.layers.rotary import _pairs_halves

pytest.importorskip("triton")
from linearize.layers.kernels.fused import rotate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_what_pairs_halves():
    assert _pairs_halves(rotate_halves)
    assert not _pairs_halves(rotate_neighbours)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "heads, kv_heads, length, dim, size, rows",
    [(4, 2, 7, 16, 16, 2), (3, 1, 1, 16, 16, 1), (2, 2, 19, 20, 12, 1), (2, 1, 33, 80, 80, 2), (1, 1, 5, 8, 2, 2)],
)
def test_rotation_and_gradients(heads, kv_heads, length, dim, size, rows, sinks):
    """To rounding in float32: nothing is summed up but two gradients of q."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    # As projections leave them, heads within tokens.
    leaves = [random(2, length, n, dim).requires_grad_() for n in (heads, kv_heads)]
    # As the model's hook leaves angles, those of sinks behind.
    cos, sin = (random(rows, length, 2 * size) for _ in range(2))
    (cos, sink_cos), (sin, sink_sin) = (x.chunk(2, dim=-1) for x in (cos, sin))

    def turned(x, other, *angles):
        found = rotate_halves(x[..., :size], other[..., :size], *angles)
        return [torch.cat([new, old[..., size:]], dim=-1) for new, old in zip(found, (x, other), strict=True)]

    def outputs(fused):
        q, k = (x.transpose(1, 2) for x in leaves)
        if fused:
            assert rotate.takes(q, k, cos, sin)
            return [x for x in rotate.rotate(q, k, cos, sin, *((sink_cos, sink_sin) if sinks else ())) if x is not None]
        sink_q = [turned(q, k, sink_cos, sink_sin)[0]] if sinks else []
        return [*turned(q, k, cos, sin), *sink_q]

    expected, found = outputs(False), outputs(True)
    weights = [random(*x.shape) for x in expected]
    gradients = [torch.autograd.grad(out, leaves, weights) for out in (expected, found)]
    for x, y in zip((*expected, *gradients[0]), (*found, *gradients[1]), strict=True):
        torch.testing.assert_close(y, x)
