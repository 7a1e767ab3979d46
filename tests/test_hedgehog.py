"""Fused features equal the map's, on a GPU or in Triton's interpreter."""

import pytest
import torch

from linearize.layers.feature_maps import Hedgehog
from linearize.layers.kernels import Features
from linearize.layers.kernels.fused.features import hedgehog

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("dim", "features", "unit", "weighted"),
    [(16, 32, True, True), (16, 24, False, False), (20, 12, True, False)]
    + ([(128, 256, True, True), (64, 128, True, True)] if DEVICE == "cuda" else []),
)
def test_features_and_gradients(dim, features, unit, weighted):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    map = Hedgehog(3, dim, features, 1).to(DEVICE)
    map.weight.data += normal(*map.weight.shape).float() * 0.3
    leaves = [normal(2, 3, 45, dim), map.weight.detach().double(), normal(2, 3, 45, 1).exp() if weighted else None]
    exact = [None if x is None else x.requires_grad_() for x in leaves]
    reference = Hedgehog(3, dim, features, 1).to(DEVICE, torch.float64)
    del reference.weight
    reference.weight = exact[1]
    expected = Features(exact[0], reference, unit, exact[2]).phi
    inputs = [None if x is None else x.detach().float().requires_grad_() for x in exact]
    actual = hedgehog(*inputs, unit)
    weights = normal(*expected.shape)

    def results(out, leaves):
        leaves = [x for x in leaves if x is not None]
        return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]

    for x, y in zip(results(actual, inputs), results(expected, exact), strict=True):
        # Sums of some dozen products in single precision.
        assert (x - y).norm() <= 1e-5 * y.norm()
