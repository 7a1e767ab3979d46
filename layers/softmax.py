"""Heads that stay softmax: exact attention over every visible key, and the memory of those keys."""

from collections.abc import Callable

import torch
from torch import Tensor

from .tokens import PADDING, Tokens


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v over visible keys: [B, H, T, D_v] in the dtype of v.

    Args:
        q: [B, H, T, D]; k: [B, H_kv, K, D]; v: [B, H_kv, K, D_v].
        visible: [B, T, K] (see `tokens.visible_keys`), or None for one unpadded document of T = K tokens.
    """
    groups = q.shape[1] // k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)
    # Not enable_gqa: with a mask the fused kernels refuse it, and what remains keeps all T x K scores.
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mask = None if visible is None else visible[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)


class SoftmaxMemory:
    """Keys and values of the kept heads, for the tokens of each row's current document.

    Args:
        sinks: first tokens of a document that are never forgotten.
        limit: tokens of a document that are remembered, sinks and the latest; None: all of it.

    Attributes:
        k, v: [B, n, T, D], [B, n, T, D_v], in the order in which tokens came; None before the first.
        position: [B, T], index within the document; `PADDING` where the slot holds no token of the row's document.
    """

    def __init__(self, sinks: int, limit: int | None):
        self.sinks, self.limit = sinks, limit
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.position: Tensor | None = None
        self.draft: tuple[Tensor, Tensor] | None = None

    def recall(self, k: Tensor, v: Tensor, new: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """What is remembered followed by the new tokens' k, v and places."""
        if self.k is None:
            return k, v, new
        document = torch.where(self.position == PADDING, PADDING, 0)
        tokens = Tokens(
            torch.cat([document, new.document], dim=1), torch.cat([self.position, new.position], dim=1)
        )
        return torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2), tokens

    def keep(self, k: Tensor, v: Tensor, tokens: Tokens) -> None:
        """Remember, of what `recall` returned, the document that each row is in now."""
        current = tokens.document.amax(1, keepdim=True).clamp(min=0)
        self.k, self.v = k, v
        self.position = torch.where(tokens.document == current, tokens.position, PADDING)
        if self.limit is not None and k.shape[2] > self.limit:
            forgotten = self.position.amax(1, keepdim=True) - (self.limit - self.sinks)
            is_held = (self.position > forgotten) | (self.position < self.sinks)
            self.position = torch.where(is_held, self.position, PADDING)
            self.compact()

    def accept(self, path: Tensor, length: Tensor) -> None:
        """Commit nodes of the `draft` tree: path [B, n], -1 where a row accepts fewer; length [B] before it."""
        if self.draft is None:
            return
        index = path.clamp(min=0)[:, None, :, None]
        k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in self.draft)
        depth = torch.arange(path.shape[1], device=path.device)
        accepted = Tokens(torch.where(path >= 0, 0, PADDING), length[:, None] + depth)
        self.keep(*self.recall(k, v, accepted))
        self.draft = None
        self.compact()

    def crop(self, length: Tensor) -> None:
        """Forget positions from `length` [B] on."""
        if self.k is not None:
            self.position = torch.where(self.position < length[:, None], self.position, PADDING)
            self.compact()

    def compact(self) -> None:
        """Drop the slots in which no row holds anything."""
        used = (self.position != PADDING).any(0)
        self.k, self.v, self.position = self.k[:, :, used], self.v[:, :, used], self.position[:, used]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.k is not None:
            self.k, self.v, self.position = function(self.k), function(self.v), function(self.position)

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes
