"""`reference.attend` of one denominator, fused: a tile of queries over its keys, for any state's rule.

A program takes up to 32 queries of one head through all keys in hand, near ones by softmax with a running maximum m,
far ones by features, and what the state holds comes as `recalled`:

    o = (g sum a v + lam (sum b u + recalled)) / D        D = g sum a + lam max(0, sum b u_mass + recalled_mass)

Backward is one pass per head for queries and one per key head for keys; scores are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...config import LinearAttentionConfig
from ...tokens import near
from ..reference import Weights, contract
from .tiles import LOG2E, LOWEST, nonzero

# `modes`, what a key is to a query: 0 not visible, 1 near, 2 far.
# Queries and keys of a step: larger ones do not fit the registers, at heads of 128 not even shared memory.
BLOCK = 32


@triton.jit
def _load(x, row, width, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, rows):
    """[ROWS, BLOCK] in fp32 of x [rows, width], from `row` on; COLUMNS of them count."""
    i, j = row + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return tl.load(x + i * width + j, mask=(i < rows) & (j < COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _load_row(x, row, ROWS: tl.constexpr, rows):
    i = row + tl.arange(0, ROWS)
    return tl.load(x + i, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def _scores(qs, sink_qs, ks, is_sink, modes, scale, SINKS: tl.constexpr, P: tl.constexpr):
    """log2 of a's exponent, before the maximum is taken off; -inf where a key is not near."""
    s = tl.dot(qs, tl.trans(ks), input_precision=P)
    if SINKS:
        s = tl.where(is_sink[None, :], tl.dot(sink_qs, tl.trans(ks), input_precision=P), s)
    return tl.where(modes == 1, s * (scale * LOG2E), float("-inf"))


@triton.jit
def _far_weights(phi_qs, phi_ks, G_qs, G_ks, modes, FADES: tl.constexpr, P: tl.constexpr):
    """b, and what it faded by."""
    b = tl.dot(phi_qs, tl.trans(phi_ks), input_precision=P)
    faded = 1.0
    if FADES:
        faded = tl.exp2(tl.minimum(G_qs[:, None] - G_ks[None, :], 0.0) * LOG2E)
        b = b * faded
    return tl.where(modes == 2, b, 0.0), faded


@triton.jit
def _far_keys(
    phi_k, u, G_k, kv, j, K, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    FADES: tl.constexpr,
):  # fmt: skip
    """phi_k, u's values and mass, and G (where anything fades) of BK keys from j on."""
    at = j + tl.arange(0, BK)
    phi_ks = _load(phi_k + kv * K * F, j, F, F, BF, BK, K)
    us = _load(u + kv * K * (V + 1), j, V + 1, V, BV, BK, K)
    mass = tl.load(u + (kv * K + at) * (V + 1) + V, mask=at < K, other=0.0)
    G_ks = mass
    if FADES:
        G_ks = _load_row(G_k + kv * K, j, BK, K)
    return phi_ks, us, mass, G_ks


@triton.jit
def _tile_modes(modes, i, j, Q, K, BQ: tl.constexpr, BK: tl.constexpr):
    rows, columns = i + tl.arange(0, BQ)[:, None], j + tl.arange(0, BK)[None, :]
    return tl.load(modes + rows * K + columns, mask=(rows < Q) & (columns < K), other=0)


@triton.jit
def _sink_flags(is_sink, j, K, BK: tl.constexpr):
    columns = j + tl.arange(0, BK)
    return tl.load(is_sink + columns, mask=columns < K, other=0) != 0


@triton.jit(do_not_specialize=["Q", "K"])
def _forward(
    q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k, recalled, g, lam, modes, is_sink, out, top, total, far_sum,
    H, Q, K, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SINKS: tl.constexpr, KEYS_FAR: tl.constexpr,
    FADES: tl.constexpr, RECALLS: tl.constexpr, CLAMPS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BQ
    n, h = row // H, row % H
    kv = n * (H // GROUPS) + h // GROUPS
    near_weight, far_weight = tl.load(g + h), tl.load(lam + h)
    qs = _load(q + row * Q * D, i, D, D, BD, BQ, Q)
    sink_qs = qs
    if SINKS:
        sink_qs = _load(sink_q + row * Q * D, i, D, D, BD, BQ, Q)
    m = tl.full([BQ], LOWEST, tl.float32)
    near_sum = tl.zeros([BQ], tl.float32)
    near_o = tl.zeros([BQ, BV], tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    far_o = tl.zeros([BQ, BV], tl.float32)
    phi_qs = qs
    G_qs = near_sum
    if KEYS_FAR:
        phi_qs = _load(phi_q + row * Q * F, i, F, F, BF, BQ, Q)
        if FADES:
            G_qs = _load_row(G_q + kv * Q, i, BQ, Q)
    if RECALLS:
        far_o = _load(recalled + row * Q * (V + 1), i, V + 1, V, BV, BQ, Q)
        at = i + tl.arange(0, BQ)
        b_sum = tl.load(recalled + (row * Q + at) * (V + 1) + V, mask=at < Q, other=0.0)
    for j in range(0, K, BK):
        tile = _tile_modes(modes + n * Q * K, i, j, Q, K, BQ, BK)
        ks = _load(k + kv * K * D, j, D, D, BD, BK, K)
        a = _scores(qs, sink_qs, ks, _sink_flags(is_sink + n * K, j, K, BK), tile, scale, SINKS, P)
        highest = tl.maximum(m, tl.max(a, axis=1))
        a = tl.exp2(a - highest[:, None])
        shrunk = tl.exp2(m - highest)
        near_sum = near_sum * shrunk + tl.sum(a, axis=1)
        vs = _load(v + kv * K * V, j, V, V, BV, BK, K)
        near_o = tl.dot(a, vs, near_o * shrunk[:, None], input_precision=P)
        m = highest
        if KEYS_FAR:
            phi_ks, us, mass, G_ks = _far_keys(phi_k, u, G_k, kv, j, K, V, BV, F, BF, BK, FADES)
            b, _ = _far_weights(phi_qs, phi_ks, G_qs, G_ks, tile, FADES, P)
            far_o = tl.dot(b, us, far_o, input_precision=P)
            b_sum += tl.sum(b * mass[None, :], axis=1)
    counted = b_sum
    if CLAMPS:
        counted = tl.maximum(b_sum, 0.0)
    D_sum = nonzero(near_weight * near_sum + far_weight * counted)
    o = (near_weight * near_o + far_weight * far_o) / D_sum[:, None]
    rows, columns = i + tl.arange(0, BQ), tl.arange(0, BV)[None, :]
    tl.store(out + (row * Q + rows)[:, None] * V + columns, o, mask=(rows < Q)[:, None] & (columns < V))
    tl.store(top + row * Q + rows, m, mask=rows < Q)
    tl.store(total + row * Q + rows, D_sum, mask=rows < Q)
    tl.store(far_sum + row * Q + rows, b_sum, mask=rows < Q)


@triton.jit(do_not_specialize=["Q", "K"])
def _backward_queries(
    q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k, g, lam, modes, is_sink, top, dN, dD, dD_far,
    dq, dsink_q, dphi_q, dG_q, excess, peak, slope, H, Q, K, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SINKS: tl.constexpr, KEYS_FAR: tl.constexpr,
    FADES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dq, dsink_q, dphi_q, dG_q (per query head), `slope` = what b du adds to d lam; `excess`, the sum of a row's score
    gradients, is what its maximum, key `peak`, gets with the other sign."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BQ
    n, h = row // H, row % H
    kv = n * (H // GROUPS) + h // GROUPS
    near_weight, far_weight = tl.load(g + h), tl.load(lam + h)
    qs = _load(q + row * Q * D, i, D, D, BD, BQ, Q)
    sink_qs = qs
    if SINKS:
        sink_qs = _load(sink_q + row * Q * D, i, D, D, BD, BQ, Q)
    dNs = _load(dN + row * Q * V, i, V, V, BV, BQ, Q)
    dDs, m = _load_row(dD + row * Q, i, BQ, Q), _load_row(top + row * Q, i, BQ, Q)
    dqs = tl.zeros([BQ, BD], tl.float32)
    dsink_qs = tl.zeros([BQ, BD], tl.float32)
    summed = tl.zeros([BQ], tl.float32)
    highest = tl.full([BQ], -1, tl.int32)
    phi_qs = qs
    G_qs = summed
    if KEYS_FAR:
        phi_qs = _load(phi_q + row * Q * F, i, F, F, BF, BQ, Q)
        dDs_far = _load_row(dD_far + row * Q, i, BQ, Q)
        dphi_qs = tl.zeros([BQ, BF], tl.float32)
        rise = tl.zeros([BQ], tl.float32)
        if FADES:
            G_qs = _load_row(G_q + kv * Q, i, BQ, Q)
    for j in range(0, K, BK):
        tile = _tile_modes(modes + n * Q * K, i, j, Q, K, BQ, BK)
        ks = _load(k + kv * K * D, j, D, D, BD, BK, K)
        sinks = _sink_flags(is_sink + n * K, j, K, BK)
        s = _scores(qs, sink_qs, ks, sinks, tile, scale, SINKS, P)
        key = j + tl.arange(0, BK)[None, :]
        # Computed again in another order of blocks: the next float or so below the maximum is the maximum.
        is_top = (s >= (m - 1e-6 * tl.abs(m))[:, None]) & (tile == 1)
        highest = tl.maximum(highest, tl.max(tl.where(is_top, key, -1), axis=1))
        vs = _load(v + kv * K * V, j, V, V, BV, BK, K)
        da = near_weight * (tl.dot(dNs, tl.trans(vs), input_precision=P) + dDs[:, None])
        ds = tl.exp2(s - m[:, None]) * da
        summed += tl.sum(ds, axis=1)
        if SINKS:
            dsink_qs = tl.dot(tl.where(sinks[None, :], ds, 0.0) * scale, ks, dsink_qs, input_precision=P)
            ds = tl.where(sinks[None, :], 0.0, ds)
        dqs = tl.dot(ds * scale, ks, dqs, input_precision=P)
        if KEYS_FAR:
            phi_ks, us, mass, G_ks = _far_keys(phi_k, u, G_k, kv, j, K, V, BV, F, BF, BK, FADES)
            b, faded = _far_weights(phi_qs, phi_ks, G_qs, G_ks, tile, FADES, P)
            db = tl.dot(dNs, tl.trans(us), input_precision=P) + dDs_far[:, None] * mass[None, :]
            rise += tl.sum(b * db, axis=1)
            db = tl.where(tile == 2, far_weight * db * faded, 0.0)
            dphi_qs = tl.dot(db, phi_ks, dphi_qs, input_precision=P)
    rows, columns = i + tl.arange(0, BQ), tl.arange(0, BD)[None, :]
    inside = (rows < Q)[:, None] & (columns < D)
    top_k = tl.load(k + (kv * K + tl.maximum(highest, 0))[:, None] * D + columns, mask=inside, other=0.0).to(tl.float32)
    pulled = top_k * (scale * tl.where(highest >= 0, summed, 0.0))[:, None]
    if SINKS:
        at_sink = tl.load(is_sink + n * K + tl.maximum(highest, 0), mask=rows < Q, other=0) != 0
        dsink_qs -= tl.where(at_sink[:, None], pulled, 0.0)
        pulled = tl.where(at_sink[:, None], 0.0, pulled)
        tl.store(dsink_q + (row * Q + rows)[:, None] * D + columns, dsink_qs, mask=inside)
    tl.store(dq + (row * Q + rows)[:, None] * D + columns, dqs - pulled, mask=inside)
    tl.store(excess + row * Q + rows, summed, mask=rows < Q)
    tl.store(peak + row * Q + rows, highest, mask=rows < Q)
    if KEYS_FAR:
        columns = tl.arange(0, BF)[None, :]
        at = (row * Q + rows)[:, None] * F + columns
        tl.store(dphi_q + at, dphi_qs, mask=(rows < Q)[:, None] & (columns < F))
        tl.store(slope + row * Q + rows, rise, mask=rows < Q)
        if FADES:
            tl.store(dG_q + row * Q + rows, far_weight * rise, mask=rows < Q)


@triton.jit(do_not_specialize=["Q", "K"])
def _backward_keys(
    q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k, g, lam, modes, is_sink, top, dN, dD, dD_far, excess, peak,
    dk, dv, dphi_k, du, dG_k, H, Q, K, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SINKS: tl.constexpr, KEYS_FAR: tl.constexpr,
    FADES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    kv, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK
    heads = H // GROUPS
    n = kv // heads
    ks = _load(k + kv * K * D, j, D, D, BD, BK, K)
    vs = _load(v + kv * K * V, j, V, V, BV, BK, K)
    sinks = _sink_flags(is_sink + n * K, j, K, BK)
    key = j + tl.arange(0, BK)
    dks = tl.zeros([BK, BD], tl.float32)
    dvs = tl.zeros([BK, BV], tl.float32)
    if KEYS_FAR:
        phi_ks, us, mass, G_ks = _far_keys(phi_k, u, G_k, kv, j, K, V, BV, F, BF, BK, FADES)
        dphi_ks = tl.zeros([BK, BF], tl.float32)
        dus = tl.zeros([BK, BV], tl.float32)
        dmass = tl.zeros([BK], tl.float32)
        dG_ks = tl.zeros([BK], tl.float32)
    for group in range(GROUPS):
        h = kv % heads * GROUPS + group
        row = n * H + h
        near_weight, far_weight = tl.load(g + h), tl.load(lam + h)
        for i in range(0, Q, BQ):
            tile = _tile_modes(modes + n * Q * K, i, j, Q, K, BQ, BK)
            qs = _load(q + row * Q * D, i, D, D, BD, BQ, Q)
            sink_qs = qs
            if SINKS:
                sink_qs = _load(sink_q + row * Q * D, i, D, D, BD, BQ, Q)
            s = _scores(qs, sink_qs, ks, sinks, tile, scale, SINKS, P)
            dNs = _load(dN + row * Q * V, i, V, V, BV, BQ, Q)
            a = near_weight * tl.exp2(s - _load_row(top + row * Q, i, BQ, Q)[:, None])
            dvs = tl.dot(tl.trans(a), dNs, dvs, input_precision=P)
            dDs = _load_row(dD + row * Q, i, BQ, Q)
            ds = a * (tl.dot(dNs, tl.trans(vs), input_precision=P) + dDs[:, None])
            at = i + tl.arange(0, BQ)
            highest = tl.load(peak + row * Q + at, mask=at < Q, other=-1)
            summed = _load_row(excess + row * Q, i, BQ, Q)
            ds = (ds - tl.where(highest[:, None] == key[None, :], summed[:, None], 0.0)) * scale
            if SINKS:
                dks = tl.dot(tl.trans(tl.where(sinks[None, :], ds, 0.0)), sink_qs, dks, input_precision=P)
                ds = tl.where(sinks[None, :], 0.0, ds)
            dks = tl.dot(tl.trans(ds), qs, dks, input_precision=P)
            if KEYS_FAR:
                phi_qs = _load(phi_q + row * Q * F, i, F, F, BF, BQ, Q)
                G_qs = dDs
                if FADES:
                    G_qs = _load_row(G_q + kv * Q, i, BQ, Q)
                dDs_far = _load_row(dD_far + row * Q, i, BQ, Q)
                b, faded = _far_weights(phi_qs, phi_ks, G_qs, G_ks, tile, FADES, P)
                db = tl.dot(dNs, tl.trans(us), input_precision=P) + dDs_far[:, None] * mass[None, :]
                b = far_weight * b
                dG_ks -= tl.sum(b * db, axis=0)
                dus = tl.dot(tl.trans(b), dNs, dus, input_precision=P)
                dmass += tl.sum(b * dDs_far[:, None], axis=0)
                db = tl.where(tile == 2, far_weight * db * faded, 0.0)
                dphi_ks = tl.dot(tl.trans(db), phi_qs, dphi_ks, input_precision=P)
    inside = (key < K)[:, None]
    columns = tl.arange(0, BD)[None, :]
    tl.store(dk + (kv * K + key)[:, None] * D + columns, dks, mask=inside & (columns < D))
    columns = tl.arange(0, BV)[None, :]
    tl.store(dv + (kv * K + key)[:, None] * V + columns, dvs, mask=inside & (columns < V))
    if KEYS_FAR:
        tl.store(du + (kv * K + key)[:, None] * (V + 1) + columns, dus, mask=inside & (columns < V))
        tl.store(du + (kv * K + key) * (V + 1) + V, dmass, mask=key < K)
        columns = tl.arange(0, BF)[None, :]
        tl.store(dphi_k + (kv * K + key)[:, None] * F + columns, dphi_ks, mask=inside & (columns < F))
        if FADES:
            tl.store(dG_k + kv * K + key, dG_ks, mask=key < K)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k, recalled, g, lam, modes, is_sink, scale, clamps):
        given = [None if x is None else x.contiguous() for x in (q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k)]
        q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k = given
        recalled = None if recalled is None else recalled.contiguous()
        tiles, heads, queries, dim = q.shape
        kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
        features = 16 if phi_k is None else phi_k.shape[3]

        def block(size):
            return max(16, triton.next_power_of_2(size))

        constants = dict(
            GROUPS=heads // kv_heads, D=dim, BD=block(dim), V=value_dim, BV=block(value_dim), F=features,
            BF=block(features), BQ=min(BLOCK, block(queries)), BK=min(BLOCK, block(keys)), SINKS=sink_q is not None,
            KEYS_FAR=phi_k is not None, FADES=phi_k is not None and G_q is not None,
            P="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee", num_warps=4, num_stages=1,
        )  # fmt: skip
        out = torch.empty(tiles, heads, queries, value_dim, device=q.device, dtype=torch.float32)
        top, total, far_sum = (out.new_empty(tiles, heads, queries) for _ in range(3))
        _forward[(tiles * heads, triton.cdiv(queries, constants["BQ"]))](
            *given, recalled, g, lam, modes, is_sink, out, top, total, far_sum, heads, queries, keys, scale,
            **constants, RECALLS=recalled is not None, CLAMPS=clamps,
        )  # fmt: skip
        ctx.save_for_backward(*given, recalled, g, lam, modes, is_sink, out, top, total, far_sum)
        ctx.scale, ctx.constants, ctx.clamps = scale, constants, clamps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *given, recalled, g, lam, modes, is_sink, out, top, total, far_sum = ctx.saved_tensors
        q, k, v, sink_q, phi_q, phi_k, u, G_q, G_k = given
        tiles, heads, queries, _ = q.shape
        keys, constants = k.shape[2], ctx.constants
        dN = do.float().contiguous() / total.unsqueeze(-1)
        dD = -(dN * out).sum(-1)
        dD_far = dD * (far_sum > 0) if ctx.clamps else dD

        def like(x):
            return None if x is None else torch.empty_like(x, dtype=torch.float32)

        dq, dk, dv, dsink_q, dphi_q, dphi_k, du = map(like, (q, k, v, sink_q, phi_q, phi_k, u))
        excess, slope, peak = torch.empty_like(top), torch.zeros_like(top), torch.empty_like(top, dtype=torch.int32)
        dG_q = torch.empty_like(top) if constants["FADES"] else None
        dG_k = like(G_k) if constants["FADES"] else None
        rest = g, lam, modes, is_sink, top, dN, dD, dD_far
        sizes = heads, queries, keys, ctx.scale
        _backward_queries[(tiles * heads, triton.cdiv(queries, constants["BQ"]))](
            *given, *rest, dq, dsink_q, dphi_q, dG_q, excess, peak, slope, *sizes, **constants
        )
        _backward_keys[(k.shape[0] * k.shape[1], triton.cdiv(keys, constants["BK"]))](
            *given, *rest, excess, peak, dk, dv, dphi_k, du, dG_k, *sizes, **constants
        )
        drecalled = None
        if recalled is not None:
            both = torch.cat([dN, dD_far.unsqueeze(-1)], dim=-1)
            slope += (both * recalled).sum(-1)
            drecalled = both * lam[:, None, None]
        if dG_q is not None:
            dG_q = dG_q.unflatten(1, (-1, constants["GROUPS"])).sum(2)
        # All scores together have no gradient but by g.
        dg = excess.sum((0, 2)) / g if ctx.needs_input_grad[10] else None
        return (dq, dk, dv, dsink_q, dphi_q, dphi_k, du, dG_q, dG_k, drecalled, dg, slope.sum((0, 2)),
                None, None, None, None)  # fmt: skip


def refuses(problem) -> str | None:
    """Why tiles of `problem` cannot be done here, or None."""
    if problem.config.combine != "shared":
        return f"combine {problem.config.combine} is not shared"
    if problem.v.dtype == torch.float64:
        return "they do not compute in float64"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, u: Tensor | None, G_q: Tensor | None,
    G_k: Tensor | None, q_position: Tensor, k_position: Tensor, visible: Tensor, M: Tensor | None,
    config: LinearAttentionConfig, weights: Weights, scale: float, recalls: Tensor | None = None,
    sink_q: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference.attend` in fp32, where `config.combine` is `shared`."""
    is_near = near(config, q_position, k_position) & visible
    modes = torch.where(is_near, 1, torch.where(visible, 2, 0)).to(torch.int8)
    is_sink = (k_position < config.sinks).to(torch.int8).contiguous()
    recalled = None
    if phi_q is not None:
        phi_q = phi_q.float()
        if M is not None:
            recalling = phi_q if recalls is None else phi_q * recalls[:, None, :, None]
            if G_q is not None:
                recalling = recalling * G_q.exp().repeat_interleave(phi_q.shape[1] // G_q.shape[1], dim=1).unsqueeze(-1)
            recalled = contract(recalling, M)
    g, lam = (weight.float().contiguous() for weight in (weights.near, weights.far))
    return _Attend.apply(
        q, k, v, sink_q, phi_q, None if phi_k is None else phi_k.float(), u, G_q, G_k, recalled, g, lam,
        modes.contiguous(), is_sink, scale, config.state == "delta" and phi_q is not None,
    )  # fmt: skip
