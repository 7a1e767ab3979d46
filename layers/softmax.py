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
    (batch, heads, queries, dim), kv_heads = q.shape, k.shape[1]
    groups = heads // kv_heads
    q, k = q.to(v.dtype), k.to(v.dtype)
    if visible is not None and queries <= dim:
        # The queries of a group as those of one head: to repeat their mask takes less than to repeat the keys.
        q = q.reshape(batch, kv_heads, groups * queries, dim)
        mask = visible[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return out.reshape(batch, heads, queries, v.shape[3])
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
        k, v: [B, n, T, D], [B, n, T, D_v], of tokens in any order; None before the first.
        position: [B, T], index within the document; `PADDING` where the slot holds no token of the row's document.
        reserved: whether there are slots for tokens to come (`reserve`). Then steps and trees are written in place,
            each token where its position says; shapes and addresses stay what they are, as a CUDA graph needs them.
            What else adds to the memory, or takes from it, ends that.
    """

    def __init__(self, sinks: int, limit: int | None):
        self.sinks, self.limit = sinks, limit
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.position: Tensor | None = None
        self.draft: tuple[Tensor, Tensor] | None = None
        self.reserved = False

    def recall(self, k: Tensor, v: Tensor, new: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """What is remembered followed by the new tokens' k, v and places."""
        self.release()
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
        self.forget()

    def forget(self) -> None:
        """Hold to the `limit`."""
        if self.limit is not None and self.k.shape[2] > self.limit:
            forgotten = self.position.amax(1, keepdim=True) - (self.limit - self.sinks)
            is_held = (self.position > forgotten) | (self.position < self.sinks)
            self.position = torch.where(is_held, self.position, PADDING)
            self.compact()

    def reserve(self, slots: int) -> None:
        """Make room for tokens and nodes at positions below `slots`; with a `limit`, for all that come, if `slots` are
        the limit and as many as a tree has nodes, which are written before the oldest tokens may be forgotten."""
        self.reserved = True
        where = self._slot(self.position, slots)
        # What holds nothing goes to one slot more, which is cut off.
        where = torch.where(self.position == PADDING, slots, where)

        def spread(x):
            empty = x.new_zeros(*x.shape[:2], slots + 1, x.shape[3])
            return empty.scatter(2, _index(where, x), x)[:, :, :slots].contiguous()

        self.k, self.v = spread(self.k), spread(self.v)
        empty = self.position.new_full((len(where), slots + 1), PADDING)
        self.position = empty.scatter(1, where, self.position)[:, :slots].contiguous()

    def release(self) -> None:
        """Give back the slots that `reserve` has made and nobody has filled."""
        if self.reserved:
            self.reserved = False
            self.forget()
            self.compact()

    def write(self, k: Tensor, v: Tensor, position: Tensor, ancestors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put into reserved slots one new token of every row, or the nodes of a draft tree for `accept` to choose from.

        Args:
            k, v: [B, n, T, ..]; position: [B, T], of a node by its depth.
            ancestors: [T, T] of the tree, or None.

        Returns:
            Positions [B, slots] of all that is there, and what is visible [B, T, slots].
        """
        batch, nodes = position.shape
        # Node i is where the token i places on would be, so that each has a slot.
        place = position if ancestors is None else position[:, :1] + torch.arange(nodes, device=position.device)
        slot = self._slot(place, self.k.shape[2])
        self.k.scatter_(2, _index(slot, k), k)
        self.v.scatter_(2, _index(slot, v), v)
        if ancestors is None:
            self.position.scatter_(1, slot, position)
            return self.position, (self.position != PADDING)[:, None]
        # What a ring had in these slots is further back than anything that is looked at, or cropped to, later on, so
        # their positions may stay.
        held = (self.position != PADDING)[:, None].expand(-1, nodes, -1)
        visible = held.scatter(2, slot[:, None].expand(-1, nodes, -1), ancestors.expand(batch, -1, -1))
        return self.position.scatter(1, slot, position), visible

    def accept(self, path: Tensor, length: Tensor) -> None:
        """Commit nodes of the tree that came last: path [B, n], -1 where a row accepts fewer; length [B] before it."""
        if not self.reserved and self.draft is None:
            return
        node = path.clamp(min=0)
        position = length[:, None] + torch.arange(path.shape[1], device=path.device)
        if self.reserved:
            slots = self.k.shape[2]
            source, target = self._slot(length[:, None] + node, slots), self._slot(position, slots)
            for x in (self.k, self.v):
                x.scatter_(2, _index(target, x), x.gather(2, _index(source, x)))
            self.position.scatter_(1, target, torch.where(path >= 0, position, PADDING))
            return
        k, v = (x.gather(2, _index(node, x)) for x in self.draft)
        self.keep(*self.recall(k, v, Tokens(torch.where(path >= 0, 0, PADDING), position)))
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
        self.reserved = False
        self.k, self.v, self.position = self.k[:, :, used], self.v[:, :, used], self.position[:, used]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.k is not None:
            self.k, self.v, self.position = function(self.k), function(self.v), function(self.position)

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def tensors(self) -> list[Tensor]:
        return [] if self.k is None else [self.k, self.v, self.position]

    def _slot(self, position: Tensor, slots: int) -> Tensor:
        """Which of so many reserved slots a token has: behind those of the sinks, a ring where there is a `limit`."""
        if self.limit is None:
            return position
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % (slots - self.sinks))


def _index(slot: Tensor, x: Tensor) -> Tensor:
    """`slot` [B, n], for gathering from or scattering into x [B, H, K, D] along K."""
    return slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
