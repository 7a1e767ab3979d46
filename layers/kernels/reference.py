"""The oracle: augmented linear attention of explicit queries over explicit keys, quadratic, in plain PyTorch.

    a_ij = exp(scale q_i.k_j - m_i)   over near visible keys, m_i their maximum
    b_ij = phi_q(q_i).phi_k(k_j)      over far visible keys, and over what the state S, z holds
    c_i  = sum_l w[l] v_{i-l}         over visible keys at distance l < K
    shared:  o = (g sum a v + lam sum b v) / (g sum a + lam sum b) + c
    sum:     o = g sum a v / sum a + lam sum b v / norm + c

What is visible is the caller's business, so one function serves full sequences, packed documents, decoding with
carried state, draft trees, and each tile of the chunked backend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LinearAttentionConfig
from ..tokens import near

EPS = 1e-6


@dataclass
class Weights:
    """The learned scalars of a layer, as the formulas above use them; H query heads.

    Attributes:
        near: g [H].
        far: lam (or alpha) [H].
        conv: w [H, K], or None.
    """

    near: Tensor
    far: Tensor
    conv: Tensor | None


@dataclass
class State:
    """What a layer remembers of tokens that it no longer holds: S [N, H_kv, F, D] and z [N, H_kv, F], fp32."""

    S: Tensor
    z: Tensor


def conv_band(weight: Tensor, distance: Tensor) -> Tensor:
    """[.., H, Q, K] the convolution as a matrix: w_h[distance] where 0 <= distance < taps, else 0.

    Args:
        weight: [H, taps]; distance: [.., Q, K] integers.
    """
    taps = weight.shape[1]
    inside = (distance >= 0) & (distance < taps)
    return (weight[:, distance.clamp(0, taps - 1)] * inside).movedim(0, -3)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    q_position: Tensor,
    k_position: Tensor,
    visible: Tensor,
    state: State | None,
    config: LinearAttentionConfig,
    weights: Weights,
    scale: float,
    band: Tensor | None = None,
    recalls: Tensor | None = None,
) -> Tensor:
    """Outputs [N, H, Q, D_v] in fp32 (fp64 for fp64 inputs).

    Args:
        q: [N, H, Q, D]; k: [N, H_kv, K, D]; v: [N, H_kv, K, D_v].
        phi_q: [N, H, Q, F]; phi_k: [N, H_kv, K, F]; None without far branch.
        q_position, k_position: [N, Q], [N, K] positions within the document.
        visible: [N, Q, K], whether query q may look at key k at all.
        state: sums over further keys, far to every query (to those in `recalls` [N, Q], where given).
        band: [N or 1, H, Q, K], the convolution matrix, where the caller has it already.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]

    def per_kv_head(x):  # (N, H, Q, ..) -> (N, H_kv, groups, Q, ..)
        return x.unflatten(1, (kv_heads, groups))

    def contract(x, y):  # (N, H_kv, groups, Q, X) x (N, H_kv, X, Y) -> (N, H_kv, groups, Q, Y)
        return (x.flatten(2, 3) @ y).unflatten(2, (groups, -1))

    q, k, v = per_kv_head(q.to(dtype)), k.to(dtype), v.to(dtype)
    is_near = near(config, q_position, k_position) & visible
    is_far = (visible & ~is_near)[:, None, None]
    g = weights.near.to(dtype).view(kv_heads, groups, 1, 1)
    lam = weights.far.to(dtype).view(kv_heads, groups, 1, 1)

    scores = contract(q, k.mT * scale).masked_fill(~is_near[:, None, None], -torch.inf)
    m = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    a = (scores - m).exp()

    far_out = None
    if phi_q is not None:
        phi_q, phi_k = per_kv_head(phi_q.to(dtype)), phi_k.to(dtype)
        b = contract(phi_q, phi_k.mT) * is_far
        b_sum = b.sum(-1, keepdim=True)
        far_out = 0.0
        if state is not None:
            recalling = phi_q if recalls is None else phi_q * recalls[:, None, None, :, None]
            far_out = contract(recalling, state.S)
            b_sum = b_sum + contract(recalling, state.z.unsqueeze(-1))

    if config.combine == "shared":
        mix = g * a
        denominator = mix.sum(-1, keepdim=True)
        if far_out is not None:
            mix = mix + lam * b
            denominator = denominator + lam * b_sum
        denominator = _nonzero(denominator)
        mix = mix / denominator
        if far_out is not None:
            far_out = lam * far_out / denominator
    else:
        mix = g * a / _nonzero(a.sum(-1, keepdim=True))
        if far_out is not None and config.norm == "rms":
            far_out = lam * _rms_norm(far_out + contract(b, v))
        elif far_out is not None:
            if config.norm == "sum":
                norm = _nonzero(b_sum)
            elif config.norm == "count":
                # Positions are contiguous, so what is visible and not near is far, in hand or in the state.
                count = q_position + 1 - is_near.sum(-1)
                norm = count.clamp(min=1)[:, None, None, :, None]
            else:
                norm = 1.0
            mix = mix + lam * b / norm
            far_out = lam * far_out / norm

    if weights.conv is not None:
        if band is None:
            band = conv_band(weights.conv.to(dtype), q_position.unsqueeze(-1) - k_position.unsqueeze(-2))
        mix = mix + per_kv_head(band * visible[:, None])
    out = contract(mix, v)
    if far_out is not None:
        out = out + far_out
    return out.flatten(1, 2)


def _nonzero(denominator: Tensor) -> Tensor:
    """Padding and first tokens have nothing to divide by: 0 / 0 is 0 here."""
    return torch.where(denominator.abs() < EPS**2, EPS**2, denominator)


def _rms_norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
