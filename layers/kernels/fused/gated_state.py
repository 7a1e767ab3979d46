"""The state of every chunk, for any rule (see `memory`): what a chunk leaves, the walk, and both backwards.

With M = [S, z] as chunk c sees it, G summed log decays within the chunk and `end` the last of them:

    u = u_0 - W M          u_0 = T beta [v, 1],  W = T beta exp(G) phi,  T = (I + A)^-1       (delta; else u = [v, 1])
    M <- exp(end) M + phi^T exp(end - G) u

`prepare` has u_0, W of all chunks at once, `walk` goes from chunk to chunk with some columns of M on chip. `walk_back`
goes the other way with dM, to which queries add what they give, and `prepare_back` is one program per chunk again.
Arrays by slot are [B * H_kv, n * C, ..]: chunk after chunk. Sinks and padding leave nothing: u = 0.
"""

import triton
import triton.language as tl

from .tiles import COPIES, LOG2E, SIZES, body_slots, carry_of, joined, load_rows, slots_of, store_rows


@triton.jit
def invert(A, C: tl.constexpr, P: tl.constexpr):
    """(I + A)^-1 [C, C] of a strictly lower A, C <= 64: of blocks of 8 on the diagonal by powers, D, and with what is
    left, N = D (A - blocks), again. Powers of more than 8 keys that are all alike would grow beyond what fp32 resolves.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inside = tl.where(i // 8 == j // 8, A, 0.0)
    one = tl.where(i == j, 1.0, 0.0)
    squared = tl.dot(inside, inside, input_precision=P)
    D = one - inside
    D = tl.dot(D, squared, D, input_precision=P)
    D = tl.dot(D, tl.dot(squared, squared, input_precision=P), D, input_precision=P)
    N = tl.dot(D, A - inside, input_precision=P)
    squared = tl.dot(N, N, input_precision=P)
    D = tl.dot(tl.dot(squared, squared, input_precision=P), D, D, input_precision=P)
    D = tl.dot(squared, D, D, input_precision=P)
    return tl.dot(-N, D, D, input_precision=P)


@triton.jit
def fading(G):
    """exp(G_i - G_j) where key j is before i, else 0."""
    size: tl.constexpr = G.shape[0]
    before = tl.arange(0, size)[:, None] > tl.arange(0, size)[None, :]
    return tl.where(before, tl.exp2((G[:, None] - G[None, :]) * LOG2E), 0.0)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    phi, v, log_decay, beta, u, u_mass, W, inverse, G, source, first, v_b, v_h, v_t, H, T, n, begin, span,
    V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, SINKS: tl.constexpr,
    DELTA: tl.constexpr, STORE: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """G, and u_0, W, and where STORE T of each chunk (u = [v, 1] where not DELTA)."""
    row, c = tl.program_id(0).to(tl.int64), begin + tl.program_id(1)
    batch, head = row // H, row % H
    chunks = batch * n
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    enters = held & body_slots(first, chunks, c, n, C, SINKS, INDEXED)
    place = ((row * span + c - begin) * C).to(tl.int32)
    slot = (row * n + c) * C + tl.arange(0, C)
    sums = tl.cumsum(tl.load(log_decay + row * T + token, mask=enters, other=0.0), axis=0)
    tl.store(G + slot, sums)
    vs = load_rows(v, batch, head, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
    if DELTA:
        strength = tl.load(beta + row * T + token, mask=enters, other=0.0)
        A = tl.zeros([C, C], tl.float32)
        for f in tl.static_range(0, BF, BLOCK_F):
            phis = phi.load([place, f])
            A = tl.dot(phis, tl.trans(phis), A, input_precision=P)
        A = A * strength[:, None] * fading(sums)
        solve = invert(A, C, "ieee" if dtype == tl.float32 else "tf32x3")
        if STORE:
            inverse.store([place, 0], solve.to(dtype))
        solve = solve * strength[None, :]
        tl.store(u_mass + slot, tl.sum(solve, axis=1))
        u.store([place, 0], tl.dot(solve.to(dtype), vs, input_precision=P).to(dtype))
        solve = (solve * tl.exp2(sums * LOG2E)[None, :]).to(dtype)
        for f in tl.static_range(0, BF, BLOCK_F):
            phis = phi.load([place, f])
            W.store([place, f], tl.dot(solve, phis, input_precision=P).to(dtype))
    else:
        tl.store(u_mass + slot, enters.to(tl.float32))
        u.store([place, 0], tl.where(enters[:, None], vs, 0.0))


@triton.jit
def _column(x, dtype: tl.constexpr):
    """x [C] as COPIES equal columns, which products take."""
    return (x[:, None] + tl.zeros([1, COPIES], tl.float32)).to(dtype)


@triton.jit
def _step(
    M, Z, number, phi, u, u_mass, u_mass_all, W, G, states, state_sums, carries, row, block, chunks, n, begin, span,
    BE: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, STATES: tl.constexpr,
    INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """M and Z after a chunk, of those before it."""
    column = block * BE
    feature = tl.arange(0, BF)
    place = ((row * span + number) * C).to(tl.int32)
    slot = (row * n + begin + number) * C
    if INDEXED:
        carry = carry_of(carries, chunks, begin + number, n)
        M = M * carry
        Z = Z * carry
    if STATES:
        place_f = (row * span + number) * BF
        states.store([place_f.to(tl.int32), column], M.to(dtype))
        if block == 0:
            tl.store(state_sums + place_f + feature, tl.sum(Z, axis=1) / COPIES)
    us = u.load([place, column])
    mass = _column(tl.load(u_mass + slot + tl.arange(0, C)), tl.float32)
    if DELTA:
        Ws = W.load([place, 0])
        left = us.to(tl.float32) - tl.dot(Ws, M.to(dtype), input_precision=P)
        mass -= tl.dot(Ws, Z.to(dtype), input_precision=P)
        u.store([place, column], left.to(dtype))
        us = left
    if block == 0:
        tl.store(u_mass_all + slot + tl.arange(0, C), tl.sum(mass, axis=1) / COPIES)
    sums = tl.load(G + slot + tl.arange(0, C))
    end = tl.load(G + slot + C - 1)
    leaving = tl.exp2((end - sums) * LOG2E)[:, None]
    phis = tl.trans(phi.load([place, 0]))
    total = tl.exp2(end * LOG2E)
    M = tl.dot(phis, (us * leaving).to(dtype), M * total, input_precision=P)
    Z = tl.dot(phis, (mass * leaving).to(dtype), Z * total, input_precision=P)
    return M, Z


@triton.jit(do_not_specialize=SIZES)
def walk(
    phi, u, u_mass, u_mass_all, W, G, initial_S, initial_z, states, state_sums, end_S, end_z, carries,
    H, n, begin, span,
    BV: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, DELTA: tl.constexpr, HAS_STATE: tl.constexpr,
    STATES: tl.constexpr, AFTER: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """M before each chunk (where STATES) and, as `end`, before the last or AFTER it; BE of BV columns per program; u in
    the place of u_0."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = row // H * n
    feature = tl.arange(0, BF)
    at = feature[:, None] * BV + block * BE + tl.arange(0, BE)[None, :]
    M = tl.zeros([BF, BE], tl.float32)
    Z = tl.zeros([BF, COPIES], tl.float32)
    if HAS_STATE:
        M = tl.load(initial_S + row * BF * BV + at)
        Z = tl.load(initial_z + row * BF + feature[:, None] + tl.zeros([1, COPIES], tl.int32))
    # The last chunk is apart: what comes after it may not be asked for.
    for number in range(span if AFTER else span - 1):
        M, Z = _step(
            M, Z, number, phi, u, u_mass, u_mass_all, W, G, states, state_sums, carries, row, block, chunks, n, begin,
            span, BE, BF, C, DELTA, STATES, INDEXED, P, dtype,
        )  # fmt: skip
    tl.store(end_S + row * BF * BV + at, M)
    if block == 0:
        tl.store(end_z + row * BF + feature, tl.sum(Z, axis=1) / COPIES)
    if not AFTER:
        _step(
            M, Z, span - 1, phi, u, u_mass, u_mass_all, W, G, states, state_sums, carries, row, block, chunks, n, begin,
            span, BE, BF, C, DELTA, STATES, INDEXED, P, dtype,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def walk_back(
    phi, W, G, du, du_mass, du_mass_all, dstates, dstate_sums, dstate_sums_all, dM, dZ, carries,
    H, n, start, begin, span, BV: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, GOES_ON: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dM after each chunk, in the place of what queries gave to the state before it; and du, of what tiles saw of u,
    becomes all of it. Where it GOES_ON, dM and dZ are those after the last chunk, and then before chunk `start`."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = row // H * n
    column = block * BE
    feature = tl.arange(0, BF)
    M = tl.zeros([BF, BE], tl.float32)
    Z = tl.zeros([BF, COPIES], tl.float32)
    at = row * BF * BV + feature[:, None] * BV + column + tl.arange(0, BE)[None, :]
    at_Z = (row * tl.num_programs(1) + block) * BF + feature
    if GOES_ON:
        M = tl.load(dM + at)
        Z = tl.load(dZ + at_Z[:, None] + tl.zeros([1, COPIES], tl.int32))
    for step in range(begin + span - start):
        number = span - 1 - step
        c = begin + number
        place = ((row * span + number) * C).to(tl.int32)
        place_f = ((row * span + number) * BF).to(tl.int32)
        slot = (row * n + c) * C + tl.arange(0, C)
        given = dstates.load([place_f, column])
        given_mass = tl.load(dstate_sums + place_f + feature)
        dstates.store([place_f, column], M.to(dtype))
        if block == 0:
            tl.store(dstate_sums_all + place_f + feature, tl.sum(Z, axis=1) / COPIES)
        sums = tl.load(G + slot)
        end = tl.load(G + (row * n + c) * C + C - 1)
        leaving = tl.exp2((end - sums) * LOG2E)[:, None]
        phis = phi.load([place, 0])
        dus = du.load([place, column]) + leaving * tl.dot(phis, M.to(dtype), input_precision=P)
        dmass = _column(tl.load(du_mass + slot), tl.float32)
        dmass += leaving * tl.dot(phis, Z.to(dtype), input_precision=P)
        du.store([place, column], dus.to(dtype))
        if block == 0:
            tl.store(du_mass_all + slot, tl.sum(dmass, axis=1) / COPIES)
        total = tl.exp2(end * LOG2E)
        M = M * total + given
        Z = Z * total + given_mass[:, None]
        if DELTA:
            Ws = tl.trans(W.load([place, 0]))
            M = tl.dot(Ws, (-dus).to(dtype), M, input_precision=P)
            Z = tl.dot(Ws, (-dmass).to(dtype), Z, input_precision=P)
        if INDEXED:
            carry = carry_of(carries, chunks, c, n)
            M = M * carry
            Z = Z * carry
    if GOES_ON:
        tl.store(dM + at, M)
        tl.store(dZ + at_Z, tl.sum(Z, axis=1) / COPIES)


@triton.jit(do_not_specialize=SIZES)
def prepare_back(
    phi, v, log_decay, beta, u, u_mass, inverse, G, states, state_sums, dstates, dstate_sums, du, du_mass, dphi_seen,
    dG_seen, slope, far, dphi, dv, dlog_decay, dbeta, source, first, follows,
    v_b, v_h, v_t, dv_b, dv_h, dv_t, H, T, past, n, start, begin, span,
    GROUPS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr,
    SINKS: tl.constexpr, DELTA: tl.constexpr, DELAY: tl.constexpr, SEEN: tl.constexpr, INDEXED: tl.constexpr,
    P: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dphi by slot as phi is, gradients of the gates, and dv with what near weights gave added. Tiles gave `dphi_seen`
    and `dG_seen` by slot (where SEEN), and queries far * `slope` per row, the gradient of their G."""
    row, c = tl.program_id(0).to(tl.int64), start + tl.program_id(1)
    batch, head = row // H, row % H
    chunks = batch * n
    token, held = slots_of(source, chunks, c, n, T, C, INDEXED)
    enters = held & body_slots(first, chunks, c, n, C, SINKS, INDEXED)
    place = ((row * span + c - begin) * C).to(tl.int32)
    place_f = ((row * span + c - begin) * BF).to(tl.int32)
    slot = (row * n + c) * C + tl.arange(0, C)
    sums = tl.load(G + slot)
    end = tl.load(G + (row * n + c) * C + C - 1)
    leaving = tl.exp2((end - sums) * LOG2E)
    total = tl.exp2(end * LOG2E)
    us = u.load([place, 0])
    mass = tl.load(u_mass + slot)
    dus = du.load([place, 0])
    dmass = tl.load(du_mass + slot)

    # Gradients of G: of the queries of this chunk, of those of the next (they see all of this chunk's), of its keys.
    dG = tl.zeros([C], tl.float32)
    dend = tl.zeros([C], tl.float32)
    token_a, held_a = slots_of(source, chunks, c + 1, n, T, C, INDEXED)
    held_a = joined(held_a, follows, chunks, c + 1, n, INDEXED) & (token_a >= past)
    for group in range(GROUPS):
        h = head * GROUPS + group
        rows = (batch * H * GROUPS + h) * (T - past) - past
        weight = tl.load(far + h)
        dG += weight * tl.load(slope + rows + token, mask=held & (token >= past), other=0.0)
        if DELAY:
            dend += weight * tl.load(slope + rows + token_a, mask=held_a, other=0.0)
    if SEEN:
        dG += tl.load(dG_seen + slot)

    dvs = dus.to(tl.float32)
    if DELTA:
        strength = tl.load(beta + row * T + token, mask=enters, other=0.0)
        solve = inverse.load([place, 0])
        right = tl.dot(tl.trans(solve), dus, input_precision=P)
        right_mass = tl.sum(solve.to(tl.float32) * dmass[:, None], axis=0)
        vs = load_rows(v, batch, head, c, 0, token, held, v_b, v_h, v_t, V, BV, C, INDEXED)
        dstrength = tl.sum(right * vs, axis=1) + right_mass
        dvs = right * strength[:, None]
        right = right.to(dtype)
        dA = -tl.dot(right, tl.trans(us), input_precision=P) - right_mass[:, None] * mass[None, :]
        S = tl.zeros([C, C], tl.float32)
        for f in tl.static_range(0, BF, BLOCK_F):
            phis = phi.load([place, f])
            S = tl.dot(phis, tl.trans(phis), S, input_precision=P)
        faded = fading(sums)
        along = dA * S * faded
        dstrength += tl.sum(along, axis=1)
        along = along * strength[:, None]
        dG += tl.sum(along, axis=1) - tl.sum(along, axis=0)
        dS = dA * faded * strength[:, None]
        # Of phi phi^T both factors are phi.
        dS = (dS + tl.trans(dS)).to(dtype)
        since = tl.exp2(sums * LOG2E)
    dv_seen = load_rows(dv, batch, head, c, 0, token, held, dv_b, dv_h, dv_t, V, BV, C, INDEXED)
    dvs = tl.where(enters[:, None], dvs, 0.0) + dv_seen
    store_rows(dv, dvs.to(dtype), batch, head, c, 0, token, held, dv_b, dv_h, dv_t, V, BV, C, INDEXED)

    for f in tl.static_range(0, BF, BLOCK_F):
        feature = f + tl.arange(0, BLOCK_F)
        phis = phi.load([place, f])
        X = states.load([place_f + f, 0])
        x = tl.load(state_sums + place_f + feature)
        dX = dstates.load([place_f + f, 0])
        dx = tl.load(dstate_sums + place_f + feature)
        dphis = tl.dot(us, tl.trans(dX), input_precision=P) + mass[:, None] * dx[None, :]
        dphis = dphis * leaving[:, None]
        along_k = tl.sum(phis * dphis, axis=1)
        dG -= along_k
        dend += along_k
        kept = tl.sum(tl.sum(X.to(tl.float32) * dX.to(tl.float32), axis=1) + x * dx, axis=0)
        dend += tl.where(tl.arange(0, C) == 0, total * kept, 0.0)
        if DELTA:
            dW = -tl.dot(right, tl.trans(X), input_precision=P) - right_mass[:, None] * x[None, :]
            along_w = since * tl.sum(phis * dW, axis=1)
            dstrength += along_w
            dG += strength * along_w
            dphis += (strength * since)[:, None] * dW
            dphis = tl.dot(dS, phis, dphis, input_precision=P)
        if SEEN:
            at = (place + tl.arange(0, C)).to(tl.int64)[:, None] * BF + feature[None, :]
            dphis += tl.load(dphi_seen + at).to(tl.float32)
        dphi.store([place, f], dphis.to(dtype))
    if DELTA:
        tl.store(dbeta + row * T + token, tl.where(enters, dstrength, 0.0), mask=held)
    # G_j sums up all l <= j.
    later = tl.sum(dend, axis=0) + tl.sum(dG, axis=0) - tl.cumsum(dG, axis=0) + dG
    tl.store(dlog_decay + row * T + token, tl.where(enters, later, 0.0), mask=held)
