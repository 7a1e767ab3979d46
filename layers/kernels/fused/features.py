"""What the far branch sees of queries or keys, in one pass over them: hedgehog features, their weights, and gates.

    phi = softmax(xW) ++ softmax(-xW), at unit length where asked for, and of queries times exp(scale x.w)
    g = -softplus(x.w_0 / |x| + b_0), beta = sigmoid(x.w_1 / |x| + b_1), of keys

Backward computes them again from x, and leaves gradients of weights to products over all tokens at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...feature_maps import Hedgehog
from ..memory import Gates
from .tiles import LOG2E, sigmoid, softmax, softplus

ROWS = 32


@triton.jit
def _halves(
    x, W, batch, head, x_b, x_h, x_t, T,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Which tokens, x [ROWS, BD], W [BD, BY], both softmaxes [ROWS, BY], and what scales them to unit length [ROWS]."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d, y = tl.arange(0, BD), tl.arange(0, BY)
    at = x + batch * x_b + head * x_h + token[:, None].to(tl.int64) * x_t + d[None, :]
    xs = tl.load(at, mask=(token < T)[:, None] & (d < D)[None, :], other=0.0)
    at = W + head * D * Y + d[:, None] * Y + y[None, :]
    weight = tl.load(at, mask=(d < D)[:, None] & (y < Y)[None, :], other=0.0)
    projected = tl.dot(xs, weight, input_precision=P)
    up = softmax(projected, Y)
    down = softmax(-projected, Y)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if UNIT:
        scale = tl.rsqrt(tl.sum(up * up, axis=1) + tl.sum(down * down, axis=1))
    return token, xs, weight, up, down, scale


@triton.jit
def _along(xs, w, head, column, D: tl.constexpr, BD: tl.constexpr, COLUMNS: tl.constexpr):
    """w [BD] of a head's column of w [H, D, COLUMNS], and x.w [ROWS]."""
    d = tl.arange(0, BD)
    weight = tl.load(w + (head * D + d) * COLUMNS + column, mask=d < D, other=0.0).to(tl.float32)
    return weight, tl.sum(xs.to(tl.float32) * weight[None, :], axis=1)


@triton.jit
def _length(xs):
    xs = xs.to(tl.float32)
    return tl.maximum(tl.sqrt(tl.sum(xs * xs, axis=1)), 1e-12)


@triton.jit(do_not_specialize=["T", "H"])
def _forward(
    x, W, w_query, w_gate, b_gate, phi, log_decay, beta, x_b, x_h, x_t, H, T, scale_q,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, WEIGHED: tl.constexpr,
    GATES: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = row % H
    token, xs, _, up, down, scale = _halves(x, W, row // H, head, x_b, x_h, x_t, T, D, BD, Y, BY, UNIT, ROWS, P)
    at = row * T + token
    if WEIGHED:
        _, logit = _along(xs, w_query, head, 0, D, BD, 1)
        scale *= tl.exp2(logit * (scale_q * LOG2E))
    if GATES > 0:
        length = _length(xs)
        _, logit = _along(xs, w_gate, head, 0, D, BD, GATES)
        logit = logit / length + tl.load(b_gate + head * GATES)
        tl.store(log_decay + at, -softplus(logit), mask=token < T)
    if GATES > 1:
        _, logit = _along(xs, w_gate, head, 1, D, BD, GATES)
        tl.store(beta + at, sigmoid(logit / length + tl.load(b_gate + head * GATES + 1)), mask=token < T)
    y = tl.arange(0, BY)[None, :]
    inside = (token < T)[:, None] & (y < Y)
    tl.store(phi + at[:, None] * (2 * Y) + y, up * scale[:, None], mask=inside)
    tl.store(phi + at[:, None] * (2 * Y) + Y + y, down * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def _backward(
    x, W, w_query, w_gate, b_gate, dphi, dlog_decay, dbeta, dx, dy, dlogits, x_b, x_h, x_t, H, T, scale_q,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, WEIGHED: tl.constexpr,
    GATES: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dx; dy [B, H, T, Y], of xW; and `dlogits` [B, H, T, 1] of x.w of queries, or [B, H, T, 2 GATES] of keys: of the
    gates' x.w, and of their biases."""
    row = tl.program_id(0).to(tl.int64)
    head = row % H
    token, xs, weight, up, down, scale = _halves(x, W, row // H, head, x_b, x_h, x_t, T, D, BD, Y, BY, UNIT, ROWS, P)
    at = row * T + token
    held = token < T
    y = tl.arange(0, BY)[None, :]
    inside = held[:, None] & (y < Y)
    d_up = tl.load(dphi + at[:, None] * (2 * Y) + y, mask=inside, other=0.0).to(tl.float32)
    d_down = tl.load(dphi + at[:, None] * (2 * Y) + Y + y, mask=inside, other=0.0).to(tl.float32)
    along = (tl.sum(d_up * up, axis=1) + tl.sum(d_down * down, axis=1)) * scale
    if UNIT:
        d_up -= up * (along * scale)[:, None]
        d_down -= down * (along * scale)[:, None]
    if WEIGHED:
        w, logit = _along(xs, w_query, head, 0, D, BD, 1)
        factor = tl.exp2(logit * (scale_q * LOG2E))
        scale *= factor
        along *= factor * scale_q
        tl.store(dlogits + at, along, mask=held)
    d_up = up * (d_up - tl.sum(d_up * up, axis=1)[:, None])
    d_down = down * (d_down - tl.sum(d_down * down, axis=1)[:, None])
    dys = ((d_up - d_down) * scale[:, None]).to(weight.dtype)
    tl.store(dy + at[:, None] * Y + y, dys, mask=inside)
    dxs = tl.dot(dys, tl.trans(weight), input_precision=P)
    if WEIGHED:
        dxs += along[:, None] * w[None, :]
    if GATES > 0:
        length = _length(xs)
        w, logit = _along(xs, w_gate, head, 0, D, BD, GATES)
        given = tl.load(dlog_decay + at, mask=held, other=0.0)
        given *= -sigmoid(logit / length + tl.load(b_gate + head * GATES))
        tl.store(dlogits + at * (2 * GATES), given / length, mask=held)
        tl.store(dlogits + at * (2 * GATES) + GATES, given, mask=held)
        dxs += (given / length)[:, None] * w[None, :]
        shorter = given * logit
    if GATES > 1:
        w, logit = _along(xs, w_gate, head, 1, D, BD, GATES)
        strength = sigmoid(logit / length + tl.load(b_gate + head * GATES + 1))
        given = tl.load(dbeta + at, mask=held, other=0.0) * strength * (1.0 - strength)
        tl.store(dlogits + at * (2 * GATES) + 1, given / length, mask=held)
        tl.store(dlogits + at * (2 * GATES) + GATES + 1, given, mask=held)
        dxs += (given / length)[:, None] * w[None, :]
        shorter += given * logit
    if GATES > 0:
        dxs -= xs.to(tl.float32) * (shorter / (length * length * length))[:, None]
    d = tl.arange(0, BD)[None, :]
    tl.store(dx + at[:, None] * D + d, dxs, mask=held[:, None] & (d < D))


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, w_query, w_gate, b_gate, unit, scale):
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = W.detach().to(x.dtype).contiguous()
        few = [None if w is None else w.detach().float().contiguous() for w in (w_query, w_gate, b_gate)]
        batch, heads, tokens, dim = x.shape
        columns, gates = W.shape[-1], 0 if w_gate is None else w_gate.shape[-1]
        constants = dict(
            D=dim, BD=max(16, triton.next_power_of_2(dim)), Y=columns, BY=max(16, triton.next_power_of_2(columns)),
            UNIT=unit, WEIGHED=w_query is not None, GATES=gates, ROWS=ROWS,
            P="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
        grid = batch * heads, triton.cdiv(tokens, ROWS)
        phi = x.new_empty(batch, heads, tokens, 2 * columns)
        log_decay, beta = (
            x.new_empty(batch, heads, tokens, dtype=torch.float32) if gates > number else None for number in range(2)
        )
        _forward[grid](x, weight, *few, phi, log_decay, beta, *x.stride()[:3], heads, tokens, scale, **constants)
        ctx.save_for_backward(x, weight, *few)
        ctx.launch = grid, scale, constants
        return phi, log_decay, beta

    @staticmethod
    @once_differentiable
    def backward(ctx, dphi, dlog_decay, dbeta):
        x, weight, *few = ctx.saved_tensors
        grid, scale, constants = ctx.launch
        gates, weighed = constants["GATES"], constants["WEIGHED"]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dy = x.new_empty(*x.shape[:3], weight.shape[-1])
        dlogits = x.new_empty(*x.shape[:3], 1 if weighed else 2 * gates, dtype=torch.float32)
        given = [None if y is None else y.contiguous() for y in (dphi, dlog_decay, dbeta)]
        _backward[grid](
            x, weight, *few, *given, dx, dy, dlogits, *x.stride()[:3], *x.shape[1:3], scale, **constants
        )

        def of_weights(dy):
            return (x.mT @ dy.to(x.dtype)).sum(0).float()

        dw_query = of_weights(dlogits) if weighed else None
        dw_gate, db_gate = None, None
        if gates:
            dw_gate, db_gate = of_weights(dlogits[..., :gates]), dlogits[..., gates:].sum((0, 2)).unsqueeze(1)
        return dx, of_weights(dy), dw_query, dw_gate, db_gate, None, None


def _computed_in(x: Tensor) -> torch.dtype:
    """As a product in torch would be."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fuses(x: Tensor, map: nn.Module) -> bool:
    """Whether `hedgehog` is `map`, and faster."""
    return x.is_cuda and isinstance(map, Hedgehog) and _computed_in(x) == torch.bfloat16 and map.dim <= 512


def hedgehog(
    x: Tensor, map: Hedgehog, unit: bool, scale: float, lam_query: Tensor | None, gates: nn.Module | None
) -> tuple[Tensor, Gates | None]:
    """phi [B, H, T, F] of x [B, H, T, D], with the weights of queries where there are `lam_query` [H, D, 1], and what
    `gates` (`TokenGates`) makes of keys."""
    few = (None, None) if gates is None else (gates.weight, gates.bias)
    phi, log_decay, beta = _Hedgehog.apply(x.to(_computed_in(x)), map.weight, lam_query, *few, unit, scale)
    return phi, None if gates is None else Gates(log_decay, beta)
