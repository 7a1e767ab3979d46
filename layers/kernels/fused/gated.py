"""The whole layer with any state's rule, fused: features, state, near softmax with sinks, convolution.

Features are written once; the state before every chunk is, too, in the inputs' dtype. With it all chunks are
independent of each other, forward and backward: only the walks from chunk to chunk are not (`gated_state`).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunked import Layout, chunk_size
from .gated_attend import SINK_ROWS, forward
from .gated_backward import backward_conv, backward_far, backward_keys, backward_queries, backward_states
from .gated_state import prepare, prepare_back, walk, walk_back
from .shape import DTYPES, INDEPENDENT_PROGRAMS, Shape, refused, results, room, rows_last, strides

LAUNCH = {
    "prepare": dict(num_warps=4, num_stages=1),
    "walk": dict(num_warps=4, num_stages=2),
    "forward": dict(num_warps=4, num_stages=1),
    "backward_queries": dict(num_warps=4, num_stages=1),
    "backward_keys": dict(num_warps=4, num_stages=1),
    "backward_far": dict(num_warps=4, num_stages=1),
    "backward_states": dict(num_warps=4, num_stages=1),
    "backward_conv": dict(num_warps=4, num_stages=2),
    "walk_back": dict(num_warps=4, num_stages=2),
    "prepare_back": dict(num_warps=4, num_stages=1),
}
# Maps whose features are never negative, so that no denominator is.
POSITIVE = ("hedgehog", "elu1", "relu", "exp", "t2r")


def refuses(problem) -> str | None:
    """Why these kernels cannot do `problem`, or None."""
    config, k, v = problem.config, problem.k, problem.v
    size = chunk_size(config)
    if reason := refused(problem):
        return reason
    if config.feature_map not in POSITIVE or config.combine != "shared":
        return f"features are not of {', '.join(POSITIVE)}, or not under one denominator"
    if config.window is None or config.window_size != 64 or size != 64:
        return "windows are not of 64 tokens"
    if config.sinks > SINK_ROWS.value or config.conv_taps > size - config.sinks:
        return f"there are more than {SINK_ROWS.value} sinks, or the convolution reaches further than the window"
    largest = 64 if v.dtype == torch.float32 else 128
    if max(k.shape[-1], v.shape[-1]) > largest or problem.k_features.map.dim > 2 * largest:
        return f"heads are larger than {largest}, or features than twice that, which is what fits in {v.dtype}"
    if k.shape[-1] % 16 or v.shape[-1] % 16:
        return "heads are not multiples of 16"
    return None


def attention(problem) -> Tensor:
    """[B, H, T, D_v] in the dtype of v, differentiable; of a problem that `refuses` has nothing against."""
    dtype, config = problem.v.dtype, problem.config
    phi_q, phi_k = (_wide(x.to(dtype)) for x in (problem.phi_q, problem.phi_k))
    sink_q = problem.sink_q if config.sinks else None
    return _Attention.apply(
        problem.q.to(dtype), problem.k.to(dtype), problem.v, None if sink_q is None else sink_q.to(dtype), phi_q, phi_k,
        *_gates(problem.gates, phi_k), problem.weights.near, problem.weights.far, problem.weights.conv, problem.state,
        Shape.of(problem),
    )  # fmt: skip


def folds(phi_k: Tensor, v: Tensor, config) -> bool:
    """Whether `end_state` can do this."""
    return (
        v.is_cuda and v.dtype in DTYPES and chunk_size(config) == 64 and v.shape[-1] % 16 == 0 and v.shape[-1] <= 128
        and phi_k.shape[-1] <= (256 if v.dtype == torch.bfloat16 else 128) and not torch.is_grad_enabled()
    )  # fmt: skip


def end_state(phi_k: Tensor, v: Tensor, gates, state, tokens, config):
    """`kernels.fold` of many keys."""
    layout = Layout(tokens, chunk_size(config), config.sinks)
    batch, kv_heads, length, features = phi_k.shape
    shape = Shape(config, v.device, batch, kv_heads, kv_heads, 0, features, length, 0, 1.0, layout.chunks,
                  *layout.gathered)  # fmt: skip
    v, phi_k = rows_last(v), rows_last(_wide(phi_k.to(v.dtype)))
    constants = _constants(shape, v.shape[-1], phi_k.shape[-1], v.dtype)
    log_decay, beta = (None if x is None else x.float().contiguous() for x in _gates(gates, phi_k))
    S, z = _States.of(phi_k, v, log_decay, beta, state, shape, constants, each=False, stores=False).end
    S, z = (x.unflatten(0, (batch, kv_heads)) for x in (S, z))
    return type(state)(S[:, :, :features, : v.shape[-1]].contiguous(), z[:, :, :features].contiguous())


def _wide(phi: Tensor) -> Tensor:
    """As many features as the next power of 2, with zeros."""
    more = max(16, triton.next_power_of_2(phi.shape[-1])) - phi.shape[-1]
    return torch.nn.functional.pad(phi, (0, more)) if more else phi


def _gates(gates, phi_k: Tensor) -> tuple[Tensor, Tensor | None]:
    if gates is None:
        return torch.zeros(phi_k.shape[:3], device=phi_k.device), None
    return gates.log_decay, gates.beta


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of [.., columns or more], `rows` rows at a time."""
    x = x.view(-1, x.shape[-1])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@dataclass
class _States:
    """The state's side of a sequence; n chunks of C slots, R = B * H_kv rows.

    Attributes:
        u: [R * n * C, BV]; mass: [R * n * C], its last column; G: [R * n * C]; W: [R * n * C, BF] and inverse:
            [R * n * C, C] of the delta rule.
        states: [R * n * BF, BV] and sums: [R * n * BF], before each chunk; end: those after the last.
    """

    u: Tensor
    mass: Tensor
    G: Tensor
    W: Tensor
    inverse: Tensor
    states: Tensor
    sums: Tensor
    end: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, phi_k, v, log_decay, beta, state, shape: Shape, constants: dict, each: bool, stores: bool) -> "_States":
        """`each`: also before each chunk; `stores`: with what backward needs."""
        rows, size, n = shape.batch * shape.kv_heads, constants["C"], shape.chunks
        slots, width, columns = rows * n * size, constants["BV"], constants["BF"]
        delta = beta is not None
        u, mass, mass_all, G = v.new_empty(slots, width), *(v.new_empty(slots, dtype=torch.float32) for _ in range(3))
        W = v.new_empty(slots if delta else 0, columns)
        inverse = v.new_empty(slots if delta and stores else 0, size)
        states = v.new_empty(rows * n * columns if each else 0, width)
        sums = G.new_empty(rows * n * columns if each else 0)
        end = G.new_empty(rows, columns, width), G.new_empty(rows, columns)
        block = _column_block(constants["V"], width)
        some = dict(DELTA=delta, INDEXED=constants["INDEXED"], P=constants["P"], dtype=constants["dtype"])
        layout = shape.source, shape.first

        def by_slot(x, columns):
            return None if not x.numel() else _descriptor(x, size, columns)

        sizes = shape.kv_heads, shape.tokens, n
        block_f = constants["BLOCK_F"]
        prepare[(rows, n)](
            *shape.given(block_f, phi_k), *shape.given(width, v), log_decay, beta, by_slot(u, width), mass,
            by_slot(W, block_f), by_slot(inverse, size), G, *layout, *strides(phi_k, v), *sizes,
            V=constants["V"], BV=width, BF=columns, BLOCK_F=block_f, C=size, SINKS=constants["SINKS"], STORE=stores,
            **some, **LAUNCH["prepare"],
        )  # fmt: skip
        initial = (None, None) if state is None else _padded(state, columns, width)
        walk[(rows, triton.cdiv(constants["V"], block))](
            *shape.given(columns, phi_k), by_slot(u, block), mass, mass_all, by_slot(W, columns), G, *initial,
            _descriptor(states, columns, block) if each else None, sums, *end, shape.source, shape.carries,
            *strides(phi_k), *sizes, BV=width, BE=block, BF=columns, C=size, HAS_STATE=state is not None, STATES=each,
            **some, **LAUNCH["walk"],
        )  # fmt: skip
        return cls(u, mass_all, G, W, inverse, states, sums, end)


def _column_block(value_dim: int, width: int) -> int:
    """Columns of the state that a program of a walk has on chip."""
    return next((size for size in (32, 16) if value_dim % size == 0), width)


def _padded(state, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """S [R, BF, BV] and z [R, BF]."""
    S, z = state.S.flatten(0, 1).float(), state.z.flatten(0, 1).float()
    more = columns - S.shape[1]
    pad = torch.nn.functional.pad
    return pad(S, (0, width - S.shape[2], 0, more)).contiguous(), pad(z, (0, more)).contiguous()


def _constants(shape: Shape, value_dim: int, features: int, dtype: torch.dtype) -> dict:
    """Compile-time arguments, of which every kernel takes some."""
    return dict(
        GROUPS=shape.heads // shape.kv_heads, D=shape.dim, BD=max(16, triton.next_power_of_2(shape.dim)), V=value_dim,
        BV=max(16, triton.next_power_of_2(value_dim)), BF=features, BLOCK_F=min(64, features),
        C=chunk_size(shape.config), SINKS=shape.config.sinks, INDEXED=shape.source is not None,
        P="ieee" if dtype == torch.float32 else "tf32", dtype=DTYPES[dtype],
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_q, phi_q, phi_k, log_decay, beta, near, far, conv, state, shape):
        q, k, v, phi_q, phi_k = map(rows_last, (q, k, v, phi_q, phi_k))
        sink_q = None if sink_q is None else rows_last(sink_q)
        log_decay, beta = (None if x is None else x.detach().float().contiguous() for x in (log_decay, beta))
        near, far = near.detach().float().contiguous(), far.detach().float().contiguous()
        conv = None if conv is None else conv.detach().float().contiguous()
        config, stores = shape.config, any(ctx.needs_input_grad)
        constants = _constants(shape, v.shape[-1], phi_k.shape[-1], v.dtype)
        side = _States.of(phi_k, v, log_decay, beta, state, shape, constants, True, stores)
        window = dict(
            TAPS=0 if conv is None else conv.shape[1], SINK_Q=sink_q is not None, WINDOW=config.window,
            NEAR_BEFORE=config.window != "block", FAR_BEFORE=config.window == "sliding", CLAMPS=config.state == "delta",
        )  # fmt: skip
        (out,) = results(shape, q[..., :1].expand(*q.shape[:3], v.shape[-1]))
        rows = shape.batch * shape.heads * q.shape[2] if stores else 0
        attended, lse, mass, top = (side.G.new_empty(rows, *width) for width in ((v.shape[-1],), (), (), ()))
        size, block_f = constants["C"], constants["BLOCK_F"]
        (v_, out_), (phi_q_, phi_k_) = shape.given(constants["BV"], v, out), shape.given(block_f, phi_q, phi_k)
        forward[(shape.batch * shape.heads, shape.chunks)](
            *shape.given(constants["BD"], q, k), v_, *_given(shape, constants["BD"], sink_q), k, v, out_, phi_q_,
            phi_k_, _descriptor(side.u, size, constants["BV"]), side.mass, side.G,
            _descriptor(side.states, block_f, constants["BV"]), side.sums, near, far, conv, attended, lse, mass,
            top, shape.source, shape.first, shape.follows,
            *strides(q, k, v, q if sink_q is None else sink_q, out, phi_q, phi_k), shape.heads, shape.tokens,
            shape.past, shape.chunks, shape.scale, **constants, **window, STORE=stores,
            **LAUNCH["forward"],
        )  # fmt: skip
        if stores:
            ctx.save_for_backward(
                q, k, v, sink_q, phi_q, phi_k, log_decay, beta, near, far, conv, attended, lse, mass, top,
                side.u, side.mass, side.G, side.W, side.inverse, side.states, side.sums,
            )  # fmt: skip
        ctx.shape, ctx.keywords = shape, (constants, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        (q, k, v, sink_q, phi_q, phi_k, log_decay, beta, near, far, conv, attended, lse, mass, top,
         u, u_mass, G, W, inverse, states, sums) = ctx.saved_tensors  # fmt: skip
        do = rows_last(do)
        shape, (constants, window) = ctx.shape, ctx.keywords
        batch, heads, rows, n = shape.batch, shape.heads, shape.batch * shape.kv_heads, shape.chunks
        size, width, features, block_f = (constants[name] for name in ("C", "BV", "BF", "BLOCK_F"))
        dq, dk, dv = results(shape, q, k, v)
        dsink_q = None if sink_q is None else results(shape, q)[0]
        dphi_q, dphi_k = (room(shape)(x.shape, dtype=x.dtype, device=x.device) for x in (phi_q, phi_k))
        centre = torch.empty_like(lse)
        slope = room(shape)(lse.shape, device=lse.device)
        peak = torch.empty_like(lse, dtype=torch.int32)
        layout = shape.source, shape.first, shape.follows
        sizes = shape.tokens, shape.past, n
        by_d, by_v = shape.given(constants["BD"], q, k, dq, dk), shape.given(width, v, do, dv)
        by_f = shape.given(block_f, phi_q, phi_k, dphi_q)
        u_, states_ = _descriptor(u, size, width), _descriptor(states, block_f, width)

        dk_sinks, dv_sinks = (
            G.new_empty(batch, heads, n, constants["SINKS"], x.shape[-1]) if constants["SINKS"] else None
            for x in (k, v)
        )
        sink_strides = q if sink_q is None else sink_q
        backward_queries[(batch * heads, n)](
            *by_d[:2], by_v[0], *_given(shape, constants["BD"], sink_q), k, v, by_v[1], by_d[2],
            *_given(shape, constants["BD"], dsink_q), *by_f, u_, u_mass, G, states_, sums, near, far, attended, lse,
            mass, top, centre, slope, peak, dk_sinks, dv_sinks, *layout,
            *strides(q, k, v, sink_strides, do, dq, phi_q, phi_k), heads, *sizes, shape.scale, **constants,
            **{name: x for name, x in window.items() if name != "TAPS"}, **LAUNCH["backward_queries"],
        )  # fmt: skip
        some = {name: window[name] for name in ("TAPS", "WINDOW", "NEAR_BEFORE")}
        few = {name: x for name, x in constants.items() if name not in ("BF", "BLOCK_F")}
        backward_keys[(rows, n)](
            *by_d[:2], *by_v[:2], by_d[3], by_v[2], near, far, conv, lse, centre, slope, peak, *layout,
            *strides(q, k, v, do, dk, dv), heads, *sizes, shape.scale, **few, **some, **LAUNCH["backward_keys"],
        )  # fmt: skip

        seen = window["FAR_BEFORE"]
        make = torch.empty if seen else torch.zeros
        du = make(u.shape, dtype=u.dtype, device=u.device)
        du_mass, du_mass_all = make(u_mass.shape, device=u.device), torch.empty_like(u_mass)
        dphi_seen = dG = None
        if seen:
            wide = torch.float32 if constants["GROUPS"] > 1 else u.dtype
            dphi_seen, dG = u.new_empty(len(u), features, dtype=wide), torch.empty_like(G)
            few = {name: x for name, x in constants.items() if name not in ("D", "BD")}
            backward_far[(rows, n)](
                by_v[1], *by_f[:2], u_, u_mass, G, far, mass, centre, _descriptor(du, size, width), du_mass, dphi_seen,
                dG, *layout, *strides(do, phi_q, phi_k), heads, *sizes, **few, **LAUNCH["backward_far"],
            )  # fmt: skip
        dstates, dsums, dsums_all = torch.empty_like(states), torch.empty_like(sums), torch.empty_like(sums)
        few = {name: x for name, x in constants.items() if name not in ("D", "BD", "SINKS")}
        dstates_ = _descriptor(dstates, block_f, width)
        backward_states[(rows, n, features // block_f)](
            by_v[1], by_f[0], G, far, mass, centre, dstates_, dsums, shape.source, shape.follows, *strides(do, phi_q),
            heads, *sizes, **few, DELAY=window["NEAR_BEFORE"], **LAUNCH["backward_states"],
        )  # fmt: skip
        block, delta = _column_block(v.shape[-1], width), beta is not None
        walk_back[(rows, triton.cdiv(v.shape[-1], block))](
            *shape.given(features, phi_k), _descriptor(W, size, features) if delta else None, G,
            _descriptor(du, size, block), du_mass, du_mass_all, _descriptor(dstates, features, block), dsums, dsums_all,
            shape.source, shape.carries, *strides(phi_k), shape.kv_heads, shape.tokens, n, BE=block, BF=features,
            C=size, DELTA=delta, INDEXED=constants["INDEXED"], P=constants["P"], dtype=constants["dtype"],
            **LAUNCH["walk_back"],
        )  # fmt: skip
        dlog_decay = room(shape)(log_decay.shape, device=G.device)
        dbeta = room(shape)(log_decay.shape, device=G.device) if delta else None
        few = {name: x for name, x in constants.items() if name not in ("D", "BD")}
        prepare_back[(rows, n)](
            by_f[1], by_v[0], log_decay, beta, u_, u_mass, _descriptor(inverse, size, size) if delta else None, G,
            states_, sums, dstates_, dsums_all, _descriptor(du, size, width), du_mass_all,
            dphi_seen, dG, slope, far, dphi_k, by_v[2], dlog_decay, dbeta, *layout,
            *strides(phi_k, v, dv), shape.kv_heads, *sizes, **few, DELTA=delta, DELAY=window["NEAR_BEFORE"], SEEN=seen,
            **LAUNCH["prepare_back"],
        )  # fmt: skip
        if constants["SINKS"]:
            _add_to_sinks(dk, dk_sinks, shape)
            _add_to_sinks(dv, dv_sinks, shape)

        dfar = slope.view(batch, heads, -1).sum((0, 2))
        # What the far weights of a row gain by lam, the near ones lose by g.
        dnear = -far * dfar / near if ctx.needs_input_grad[8] else None
        dconv = None
        if conv is not None:
            count, span = shape.segments(batch * heads, INDEPENDENT_PROGRAMS)
            outer = G.new_empty(count, batch, heads, size, size)
            few = {name: constants[name] for name in ("GROUPS", "V", "BV", "C", "INDEXED", "P")}
            backward_conv[(batch * heads, count)](
                *by_v[:2], outer, shape.source, shape.follows, *strides(v, do), heads, *sizes, span, **few,
                **LAUNCH["backward_conv"],
            )  # fmt: skip
            query, tap = (torch.arange(count, device=do.device) for count in (size, conv.shape[1]))
            key = (query[:, None] - tap) % size
            dconv = outer.sum((0, 1)).gather(2, key.expand(heads, -1, -1)).sum(1)
        return dq, dk, dv, dsink_q, dphi_q, dphi_k, dlog_decay, dbeta, dnear, dfar, dconv, None, None


def _given(shape: Shape, width: int, x: Tensor | None) -> list:
    return [None] if x is None else shape.given(width, x)


def _add_to_sinks(dx: Tensor, given: Tensor, shape: Shape) -> None:
    """To dx [B, H_kv, T, D] of sinks what each chunk gave [B, H, n, sinks, D]."""
    given = given.unflatten(1, (shape.kv_heads, -1)).sum(2)
    sinks = given.shape[3]
    if shape.source is None:
        dx[:, :, :sinks] += given.sum(2)[:, :, : dx.shape[2]].to(dx.dtype)
        return
    # Summed in single precision before they are rounded, into the first chunk of each document.
    index = shape.first[:, None, :, None, None].expand_as(given).long()
    given = torch.zeros_like(given).scatter_add_(2, index, given)
    token = shape.source[:, :, :sinks].flatten(1)
    given = given.flatten(2, 3) * (token >= 0)[:, None, :, None]
    index = token.clamp(min=0)[:, None, :, None].expand_as(given).long()
    dx.scatter_add_(2, index, given.to(dx.dtype))
