"""Where each token stands: its document within the row, and its position within that document.

A batch is described by `segments` [B, T], integers: 0 is padding, equal neighbours (padding aside) are one document.
None means no padding and one document per row. Everything downstream works on positions and documents alone, so
left padding, right padding and packing are the same thing to it.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .config import LinearAttentionConfig

PADDING = -1


@dataclass
class Tokens:
    """Positions of tokens.

    Attributes:
        document: [B, T], running number of the document in its row; 0 is the document that a cache holds the
            beginning of (or the first one), `PADDING` marks padding.
        position: [B, T], index within the document, counted from its true start.
        whole: known to be one document per row, from its start, without padding.
        layouts: what backends work out from the tokens, kept for the next layer.
    """

    document: Tensor
    position: Tensor
    whole: bool = False
    layouts: dict = field(default_factory=dict, repr=False)

    @property
    def valid(self) -> Tensor:
        return self.document != PADDING


def segments_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, length] segments of documents that begin at `cu_seqlens[:-1]` (flash-attn's convention)."""
    index = torch.arange(length, device=cu_seqlens.device)
    return torch.bucketize(index, cu_seqlens[1:], right=True)[None] + 1


def whole_sequences(segments: Tensor | None, batch: int, length: int, device: torch.device) -> Tokens:
    """The tokens of sequences without a past; the same object for all layers of a forward pass."""
    if segments is None:
        return _single_documents(batch, length, device, torch.is_inference_mode_enabled())
    if segments not in _located:
        start = nothing(batch, device, torch.is_inference_mode_enabled())
        _located[segments] = locate(segments, start, start)
    return _located[segments]


_located = WeakTensorKeyDictionary()


# Tensors made in inference mode cannot take part in training.
@lru_cache(maxsize=4)
def nothing(batch: int, device: torch.device, inference: bool) -> Tensor:
    """[batch] zeros, the lengths of rows without tokens; the same object for all layers."""
    return torch.zeros(batch, dtype=torch.long, device=device)


@lru_cache(maxsize=8)
def _single_documents(batch: int, length: int, device: torch.device, inference: bool) -> Tokens:
    position = torch.arange(length, device=device).expand(batch, -1)
    return Tokens(position.new_zeros(()).expand_as(position), position, whole=True)


def locate(segments: Tensor, past_segment: Tensor, past_length: Tensor) -> Tokens:
    """Documents and positions of new tokens.

    Args:
        segments: [B, T].
        past_segment: [B], segment of the document in the cache, 0 where there is none.
        past_length: [B], tokens of that document seen so far.
    """
    valid = segments > 0
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    last_valid = torch.where(valid, index, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(last_valid[:, :1], -1), last_valid[:, :-1]], dim=1)
    previous = torch.where(before >= 0, segments.gather(1, before.clamp(min=0)), past_segment[:, None])
    starts = valid & (segments != previous)
    rank = valid.cumsum(dim=1) - 1
    start = torch.where(starts, rank, -1).cummax(dim=1).values
    position = torch.where(start >= 0, rank - start, rank + past_length[:, None])
    return Tokens(torch.where(valid, starts.cumsum(dim=1), PADDING), position)


def visible_keys(tokens: Tokens, queries: int, ancestors: Tensor | None, causal: bool = True) -> Tensor:
    """[B, Q, K] whether each of the last `queries` tokens may look at key k: of its document, and, if `causal`, not
    after it.

    Padding looks at padding, so no query is without a key.

    Args:
        ancestors: [Q, Q] bool for a draft tree: node i sees the keys before the tree and node j where true.
    """
    order = ancestors
    if order is None:
        order = torch.ones(queries, queries, dtype=torch.bool, device=tokens.document.device)
        order = order.tril() if causal else order
    order = torch.cat([order.new_ones(queries, tokens.document.shape[1] - queries), order], dim=1)
    return order & (tokens.document[:, -queries:, None] == tokens.document[:, None, :])


def near(config: LinearAttentionConfig, q_position: Tensor, k_position: Tensor) -> Tensor:
    """[.., Q, K] whether key k is near query q, both of one document; before it or behind it alike."""
    i, j = q_position.unsqueeze(-1), k_position.unsqueeze(-2)
    size = config.window_size
    if config.window is None:
        return torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)
    if config.window == "sliding":
        inside = (i - j).abs() < size
    elif config.window == "block":
        inside = i // size == j // size
    else:
        inside = (i // size - j // size).abs() <= 1
    return inside | (j < config.sinks)
