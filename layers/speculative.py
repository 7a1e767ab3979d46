"""Speculative decoding with Medusa heads: a tree of guesses is verified in one forward pass on the linear state.

A decoding loop for transformers' `generate(custom_generate=model.speculate)`. What it returns is what plain decoding
returns: each token is chosen from the model's own logits, by argmax or by drawing from them, and a guess is accepted
where it is the token so chosen. The state is read, never copied; accepted tokens enter it afterwards.
"""

import inspect

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import cached_file

from .cache import LinearCache, LinearCacheLayer
from .draft import DraftTree
from .medusa import MedusaHeads

HEADS_FILE = "medusa_heads.safetensors"
# Processors that look at nothing but the scores.
CONTEXT_FREE = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


def attach_heads(model, heads: MedusaHeads, tree: DraftTree) -> None:
    """Let `model.speculate` draft with `heads`.

    Raises:
        ValueError: when the heads are of another model, or too few for the tree.
    """
    size = model.get_output_embeddings().in_features
    if heads.blocks[0].in_features != size:
        raise ValueError(f"heads are of a model with {heads.blocks[0].in_features} hidden units, this one has {size}")
    slack = min(layer.config.slack for layer in model.linear_attentions().values())
    depth = max(tree.depths)
    if depth > min(len(heads.blocks), slack):
        raise ValueError(
            f"the tree is {depth} guesses deep, for {len(heads.blocks)} heads and a cache that keeps {slack} tokens in "
            "reserve (slack); use a tree no deeper than both"
        )
    device = model.get_output_embeddings().weight.device
    # Not a submodule: the model's own weights stay as they are.
    model.__dict__["draft"] = heads.to(device).eval(), tree


def load_heads(model) -> None:
    """Attach what an exported directory carries.

    Raises:
        ValueError: when the model came without heads.
    """
    found = getattr(model.config, "medusa", None)
    if found is None:
        raise ValueError("the model has no draft heads; convert it with a medusa section, or decode as usual")
    heads = MedusaHeads(model.get_output_embeddings(), found["heads"], found["projection"])
    heads.load_state_dict(load_file(cached_file(model.config.name_or_path, HEADS_FILE)))
    attach_heads(model, heads, DraftTree.of(found["tree"]))


class _Choice:
    """Which token follows each node, by what `generate` was asked for."""

    def __init__(self, processors, sample: bool):
        self.processors, self.sample = processors, sample
        self.reads_text = not all(isinstance(processor, CONTEXT_FREE) for processor in processors)

    def __call__(self, logits: Tensor, rows: list[Tensor], tokens: Tensor, tree: DraftTree) -> Tensor:
        """[B, T] of logits [B, T, V].

        Args:
            rows: the tokens of each row up to node 0, which is the first of the nodes' tokens [B, T].
        """
        scores = logits.float()
        if not self.reads_text:
            for processor in self.processors:
                scores = processor(None, scores.flatten(0, 1)).view_as(scores)
        else:
            scores = scores.clone()
            for row, ids in enumerate(rows):
                for node, depth in enumerate(tree.depths):
                    way = tokens[row, tree.ways[node, : depth + 1].to(tokens.device)]
                    # Rows end in different places, and some processors know rows by their number.
                    seen = torch.cat([ids, way]).expand(len(rows), -1)
                    scores[row, node] = self.processors(seen, scores[row, node].expand(len(rows), -1))[row]
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1).flatten(0, 1), 1).view(tokens.shape)


class _Text:
    """The sequences so far: rows end in different places.

    Attributes:
        ids: [B, L], padding behind a row's end; count: [B] its length; done: [B].
    """

    def __init__(self, ids: Tensor, max_length: int, criteria, pad: int, streamer):
        self.ids = torch.nn.functional.pad(ids, (0, max(1, max_length - ids.shape[1])), value=pad)
        self.criteria, self.streamer = criteria, streamer
        self.count = torch.full((len(ids),), ids.shape[1], device=ids.device)
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def add(self, tokens: Tensor, present: Tensor) -> None:
        """One token [B] for each row that is not done, where `present` [B]."""
        present = present & ~self.done
        at = self.count.clamp(max=self.ids.shape[1] - 1)[:, None]
        self.ids.scatter_(1, at, torch.where(present[:, None], tokens[:, None], self.ids.gather(1, at)))
        self.count = self.count + present
        if self.streamer is not None and present.any():
            self.streamer.put(tokens[present].cpu())
        self.done = self.done | (present & self._ends(tokens, present))

    def _ends(self, tokens: Tensor, present: Tensor) -> Tensor:
        ends = torch.zeros_like(self.done)
        for criterion in self.criteria:
            if isinstance(criterion, MaxLengthCriteria):
                ends = ends | (self.count >= criterion.max_length)
            elif isinstance(criterion, EosTokenCriteria):
                ends = ends | torch.isin(tokens, criterion.eos_token_id.to(tokens.device))
            else:
                for row in present.nonzero().squeeze(1).tolist():
                    ends[row] = ends[row] | criterion(self.row(row).expand(len(ends), -1), None)[row]
        return ends

    def row(self, number: int) -> Tensor:
        return self.ids[number, : self.count[number]]

    def sequences(self) -> Tensor:
        return self.ids[:, : int(self.count.max())]


def _forward(model, cache: LinearCache, ids: Tensor, positions: Tensor, **keywords) -> tuple[Tensor, Tensor]:
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


def _unsupported(generation_config) -> str | None:
    for name, plain in (("num_beams", 1), ("output_scores", False), ("output_logits", False),
                        ("output_attentions", False), ("output_hidden_states", False)):  # fmt: skip
        value = getattr(generation_config, name, None)
        if value not in (None, plain):
            return f"{name}={value}: speculative decoding does not do this; leave it out or decode without speculation"
    return None


def speculate(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    token_streamer=None,
    **model_kwargs,
):
    """The decoding loop; arguments are those that `generate` prepares for its own loops.

    Args:
        token_streamer: gets one sequence, the prompt and then tokens as they are accepted (transformers hands its
            `streamer` to no loop but its own).

    Raises:
        ValueError: for a model without heads, one whose other layers cannot verify trees, or settings of `generate`
            that this loop does not know.
    """
    reason = _unsupported(generation_config)
    if reason:
        raise ValueError(reason)
    if "draft" not in model.__dict__:
        load_heads(model)
    heads, tree = model.__dict__["draft"]
    cache = model_kwargs["past_key_values"]
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, LinearCacheLayer)}
    if others:
        raise ValueError(f"layers with {', '.join(sorted(others))} cannot verify a tree; decode without speculation")
    device = input_ids.device
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    text = _Text(input_ids, generation_config.max_length, stopping_criteria, pad, token_streamer)
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    choose = _Choice(logits_processor, generation_config.do_sample)
    depths, ancestors, ways = (torch.as_tensor(x, device=device) for x in (tree.depths, tree.ancestors, tree.ways))
    parents, ranks = (torch.as_tensor(x, device=device) for x in (tree.parents, tree.ranks))
    output = model.get_output_embeddings()

    past, mask = cache.get_seq_length(), model_kwargs.get("attention_mask")
    positions = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        mask = None if mask.bool().all() else mask
    logits, hidden = _forward(
        model, cache, input_ids[:, past:], positions[:, past:], attention_mask=mask, logits_to_keep=1
    )
    alone = DraftTree((-1,), (0,))
    # Of node 0 nothing comes before the prompt's last token.
    rows = [row[:-1] for row in input_ids]
    root = choose(logits[:, -1:], rows, input_ids[:, -1:], alone)[:, 0]
    hidden = hidden[:, -1]
    text.add(root, torch.ones_like(text.done))
    while not text.done.all():
        guesses = torch.stack(
            [x[:, 0].topk(max(tree.ranks) + 1).indices for x in heads(hidden[:, None], output)], dim=1
        )  # (B, heads, ranks)
        tokens = guesses[:, (depths - 1).clamp(min=0), ranks]
        tokens[:, 0] = root
        with cache.verifying(ancestors):
            logits, states = _forward(model, cache, tokens, cache.length[:, None] + depths)
        rows = [text.row(row)[:-1] for row in range(len(tokens))] if choose.reads_text else []
        chosen = choose(logits, rows, tokens, tree)

        # A node is right where it and all before it are what was chosen after their parents.
        right = tokens == chosen[:, parents.clamp(min=0)]
        right[:, 0] = True
        right = (right[:, None] | ~ancestors).all(-1)
        leaf = (right * (depths + 1)).argmax(1)
        way = ways[leaf]  # (B, depth + 1)
        before = text.count
        for step in range(1, way.shape[1]):
            text.add(tokens.gather(1, way[:, step : step + 1].clamp(min=0))[:, 0], way[:, step] >= 0)
        root = chosen.gather(1, leaf[:, None])[:, 0]
        hidden = states[torch.arange(len(leaf), device=device), leaf]
        text.add(root, torch.ones_like(text.done))
        # As after plain decoding, all but a row's last token are in the cache.
        kept = torch.arange(way.shape[1], device=device) < (text.count - before)[:, None]
        cache.accept(torch.where(kept, way, -1))
    if token_streamer is not None:
        token_streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=text.sequences(), past_key_values=cache)
    return text.sequences()
