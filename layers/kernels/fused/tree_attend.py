"""The second kernel of a draft tree's verification: ring, sinks, state and tree, for all queries of a key head.

As in a step, but rows of products are queries of nodes, and nothing moves. d is a token's distance from the roots, so
that a query of depth e is d + e from it; a verified token has d > 0, a node d = -depth.
"""

import triton
import triton.language as tl

from .step_attend import add_near, combined, prefetch, scalars, slot_of
from .tiles import LOG2E, LOWEST
from .tree_enter import depths, on_path


@triton.jit
def taps_of(conv, h, distance, is_tap, TAPS: tl.constexpr):
    """The convolution's weights [BQ, N] at `distance`, zero where not `is_tap`."""
    is_tap &= (distance >= 0) & (distance < TAPS)
    return tl.load(conv + h[:, None] * TAPS + distance, mask=is_tap, other=0.0)


@triton.jit(do_not_specialize=["T"])
def attend(
    q, sink_q, k, v, phi_q, phi_k, node_decay, ancestors, out,
    ring_k, ring_v, sink_k, sink_v, ring_phi, u, mass, log_decay, S, z, length, count, gate, far_weight, conv, scale,
    q_b, q_h, q_t, sink_q_b, sink_q_h, sink_q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, T, R,
    KV: tl.constexpr, GROUPS: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, FEATURES: tl.constexpr, BR: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, TAPS: tl.constexpr, REACH: tl.constexpr, W: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, FAR_UNIT: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr, OVERLAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program has BQ queries of one key head of one row, of its GROUPS query heads one after the other, and BV value
    columns. Verified tokens further than REACH from the roots are neither near nor convolved."""
    row = tl.program_id(2).to(tl.int64)
    batch, kv_h = row // KV, row % KV
    query = tl.program_id(1) * BQ + tl.arange(0, BQ)
    asks = query < GROUPS * T
    node = query % T
    h = kv_h * GROUPS + query // T
    column_d, column_v = tl.arange(0, BD), tl.program_id(0) * BV + tl.arange(0, BV)
    inside_d, inside_v = column_d < D, column_v < V
    asked = asks[:, None] & inside_d[None, :]
    if PREFETCH and tl.program_id(1) == 0:
        prefetch(S, row, F, V)
        if WINDOW != "none":
            prefetch(ring_k, row, R, D)
        prefetch(ring_v, row, R, V)
        prefetch(ring_phi, row, R, F)
    to_q = q + batch * q_b + h[:, None].to(tl.int64) * q_h + node[:, None] * q_t + column_d[None, :]
    qs = tl.load(to_q, mask=asked, other=0.0)
    to_q = sink_q + batch * sink_q_b + h[:, None].to(tl.int64) * sink_q_h + node[:, None] * sink_q_t + column_d[None, :]
    new = tl.load(length + batch).to(tl.int32)
    held = tl.load(count + batch).to(tl.int32)
    latest = new % R
    e = depths(ancestors, node, T)
    # Tokens at this distance from the roots and further are far.
    if WINDOW == "sliding":
        turned = W - e
    elif WINDOW == "block":
        turned = (new + e) % W + 1 - e
    elif WINDOW == "terrace":
        turned = (new + e) % W + W + 1 - e
    else:
        turned = -e

    # Near tokens, and the convolution.
    m = tl.full([BQ], LOWEST, tl.float32)
    near_sum = tl.zeros([BQ], tl.float32)
    near_o = tl.zeros([BQ, BV], tl.float32)
    conv_o = tl.zeros([BQ, BV], tl.float32)
    for first in range(1, tl.minimum(REACH, held) + 1, BLOCK):
        d = first + tl.arange(0, BLOCK)
        at = row * R + slot_of(d, latest, R)
        here = d <= held
        values = tl.load(
            ring_v + at[:, None] * V + column_v[None, :], mask=here[:, None] & inside_v[None, :], other=0.0
        )
        if WINDOW != "none":
            body = here & (d <= new - SINKS)
            keys = tl.load(
                ring_k + at[:, None] * D + column_d[None, :], mask=body[:, None] & inside_d[None, :], other=0.0
            )
            scores = tl.dot(qs, tl.trans(keys), input_precision=P) * (scale * LOG2E)
            is_near = body[None, :] & (d[None, :] < turned[:, None])
            m, near_sum, near_o = add_near(scores, is_near, values, m, near_sum, near_o, P)
        if TAPS:
            taps = taps_of(conv, h, d[None, :] + e[:, None], asks[:, None] & here[None, :], TAPS)
            conv_o = tl.dot(taps.to(values.dtype), values, conv_o, input_precision=P)

    # The node itself and its ancestors: not loaded ahead, which would take more registers than there are.
    for first in tl.range(0, T, BLOCK, num_stages=1):
        other = first + tl.arange(0, BLOCK)
        exists = other < T
        seen = on_path(ancestors, node, other, asks, T) != 0
        d = -depths(ancestors, other, T)
        is_sink = (new - d < SINKS)[None, :]
        to_v = v + batch * v_b + kv_h * v_h + other[:, None] * v_t + column_v[None, :]
        values = tl.load(to_v, mask=exists[:, None] & inside_v[None, :], other=0.0)
        if WINDOW != "none":
            to_k = k + batch * k_b + kv_h * k_h + other[:, None] * k_t + column_d[None, :]
            keys = tl.load(to_k, mask=exists[:, None] & inside_d[None, :], other=0.0)
            scores = tl.dot(qs, tl.trans(keys), input_precision=P) * (scale * LOG2E)
            if SINKS > 0 and new < SINKS:
                as_sink = tl.dot(tl.load(to_q, mask=asked, other=0.0), tl.trans(keys), input_precision=P)
                scores = tl.where(is_sink, as_sink * (scale * LOG2E), scores)
            is_near = seen & (is_sink | (d[None, :] < turned[:, None]))
            m, near_sum, near_o = add_near(scores, is_near, values, m, near_sum, near_o, P)
        if TAPS:
            taps = taps_of(conv, h, d[None, :] + e[:, None], seen, TAPS)
            conv_o = tl.dot(taps.to(values.dtype), values, conv_o, input_precision=P)
    if SINKS:
        position = tl.arange(0, BS)
        there = (position < SINKS) & (position < new)
        at_sink = (row * SINKS + position)[:, None]
        first_k = tl.load(sink_k + at_sink * D + column_d[None, :], mask=there[:, None] & inside_d[None, :], other=0.0)
        first_v = tl.load(sink_v + at_sink * V + column_v[None, :], mask=there[:, None] & inside_v[None, :], other=0.0)
        scores = tl.dot(tl.load(to_q, mask=asked, other=0.0), tl.trans(first_k), input_precision=P) * (scale * LOG2E)
        m, near_sum, near_o = add_near(scores, there[None, :], first_v, m, near_sum, near_o, P)

    # What is not known before the first kernel has ended.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

    # What is in the state is far from all.
    far_o = tl.zeros([BQ, BV], tl.float32)
    far_sum = tl.zeros([BQ], tl.float32)
    at_phi = (row * (GROUPS * T) + query)[:, None] * F
    for first in range(0, BF, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside_f = feature < F
        to_S = S + (row * F + feature)[:, None] * V + column_v[None, :]
        state = tl.load(to_S, mask=inside_f[:, None] & inside_v[None, :], other=0.0)
        phi = tl.load(phi_q + at_phi + feature[None, :], mask=asks[:, None] & inside_f[None, :], other=0.0)
        phi = phi.to(tl.float32)
        far_o = tl.dot(phi, state, far_o, input_precision=P)
        far_sum += tl.sum(phi * tl.load(z + row * F + feature, mask=inside_f, other=0.0)[None, :], axis=1)
    first_far = tl.maximum(tl.min(turned, axis=0), 1)
    if DELTA:
        distance = 1 + tl.arange(0, BR)
        all_decays = tl.load(log_decay + row * R + slot_of(distance, latest, R), mask=distance <= held, other=0.0)
        faded = tl.exp2(tl.sum(all_decays) * LOG2E)
        far_o *= faded
        far_sum *= faded
        since = tl.sum(tl.where(distance < first_far, all_decays, 0.0))

    # Far tokens that are still in the ring.
    feature = tl.arange(0, BF)
    inside_f = (feature < F)[None, :]
    phi = tl.load(phi_q + at_phi + feature[None, :], mask=asks[:, None] & inside_f, other=0.0)
    for first in range(first_far, held + 1, BLOCK):
        d = first + tl.arange(0, BLOCK)
        at = row * R + slot_of(d, latest, R)
        here = (d <= held) & (d <= new - SINKS)
        keys = tl.load(ring_phi + at[:, None] * F + feature[None, :], mask=here[:, None] & inside_f, other=0.0)
        b = tl.dot(phi, tl.trans(keys), input_precision=P)
        b = tl.where(here[None, :] & (d[None, :] >= turned[:, None]), b, 0.0)
        values = here[:, None] & inside_v[None, :]
        if DELTA:
            decays = tl.load(log_decay + at, mask=here, other=0.0)
            b *= tl.exp2((since + tl.cumsum(decays) - decays) * LOG2E)[None, :]
            since += tl.sum(decays)
            far_sum += tl.sum(b * tl.load(mass + at, mask=here, other=0.0)[None, :], axis=1)
            left = tl.load(u + at[:, None] * V + column_v[None, :], mask=values, other=0.0)
            far_o = tl.dot(b, left, far_o, input_precision=P)
        else:
            far_sum += tl.sum(b, axis=1)
            left = tl.load(ring_v + at[:, None] * V + column_v[None, :], mask=values, other=0.0)
            far_o = tl.dot(b.to(left.dtype), left, far_o, input_precision=P)

    # Nodes are near to each other by the delta rule, but what is in the past fades on the way to each.
    path = tl.zeros([BQ], tl.float32)
    for first in tl.range(0, T, BLOCK, num_stages=1):
        other = first + tl.arange(0, BLOCK)
        exists = other < T
        seen = on_path(ancestors, node, other, asks, T) != 0
        at = row * T + other
        if DELTA:
            path += tl.sum(tl.where(seen, tl.load(node_decay + at, mask=exists, other=0.0)[None, :], 0.0), axis=1)
        else:
            d = -depths(ancestors, other, T)
            keys = tl.load(phi_k + at[:, None] * F + feature[None, :], mask=exists[:, None] & inside_f, other=0.0)
            is_far = seen & (d[None, :] >= turned[:, None]) & (new - d >= SINKS)[None, :]
            b = tl.where(is_far, tl.dot(phi, tl.trans(keys), input_precision=P), 0.0)
            far_sum += tl.sum(b, axis=1)
            to_v = v + batch * v_b + kv_h * v_h + other[:, None] * v_t + column_v[None, :]
            values = tl.load(to_v, mask=exists[:, None] & inside_v[None, :], other=0.0)
            far_o = tl.dot(b.to(values.dtype), values, far_o, input_precision=P)
    if DELTA:
        faded = tl.exp2(path * LOG2E)
        far_o *= faded[:, None]
        # What the rule corrects may overshoot; a denominator must not.
        far_sum = tl.maximum(far_sum * faded, 0.0)

    g, lam = scalars(gate, far_weight, h, asks, SHARED, FAR_UNIT)
    o = combined(g, near_o, near_sum, lam, far_o, far_sum, SHARED)
    to_o = out + batch * out_b + h[:, None] * out_h + node[:, None] * out_t + column_v[None, :]
    tl.store(to_o, (o + conv_o).to(out.dtype.element_ty), mask=asks[:, None] & inside_v[None, :])
