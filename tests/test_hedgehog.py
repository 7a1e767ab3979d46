"""Fused features, weights of queries and gates of keys equal those of the layer's modules, on a GPU or in Triton's
interpreter."""

from copy import deepcopy

import pytest
import torch

from linearize.layers.feature_maps import Hedgehog
from linearize.layers.gates import TokenGates
from linearize.layers.kernels import Features
from linearize.layers.kernels.fused.features import hedgehog

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# RMS of the error over that of what is expected: sums of some dozen products in single precision, and what the rounding
# of features and of their gradients adds up to.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SIZES = [(16, 32, torch.float32), (20, 12, torch.float32)]
if DEVICE == "cuda":
    # What products take on a GPU; larger ones are not computed in single precision.
    SIZES += [(64, 128, torch.bfloat16), (128, 256, torch.bfloat16)]


@pytest.mark.parametrize(("dim", "features", "dtype"), SIZES)
@pytest.mark.parametrize("whose", ["queries", "weighted queries", "fading keys", "keys of the delta rule"])
def test_results_and_gradients(whose, dim, features, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    heads, unit = 3, whose != "fading keys"
    map = Hedgehog(heads, dim, features, 1).to(DEVICE)
    map.weight.data = (map.weight + normal(*map.weight.shape) * 0.3).to(dtype).float()
    gates = lam_query = None
    if whose == "weighted queries":
        lam_query = (normal(heads, dim, 1) * 0.3).float().requires_grad_()
    elif "keys" in whose:
        gates = TokenGates("decay" if whose == "fading keys" else "delta", heads, dim).to(DEVICE)
        for parameter in gates.parameters():
            parameter.data += normal(*parameter.shape).float()
    x = normal(2, heads, 45, dim).requires_grad_()
    exact = [None if y is None else deepcopy(y).double() for y in (x.detach(), map, lam_query, gates)]
    exact[0].requires_grad_()
    if lam_query is not None:
        exact[2] = exact[2].detach().requires_grad_()
    expected = Features(exact[0], exact[1], unit, 0.3, exact[2], exact[3])

    def results(x, map, lam_query, gates, phi, made):
        outputs = [phi] if made is None else [y for y in (phi, made.log_decay, made.beta) if y is not None]
        modules = [module for module in (map, gates) if module is not None]
        leaves = [x, *([] if lam_query is None else [lam_query]), *(p for m in modules for p in m.parameters())]
        generator.manual_seed(1)
        loss = sum((y * normal(*y.shape).to(y.dtype)).sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    found = results(x, map, lam_query, gates, *hedgehog(x, map, unit, 0.3, lam_query, gates))
    wanted = results(*exact, expected.phi, expected.gates)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm(), number
