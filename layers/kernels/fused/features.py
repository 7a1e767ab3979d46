"""Hedgehog features in one pass: softmax(xW) ++ softmax(-xW), at unit length where asked for, times a factor per row;
backward computes them again from x."""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...feature_maps import Hedgehog

ROWS = 32


@triton.jit
def _softmax(x, Y: tl.constexpr):
    """Over the first Y columns; the others are 0."""
    if x.shape[1] > Y:
        x = tl.where((tl.arange(0, x.shape[1]) < Y)[None, :], x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    return x / tl.sum(x, axis=1)[:, None]


@triton.jit
def _halves(
    x, W, batch, head, x_b, x_h, x_t, T,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Which tokens, W [BD, BY], both softmaxes [ROWS, BY], and what scales them to unit length [ROWS]."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d, y = tl.arange(0, BD), tl.arange(0, BY)
    at = x + batch * x_b + head * x_h + token[:, None].to(tl.int64) * x_t + d[None, :]
    xs = tl.load(at, mask=(token < T)[:, None] & (d < D)[None, :], other=0.0)
    at = W + head * D * Y + d[:, None] * Y + y[None, :]
    weight = tl.load(at, mask=(d < D)[:, None] & (y < Y)[None, :], other=0.0)
    projected = tl.dot(xs, weight, input_precision=P)
    up = _softmax(projected, Y)
    down = _softmax(-projected, Y)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if UNIT:
        scale = tl.rsqrt(tl.sum(up * up, axis=1) + tl.sum(down * down, axis=1))
    return token, weight, up, down, scale


@triton.jit(do_not_specialize=["T", "H"])
def _forward(
    x, W, factor, phi, x_b, x_h, x_t, H, T,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, _, up, down, scale = _halves(x, W, row // H, row % H, x_b, x_h, x_t, T, D, BD, Y, BY, UNIT, ROWS, P)
    if FACTOR:
        scale *= tl.load(factor + row * T + token, mask=token < T, other=0.0).to(tl.float32)
    y = tl.arange(0, BY)[None, :]
    at = phi + (row * T + token)[:, None] * (2 * Y) + y
    inside = (token < T)[:, None] & (y < Y)
    tl.store(at, up * scale[:, None], mask=inside)
    tl.store(at + Y, down * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def _backward(
    x, W, factor, dphi, dx, dy, dfactor, x_b, x_h, x_t, H, T,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, weight, up, down, scale = _halves(x, W, row // H, row % H, x_b, x_h, x_t, T, D, BD, Y, BY, UNIT, ROWS, P)
    y = tl.arange(0, BY)[None, :]
    held = (token < T)[:, None]
    at = dphi + (row * T + token)[:, None] * (2 * Y) + y
    d_up = tl.load(at, mask=held & (y < Y), other=0.0).to(tl.float32)
    d_down = tl.load(at + Y, mask=held & (y < Y), other=0.0).to(tl.float32)
    along = (tl.sum(d_up * up, axis=1) + tl.sum(d_down * down, axis=1)) * scale
    if FACTOR:
        tl.store(dfactor + row * T + token, along, mask=token < T)
    if UNIT:
        d_up -= up * (along * scale)[:, None]
        d_down -= down * (along * scale)[:, None]
    if FACTOR:
        scale *= tl.load(factor + row * T + token, mask=token < T, other=0.0).to(tl.float32)
    d_up = up * (d_up - tl.sum(d_up * up, axis=1)[:, None])
    d_down = down * (d_down - tl.sum(d_down * down, axis=1)[:, None])
    dys = ((d_up - d_down) * scale[:, None]).to(weight.dtype)
    tl.store(dy + (row * T + token)[:, None] * Y + y, dys, mask=held & (y < Y))
    d = tl.arange(0, BD)[None, :]
    at = dx + (row * T + token)[:, None] * D + d
    tl.store(at, tl.dot(dys, tl.trans(weight), input_precision=P), mask=held & (d < D))


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, factor, unit):
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = W.detach().to(x.dtype).contiguous()
        factor = None if factor is None else factor.contiguous()
        batch, heads, tokens, dim = x.shape
        columns = W.shape[-1]
        constants = dict(
            D=dim, BD=max(16, triton.next_power_of_2(dim)), Y=columns, BY=max(16, triton.next_power_of_2(columns)),
            UNIT=unit, FACTOR=factor is not None, ROWS=ROWS,
            P="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
        grid = batch * heads, triton.cdiv(tokens, ROWS)
        phi = x.new_empty(batch, heads, tokens, 2 * columns)
        _forward[grid](x, weight, factor, phi, *x.stride()[:3], heads, tokens, **constants)
        ctx.save_for_backward(x, weight, factor)
        ctx.launch = grid, constants
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx, dphi):
        x, weight, factor = ctx.saved_tensors
        grid, constants = ctx.launch
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dy = x.new_empty(*x.shape[:3], weight.shape[-1])
        dfactor = None if factor is None else torch.empty_like(factor)
        _backward[grid](
            x, weight, factor, dphi.contiguous(), dx, dy, dfactor, *x.stride()[:3], *x.shape[1:3], **constants
        )
        return dx, (x.mT @ dy).sum(0).float(), dfactor, None


def _computed_in(x: Tensor) -> torch.dtype:
    """As a product in torch would be."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fuses(x: Tensor, map: nn.Module) -> bool:
    """Whether `hedgehog` is `map`, and faster."""
    return x.is_cuda and isinstance(map, Hedgehog) and _computed_in(x) == torch.bfloat16 and map.dim <= 512


def hedgehog(x: Tensor, W: Tensor, factor: Tensor | None, unit: bool) -> Tensor:
    """phi [B, H, T, F] of x [B, H, T, D], by W [H, D, F / 2] and a factor [B, H, T, 1]."""
    return _Hedgehog.apply(x.to(_computed_in(x)), W, factor, unit)
