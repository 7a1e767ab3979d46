"""The whole layer with an additive state, fused: near softmax, far state, convolution, feature maps.

Forward reads q, k, v and writes out once, and reads k, v of all segments but the last once more. Features, scores and
weights are never written; of states, one per segment, and for backward three numbers per query. Backward writes the
states X and dX of every chunk in the inputs' dtype; with them all chunks are independent of each other.
"""

from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunked import chunk_size
from .additive_backward import backward_keys, backward_queries
from .additive_forward import forward, scan
from .shape import (
    DTYPES,
    INDEPENDENT_PROGRAMS,
    PROGRAMS,
    Shape,
    fits_learned,
    refused,
    results,
    room,
    rows_last,
    strides,
)

MAPS = ("elu1", "hedgehog", "t2r")
LAUNCH = {
    "scan": dict(num_stages=3),
    "forward": dict(num_warps=4, num_stages=2),
    "backward_queries": dict(num_warps=4, num_stages=1),
    "backward_keys": dict(num_warps=4, num_stages=1),
}


def refuses(problem) -> str | None:
    """Why these kernels cannot do `problem`, or None."""
    config, k, v = problem.config, problem.k, problem.v
    size = chunk_size(config)
    if reason := refused(problem):
        return reason
    if problem.state is not None and problem.state.S.requires_grad:
        return "the state needs a gradient"
    if config.feature_map not in MAPS:
        return f"feature_map {config.feature_map} is none of {', '.join(MAPS)}"
    if config.state != "additive" or config.sinks or config.far_weight == "query":
        return "they know additive states without sinks and without weights by query"
    if config.combine == "sum" and config.norm != "sum":
        return f"norm {config.norm} is not sum"
    if problem.q_features.x is not problem.q or problem.k_features.x is not problem.k:
        return "features are not of q and k after the rotary embedding"
    if not 16 <= size <= 128 or size & (size - 1):
        return f"chunks of {size} tokens are no power of 2 from 16 to 128"
    largest = 64 if v.dtype == torch.float32 else 256
    if max(k.shape[-1], v.shape[-1], problem.k_features.map.dim) > largest:
        return f"heads or features are larger than {largest}, which is what fits shared memory in {v.dtype}"
    if config.feature_map != "elu1" and not all(fits_learned(x.shape[-1]) for x in (k, v)):
        # On an H100, 240 KiB are asked for of 227.
        return "heads are neither of up to 64 nor of 128, which is what fits shared memory beside learned maps"
    return None


def attention(problem) -> Tensor:
    """[B, H, T, D_v] in the dtype of v, differentiable; of a problem that `refuses` has nothing against."""
    q_map, k_map = problem.q_features.map, problem.k_features.map
    dtype = problem.v.dtype
    # Value columns do not meet: wide ones are done in parts, so that the state fits on chip.
    width = max(16, min(128, 128 * 128 // triton.next_power_of_2(q_map.dim)))
    shape = _Shape.of(problem)
    parts = []
    for part in range(0, problem.v.shape[-1], width):
        columns = slice(part, part + width)
        state = problem.state
        if state is not None:
            state = _padded_state(state.S[..., columns], state.z, shape)
        parts.append(
            _Attention.apply(
                problem.q.to(dtype), problem.k.to(dtype), problem.v[..., columns],
                getattr(q_map, "weight", None), getattr(q_map, "bias", None),
                getattr(k_map, "weight", None), getattr(k_map, "bias", None),
                problem.weights.near, problem.weights.far, problem.weights.conv, state, shape,
            )  # fmt: skip
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _Shape(Shape):
    @cached_property
    def block_f(self) -> int:
        return max(32, triton.next_power_of_2(self.features))

    @cached_property
    def columns(self) -> int:
        """Of a map's projection."""
        return self.features // 2 if self.config.feature_map == "hedgehog" else self.features

    def constants(self, value_dim: int, dtype: torch.dtype) -> dict:
        """Compile-time arguments of all kernels."""
        return dict(
            GROUPS=self.heads // self.kv_heads, D=self.dim, BD=max(32, triton.next_power_of_2(self.dim)),
            V=value_dim, BV=max(16, triton.next_power_of_2(value_dim)), F=self.features, BF=self.block_f,
            Y=self.columns, BY=self.block_f // 2 if self.config.feature_map == "hedgehog" else self.block_f,
            C=chunk_size(self.config), MAP=self.config.feature_map, INDEXED=self.source is not None,
            P="ieee" if dtype == torch.float32 else "tf32", dtype=DTYPES[dtype],
        )  # fmt: skip

    def window(self, taps: int) -> dict:
        """Compile-time arguments that say which keys are near."""
        kind, size, chunk = self.config.window, self.config.window_size, chunk_size(self.config)
        previous_near = kind == "terrace" or (kind == "sliding" and size > 1)
        return dict(
            TAPS=taps, W=size, WINDOW=kind or "none", SHARED=self.config.combine == "shared",
            OWN_FAR=kind is None or (size < chunk if kind != "terrace" else 2 * size <= chunk),
            PREVIOUS_NEAR=previous_near, PREVIOUS_FAR=previous_near and not (kind == "terrace" and size == chunk),
        )  # fmt: skip


def _padded_state(S: Tensor, z: Tensor, shape: _Shape) -> tuple[Tensor, Tensor]:
    """S [B * H_kv, BF, BV] and z [B * H_kv, BF] in the kernels' order of features."""
    value_dim = max(16, triton.next_power_of_2(S.shape[-1]))

    def arranged(x):  # (B, H_kv, F, E)
        x = x.flatten(0, 1).float()
        if shape.config.feature_map == "hedgehog":
            x = x.unflatten(1, (2, -1)).transpose(1, 2)
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, shape.block_f // 2 - x.shape[1])).flatten(1, 2)
        return torch.nn.functional.pad(x, (0, 0, 0, shape.block_f - x.shape[1]))

    S = torch.nn.functional.pad(arranged(S), (0, value_dim - S.shape[-1]))
    return S.contiguous(), arranged(z.unsqueeze(-1)).squeeze(-1).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, W_q, b_q, W_k, b_k, near, far, conv, state, shape):
        q, k, v = map(rows_last, (q, k, v))
        dtype = q.dtype
        maps = [None if x is None else x.detach().to(dtype).contiguous() for x in (W_q, b_q, W_k, b_k)]
        near, far = near.detach().float().contiguous(), far.detach().float().contiguous()
        conv = None if conv is None else conv.detach().float().contiguous()
        constants, window = shape.constants(v.shape[-1], dtype), shape.window(0 if conv is None else conv.shape[1])
        batch, heads = shape.batch, shape.heads
        count, span = shape.segments(batch * heads, PROGRAMS)
        layout = shape.source, shape.carries, shape.follows
        initial = (None, None) if state is None else state
        parts = _parts(shape, constants, count)
        if count > 1:
            _scan(shape, constants, window, (k, v), maps[2:], parts, count - 1, span)
        (out,) = results(shape, q[..., :1].expand(*q.shape[:3], v.shape[-1]))
        stores = any(ctx.needs_input_grad)
        lse, mass, top = (parts[0].new_empty(batch * heads * q.shape[2] if stores else 0) for _ in range(3))
        blocks, columns = _value_blocks(constants)
        forward[(batch * heads, count, blocks)](
            *shape.given(constants["BD"], q, k), *shape.given(columns["BV"], v, out), *maps, near, far, conv,
            *parts, *initial, lse, mass, top, *layout, *strides(q, k, v, out),
            batch, heads, shape.tokens, shape.past, shape.chunks, span, shape.scale,
            **constants | columns, **window, HAS_STATE=state is not None, STORE=stores, **LAUNCH["forward"],
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, *maps, near, far, conv, *parts, *initial, lse, mass, top)
        ctx.shape, ctx.segments, ctx.keywords = shape, (count, span), (constants, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, *maps, near, far, conv, S, z, kept, S_0, z_0, lse, mass, top = ctx.saved_tensors
        do = rows_last(do)
        shape, (constants, window) = ctx.shape, ctx.keywords
        batch, heads, kv_heads, size = shape.batch, shape.heads, shape.kv_heads, constants["C"]
        learned, layout = maps[0] is not None, (shape.source, shape.follows)
        dq, dk, dv = results(shape, q, k, v)
        dy_q = dy_k = None
        if learned:
            dy_q, dy_k = (room(shape)(*x.shape[:3], shape.columns, dtype=x.dtype, device=x.device) for x in (q, k))
        centre = torch.empty_like(lse)
        slope = room(shape)(lse.shape, device=lse.device)
        peak = torch.empty_like(lse, dtype=torch.int32)

        states = _states(shape, constants, q)
        count, span = ctx.segments
        _scan(shape, constants, window, (k, v), maps[2:], (S, z, kept), count, span, (S_0, z_0), states)
        count, span = shape.segments(batch * heads, INDEPENDENT_PROGRAMS)
        outer = S.new_empty(count, batch, heads, size, size) if conv is not None else None
        by_d, by_v = shape.given(constants["BD"], q, k, dq, dk), shape.given(constants["BV"], v, do, dv)
        sizes = heads, shape.tokens, shape.past, shape.chunks
        backward_queries[(batch * heads, count)](
            *by_d[:2], *by_v[:2], by_d[2], dy_q, *maps, near, far, *states, lse, mass, top, centre, slope, peak,
            outer, *layout, *strides(q, k, v, do, dq), *sizes, span, shape.scale, **constants, **window,
            **LAUNCH["backward_queries"],
        )  # fmt: skip

        rows = batch * kv_heads
        count, span = shape.segments(rows, PROGRAMS)
        parts, rows_of = _parts(shape, constants, count), (mass, centre if window["SHARED"] else slope)
        if count > 1:
            _scan(shape, constants, window, (q, do), maps[:2], parts, count - 1, span, of_rows=(far, *rows_of))
        _scan(
            shape, constants, window, (q, do), maps[:2], parts, count, span, states=states, of_rows=(far, *rows_of)
        )
        count, span = shape.segments(rows, INDEPENDENT_PROGRAMS)
        backward_keys[(rows, count)](
            *by_d[:2], *by_v[:2], by_d[3], by_v[2], dy_k, *maps, near, far, conv, *states, lse, mass, centre,
            slope, peak, *layout, *strides(q, k, v, do, dk, dv), *sizes, span, shape.scale, **constants, **window,
            **LAUNCH["backward_keys"],
        )  # fmt: skip

        dfar = slope.view(batch, heads, -1).sum((0, 2))
        # All weights of a row are centred, so what the far ones gain by lam the near ones lose by g.
        dnear = -far * dfar / near if ctx.needs_input_grad[7] and window["SHARED"] else None
        dconv = None
        if conv is not None:
            query, tap = (torch.arange(n, device=do.device) for n in (size, window["TAPS"]))
            key = (query[:, None] - tap) % size
            dconv = outer.sum((0, 1)).gather(2, key.expand(heads, -1, -1)).sum(1)
        dmaps = [None] * 4
        if learned:
            dmaps[0], dmaps[2] = ((x.mT @ dy).sum(0).float() for x, dy in ((q, dy_q), (k, dy_k)))
            if maps[1] is not None:
                dmaps[1], dmaps[3] = (dy.sum((0, 2), dtype=torch.float32).unsqueeze(1) for dy in (dy_q, dy_k))
        return dq, dk, dv, *dmaps, dnear, dfar, dconv, None, None


def _parts(shape: _Shape, constants: dict, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `count` segments add to X, and whether anything before them outlasts them."""
    rows = shape.batch * shape.kv_heads
    S = torch.empty(count, rows, constants["BF"], constants["BV"], device=shape.device)
    return S, S.new_empty(count, rows, constants["BF"]), S.new_empty(count, shape.batch)


def _states(shape: _Shape, constants: dict, like: Tensor) -> tuple[TensorDescriptor, Tensor]:
    """Room for X = [S, z] of every chunk, S in the dtype that products take it in."""
    features, values = constants["BF"], constants["BV"]
    states = like.new_empty(shape.batch * shape.kv_heads * shape.chunks * features, values)
    sums = states.new_empty(len(states), dtype=torch.float32)
    return TensorDescriptor(states, list(states.shape), [values, 1], [features, values]), sums


def _value_blocks(constants: dict) -> tuple[int, dict]:
    """Halves of wide values are programs of their own where they keep a state: it takes half the registers."""
    values = constants["BV"]
    part = values // 2 if values == constants["V"] > 64 else values
    return values // part, {"VALUES": values, "BV": part, "V": min(part, constants["V"])}


def _scan(
    shape: _Shape, constants: dict, window: dict, inputs: tuple[Tensor, Tensor], maps: list, parts: tuple, count: int,
    span: int, initial: tuple = (None, None), states: tuple | None = None, of_rows: tuple | None = None,
) -> None:  # fmt: skip
    """Launch of `scan` on k, v or, with `of_rows` (far, mass, centre), backwards on q, do; writes `states` if given."""
    x, y = inputs
    reverse = of_rows is not None
    scan[(shape.batch * shape.kv_heads, count)](
        *shape.given(constants["BD"], x), *shape.given(constants["BV"], y), *maps, *(of_rows or (None, None, None)),
        *parts, *initial, *(states or (None, None)), shape.source, shape.carries, shape.follows, *strides(x, y),
        shape.batch, shape.heads if reverse else shape.kv_heads, shape.tokens, shape.past if reverse else 0,
        shape.chunks, span, **constants | ({} if reverse else {"GROUPS": 1}), DELAY=window["PREVIOUS_NEAR"],
        REVERSE=reverse, WRITE=states is not None, HAS_STATE=initial[0] is not None,
        # 8 warps do products of 64 rows twice, and (Triton 3.6) read where they should not.
        num_warps=8 if constants["BF"] >= 128 else 4, **LAUNCH["scan"],
    )  # fmt: skip
