"""Rotary embeddings that pair the first half of a head with the second, of queries and keys in one launch, and once
more of queries for the sinks: in PyTorch that is two dozen launches, more than the rest of a decoding step."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shape import DTYPES, strides

ROWS = 16


@triton.jit
def _pair(x, row, held, d, HALF: tl.constexpr):
    """Both halves [ROWS, BH] of rows of x in single precision."""
    at, mask = x + row[:, None] + d[None, :], held[:, None] & (d < HALF)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(low, high, cos, sin, row, held, d, HALF: tl.constexpr, BACK: tl.constexpr):
    """(low, high) turned by the angles of their rows, or back."""
    c_low, c_high = _pair(cos, row, held, d, HALF)
    s_low, s_high = _pair(sin, row, held, d, HALF)
    if BACK:
        return low * c_low + high * s_high, high * c_high - low * s_low
    return low * c_low - high * s_low, high * c_high + low * s_high


@triton.jit
def _store(out, row, held, d, low, high, HALF: tl.constexpr):
    at, mask = out + row[:, None] + d[None, :], held[:, None] & (d < HALF)[None, :]
    tl.store(at, low, mask=mask)
    tl.store(at + HALF, high, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _rotate(
    q, k, cos, sin, sink_cos, sink_sin, q_out, k_out, sink_out,
    q_b, q_h, q_t, k_b, k_h, k_t, angle_b, angle_t, sink_b, sink_t, H, T,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, REST: tl.constexpr, BR: tl.constexpr, SINK: tl.constexpr,
    BACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of a head; query heads come first. Forward makes `sink_out` of q; backward turns q_out's
    and sink_out's gradients, given as q and sink_out, back and adds them up."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    held, d, r = token < T, tl.arange(0, BH), tl.arange(0, BR)
    angle, sink_angle = batch * angle_b + token * angle_t, batch * sink_b + token * sink_t
    rest = held[:, None] & (r < REST)[None, :]
    if head < H:
        row, new = batch * q_b + head * q_h + token * q_t, ((batch * H + head) * T + token) * D
        low, high = _pair(q, row, held, d, HALF)
        turned, other = _turn(low, high, cos, sin, angle, held, d, HALF, BACK)
        passed = tl.load(q + row[:, None] + 2 * HALF + r[None, :], mask=rest, other=0.0)
        if SINK and BACK:
            low, high = _pair(sink_out, new, held, d, HALF)
            low, high = _turn(low, high, sink_cos, sink_sin, sink_angle, held, d, HALF, BACK)
            turned, other = turned + low, other + high
            passed += tl.load(sink_out + new[:, None] + 2 * HALF + r[None, :], mask=rest, other=0.0)
        if SINK and not BACK:
            low, high = _turn(low, high, sink_cos, sink_sin, sink_angle, held, d, HALF, BACK)
            _store(sink_out, new, held, d, low, high, HALF)
            tl.store(sink_out + new[:, None] + 2 * HALF + r[None, :], passed, mask=rest)
        _store(q_out, new, held, d, turned, other, HALF)
        tl.store(q_out + new[:, None] + 2 * HALF + r[None, :], passed, mask=rest)
    else:
        kv_heads = tl.num_programs(1) - H
        row = batch * k_b + (head - H) * k_h + token * k_t
        new = ((batch * kv_heads + head - H) * T + token) * D
        low, high = _pair(k, row, held, d, HALF)
        low, high = _turn(low, high, cos, sin, angle, held, d, HALF, BACK)
        _store(k_out, new, held, d, low, high, HALF)
        passed = tl.load(k + row[:, None] + 2 * HALF + r[None, :], mask=rest, other=0.0)
        tl.store(k_out + new[:, None] + 2 * HALF + r[None, :], passed, mask=rest)


def _launch(q, k, angles, sink_angles, q_out, k_out, sink_out, back: bool) -> None:
    batch, heads, length, dim = q.shape
    sinks, half = sink_angles is not None, angles[0].shape[-1] // 2
    # One row of angles may be that of all sequences.
    places = [(x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in (angles[0], (sink_angles or angles)[0])]
    rows, rest = min(ROWS, triton.next_power_of_2(length)), dim - 2 * half
    _rotate[triton.cdiv(length, rows), heads + k.shape[1], batch](
        q, k, *angles, *(sink_angles or angles), q_out, k_out, sink_out, *strides(q, k), *places[0], *places[1],
        heads, length, D=dim, HALF=half, BH=triton.next_power_of_2(half), REST=rest,
        BR=triton.next_power_of_2(max(rest, 1)), SINK=sinks, BACK=back, ROWS=rows, num_warps=2,
    )  # fmt: skip


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, sink_cos, sink_sin):
        sinks = None if sink_cos is None else (sink_cos, sink_sin)
        q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
        sink_out = None if sinks is None else torch.empty_like(q_out)
        _launch(q, k, (cos, sin), sinks, q_out, k_out, sink_out, back=False)
        ctx.save_for_backward(cos, sin, sink_cos, sink_sin)
        return q_out, k_out, sink_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, d_sink):
        cos, sin, sink_cos, sink_sin = ctx.saved_tensors
        dq, dk = dq.contiguous(), dk.contiguous()
        sinks = None if sink_cos is None else (sink_cos, sink_sin)
        q_out, k_out = torch.empty_like(dq), torch.empty_like(dk)
        d_sink = None if sinks is None else d_sink.contiguous()
        _launch(dq, dk, (cos, sin), sinks, q_out, k_out, d_sink, back=True)
        return q_out, k_out, None, None, None, None


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` can do it."""
    dense = q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1 and cos.stride() == sin.stride()
    return q.dtype == k.dtype and q.dtype in DTYPES and dense and cos.dim() == 3 and cos.shape[-1] <= 256


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sink_cos: Tensor | None = None, sink_sin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [B, H, T, D] and k [B, H_kv, T, D] turned by angles [B or 1, T, R], their first R dimensions, and q turned by
    the sinks' angles, if there are any."""
    return _Rotate.apply(q, k, cos, sin, sink_cos, sink_sin)
