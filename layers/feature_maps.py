"""Feature maps phi: [B, H, T, D] -> [B, H, T, F], one set of weights per head where the map is learned.

Queries and keys have a map each (`heads` is H for queries, H_kv for keys, so the state is per KV head, unless
`config.key_maps` says otherwise); maps with random projections draw the same projection for both, from a fixed seed,
since phi(q).phi(k) needs it.
"""

import math

import torch
from torch import nn


class FeatureMap(nn.Module):
    """Base of all maps: `F` is given by `dim`, of which each map states a default.

    Raises:
        ValueError: when `dim` is not a size the map can produce.
    """

    def __init__(self, heads: int, head_dim: int, dim: int | None, expansion: int = 1):
        super().__init__()
        self.dim = expansion * self.default_dim(head_dim) if dim is None else dim
        if not self.can_produce(head_dim):
            raise ValueError(
                f"feature_dim: {type(self).__name__} of heads of {head_dim} cannot have {self.dim} features; "
                f"leave feature_dim and feature_expansion out for {self.default_dim(head_dim)}"
            )
        self.build(heads, head_dim)

    def default_dim(self, head_dim: int) -> int:
        return head_dim

    def can_produce(self, head_dim: int) -> bool:
        """Whether `self.dim` is a size this map can have; most maps have just one."""
        return self.dim == self.default_dim(head_dim)

    def build(self, heads: int, head_dim: int) -> None:
        """Create weights and buffers."""


class Identity(FeatureMap):
    def forward(self, x):
        return x


class L2(FeatureMap):
    """Unit vectors (Linearized-LLM's released q and k)."""

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1)


class ReLU(FeatureMap):
    def forward(self, x):
        return x.relu()


class EluPlusOne(FeatureMap):
    """Katharopoulos et al. 2020, eq. 7."""

    def forward(self, x):
        return nn.functional.elu(x) + 1


class Exp(FeatureMap):
    """exp(x / D^(1/4)) per dimension; the scale splits softmax's 1/sqrt(D) between q and k."""

    def forward(self, x):
        return (x * x.shape[-1] ** -0.25).exp()


def rotations(head_dim: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` uniformly random orthogonal matrices [D, D], each with the norms [D] of its Gaussian's columns; the
    same ones on every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(count):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        # LAPACK picks the signs of q; with those of r's diagonal the directions are uniform.
        drawn.append((q * r.diagonal().sign(), gaussian.norm(dim=0)))
    return drawn


class Projected(FeatureMap):
    """Maps of x W, W in R^{D x columns} per head, started as the identity on the first dimensions (LoLCATs).

    Columns beyond D start as random rotations, the same in every map: columns of zeros would be alike, get the same
    gradients, and stay alike.
    """

    def can_produce(self, head_dim):
        return True

    def columns(self) -> int:
        return self.dim

    def build(self, heads, head_dim):
        start = torch.eye(head_dim, self.columns())
        for i, (rotation, _) in enumerate(rotations(head_dim, (self.columns() - 1) // head_dim), start=1):
            block = start[:, i * head_dim : (i + 1) * head_dim]
            block.copy_(rotation[:, : block.shape[1]])
        self.weight = nn.Parameter(start.repeat(heads, 1, 1))

    def project(self, x):
        return x @ self.weight.to(x.dtype)


class Linear(Projected):
    """xW, for the delta rule, which stores whatever is not collinear apart."""

    def forward(self, x):
        return self.project(x)


class Hedgehog(Projected):
    """softmax(xW) ++ softmax(-xW), floored at 1e-12 (Zhang et al. 2024, eq. 6, and LoLCATs)."""

    def can_produce(self, head_dim):
        return self.dim % 2 == 0 and self.dim > 2  # a softmax of one number is 1

    def columns(self):
        return self.dim // 2

    def forward(self, x):
        x = self.project(x)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=1e-12)


class T2R(Projected):
    """relu(xW + b) (Kasai et al. 2021)."""

    def build(self, heads, head_dim):
        super().build(heads, head_dim)
        self.bias = nn.Parameter(torch.zeros(heads, 1, self.columns()))

    def forward(self, x):
        return (self.project(x) + self.bias.to(x.dtype)).relu()


class Taylor(Projected):
    """1 ++ y ++ y (x) y / sqrt 2 of y = xW / r^(1/4): exp's second-order expansion (Based, Arora et al. 2024)."""

    def default_dim(self, head_dim):
        rank = min(16, head_dim)
        return 1 + rank + rank * rank

    def columns(self):
        return math.isqrt(self.dim)

    def can_produce(self, head_dim):
        rank = self.columns()
        return self.dim == 1 + rank + rank * rank

    def forward(self, x):
        y = self.project(x) * self.columns() ** -0.25
        outer = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(y[..., :1]), y, outer], dim=-1)


class RandomProjection(FeatureMap):
    """Maps of x W with one fixed Gaussian W, orthogonal in blocks of D, for all heads."""

    def can_produce(self, head_dim):
        return True

    def columns(self) -> int:
        return self.dim

    def build(self, heads, head_dim):
        blocks = rotations(head_dim, -(-self.columns() // head_dim))
        weight = torch.cat([rotation * norms for rotation, norms in blocks], dim=1)
        self.register_buffer("weight", weight[:, : self.columns()].contiguous())


class FavorPlus(RandomProjection):
    """exp(w^T x - |x|^2 / 2) / sqrt(m) with x / D^(1/4) (Performer, Choromanski et al. 2021, eq. 5)."""

    def forward(self, x):
        x = x * x.shape[-1] ** -0.25
        return (x @ self.weight.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(self.dim)


class RFA(RandomProjection):
    """[sin w^T x, cos w^T x] / sqrt(F / 2) of unit x (Peng et al. 2021)."""

    def can_produce(self, head_dim):
        return self.dim % 2 == 0

    def columns(self):
        return self.dim // 2

    def forward(self, x):
        x = nn.functional.normalize(x, dim=-1) @ self.weight.to(x.dtype)
        return torch.cat([x.sin(), x.cos()], dim=-1) / math.sqrt(self.columns())


class Cosine(FeatureMap):
    """1 ++ x / |x|, so that phi(q).phi(k) = 1 + cos(q, k) >= 0."""

    def default_dim(self, head_dim):
        return head_dim + 1

    def forward(self, x):
        return torch.cat([torch.ones_like(x[..., :1]), nn.functional.normalize(x, dim=-1)], dim=-1)


class DPFP(FeatureMap):
    """r * roll(r, j) for j = 1..nu, r = relu(x ++ -x) (Schlag et al. 2021, eq. 37); F = 2 D nu."""

    def default_dim(self, head_dim):
        return 2 * head_dim

    def can_produce(self, head_dim):
        return self.dim % (2 * head_dim) == 0

    def forward(self, x):
        r = torch.cat([x, -x], dim=-1).relu()
        return torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.dim // r.shape[-1] + 1)], dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": Identity,
    "l2": L2,
    "linear": Linear,
    "relu": ReLU,
    "elu1": EluPlusOne,
    "exp": Exp,
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "favor": FavorPlus,
    "rfa": RFA,
    "cosine": Cosine,
    "taylor": Taylor,
    "dpfp": DPFP,
}
