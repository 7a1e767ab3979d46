"""Attention to another sequence: what a decoder's tokens see of an encoder's, all of it, softmax or linear."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import RowsLayer
from .config import LinearAttentionConfig
from .feature_maps import FEATURE_MAPS
from .kernels import contract, normalised
from .softmax import softmax_attention


class CrossAttention(nn.Module):
    """Linear attention over all keys of another sequence, whose order and number it does not know:

        o_i = phi_q(q_i) S / norm_i,  S = sum_j phi_k(k_j) v_j^T

    `norm` is the sum of the weights where `config` has near and far share it, or says so, else as in `config`. A cache
    holds S [B, H_kv, F, D_v + 1] alone, which takes as much of a page as of a book.

    Args:
        config: of the model's other layers, whose feature map it has.
        heads, kv_heads, head_dim: of the attention module.

    Raises:
        ValueError: `config` has no feature map.
    """

    # As those of a `LinearAttention`; it has no branches to switch off.
    causal, crosses, kept, rotates, branches = False, True, (), False, frozenset()

    def __init__(self, config: LinearAttentionConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        if config.feature_map is None:
            raise ValueError("cross: linear needs a feature_map, and this attention has none; use cross: softmax")
        self.config, self.heads, self.kv_heads, self.head_dim = config, heads, kv_heads, head_dim
        feature_map, size = FEATURE_MAPS[config.feature_map], (config.feature_dim, config.feature_expansion)
        self.phi_q, self.phi_k = feature_map(heads, head_dim, *size), feature_map(kv_heads, head_dim, *size)
        self.features = self.phi_k.dim
        self.norm = "sum" if config.combine == "shared" else config.norm
        # The seam's notes, as those of `LinearAttention`.
        self.call = self.watch = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None, cache: "CrossCacheLayer | None" = None
    ) -> Tensor:
        """Outputs [B, H, T, D_v].

        Args:
            q: [B, H, T, D]; k: [B, H_kv, K, D]; v: [B, H_kv, K, D_v], anything where the cache holds a state.
            segments: [B, K], 0 for padding; None: there is none.
        """
        state, count = (None, None) if cache is None else (cache.state, cache.count)
        dtype = torch.promote_types(q.dtype, torch.float32)
        if state is None:
            phi_k = self.phi_k(k).to(dtype)
            if segments is None:
                count = k.new_full((len(k), 1), k.shape[2], dtype=dtype)
            else:
                visible = segments > 0
                phi_k, count = phi_k * visible[:, None, :, None], visible.sum(1, keepdim=True).to(dtype)
            state = phi_k.mT @ nn.functional.pad(v.to(dtype), (0, 1), value=1.0)
            if cache is not None:
                cache.hold(state, count)
        far = contract(self.phi_q(q).to(dtype), state)
        return normalised(far[..., :-1], far[..., -1:], count, self.norm).to(q.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, features={self.features}, norm={self.norm}"


class CrossCacheLayer(RowsLayer):
    """What a `CrossAttention` remembers: the sums, from the first token on.

    Attributes:
        state: [B, H_kv, F, D_v + 1], fp32; count: [B, 1], keys in it. None before.
        keys, values: empty, for the family's code, which hands them on.
    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.state = self.count = self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Hands keys and values through: the attention function called next makes the state of them."""
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def hold(self, state: Tensor, count: Tensor) -> None:
        self.state, self.count = state, count

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing, as it holds none of the tokens that are taken back."""

    def _map_rows(self, function) -> None:
        if self.state is not None:
            self.state, self.count, self.keys, self.values = map(
                function, (self.state, self.count, self.keys, self.values)
            )

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


class CrossCache(Cache):
    """A `CrossCacheLayer` for each of so many layers."""

    def __init__(self, layers: int):
        super().__init__(layers=[CrossCacheLayer() for _ in range(layers)])


def cross_softmax(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, scale: float) -> Tensor:
    """What a `CrossAttention` gives where attention to the other sequence stays softmax; arguments as there."""
    queries = q.shape[2]
    visible = q.new_ones((), dtype=torch.bool) if segments is None else segments[:, None] > 0
    return softmax_attention(q, k, v, visible.expand(len(q), queries, k.shape[2]), scale)
