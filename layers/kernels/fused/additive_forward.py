"""Forward with an additive state, and the walk over chunks that both directions need.

Chunks are cut into segments. A program walks those of one segment with the state X = [S, z] on chip, which at chunk c
holds the keys of chunks before c - DELAY:

    X <- carries_c X        chunk c looks at X
    X <- X + phi_k^T [v, 1] of chunk c - DELAY

`scan` finds beforehand what each segment adds, so that segments need not wait for each other.
"""

import triton
import triton.language as tl

from .tiles import (
    COPIES,
    LOG2E,
    LOWEST,
    SIZES,
    band_of,
    carry_of,
    far_weights,
    features_of,
    joined,
    load_rows,
    near_and_far,
    nonzero,
    projection,
    slots_of,
    store_rows,
)


@triton.jit
def _start(
    S, z, kept, initial_S, initial_z, row, rows, batch, B, segment, begin, step,
    first, HAS_STATE: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, VALUES: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """X before segment `segment` from what the segments from `begin` on, in steps of `step`, have added; BV of VALUES
    columns from `first` on."""
    feature = tl.arange(0, BF)[:, None]
    at = feature * VALUES + first + tl.arange(0, BV)[None, :]
    at_z = feature + tl.zeros([1, COPIES], tl.int32)
    if HAS_STATE:
        X = tl.load(initial_S + row * BF * VALUES + at)
        Z = tl.load(initial_z + row * BF + at_z)
    else:
        X = tl.zeros([BF, BV], tl.float32)
        Z = tl.zeros([BF, COPIES], tl.float32)
    for i in range((segment - begin) * step):
        s = begin + i * step
        part = s * rows + row
        if INDEXED:
            keep = tl.load(kept + s * B + batch)
            X = X * keep
            Z = Z * keep
        X += tl.load(S + part * BF * VALUES + at)
        Z += tl.load(z + part * BF + at_z)
    return X, Z


@triton.jit
def _ones(held, dtype: tl.constexpr):
    """[C, COPIES], 1 where a token is held, else 0."""
    return (held[:, None].to(tl.float32) + tl.zeros([1, COPIES], tl.float32)).to(dtype)


@triton.jit
def _phi_transposed(
    x, weight, bias, MAP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
    """[BF, C], as products of features and values take them."""
    if MAP == "elu1":
        phi = tl.trans(features_of(x, weight, bias, MAP, F, BF, C, P))
    elif MAP == "t2r":
        phi = tl.maximum(tl.dot(tl.trans(weight), tl.trans(x), input_precision=P) + bias[:, None], 0.0)
    else:
        both = tl.reshape(tl.join(weight, -weight), (weight.shape[0], BF))
        y = tl.reshape(tl.dot(tl.trans(both), tl.trans(x), input_precision=P), (BF // 2, 2, C))
        if F != BF:
            y = tl.where(tl.arange(0, BF // 2)[:, None, None] < F // 2, y, float("-inf"))
        y = tl.exp2(y * LOG2E - tl.max(y, axis=0, keep_dims=True) * LOG2E)
        phi = tl.reshape(y * (1.0 / tl.sum(y, axis=0, keep_dims=True)), (BF, C))
    return phi


@triton.jit(do_not_specialize=SIZES)
def scan(
    x, y, W, b, far, mass, centre, S, z, kept, initial_S, initial_z, states, state_sums, source, carries, follows,
    x_b, x_h, x_t, y_b, y_h, y_t, B, H, T, past, n, span,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
    DELAY: tl.constexpr, REVERSE: tl.constexpr, WRITE: tl.constexpr, HAS_STATE: tl.constexpr, INDEXED: tl.constexpr,
    P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """X over a segment, from the features of k and [v, 1]; in REVERSE dX, from those of q, times [wb do, -wb centre].
    Heads of x and y are GROUPS to one of X. Without WRITE what the segment adds is stored; with it, X as the queries of
    each chunk see it, or dX as its keys do."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = H // GROUPS
    batch, head = row // heads, row % heads
    chunks = batch * n
    if WRITE:
        if REVERSE:
            X, Z = _start(
                S, z, kept, S, z, row, tl.num_programs(0), batch, B, segment, tl.num_programs(1) - 1, -1, 0,
                False, BF, BV, BV, INDEXED,
            )  # fmt: skip
        else:
            X, Z = _start(
                S, z, kept, initial_S, initial_z, row, tl.num_programs(0), batch, B, segment, 0, 1, 0,
                HAS_STATE, BF, BV, BV, INDEXED,
            )  # fmt: skip
    else:
        X = tl.zeros([BF, BV], tl.float32)
        Z = tl.zeros([BF, COPIES], tl.float32)
        if REVERSE:
            segment += 1  # nothing comes before the first
    keep = 1.0
    if GROUPS == 1:
        weight, bias = projection(W, b, head, MAP, D, BD, Y, BY)
    for step in range(span * GROUPS):
        c = segment * span + step // GROUPS
        at = c - DELAY
        if REVERSE:
            c = segment * span + span - 1 - step // GROUPS + DELAY
            at = c
        h = head * GROUPS + step % GROUPS
        if GROUPS > 1:
            weight, bias = projection(W, b, h, MAP, D, BD, Y, BY)
        token, held = slots_of(source, chunks, at, n, T, C, INDEXED)
        if INDEXED:
            carry = carry_of(carries, chunks, c, n)
            if not REVERSE:
                keep = keep * carry
                X = X * carry
                Z = Z * carry
                if DELAY:
                    held = joined(held, follows, chunks, c, n, INDEXED)
        if WRITE:
            # The chunk whose queries, or in REVERSE whose keys, look at X.
            seen = c - DELAY if REVERSE else c
            if (step % GROUPS == 0) & (seen < n):
                place = ((row * n + seen) * BF).to(tl.int32)
                states.store([place, 0], X.to(dtype))
                tl.store(state_sums + place + tl.arange(0, BF), tl.sum(Z, axis=1) / COPIES)
        held = held & (token >= past)
        xs = load_rows(x, batch, h, at, 0, token - past, held, x_b, x_h, x_t, D, BD, C, INDEXED)
        ys = load_rows(y, batch, h, at, 0, token - past, held, y_b, y_h, y_t, V, BV, C, INDEXED)
        phi = _phi_transposed(xs, weight, bias, MAP, F, BF, C, P)
        if REVERSE:
            at_row = (batch * H + h) * (T - past) - past + token
            wb = tl.load(far + h) / tl.load(mass + at_row, mask=held, other=1.0)
            middle = tl.load(centre + at_row, mask=held, other=0.0)
            phi = phi * wb[None, :]
            ones = -middle[:, None] + tl.zeros([1, COPIES], tl.float32)
        else:
            ones = _ones(held, tl.float32)
        phi = phi.to(dtype)
        X = tl.dot(phi, ys, X, input_precision=P)
        Z = tl.dot(phi, ones.to(dtype), Z, input_precision=P)
        if INDEXED and REVERSE:
            # After the last head of a chunk.
            carry = tl.where(step % GROUPS == GROUPS - 1, carry, 1.0)
            keep = keep * carry
            X = X * carry
            Z = Z * carry
    if not WRITE:
        place = segment * tl.num_programs(0) + row
        feature = tl.arange(0, BF)
        tl.store(S + place * BF * BV + feature[:, None] * BV + tl.arange(0, BV)[None, :], X)
        tl.store(z + place * BF + feature, tl.sum(Z, axis=1) / COPIES)
        if INDEXED:
            tl.store(kept + segment * B + batch, keep)


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, out, W_q, b_q, W_k, b_k, near_weight, far_weight, conv, S, z, kept, initial_S, initial_z,
    lse, mass, top, source, carries, follows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, B, H, T, past, n, span, scale,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, VALUES: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    W: tl.constexpr, WINDOW: tl.constexpr, OWN_FAR: tl.constexpr, PREVIOUS_NEAR: tl.constexpr,
    PREVIOUS_FAR: tl.constexpr, MAP: tl.constexpr, SHARED: tl.constexpr, HAS_STATE: tl.constexpr, INDEXED: tl.constexpr,
    P: tl.constexpr, dtype: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    DELAY: tl.constexpr = PREVIOUS_NEAR
    PREVIOUS: tl.constexpr = PREVIOUS_NEAR or TAPS > 1
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, h = row // H, row % H
    kv_h = h // GROUPS
    chunks = batch * n
    column = tl.program_id(2) * BV
    g = tl.load(near_weight + h).to(tl.float32)
    lam = tl.load(far_weight + h).to(tl.float32)
    weight_q, bias_q = projection(W_q, b_q, h, MAP, D, BD, Y, BY)
    weight_k, bias_k = projection(W_k, b_k, kv_h, MAP, D, BD, Y, BY)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if TAPS:
        band = band_of(conv, h, C, TAPS, dtype)
        band_own = tl.where(j <= i, band, 0.0).to(dtype)
        band_before = tl.where(j > i, band, 0.0).to(dtype)
    X, Z = _start(
        S, z, kept, initial_S, initial_z, batch * (H // GROUPS) + kv_h, B * (H // GROUPS), batch, B, segment, 0, 1,
        column, HAS_STATE, BF, BV, VALUES, INDEXED,
    )  # fmt: skip
    for c in range(segment * span, tl.minimum(segment * span + span, n)):
        token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
        asks = held & (token >= past)
        qs = load_rows(q, batch, h, c, 0, token - past, asks, q_b, q_h, q_t, D, BD, C, INDEXED)
        ks = load_rows(k, batch, kv_h, c, 0, token, held, k_b, k_h, k_t, D, BD, C, INDEXED)
        if INDEXED:
            carry = carry_of(carries, chunks, c, n)
            X = X * carry
            Z = Z * carry
        if PREVIOUS:
            token_b, held_b = slots_of(source, chunks, c - 1, n, T, C, INDEXED)
            held_b = joined(held_b, follows, chunks, c, n, INDEXED)
        if PREVIOUS_NEAR:
            ks_b = load_rows(k, batch, kv_h, c - 1, 0, token_b, held_b, k_b, k_h, k_t, D, BD, C, INDEXED)

        # Far: from the state, and keys in hand that are not near.
        phi_q = features_of(qs, weight_q, bias_q, MAP, F, BF, C, P).to(dtype)
        far_sum = tl.sum(tl.dot(phi_q, Z.to(dtype), input_precision=P), axis=1) / COPIES
        o = tl.dot(phi_q, X.to(dtype), input_precision=P)
        visible = j <= i
        if INDEXED:
            visible = visible & held[None, :]
        is_near, is_far = near_and_far(visible, i, j, W, WINDOW, WINDOW != "none", OWN_FAR)
        if OWN_FAR or not DELAY:
            phi_k = features_of(ks, weight_k, bias_k, MAP, F, BF, C, P).to(dtype)
        if DELAY:
            phi_b = features_of(ks_b, weight_k, bias_k, MAP, F, BF, C, P).to(dtype)
            is_near_b, is_far_b = near_and_far(held_b[None, :] & (j >= 0), i + C, j, W, WINDOW, True, PREVIOUS_FAR)
        # Near.
        near_sum = tl.zeros([C], tl.float32)
        m = tl.full([C], LOWEST, tl.float32)
        if WINDOW != "none":
            a = tl.dot(qs, tl.trans(ks), input_precision=P) * (scale * LOG2E)
            a = tl.where(is_near, a, float("-inf"))
            m = tl.maximum(m, tl.max(a, axis=1))
        if PREVIOUS_NEAR:
            a_b = tl.dot(qs, tl.trans(ks_b), input_precision=P) * (scale * LOG2E)
            a_b = tl.where(is_near_b, a_b, float("-inf"))
            m = tl.maximum(m, tl.max(a_b, axis=1))
        if WINDOW != "none":
            a = tl.exp2(a - m[:, None])
            near_sum += tl.sum(a, axis=1)
        if PREVIOUS_NEAR:
            a_b = tl.exp2(a_b - m[:, None])
            near_sum += tl.sum(a_b, axis=1)

        # Values come last: their room was that of queries.
        vs = load_rows(v, batch, kv_h, c, column, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
        if PREVIOUS:
            vs_b = load_rows(v, batch, kv_h, c - 1, column, token_b, held_b, v_b, v_h, v_t, V, BV, C, INDEXED)
        if OWN_FAR:
            f = far_weights(phi_q, phi_k, is_far, P)
            far_sum += tl.sum(f, axis=1)
            o = tl.dot(f.to(dtype), vs, o, input_precision=P)
        if PREVIOUS_FAR:
            f = far_weights(phi_q, phi_b, is_far_b, P)
            far_sum += tl.sum(f, axis=1)
            o = tl.dot(f.to(dtype), vs_b, o, input_precision=P)
        if DELAY:
            X = tl.dot(tl.trans(phi_b), vs_b, X, input_precision=P)
            Z = tl.dot(tl.trans(phi_b), _ones(held_b, dtype), Z, input_precision=P)
        else:
            X = tl.dot(tl.trans(phi_k), vs, X, input_precision=P)
            Z = tl.dot(tl.trans(phi_k), _ones(held, dtype), Z, input_precision=P)

        if SHARED:
            far_sum = nonzero(g * near_sum + lam * far_sum)
            near_sum = far_sum
        else:
            near_sum = nonzero(near_sum)
            far_sum = nonzero(far_sum)
        wa = g / near_sum
        o = o * (lam / far_sum)[:, None]
        if WINDOW != "none":
            a = (a * wa[:, None]).to(dtype)
            if TAPS:
                a += band_own
            o = tl.dot(a, vs, o, input_precision=P)
        elif TAPS:
            o = tl.dot(band_own, vs, o, input_precision=P)
        if PREVIOUS_NEAR:
            a_b = (a_b * wa[:, None]).to(dtype)
            if TAPS > 1:
                a_b += band_before
            o = tl.dot(a_b, vs_b, o, input_precision=P)
        elif TAPS > 1:
            o = tl.dot(band_before, vs_b, o, input_precision=P)
        store_rows(out, o.to(dtype), batch, h, c, column, token - past, asks, o_b, o_h, o_t, V, BV, C, INDEXED)
        if STORE and tl.program_id(2) == 0:
            at_row = row * (T - past) - past + token
            tl.store(lse + at_row, m + tl.log2(near_sum), mask=asks)
            tl.store(mass + at_row, far_sum, mask=asks)
            if SHARED:
                tl.store(top + at_row, m, mask=asks)
