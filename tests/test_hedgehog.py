"""Fused features equal the map's, on a GPU or in Triton's interpreter."""

import pytest
import torch

from linearize.layers.feature_maps import Hedgehog
from linearize.layers.kernels import Features
from linearize.layers.kernels.fused.features import hedgehog

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# RMS of the error over that of what is expected: sums of some dozen products in single precision, and what the rounding
# of features and of their gradients adds up to.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CASES = [(*case, torch.float32) for case in ((16, 32, True, True), (16, 24, False, False), (20, 12, True, False))]
if DEVICE == "cuda":
    # What products take on a GPU; larger ones are not computed in single precision.
    CASES += [(64, 128, True, True, torch.bfloat16), (128, 256, True, True, torch.bfloat16)]


@pytest.mark.parametrize(("dim", "features", "unit", "weighted", "dtype"), CASES)
def test_features_and_gradients(dim, features, unit, weighted, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).double()

    reference = Hedgehog(3, dim, features, 1).to(DEVICE, torch.float64)
    weight = reference.weight.detach() + normal(3, dim, features // 2) * 0.3
    leaves = [normal(2, 3, 45, dim), weight.to(dtype).double(), normal(2, 3, 45, 1) + 3 if weighted else None]
    exact = [None if x is None else x.requires_grad_() for x in leaves]
    del reference.weight
    reference.weight = exact[1]
    expected = Features(exact[0], reference, unit, exact[2]).phi
    # Weights of maps are fp32, whatever they are applied to.
    inputs = [
        None if x is None else x.detach().to(kind).requires_grad_()
        for x, kind in zip(exact, (dtype, torch.float32, dtype), strict=True)
    ]
    actual = hedgehog(*inputs, unit)
    weights = normal(*expected.shape)

    def results(out, leaves):
        leaves = [x for x in leaves if x is not None]
        return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]

    for x, y in zip(results(actual, inputs), results(expected, exact), strict=True):
        assert (x - y).norm() <= TOLERANCE[dtype] * y.norm()
