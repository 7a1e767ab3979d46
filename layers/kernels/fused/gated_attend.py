"""Queries of a chunk over what it can see, given the state's side of every chunk (see `gated_state`).

A query looks by softmax at near keys (of the own chunk, of the previous one where NEAR_BEFORE, and at sinks), and by
features at the others of the previous chunk (FAR_BEFORE) and at the state before that; windows are as long as chunks:

    o = (g sum a v + lam sum b u) / D        D = g sum a + lam max(0, sum b u_mass)
"""

import triton
import triton.language as tl

from .tiles import LOG2E, LOWEST, SIZES, TINY, band_of, body_slots, joined, load_rows, slots_of, store_rows

# Sinks in hand: the fewest rows that products take.
SINK_ROWS = tl.constexpr(16)


@triton.jit
def sink_tile(source, first, chunks, c, n, C: tl.constexpr, SINKS: tl.constexpr, INDEXED: tl.constexpr):
    """Tokens of the sinks of chunk c's document, and which of them each of its queries sees [C, SINK_ROWS]."""
    token = tl.arange(0, SINK_ROWS)
    held = token < SINKS
    start = 0
    if INDEXED:
        start = tl.load(first + chunks + c)
        token = tl.load(source + (chunks + start) * C + token, mask=held, other=-1)
        held = token >= 0
    seen = held[None, :] & ((c > start) | (tl.arange(0, SINK_ROWS)[None, :] <= tl.arange(0, C)[:, None]))
    return token, held, seen


@triton.jit
def near_tiles(
    held, held_b, first, chunks, c, n,
    C: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Which keys of the own and of the previous chunk are near, and which of the previous one are far; sinks apart."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    own = j <= i
    if INDEXED:
        own = own & held[None, :]
    before = held_b[None, :] & (j >= 0)
    if SINKS:
        own = own & body_slots(first, chunks, c, n, C, SINKS, INDEXED)[None, :]
        before = before & body_slots(first, chunks, c - 1, n, C, SINKS, INDEXED)[None, :]
    near = before
    if WINDOW == "sliding":
        near = before & (j > i)
    return own, near, before & (j <= i)


@triton.jit
def scores(q, k, seen, scale, P: tl.constexpr):
    """log2 of a's exponent, before the maximum is taken off."""
    return tl.where(seen, tl.dot(q, tl.trans(k), input_precision=P) * (scale * LOG2E), float("-inf"))


@triton.jit
def summed(G, row, c, n, held_b, follows, chunks, C: tl.constexpr, DELAY: tl.constexpr, INDEXED: tl.constexpr):
    """Of chunk c: the chunk before which the state was that its queries see, G from there on, and G of the keys of the
    previous chunk."""
    at = (row * n + c) * C
    slot = tl.arange(0, C)
    since = tl.load(G + at + slot)
    before = since
    place = c
    if DELAY:
        goes_on = (tl.full([], c, tl.int32) > 0).to(tl.int32)
        if INDEXED:
            goes_on = tl.load(follows + chunks + c)
        place = c - goes_on
        before = tl.load(G + at - C + slot, mask=held_b, other=0.0)
        since += tl.load(G + at - goes_on) * goes_on.to(tl.float32)
    return place, since, before


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, sink_q, k_rows, v_rows, out, phi_q, phi_k, u, u_mass, G, states, state_sums, near_weight, far_weight, conv,
    attended, lse, mass, top, source, first, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, s_b, s_h, s_t, o_b, o_h, o_t,
    H, T, past, n, start, begin, span, held_q, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BLOCK_F: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, SINKS: tl.constexpr, SINK_Q: tl.constexpr,
    WINDOW: tl.constexpr, NEAR_BEFORE: tl.constexpr, FAR_BEFORE: tl.constexpr, CLAMPS: tl.constexpr,
    STORE: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Also, where STORE, what backward needs of each row: `attended` [B, H, T, V], o without the convolution in fp32,
    and `lse`, `mass` (D, negative where far keys do not count in it) and `top` (m)."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    batch, h = row // H, row % H
    kv_h = h // GROUPS
    kv_row = batch * (H // GROUPS) + kv_h
    chunks = batch * n
    g = tl.load(near_weight + h).to(tl.float32)
    lam = tl.load(far_weight + h).to(tl.float32)
    slot = tl.arange(0, C)
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    token_b, held_b = slots_of(source, chunks, c - 1, n, T, C, INDEXED)
    held_b = joined(held_b, follows, chunks, c, n, INDEXED)
    asks = held & (token >= past)
    is_near, is_near_b, is_far_b = near_tiles(held, held_b, first, chunks, c, n, C, SINKS, WINDOW, INDEXED)

    # Far.
    place, since, before = summed(G, kv_row, c, n, held_b, follows, chunks, C, NEAR_BEFORE, INDEXED)
    place = ((kv_row * span + place - begin) * BF).to(tl.int32)
    at_q = ((row * held_q + c - start) * C).to(tl.int32)
    at_b = ((kv_row * span + c - 1 - begin) * C).to(tl.int32)
    o = tl.zeros([C, BV], tl.float32)
    far_sum = tl.zeros([C], tl.float32)
    b = tl.zeros([C, C], tl.float32)
    for f in tl.static_range(0, BF, BLOCK_F):
        phi_qs = phi_q.load([at_q, f])
        o = tl.dot(phi_qs, states.load([place + f, 0]), o, input_precision=P)
        sums = tl.load(state_sums + place + f + tl.arange(0, BLOCK_F))
        far_sum += tl.sum(phi_qs * sums[None, :], axis=1)
        if FAR_BEFORE:
            b = tl.dot(phi_qs, tl.trans(phi_k.load([at_b, f])), b, input_precision=P)
    faded = tl.exp2(since * LOG2E)
    o = o * faded[:, None]
    far_sum = far_sum * faded
    if FAR_BEFORE:
        b = tl.where(is_far_b, b * tl.exp2((since[:, None] - before[None, :]) * LOG2E), 0.0)
        masses = tl.load(u_mass + (kv_row * n + c - 1) * C + slot, mask=held_b, other=0.0)
        far_sum += tl.sum(b * masses[None, :], axis=1)
        o = tl.dot(b.to(dtype), u.load([at_b, 0]), o, input_precision=P)

    # Near.
    qs = load_rows(q, batch, h, c, 0, token - past, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
    ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
    a = scores(qs, ks, is_near, scale, P)
    m = tl.maximum(tl.max(a, axis=1), LOWEST)
    if NEAR_BEFORE:
        ks_b = load_rows(k, batch, kv_h, c - 1, 0, token_b, held_b, k_b, k_h, k_t, D, BD, C, INDEXED)
        a_b = scores(qs, ks_b, is_near_b, scale, P)
        m = tl.maximum(m, tl.max(a_b, axis=1))
    if SINKS:
        token_s, held_s, seen = sink_tile(source, first, chunks, c, n, C, SINKS, INDEXED)
        ks_s = load_rows(k_rows, batch, kv_h, c, 0, token_s, held_s, k_b, k_h, k_t, D, BD, SINK_ROWS, True)
        if SINK_Q:
            qs = load_rows(sink_q, batch, h, c, 0, token - past, asks, s_b, s_h, s_t, D, BD, C, INDEXED)
        a_s = scores(qs, ks_s, seen, scale, P)
        m = tl.maximum(m, tl.max(a_s, axis=1))
        a_s = tl.exp2(a_s - m[:, None])
    a = tl.exp2(a - m[:, None])
    near_sum = tl.sum(a, axis=1)
    if NEAR_BEFORE:
        a_b = tl.exp2(a_b - m[:, None])
        near_sum += tl.sum(a_b, axis=1)
    if SINKS:
        near_sum += tl.sum(a_s, axis=1)
    far_sum = lam * far_sum
    counts = far_sum > 0
    if CLAMPS:
        far_sum = tl.maximum(far_sum, 0.0)
    total = tl.maximum(g * near_sum + far_sum, TINY)
    o = o * (lam / total)[:, None]
    wa = (g / total)[:, None]
    vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
    o = tl.dot((a * wa).to(dtype), vs, o, input_precision=P)
    if NEAR_BEFORE or TAPS > 1:
        vs_b = load_rows(v, batch, kv_h, c - 1, 0, token_b, held_b, v_b, v_h, v_t, V, BV, C, INDEXED)
    if NEAR_BEFORE:
        o = tl.dot((a_b * wa).to(dtype), vs_b, o, input_precision=P)
    if SINKS:
        vs_s = load_rows(v_rows, batch, kv_h, c, 0, token_s, held_s, v_b, v_h, v_t, V, BV, SINK_ROWS, True)
        o = tl.dot((a_s * wa).to(dtype), vs_s, o, input_precision=P)
    at_row = row * (T - past) - past + token
    if STORE:
        column = tl.arange(0, BV)[None, :]
        tl.store(attended + at_row[:, None] * V + column, o, mask=asks[:, None] & (column < V))
        tl.store(lse + at_row, m + tl.log2(total), mask=asks)
        tl.store(mass + at_row, tl.where(counts, total, -total) if CLAMPS else total, mask=asks)
        tl.store(top + at_row, m, mask=asks)
    if TAPS:
        i, j = slot[:, None], slot[None, :]
        band = band_of(conv, h, C, TAPS, dtype)
        o = tl.dot(tl.where(j <= i, band, 0.0).to(dtype), vs, o, input_precision=P)
        if TAPS > 1:
            o = tl.dot(tl.where(j > i, band, 0.0).to(dtype), vs_b, o, input_precision=P)
    store_rows(out, o.to(dtype), batch, h, c, 0, token - past, asks, o_b, o_h, o_t, V, BV, C, INDEXED)
