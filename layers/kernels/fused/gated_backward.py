"""Backward of `gated_attend`, given the state before each chunk: every chunk on its own.

`middle` is do.o of a row, without the convolution: what centres the gradients of its weights. `slope` is the derivative
of a row's loss by lam. The maximum m of a row's scores does not cancel, so its key, `peak`, gets what all scores
together get, with the other sign.
"""

import triton
import triton.language as tl

from .gated_attend import SINK_ROWS, near_tiles, scores, sink_tile, summed
from .tiles import LOG2E, SIZES, band_of, body_slots, joined, load_rows, slots_of, store_rows, tap_sums


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
    q, k, v, sink_q, k_rows, v_rows, do, dq, dsink_q, phi_q, phi_k, dphi_q, u, u_mass, G, states, state_sums,
    near_weight, far_weight, attended, lse, mass, top, centre, slope, peak, dk_sinks, dv_sinks,
    source, first, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, s_b, s_h, s_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H, T, past, n, start, begin, span, held_q, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BLOCK_F: tl.constexpr, C: tl.constexpr, SINKS: tl.constexpr, SINK_Q: tl.constexpr,
    WINDOW: tl.constexpr, NEAR_BEFORE: tl.constexpr, FAR_BEFORE: tl.constexpr, CLAMPS: tl.constexpr,
    INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dq, dsink_q, dphi_q; `centre` (middle), `slope` and `peak` of each row; what each chunk gives to sinks."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    batch, h = row // H, row % H
    kv_h = h // GROUPS
    kv_row = batch * (H // GROUPS) + kv_h
    chunks = batch * n
    g = tl.load(near_weight + h).to(tl.float32)
    lam = tl.load(far_weight + h).to(tl.float32)
    slot = tl.arange(0, C)
    j = slot[None, :]
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    token_b, held_b = slots_of(source, chunks, c - 1, n, T, C, INDEXED)
    held_b = joined(held_b, follows, chunks, c, n, INDEXED)
    asks = held & (token >= past)
    at_row = row * (T - past) - past + token
    is_near, is_near_b, is_far_b = near_tiles(held, held_b, first, chunks, c, n, C, SINKS, WINDOW, INDEXED)
    dos = load_rows(do, batch, h, c, 0, token - past, asks, do_b, do_h, do_t, V, BV, C, INDEXED)
    column = tl.arange(0, BV)[None, :]
    o = tl.load(attended + at_row[:, None] * V + column, mask=asks[:, None] & (column < V), other=0.0)
    middle = tl.sum(dos.to(tl.float32) * o, axis=1)
    vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
    dp = tl.dot(dos, tl.trans(vs), input_precision=P)
    if NEAR_BEFORE:
        vs = load_rows(v, batch, kv_h, c - 1, 0, token_b, held_b, v_b, v_h, v_t, V, BV, C, INDEXED)
        dp_b = tl.dot(dos, tl.trans(vs), input_precision=P)
    lse_row = tl.load(lse + at_row, mask=asks, other=0.0)[:, None]

    # Near: which key had the maximum is found first. The next float or so below it: products in another order may
    # round otherwise.
    limit = tl.load(top + at_row, mask=asks, other=0.0)
    limit = (limit - 1e-6 * tl.abs(limit))[:, None]
    qs = load_rows(q, batch, h, c, 0, token - past, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
    ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
    p = scores(qs, ks, is_near, scale, P)
    highest = tl.max(tl.where(p >= limit, j + C, -1), axis=1)
    p = g * tl.exp2(p - lse_row)
    if NEAR_BEFORE:
        ks_b = load_rows(k, batch, kv_h, c - 1, 0, token_b, held_b, k_b, k_h, k_t, D, BD, C, INDEXED)
        p_b = scores(qs, ks_b, is_near_b, scale, P)
        highest = tl.maximum(highest, tl.max(tl.where(p_b >= limit, j, -1), axis=1))
        p_b = g * tl.exp2(p_b - lse_row)
    if SINKS:
        token_s, held_s, seen = sink_tile(source, first, chunks, c, n, C, SINKS, INDEXED)
        ks_s = load_rows(k_rows, batch, kv_h, c, 0, token_s, held_s, k_b, k_h, k_t, D, BD, SINK_ROWS, True)
        sink_qs = qs
        if SINK_Q:
            sink_qs = load_rows(sink_q, batch, h, c, 0, token - past, asks, s_b, s_h, s_t, D, BD, C, INDEXED)
        p_s = scores(sink_qs, ks_s, seen, scale, P)
        key = tl.arange(0, SINK_ROWS)[None, :] + 2 * C
        highest = tl.maximum(highest, tl.max(tl.where(p_s >= limit, key, -1), axis=1))
        p_s = g * tl.exp2(p_s - lse_row)
    tl.store(peak + at_row, highest, mask=asks)
    p_dp = p * (dp - middle[:, None])
    excess = tl.sum(p_dp, axis=1)
    if NEAR_BEFORE:
        p_dp_b = p_b * (dp_b - middle[:, None])
        excess += tl.sum(p_dp_b, axis=1)
    if SINKS:
        vs_s = load_rows(v_rows, batch, kv_h, c, 0, token_s, held_s, v_b, v_h, v_t, V, BV, SINK_ROWS, True)
        p_dp_s = p_s * (tl.dot(dos, tl.trans(vs_s), input_precision=P) - middle[:, None])
        excess += tl.sum(p_dp_s, axis=1)
    ds = (p_dp - tl.where(highest[:, None] == j + C, excess[:, None], 0.0)) * scale
    dqs = tl.dot(ds.to(dtype), ks, input_precision=P)
    if NEAR_BEFORE:
        ds = (p_dp_b - tl.where(highest[:, None] == j, excess[:, None], 0.0)) * scale
        dqs = tl.dot(ds.to(dtype), ks_b, dqs, input_precision=P)
    if SINKS:
        ds_s = ((p_dp_s - tl.where(highest[:, None] == key, excess[:, None], 0.0)) * scale).to(dtype)
        if SINK_Q:
            dsink_qs = tl.dot(ds_s, ks_s, input_precision=P)
            store_rows(
                dsink_q, dsink_qs.to(dtype), batch, h, c, 0, token - past, asks, dq_b, dq_h, dq_t, D, BD, C, INDEXED
            )  # fmt: skip
        else:
            dqs = tl.dot(ds_s, ks_s, dqs, input_precision=P)
        sink = tl.arange(0, SINK_ROWS)[:, None]
        at = ((row * n + c) * SINKS + sink) * D + tl.arange(0, BD)[None, :]
        given = tl.dot(tl.trans(ds_s), sink_qs, input_precision=P)
        tl.store(dk_sinks + at, given, mask=(sink < SINKS) & (tl.arange(0, BD)[None, :] < D))
        at = ((row * n + c) * SINKS + sink) * V + tl.arange(0, BV)[None, :]
        given = tl.dot(tl.trans(p_s.to(dtype)), dos, input_precision=P)
        tl.store(dv_sinks + at, given, mask=(sink < SINKS) & (tl.arange(0, BV)[None, :] < V))
    store_rows(dq, dqs.to(dtype), batch, h, c, 0, token - past, asks, dq_b, dq_h, dq_t, D, BD, C, INDEXED)

    # Far.
    total = tl.load(mass + at_row, mask=asks, other=1.0)
    counted = tl.where(total > 0, middle, 0.0)
    total = tl.abs(total)
    place, since, before = summed(G, kv_row, c, n, held_b, follows, chunks, C, NEAR_BEFORE, INDEXED)
    place = ((kv_row * span + place - begin) * BF).to(tl.int32)
    at_q = ((row * held_q + c - start) * C).to(tl.int32)
    faded = tl.exp2(since * LOG2E) / total
    if FAR_BEFORE:
        at_b = ((kv_row * span + c - 1 - begin) * C).to(tl.int32)
        mass_b = tl.load(u_mass + (kv_row * n + c - 1) * C + slot, mask=held_b, other=0.0)
        df = tl.dot(dos, tl.trans(u.load([at_b, 0])), input_precision=P) - counted[:, None] * mass_b[None, :]
        df = df * tl.exp2((since[:, None] - before[None, :]) * LOG2E) / total[:, None]
        df = tl.where(is_far_b, df, 0.0).to(dtype)
    rise = tl.zeros([C], tl.float32)
    for f in tl.static_range(0, BF, BLOCK_F):
        X = states.load([place + f, 0])
        sums = tl.load(state_sums + place + f + tl.arange(0, BLOCK_F))
        dphi = tl.dot(dos, tl.trans(X), input_precision=P) - counted[:, None] * sums[None, :]
        dphi = dphi * faded[:, None]
        if FAR_BEFORE:
            dphi = tl.dot(df, phi_k.load([at_b, f]), dphi, input_precision=P)
        rise += tl.sum(phi_q.load([at_q, f]) * dphi, axis=1)
        dphi_q.store([at_q, f], (lam * dphi).to(dtype))
    tl.store(centre + at_row, middle, mask=asks)
    tl.store(slope + at_row, rise, mask=asks)


@triton.jit
def _key_tile(
    ks, vs, dk, dv, q, do, g, lam, band, lse, centre, slope, peak, batch, h, c, rows, token, asks,
    q_b, q_h, q_t, do_b, do_h, do_t, scale, is_near, offset,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    NEAR: tl.constexpr, P: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dk, dv with what they get from one tile of queries, all transposed: keys by queries."""
    dtype: tl.constexpr = vs.dtype
    at_row = rows + token
    dos = load_rows(do, batch, h, c, 0, token, asks, do_b, do_h, do_t, V, BV, C, INDEXED)
    weights = tl.zeros([C, C], dtype)
    if NEAR:
        qs = load_rows(q, batch, h, c, 0, token, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
        p = scores(ks, qs, is_near, scale, P)
        p = tl.exp2(p - tl.load(lse + at_row, mask=asks, other=0.0)[None, :]) * g
        weights = p.to(dtype)
        dp = tl.dot(vs, tl.trans(dos), input_precision=P)
        p = p * (dp - tl.load(centre + at_row, mask=asks, other=0.0)[None, :])
        highest = tl.load(peak + at_row, mask=asks, other=-1)
        excess = lam * tl.load(slope + at_row, mask=asks, other=0.0)
        p += tl.where(highest[None, :] == tl.arange(0, C)[:, None] + offset, excess[None, :], 0.0)
        dk = tl.dot((p * scale).to(dtype), qs, dk, input_precision=P)
    if TAPS:
        weights += band
    dv = tl.dot(weights, dos, dv, input_precision=P)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
    q, k, v, do, dk, dv, near_weight, far_weight, conv, lse, centre, slope, peak, source, first, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, T, past, n, start, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, NEAR_BEFORE: tl.constexpr, INDEXED: tl.constexpr,
    P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dk and dv of near keys and of the convolution, except what chunks give to sinks."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    heads = H // GROUPS
    batch, kv_h = row // heads, row % heads
    chunks = batch * n
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    token_a, held_a = slots_of(source, chunks, c + 1, n, T, C, INDEXED)
    asks = held & (token >= past)
    asks_a = joined(held_a & (token_a >= past), follows, chunks, c + 1, n, INDEXED)
    ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
    vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
    dks = tl.zeros([C, BD], tl.float32)
    dvs = tl.zeros([C, BV], tl.float32)
    j, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # Rows without a query have q = do = 0, and what comes of rows without a key is not stored.
    body = body_slots(first, chunks, c, n, C, SINKS, INDEXED)[:, None]
    is_near = body & (j <= i)
    is_near_a = body & asks_a[None, :]
    if WINDOW == "sliding":
        is_near_a = is_near_a & (j > i)
    for group in range(GROUPS):
        h = kv_h * GROUPS + group
        rows = (batch * H + h) * (T - past)
        g = tl.load(near_weight + h).to(tl.float32)
        lam = tl.load(far_weight + h).to(tl.float32)
        band_own = 0.0
        band_after = 0.0
        if TAPS:
            band = tl.trans(band_of(conv, h, C, TAPS, dtype))
            band_own = tl.where(j <= i, band, 0.0).to(dtype)
            band_after = tl.where(j > i, band, 0.0).to(dtype)
        dks, dvs = _key_tile(
            ks, vs, dks, dvs, q, do, g, lam, band_own, lse, centre, slope, peak, batch, h, c, rows, token - past, asks,
            q_b, q_h, q_t, do_b, do_h, do_t, scale, is_near, C, D, BD, V, BV, C, TAPS, True, P, INDEXED,
        )  # fmt: skip
        if NEAR_BEFORE or TAPS > 1:
            dks, dvs = _key_tile(
                ks, vs, dks, dvs, q, do, g, lam, band_after, lse, centre, slope, peak, batch, h, c + 1, rows,
                token_a - past, asks_a, q_b, q_h, q_t, do_b, do_h, do_t, scale, is_near_a, 0,
                D, BD, V, BV, C, TAPS if TAPS > 1 else 0, NEAR_BEFORE, P, INDEXED,
            )  # fmt: skip
    store_rows(dk, dks.to(dtype), batch, kv_h, c, 0, token, held, dk_b, dk_h, dk_t, D, BD, C, INDEXED)
    store_rows(dv, dvs.to(dtype), batch, kv_h, c, 0, token, held, dv_b, dv_h, dv_t, V, BV, C, INDEXED)


@triton.jit(do_not_specialize=SIZES)
def backward_far(
    do, phi_q, phi_k, u, u_mass, G, far_weight, mass, centre, du, du_mass, dphi_k, dG, source, first, follows,
    do_b, do_h, do_t, H, T, past, n, start, begin, span, held_q,
    GROUPS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BLOCK_F: tl.constexpr,
    C: tl.constexpr, SINKS: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """du, dphi_k and dG of a chunk's keys, by slot, from the queries of the next chunk that see them far."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    heads = H // GROUPS
    batch, kv_h = row // heads, row % heads
    chunks = batch * n
    slot = tl.arange(0, C)
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    token_a, held_a = slots_of(source, chunks, c + 1, n, T, C, INDEXED)
    asks_a = joined(held_a & (token_a >= past), follows, chunks, c + 1, n, INDEXED)
    j, i = slot[:, None], slot[None, :]
    is_far = asks_a[None, :] & (j <= i) & held[:, None]
    is_far = is_far & body_slots(first, chunks, c, n, C, SINKS, INDEXED)[:, None]
    at = ((row * span + c - begin) * C).to(tl.int32)
    at_n = (row * n + c) * C
    us = u.load([at, 0])
    masses = tl.load(u_mass + at_n + slot)
    before = tl.load(G + at_n + slot)
    since = tl.load(G + at_n + C - 1) + tl.load(G + at_n + C + slot, mask=asks_a, other=0.0)
    dus = tl.zeros([C, BV], tl.float32)
    dmass = tl.zeros([C], tl.float32)
    dG_sum = tl.zeros([C], tl.float32)
    for group in range(GROUPS):
        h = kv_h * GROUPS + group
        at_row = (batch * H + h) * (T - past) - past + token_a
        at_q = (((batch * H + h) * held_q + c + 1 - start) * C).to(tl.int32)
        lam = tl.load(far_weight + h).to(tl.float32)
        total = tl.load(mass + at_row, mask=asks_a, other=1.0)
        middle = tl.load(centre + at_row, mask=asks_a, other=0.0)
        counted = tl.where(total > 0, middle, 0.0)
        weight = tl.exp2((since[None, :] - before[:, None]) * LOG2E) * (lam / tl.abs(total))[None, :]
        weight = tl.where(is_far, weight, 0.0)
        b = tl.zeros([C, C], tl.float32)
        for f in tl.static_range(0, BF, BLOCK_F):
            b = tl.dot(phi_k.load([at, f]), tl.trans(phi_q.load([at_q, f])), b, input_precision=P)
        b = b * weight
        dos = load_rows(do, batch, h, c + 1, 0, token_a - past, asks_a, do_b, do_h, do_t, V, BV, C, INDEXED)
        dus = tl.dot(b.to(dtype), dos, dus, input_precision=P)
        dmass -= tl.sum(b * counted[None, :], axis=1)
        df = tl.dot(us, tl.trans(dos), input_precision=P) - masses[:, None] * counted[None, :]
        dG_sum -= tl.sum(b * df, axis=1)
        df = (df * weight).to(dtype)
        for f in tl.static_range(0, BF, BLOCK_F):
            given = tl.dot(df, phi_q.load([at_q, f]), input_precision=P)
            place = dphi_k + (at + slot).to(tl.int64)[:, None] * BF + f + tl.arange(0, BLOCK_F)[None, :]
            # Of all heads there is no room on chip.
            if group > 0:
                given += tl.load(place).to(tl.float32)
            tl.store(place, given.to(dphi_k.dtype.element_ty))
    du.store([at, 0], dus.to(dtype))
    tl.store(du_mass + at_n + slot, dmass)
    tl.store(dG + at_n + slot, dG_sum)


@triton.jit(do_not_specialize=SIZES)
def backward_states(
    do, phi_q, G, far_weight, mass, centre, dstates, dstate_sums, source, follows,
    do_b, do_h, do_t, H, T, past, n, start, begin, span, held_q,
    GROUPS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BLOCK_F: tl.constexpr,
    C: tl.constexpr, DELAY: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What queries give to the state before chunk c that they look at, those of chunk c + DELAY."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    f = tl.program_id(2) * BLOCK_F
    heads = H // GROUPS
    batch, kv_h = row // heads, row % heads
    chunks = batch * n
    a = c + DELAY
    token, held = slots_of(source, chunks, a, n, T, C, INDEXED)
    if DELAY:
        held = joined(held, follows, chunks, a, n, INDEXED)
    asks = held & (token >= past)
    since = tl.load(G + (row * n + a) * C + tl.arange(0, C), mask=asks, other=0.0)
    if DELAY:
        since += tl.load(G + (row * n + a) * C - 1)
    given = tl.zeros([BLOCK_F, BV], tl.float32)
    given_mass = tl.zeros([BLOCK_F], tl.float32)
    for group in range(GROUPS):
        h = kv_h * GROUPS + group
        at_row = (batch * H + h) * (T - past) - past + token
        total = tl.load(mass + at_row, mask=asks, other=1.0)
        middle = tl.load(centre + at_row, mask=asks, other=0.0)
        weight = tl.load(far_weight + h) / tl.abs(total) * tl.exp2(since * LOG2E)
        phi_qs = phi_q.load([(((batch * H + h) * held_q + a - start) * C).to(tl.int32), f])
        dos = load_rows(do, batch, h, a, 0, token - past, asks, do_b, do_h, do_t, V, BV, C, INDEXED)
        given = tl.dot(tl.trans(phi_qs), (dos * weight[:, None]).to(dtype), given, input_precision=P)
        given_mass -= tl.sum(phi_qs * tl.where(total > 0, middle * weight, 0.0)[:, None], axis=0)
    place = (row * span + c - begin) * BF + f
    dstates.store([place.to(tl.int32), 0], given.to(dtype))
    tl.store(dstate_sums + place + tl.arange(0, BLOCK_F), given_mass)


@triton.jit(do_not_specialize=SIZES)
def backward_conv(
    v, do, sums, source, follows, v_b, v_h, v_t, do_b, do_h, do_t, H, T, past, n, span,
    GROUPS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    INDEXED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`sums` [TAPS] per program, the gradients of the convolution's taps."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, h = row // H, row % H
    kv_h = h // GROUPS
    chunks = batch * n
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    total = tl.zeros([C, C], tl.float32)
    for c in range(segment * span, tl.minimum(segment * span + span, n)):
        token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
        token_b, held_b = slots_of(source, chunks, c - 1, n, T, C, INDEXED)
        held_b = joined(held_b, follows, chunks, c, n, INDEXED)
        asks = held & (token >= past)
        dos = load_rows(do, batch, h, c, 0, token - past, asks, do_b, do_h, do_t, V, BV, C, INDEXED)
        vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
        own = tl.dot(dos, tl.trans(vs), input_precision=P)
        vs = load_rows(v, batch, kv_h, c - 1, 0, token_b, held_b, v_b, v_h, v_t, V, BV, C, INDEXED)
        total += tl.where(j <= i, own, tl.dot(dos, tl.trans(vs), input_precision=P))
    place, tap = (segment * tl.num_programs(0) + row) * TAPS, tl.arange(0, C)
    tl.store(sums + place + tap, tap_sums(total, C), mask=tap < TAPS)
