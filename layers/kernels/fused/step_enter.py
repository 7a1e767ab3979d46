"""The first kernel of a decoding step: the new token's features and gates, and its place in the ring.

Afterwards all tokens that the step looks at are in the ring, and `clock` tells the time as it was before, so that the
second kernel may move the counters on.
"""

import triton
import triton.language as tl

from .tiles import LOG2E, projection, sigmoid, softmax, softplus


@triton.jit
def features(
    x, W, b, head, factor, MAP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr,
    BY: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[ROWS, BY] of x [ROWS, BD], times factor [ROWS], of F features Y; and the others, which only hedgehog has."""
    column = tl.arange(0, BY)[None, :]
    if MAP == "elu1":
        x = x.to(tl.float32)
        phi = tl.where(x > 0, x + 1, tl.exp2(x * LOG2E))
        other = tl.zeros_like(phi)
    else:
        weight, bias = projection(W, b, head, MAP, D, BD, Y, BY)
        if x.shape[0] == 1:
            y = tl.sum(tl.trans(x).to(tl.float32) * weight.to(tl.float32), axis=0)[None, :]
        else:
            y = tl.dot(x, weight.to(x.dtype), input_precision=P)
        if MAP == "t2r":
            phi = tl.maximum(y + bias[None, :], 0.0)
            other = tl.zeros_like(phi)
        else:
            phi = softmax(y, Y)
            other = softmax(-y, Y)
    if UNIT:
        squares = tl.sum(tl.where(column < Y, phi * phi + other * other, 0.0), axis=1)
        factor /= tl.maximum(tl.sqrt(squares), 1e-12)
    return phi * factor[:, None], other * factor[:, None]


@triton.jit
def gates_of(x, W, b, head, D: tl.constexpr, BD: tl.constexpr):
    """log decay and write strength [ROWS] of keys x [ROWS, BD], as `TokenGates` of the delta rule."""
    column = tl.arange(0, BD)
    unit = x.to(tl.float32)
    unit /= tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=1)), 1e-12)[:, None]
    at = W + (head * D + column) * 2
    fading = tl.sum(unit * tl.load(at, mask=column < D, other=0.0)[None, :], axis=1) + tl.load(b + head * 2)
    writing = tl.sum(unit * tl.load(at + 1, mask=column < D, other=0.0)[None, :], axis=1) + tl.load(b + head * 2 + 1)
    return -softplus(fading), sigmoid(writing)


@triton.jit(do_not_specialize=["B"])
def enter(
    k, v, content_q, content_k, phi_q, W_q, b_q, W_k, b_k, lam_query, W_gate, b_gate,
    ring_k, ring_v, ring_raw, sink_k, sink_v, sink_raw, ring_phi, u, mass, log_decay, beta,
    z, clock, length, count, scale, B, H, R,
    KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    Y: tl.constexpr, BY: tl.constexpr, SINKS: tl.constexpr, FOLD: tl.constexpr, MAP: tl.constexpr,
    DELTA: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program has one query head, or one key head, of ROWS rows."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_d, column_v, column_y = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BY)
    inside = batch < B
    row_d = inside[:, None] & (column_d < D)[None, :]
    row_v = inside[:, None] & (column_v < V)[None, :]
    row_y = inside[:, None] & (column_y < Y)[None, :]
    one = tl.full([ROWS], 1.0, tl.float32)
    if head < H:
        query = batch * H + head
        x = tl.load(content_q + query[:, None] * D + column_d[None, :], mask=row_d, other=0.0)
        factor = one
        if lam_query is not None:
            w = tl.load(lam_query + head * D + column_d, mask=column_d < D, other=0.0)
            factor = tl.exp2(tl.sum(x.to(tl.float32) * w[None, :], axis=1) * (scale * LOG2E))
        phi, other = features(x, W_q, b_q, head, factor, MAP, DELTA, D, BD, Y, BY, P)
        at_q = query[:, None] * F + column_y[None, :]
        tl.store(phi_q + at_q, phi, mask=row_y)
        if F > Y:
            tl.store(phi_q + at_q + Y, other, mask=row_y)
    else:
        head -= H
        row = batch * KV + head
        new = tl.load(length + batch, mask=inside, other=0)
        held = tl.load(count + batch, mask=inside, other=0)
        if head == 0:
            tl.store(clock + batch, new, mask=inside)
            tl.store(clock + B + batch, held, mask=inside)
        from_d, from_v = row[:, None] * D + column_d[None, :], row[:, None] * V + column_v[None, :]
        x = tl.load(content_k + from_d, mask=row_d, other=0.0)
        new_k = tl.load(k + from_d, mask=row_d, other=0.0)
        new_v = tl.load(v + from_v, mask=row_v, other=0.0)
        slot = row * R + new % R
        at_d, at_v = slot[:, None] * D + column_d[None, :], slot[:, None] * V + column_v[None, :]
        tl.store(ring_k + at_d, new_k, mask=row_d)
        tl.store(ring_v + at_v, new_v, mask=row_v)
        if ring_raw is not None:
            tl.store(ring_raw + at_d, x, mask=row_d)
        is_sink = inside & (new < SINKS)
        if SINKS:
            at_sink = (row * SINKS + new)[:, None]
            tl.store(sink_k + at_sink * D + column_d[None, :], new_k, mask=is_sink[:, None] & row_d)
            tl.store(sink_v + at_sink * V + column_v[None, :], new_v, mask=is_sink[:, None] & row_v)
            if ring_raw is not None:
                tl.store(sink_raw + at_sink * D + column_d[None, :], x, mask=is_sink[:, None] & row_d)
        phi, other = features(x, W_k, b_k, head, one, MAP, DELTA, D, BD, Y, BY, P)
        to_phi = ring_phi + slot[:, None] * F + column_y[None, :]
        tl.store(to_phi, phi.to(ring_phi.dtype.element_ty), mask=row_y)
        if F > Y:
            tl.store(to_phi + Y, other.to(ring_phi.dtype.element_ty), mask=row_y)
        if DELTA:
            fading, writing = gates_of(x, W_gate, b_gate, head, D, BD)
            tl.store(log_decay + slot, tl.where(is_sink, 0.0, fading), mask=inside)
            tl.store(beta + slot, tl.where(is_sink, 0.0, writing), mask=inside)

        # Where the ring is full now, its oldest tokens enter the state; z here, as all programs of `attend` read it.
        full = inside & (held + 1 == R)
        if tl.max(full.to(tl.int32), axis=0) > 0:
            for part in tl.static_range(0, F, Y):
                at_z = row[:, None] * F + part + column_y[None, :]
                sums = tl.load(z + at_z, mask=row_y, other=0.0)
                for i in tl.range(0, FOLD, loop_unroll_factor=4):
                    folds = full & (new - (R - 1 - i) >= SINKS)
                    old = row * R + (new + 1 + i) % R
                    old_phi = ring_phi + old[:, None] * F + part + column_y[None, :]
                    old_phi = tl.load(old_phi, mask=folds[:, None] & row_y, other=0.0).to(tl.float32)
                    if DELTA:
                        sums *= tl.exp2(tl.load(log_decay + old, mask=folds, other=0.0) * LOG2E)[:, None]
                        old_phi *= tl.load(mass + old, mask=folds, other=0.0)[:, None]
                    sums += old_phi
                tl.store(z + at_z, sums, mask=full[:, None] & row_y)
