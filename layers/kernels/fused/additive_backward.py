"""Backward with an additive state: queries' and keys' gradients of each chunk, given X and dX there (see `scan`)."""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    band_of,
    far_weights,
    features_of,
    joined,
    load_rows,
    near_and_far,
    projection,
    slots_of,
    store_rows,
    tap_sums,
)


@triton.jit
def _phi_backward(
    dphi, phi, x, weight, MAP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
    """dx [C, BD] fp32 and, of maps with weights, dy [C, BY] in the dtype of x."""
    if MAP == "elu1":
        dx = dphi * tl.where(x.to(tl.float32) > 0, 1.0, phi)
        dy = dx
    else:
        if MAP == "t2r":
            dy = tl.where(phi > 0, dphi, 0.0)
        else:
            along = tl.reshape(phi * dphi, (C, BF // 2, 2))
            parts = tl.reshape(phi, (C, BF // 2, 2))
            positive, negative = tl.split(along - parts * tl.sum(along, axis=1, keep_dims=True))
            dy = positive - negative
        dy = dy.to(x.dtype)
        dx = tl.dot(dy, tl.trans(weight), input_precision=P)
    return dx, dy


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
    q, k, v, do, dq, dy, W_q, b_q, W_k, b_k, near_weight, far_weight, states, state_sums,
    lse, mass, top, centre, slope, peak, sums, source, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    H, T, past, n, span, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, OWN_FAR: tl.constexpr, PREVIOUS_NEAR: tl.constexpr, PREVIOUS_FAR: tl.constexpr,
    MAP: tl.constexpr, SHARED: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dq, what centres each row's gradients (`centre` of near weights, of all where SHARED), `slope`, `peak`, `dy`
    [B, H, T, Y] of the map's projection, and per program `sums` [TAPS + 1]: the gradients of the convolution's taps,
    and the sum of `slope`."""
    PREVIOUS: tl.constexpr = PREVIOUS_NEAR or TAPS > 1
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, h = row // H, row % H
    kv_h = h // GROUPS
    chunks = batch * n
    g = tl.load(near_weight + h).to(tl.float32)
    lam = tl.load(far_weight + h).to(tl.float32)
    weight_q, bias_q = projection(W_q, b_q, h, MAP, D, BD, Y, BY)
    weight_k, bias_k = weight_q, bias_q
    if OWN_FAR or PREVIOUS_FAR:
        weight_k, bias_k = projection(W_k, b_k, kv_h, MAP, D, BD, Y, BY)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rise_sum = tl.zeros([C], tl.float32)
    if TAPS:
        outer_sum = tl.zeros([C, C], tl.float32)
    for c in range(segment * span, tl.minimum(segment * span + span, n)):
        token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
        asks = held & (token >= past)
        at_row = row * (T - past) - past + token
        qs = load_rows(q, batch, h, c, 0, token - past, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
        dos = load_rows(do, batch, h, c, 0, token - past, asks, o_b, o_h, o_t, V, BV, C, INDEXED)
        ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
        vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
        near_sum = tl.load(lse + at_row, mask=asks, other=0.0)[:, None]
        far_sum = tl.load(mass + at_row, mask=asks, other=1.0)
        if PREVIOUS:
            token_b, held_b = slots_of(source, chunks, c - 1, n, T, C, INDEXED)
            held_b = joined(held_b, follows, chunks, c, n, INDEXED)
            vs_b = load_rows(v, batch, kv_h, c - 1, 0, token_b, held_b, v_b, v_h, v_t, V, BV, C, INDEXED)
        if PREVIOUS_NEAR:
            ks_b = load_rows(k, batch, kv_h, c - 1, 0, token_b, held_b, k_b, k_h, k_t, D, BD, C, INDEXED)

        dp = tl.dot(dos, tl.trans(vs), input_precision=P)
        if PREVIOUS:
            dp_b = tl.dot(dos, tl.trans(vs_b), input_precision=P)
        # Rows that ask nothing have q = do = 0, and nothing comes of them.
        visible = j <= i
        if INDEXED:
            visible = visible & held[None, :]
        is_near, is_far = near_and_far(visible, i, j, W, WINDOW, WINDOW != "none", OWN_FAR)
        if PREVIOUS_NEAR:
            is_near_b, is_far_b = near_and_far(held_b[None, :] & (j >= 0), i + C, j, W, WINDOW, True, PREVIOUS_FAR)
        middle = tl.zeros([C], tl.float32)
        if TAPS > 1:
            outer_sum += tl.where(j <= i, dp, dp_b)
        elif TAPS:
            outer_sum += dp

        # Near.
        highest = tl.full([C], -1, tl.int32)
        if SHARED and WINDOW != "none":
            # The next float or so below the maximum: products in another order may round otherwise.
            limit = tl.load(top + at_row, mask=asks, other=0.0)
            limit = (limit - 1e-6 * tl.abs(limit))[:, None]
        if WINDOW != "none":
            p = tl.dot(qs, tl.trans(ks), input_precision=P) * (scale * LOG2E)
            p = tl.where(is_near, p, float("-inf"))
            if SHARED:
                highest = tl.max(tl.where(p >= limit, j + C, -1), axis=1)
            p = g * tl.exp2(p - near_sum)
            middle += tl.sum(p * dp, axis=1)
        if PREVIOUS_NEAR:
            p_b = tl.dot(qs, tl.trans(ks_b), input_precision=P) * (scale * LOG2E)
            p_b = tl.where(is_near_b, p_b, float("-inf"))
            if SHARED:
                highest = tl.maximum(highest, tl.max(tl.where(p_b >= limit, j, -1), axis=1))
            p_b = g * tl.exp2(p_b - near_sum)
            middle += tl.sum(p_b * dp_b, axis=1)

        # Far.
        place = ((batch * (H // GROUPS) + kv_h) * n + c) * BF
        X = states.load([place.to(tl.int32), 0])
        x = tl.load(state_sums + place + tl.arange(0, BF))
        phi_q = features_of(qs, weight_q, bias_q, MAP, F, BF, C, P)
        dphi = tl.dot(dos, tl.trans(X), input_precision=P)
        far_term = tl.sum(phi_q * dphi, axis=1)
        far_mass = tl.sum(phi_q * x[None, :], axis=1)
        if OWN_FAR:
            phi_k = features_of(ks, weight_k, bias_k, MAP, F, BF, C, P).to(dtype)
            f = far_weights(phi_q.to(dtype), phi_k, is_far, P)
            far_term += tl.sum(f * dp, axis=1)
            far_mass += tl.sum(f, axis=1)
        if PREVIOUS_FAR:
            phi_b = features_of(ks_b, weight_k, bias_k, MAP, F, BF, C, P).to(dtype)
            f = far_weights(phi_q.to(dtype), phi_b, is_far_b, P)
            far_term += tl.sum(f * dp_b, axis=1)
            far_mass += tl.sum(f, axis=1)
        if SHARED:
            # All weights of a row sum up to 1: one centre.
            middle += lam / far_sum * far_term
            far_middle = middle
            rise = (far_term - middle * far_mass) / far_sum
        else:
            rise = far_term / far_sum
            far_middle = rise
        tl.store(centre + at_row, middle, mask=asks)
        tl.store(slope + at_row, rise, mask=asks)
        rise_sum += tl.where(asks, rise, 0.0)

        # Gradients of scores.
        if WINDOW != "none":
            p = p * (dp - middle[:, None])
        if PREVIOUS_NEAR:
            p_b = p_b * (dp_b - middle[:, None])
        if SHARED and WINDOW != "none":
            # The maximum does not cancel: whoever has it gets what all scores together get, with the other sign, which
            # is what far weights get.
            p = tl.where(highest[:, None] == j + C, p + (lam * rise)[:, None], p)
            tl.store(peak + at_row, highest, mask=asks)
            if PREVIOUS_NEAR:
                p_b = tl.where(highest[:, None] == j, p_b + (lam * rise)[:, None], p_b)
        dphi -= far_middle[:, None] * x[None, :]
        if OWN_FAR:
            df = tl.where(is_far, dp - far_middle[:, None], 0.0)
            dphi = tl.dot(df.to(dtype), phi_k, dphi, input_precision=P)
        if PREVIOUS_FAR:
            df = tl.where(is_far_b, dp_b - far_middle[:, None], 0.0)
            dphi = tl.dot(df.to(dtype), phi_b, dphi, input_precision=P)
        dqs, dys = _phi_backward(dphi * (lam / far_sum)[:, None], phi_q, qs, weight_q, MAP, BF, C, P)
        if MAP != "elu1":
            at = dy + at_row[:, None] * Y + tl.arange(0, BY)[None, :]
            tl.store(at, dys, mask=asks[:, None] & (tl.arange(0, BY) < Y)[None, :])
        if WINDOW != "none":
            dqs = tl.dot((p * scale).to(dtype), ks, dqs, input_precision=P)
        if PREVIOUS_NEAR:
            dqs = tl.dot((p_b * scale).to(dtype), ks_b, dqs, input_precision=P)
        store_rows(dq, dqs.to(dtype), batch, h, c, 0, token - past, asks, dq_b, dq_h, dq_t, D, BD, C, INDEXED)

    place = (segment * tl.num_programs(0) + row) * (TAPS + 1)
    tl.store(sums + place + TAPS, tl.sum(rise_sum, axis=0))
    if TAPS:
        tap = tl.arange(0, C)
        tl.store(sums + place + tap, tap_sums(outer_sum, C), mask=tap < TAPS)


@triton.jit
def _query_tile(
    ks, vs, phi_k, dk, dv, dphi, q, do, weight_q, bias_q, g, lam, band, lse, mass, centre, slope, peak,
    batch, h, c, rows, token, asks, q_b, q_h, q_t, o_b, o_h, o_t, scale, is_near, is_far, offset,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr, TAPS: tl.constexpr, MAP: tl.constexpr, SHARED: tl.constexpr, P: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dk, dv and dphi with what they get from one tile of queries, all transposed: keys by queries."""
    dtype: tl.constexpr = vs.dtype
    at_row = rows + token
    qs = load_rows(q, batch, h, c, 0, token, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
    dos = load_rows(do, batch, h, c, 0, token, asks, o_b, o_h, o_t, V, BV, C, INDEXED)
    weights = tl.zeros([C, C], dtype)
    if NEAR or FAR:
        dp = tl.dot(vs, tl.trans(dos), input_precision=P)
        middle = tl.load(centre + at_row, mask=asks, other=0.0)
        rise = tl.load(slope + at_row, mask=asks, other=0.0)
    if NEAR:
        p = tl.dot(ks, tl.trans(qs), input_precision=P) * (scale * LOG2E)
        p = tl.where(is_near, p, float("-inf"))
        p = tl.exp2(p - tl.load(lse + at_row, mask=asks, other=0.0)[None, :]) * g
        weights += p.to(dtype)
        p = p * (dp - middle[None, :])
        if SHARED:
            highest = tl.load(peak + at_row, mask=asks, other=-1)
            p += tl.where(highest[None, :] == tl.arange(0, C)[:, None] + offset, (lam * rise)[None, :], 0.0)
        dk = tl.dot((p * scale).to(dtype), qs, dk, input_precision=P)
    if FAR:
        wb = lam / tl.load(mass + at_row, mask=asks, other=1.0)
        phi_q = (features_of(qs, weight_q, bias_q, MAP, F, BF, C, P) * wb[:, None]).to(dtype)
        weights += far_weights(phi_k, phi_q, is_far, P).to(dtype)
        far_middle = middle if SHARED else rise
        df = tl.where(is_far, dp - far_middle[None, :], 0.0)
        dphi = tl.dot(df.to(dtype), phi_q, dphi, input_precision=P)
    if TAPS:
        weights += band
    if NEAR or FAR or TAPS:
        dv = tl.dot(weights, dos, dv, input_precision=P)
    return dk, dv, dphi


@triton.jit
def _query_head(
    near_weight, far_weight, W, b, conv, h, dtype: tl.constexpr, MAP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """What belongs to a query head: g, lam, its map, and its convolution as keys by queries, own and next chunk's."""
    g = tl.load(near_weight + h).to(tl.float32)
    lam = tl.load(far_weight + h).to(tl.float32)
    weight, bias = projection(W, b, h, MAP, D, BD, Y, BY)
    band_own = 0.0
    band_after = 0.0
    if TAPS:
        j, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        band = tl.trans(band_of(conv, h, C, TAPS, dtype))
        band_own = tl.where(j <= i, band, 0.0).to(dtype)
        band_after = tl.where(j > i, band, 0.0).to(dtype)
    return g, lam, weight, bias, band_own, band_after


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
    q, k, v, do, dk, dv, dy, W_q, b_q, W_k, b_k, near_weight, far_weight, conv, states, state_sums,
    lse, mass, centre, slope, peak, source, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, T, past, n, span, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, OWN_FAR: tl.constexpr, PREVIOUS_NEAR: tl.constexpr, PREVIOUS_FAR: tl.constexpr,
    MAP: tl.constexpr, SHARED: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dk, dv, and `dy` [B, H_kv, T, Y] of the map's projection."""
    PREVIOUS: tl.constexpr = PREVIOUS_NEAR or TAPS > 1
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = H // GROUPS
    batch, kv_h = row // heads, row % heads
    chunks = batch * n
    weight_k, bias_k = projection(W_k, b_k, kv_h, MAP, D, BD, Y, BY)
    j, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if GROUPS == 1:
        g, lam, weight_q, bias_q, band_own, band_after = _query_head(
            near_weight, far_weight, W_q, b_q, conv, kv_h, dtype, MAP, D, BD, Y, BY, C, TAPS
        )
    for c in range(segment * span, tl.minimum(segment * span + span, n)):
        token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
        ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
        vs = load_rows(v, batch, kv_h, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
        phi_k = tl.zeros([C, BF], dtype)
        if OWN_FAR or PREVIOUS_FAR:
            phi_k = features_of(ks, weight_k, bias_k, MAP, F, BF, C, P).to(dtype)
        dks = tl.zeros([C, BD], tl.float32)
        dvs = tl.zeros([C, BV], tl.float32)
        dphi_near = tl.zeros([C, BF], tl.float32)
        for group in range(GROUPS):
            h = kv_h * GROUPS + group
            rows = (batch * H + h) * (T - past)
            if GROUPS > 1:
                g, lam, weight_q, bias_q, band_own, band_after = _query_head(
                    near_weight, far_weight, W_q, b_q, conv, h, dtype, MAP, D, BD, Y, BY, C, TAPS
                )
            # Rows without a query have q = do = 0, and what comes of rows without a key is not stored.
            asks = held & (token >= past)
            visible = j <= i
            is_near, is_far = near_and_far(visible, i, j, W, WINDOW, WINDOW != "none", OWN_FAR)
            dks, dvs, dphi_near = _query_tile(
                ks, vs, phi_k, dks, dvs, dphi_near, q, do, weight_q, bias_q, g, lam, band_own,
                lse, mass, centre, slope, peak, batch, h, c, rows, token - past, asks, q_b, q_h, q_t, o_b, o_h, o_t,
                scale, is_near, is_far, C,
                D, BD, V, BV, F, BF, C, TAPS, MAP, SHARED, P, WINDOW != "none", OWN_FAR, INDEXED,
            )  # fmt: skip
            if PREVIOUS:
                token_a, held_a = slots_of(source, chunks, c + 1, n, T, C, INDEXED)
                asks_a = joined(held_a & (token_a >= past), follows, chunks, c + 1, n, INDEXED)
                visible = asks_a[None, :] & (j >= 0)
                is_near, is_far = near_and_far(visible, i + C, j, W, WINDOW, PREVIOUS_NEAR, PREVIOUS_FAR)
                dks, dvs, dphi_near = _query_tile(
                    ks, vs, phi_k, dks, dvs, dphi_near, q, do, weight_q, bias_q, g, lam, band_after,
                    lse, mass, centre, slope, peak, batch, h, c + 1, rows, token_a - past, asks_a,
                    q_b, q_h, q_t, o_b, o_h, o_t, scale, is_near, is_far, 0,
                    D, BD, V, BV, F, BF, C, TAPS if TAPS > 1 else 0, MAP, SHARED, P, PREVIOUS_NEAR, PREVIOUS_FAR,
                    INDEXED,
                )  # fmt: skip
        # What later queries get by the state, of keys that enter it.
        place = (row * n + c) * BF
        X = states.load([place.to(tl.int32), 0])
        x = tl.load(state_sums + place + tl.arange(0, BF))
        phi = features_of(ks, weight_k, bias_k, MAP, F, BF, C, P)
        phi_k = phi.to(dtype)
        if INDEXED and PREVIOUS_NEAR:
            stored = joined(held, follows, chunks, c + 1, n, INDEXED)
            phi_k = tl.where(stored[:, None], phi_k, 0.0)
        dvs = tl.dot(phi_k, X, dvs, input_precision=P)
        store_rows(dv, dvs.to(dtype), batch, kv_h, c, 0, token, held, dv_b, dv_h, dv_t, V, BV, C, INDEXED)
        dphi = tl.dot(vs, tl.trans(X), input_precision=P) + x[None, :]
        if INDEXED and PREVIOUS_NEAR:
            dphi = tl.where(stored[:, None], dphi, 0.0)
        if OWN_FAR or PREVIOUS_FAR:
            dphi += dphi_near
        dx, dys = _phi_backward(dphi, phi, ks, weight_k, MAP, BF, C, P)
        if MAP != "elu1":
            at = dy + (row * T + token)[:, None] * Y + tl.arange(0, BY)[None, :]
            tl.store(at, dys, mask=held[:, None] & (tl.arange(0, BY) < Y)[None, :])
        dks = (dks + dx).to(dtype)
        store_rows(dk, dks, batch, kv_h, c, 0, token, held, dk_b, dk_h, dk_t, D, BD, C, INDEXED)
