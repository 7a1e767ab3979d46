"""One decoding step of a layer with an additive state in one launch: attention, what leaves the ring, what enters it.

A program has one key head of one row: it reads the state, the ring, and the queries of the head's group, adds the
token that leaves the ring to the state, and writes the new token in its slot. Nothing depends on how long the context
is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive import DTYPES, MAPS
from .tiles import LOG2E, LOWEST, features_of, near_keys, nonzero, projection


@triton.jit
def _step(
    q, k, v, out, ring_k, ring_v, S, z, length, count, W_q, b_q, W_k, b_k, near_weight, far_weight, conv, scale,
    H, R,
    GROUPS: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, TAPS: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, MAP: tl.constexpr, SHARED: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = H // GROUPS
    batch, kv_h = row // heads, row % heads
    new = tl.load(length + batch)
    held = tl.load(count + batch)
    group = tl.arange(0, BG)
    h = kv_h * GROUPS + group
    asks = group < GROUPS
    column_d, column_v, feature = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BF)
    at_q = (batch * H + h)[:, None] * D + column_d[None, :]
    qs = tl.load(q + at_q, mask=asks[:, None] & (column_d < D)[None, :], other=0.0).to(tl.float32)
    own_k = tl.load(k + row * D + column_d, mask=column_d < D, other=0.0).to(tl.float32)
    own_v = tl.load(v + row * V + column_v, mask=column_v < V, other=0.0).to(tl.float32)
    g = tl.load(near_weight + h, mask=asks, other=1.0)
    lam = tl.load(far_weight + h, mask=asks, other=0.0)

    # phi of queries, each head of the group by its own map.
    phi_q = tl.zeros([BG, BF], tl.float32)
    for i in range(GROUPS):
        weight, bias = projection(W_q, b_q, kv_h * GROUPS + i, MAP, D, BD, Y, BY)
        phi_q = tl.where((group == i)[:, None], features_of(qs, weight, bias, MAP, F, BF, BG, P), phi_q)
    weight, bias = projection(W_k, b_k, kv_h, MAP, D, BD, Y, BY)

    # What the state holds; features are stored one half after the other, here they take turns.
    at = feature
    if HALVES:
        at = feature // 2 + (feature % 2) * (F // 2)
    at_S = (row * F + at)[:, None] * V + column_v[None, :]
    inside = (feature < F)[:, None] & (column_v < V)[None, :]
    state = tl.load(S + at_S, mask=inside, other=0.0)
    mass = tl.load(z + row * F + at, mask=feature < F, other=0.0)
    far_o = tl.dot(phi_q, state, input_precision=P)
    far_sum = tl.sum(phi_q * mass[None, :], axis=1)

    # The ring.
    m = tl.full([BG], LOWEST, tl.float32)
    near_sum = tl.zeros([BG], tl.float32)
    near_o = tl.zeros([BG, BV], tl.float32)
    conv_o = tl.zeros([BG, BV], tl.float32)
    for first in range(0, R, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        # The latest position before the new one that has this slot.
        position = new - 1 - (new - 1 - slot + R) % R
        here = (slot < R) & (position >= new - held) & (position >= 0)
        ks = tl.load(ring_k + (row * R + slot)[:, None] * D + column_d[None, :],
                     mask=here[:, None] & (column_d < D)[None, :], other=0.0).to(tl.float32)  # fmt: skip
        vs = tl.load(ring_v + (row * R + slot)[:, None] * V + column_v[None, :],
                     mask=here[:, None] & (column_v < V)[None, :], other=0.0).to(tl.float32)  # fmt: skip
        near = here & near_keys(new, position, W, WINDOW)
        a = tl.dot(qs, tl.trans(ks), input_precision=P) * (scale * LOG2E)
        a = tl.where(near[None, :], a, float("-inf"))
        highest = tl.maximum(m, tl.max(a, axis=1))
        a = tl.exp2(a - highest[:, None])
        shrunk = tl.exp2(m - highest)
        near_sum = near_sum * shrunk + tl.sum(a, axis=1)
        near_o = tl.dot(a, vs, near_o * shrunk[:, None], input_precision=P)
        m = highest
        b = tl.dot(phi_q, tl.trans(features_of(ks, weight, bias, MAP, F, BF, BLOCK, P)), input_precision=P)
        b = tl.where((here & ~near)[None, :], b, 0.0)
        far_o = tl.dot(b, vs, far_o, input_precision=P)
        far_sum += tl.sum(b, axis=1)
        if TAPS > 1:
            distance = new - position
            taps = tl.load(conv + h[:, None] * TAPS + distance[None, :],
                           mask=asks[:, None] & (here & (distance < TAPS))[None, :], other=0.0)  # fmt: skip
            conv_o = tl.dot(taps, vs, conv_o, input_precision=P)

    # The new token itself.
    own = own_k[None, :] + tl.zeros([BG, BD], tl.float32)
    if WINDOW == "none":
        phi = features_of(own, weight, bias, MAP, F, BF, BG, P)
        b_own = tl.sum(phi_q * phi, axis=1)
        far_o += b_own[:, None] * own_v[None, :]
        far_sum += b_own
    else:
        a_own = tl.sum(qs * own, axis=1) * (scale * LOG2E)
        highest = tl.maximum(m, a_own)
        shrunk = tl.exp2(m - highest)
        a_own = tl.exp2(a_own - highest)
        near_sum = near_sum * shrunk + a_own
        near_o = near_o * shrunk[:, None] + a_own[:, None] * own_v[None, :]
    if SHARED:
        o = (g[:, None] * near_o + lam[:, None] * far_o) / nonzero(g * near_sum + lam * far_sum)[:, None]
    else:
        o = near_o * (g / nonzero(near_sum))[:, None] + far_o * (lam / nonzero(far_sum))[:, None]
    if TAPS:
        tap = tl.load(conv + h * TAPS, mask=asks, other=0.0)
        o += conv_o + tap[:, None] * own_v[None, :]
    at_o = (batch * H + h)[:, None] * V + column_v[None, :]
    tl.store(out + at_o, o.to(out.dtype.element_ty), mask=asks[:, None] & (column_v < V)[None, :])

    # The slot of the new token is that of the oldest, which leaves where the ring is full.
    slot = row * R + new % R
    tl.debug_barrier()
    if held == R:
        old_k = tl.load(ring_k + slot * D + column_d, mask=column_d < D, other=0.0).to(tl.float32)
        old_v = tl.load(ring_v + slot * V + column_v, mask=column_v < V, other=0.0).to(tl.float32)
        old = old_k[None, :] + tl.zeros([BG, BD], tl.float32)
        phi = tl.sum(features_of(old, weight, bias, MAP, F, BF, BG, P), axis=0) / BG
        # Read again: to keep it meanwhile takes too many registers.
        state = tl.load(S + at_S, mask=inside, other=0.0)
        tl.store(S + at_S, state + phi[:, None] * old_v[None, :], mask=inside)
        tl.store(z + row * F + at, mass + phi, mask=feature < F)
    tl.store(ring_k + slot * D + column_d, own_k.to(ring_k.dtype.element_ty), mask=column_d < D)
    tl.store(ring_v + slot * V + column_v, own_v.to(ring_v.dtype.element_ty), mask=column_v < V)


def refuses(layer, cache) -> str | None:
    """Why a step of `layer` on `cache` cannot be done here, or None."""
    config = layer.config
    if config.feature_map not in MAPS or config.state != "additive" or config.sinks or config.far_weight == "query":
        return f"only additive states of {', '.join(MAPS)} without sinks and without weights by query"
    if config.combine == "sum" and config.norm != "sum":
        return f"norm {config.norm} is not sum"
    if "raw" in cache.ring:
        return "features are not of k after the rotary embedding"
    if torch.is_grad_enabled():
        return "the cache is written in place, which gradients do not survive"
    if cache.ring["v"].dtype not in DTYPES or cache.state.S.dtype != torch.float32:
        return f"they do not compute in {cache.ring['v'].dtype}"
    return None


def step(layer, cache, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The layer's outputs [B, H, 1, D_v] for one new token in every row, which `cache` holds afterwards."""
    batch, heads, _, dim = q.shape
    kv_heads, value_dim, features = k.shape[1], v.shape[3], layer.features
    config, weights = layer.config, layer.weights(q.device)
    out = q.new_empty(batch, heads, 1, value_dim, dtype=v.dtype)
    halves = config.feature_map == "hedgehog"

    def block(size, least=16):
        return max(least, triton.next_power_of_2(size))

    def of(parameter):
        return None if parameter is None else parameter.float().contiguous()

    maps = [of(getattr(map, name, None)) for map in (layer.phi_q, layer.phi_k) for name in ("weight", "bias")]
    columns = features // 2 if halves else features
    block_f = max(block(features, 32), block(dim, 32) if config.feature_map == "elu1" else 0)
    _step[(batch * kv_heads,)](
        q.contiguous(), k.contiguous(), v.contiguous(), out, cache.ring["k"], cache.ring["v"], cache.state.S,
        cache.state.z, cache.length, cache.count, *maps, weights.near.float(), weights.far.float(), of(weights.conv),
        scale, heads, config.ring_size, GROUPS=heads // kv_heads, BG=block(heads // kv_heads), D=dim, BD=block(dim, 32),
        V=value_dim, BV=block(value_dim), F=features, BF=block_f, Y=columns, BY=block_f // 2 if halves else block_f,
        TAPS=0 if weights.conv is None else weights.conv.shape[1], W=config.window_size, WINDOW=config.window or "none",
        MAP=config.feature_map, SHARED=config.combine == "shared", HALVES=halves, BLOCK=32,
        P="tf32" if v.dtype == torch.bfloat16 else "ieee", num_warps=8, num_stages=1,
    )  # fmt: skip
    cache.advance()
    return out
