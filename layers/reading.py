"""How a prompt gets into a cache: whole, or, if it is short, as chains of a few tokens by the kernels that verify draft
trees, replayed as a CUDA graph (`graphs`). To launch what reads it whole takes Python as long for a hundred tokens as
for thousands.
"""

import inspect

import torch
from torch import Tensor

from .cache import LinearCache
from .graphs import NODES, Replay

# Tokens of a chain, which enter the cache at once, and of the longest prompt that is read so.
CHAIN = NODES
SHORT = 512


def forward(model, cache: LinearCache, ids: Tensor, positions: Tensor, **keywords) -> tuple[Tensor, Tensor]:
    """Logits of new tokens, and the hidden states that they are made of."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        keywords.pop("logits_to_keep", None)
    hidden = []
    # To ask for hidden states would keep those of all layers.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        out = model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True, **keywords
        )
    finally:
        hook.remove()
    return out.logits, hidden[0]


class Reading:
    """The next tokens of a text, up to `CHAIN` of each row; rows end in different places.

    Attributes:
        text: [B, SHORT], anything behind a row's end; count: [B], its tokens; start: [], how many were read.
    """

    reads_text, nodes, reach, settings = False, CHAIN, CHAIN, None

    def __init__(self, model, cache: LinearCache, text: Tensor, count: Tensor, start: Tensor):
        self.model, self.cache, self.text, self.count, self.start = model, cache, text, count, start
        self.index = torch.arange(CHAIN, device=text.device)
        self.row = torch.arange(len(text), device=text.device)
        self.chain = torch.ones(CHAIN, CHAIN, dtype=torch.bool, device=text.device).tril()

    @classmethod
    def of(cls, model, cache: LinearCache, ids: Tensor, mask: Tensor | None) -> "Reading":
        """Of ids [B, T], those of them that `mask` [B, T] has."""
        (batch, length), text = ids.shape, ids.new_zeros(len(ids), SHORT)
        count = ids.new_full((batch,), length)
        if mask is not None:
            count, order = mask.sum(1), (~mask).long().argsort(dim=1, stable=True)
            ids = ids.gather(1, order)
        text[:, :length] = ids
        return cls(model, cache, text, count, ids.new_zeros(()))

    @property
    def batch(self) -> int:
        return len(self.text)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and hidden state [B, C] of the last of them in each row, anything where there is none."""
        place = self.start + self.index
        with self.cache.verifying(self.chain):
            tokens, positions = self.text[:, place], self.cache.length[:, None] + self.index
            logits, hidden = forward(self.model, self.cache, tokens, positions)
        self.cache.accept(torch.where(place < self.count[:, None], self.index, -1))
        last = (self.count - 1 - self.start).clamp(0, CHAIN - 1)
        self.start.add_(CHAIN)
        return logits[self.row, last], hidden[self.row, last]

    def twin(self, cache: LinearCache) -> "Reading":
        """The same on another cache, with memory of its own."""
        return Reading(self.model, cache, self.text.clone(), self.count.clone(), self.start.clone())

    def tensors(self) -> list[Tensor]:
        """All that it reads and changes, but for weights and the cache."""
        return [self.text, self.count, self.start]


def in_chains(reading: Reading, run: Replay, columns: int) -> list[Tensor]:
    """Logits [B, V] and hidden state [B, C] of the last token of each row, whose text has so many columns at most."""
    found = None
    for start in range(0, columns, CHAIN):
        new = run(reading)
        here = (reading.count > start)[:, None]
        found = [torch.where(here, x, y) for x, y in zip(new, found or new, strict=True)]
    return found


def read(run: Replay, ids: Tensor, mask: Tensor | None, chunk: int | None) -> list[Tensor]:
    """Take into a cache what it does not hold of a text: logits [B, V] and hidden state [B, C] of its last token.

    Args:
        run: has the model and the cache.
        ids: [B, T], what the cache holds included; mask: [B, T], 0 where it is padding.
        chunk: tokens that are read at once, None for all.
    """
    model, cache, length = run.model, run.cache, ids.shape[1]
    past = cache.get_seq_length()
    mask = None if mask is None or mask.bool().all() else mask
    if length - past <= SHORT:
        reading = Reading.of(model, cache, ids[:, past:], None if mask is None else mask[:, past:].bool())
        if run.turn_to(reading):
            found = in_chains(reading, run, length - past)
            for layer in cache.layers:
                layer.seen = length
            return found
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    for start in range(past, length, chunk or length):
        part = slice(start, start + (chunk or length))
        seen = None if mask is None else mask[:, : part.stop]
        logits, hidden = forward(
            model, cache, ids[:, part], positions[:, part], attention_mask=seen, logits_to_keep=1
        )
    return [logits[:, -1], hidden[:, -1]]
