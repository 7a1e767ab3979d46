"""The whole layer with any state's rule, fused: features, state, near softmax with sinks, convolution.

Features are written once; the state before every chunk is, too, in the inputs' dtype. With it all chunks are
independent of each other, forward and backward: only the walks from chunk to chunk are not (`gated_state`). Of long
sequences they are there for one segment at a time (`segments`).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunked import chunk_size
from .features import Hedgehog, computed_in, fuses
from .gated_attend import SINK_ROWS, forward
from .gated_backward import backward_conv, backward_far, backward_keys, backward_queries, backward_states
from .gated_state import prepare, prepare_back, walk, walk_back
from .segments import Given, Segment, segments_of
from .shape import DTYPES, INDEPENDENT_PROGRAMS, Shape, fits_learned, refused, results, room, rows_last, strides

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
    if not all(fits_learned(x.shape[-1]) for x in (k, v)):
        return "heads are neither of up to 64 nor of 128, which is what fits shared memory beside learned maps"
    return None


def attention(problem) -> Tensor:
    """[B, H, T, D_v] in the dtype of v, differentiable; of a problem that `refuses` has nothing against."""
    dtype, config = problem.v.dtype, problem.config
    sink_q = problem.sink_q.to(dtype) if config.sinks and problem.sink_q is not None else None
    kinds, tensors = _far([problem.q_features, problem.k_features], dtype)
    # A function's context does not know of `no_grad`.
    stores, state = torch.is_grad_enabled(), problem.state
    return _Attention.apply(
        problem.q.to(dtype), problem.k.to(dtype), problem.v, sink_q, problem.weights.near, problem.weights.far,
        problem.weights.conv, *((None, None) if state is None else (state.S, state.z)), Shape.of(problem), stores,
        kinds, *tensors,
    )  # fmt: skip


def _far(sides: list, dtype: torch.dtype) -> tuple[list, list]:
    """Of `Features`, how they are made, and what of, gates too, as many tensors of each; or, with None, what they are
    (`_sides` takes both)."""
    tensors = []
    if not all(_made_here(side, dtype) for side in sides):
        for side in sides:
            gates = (None, None) if side.gates is None else (side.gates.log_decay, side.gates.beta)
            tensors += [side.phi.to(dtype), *gates]
        return [None] * len(sides), tensors
    for side in sides:
        gates = (None, None) if side.token_gates is None else (side.token_gates.weight, side.token_gates.bias)
        tensors += [side.x.to(dtype), side.map.weight, side.lam_query, *gates]
    return [(side.unit, side.scale) for side in sides], tensors


def _made_here(side, dtype: torch.dtype) -> bool:
    """Whether features can be made segment by segment, and nobody has asked for all of them."""
    return fuses(side.x, side.map) and computed_in(side.x) == dtype and not side.is_computed


def folds(features, v: Tensor, config) -> bool:
    """Whether `end_state` can do this."""
    return (
        v.is_cuda and v.dtype in DTYPES and chunk_size(config) == 64 and v.shape[-1] % 16 == 0 and v.shape[-1] <= 128
        and features.map.dim <= (256 if v.dtype == torch.bfloat16 else 128) and not torch.is_grad_enabled()
    )  # fmt: skip


def end_state(features, v: Tensor, state, tokens, config):
    """`kernels.fold` of many keys."""
    batch, kv_heads, length, value_dim = v.shape
    width = features.map.dim
    shape = Shape(
        config, v.device, batch, kv_heads, kv_heads, 0, width, length, 0, 1.0, *Shape.layout_of(tokens, config)
    )
    v = rows_last(v)
    constants = _constants(shape, value_dim, v.dtype)
    (keys,) = _sides(shape, constants["BF"], *_far([features], v.dtype))
    numbers, start = _Numbers.of(shape, constants), _padded(state.S, state.z, constants["BF"], constants["BV"])
    for segment in segments_of(shape):
        start = _States.of(keys, v, numbers, start, shape, constants, segment, each=False, stores=False).end
    S, z = (x.unflatten(0, (batch, kv_heads)) for x in start)
    return type(state)(S[:, :, :width, :value_dim].contiguous(), z[:, :, :width].contiguous())


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of [.., columns or more], `rows` rows at a time."""
    x = x.view(-1, x.shape[-1])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@dataclass
class _Numbers:
    """One number per slot of all segments, [B * H_kv * n * C]: the last column of u_0 (`own`) and of u (`mass`), G."""

    own: Tensor
    mass: Tensor
    G: Tensor

    @classmethod
    def of(cls, shape: Shape, constants: dict) -> "_Numbers":
        slots = shape.batch * shape.kv_heads * shape.chunks * constants["C"]
        return cls(*(torch.empty(slots, device=shape.device) for _ in range(3)))


@dataclass
class _States:
    """The state's side of a segment, `span` chunks of C slots in buffers; R = B * H_kv rows.

    Attributes:
        phi: [R * span * C, BF]; u: [R * span * C, BV]; W: [R * span * C, BF] and inverse: [R * span * C, C] of the
            delta rule.
        states: [R * span * BF, BV] and sums: [R * span * BF], before each chunk.
        end: [R, BF, BV] and [R, BF], what the next segment starts from; where not each, those after the last chunk.
    """

    phi: Tensor
    u: Tensor
    W: Tensor
    inverse: Tensor
    states: Tensor
    sums: Tensor
    end: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, keys, v, numbers: _Numbers, start, shape: Shape, constants: dict, segment: Segment, each: bool,
        stores: bool,
    ) -> "_States":  # fmt: skip
        """`each`: also before each chunk; `stores`: with what backward needs."""
        rows, size, span = shape.batch * shape.kv_heads, constants["C"], segment.span
        slots, width, columns = rows * span * size, constants["BV"], constants["BF"]
        G, block_f, block = numbers.G, constants["BLOCK_F"], _column_block(constants["V"], width)
        phi = keys.of(segment.begin * size, span * size)
        log_decay, delta = keys.log_decay, keys.beta is not None
        if log_decay is None:
            log_decay = G.new_zeros(*v.shape[:3])
        u = v.new_empty(slots, width)
        W = v.new_empty(slots if delta else 0, columns)
        inverse = v.new_empty(slots if delta and stores else 0, size)
        states = v.new_empty(rows * span * columns if each else 0, width)
        sums = G.new_empty(rows * span * columns if each else 0)
        end = G.new_empty(rows, columns, width), G.new_empty(rows, columns)
        some = dict(DELTA=delta, INDEXED=constants["INDEXED"], P=constants["P"], dtype=constants["dtype"])

        def by_slot(x, columns):
            return None if not x.numel() else _descriptor(x, size, columns)

        prepare[(rows, span)](
            by_slot(phi, block_f), *shape.given(width, v), log_decay, keys.beta, by_slot(u, width), numbers.own,
            by_slot(W, block_f), by_slot(inverse, size), G, shape.source, shape.first, *strides(v), shape.kv_heads,
            shape.tokens, shape.chunks, segment.begin, span, V=constants["V"], BV=width, BF=columns, BLOCK_F=block_f,
            C=size, SINKS=constants["SINKS"], STORE=stores, **some, **LAUNCH["prepare"],
        )  # fmt: skip
        # A segment after this one begins with the last chunk of this one.
        after = not each and segment.end == shape.chunks
        walk[(rows, triton.cdiv(constants["V"], block))](
            by_slot(phi, columns), by_slot(u, block), numbers.own, numbers.mass, by_slot(W, columns), G,
            *(start or (None, None)), _descriptor(states, columns, block) if each else None, sums, *end, shape.carries,
            shape.kv_heads, shape.chunks, segment.begin, span, BV=width, BE=block, BF=columns, C=size,
            HAS_STATE=start is not None, STATES=each, AFTER=after, **some, **LAUNCH["walk"],
        )  # fmt: skip
        return cls(phi, u, W, inverse, states, sums, end)


def _column_block(value_dim: int, width: int) -> int:
    """Columns of the state that a program of a walk has on chip."""
    return next((size for size in (32, 16) if value_dim % size == 0), width)


def _padded(S: Tensor, z: Tensor, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """S [R, BF, BV] and z [R, BF]."""
    S, z = S.flatten(0, 1).float(), z.flatten(0, 1).float()
    more = columns - S.shape[1]
    if more or width > S.shape[2]:
        pad = torch.nn.functional.pad
        S, z = pad(S, (0, width - S.shape[2], 0, more)), pad(z, (0, more))
    return S.contiguous(), z.contiguous()


def _constants(shape: Shape, value_dim: int, dtype: torch.dtype) -> dict:
    """Compile-time arguments, of which every kernel takes some."""
    features = max(16, triton.next_power_of_2(shape.features))
    return dict(
        GROUPS=shape.heads // shape.kv_heads, D=shape.dim, BD=max(16, triton.next_power_of_2(shape.dim)), V=value_dim,
        BV=max(16, triton.next_power_of_2(value_dim)), BF=features, BLOCK_F=min(64, features),
        C=chunk_size(shape.config), SINKS=shape.config.sinks, INDEXED=shape.source is not None,
        P="ieee" if dtype == torch.float32 else "tf32", dtype=DTYPES[dtype],
    )  # fmt: skip


def _without(constants: dict, *names: str) -> dict:
    return {name: x for name, x in constants.items() if name not in names}


def _sides(shape: Shape, columns: int, kinds: list, tensors) -> list:
    """What makes features of queries and of keys, or of keys alone, of what `_far` gives."""
    size, sides = len(tensors) // len(kinds), []
    for number, kind in enumerate(kinds, start=1):
        x, *few = tensors[size * (number - 1) : size * number]
        # Keys come last, and are all tokens.
        past = 0 if number == len(kinds) else shape.past
        if kind is None:
            sides.append(Given(x, few, past, shape.source, columns))
        else:
            sides.append(Hedgehog(x, few, *kind, past, shape.source, columns))
    return sides


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_q, near, far, conv, S, z, shape, stores, kinds, *tensors):
        q, k, v = map(rows_last, (q, k, v))
        sink_q = None if sink_q is None else rows_last(sink_q)
        near, far = near.detach().float().contiguous(), far.detach().float().contiguous()
        conv = None if conv is None else conv.detach().float().contiguous()
        config, stores = shape.config, stores and any(ctx.needs_input_grad)
        constants = _constants(shape, v.shape[-1], v.dtype)
        width, size, block_f = constants["BV"], constants["C"], constants["BLOCK_F"]
        window = dict(
            TAPS=0 if conv is None else conv.shape[1], SINK_Q=sink_q is not None, WINDOW=config.window,
            NEAR_BEFORE=config.window != "block", FAR_BEFORE=config.window == "sliding", CLAMPS=config.state == "delta",
        )  # fmt: skip
        queries, keys = _sides(shape, constants["BF"], kinds, tensors)
        (out,) = results(shape, q[..., :1].expand(*q.shape[:3], v.shape[-1]))
        numbers, segments = _Numbers.of(shape, constants), segments_of(shape)
        rows = shape.batch * shape.heads * q.shape[2] if stores else 0
        attended, lse, mass, top = (numbers.G.new_empty(rows, *size) for size in ((v.shape[-1],), (), (), ()))
        keeps = stores and len(segments) == 1
        starts, start = [], None if S is None else _padded(S, z, constants["BF"], width)
        by_d, by_v = shape.given(constants["BD"], q, k), shape.given(width, v, out)
        sink_q_ = _given(shape, constants["BD"], sink_q)

        def attend(segment, start):
            """`out` of a segment; its states and features of queries: for backward those of the next chunk, too."""
            side = _States.of(keys, v, numbers, start, shape, constants, segment, each=True, stores=keeps)
            held = segment.chunks + keeps
            phi_q = queries.of(segment.start * size, held * size)
            forward[(shape.batch * shape.heads, segment.chunks)](
                *by_d, by_v[0], *sink_q_, k, v, by_v[1], _descriptor(phi_q, size, block_f),
                _descriptor(side.phi, size, block_f), _descriptor(side.u, size, width), numbers.mass, numbers.G,
                _descriptor(side.states, block_f, width), side.sums, near, far, conv, attended, lse, mass, top,
                shape.source, shape.first, shape.follows, *strides(q, k, v, q if sink_q is None else sink_q, out),
                shape.heads, shape.tokens, shape.past, shape.chunks, segment.start, segment.begin, segment.span, held,
                shape.scale, **constants, **window, STORE=stores, **LAUNCH["forward"],
            )  # fmt: skip
            return side, phi_q

        for segment in segments:
            if stores:
                starts.append(start)
            # What is not kept is freed before the next segment's is made.
            side, phi_q = attend(segment, start)
            start = side.end
            if not keeps:
                del side, phi_q
        if stores:
            ctx.save_for_backward(q, k, v, sink_q, near, far, conv, attended, lse, mass, top, *tensors)
            ctx.starts, ctx.numbers, ctx.gates = starts, numbers, (keys.log_decay, keys.beta)
            ctx.whole = (side, phi_q) if keeps else None
        ctx.shape, ctx.keywords, ctx.kinds = shape, (constants, window), kinds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, sink_q, near, far, conv, attended, lse, mass, top, *tensors = ctx.saved_tensors
        do = rows_last(do)
        shape, numbers, (constants, window) = ctx.shape, ctx.numbers, ctx.keywords
        batch, heads, rows, n = shape.batch, shape.heads, shape.batch * shape.kv_heads, shape.chunks
        size, width, features, block_f = (constants[name] for name in ("C", "BV", "BF", "BLOCK_F"))
        G, (queries, keys) = numbers.G, _sides(shape, features, ctx.kinds, tensors)
        keys.log_decay, keys.beta = ctx.gates
        delta, seen = keys.beta is not None, window["FAR_BEFORE"]
        dq, dk, dv = results(shape, q, k, v)
        dsink_q = None if sink_q is None else results(shape, q)[0]
        queries.start_back()
        keys.start_back()
        centre = torch.empty_like(lse)
        slope = room(shape)(lse.shape, device=lse.device)
        peak = torch.empty_like(lse, dtype=torch.int32)
        layout = shape.source, shape.first, shape.follows
        by_d, by_v = shape.given(constants["BD"], q, k, dq, dk), shape.given(width, v, do, dv)
        sink_qs = (*_given(shape, constants["BD"], sink_q), *_given(shape, constants["BD"], dsink_q))
        dk_sinks, dv_sinks = (
            G.new_empty(batch, heads, n, constants["SINKS"], x.shape[-1]) if constants["SINKS"] else None
            for x in (k, v)
        )
        du_mass = (torch.empty if seen else torch.zeros)(G.shape, device=G.device)
        du_mass_all, dG = torch.empty_like(G), torch.empty_like(G) if seen else None
        gates = G.new_zeros(*v.shape[:3]) if keys.log_decay is None else keys.log_decay
        dlog_decay = room(shape)(gates.shape, device=G.device)
        dbeta = room(shape)(gates.shape, device=G.device) if delta else None
        segments, block = segments_of(shape), _column_block(v.shape[-1], width)
        # The first segment's goes on to the state that all began with.
        blocks, goes_on = triton.cdiv(v.shape[-1], block), len(segments) > 1 or any(ctx.needs_input_grad[7:9])
        dM = (G.new_zeros(rows, features, width), G.new_zeros(rows, blocks, features)) if goes_on else (None, None)

        def segment_back(segment, start):
            """dphi_q and dphi_k, by slot; the rest into tensors of the whole sequence."""
            held = segment.chunks + 1
            side, phi_q = ctx.whole or (
                _States.of(keys, v, numbers, start, shape, constants, segment, each=True, stores=True),
                queries.of(segment.start * size, held * size),
            )
            sizes = shape.tokens, shape.past, n, segment.start
            buffers = segment.begin, segment.span
            phi_q_, phi_k_, dphi_q, dphi_k = (
                _descriptor(x, size, block_f)
                for x in (phi_q, side.phi, torch.empty_like(phi_q), torch.empty_like(side.phi))
            )
            u_, states_ = _descriptor(side.u, size, width), _descriptor(side.states, block_f, width)
            few = _without(window, "TAPS")
            backward_queries[(batch * heads, segment.chunks)](
                *by_d[:2], by_v[0], sink_qs[0], k, v, by_v[1], by_d[2], sink_qs[1], phi_q_, phi_k_, dphi_q, u_,
                numbers.mass, G, states_, side.sums, near, far, attended, lse, mass, top, centre, slope, peak, dk_sinks,
                dv_sinks, *layout, *strides(q, k, v, q if sink_q is None else sink_q, do, dq), heads, *sizes,
                *buffers, held, shape.scale, **constants, **few, **LAUNCH["backward_queries"],
            )  # fmt: skip
            backward_keys[(rows, segment.chunks)](
                *by_d[:2], *by_v[:2], by_d[3], by_v[2], near, far, conv, lse, centre, slope, peak, *layout,
                *strides(q, k, v, do, dk, dv), heads, *sizes, shape.scale, **_without(constants, "BF", "BLOCK_F"),
                **{name: window[name] for name in ("TAPS", "WINDOW", "NEAR_BEFORE")}, **LAUNCH["backward_keys"],
            )  # fmt: skip
            du = (torch.empty_like if seen else torch.zeros_like)(side.u)
            dphi_seen = None
            if seen:
                wide = torch.float32 if constants["GROUPS"] > 1 else v.dtype
                dphi_seen = torch.empty_like(side.phi, dtype=wide)
                backward_far[(rows, segment.chunks)](
                    by_v[1], phi_q_, phi_k_, u_, numbers.mass, G, far, mass, centre, _descriptor(du, size, width),
                    du_mass, dphi_seen, dG, *layout, *strides(do), heads, *sizes, *buffers, held,
                    **_without(constants, "D", "BD"), **LAUNCH["backward_far"],
                )  # fmt: skip
            dstates, dsums, dsums_all = (torch.empty_like(x) for x in (side.states, side.sums, side.sums))
            dstates_ = _descriptor(dstates, block_f, width)
            backward_states[(rows, segment.chunks, features // block_f)](
                by_v[1], phi_q_, G, far, mass, centre, dstates_, dsums, shape.source, shape.follows, *strides(do),
                heads, *sizes, *buffers, held, **_without(constants, "D", "BD", "SINKS"), DELAY=window["NEAR_BEFORE"],
                **LAUNCH["backward_states"],
            )  # fmt: skip
            walk_back[(rows, blocks)](
                _descriptor(side.phi, size, features), _descriptor(side.W, size, features) if delta else None, G,
                _descriptor(du, size, block), du_mass, du_mass_all, _descriptor(dstates, features, block), dsums,
                dsums_all, *dM, shape.carries, shape.kv_heads, n, segment.start, *buffers, BV=width, BE=block,
                BF=features, C=size, DELTA=delta, GOES_ON=goes_on, INDEXED=constants["INDEXED"], P=constants["P"],
                dtype=constants["dtype"], **LAUNCH["walk_back"],
            )  # fmt: skip
            prepare_back[(rows, segment.chunks)](
                phi_k_, by_v[0], gates, keys.beta, u_, numbers.mass,
                _descriptor(side.inverse, size, size) if delta else None, G, states_, side.sums, dstates_, dsums_all,
                _descriptor(du, size, width), du_mass_all, dphi_seen, dG, slope, far, dphi_k, by_v[2], dlog_decay,
                dbeta, *layout, *strides(v, dv), shape.kv_heads, *sizes, *buffers, **_without(constants, "D", "BD"),
                DELTA=delta, DELAY=window["NEAR_BEFORE"], SEEN=seen, **LAUNCH["prepare_back"],
            )  # fmt: skip
            return dphi_q.base, dphi_k.base

        for segment, start in zip(reversed(segments), reversed(ctx.starts), strict=True):
            dphi_q, dphi_k = segment_back(segment, start)
            slots = segment.start * size, segment.chunks * size
            queries.back(*slots, dphi_q, None, None)
            keys.back(*slots, dphi_k, dlog_decay, dbeta, skip=(segment.start - segment.begin) * size)
            del dphi_q, dphi_k
        if constants["SINKS"]:
            _add_to_sinks(dk, dk_sinks, shape)
            _add_to_sinks(dv, dv_sinks, shape)

        dfar = slope.view(batch, heads, -1).sum((0, 2))
        # What the far weights of a row gain by lam, the near ones lose by g.
        dnear = -far * dfar / near if ctx.needs_input_grad[4] else None
        dconv = None
        if conv is not None:
            count, span = shape.segments(batch * heads, INDEPENDENT_PROGRAMS)
            outer = G.new_empty(count, batch, heads, size, size)
            few = {name: constants[name] for name in ("GROUPS", "V", "BV", "C", "INDEXED", "P")}
            backward_conv[(batch * heads, count)](
                *by_v[:2], outer, shape.source, shape.follows, *strides(v, do), heads, shape.tokens, shape.past,
                n, span, **few, **LAUNCH["backward_conv"],
            )  # fmt: skip
            query, tap = (torch.arange(count, device=do.device) for count in (size, conv.shape[1]))
            key = (query[:, None] - tap) % size
            dconv = outer.sum((0, 1)).gather(2, key.expand(heads, -1, -1)).sum(1)
        dS = dz = None
        if any(ctx.needs_input_grad[7:9]):
            # Each block of columns has the whole of z.
            dS, dz = dM[0][:, : shape.features, : v.shape[-1]], dM[1][:, 0, : shape.features]
            dS, dz = (x.unflatten(0, (batch, shape.kv_heads)) for x in (dS, dz))
        of_tensors = (*queries.gradients(), *keys.gradients())
        return dq, dk, dv, dsink_q, dnear, dfar, dconv, dS, dz, None, None, None, *of_tensors


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
