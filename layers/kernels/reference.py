"""The oracle: augmented linear attention of explicit queries over explicit keys, quadratic, in plain PyTorch.

    a_ij = exp(scale q_i.k_j - m_i)   over near visible keys, m_i their maximum
    b_ij = phi_q(q_i).phi_k(k_j)      over far visible keys, and over what the state S, z holds
    c_i  = sum_l w[l] v_{i-l}         over visible keys at distance l < K
    shared:  o = (g sum a v + lam sum b v) / (g sum a + lam sum b) + c
    sum:     o = g sum a v / sum a + lam sum b v / norm + c
    relu2:   o = g sum a v + lam sum b v / norm + c   with a_ij = relu(cos(q_i, k_j))^2
    laplace: the same                                 with a_ij = Laplace(scale q_i.k_j)

Where a layer looks both ways, all keys of a document are visible, and c_i sums over -K < l < K.

v far away is u of `memory`: the state's rule decides what a key leaves there. What is visible is the caller's
business, so one function serves full sequences, packed documents, decoding with carried state, draft trees, and each
tile of the chunked backend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..config import LinearAttentionConfig
from ..tokens import near
from .memory import fade

EPS = 1e-6
# Weights of near keys by their scores, which no sum of weights divides.
UNNORMALISED = {"relu2": ACT2FN["relu2"], "laplace": ACT2FN["laplace"]}


@dataclass
class Weights:
    """The learned scalars of a layer, as the formulas above use them; H query heads.

    Attributes:
        near: g [H].
        far: lam (or alpha) [H].
        conv: w [H, K], from distance 0 on, or, both ways, [H, 2 K - 1], from distance 1 - K on; or None.
    """

    near: Tensor
    far: Tensor
    conv: Tensor | None


def conv_band(weight: Tensor, distance: Tensor, first: int) -> Tensor:
    """[.., H, Q, K] the convolution as a matrix: w_h[distance - first] where there is such a tap, else 0.

    Args:
        weight: [H, taps]; distance: [.., Q, K] integers.
    """
    tap, taps = distance - first, weight.shape[1]
    inside = (tap >= 0) & (tap < taps)
    return pick(weight, tap.clamp(0, taps - 1)) * inside.unsqueeze(-3)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """[.., H, Q, K] of x [H, n] by index [.., Q, K]: x[:, index], but the gradient of that sums thousands of equal
    indices one after the other, where in a row of this hardly any are equal."""
    rows = x[:, None].expand(*index.shape[:-2], x.shape[0], index.shape[-2], x.shape[1])
    return rows.gather(-1, index.unsqueeze(-3).expand(*rows.shape[:-1], index.shape[-1]))


def at_distance(bias: Tensor, q_position: Tensor, k_position: Tensor) -> Tensor:
    """[N, H, Q, K] of bias [H, 2 R - 1], which begins with keys R - 1 before the query and ends with those R - 1
    behind it; what is further away gets what is there."""
    reach = bias.shape[1] // 2
    place = (k_position[:, None, :] - q_position[:, :, None]).clamp(-reach, reach) + reach
    return pick(bias, place)


def yoso(q: Tensor, k: Tensor) -> Tensor:
    """[N, H, Q, K] (1 - arccos(cos(q, k)) / pi)^8 (YOSO, arXiv 2111.09714, eq. 3 with tau = 8)."""
    q, k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
    # The slope of arccos has no end at 1.
    cosine = contract(q, k.mT).clamp(EPS - 1, 1 - EPS)
    return (1 - cosine.arccos() / torch.pi) ** 8


@dataclass
class Blocks:
    """What `linformer` sees in place of the keys of each block of its window.

    Attributes:
        k: [N, H_kv, R, D]; v: [N, H_kv, R, D_v], some rows for each block.
        visible: [N, Q, R], of other blocks than the query's own.
    """

    k: Tensor
    v: Tensor
    visible: Tensor


def contract(x: Tensor, y: Tensor) -> Tensor:
    """[N, H, Q, X] x [N, H_kv, X, Y] -> [N, H, Q, Y], each key head for its group of query heads."""
    groups = x.shape[1] // y.shape[1]
    return (x.unflatten(1, (-1, groups)).flatten(2, 3) @ y).unflatten(2, (groups, -1)).flatten(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    u: Tensor | None,
    G_q: Tensor | None,
    G_k: Tensor | None,
    q_position: Tensor,
    k_position: Tensor,
    visible: Tensor,
    M: Tensor | None,
    config: LinearAttentionConfig,
    weights: Weights,
    scale: float,
    recalls: Tensor | None = None,
    sink_q: Tensor | None = None,
    bias: Tensor | None = None,
    blocks: Blocks | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The near and the far branch: outputs [N, H, Q, D_v] in fp32 (fp64 for fp64 inputs).

    Args:
        q: [N, H, Q, D]; k: [N, H_kv, K, D]; v: [N, H_kv, K, D_v].
        phi_q: [N, H, Q, F]; phi_k: [N, H_kv, K, F]; u: [N, H_kv, K, D_v + 1] far values; None without far branch,
            phi_k and u also where no key in hand is far.
        G_q: [N, H_kv, Q]; G_k: [N, H_kv, K]; summed log decays since the state's time, or None where nothing fades.
        q_position, k_position: [N, Q], [N, K] positions within the document.
        visible: [N, Q, K], whether query q may look at key k at all.
        M: [N, H_kv, F, D_v + 1], what the state holds of further keys, far to every query (to those in `recalls`
            [N, Q], where given).
        sink_q: [N, H, Q, D], the queries as sinks see them, where that is not as all other keys do.
        bias: [H, 2 R - 1], added to near scores, see `at_distance`; or None.
        blocks: of `linformer`.
        counts: [N, Q], how many keys a query may look at, here or in the state; None: all up to its own position.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    v = v.to(dtype)
    is_near = near(config, q_position, k_position) & visible
    g, lam = (weight.to(dtype)[:, None, None] for weight in (weights.near, weights.far))

    q, k, sink_q = (x if x is None else x.to(dtype) for x in (q, k, sink_q))
    if config.local == "relu2":
        q, k, sink_q = (x if x is None else nn.functional.normalize(x, dim=-1) for x in (q, k, sink_q))
        scale = 1.0
    scores = contract(q * scale, k.mT)
    if sink_q is not None:
        is_sink = (k_position < config.sinks)[:, None, None]
        scores = torch.where(is_sink, contract(sink_q * scale, k.mT), scores)
    if bias is not None:
        scores = scores + at_distance(bias.to(dtype), q_position, k_position)
    scores = scores.masked_fill(~is_near[:, None], -torch.inf)
    lowest = torch.finfo(dtype).min
    if blocks is not None:
        far_scores = contract(q * scale, blocks.k.to(dtype).mT).masked_fill(~blocks.visible[:, None], -torch.inf)
        far_m = far_scores.amax(-1, keepdim=True).clamp(min=lowest)
    if config.local in UNNORMALISED:
        a = UNNORMALISED[config.local](scores)
        a_sum = torch.ones_like(a[..., :1])
    else:
        m = scores.amax(-1, keepdim=True).clamp(min=lowest)
        if blocks is not None and config.combine == "shared":
            m = far_m = torch.maximum(m, far_m)
        if config.combine == "shared":
            # g a = exp(scores - m + log g), at no cost per key.
            m = m - g.log()
        a = (scores - m).exp()
        a_sum = a.sum(-1, keepdim=True)

    b_v, b_sum = 0.0, 0.0
    if blocks is not None:
        b = (far_scores - far_m).exp()
        if config.combine == "shared":
            b = lam * b
        b_v, b_sum = contract(b, blocks.v.to(dtype)), b.sum(-1, keepdim=True)
    elif config.far == "yoso":
        b_v = contract(yoso(q, k) * (visible & ~is_near)[:, None], v)
    elif phi_q is not None:
        phi_q = phi_q.to(dtype)
        if config.combine == "shared":
            phi_q = phi_q * lam
        far = 0.0
        if phi_k is not None:
            b = contract(phi_q, phi_k.to(dtype).mT) * (visible & ~is_near)[:, None]
            if G_q is not None:
                b = b * fade(G_q, G_k).repeat_interleave(b.shape[1] // G_q.shape[1], dim=1)
            far = contract(b, u)
        if M is not None:
            recalling = phi_q if recalls is None else phi_q * recalls[:, None, :, None]
            if G_q is not None:
                recalling = recalling * G_q.exp().repeat_interleave(phi_q.shape[1] // G_q.shape[1], dim=1).unsqueeze(-1)
            far = far + contract(recalling, M)
        b_v, b_sum = far[..., :-1], far[..., -1:]

    if config.combine == "shared":
        if config.state == "delta" and phi_q is not None:
            b_sum = b_sum.clamp(min=0)  # what the rule corrects may overshoot; a denominator must not
        return (contract(a, v) + b_v) / _nonzero(a_sum + b_sum)
    out = g * contract(a, v) / _nonzero(a_sum)
    if not config.has_far:
        return out
    # Positions are contiguous, so what is visible and not near is far, in hand or in the state.
    count = None
    if config.norm == "count":
        count = (q_position + 1 if counts is None else counts) - is_near.sum(-1)
    return out + lam * normalised(b_v, b_sum, count, config.norm)


def normalised(b_v: Tensor, b_sum: Tensor, count: Tensor | None, norm: str) -> Tensor:
    """[N, H, Q, D_v] sums b_v of far values by their weights, divided as `norm` says.

    Args:
        b_sum: [N, H, Q, 1], of the weights alone.
        count: [N, Q], far keys; for `norm: count`.
    """
    if norm == "l2":
        return nn.functional.normalize(b_v, dim=-1, eps=EPS)
    if norm == "rms":
        return b_v * (b_v.square().mean(-1, keepdim=True) + EPS).rsqrt()
    if norm == "sum":
        return b_v / _nonzero(b_sum)
    if norm == "count":
        return b_v / count.clamp(min=1)[:, None, :, None]
    return b_v


def _nonzero(denominator: Tensor) -> Tensor:
    """Padding and first tokens have nothing to divide by: 0 / 0 is 0 here."""
    return torch.where(denominator.abs() < EPS**2, EPS**2, denominator)
