"""The delta rule in Triton equals torch's, on a GPU or in Triton's interpreter."""

import pytest
import torch

from linearize.layers.kernels.fused.delta_scan import delta_scan, solve_unit_lower
from linearize.layers.kernels.memory import walk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of some hundred products, in single precision or (which the interpreter does not know) with factors of 10 bits.
PRECISIONS = [("highest", 1e-5)] + ([("high", 5e-3)] if torch.cuda.is_available() else [])
SIZES = [(1, 1, 16, 16, 7), (2, 3, 32, 16, 33)]
if DEVICE == "cuda":
    # What must fit into shared memory; minutes in the interpreter.
    SIZES += [(2, 16, 64, features, 65) for features in (64, 128, 256)]


@pytest.fixture(params=PRECISIONS)
def tolerance(request):
    """Of a kernel's results at the precision of products that is set meanwhile."""
    before = torch.get_float32_matmul_precision()
    precision, tolerance = request.param
    torch.set_float32_matmul_precision(precision)
    yield tolerance
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("batch", "chunks", "size", "features", "columns"), SIZES)
def test_walk_and_gradients(batch, chunks, size, features, columns, tolerance):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    heads = 2
    u0 = normal(batch, chunks, heads, size, columns)
    W, K = (normal(batch, chunks, heads, size, features) for _ in range(2))
    total = torch.rand(batch, chunks, heads, generator=generator).to(DEVICE).requires_grad_()
    start = normal(batch, heads, features, columns)
    carries = torch.ones(batch, chunks, dtype=torch.bool, device=DEVICE)
    carries[-1, chunks // 2] = chunks == 1  # a document ends in the middle
    inputs = (u0, W, K, total, start)
    # Products of random matrices grow from chunk to chunk; keep them below 1.
    scaled = (u0, W * 0.3 / features**0.5, K * 0.3 / features**0.5, total, start)

    def gradients_of(outputs):
        weighted = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(weighted, inputs, retain_graph=True)

    expected = walk(*(x.double() for x in scaled), carries)
    weights = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in expected]
    actual = delta_scan(*scaled, carries)
    for x, y in zip((*actual, *gradients_of(actual)), (*expected, *gradients_of(expected)), strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("size", [16, 32] if DEVICE == "cpu" else [16, 32, 64])
def test_solve_and_gradients(size):
    """Keys that are all alike are the worst case: the inverse stays small, the powers of A do not."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(2, 3, size, 5, generator=generator).to(DEVICE).requires_grad_()
    weights = torch.randn(2, 3, size, 5, generator=generator).to(DEVICE)
    random = torch.randn(2, 3, size, size, generator=generator) * 0.3
    for A in (random.to(DEVICE).requires_grad_(), torch.ones_like(random).to(DEVICE).requires_grad_()):
        expected = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
        actual = solve_unit_lower(A, right)
        # Single precision; products of up to 64 factors.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad((solved * weights).sum(), (A, right)) for solved in (actual, expected))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
