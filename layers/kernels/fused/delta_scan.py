"""The delta rule in Triton: the walk over chunks, in place of 3 launches per chunk, and the inverse within a chunk.

`delta_scan`: for each row and head, with M [F, E] held on chip (E = D_v + 1, in blocks of columns):

    M_c <- carries_c M_c        u_c = u0_c - W_c M_c        M_{c+1} = total_c M_c + K_c^T u_c

Backward walks the other way; what is a product over all chunks at once is left to torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 16  # of M per program: the least that tensor cores take, since rows times heads alone do not fill a GPU


@triton.jit
def _places(E, C: tl.constexpr, F: tl.constexpr, BE: tl.constexpr):
    """Which columns of its block a program has, and where its parts of M, u and K lie within one chunk."""
    columns = (tl.program_id(1) * BE + tl.arange(0, BE))[None, :]
    keys, features = tl.arange(0, C)[:, None], tl.arange(0, F)
    return columns < E, features[:, None] * E + columns, keys * E + columns, keys * F + features[None, :]


@triton.jit
def _forward(
    u0, W, K, factors, start, before, u, end, n, E,
    C: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    held, at_M, at_u, at_K = _places(E, C, F, BE)
    M = tl.load(start + row * F * E + at_M, mask=held, other=0.0)
    for c in range(n):
        chunk = row * n + c
        M = M * tl.load(factors + chunk * 2)
        tl.store(before + chunk * F * E + at_M, M, mask=held)
        left = tl.load(u0 + chunk * C * E + at_u, mask=held, other=0.0)
        left -= tl.dot(tl.load(W + chunk * C * F + at_K), M, input_precision=PRECISION)
        tl.store(u + chunk * C * E + at_u, left, mask=held)
        M = M * tl.load(factors + chunk * 2 + 1)
        M += tl.dot(tl.trans(tl.load(K + chunk * C * F + at_K)), left, input_precision=PRECISION)
    tl.store(end + row * F * E + at_M, M, mask=held)


@triton.jit
def _backward(
    du, W, K, factors, dbefore, dend, dafter, du_all, dstart, n, E,
    C: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    held, at_M, at_u, at_K = _places(E, C, F, BE)
    dM = tl.load(dend + row * F * E + at_M, mask=held, other=0.0)
    for step in range(n):
        chunk = row * n + n - 1 - step
        tl.store(dafter + chunk * F * E + at_M, dM, mask=held)
        dleft = tl.load(du + chunk * C * E + at_u, mask=held, other=0.0)
        dleft += tl.dot(tl.load(K + chunk * C * F + at_K), dM, input_precision=PRECISION)
        tl.store(du_all + chunk * C * E + at_u, dleft, mask=held)
        dM = dM * tl.load(factors + chunk * 2 + 1) + tl.load(dbefore + chunk * F * E + at_M, mask=held, other=0.0)
        dM -= tl.dot(tl.trans(tl.load(W + chunk * C * F + at_K)), dleft, input_precision=PRECISION)
        dM = dM * tl.load(factors + chunk * 2)
    tl.store(dstart + row * F * E + at_M, dM, mask=held)


@triton.jit
def _invert(A, inverse, C: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    below = tl.where(row > column, tl.load(A + at), 0.0)
    T = tl.where(row == column, 1.0, 0.0)
    for i in range(1, C):
        coefficients = tl.sum(tl.where(row == i, below, 0.0), axis=0)
        T -= tl.where(row == i, tl.sum(coefficients[:, None] * T, axis=0)[None, :], 0.0)
    tl.store(inverse + at, T)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, right):
        inverse = torch.empty_like(A)
        size = A.shape[-1]
        _invert[(A.numel() // size**2,)](A, inverse, C=size)
        solved = inverse @ right
        ctx.save_for_backward(inverse, solved)
        return solved

    @staticmethod
    def backward(ctx, dsolved):
        inverse, solved = ctx.saved_tensors
        dright = inverse.mT @ dsolved
        return (-dright @ solved.mT).tril(-1), dright


def solve_unit_lower(A: Tensor, right: Tensor) -> Tensor:
    """x [.., C, X] of (I + A) x = right, where only what is below the diagonal of A [.., C, C], fp32, is read.

    By substitution, row by row: squaring A instead would be shorter, but its powers grow where keys are alike.
    """
    return _Solve.apply(A.contiguous(), right)


class _DeltaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u0, W, K, factors, start):
        rows, n, size, columns = u0.shape
        features = W.shape[-1]
        u, end = torch.empty_like(u0), torch.empty_like(start)
        before = u0.new_empty(rows, n, features, columns)
        ctx.launch = lambda kernel, *tensors: kernel[(rows, triton.cdiv(columns, COLUMNS))](
            *tensors, n, columns, C=size, F=features, BE=COLUMNS,
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            # Loading ahead would double what is held of W and K, and there is no room for it. With 8 warps, Triton 3.6
            # reads outside its memory in TF32.
            num_stages=1, num_warps=4,
        )  # fmt: skip
        ctx.launch(_forward, u0, W, K, factors, start, before, u, end)
        ctx.save_for_backward(u, W, K, factors, before)
        return u, before, end

    @staticmethod
    def backward(ctx, du, dbefore, dend):
        u, W, K, factors, before = ctx.saved_tensors
        du, dbefore, dend = du.contiguous(), dbefore.contiguous(), dend.contiguous()
        dafter, du_all, dstart = torch.empty_like(before), torch.empty_like(u), torch.empty_like(dend)
        ctx.launch(_backward, du, W, K, factors, dbefore, dend, dafter, du_all, dstart)
        dfactors = torch.zeros_like(factors)
        dfactors[..., 1] = (dafter * before).sum((-2, -1))
        return du_all, -du_all @ before.mT, u @ dafter.mT, dfactors, dstart


def delta_scan(
    u0: Tensor, W: Tensor, K: Tensor, total: Tensor, start: Tensor, carries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory.scan`'s loop.

    Args:
        u0: [B, n, H_kv, C, E]; W, K: [B, n, H_kv, C, F], fp32; total: [B, n, H_kv] in (0, 1]; start: [B, H_kv, F, E];
            carries: [B, n] bool. C and F are powers of 2 from 16 to 64 and to 256.

    Returns:
        u [B, n, H_kv, C, E], M before each chunk [B, n, H_kv, F, E], and M after the last [B, H_kv, F, E].
    """
    batch, n, heads = total.shape
    factors = torch.stack([carries[..., None].expand_as(total).to(total.dtype), total], dim=-1)

    def by_row(x):  # (B, n, H_kv, ..) -> (B * H_kv, n, ..)
        return x.transpose(1, 2).flatten(0, 1).contiguous()

    def back(x):
        return x.unflatten(0, (batch, heads)).transpose(1, 2)

    u, before, end = _DeltaScan.apply(*(by_row(x) for x in (u0, W, K, factors)), start.flatten(0, 1).contiguous())
    return back(u), back(before), end.unflatten(0, (batch, heads))
