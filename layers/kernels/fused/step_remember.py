"""A ring made ready for decoding steps in one launch: more slots, and what its tokens are to the far branch."""

import triton
import triton.language as tl

from .gated_state import fading, invert
from .tiles import LOG2E


@triton.jit
def _move(x, to, row, held, position, inside, old_slots, slots, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [BLOCK or less] of tokens from their slots in x to those in `to`, zero where none is held."""
    column = tl.arange(0, BLOCK)[None, :]
    at = x + (row * old_slots + position % old_slots)[:, None] * WIDTH + column
    rows = tl.load(at, mask=held[:, None] & (column < WIDTH), other=0.0)
    at = to + (row * slots + position % slots)[:, None] * WIDTH + column
    tl.store(at, rows, mask=inside[:, None] & (column < WIDTH))


@triton.jit(do_not_specialize=["B"])
def remember(
    k, v, raw, phi, log_decay, beta, S, z, length, count, segment,
    ring_k, ring_v, ring_raw, ring_phi, ring_decay, ring_beta, u, mass, clock, B, old_slots, slots,
    KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, F: tl.constexpr,
    BF: tl.constexpr, SINKS: tl.constexpr, DELTA: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program has a block of value columns of a key head, and goes through its tokens, C at a time, oldest first;
    S and z, as its tokens find them, go on with it. The first one of a head has all else."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, first = row // KV, block == 0
    tokens, newest = tl.load(count + batch), tl.load(length + batch)
    if first & (row % KV == 0):
        tl.store(clock + batch, newest)
        tl.store(clock + B + batch, tokens)
        tl.store(clock + 2 * B + batch, tl.load(segment + batch))
    feature, column = tl.arange(0, BF), block * BV + tl.arange(0, BV)
    is_feature, is_column = feature < F, column < V
    if DELTA:
        at_M = (row * F + feature)[:, None] * V + column[None, :]
        M = tl.load(S + at_M, mask=is_feature[:, None] & is_column[None, :], other=0.0)
        sums = tl.load(z + row * F + feature, mask=is_feature, other=0.0)
    # All slots are gone through: those without a token get zeros.
    for start in range(0, slots, C):
        number = start + tl.arange(0, C)
        inside, held = number < slots, number < tokens
        position = newest - tokens + number
        old, new = row * old_slots + position % old_slots, row * slots + position % slots
        at_v = old[:, None] * V + column[None, :]
        vs = tl.load(v + at_v, mask=held[:, None] & is_column[None, :], other=0.0)
        at_v = new[:, None] * V + column[None, :]
        is_value = inside[:, None] & is_column[None, :]
        tl.store(ring_v + at_v, vs, mask=is_value)
        if first:
            _move(k, ring_k, row, held, position, inside, old_slots, slots, D, BD)
            _move(phi, ring_phi, row, held, position, inside, old_slots, slots, F, BF)
            if raw is not None:
                _move(raw, ring_raw, row, held, position, inside, old_slots, slots, D, BD)
        if DELTA:
            enters = held & (position >= SINKS)
            decays = tl.load(log_decay + old, mask=enters, other=0.0)
            strength = tl.load(beta + old, mask=enters, other=0.0)
            at_phi = phi + old[:, None] * F + feature[None, :]
            phis = tl.load(at_phi, mask=held[:, None] & is_feature[None, :], other=0.0).to(tl.float32)
            G = tl.cumsum(decays, axis=0)
            since, end = tl.exp2(G * LOG2E), tl.sum(decays, axis=0)
            A = tl.dot(phis, tl.trans(phis), input_precision=P) * strength[:, None] * fading(G)
            solve = invert(A, C, "tf32x3" if P == "tf32" else P) * strength[None, :]
            # u = (I + A)^-1 beta ([v, 1] - exp(G) phi M).
            left = vs.to(tl.float32) - tl.dot(phis, M, input_precision=P) * since[:, None]
            left = tl.dot(solve, left, input_precision=P)
            tl.store(u + at_v, left, mask=is_value)
            left_mass = 1.0 - tl.sum(phis * sums[None, :], axis=1) * since
            left_mass = tl.sum(solve * left_mass[None, :], axis=1)
            if first:
                tl.store(ring_decay + new, decays, mask=inside)
                tl.store(ring_beta + new, strength, mask=inside)
                tl.store(mass + new, left_mass, mask=inside)
            leaving, total = tl.exp2((end - G) * LOG2E), tl.exp2(end * LOG2E)
            M = tl.dot(tl.trans(phis), left * leaving[:, None], M * total, input_precision=P)
            sums = sums * total + tl.sum(phis * (left_mass * leaving)[:, None], axis=0)
