"""The decoding loop of `generate`: one forward pass per step, of the last token or of a tree of guesses behind it.

Each token is chosen from the model's own logits, by argmax or by drawing from them, and a guess is accepted where it is
the token so chosen: what comes out does not depend on whether, or what, is guessed. The state is read, never copied;
accepted tokens enter it afterwards. On a GPU a step is replayed as a CUDA graph (`graphs`).
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import LinearCache
from .draft import COPY, DraftTree, copies
from .graphs import Replay
from .medusa import MedusaHeads
from .reading import forward, read

# Processors that look at nothing but the scores.
CONTEXT_FREE = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
# Criteria that need no more than how many tokens there are, and which is the latest.
SIMPLE = (MaxLengthCriteria, EosTokenCriteria)
# What `generate` prepares for a model that reads text alone.
TEXT_ALONE = {"attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
ALONE = DraftTree((-1,), (0,))
# A text has room for a multiple of so many tokens.
SLOTS = 1024


class Choice:
    """Which token follows each node, by what `generate` was asked for.

    Args:
        typical: epsilon of typical acceptance, or None for guesses to be right only where they were chosen.
    """

    def __init__(self, processors, sample: bool, typical: float | None = None):
        self.processors, self.sample, self.typical = processors, sample, typical
        self.reads_text = not all(isinstance(processor, CONTEXT_FREE) for processor in processors)

    @property
    def settings(self) -> tuple:
        """What a captured choice is fixed to."""
        return self.sample, self.typical, *((type(x), *vars(x).values()) for x in self.processors)

    def __call__(
        self, logits: Tensor, rows: "Rows", tokens: Tensor, tree: DraftTree, parents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, T] tokens of logits [B, T, V], and whether each node [B, T] is right if its ancestors are.

        Args:
            rows: the text up to node 0, which is the first of `tokens` [B, T].
            parents: [T] of the tree's nodes, of node 0 any.
        """
        scores = logits.float()
        if not self.reads_text:
            for processor in self.processors:
                scores = processor(None, scores.flatten(0, 1)).view_as(scores)
        else:
            scores = scores.clone()
            texts = rows.texts()
            for row, ids in enumerate(texts):
                for node, depth in enumerate(tree.depths):
                    way = tokens[row, tree.ways[node, 1 : depth + 1].to(tokens.device)]
                    # Rows end in different places, and some processors know rows by their number.
                    seen = torch.cat([ids, way]).expand(len(texts), -1)
                    scores[row, node] = self.processors(seen, scores[row, node].expand(len(texts), -1))[row]
        if not self.sample:
            chosen = scores.argmax(-1)
            return chosen, tokens == chosen[:, parents]
        share = scores.softmax(-1)
        # As torch.multinomial draws, which waits for the device to check its input.
        chosen = (share / torch.empty_like(share).exponential_()).argmax(-1)
        if self.typical is None:
            return chosen, tokens == chosen[:, parents]
        entropy = torch.special.entr(share).sum(-1)
        bound = (self.typical**0.5 * (-entropy).exp()).clamp(max=self.typical)
        return chosen, share[:, parents].gather(-1, tokens.unsqueeze(-1)).squeeze(-1) > bound[:, parents]


class Rows:
    """The text so far, and what ends it; rows end in different places.

    Attributes:
        text: [B, L], anything behind a row's end; count: [B], its tokens; done: [B].
        limit: [], the most tokens; ends: [E], tokens that end a row; others: criteria that read the text.
    """

    def __init__(self, ids: Tensor, criteria):
        batch, length = ids.shape
        limits = [x.max_length for x in criteria if isinstance(x, MaxLengthCriteria)]
        limit = min(limits, default=length)
        # Alike for texts of alike lengths, or each would need a graph of its own.
        self.text = ids.new_zeros(batch, (max(length, limit) // SLOTS + 1) * SLOTS)
        self.text[:, :length] = ids
        self.count = ids.new_full((batch,), length)
        self.done = torch.zeros_like(self.count, dtype=torch.bool)
        self.limit = ids.new_tensor(limit if limits else torch.iinfo(torch.long).max)
        ends = [x.eos_token_id.flatten().to(ids.device) for x in criteria if isinstance(x, EosTokenCriteria)]
        self.ends = torch.cat(ends) if ends else ids.new_empty(0)
        self.others = [x for x in criteria if not isinstance(x, SIMPLE)]

    def texts(self) -> list[Tensor]:
        """Of each row."""
        return [text[:count] for text, count in zip(self.text, self.count.tolist(), strict=True)]

    def add(self, new: Tensor) -> Tensor:
        """New tokens [B, n], -1 behind a row's last: the same without those that come after a row's end."""
        step = torch.arange(new.shape[1], device=new.device)
        place = self.count[:, None] + step
        last = torch.isin(new, self.ends) | (place + 1 >= self.limit)
        for criterion in self.others:
            texts = self.texts()
            for row, ids in enumerate(texts):
                for end in range(1, int((new[row] >= 0).sum()) + 1):
                    text = torch.cat([ids, new[row, :end]]).expand(len(texts), -1)
                    last[row, end - 1] |= criterion(text, None)[row]
        behind = last.cumsum(1) > last.long()
        new = torch.where(behind | self.done[:, None], -1, new)
        present = new >= 0
        place = place.clamp(max=self.text.shape[1] - 1)
        self.text.scatter_(1, place, torch.where(present, new, self.text.gather(1, place)))
        self.count.add_(present.sum(1))
        self.done.logical_or_((last & present).any(1))
        return new

    def sequences(self, pad: int) -> Tensor:
        """[B, longest], padded behind a row's end."""
        text = self.text[:, : int(self.count.max())]
        return torch.where(torch.arange(text.shape[1], device=text.device) < self.count[:, None], text, pad)


@lru_cache(maxsize=16)
def tree_on(device: torch.device, tree: DraftTree, width: int, sequential: bool) -> tuple:
    """A tree's depths, ways, parents, ancestors and levels as tensors, which many texts take from there."""

    def place(x):
        return torch.as_tensor(x, dtype=torch.long, device=device)

    with torch.inference_mode(False):
        depths, ways, parents = map(place, (tree.depths, tree.ways, (0, *tree.parents[1:])))
        levels = [[*map(place, level)] for level in tree.levels(width, sequential)]
        return depths, ways, parents, tree.ancestors.to(device), levels


class Step:
    """One forward pass and what is chosen by it. All that it changes stays where it is in memory.

    Attributes:
        last: [B], each row's latest token, not in the cache yet; hidden: [B, C], what heads guess from.
    """

    def __init__(
        self, model, cache: LinearCache, choose: Choice, rows: Rows, draft: tuple[MedusaHeads, DraftTree] | None,
        last: Tensor, hidden: Tensor,
    ):  # fmt: skip
        self.model, self.cache, self.choose, self.rows, self.draft = model, cache, choose, rows, draft
        self.last, self.hidden = last, hidden
        self.heads, self.tree = (None, ALONE) if draft is None else draft
        # Candidates of a head that are of use.
        self.width = max((rank for rank in self.tree.ranks if rank != COPY), default=0) + 1
        sequential = self.heads is not None and self.heads.sequential
        placed = tree_on(last.device, self.tree, self.width, sequential)
        self.depths, self.ways, self.parents, self.ancestors, self.levels = placed

    @property
    def batch(self) -> int:
        return len(self.last)

    @property
    def reads_text(self) -> bool:
        """Whether it waits for the text so far."""
        return self.choose.reads_text or bool(self.rows.others)

    @property
    def settings(self) -> tuple:
        """What a captured step is fixed to, beside the model and the shapes of its tensors."""
        heads = () if self.heads is None else (weight.data_ptr() for weight in self.heads.parameters())
        return self.tree, *heads, *self.choose.settings

    @property
    def nodes(self) -> int:
        """How many tokens go through the model."""
        return len(self.tree.parents)

    @property
    def reach(self) -> int:
        """How many of these enter the cache at most."""
        return self.ways.shape[1]

    def guesses(self) -> Tensor:
        """[B, T - 1] tokens of the nodes but node 0, depth by depth."""
        heads, output, embed = self.heads, self.model.get_output_embeddings(), self.model.get_input_embeddings()
        copied = copies(self.rows.text, self.rows.count) if COPY in self.tree.ranks else None
        tokens, hidden = [self.last[:, None]], self.hidden[:, None]
        state = hidden
        for head, (parents, asked, found) in enumerate(self.levels):
            candidates = []
            if head < self.tree.heads:
                before = state[:, parents] if heads.sequential else hidden
                state = heads.state(head, before, embed(tokens[-1]))
                if len(asked):
                    logits = heads.logits(head, state[:, asked], output)
                    candidates.append(logits.topk(self.width).indices.flatten(1))
            if copied is not None:
                candidates.append(copied[:, head : head + 1])
            tokens.append(torch.cat(candidates, dim=1)[:, found])
        return torch.cat(tokens[1:], dim=1)

    def __call__(self) -> Tensor:
        """[B, depth + 2]: new tokens, -1 behind a row's last, and whether it is done."""
        tokens = self.last[:, None]
        if self.heads is None:
            logits, states = forward(self.model, self.cache, tokens, self.cache.length[:, None])
        else:
            if self.nodes > 1:
                tokens = torch.cat([tokens, self.guesses()], dim=1)
            with self.cache.verifying(self.ancestors):
                logits, states = forward(self.model, self.cache, tokens, self.cache.length[:, None] + self.depths)
        chosen, right = self.choose(logits, self.rows, tokens, self.tree, self.parents)

        # A node counts where it and all before it are right.
        right = (right[:, None] | ~self.ancestors)[:, :, 1:].all(-1)
        leaf = (right * (self.depths + 1)).argmax(1, keepdim=True)
        way = self.ways[leaf[:, 0]]  # (B, depth + 1)
        last = chosen.gather(1, leaf)
        new = torch.where(way >= 0, tokens.gather(1, way.clamp(min=0)), -1)[:, 1:]
        new = nn.functional.pad(new, (0, 1), value=-1).scatter(1, self.depths[leaf], last)
        new = self.rows.add(new)
        self.last.copy_(last[:, 0])
        if self.heads is not None:
            self.hidden.copy_(states[torch.arange(len(leaf), device=leaf.device), leaf[:, 0]])
            # As after plain decoding, all but a row's last token are in the cache.
            kept = torch.arange(way.shape[1], device=way.device) < (new >= 0).sum(1, keepdim=True)
            self.cache.accept(torch.where(kept, way, -1))
        return torch.cat([new, self.rows.done[:, None]], dim=1)

    def twin(self, cache: LinearCache) -> "Step":
        """The same on another cache, with memory of its own."""
        rows, last, hidden = deepcopy(self.rows), self.last.clone(), self.hidden.clone()
        return Step(self.model, cache, self.choose, rows, self.draft, last, hidden)

    def tensors(self) -> list[Tensor]:
        """All that a step reads and changes, but for weights and the cache."""
        rows = self.rows
        return [self.last, self.hidden, rows.text, rows.count, rows.done, rows.limit, rows.ends]


@dataclass
class DecodingOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and `steps` [B]: forward passes that each row took after its prompt's."""

    steps: Tensor | None = None


def unsupported(generation_config) -> str | None:
    """A setting of `generate` that `decode` does not know, or None."""
    for name, plain in (("num_beams", 1), ("output_scores", False), ("output_logits", False),
                        ("output_attentions", False), ("output_hidden_states", False)):  # fmt: skip
        value = getattr(generation_config, name, None)
        if value not in (None, plain):
            return f"{name}={value}"
    return None


def knows(processors, criteria, generation_config, model_kwargs: dict) -> bool:
    """Whether `decode` without guesses does, without a look at the text, what transformers' own loop would."""
    return (
        unsupported(generation_config) is None
        and all(isinstance(x, CONTEXT_FREE) for x in processors)
        and all(isinstance(x, SIMPLE) for x in criteria)
        and isinstance(model_kwargs.get("past_key_values"), LinearCache)
        and model_kwargs.keys() <= TEXT_ALONE
    )


def decode(
    model,
    input_ids: Tensor,
    choose: Choice,
    stopping_criteria,
    generation_config,
    model_kwargs: dict,
    draft: tuple[MedusaHeads, DraftTree] | None = None,
    streamer=None,
):
    """What `generate` returns: the loop, with what `generate` prepares for its own ones.

    Args:
        draft: heads and the tree of their guesses; without, a step makes one token.
        streamer: gets the new tokens of one sequence as they are accepted.
    """
    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    rows, root = Rows(input_ids, stopping_criteria), input_ids.new_zeros(1)
    with Replay(model, cache) as run:
        logits, hidden = read(run, input_ids, mask, getattr(generation_config, "prefill_chunk_size", None))
        last, _ = choose(logits[:, None], rows, input_ids[:, -1:], ALONE, root)
        new = rows.add(last)
        steps, done = torch.zeros(len(input_ids), dtype=torch.long), bool(rows.done.all())
        if streamer is not None:
            streamer.put(new[:, 0].cpu())
        step = Step(model, cache, choose, rows, draft, last[:, 0].clone(), hidden.clone())
        while not done:
            new, ended = run(step).cpu().tensor_split([-1], dim=1)
            done = bool(ended.all())
            steps += new[:, 0] >= 0
            for column in new.unbind(1) if streamer is not None else ():
                if (column >= 0).any():
                    streamer.put(column[column >= 0])
    if streamer is not None:
        streamer.end()
    pad = generation_config._pad_token_tensor
    sequences = rows.sequences(0 if pad is None else int(pad))
    if generation_config.return_dict_in_generate:
        return DecodingOutput(sequences=sequences, past_key_values=cache, steps=steps)
    return sequences
