"""Feature maps: shapes, published forms, and the kernels that they stand for."""

from math import sqrt

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.feature_maps import FEATURE_MAPS

from .layers import DIM, HEADS, KV_HEADS, NONNEGATIVE

pytestmark = pytest.mark.usefixtures("without_gradients")


def feature_map(name, dim=None, head_dim=DIM, heads=1, seed=0):
    phi = FEATURE_MAPS[name](heads, head_dim, dim).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in phi.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return phi


def vectors(count=5, dim=DIM, size=1.0, seed=0):
    return size * torch.randn(1, 1, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SIZES = [(name, None) for name in FEATURE_MAPS] + [
    ("hedgehog", 6),
    ("t2r", 5),
    ("favor", 9),
    ("rfa", 10),
    ("taylor", 7),
    ("dpfp", 24),
]
DEFAULT_SIZES = {"cosine": DIM + 1, "taylor": 1 + DIM + DIM**2, "dpfp": 2 * DIM}


@pytest.mark.parametrize(("name", "dim"), SIZES)
@torch.enable_grad()
def test_feature_map_shapes_and_gradients(name, dim):
    phi = feature_map(name, dim, heads=3)
    assert phi.dim == (dim or DEFAULT_SIZES.get(name, DIM))
    x = torch.stack([vectors(7, size=1), vectors(7, size=30), vectors(7, size=0)], dim=1).squeeze(2).requires_grad_()
    out = phi(x)
    assert out.shape == (1, 3, 7, phi.dim) and out.isfinite().all()
    if name in NONNEGATIVE and name not in ("cosine", "taylor"):
        assert (out >= 0).all()
    out.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in (x.grad, *(p.grad for p in phi.parameters())))
    assert x.grad.any()


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_nonnegative_maps_have_a_sum_to_divide_by(name):
    phi = feature_map(name)
    assert (phi(vectors(50)) @ phi(vectors(50, seed=1)).mT >= 0).all()


@pytest.mark.parametrize(
    ("name", "dim"),
    [("identity", 5), ("l2", 3), ("relu", 5), ("elu1", 8), ("exp", 5), ("hedgehog", 5), ("hedgehog", 2), ("rfa", 7)]
    + [("cosine", 4), ("taylor", 8), ("dpfp", 9)],
)
def test_impossible_size_is_told(name, dim):
    with pytest.raises(ValueError, match=f"feature_dim.* {dim} features"):
        FEATURE_MAPS[name](2, DIM, dim)
    with pytest.raises(ValueError, match="feature_dim"):
        LinearAttention(LinearAttentionConfig(feature_map=name, feature_dim=dim), HEADS, KV_HEADS, DIM)


def test_maps_as_published():
    x = vectors()
    weight = {name: feature_map(name, seed=3) for name in ("hedgehog", "t2r")}
    hedgehog, t2r = weight["hedgehog"], weight["t2r"]
    r = torch.cat([x, -x], dim=-1).clamp(min=0)
    expected = {
        "identity": x,
        "l2": x / x.norm(dim=-1, keepdim=True),
        "relu": x.clamp(min=0),
        "elu1": torch.where(x > 0, x + 1, x.exp()),
        "exp": (x / sqrt(sqrt(DIM))).exp(),
        "dpfp": torch.stack([r[..., i] * r[..., i - 1] for i in range(2 * DIM)], dim=-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(feature_map(name)(x), value)
    y = x @ hedgehog.weight[0]
    exps = torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(hedgehog(x), exps)
    torch.testing.assert_close(t2r(x), (x @ t2r.weight[0] + t2r.bias[0]).clamp(min=0))


def test_cosine_kernel():
    phi, q, k = feature_map("cosine"), vectors(6), vectors(6, seed=1)
    cos = torch.nn.functional.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1)
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + cos)


@pytest.mark.parametrize("dim", [None, 7])
def test_taylor_kernel(dim):
    phi, q, k = feature_map("taylor", dim), vectors(6), vectors(6, seed=1)
    rank = phi.weight.shape[-1]
    s = (q @ phi.weight) @ (k @ phi.weight).mT / sqrt(rank)
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + s + s**2 / 2)


def test_favor_approximates_softmax_kernel():
    phi = feature_map("favor", 4096)
    q, k = vectors(12, size=0.4), vectors(12, size=0.4, seed=1)
    torch.testing.assert_close(phi(q) @ phi(k).mT, (q @ k.mT / sqrt(DIM)).exp(), rtol=0.15, atol=0)


def test_rfa_approximates_gaussian_kernel():
    phi = feature_map("rfa", 4096)
    q, k = vectors(12), vectors(12, seed=1)
    unit = torch.nn.functional.normalize
    gaussian = (-torch.cdist(unit(q, dim=-1), unit(k, dim=-1)).square() / 2).exp()
    torch.testing.assert_close(phi(q) @ phi(k).mT, gaussian, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["favor", "rfa"])
def test_random_maps_of_queries_and_keys_agree(name):
    """Drawn apart, in processes apart: phi(q).phi(k) needs one projection, which checkpoints may not carry."""
    torch.manual_seed(1)
    first = FEATURE_MAPS[name](4, DIM, 8)
    torch.manual_seed(2)
    assert torch.equal(first.weight, FEATURE_MAPS[name](2, DIM, 8).weight)
    many = FEATURE_MAPS[name](1, DIM, 4096).weight
    # Rows of a standard normal matrix, whatever the sign or the axis.
    assert many.mean(1).abs().max() < 0.1 and (many.var(1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("name", ["hedgehog", "t2r", "linear"])
def test_no_two_columns_of_a_wide_map_start_alike(name):
    """Those that do get the same gradients and stay alike, so the map is no wider than without them."""
    weight = FEATURE_MAPS[name](1, DIM, 6 * DIM).weight[0]
    columns = weight.shape[1]
    assert torch.equal(weight[:, :DIM], torch.eye(DIM))
    assert columns > 2 * DIM and torch.linalg.matrix_rank(weight) == DIM
    assert (torch.cdist(weight.T, weight.T) + torch.eye(columns) > 1e-2).all()
    torch.testing.assert_close(weight[:, DIM : 2 * DIM].T @ weight[:, DIM : 2 * DIM], torch.eye(DIM))
