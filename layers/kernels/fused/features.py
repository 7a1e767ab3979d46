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

from ...feature_maps import Hedgehog as HedgehogMap
from ..memory import Gates
from .tiles import LOG2E, sigmoid, softmax, softplus

ROWS = 32
# Kernels are not compiled again for another length.
SLOTS = ["T", "H", "past", "first", "held_slots", "skip", "slots"]


@triton.jit
def rows_of(source, batch, first, slots, past, T, ROWS: tl.constexpr, INDEXED: tl.constexpr):
    """Of a program's rows, which are slots from the `first` one on: their numbers from there, the tokens in them,
    counted from `past` on, and whether there are any. `slots` are all of a sequence."""
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = first + place
    if INDEXED:
        token = tl.load(source + batch * slots + token, mask=token < slots, other=-1)
    token -= past
    return place, token, (token >= 0) & (token < T)


@triton.jit
def _halves(
    x, W, batch, head, token, held, x_b, x_h, x_t,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """x [ROWS, BD], W [BD, BY], both softmaxes [ROWS, BY], and what scales them to unit length [ROWS]."""
    d, y = tl.arange(0, BD), tl.arange(0, BY)
    at = x + batch * x_b + head * x_h + token[:, None].to(tl.int64) * x_t + d[None, :]
    xs = tl.load(at, mask=held[:, None] & (d < D)[None, :], other=0.0)
    at = W + head * D * Y + d[:, None] * Y + y[None, :]
    weight = tl.load(at, mask=(d < D)[:, None] & (y < Y)[None, :], other=0.0)
    projected = tl.dot(xs, weight, input_precision=P)
    up = softmax(projected, Y)
    down = softmax(-projected, Y)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if UNIT:
        scale = tl.rsqrt(tl.sum(up * up, axis=1) + tl.sum(down * down, axis=1))
    return xs, weight, up, down, scale


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


@triton.jit(do_not_specialize=SLOTS)
def _forward(
    x, W, w_query, w_gate, b_gate, phi, log_decay, beta, source, x_b, x_h, x_t, H, T, past, first, held_slots,
    skip, slots, scale_q,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, WEIGHED: tl.constexpr,
    BF: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """phi [B * H, held_slots, BF] (from `skip` on) of slots from `first` on, zero where no token is; and gates."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    place, token, held = rows_of(source, batch, first, slots, past, T, ROWS, INDEXED)
    xs, _, up, down, scale = _halves(x, W, batch, head, token, held, x_b, x_h, x_t, D, BD, Y, BY, UNIT, ROWS, P)
    at = row * T + token
    if WEIGHED:
        _, logit = _along(xs, w_query, head, 0, D, BD, 1)
        scale *= tl.exp2(logit * (scale_q * LOG2E))
    if GATES > 0:
        length = _length(xs)
        _, logit = _along(xs, w_gate, head, 0, D, BD, GATES)
        logit = logit / length + tl.load(b_gate + head * GATES)
        tl.store(log_decay + at, -softplus(logit), mask=held)
    if GATES > 1:
        _, logit = _along(xs, w_gate, head, 1, D, BD, GATES)
        tl.store(beta + at, sigmoid(logit / length + tl.load(b_gate + head * GATES + 1)), mask=held)
    y = tl.arange(0, BY)[None, :]
    place += skip
    inside = (place < held_slots)[:, None] & (y < Y)
    at = (row * held_slots + place)[:, None] * BF + y
    scale = tl.where(held, scale, 0.0)
    tl.store(phi + at, up * scale[:, None], mask=inside)
    tl.store(phi + at + Y, down * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=SLOTS)
def _backward(
    x, W, w_query, w_gate, b_gate, dphi, dlog_decay, dbeta, dx, dy, dlogits, source, x_b, x_h, x_t,
    H, T, past, first, held_slots, skip, slots, scale_q,
    D: tl.constexpr, BD: tl.constexpr, Y: tl.constexpr, BY: tl.constexpr, UNIT: tl.constexpr, WEIGHED: tl.constexpr,
    BF: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dx; dy, of xW, by slot from `first` on; and `dlogits` [B, H, T, 1] of x.w of queries, or [B, H, T, 2 GATES] of
    keys: of the gates' x.w, and of their biases."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    place, token, held = rows_of(source, batch, first, slots, past, T, ROWS, INDEXED)
    at_dy = (row * tl.num_programs(1) * ROWS + place)[:, None] * Y
    place += skip
    held = held & (place < held_slots)
    xs, weight, up, down, scale = _halves(x, W, batch, head, token, held, x_b, x_h, x_t, D, BD, Y, BY, UNIT, ROWS, P)
    at = row * T + token
    y = tl.arange(0, BY)[None, :]
    inside = held[:, None] & (y < Y)
    at_phi = (row * held_slots + place)[:, None] * BF + y
    d_up = tl.load(dphi + at_phi, mask=inside, other=0.0).to(tl.float32)
    d_down = tl.load(dphi + at_phi + Y, mask=inside, other=0.0).to(tl.float32)
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
    dys = tl.where(held[:, None], (d_up - d_down) * scale[:, None], 0.0).to(weight.dtype)
    tl.store(dy + at_dy + y, dys, mask=y < Y)
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


class Hedgehog:
    """Features of x [B, H, T, D], some slots at a time, and backward of them.

    Args:
        x: in the dtype of the products; the first token is number `past` of those that slots are of.
        weights: of the map, of queries and of gates and their biases, or None where there are none.
        scale: of the weights of queries.
        source: [B, chunks, C] the token in each slot or -1; None: every token is in the slot of its number.
        columns: of buffers of features, zero beyond the map's own.

    Attributes:
        log_decay, beta: [B, H, T], once the slots of all tokens have been asked for.
    """

    def __init__(self, x: Tensor, weights: list[Tensor | None], unit: bool, scale: float, past: int = 0,
                 source: Tensor | None = None, columns: int | None = None):  # fmt: skip
        x = x if x.stride(-1) == 1 else x.contiguous()
        W, *few = weights
        self.x, self.scale, self.source, self.past = x, scale, source, past
        self.weights = [W.detach().to(x.dtype).contiguous()]
        self.weights += [None if w is None else w.detach().float().contiguous() for w in few]
        dim, map_columns = W.shape[-2:]
        gates = 0 if few[1] is None else few[1].shape[-1]
        self.columns = columns or 2 * map_columns
        self.constants = dict(
            D=dim, BD=max(16, triton.next_power_of_2(dim)), Y=map_columns, BF=self.columns,
            BY=max(16, triton.next_power_of_2(map_columns)), UNIT=unit, WEIGHED=few[0] is not None, GATES=gates,
            ROWS=ROWS, INDEXED=source is not None, P="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
        self.log_decay, self.beta = (
            x.new_empty(x.shape[:3], dtype=torch.float32) if gates > number else None for number in range(2)
        )

    def _launch(self, kernel, first: int, count: int, held: int, skip: int, *tensors: Tensor | None) -> None:
        batch, heads, tokens, _ = self.x.shape
        slots = 0 if self.source is None else self.source[0].numel()
        kernel[(batch * heads, triton.cdiv(count, ROWS))](
            self.x, *self.weights, *tensors, self.source, *self.x.stride()[:3], heads, tokens, self.past, first, held,
            skip, slots, self.scale, **self.constants,
        )  # fmt: skip

    def of(self, first: int, count: int) -> Tensor:
        """phi [B * H * count, columns] of `count` slots."""
        # What no program writes must be zero.
        make = self.x.new_empty if self.columns == 2 * self.constants["Y"] else self.x.new_zeros
        phi = make(self.x.shape[0] * self.x.shape[1] * count, self.columns)
        self._launch(_forward, first, count, count, 0, phi, self.log_decay, self.beta)
        return phi

    def start_back(self) -> None:
        """Room for gradients, of which `back` fills in a part."""
        make = torch.empty if self.source is None else torch.zeros
        x, few = self.x, dict(device=self.x.device)
        kinds = 1 if self.constants["WEIGHED"] else 2 * self.constants["GATES"]
        self.dx = make(x.shape, dtype=x.dtype, **few)
        self.dW = torch.zeros(self.weights[0].shape, **few)
        self.dlogits = make(*x.shape[:3], kinds, dtype=torch.float32, **few)

    def back(
        self, first: int, count: int, dphi: Tensor, dlog_decay: Tensor | None, dbeta: Tensor | None, skip: int = 0
    ) -> None:
        """Of `count` slots; dphi as `of` gives phi, with `skip` slots of each row before them and maybe more behind;
        gradients of gates by token."""
        x, batch, heads = self.x, *self.x.shape[:2]
        held = dphi.numel() // (self.columns * batch * heads)
        dy = x.new_empty(batch, heads, triton.cdiv(count, ROWS) * ROWS, self.constants["Y"])
        self._launch(_backward, first, count, held, skip, dphi, dlog_decay, dbeta, self.dx, dy, self.dlogits)
        # The tokens of these slots.
        if self.source is None:
            start, end = max(first - self.past, 0), min(first + count - self.past, x.shape[2])
            if start >= end:
                return
            skip = start + self.past - first
            x, dy = x[:, :, start:end], dy[:, :, skip : skip + end - start]
        else:
            index = (self.source.flatten(1)[:, first : first + count].long() - self.past).clamp(min=0)
            x = x.gather(2, index[:, None, :, None].expand(-1, heads, -1, x.shape[3]))
        self.dW += (x.mT @ dy).sum(0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of x and of each of `weights`."""

        def of_weights(dy):
            return (self.x.mT @ dy.to(self.x.dtype)).sum(0).float()

        gates, weighed = self.constants["GATES"], self.constants["WEIGHED"]
        dw_query = of_weights(self.dlogits) if weighed else None
        dw_gate, db_gate = None, None
        if gates:
            dw_gate = of_weights(self.dlogits[..., :gates])
            db_gate = self.dlogits[..., gates:].sum((0, 2)).unsqueeze(1)
        return self.dx, self.dW, dw_query, dw_gate, db_gate


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, w_query, w_gate, b_gate, unit, scale):
        features = Hedgehog(x, [W, w_query, w_gate, b_gate], unit, scale)
        phi = features.of(0, x.shape[2]).view(*x.shape[:3], -1)
        ctx.save_for_backward(x, W, w_query, w_gate, b_gate)
        ctx.keywords = unit, scale
        return phi, features.log_decay, features.beta

    @staticmethod
    @once_differentiable
    def backward(ctx, dphi, dlog_decay, dbeta):
        x, *weights = ctx.saved_tensors
        features = Hedgehog(x, weights, *ctx.keywords)
        features.start_back()
        given = [None if y is None else y.contiguous() for y in (dphi, dlog_decay, dbeta)]
        features.back(0, x.shape[2], *given)
        return *features.gradients(), None, None


def computed_in(x: Tensor) -> torch.dtype:
    """As a product in torch would be."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fuses(x: Tensor, map: nn.Module) -> bool:
    """Whether `hedgehog` is `map`, and faster."""
    return x.is_cuda and isinstance(map, HedgehogMap) and computed_in(x) == torch.bfloat16 and map.dim <= 512


def hedgehog(
    x: Tensor, map: HedgehogMap, unit: bool, scale: float, lam_query: Tensor | None, gates: nn.Module | None
) -> tuple[Tensor, Gates | None]:
    """phi [B, H, T, F] of x [B, H, T, D], with the weights of queries where there are `lam_query` [H, D, 1], and what
    `gates` (`TokenGates`) makes of keys."""
    few = (None, None) if gates is None else (gates.weight, gates.bias)
    phi, log_decay, beta = _Hedgehog.apply(x.to(computed_in(x)), map.weight, lam_query, *few, unit, scale)
    return phi, None if gates is None else Gates(log_decay, beta)
