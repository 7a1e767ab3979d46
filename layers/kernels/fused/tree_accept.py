"""What is accepted of a verified draft tree enters the ring, and where that has no room left, its oldest tokens enter
the state.

All that is known of a node goes with it, except by the delta rule what it leaves: steps and trees work that out when
it becomes far.
"""

import triton
import triton.language as tl

from .step_attend import take_in
from .tiles import LOG2E


@triton.jit
def move(source, target, start, node, to, chosen, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `node` of source[start:] become rows `to` of target, where chosen."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = chosen[:, None] & (column < WIDTH)
    rows = tl.load(source + start + node[:, None] * stride + column, mask=mask, other=0.0)
    tl.store(target + to[:, None] * WIDTH + column, rows, mask=mask)


@triton.jit(do_not_specialize=["B", "N", "T"])
def accept(
    path, k, v, raw, phi, node_decay, node_beta, ring_k, ring_v, ring_raw, sink_k, sink_v, sink_raw,
    ring_phi, u, mass, log_decay, beta, S, z, clock, length, count, segment,
    k_b, k_h, k_t, v_b, v_h, v_t, raw_b, raw_h, raw_t, B, N, T, R,
    KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, FEATURES: tl.constexpr, SINKS: tl.constexpr, FOLD: tl.constexpr, DELTA: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """A program has one key head of one row; `path` [B, N] is one that `step.accepts`, of which FOLD nodes are taken at
    once."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // KV, row % KV
    i = tl.arange(0, FOLD)
    new = tl.load(clock + batch).to(tl.int32)
    held = tl.load(clock + B + batch).to(tl.int32)
    for first_node in range(0, N, FOLD):
        node = tl.load(path + batch * N + first_node + i, mask=first_node + i < N, other=-1)
        chosen = node >= 0
        accepted = tl.sum(chosen.to(tl.int32), axis=0)
        remaining = held + accepted
        if remaining >= R:
            position = new - held + i
            folds = position >= SINKS
            at_oldest = row * R + position % R
            column_v = tl.arange(0, BV)
            for first in range(0, BF, FEATURES):
                feature = first + tl.arange(0, FEATURES)
                to_S = S + (row * F + feature)[:, None] * V + column_v[None, :]
                inside = (feature < F)[:, None] & (column_v < V)[None, :]
                state = tl.load(to_S, mask=inside, other=0.0)
                state = take_in(
                    state, at_oldest, folds, feature, column_v, ring_v, ring_phi, u, log_decay, V, F, DELTA, P
                )
                tl.store(to_S, state, mask=inside)
                to_z = z + row * F + feature
                sums = tl.load(to_z, mask=feature < F, other=0.0)
                weights = folds.to(tl.float32)
                if DELTA:
                    decays = tl.load(log_decay + at_oldest, mask=folds, other=0.0)
                    folded = tl.sum(decays)
                    weights = tl.load(mass + at_oldest, mask=folds, other=0.0)
                    weights *= tl.exp2((folded - tl.cumsum(decays)) * LOG2E)
                    sums *= tl.exp2(folded * LOG2E)
                to_phi = ring_phi + at_oldest[None, :] * F + feature[:, None]
                old_phi = tl.load(to_phi, mask=folds[None, :] & (feature < F)[:, None], other=0.0).to(tl.float32)
                tl.store(to_z, sums + tl.sum(old_phi * weights[None, :], axis=1), mask=feature < F)
            remaining -= FOLD
            # New tokens come into the slots of these, and the next to fold into the same state.
            tl.debug_barrier()

        position = new + i
        slot = row * R + position % R
        move(k, ring_k, batch * k_b + head * k_h, node, slot, chosen, k_t, D, BD)
        move(v, ring_v, batch * v_b + head * v_h, node, slot, chosen, v_t, V, BV)
        move(phi, ring_phi, row * T * F, node, slot, chosen, F, F, BF)
        if ring_raw is not None:
            move(raw, ring_raw, batch * raw_b + head * raw_h, node, slot, chosen, raw_t, D, BD)
        if DELTA:
            tl.store(log_decay + slot, tl.load(node_decay + row * T + node, mask=chosen, other=0.0), mask=chosen)
            tl.store(beta + slot, tl.load(node_beta + row * T + node, mask=chosen, other=0.0), mask=chosen)
        if SINKS > 0 and new < SINKS:
            is_sink = chosen & (position < SINKS)
            at_sink = row * SINKS + position
            move(k, sink_k, batch * k_b + head * k_h, node, at_sink, is_sink, k_t, D, BD)
            move(v, sink_v, batch * v_b + head * v_h, node, at_sink, is_sink, v_t, V, BV)
            if ring_raw is not None:
                move(raw, sink_raw, batch * raw_b + head * raw_h, node, at_sink, is_sink, raw_t, D, BD)
        new += accepted
        held = remaining
    if head == 0:
        tl.store(length + batch, new)
        tl.store(count + batch, held)
        tl.store(segment + batch, 1)
