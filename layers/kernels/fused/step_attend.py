"""The second kernel of a decoding step: ring, sinks and state are read once for the new token's queries.

The state is read at every step, but written only when the ring is full: then its oldest FOLD tokens enter at once.
Programs share a key head's value columns among them; what is not of a column, the first one writes. d is a token's
distance from the new one. Rows of a product are the queries of a key head's group; of the delta rule also the key that
has just become far, which reads what it is to replace.
"""

import triton
import triton.language as tl

from .tiles import LOG2E, LOWEST, nonzero


@triton.jit
def prefetch(x, row, size, WIDTH: tl.constexpr):
    """Ask for this program's share of x[row], `size` rows of WIDTH numbers, to be brought into the L2 cache."""
    programs = tl.num_programs(0)
    bytes = x.dtype.element_ty.primitive_bitwidth // 8
    share = tl.cdiv(size, programs)
    first = tl.program_id(0) * share
    share = tl.minimum(share, size - first)
    if (WIDTH * bytes % 16 == 0) and share > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [(x + (row * size + first) * WIDTH).to(tl.int64), (share * (WIDTH * bytes)).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def far_rows(phi_q, at_q, asks, ring_phi, at_turned, feature, turned_row, F: tl.constexpr, DELTA: tl.constexpr):
    """Features [BG, BF] of a key head's queries, and of the key that has just become far."""
    inside = feature < F
    phi = tl.load(phi_q + at_q[:, None] * F + feature[None, :], mask=asks[:, None] & inside[None, :], other=0.0)
    if DELTA:
        turned = tl.load(ring_phi + at_turned * F + feature, mask=inside, other=0.0).to(tl.float32)
        phi = tl.where(turned_row[:, None], turned[None, :], phi)
    return phi


@triton.jit
def slot_of(d, latest, R):
    """The slot of the token at distance d < R from the latest one."""
    return tl.where(d > latest, latest - d + R, latest - d)


@triton.jit
def take_in(
    state, at_oldest, folds, feature, column_v, ring_v, ring_phi, u, log_decay,
    V: tl.constexpr, F: tl.constexpr, DELTA: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A block of the state after those tokens of the ring that are to fold, in slots `at_oldest`, have entered it, in
    their order."""
    entering = folds[:, None] & (column_v < V)[None, :]
    at_value = at_oldest[:, None] * V + column_v[None, :]
    if DELTA:
        decays = tl.load(log_decay + at_oldest, mask=folds, other=0.0)
        folded = tl.sum(decays)
        value = tl.load(u + at_value, mask=entering, other=0.0)
        value *= tl.exp2((folded - tl.cumsum(decays)) * LOG2E)[:, None]
        state *= tl.exp2(folded * LOG2E)
    else:
        value = tl.load(ring_v + at_value, mask=entering, other=0.0).to(tl.float32)
    at_phi = at_oldest[None, :] * F + feature[:, None]
    old_phi = tl.load(ring_phi + at_phi, mask=folds[None, :] & (feature < F)[:, None], other=0.0)
    return tl.dot(old_phi.to(tl.float32), value, state, input_precision=P)


@triton.jit
def add_near(scores, allowed, v, m, near_sum, near_o, P: tl.constexpr):
    """The softmax goes on with scores [BG, N], to base 2, of the keys that are `allowed` [BG or 1, N], with values
    v [N, BV]."""
    scores = tl.where(allowed, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, axis=1))
    a = tl.exp2(scores - highest[:, None])
    shrunk = tl.exp2(m - highest)
    near_o = tl.dot(a.to(v.dtype), v, near_o * shrunk[:, None], input_precision=P)
    return highest, near_sum * shrunk + tl.sum(a, axis=1), near_o


@triton.jit
def scalars(gate, far_weight, h, asks, SHARED: tl.constexpr, FAR_UNIT: tl.constexpr):
    """g and lam of heads h, where they ask."""
    g = tl.full([h.shape[0]], 1.0, tl.float32)
    if gate is not None:
        g = tl.sigmoid(tl.load(gate + h, mask=asks, other=0.0))
    lam = tl.full([h.shape[0]], 1.0, tl.float32)
    if far_weight is not None:
        lam = tl.load(far_weight + h, mask=asks, other=0.0)
        if SHARED:
            lam = FAR_UNIT * tl.maximum(lam, 0.0)
    return g, lam


@triton.jit
def combined(g, near_o, near_sum, lam, far_o, far_sum, SHARED: tl.constexpr):
    if SHARED:
        o = (g[:, None] * near_o + lam[:, None] * far_o) / nonzero(g * near_sum + lam * far_sum)[:, None]
    else:
        o = near_o * (g / nonzero(near_sum))[:, None] + far_o * (lam / nonzero(far_sum))[:, None]
    return o


@triton.jit(do_not_specialize=["B"])
def attend(
    q, sink_q, phi_q, out, ring_k, ring_v, sink_k, sink_v, ring_phi, u, mass, log_decay, beta,
    S, z, clock, length, count, segment, gate, far_weight, conv, scale, B, R,
    KV: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, FEATURES: tl.constexpr, BR: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, FOLD: tl.constexpr, TAPS: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, FAR_UNIT: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr, OVERLAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program has BV value columns of one key head of one row; it goes through FEATURES of the state at a time."""
    row = tl.program_id(1).to(tl.int64)
    batch, kv_h = row // KV, row % KV
    group = tl.arange(0, BG)
    asks = group < GROUPS
    turned_row = group == GROUPS
    h = kv_h * GROUPS + group
    at_q = batch * (KV * GROUPS) + h
    column_d, column_v = tl.arange(0, BD), tl.program_id(0) * BV + tl.arange(0, BV)
    inside_d, inside_v = column_d < D, column_v < V
    asked = asks[:, None] & inside_d[None, :]
    if PREFETCH:
        prefetch(S, row, F, V)
        if WINDOW != "none":
            prefetch(ring_k, row, R, D)
        if DELTA:
            prefetch(u, row, R, V)
        prefetch(ring_v, row, R, V)
        prefetch(ring_phi, row, R, F)
        if SINKS:
            prefetch(sink_k, row, SINKS, D)
            prefetch(sink_v, row, SINKS, V)
    g, lam = scalars(gate, far_weight, h, asks, SHARED, FAR_UNIT)
    qs = tl.load(q + at_q[:, None] * D + column_d[None, :], mask=asked, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    new = tl.load(clock + batch).to(tl.int32)
    held = tl.load(clock + B + batch).to(tl.int32)
    tokens = held + 1
    full = tokens == R
    remaining = tl.where(full, R - FOLD, tokens)
    latest = new % R
    # The key that has just become far, of a sliding window; its slot where there is none as yet.
    at_turned = row * R + slot_of(W, latest, R)

    # What is in the state is far from all. The oldest tokens of a full ring enter it, in their order.
    far_o = tl.zeros([BG, BV], tl.float32)
    far_sum = tl.zeros([BG], tl.float32)
    oldest = R - 1 - tl.arange(0, FOLD)
    at_oldest = row * R + slot_of(oldest, latest, R)
    folds = oldest <= new - SINKS
    for first in range(0, BF, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        at_S = (row * F + feature)[:, None] * V + column_v[None, :]
        inside = (feature < F)[:, None] & inside_v[None, :]
        state = tl.load(S + at_S, mask=inside, other=0.0)
        if full:
            state = take_in(
                state, at_oldest, folds, feature, column_v, ring_v, ring_phi, u, log_decay, V, F, DELTA, P
            )
            tl.store(S + at_S, state, mask=inside)
        phi = far_rows(phi_q, at_q, asks, ring_phi, at_turned, feature, turned_row, F, DELTA)
        far_o = tl.dot(phi, state, far_o, input_precision=P)
        far_sum += tl.sum(phi * tl.load(z + row * F + feature, mask=feature < F, other=0.0)[None, :], axis=1)
    if DELTA:
        # What a key wrote has faded by all tokens since then, for the turned key up to this key.
        distance = tl.arange(0, BR)
        remain = distance < remaining
        all_decays = tl.load(log_decay + row * R + slot_of(distance, latest, R), mask=remain, other=0.0)
        since_turned = tl.sum(tl.where(distance < W, all_decays, 0.0))
        before_row = tl.where(turned_row, since_turned, 0.0)
        faded = tl.exp2((tl.sum(all_decays) - before_row) * LOG2E)
        far_o *= faded[:, None]
        far_sum *= faded

    # Near tokens, and the convolution.
    m = tl.full([BG], LOWEST, tl.float32)
    near_sum = tl.zeros([BG], tl.float32)
    near_o = tl.zeros([BG, BV], tl.float32)
    conv_o = tl.zeros([BG, BV], tl.float32)
    if WINDOW == "sliding":
        near = tl.full([], W, tl.int32)
    elif WINDOW == "block":
        near = new % W + 1
    elif WINDOW == "terrace":
        near = new % W + W + 1
    else:
        near = tl.full([], 0, tl.int32)
    for first in range(0, tl.minimum(tl.maximum(near, TAPS), tokens), BLOCK):
        d = first + tl.arange(0, BLOCK)
        at = row * R + slot_of(d, latest, R)
        here = d < tokens
        is_near = here & (d < near) & (d <= new - SINKS)
        k = tl.load(ring_k + at[:, None] * D + column_d[None, :], mask=is_near[:, None] & inside_d[None, :], other=0.0)
        v = tl.load(ring_v + at[:, None] * V + column_v[None, :], mask=here[:, None] & inside_v[None, :], other=0.0)
        if WINDOW != "none":
            scores = tl.dot(qs, tl.trans(k), input_precision=P) * (scale * LOG2E)
            m, near_sum, near_o = add_near(scores, is_near[None, :], v, m, near_sum, near_o, P)
        if TAPS:
            is_tap = asks[:, None] & (here & (d < TAPS))[None, :]
            taps = tl.load(conv + h[:, None] * TAPS + d[None, :], mask=is_tap, other=0.0)
            conv_o = tl.dot(taps.to(v.dtype), v, conv_o, input_precision=P)
    if SINKS:
        position = tl.arange(0, BS)
        here = (position < SINKS) & (position <= new)
        at_sink = (row * SINKS + position)[:, None]
        k = tl.load(sink_k + at_sink * D + column_d[None, :], mask=here[:, None] & inside_d[None, :], other=0.0)
        v = tl.load(sink_v + at_sink * V + column_v[None, :], mask=here[:, None] & inside_v[None, :], other=0.0)
        qs = tl.load(sink_q + at_q[:, None] * D + column_d[None, :], mask=asked, other=0.0)
        scores = tl.dot(qs, tl.trans(k), input_precision=P) * (scale * LOG2E)
        m, near_sum, near_o = add_near(scores, here[None, :], v, m, near_sum, near_o, P)

    # Far tokens that are still in the ring.
    feature = tl.arange(0, BF)
    phi = far_rows(phi_q, at_q, asks, ring_phi, at_turned, feature, turned_row, F, DELTA)
    phi = phi.to(ring_phi.dtype.element_ty)
    if DELTA:
        since = since_turned
        b_turned = tl.zeros([BG], tl.float32)
    for first in range(near, remaining, BLOCK):
        d = first + tl.arange(0, BLOCK)
        at = row * R + slot_of(d, latest, R)
        is_far = (d < remaining) & (d <= new - SINKS)
        keys = tl.load(
            ring_phi + at[:, None] * F + feature[None, :], mask=is_far[:, None] & (feature < F)[None, :], other=0.0
        )
        b = tl.dot(phi, tl.trans(keys), input_precision=P)
        b = tl.where(is_far[None, :], b, 0.0)
        values = is_far[:, None] & inside_v[None, :]
        if DELTA:
            far_decays = tl.load(log_decay + at, mask=is_far, other=0.0)
            before = since + tl.cumsum(far_decays) - far_decays
            since += tl.sum(far_decays)
            b *= tl.exp2((before[None, :] - before_row[:, None]) * LOG2E)
            b_turned += tl.sum(tl.where((d == W)[None, :], b, 0.0), axis=1)
            b = tl.where((d == W)[None, :], 0.0, b)
            values &= (d > W)[:, None]
            far_sum += tl.sum(b * tl.load(mass + at, mask=is_far & (d > W), other=0.0)[None, :], axis=1)
            left = tl.load(u + at[:, None] * V + column_v[None, :], mask=values, other=0.0)
            far_o = tl.dot(b, left, far_o, input_precision=P)
        else:
            far_sum += tl.sum(b, axis=1)
            left = tl.load(ring_v + at[:, None] * V + column_v[None, :], mask=values, other=0.0)
            far_o = tl.dot(b.to(left.dtype), left, far_o, input_precision=P)
    if DELTA:
        strength = tl.load(beta + at_turned)
        v_turned = tl.load(ring_v + at_turned * V + column_v, mask=inside_v, other=0.0).to(tl.float32)
        u_turned = strength * (v_turned - tl.sum(tl.where(turned_row[:, None], far_o, 0.0), axis=0))
        mass_turned = strength * (1.0 - tl.sum(tl.where(turned_row, far_sum, 0.0)))
        if (tokens > W) & (new - W >= SINKS):
            tl.store(u + at_turned * V + column_v, u_turned, mask=inside_v)
            tl.store(mass + at_turned, mass_turned, mask=tl.program_id(0) == 0)
        far_o += b_turned[:, None] * u_turned[None, :]
        # What the rule corrects may overshoot; a denominator must not.
        far_sum = tl.maximum(far_sum + b_turned * mass_turned, 0.0)

    o = combined(g, near_o, near_sum, lam, far_o, far_sum, SHARED)
    at_o = at_q[:, None] * V + column_v[None, :]
    tl.store(out + at_o, (o + conv_o).to(out.dtype.element_ty), mask=asks[:, None] & inside_v[None, :])
    if (tl.program_id(0) == 0) & (kv_h == 0):
        tl.store(length + batch, new + 1)
        tl.store(count + batch, remaining)
        tl.store(segment + batch, 1)
