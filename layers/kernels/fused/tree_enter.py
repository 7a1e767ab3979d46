"""The first kernel of a draft tree's verification: what its nodes are to the far branch, and what far keys say that are
near to the next token, but not to deeper nodes.

By the delta rule a token leaves u, which steps work out when it becomes far. A path of nodes makes more tokens far, one
per node: `turn` works out theirs, from the latest past of which u is known on. u does not depend on the tree and goes
where steps keep it, so what is accepted later finds u of all that it has made far.
"""

import triton
import triton.language as tl

from .gated_state import invert
from .step_attend import slot_of
from .step_enter import features, gates_of
from .tiles import LOG2E

# Keys that `turn` takes at once: the fewest that tensor cores take, and more than most trees are deep.
TURNED = tl.constexpr(16)


@triton.jit
def on_path(ancestors, node, other, asks, T):
    """[nodes, others] 1 where a node that asks is the other one or comes after it, else 0."""
    mask = asks[:, None] & (other < T)[None, :]
    return tl.load(ancestors + node[:, None] * T + other[None, :], mask=mask, other=0)


@triton.jit
def depths(ancestors, node, T):
    """How many ancestors each node has; -1 where there is none."""
    found = tl.full([node.shape[0]], -1, tl.int32)
    for first in tl.range(0, T, 64, num_stages=1):
        path = on_path(ancestors, node, first + tl.arange(0, 64), node < T, T)
        found += tl.sum(path.to(tl.int32), axis=1)
    return found


@triton.jit
def turn(
    row, columns, ancestors, ring_v, ring_phi, u, mass, log_decay, beta, S, z, new, held, T, R,
    V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, FEATURES: tl.constexpr,
    BR: tl.constexpr, SINKS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u of the keys at distances from W, the nearest that is far to a root, down to the nearest that is far to the
    deepest node, for a block of value columns; d is the distance from the roots."""
    deepest = tl.full([], 0, tl.int32)
    for first in range(0, T, BLOCK):
        deepest = tl.maximum(deepest, tl.max(depths(ancestors, first + tl.arange(0, BLOCK), T), axis=0))
    column_v = columns * BV + tl.arange(0, BV)
    inside_v = column_v < V
    latest = new % R
    distance = 1 + tl.arange(0, BR)
    all_decays = tl.load(log_decay + row * R + slot_of(distance, latest, R), mask=distance <= held, other=0.0)
    whole_feature = tl.arange(0, BF)
    for nearest in range(W, W - 1 - deepest, -TURNED):
        d = nearest - tl.arange(0, TURNED)
        turns = (d >= 1) & (d <= held) & (d <= new - SINKS)
        at = row * R + slot_of(d, latest, R)
        since = tl.sum(tl.where(distance[None, :] < d[:, None], all_decays[None, :], 0.0), axis=1)
        # What is stored under these keys: in the state,
        read = tl.zeros([TURNED, BV], tl.float32)
        read_sum = tl.zeros([TURNED], tl.float32)
        for first in range(0, BF, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            inside_f = feature < F
            state = tl.load(
                S + (row * F + feature)[:, None] * V + column_v[None, :],
                mask=inside_f[:, None] & inside_v[None, :], other=0.0,
            )  # fmt: skip
            to_phi = ring_phi + at[:, None] * F + feature[None, :]
            phi = tl.load(to_phi, mask=turns[:, None] & inside_f[None, :], other=0.0).to(tl.float32)
            read = tl.dot(phi, state, read, input_precision=P)
            read_sum += tl.sum(phi * tl.load(z + row * F + feature, mask=inside_f, other=0.0)[None, :], axis=1)
        faded = tl.exp2((tl.sum(all_decays) - since) * LOG2E)
        read *= faded[:, None]
        read_sum *= faded
        # by earlier keys in the ring,
        whole = (whole_feature < F)[None, :]
        phi = tl.load(ring_phi + at[:, None] * F + whole_feature[None, :], mask=turns[:, None] & whole, other=0.0)
        since_key = tl.sum(tl.where(distance <= nearest, all_decays, 0.0))
        for first in range(nearest + 1, held + 1, BLOCK):
            d_key = first + tl.arange(0, BLOCK)
            at_key = row * R + slot_of(d_key, latest, R)
            earlier = (d_key <= held) & (d_key <= new - SINKS)
            to_phi = ring_phi + at_key[:, None] * F + whole_feature[None, :]
            keys = tl.load(to_phi, mask=earlier[:, None] & whole, other=0.0)
            decays = tl.load(log_decay + at_key, mask=earlier, other=0.0)
            before = since_key + tl.cumsum(decays) - decays
            since_key += tl.sum(decays)
            b = tl.dot(phi, tl.trans(keys), input_precision=P)
            b = tl.where(earlier[None, :], b * tl.exp2((before[None, :] - since[:, None]) * LOG2E), 0.0)
            left = tl.load(
                u + at_key[:, None] * V + column_v[None, :], mask=earlier[:, None] & inside_v[None, :], other=0.0
            )
            read = tl.dot(b, left, read, input_precision=P)
            read_sum += tl.sum(b * tl.load(mass + at_key, mask=earlier, other=0.0)[None, :], axis=1)
        # and by each other.
        strength = tl.load(beta + at, mask=turns, other=0.0)
        later = d[:, None] < d[None, :]
        b = tl.dot(phi, tl.trans(phi), input_precision=P)
        b *= tl.exp2(tl.where(later, since[None, :] - since[:, None], 0.0) * LOG2E)
        solve = invert(tl.where(later, b * strength[:, None], 0.0), TURNED, "tf32x3" if P == "tf32" else P)
        to_v = ring_v + at[:, None] * V + column_v[None, :]
        values = turns[:, None] & inside_v[None, :]
        v = tl.load(to_v, mask=values, other=0.0).to(tl.float32)
        turned = tl.dot(solve, strength[:, None] * (v - read), input_precision=P)
        tl.store(u + at[:, None] * V + column_v[None, :], turned, mask=values)
        if columns == 0:
            tl.store(mass + at, tl.sum(solve * (strength * (1.0 - read_sum))[None, :], axis=1), mask=turns)
        # The next keys read these.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["H", "T"])
def enter(
    content_q, content_k, phi_q, phi_k, node_decay, node_beta, ancestors,
    W_q, b_q, W_k, b_k, lam_query, W_gate, b_gate,
    ring_v, ring_phi, u, mass, log_decay, beta, S, z, length, count, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, H, T, R,
    KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, FEATURES: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, BR: tl.constexpr,
    SINKS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr, DELTA: tl.constexpr,
    TURNING: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of each row of the batch the first TURNING programs turn keys; the others have ROWS nodes of one query head, or
    of one key head."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    task, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    new = tl.load(length + batch).to(tl.int32)
    if task >= TURNING:
        head = task - TURNING
        node = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = node < T
        column_d, column_y = tl.arange(0, BD), tl.arange(0, BY)
        mask_d = inside[:, None] & (column_d < D)[None, :]
        mask_y = inside[:, None] & (column_y < Y)[None, :]
        factor = tl.full([ROWS], 1.0, tl.float32)
        if head < H:
            to_x = content_q + batch * q_b + head * q_h + node[:, None].to(tl.int64) * q_t + column_d[None, :]
            x = tl.load(to_x, mask=mask_d, other=0.0)
            if lam_query is not None:
                w = tl.load(lam_query + head * D + column_d, mask=column_d < D, other=0.0)
                factor = tl.exp2(tl.sum(x.to(tl.float32) * w[None, :], axis=1) * (scale * LOG2E))
            phi, other = features(x, W_q, b_q, head, factor, MAP, DELTA, D, BD, Y, BY, P)
            to_phi = phi_q + ((batch * H + head) * T + node)[:, None] * F + column_y[None, :]
            tl.store(to_phi, phi.to(phi_q.dtype.element_ty), mask=mask_y)
            if F > Y:
                tl.store(to_phi + Y, other.to(phi_q.dtype.element_ty), mask=mask_y)
        else:
            head -= H
            to_x = content_k + batch * k_b + head * k_h + node[:, None].to(tl.int64) * k_t + column_d[None, :]
            x = tl.load(to_x, mask=mask_d, other=0.0)
            phi, other = features(x, W_k, b_k, head, factor, MAP, DELTA, D, BD, Y, BY, P)
            at = (batch * KV + head) * T + node
            to_phi = phi_k + at[:, None] * F + column_y[None, :]
            tl.store(to_phi, phi.to(phi_k.dtype.element_ty), mask=mask_y)
            if F > Y:
                tl.store(to_phi + Y, other.to(phi_k.dtype.element_ty), mask=mask_y)
            if DELTA:
                is_sink = new + depths(ancestors, node, T) < SINKS
                fading, writing = gates_of(x, W_gate, b_gate, head, D, BD)
                tl.store(node_decay + at, tl.where(is_sink, 0.0, fading), mask=inside)
                tl.store(node_beta + at, tl.where(is_sink, 0.0, writing), mask=inside)
    elif DELTA and tl.program_id(1) == 0:
        held = tl.load(count + batch).to(tl.int32)
        turn(
            batch * KV + task % KV, task // KV, ancestors, ring_v, ring_phi, u, mass, log_decay, beta, S, z,
            new, held, T, R, V, BV, F, BF, FEATURES, BR, SINKS, W, BLOCK, P,
        )  # fmt: skip
