"""One decoding step of a layer in two launches: attention, what leaves the ring, what enters it. Or a draft tree's
verification, in two launches as well, after which the ring is as it was.

What a step reads and writes does not depend on how long the context is, and nothing of it is prepared outside the
kernels, so a captured CUDA graph goes on with the cache at every replay. Beside the cache's other tensors a step keeps
what it knows of the tokens in the ring (`cache.far`), so that of far ones neither features nor values are computed
again.
"""

import torch
import triton
from torch import Tensor

from ...config import FAR_UNIT
from . import step_remember, tree_accept, tree_attend, tree_enter
from .additive import DTYPES, MAPS
from .shape import strides
from .step_attend import attend
from .step_enter import enter

# Rows whose features a program computes, where there are many, or keys that it takes at once: the fewest that tensor
# cores take.
ROWS = 16
# Tokens that enter the state at once. While steps are done here the ring has so many slots more than without; a state
# is then written at every 16th step only, which is a third of all bytes saved.
FOLD = 16
# What kernels take of `cache.far`, and of the layer's scalars.
FAR = "phi", "u", "mass", "log_decay", "beta"
SCALARS = {"shared": ("gate", "lam", "conv"), "sum": ("gate", "alpha", "conv")}


def refuses(layer, cache, nodes: int = 1) -> str | None:
    """Why a step of `layer` on `cache`, or a tree of so many nodes, cannot be done here, or None."""
    config = layer.config
    if not layer.features:
        return "there is no far branch"
    if config.local != "softmax":
        return f"near keys are weighted by {config.local}"
    if config.feature_map not in MAPS or config.state == "decay":
        return f"only additive states and the delta rule, of {', '.join(MAPS)}"
    if config.state == "delta" and config.window != "sliding":
        return "by the delta rule one key becomes far per step, which is so where the window slides"
    if config.combine == "sum" and config.norm != "sum":
        return f"norm {config.norm} is not sum"
    if config.state == "delta" and nodes > config.window_size:
        return "paths of a tree of more nodes than the window is long may be longer, too"
    if not config.slack:
        return "the token that leaves the ring may be near, as there is no slack"
    if not layer.branches >= {"local", "linear", "conv"}:
        return "a branch is switched off"
    if torch.is_grad_enabled():
        return "the cache is written in place, which gradients do not survive"
    v = cache.ring["v"]
    if v.dtype not in DTYPES or cache.state.S.dtype != torch.float32:
        return f"they do not compute in {v.dtype}"
    largest = 128 if v.dtype == torch.float32 else 256
    if max(cache.ring["k"].shape[3], v.shape[3]) > 128 or layer.features > largest:
        return f"heads are larger than 128 or features than {largest}, which is what fits shared memory in {v.dtype}"
    return None


def remember(layer, cache) -> None:
    """Make ready `cache` for steps, after anything else has changed it: a ring with more slots, and `cache.far`, what
    steps need to know of its tokens when they are far, worked out anew.

    Per slot, `phi` [B, H_kv, R, F]; for the delta rule also the gates `log_decay` and `beta` [B, H_kv, R], and what a
    key leaves in the state, `u` [B, H_kv, R, D_v] and `mass` [B, H_kv, R].
    """
    config, ring, state = layer.config, cache.ring, cache.state
    (batch, kv_heads, old_slots, value_dim), dim, width = ring["v"].shape, ring["k"].shape[3], layer.features
    slots, delta, features = config.ring_size + FOLD, config.state == "delta", layer.far_keys(ring)
    phi, gates = features.phi.contiguous(), (None, None)
    cache.ring = {name: x.new_empty(batch, kv_heads, slots, x.shape[3]) for name, x in ring.items()}
    cache.far = {"phi": phi.new_empty(batch, kv_heads, slots, width)}
    if delta:
        gates = features.gates.log_decay.contiguous(), features.gates.beta.contiguous()
        cache.far["u"] = state.S.new_empty(batch, kv_heads, slots, value_dim)
        cache.far |= {name: state.z.new_empty(batch, kv_heads, slots) for name in ("mass", "log_decay", "beta")}
    # What steps write into is this layer's alone.
    clock = cache.length.new_empty(3, batch)
    columns = min(32, _block(value_dim))
    step_remember.remember[triton.cdiv(value_dim, columns), batch * kv_heads](
        ring["k"], ring["v"], ring.get("raw"), phi, *gates, state.S, state.z, cache.length, cache.count, cache.segment,
        *(cache.ring.get(name) for name in ("k", "v", "raw")),
        *(cache.far.get(name) for name in ("phi", "log_decay", "beta", "u", "mass")), clock, batch, old_slots, slots,
        KV=kv_heads, D=dim, BD=_block(dim), V=value_dim, BV=columns, F=width, BF=_block(width), SINKS=config.sinks,
        DELTA=delta, C=ROWS, P="tf32" if ring["v"].dtype == torch.bfloat16 else "ieee", num_warps=8,
    )  # fmt: skip
    cache.length, cache.count, cache.segment = clock
    cache.shared.passage = None


def _block(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))


def _parameters(module, *names):
    return (getattr(module, name, None) for name in names)


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _learned(layer):
    """Parameters as first kernels take them."""
    return (
        *_parameters(layer.phi_q, "weight", "bias"), *_parameters(layer.phi_k, "weight", "bias"),
        *_parameters(layer, "lam_query"), *_parameters(getattr(layer, "gates", None), "weight", "bias"),
    )  # fmt: skip


def _constants(layer, v: Tensor) -> tuple[dict, dict, dict]:
    """What kernels are compiled for: both, the first, and the second one."""
    config, dim, value_dim, width = layer.config, layer.head_dim, v.shape[3], layer.features
    # Kernels that overlap, and bulk prefetches, came with Hopper.
    hopper = v.is_cuda and torch.cuda.get_device_capability(v.device) >= (9, 0)
    both = dict(
        KV=layer.kv_heads, D=dim, BD=_block(dim), V=value_dim, F=width, SINKS=config.sinks,
        DELTA=config.state == "delta", OVERLAP=hopper, P="tf32" if v.dtype == torch.bfloat16 else "ieee",
    )  # fmt: skip
    signed = width // 2 if config.feature_map == "hedgehog" else width
    first = dict(Y=signed, BY=_block(signed), MAP=config.feature_map)
    second = dict(
        GROUPS=layer.heads // layer.kv_heads, BF=_block(width), BR=_block(config.ring_size + FOLD),
        BS=_block(config.sinks), TAPS=config.conv_taps, W=config.window_size, WINDOW=config.window or "none",
        SHARED=config.combine == "shared", FAR_UNIT=FAR_UNIT, launch_pdl=hopper,
    )  # fmt: skip
    return both, first, second


def step(
    layer, cache, q: Tensor, k: Tensor, v: Tensor, raw_q: Tensor | None, raw_k: Tensor | None, sink_q: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The layer's outputs [B, H, 1, D_v] for one new token in every row, which `cache` holds afterwards; the
    arguments are those of the layer."""
    batch, heads, _, _ = q.shape
    kv_heads, value_dim, width = k.shape[1], v.shape[3], layer.features
    if cache.far is None:
        remember(layer, cache)
    ring, sinks, state, slots = cache.ring, cache.sinks, cache.state, layer.config.ring_size + FOLD
    far = [cache.far.get(name) for name in FAR]
    q, k, v, raw_q, raw_k, sink_q = (None if x is None else x.contiguous() for x in (q, k, v, raw_q, raw_k, sink_q))
    out = q.new_empty(batch, heads, 1, value_dim, dtype=v.dtype)
    phi_q = state.z.new_empty(batch, heads, width)
    clock = cache.length.new_empty(2, batch)

    both, first, second = _constants(layer, v)
    rows = 1 if batch < 8 else ROWS
    enter[heads + kv_heads, triton.cdiv(batch, rows)](
        k, v, q if raw_q is None else raw_q, k if raw_k is None else raw_k, phi_q, *_learned(layer),
        ring["k"], ring["v"], ring.get("raw"), sinks["k"], sinks["v"], sinks.get("raw"), *far,
        state.z, clock, cache.length, cache.count, scale, batch, heads, slots,
        BV=_block(value_dim), ROWS=rows, FOLD=FOLD, num_warps=4, **both, **first,
    )  # fmt: skip
    columns, programs = _block(value_dim), batch * kv_heads
    # As many programs as multiprocessors: each has fewer columns then, and goes through the state in fewer turns.
    while columns > 32 and programs * value_dim < 128 * columns:
        columns //= 2
    delta = both["DELTA"]
    if columns < value_dim:
        launch = dict(FEATURES=min(128, _block(width)), BLOCK=64, num_stages=2)
    else:
        # Registers for three programs on a multiprocessor.
        launch = dict(FEATURES=32, maxnreg=168) if delta else dict(FEATURES=16)
        launch |= dict(BLOCK=32, num_stages=3)
    attend[triton.cdiv(value_dim, columns), programs](
        q, q if sink_q is None else sink_q, phi_q, out, ring["k"], ring["v"], sinks["k"], sinks["v"], *far,
        state.S, state.z, clock, cache.length, cache.count, cache.segment,
        *_parameters(layer, *SCALARS[layer.config.combine]), scale, batch, slots,
        BG=_block(heads // kv_heads + delta), BV=columns, FOLD=FOLD, PREFETCH=both["OVERLAP"] and programs <= 32,
        num_warps=4, **launch, **both, **second,
    )  # fmt: skip
    cache.seen += 1
    return out


def verify(
    layer, cache, q: Tensor, k: Tensor, v: Tensor, raw_q: Tensor | None, raw_k: Tensor | None, sink_q: Tensor | None,
    scale: float, ancestors: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The layer's outputs [B, H, T, D_v] for the nodes of a draft tree behind the tokens that `cache` holds, and what
    `accept` needs to know of them; the arguments are those of the layer."""
    batch, heads, nodes, _ = q.shape
    kv_heads, value_dim, width = k.shape[1], v.shape[3], layer.features
    if cache.far is None:
        remember(layer, cache)
    ring, sinks, state, slots = cache.ring, cache.sinks, cache.state, layer.config.ring_size + FOLD
    far = [cache.far.get(name) for name in FAR]
    ancestors = ancestors.contiguous().view(torch.int8)
    q, k, v, raw_q, raw_k, sink_q = (_dense(x) for x in (q, k, v, raw_q, raw_k, sink_q))
    raw_q, raw_k, sink_q = (y if x is None else x for x, y in ((raw_q, q), (raw_k, k), (sink_q, q)))
    out = v.new_empty(batch, nodes, heads, value_dim).transpose(1, 2)
    phi_q = v.new_empty(batch, heads, nodes, width)
    phi_k = v.new_empty(batch, kv_heads, nodes, width)
    node_decay, node_beta = state.z.new_empty(2, batch, kv_heads, nodes)

    both, first, second = _constants(layer, v)
    # Nodes, and queries, of a program: more would need more registers than there are.
    rows, tile = (32, 64) if v.dtype == torch.bfloat16 else (16, 16)
    queries = heads // kv_heads * nodes
    rows, tile = min(rows, _block(nodes)), min(tile, _block(queries))
    turning = kv_heads * triton.cdiv(value_dim, 32) if both["DELTA"] else 0
    tree_enter.enter[turning + heads + kv_heads, triton.cdiv(nodes, rows), batch](
        raw_q, raw_k, phi_q, phi_k, node_decay, node_beta, ancestors, *_learned(layer),
        ring["v"], *far, state.S, state.z, cache.length, cache.count, scale,
        *strides(raw_q, raw_k), heads, nodes, slots,
        BV=32, BF=second["BF"], FEATURES=min(128, second["BF"]), BR=second["BR"], W=second["W"],
        BLOCK=32, TURNING=turning, ROWS=rows, num_warps=4, num_stages=2, **both, **first,
    )  # fmt: skip
    columns = min(32, _block(value_dim))
    tree_attend.attend[triton.cdiv(value_dim, columns), triton.cdiv(queries, tile), batch * kv_heads](
        q, sink_q, k, v, phi_q, phi_k, node_decay, ancestors, out,
        ring["k"], ring["v"], sinks["k"], sinks["v"], *far[:4], state.S, state.z, cache.length, cache.count,
        *_parameters(layer, *SCALARS[layer.config.combine]), scale, *strides(q, sink_q, k, v, out), nodes, slots,
        BQ=tile, BV=columns, FEATURES=min(64, second["BF"]), REACH=layer.config.reach, BLOCK=32,
        PREFETCH=both["OVERLAP"] and batch * kv_heads <= 32, num_warps=4, num_stages=3, **both, **second,
    )  # fmt: skip
    return out, {"phi": phi_k, "log_decay": node_decay, "beta": node_beta}


def accepts(cache, longest: int) -> bool:
    """Whether `accept` takes paths of so many nodes: none of them may leave the ring at once."""
    return longest <= cache.config.ring_size


def accept(cache, keys: dict[str, Tensor], far: dict[str, Tensor], path: Tensor, clock: Tensor) -> None:
    """Nodes `path` [B, n] of the tree that was verified last become tokens of the ring; -1 fills rows that accept
    fewer. keys: of the tree, by name; far: what `verify` has given; clock: [2, B], a copy of `length` and `count`."""
    k, v, raw = (_dense(keys.get(name)) for name in ("k", "v", "raw"))
    batch, kv_heads, nodes, dim = k.shape
    value_dim, width = v.shape[3], far["phi"].shape[3]
    ring, sinks, state = cache.ring, cache.sinks, cache.state
    columns = _block(value_dim)
    # As much of the state at once as there are registers for.
    features = min(_block(width), 8192 // columns)
    tree_accept.accept[batch * kv_heads,](
        path.contiguous(), k, v, raw, far["phi"], far["log_decay"], far["beta"],
        ring["k"], ring["v"], ring.get("raw"), sinks["k"], sinks["v"], sinks.get("raw"),
        *(cache.far.get(name) for name in FAR), state.S, state.z, clock, cache.length, cache.count, cache.segment,
        *strides(k, v, k if raw is None else raw), batch, path.shape[1], nodes, ring["v"].shape[2],
        KV=kv_heads, D=dim, BD=_block(dim), V=value_dim, BV=columns, F=width, BF=_block(width), FEATURES=features,
        SINKS=cache.config.sinks, FOLD=FOLD, DELTA=cache.config.state == "delta",
        P="tf32" if v.dtype == torch.bfloat16 else "ieee", num_warps=4,
    )  # fmt: skip
    cache.seen += path.shape[1]
