"""What the kernels of the layer with an additive state have in common: rows of chunks, features, masks.

Tokens are in chunks of C (see `chunked.Layout`), whose queries look at their own and the previous chunk's keys tile by
tile, and at all before through the state X = [S, z]. Notation as in `reference`; p = exp(s - lse) are near weights
without g, `mass` is what far weights are divided by and wb = lam / mass, `slope` the derivative of a row's loss by lam,
`peak` the key with the row's maximal score.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
TINY = tl.constexpr(1e-12)
LOG2E = tl.constexpr(1.4426950408889634)
# Kernels are not compiled again for another length.
SIZES = ["B", "H", "T", "past", "n", "span", "start", "begin", "held_q"]
# z takes part in products as a matrix Z of so many equal columns, the fewest that tensor cores take.
COPIES = tl.constexpr(16)


@triton.jit
def slots_of(source, chunks, c, n, T, C: tl.constexpr, INDEXED: tl.constexpr):
    """Which token is in each slot of chunk c, and whether there is one; `chunks` are those of earlier rows."""
    place = c * C + tl.arange(0, C)
    inside = (place >= 0) & (place < n * C)
    if INDEXED:
        token = tl.load(source + chunks * C + place, mask=inside, other=-1)
        held = token >= 0
    else:
        token = place
        held = inside & (place < T)
    return token, held


@triton.jit
def carry_of(carries, chunks, c, n):
    """1.0 where the state goes on from chunk c - 1 to c, else 0.0."""
    return tl.load(carries + chunks + c, mask=tl.full([], c, tl.int32) < n, other=0).to(tl.float32)


@triton.jit
def joined(held, follows, chunks, c, n, INDEXED: tl.constexpr):
    """`held`, unless chunks c - 1 and c are of different documents."""
    if INDEXED:
        held = held.to(tl.int32) * tl.load(follows + chunks + c, mask=tl.full([], c, tl.int32) < n, other=0) != 0
    return held


@triton.jit
def body_slots(first, chunks, c, n, C: tl.constexpr, SINKS: tl.constexpr, INDEXED: tl.constexpr):
    """Which slots of chunk c are not those of sinks, the first ones of a document's first chunk."""
    c = tl.full([], c, tl.int32)
    start = tl.full([], 0, tl.int32)
    if INDEXED:
        start = tl.load(first + chunks + c, mask=(c >= 0) & (c < n), other=-2)
    return (tl.arange(0, C) < SINKS).to(tl.int32) * (c == start).to(tl.int32) == 0


@triton.jit
def load_rows(
    x, batch, head, c, column, token, held, x_b, x_h, x_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """[C, BLOCK] of x [B, H, T, ..] from `column` on, zero where no token is held: gathered where INDEXED, else by a
    descriptor, whose addresses take no registers."""
    if INDEXED:
        places = tl.arange(0, BLOCK)
        mask = held[:, None] & (places < WIDTH)[None, :]
        at = x + batch * x_b + head * x_h + column + token[:, None].to(tl.int64) * x_t
        rows = tl.load(at + places[None, :], mask=mask, other=0.0)
    else:
        rows = tl.reshape(x.load([batch.to(tl.int32), head.to(tl.int32), c * C, column]), (C, BLOCK))
    return rows


@triton.jit
def store_rows(
    x, value, batch, head, c, column, token, held, x_b, x_h, x_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    if INDEXED:
        places = tl.arange(0, BLOCK)
        mask = held[:, None] & (places < WIDTH)[None, :]
        at = x + batch * x_b + head * x_h + column + token[:, None].to(tl.int64) * x_t
        tl.store(at + places[None, :], value, mask=mask)
    else:
        value = tl.reshape(value, (1, 1, C, BLOCK))
        x.store([batch.to(tl.int32), head.to(tl.int32), c * C, column], value)


@triton.jit
def projection(W, b, head, MAP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr):
    """W [BD, BY] and b [BY] of a head's map; of maps without, anything."""
    weight = 0.0
    bias = 0.0
    row, column = tl.arange(0, BD)[:, None], tl.arange(0, BY)[None, :]
    if MAP == "hedgehog" or MAP == "t2r":
        weight = tl.load(W + head * D * Y + row * Y + column, mask=(row < D) & (column < Y), other=0.0)
    if MAP == "t2r":
        bias = tl.load(b + head * Y + tl.arange(0, BY), mask=tl.arange(0, BY) < Y, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def features_of(
    x, weight, bias, MAP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
    """[C, BF] features in fp32, of rows without a token something finite. Those of `hedgehog` take turns: one of
    softmax(y), one of softmax(-y)."""
    if MAP == "elu1":
        x = x.to(tl.float32)
        phi = tl.where(x > 0, x + 1, tl.exp2(x * LOG2E))
        if F != BF:
            phi = tl.where(tl.arange(0, BF)[None, :] < F, phi, 0.0)
    elif MAP == "t2r":
        phi = tl.maximum(tl.dot(x, weight, input_precision=P) + bias[None, :], 0.0)
    else:
        y = tl.dot(x, weight, input_precision=P)
        y = tl.join(y, -y)
        if F != BF:
            y = tl.where(tl.arange(0, BF // 2)[None, :, None] < F // 2, y, float("-inf"))
        y = tl.exp2(y * LOG2E - tl.max(y, axis=1, keep_dims=True) * LOG2E)
        phi = tl.reshape(y * (1.0 / tl.sum(y, axis=1, keep_dims=True)), (C, BF))
    return phi


@triton.jit
def near_keys(i, j, W: tl.constexpr, WINDOW: tl.constexpr):
    """Whether key j is near query i, both counted from the document's start or a common chunk boundary."""
    if WINDOW == "block":
        near = i // W == j // W
    elif WINDOW == "sliding":
        near = i - j < W
    elif WINDOW == "terrace":
        near = j // W >= i // W - 1
    else:
        near = j > i  # none that may be seen
    return near


@triton.jit
def near_and_far(visible, i, j, W: tl.constexpr, WINDOW: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr):
    """What of a tile is near and what is far, where it can be either."""
    is_near = visible
    is_far = visible
    if NEAR and FAR:
        near = near_keys(i, j, W, WINDOW)
        is_near = visible & near
        is_far = visible & ~near
    return is_near, is_far


@triton.jit
def band_of(conv, head, C: tl.constexpr, TAPS: tl.constexpr, dtype: tl.constexpr):
    """The convolution as a matrix [C, C]: of keys of the own chunk up to the diagonal, of the previous one above it."""
    distance = (tl.arange(0, C)[:, None] - tl.arange(0, C)[None, :] + C) % C
    return tl.load(conv + head * TAPS + distance, mask=distance < TAPS, other=0.0).to(dtype)


@triton.jit
def tap_sums(outer, C: tl.constexpr):
    """[C], at each tap what it weighs in `outer` [C, C], arranged as in `band_of`: the sum along its diagonal."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.sum(tl.gather(outer, (i - j + C) % C, 1), axis=0)


@triton.jit
def softmax(x, Y: tl.constexpr):
    """Over the first Y columns; the others are 0."""
    if x.shape[1] > Y:
        x = tl.where((tl.arange(0, x.shape[1]) < Y)[None, :], x, float("-inf"))
    x = tl.exp2((x - tl.max(x, axis=1)[:, None]) * LOG2E)
    return x / tl.sum(x, axis=1)[:, None]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); decays are small, and 1 + exp would round them off."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    small = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.05, small, tl.log(1.0 + e))


@triton.jit
def nonzero(x):
    return tl.where(tl.abs(x) < TINY, TINY, x)


@triton.jit
def far_weights(phi_q, phi_k, is_far, P: tl.constexpr):
    """b of a tile, zero where a key is not far."""
    return tl.where(is_far, tl.dot(phi_q, tl.trans(phi_k), input_precision=P), 0.0)
