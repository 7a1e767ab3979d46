"""What new tokens do to a cache: layers differ in keys and values, not in places, so it is worked out once for all."""

from functools import cached_property

import torch
from torch import Tensor

from .config import LinearAttentionConfig
from .tokens import PADDING, Tokens, locate, whole_sequences


class Passage:
    """T new tokens behind the P that a layer holds: s sinks and R ring slots, or none before the first token. B rows.

    Args:
        clock: length, count and segment [B] of the cache.
        inputs: segments [B, T], ancestors [T, T] and path [B, T], or None, as of `LinearCacheLayer.passage`.
        facts: the configuration, columns of input before, R and T.

    Attributes:
        new: document and position of the new tokens; tokens: of all P + T.
        order: [B, R], the ring's slots, that of the oldest token first; None before the first token.
    """

    def __init__(
        self,
        clock: tuple[Tensor, ...],
        inputs: tuple[Tensor | None, ...],
        facts: tuple[LinearAttentionConfig, int, int, int],
    ):
        self.clock, self.inputs, self.facts = clock, inputs, facts
        length, count, segment = clock
        segments, ancestors, path = inputs
        config, seen, slots, new = facts
        batch, device = len(length), length.device
        if not seen:
            self.new = whole_sequences(segments, batch, new, device)
        elif segments is not None:
            self.new = locate(segments, segment, length)
        else:
            position = length[:, None] + torch.arange(new, device=device)
            self.new = Tokens(torch.zeros_like(position), position)
        if ancestors is not None:
            self.new = Tokens(self.new.document, length[:, None] + ancestors.sum(-1) - 1)
        if path is not None:
            self.new = Tokens(torch.where(path >= 0, 0, PADDING), self.new.position)
        self.tokens, self.order = self.new, None
        if seen:
            index = torch.arange(slots, device=device)
            start = (length - count)[:, None]
            position = start + index
            sink = torch.arange(config.sinks, device=device).expand(batch, -1)
            held = torch.cat([sink < start, index < count[:, None]], dim=1)
            self.order = position % max(slots, 1)
            self.tokens = Tokens(
                torch.cat([torch.where(held, 0, PADDING), self.new.document], dim=1),
                torch.cat([sink, position, self.new.position], dim=1),
            )

    def is_of(self, clock: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], facts: tuple) -> bool:
        """Whether it was made of these very inputs, and of a clock that says the same: after fused steps, which write
        into it, each layer has its own."""

        def same(xs, ys):
            return all(x is y for x, y in zip(xs, ys, strict=True))

        if self.facts != facts or not same(self.inputs, inputs):
            return False
        numbers = zip(self.clock, clock, strict=True)
        return same(self.clock, clock) or all(x.device == y.device and torch.equal(x, y) for x, y in numbers)

    @cached_property
    def _current(self) -> Tensor:
        """[B, 1], the document that each row is in afterwards."""
        return self.new.document.amax(1, keepdim=True).clamp(min=0)

    @cached_property
    def continues(self) -> Tensor | None:
        """[B], whether each row is still in the document of which the state is; None where all are, or it is empty."""
        return (self._current == 0).squeeze(1) if self.order is not None and self.inputs[0] is not None else None

    @cached_property
    def after(self) -> tuple[Tensor, Tensor, Tensor]:
        """The cache's length, count and segment [B] with the new tokens in it."""
        (length, count, segment), segments = self.clock, self.inputs[0]
        added = (self.new.document == self._current).sum(1)
        if self.continues is not None:
            length, count = length * self.continues, count * self.continues
        length, count = length + added, (count + added).clamp(max=self.facts[0].ring_size)
        if segments is None:
            return length, count, torch.ones_like(segment)
        index = torch.arange(segments.shape[1], device=segments.device)
        last = torch.where(segments > 0, index, -1).amax(1)
        latest = segments.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
        return length, count, torch.where(last >= 0, latest, segment)

    @cached_property
    def _stays(self) -> tuple[Tensor, Tensor]:
        """[B, P + T], of the current document, and whether the ring holds it afterwards."""
        length, count, _ = self.after
        belongs = self.tokens.document == self._current
        return belongs, belongs & (self.tokens.position >= (length - count)[:, None])

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """[B, ring_size] and [B, s], the number among the P + T of the token in each slot of ring and sinks
        afterwards, of any token where there is none."""
        ring_size, sinks, position = self.facts[0].ring_size, self.facts[0].sinks, self.tokens.position
        belongs, stays = self._stays
        return (
            _sources(stays, position % max(ring_size, 1), ring_size),
            _sources(belongs & (position < sinks), position, sinks),
        )

    @cached_property
    def leaving(self) -> tuple[slice, Tokens | None]:
        """A part of the P + T, and those of it that leave the ring as tokens of document 0; None where none does."""
        config, _, slots, new = self.facts
        if self.tokens.whole:
            left = max(new - config.ring_size, 0)
            batch, device = len(self.tokens.document), self.tokens.document.device
            return slice(0, left), whole_sequences(None, batch, left, device) if left else None
        # The oldest leave, as many as are new at most and those that fused steps have left in more slots; they are in
        # the ring unless the new ones overrun it.
        part = slice(None)
        if self.order is not None and new <= config.ring_size:
            part = slice(config.sinks, config.sinks + new + slots - config.ring_size)
        belongs, stays = (x[:, part] for x in self._stays)
        return part, Tokens(torch.where(belongs & ~stays, 0, PADDING), self.tokens.position[:, part])


def _sources(chosen: Tensor, slot: Tensor, slots: int) -> Tensor:
    """[B, slots], the number of the `chosen` [B, K] token whose `slot` it is, 0 where there is none."""
    batch, length = chosen.shape
    source = torch.zeros(batch, slots + 1, dtype=torch.long, device=chosen.device)
    index = torch.arange(length, device=chosen.device).expand(batch, -1)
    return source.scatter(1, torch.where(chosen, slot, slots), index)[:, :slots]
