"""One decoding step of a layer in two launches: attention, what leaves the ring, what enters it.

What a step reads and writes does not depend on how long the context is, and nothing of it is prepared outside the
kernels, so a captured CUDA graph goes on with the cache at every replay. Beside the cache's other tensors a step keeps
what it knows of the tokens in the ring (`cache.far`), so that of far ones neither features nor values are computed
again.
"""

import torch
import triton
from torch import Tensor

from ...config import FAR_UNIT
from ...tokens import Tokens
from ..memory import far_values
from .additive import DTYPES, MAPS
from .step_attend import attend
from .step_enter import enter

# Rows whose features a program computes, where there are many: the fewest that tensor cores take.
ROWS = 16
# Tokens that enter the state at once. While steps are done here the ring has so many slots more than without; a state
# is then written at every 16th step only, which is a third of all bytes saved.
FOLD = 16


def refuses(layer, cache) -> str | None:
    """Why a step of `layer` on `cache` cannot be done here, or None."""
    config = layer.config
    if not layer.features:
        return "there is no far branch"
    if config.feature_map not in MAPS or config.state == "decay":
        return f"only additive states and the delta rule, of {', '.join(MAPS)}"
    if config.state == "delta" and config.window != "sliding":
        return "by the delta rule one key becomes far per step, which is so where the window slides"
    if config.combine == "sum" and config.norm != "sum":
        return f"norm {config.norm} is not sum"
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
    config, sinks = layer.config, layer.config.sinks
    keys, tokens = cache.recall({name: x[:, :, :0] for name, x in cache.ring.items()})
    keys = {name: x[:, :, sinks:] for name, x in keys.items()}
    tokens = Tokens(tokens.document[:, sinks:], tokens.position[:, sinks:])
    content = keys.get("raw", keys["k"])
    phi = layer.phi_k(content)
    if config.state != "delta":
        far = {"phi": phi}
    else:
        phi = torch.nn.functional.normalize(phi, dim=-1)
        gates = layer.gates(content).where((tokens.valid & (tokens.position >= sinks))[:, None])
        order = torch.ones(2 * phi.shape[2:3], dtype=torch.bool, device=phi.device).tril(-1)
        precedes = order & tokens.valid[:, None, :] & tokens.valid[:, :, None]
        u, _ = far_values(phi.float(), keys["v"].float(), gates, precedes, cache.state, tokens.valid)
        far = {"phi": phi, "log_decay": gates.log_decay, "beta": gates.beta, "u": u[..., :-1], "mass": u[..., -1]}
    slots = config.ring_size + FOLD
    index = (torch.arange(slots, device=phi.device) - tokens.position[:, :1]) % slots
    index = index.clamp(max=config.ring_size - 1)[:, None]

    def place(x):
        at = index.expand(-1, x.shape[1], -1)
        return x.gather(2, at if x.dim() == 3 else at.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))

    cache.ring = {name: place(x) for name, x in keys.items()}
    cache.far = {name: place(x) for name, x in far.items()}


def step(
    layer, cache, q: Tensor, k: Tensor, v: Tensor, raw_q: Tensor | None, raw_k: Tensor | None, sink_q: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The layer's outputs [B, H, 1, D_v] for one new token in every row, which `cache` holds afterwards; the
    arguments are those of the layer."""
    batch, heads, _, dim = q.shape
    kv_heads, value_dim, width = k.shape[1], v.shape[3], layer.features
    config, sinks, state = layer.config, cache.sinks, cache.state
    if cache.far is None:
        remember(layer, cache)
    ring, slots = cache.ring, config.ring_size + FOLD
    far = [cache.far.get(name) for name in ("phi", "u", "mass", "log_decay", "beta")]
    q, k, v, raw_q, raw_k, sink_q = (None if x is None else x.contiguous() for x in (q, k, v, raw_q, raw_k, sink_q))
    out = q.new_empty(batch, heads, 1, value_dim, dtype=v.dtype)
    phi_q = state.z.new_empty(batch, heads, width)
    clock = cache.length.new_empty(2, batch)

    def parameters(module, *names):
        return (getattr(module, name, None) for name in names)

    def block(size, least=16):
        return max(least, triton.next_power_of_2(size))

    delta = config.state == "delta"
    # Kernels that overlap, and bulk prefetches, came with Hopper.
    hopper = v.is_cuda and torch.cuda.get_device_capability(v.device) >= (9, 0)
    shape = dict(
        KV=kv_heads, D=dim, BD=block(dim), V=value_dim, F=width, SINKS=config.sinks, FOLD=FOLD, DELTA=delta,
        OVERLAP=hopper, P="tf32" if v.dtype == torch.bfloat16 else "ieee",
    )  # fmt: skip
    signed = width // 2 if config.feature_map == "hedgehog" else width
    rows = 1 if batch < 8 else ROWS
    enter[heads + kv_heads, triton.cdiv(batch, rows)](
        k, v, q if raw_q is None else raw_q, k if raw_k is None else raw_k, phi_q,
        *parameters(layer.phi_q, "weight", "bias"), *parameters(layer.phi_k, "weight", "bias"),
        *parameters(layer, "lam_query"), *parameters(getattr(layer, "gates", None), "weight", "bias"),
        ring["k"], ring["v"], ring.get("raw"), sinks["k"], sinks["v"], sinks.get("raw"), *far,
        state.z, clock, cache.length, cache.count, scale, batch, heads, slots,
        BV=block(value_dim), Y=signed, BY=block(signed), MAP=config.feature_map, ROWS=rows,
        num_warps=4, **shape,
    )  # fmt: skip
    groups, columns, programs = heads // kv_heads, block(value_dim), batch * kv_heads
    # As many programs as multiprocessors: each has fewer columns then, and goes through the state in fewer turns.
    while columns > 32 and programs * value_dim < 128 * columns:
        columns //= 2
    if columns < value_dim:
        launch = dict(FEATURES=min(128, block(width)), BLOCK=64, num_stages=2)
    else:
        # Registers for three programs on a multiprocessor.
        launch = dict(FEATURES=32, maxnreg=168) if delta else dict(FEATURES=16)
        launch |= dict(BLOCK=32, num_stages=3)
    attend[triton.cdiv(value_dim, columns), programs](
        q, q if sink_q is None else sink_q, phi_q, out, ring["k"], ring["v"], sinks["k"], sinks["v"], *far,
        state.S, state.z, clock, cache.length, cache.count, cache.segment,
        *parameters(layer, "gate", "alpha" if config.combine == "sum" else "lam", "conv"), scale, batch, slots,
        GROUPS=groups, BG=block(groups + delta), BV=columns, BF=block(width), BR=block(slots), BS=block(config.sinks),
        TAPS=config.conv_taps, W=config.window_size, WINDOW=config.window or "none",
        SHARED=config.combine == "shared", FAR_UNIT=FAR_UNIT, PREFETCH=hopper and programs <= 32, launch_pdl=hopper,
        num_warps=4, **launch, **shape,
    )  # fmt: skip
    cache.seen += 1
    return out
