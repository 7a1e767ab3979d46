"""One augmented linear attention layer: parameters, and the way from q, k, v to outputs with or without a cache."""

import torch
from torch import Tensor, nn

from .cache import Draft, LinearCacheLayer
from .config import FAR_UNIT, LinearAttentionConfig
from .feature_maps import FEATURE_MAPS
from .gates import TokenGates
from .kernels import Features, Problem, Weights, augmented_attention, triton_kernels
from .softmax import softmax_attention
from .tokens import visible_keys, whole_sequences

BRANCHES = frozenset({"local", "linear", "conv"})


class LinearAttention(nn.Module):
    """Replaces softmax(QK^T)V in one attention module; projections stay where they are.

    Parameters are fp32 masters whatever the model's dtype. H query heads share H_kv key heads, and the state is per
    key head (where each query head has a map of the keys, these are repeated: H_kv = H). Key heads may be kept, with
    all the query heads of their group: they stay softmax, have no parameters here, and a cache remembers all of their
    tokens.

    Args:
        heads, kv_heads, head_dim: of the attention module.
        kept: key heads to keep.
        causal: whether a query sees only what is not after it, or all of its document, as in encoders.

    Raises:
        ValueError: naming the field of `config` that an attention which looks both ways cannot have.

    Attributes:
        heads, kv_heads: those that are linear.
        groups: query heads per key head of the attention module.
        backend: name of a kernel backend, or "auto".
        branches: which of `BRANCHES` take part; evaluation switches them off one by one.
    """

    # Whether the keys are those of another sequence; those of a `CrossAttention` are.
    crosses = False

    def __init__(
        self, config: LinearAttentionConfig, heads: int, kv_heads: int, head_dim: int, kept: tuple[int, ...] = (),
        causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.config, self.kept, self.causal = config, kept, causal
        if not causal and config.state != "additive":
            raise ValueError(
                f"state: {config.state} depends on which key comes first, and this attention looks both ways; use "
                "state: additive, or preset: augmented-encoder"
            )
        if not causal and config.sink_distance is not None:
            raise ValueError("sink_distance: an attention that looks both ways has no use for it; set it to null")
        self.groups = heads // kv_heads
        heads, kv_heads = heads - len(kept) * self.groups, kv_heads - len(kept)
        self.repeats = config.key_maps == "query_head" and self.groups > 1
        if self.repeats:
            kv_heads = heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.backend = "auto"
        self.branches = BRANCHES
        # The seam's notes: what the present call got, and whether the module applies its rotary embedding (None:
        # not known yet, being watched during the first call).
        self.call = self.rotates = self.watch = None
        if heads and config.feature_map is not None:
            feature_map = FEATURE_MAPS[config.feature_map]
            size = config.feature_dim, config.feature_expansion
            self.phi_q = feature_map(heads, head_dim, *size)
            self.phi_k = feature_map(kv_heads, head_dim, *size)
            self.features = self.phi_k.dim
            if config.state != "additive":
                self.gates = TokenGates(config.state, kv_heads, head_dim)
        else:
            self.features = 0
        if heads and config.far == "linformer":
            # Rows start as the means of equal parts of a block.
            each, size = config.feature_dim or max(1, config.window_size // 4), config.window_size
            start = nn.functional.interpolate(torch.eye(each)[None], size, mode="nearest")[0]
            start = start / start.sum(1, keepdim=True).clamp(min=1)
            self.key_rows, self.value_rows = (nn.Parameter(start.repeat(kv_heads, 1, 1)) for _ in range(2))
        if heads and config.has_far:
            if config.combine == "sum":
                self.alpha = nn.Parameter(torch.full((heads,), config.far_start))
            elif config.far_weight != "one":
                self.lam = nn.Parameter(torch.full((heads,), config.far_start / FAR_UNIT))
                if config.far_weight == "query":
                    self.lam_query = nn.Parameter(torch.zeros(heads, head_dim, 1))
            elif config.window is not None:
                # sigmoid(-2.197) = 0.1, LoLCATs' published start.
                self.gate = nn.Parameter(torch.full((heads,), -2.197))
        if heads and config.conv_taps:
            self.conv = nn.Parameter(torch.zeros(heads, config.conv_taps if causal else 2 * config.conv_taps - 1))

    def weights(self, device: torch.device) -> Weights:
        """The scalars of the layer's formula, with the branches that are switched off set to zero."""
        one = torch.ones(self.heads, device=device)
        near, far = one, one
        if hasattr(self, "gate"):
            near = self.gate.sigmoid()
        elif hasattr(self, "lam"):
            # lam >= 0 keeps the denominator positive; the gradient passes the bound, or a head at 0 would stay there.
            lam = self.lam.clamp(min=0)
            far = FAR_UNIT * (self.lam + (lam - self.lam).detach() if lam.requires_grad else lam)
        elif hasattr(self, "alpha"):
            far = self.alpha
        if "local" not in self.branches:
            # A constant, as its logarithm has no gradient at 0.
            near = torch.zeros_like(one)
            if self.config.combine == "shared":
                # Alone above and below the line, the far branch has no use for a weight, which may be 0.
                far = one
        return Weights(
            near=near,
            far=far if "linear" in self.branches else far * 0,
            conv=self.conv if self.config.conv_taps and "conv" in self.branches else None,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        raw_q: Tensor | None = None,
        raw_k: Tensor | None = None,
        sink_q: Tensor | None = None,
        segments: Tensor | None = None,
        cache: LinearCacheLayer | None = None,
        ancestors: Tensor | None = None,
        sliding_window: int | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, H, T, D_v].

        Args:
            q: [B, H, T, D]; k: [B, H_kv, T, D]; v: [B, H_kv, T, D_v], un-repeated, after the rotary embedding.
            scale: of the softmax scores.
            raw_q, raw_k: the same before the rotary embedding, where the model has one and `config.rope` is `before`.
            sink_q: q at positions no further on than `config.sink_distance`, where the model has a rotary embedding.
            segments: [B, T] integers, 0 for padding, one value per document; None: neither padding nor packing.
            cache: continued from and added to. Without one the sequence stands alone.
            ancestors: [T, T] bool, True where node j is an ancestor of node i or i itself: the tokens are nodes of a
                draft tree behind the cached tokens, verified but not added; `cache.accept` adds a path of them.
            sliding_window: of the softmax model's own layer; kept heads see no further than they did.
            bias: [H, 2 R - 1], added to the scores of near keys by distance: see `kernels.Problem`.

        Raises:
            ValueError: for a tree without a cache, a cache where the attention looks both ways, or a bias of kept
                heads.
        """
        if ancestors is not None and cache is None:
            raise ValueError("a draft tree hangs on a cache: pass cache with ancestors")
        if cache is not None and not self.causal:
            raise ValueError("what looks both ways cannot go on from a cache: pass whole sequences, and no cache")
        if bias is not None and self.kept:
            raise ValueError("kept_heads: heads of a model whose scores have a bias cannot be kept softmax")
        if cache is not None and not cache.is_initialized:
            cache.lazy_initialization(v, self.kv_heads, self.features)
        if not self.kept:
            return self._linear(q, k, v, raw_q, raw_k, sink_q, bias, scale, segments, cache, ancestors)
        kv_heads = k.shape[1]
        linear = [head for head in range(kv_heads) if head not in self.kept]
        # The cache copies what it gets then: views will do.
        in_place = cache is not None and cache.memory.reserved

        def of(chosen, x):  # of x [B, H or H_kv, ..] the heads that belong to the chosen key heads
            if x is None:
                return None
            groups = x.chunk(kv_heads, dim=1)
            first, last = min(chosen, default=0), max(chosen, default=-1)
            if in_place and [*chosen] == [*range(first, last + 1)]:
                size = groups[0].shape[1]
                return x[:, first * size : (last + 1) * size]
            return torch.cat([groups[head] for head in chosen] or [x[:, :0]], dim=1)

        rest = (scale, segments, cache, ancestors)
        # Softmax first, since the linear part moves the cache on.
        softmax_out = self._softmax(*(of(self.kept, x) for x in (q, k, v, sink_q)), *rest, sliding_window)
        linear_out = self._linear(*(of(linear, x) for x in (q, k, v, raw_q, raw_k, sink_q)), None, *rest)
        if not linear:
            return softmax_out
        outputs = dict(zip(self.kept, softmax_out.chunk(len(self.kept), dim=1), strict=True))
        outputs |= zip(linear, linear_out.chunk(len(linear), dim=1), strict=True)
        return torch.cat([outputs[head] for head in range(kv_heads)], dim=1)

    def _softmax(self, q, k, v, sink_q, scale, segments, cache, ancestors, sliding_window) -> Tensor:
        """`forward` for kept heads."""
        memory = None if cache is None else cache.memory
        in_place = memory is not None and memory.reserved and segments is None
        in_place = in_place and (ancestors is not None or k.shape[2] == 1)
        if in_place:
            # Nothing is waited for here, as it may be to share places with other layers.
            position = cache.length[:, None] + (0 if ancestors is None else ancestors.sum(-1) - 1)
            key_position, visible = memory.write(k, v, position, ancestors)
            keys, values = memory.k, memory.v
        else:
            if cache is None:
                keys, values, tokens = k, v, whole_sequences(segments, len(k), k.shape[2], k.device)
            else:
                keys, values, tokens = memory.recall(k, v, cache.passage(k.shape[2], segments, ancestors).new)
            key_position, position = tokens.position, tokens.position[:, -q.shape[2] :]
            alone = segments is None and ancestors is None and keys.shape[2] == q.shape[2] and self.causal
            visible = None if alone else visible_keys(tokens, q.shape[2], ancestors, self.causal)
        window = self.config.kept_window
        slides, forgets = (size is not None and keys.shape[2] > size for size in (sliding_window, window))
        is_sink = None if window is None else key_position < self.config.sinks
        if slides or forgets:
            distance = position[:, :, None] - key_position[:, None, :]
            visible = distance >= 0 if visible is None else visible
        if slides:
            visible = visible & (distance.abs() < sliding_window)
        if forgets:
            visible = visible & ((distance.abs() < window) | is_sink[:, None, :])
        if ancestors is not None and not in_place:
            memory.draft = (k, v)
        elif memory is not None and not in_place:
            memory.keep(keys, values, tokens)
            if segments is not None:
                memory.compact()
        if window is not None and sink_q is not None:
            # [q, sink_q].[k, 0] = q.k, and of a sink [q, sink_q].[0, k] = sink_q.k.
            q = torch.cat([q, sink_q], dim=-1)
            at_sinks = is_sink[:, None, :, None]
            keys = torch.cat([keys.masked_fill(at_sinks, 0), keys.masked_fill(~at_sinks, 0)], dim=-1)
        return softmax_attention(q, keys, values, visible, scale)

    def _linear(self, q, k, v, raw_q, raw_k, sink_q, bias, scale, segments, cache, ancestors) -> Tensor:
        """`forward` for linear heads."""
        if self.repeats:
            k, v, raw_k = (x if x is None else x.repeat_interleave(self.groups, dim=1) for x in (k, v, raw_k))
        keys = {"k": k, "v": v} if raw_k is None else {"k": k, "v": v, "raw": raw_k}
        # Steps may begin with nothing, in a cache that is ready for them.
        ready = cache is not None and (cache.seen or cache.far is not None or cache.memory.reserved)
        continues = ready and segments is None
        steps = continues and k.shape[2] == 1 and ancestors is None
        tree = continues and ancestors is not None
        if not self.heads and cache is not None and cache.memory.reserved:
            if tree:
                cache.draft = Draft(keys, self.far_keys)
            else:
                cache.advance(1, 1)
            return q
        fused_step = triton_kernels.step
        fused = fused_step is not None and v.is_cuda and self.backend in ("auto", "triton")
        if fused and (steps or tree) and not fused_step.refuses(self, cache, k.shape[2]):
            if steps:
                return fused_step.step(self, cache, q, k, v, raw_q, raw_k, sink_q, scale)
            out, far = fused_step.verify(self, cache, q, k, v, raw_q, raw_k, sink_q, scale, ancestors)
            cache.draft = Draft(keys, self.far_keys, far)
            return out
        new, q_features = keys, None
        if cache is None:
            tokens, state = whole_sequences(segments, len(k), k.shape[2], k.device), None
        else:
            passage = cache.passage(k.shape[2], segments, ancestors)
            tokens, state = passage.tokens, cache.state if cache.seen else None
            keys = cache.recall(keys, passage)
        k_features = self.far_keys(keys)
        if self.features:
            lam_query = getattr(self, "lam_query", None)
            q_features = Features(
                q if raw_q is None else raw_q, self.phi_q, self.config.state == "delta", scale, lam_query
            )

        # Without linear heads there is only the cache to move on.
        out = q if not self.heads else augmented_attention(
            Problem(
                q=q,
                k=keys["k"],
                v=keys["v"],
                q_features=q_features,
                k_features=k_features,
                keys=tokens,
                state=state,
                ancestors=ancestors,
                config=self.config,
                weights=self.weights(v.device),
                scale=scale,
                sink_q=sink_q,
                bias=bias,
                rows_of_blocks=(self.key_rows, self.value_rows) if hasattr(self, "key_rows") else None,
                causal=self.causal,
            ),
            self.backend,
        )
        if ancestors is not None:
            cache.draft = Draft(new, self.far_keys)
        elif cache is not None:
            takes_in = cache.step if steps and self.config.ring_size and cache.far is None else cache.append
            with torch.set_grad_enabled(torch.is_grad_enabled() and not cache.shared.detached):
                takes_in(keys, k_features, passage)
        return out

    def far_keys(self, keys: dict[str, Tensor]) -> Features | None:
        """What the far branch sees of keys."""
        if not self.features:
            return None
        # Unit keys: what is written under a key by the delta rule is read back under it.
        unit, token_gates = self.config.state == "delta", getattr(self, "gates", None)
        return Features(keys["raw" if "raw" in keys else "k"], self.phi_k, unit, token_gates=token_gates)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, features={self.features}" + (
            f", kept={self.kept}" if self.kept else ""
        )
