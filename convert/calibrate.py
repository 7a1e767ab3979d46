"""Which key heads are worth keeping softmax: measured without gradients on texts that are said again.

The first time shows what a head does for likelihood, the second what it does for recall: said again as it was, a text
is recalled by following it; in pieces and another order, by the few words that each piece begins with. With the
candidates softmax and all other heads windowed, each candidate is windowed alone: those stay without which the loss
grows most, first a shortlist and then, measured again without the others, the heads to keep. The order matters. Heads
work in chains, so what one adds to a model without the others says little.

Candidates are all heads. Where these are too many, they are those with the most attention on what is to be copied, as
retrieval heads are found (arXiv 2404.15574): the mass that a query of the second half puts on the token that followed
the same token in the first.
"""

from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.convert import measures
from linearize.convert.context import StageError
from linearize.convert.keep import heads_by_layer
from linearize.convert.progress import TokenProgress
from linearize.layers.attending import attention_modules, head_shapes
from linearize.layers.config import LinearAttentionConfig, window_alone
from linearize.layers.seam import install

Head = tuple[int, int]

# Every head is a candidate in models that have no more of them; each costs one pass over the texts.
AFFORDABLE = 256
# Heads on the shortlist for each head that is kept.
SHORTLIST = 3
# Tokens of the pieces in which a text is said again.
PIECE = 16


@dataclass(frozen=True)
class Loss:
    """Mean nats per token of texts, of the same texts said again, and said again in pieces (but for the first quarter
    of each piece, by which it is recognised)."""

    likelihood: float
    recall: float
    cued_recall: float

    @property
    def total(self) -> float:
        return self.likelihood + self.recall + self.cued_recall


def retrieval_scores(model: nn.Module, texts: Tensor) -> dict[Head, float]:
    """(layer, key head) -> mean attention on the token to be copied, of the best query head of its group.

    Args:
        model: in softmax mode or not; it is left in eager softmax mode.
        texts: [N, 2 L], each one said twice.

    Raises:
        StageError: an attention module does not hand out its weights.
    """
    length = texts.shape[1] // 2
    model.set_attn_implementation("eager")
    shapes = head_shapes(model)
    scores = {}

    def note(module, args, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise StageError(f"keep.kv_budget: {type(module).__name__} shows no attention weights; give keep.heads")
        # Token i - length + 1 followed what token i is a copy of.
        mass = weights[0].diagonal(1 - length, dim1=-2, dim2=-1)[:, 1:-1].float().mean(-1)
        scores.setdefault(module.layer_idx, []).append(mass)

    hooks = [module.register_forward_hook(note) for module in attention_modules(model).values()]
    try:
        for text in texts:
            with torch.no_grad():
                model.base_model(input_ids=text[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    best = {
        layer: torch.stack(found).mean(0).view(shapes[layer][1], -1).amax(1).tolist()
        for layer, found in scores.items()
    }
    return {(layer, head): score for layer, row in best.items() for head, score in enumerate(row)}


def said_in_pieces(texts: Tensor) -> tuple[Tensor, Tensor]:
    """Texts [N, L] followed by their pieces in an order that is the same for all: ids [N, L + K] and the indices of
    the tokens that are to be recalled."""
    length = texts.shape[1]
    size = min(PIECE, length // 2)
    order = torch.randperm(length // size, generator=torch.Generator().manual_seed(0))
    pieces = texts[:, : len(order) * size].unflatten(1, (-1, size))[:, order.to(texts.device)]
    asked = torch.arange(length, length + len(order) * size).view(-1, size)[:, size // 4 :]
    return torch.cat([texts, pieces.flatten(1)], dim=1), asked.flatten()


def recall_loss(model: nn.Module, texts: Tensor) -> Loss:
    """`Loss` of a model on `texts` [N, L]."""
    length = texts.shape[1]
    again, _ = measures.score(model, texts.repeat(1, 2))
    ids, asked = said_in_pieces(texts)
    in_pieces, _ = measures.score(model, ids)
    # Nothing announces the first token of the second time.
    found = again[:, : length - 1], again[:, length:], in_pieces[:, asked - 1]
    return Loss(*(nats.mean().item() for nats in found))


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        kept: the chosen heads, best first.
        retrieval: every head's score (`retrieval_scores`).
        cost: nats per token, `Loss.total`, that windowing the head alone costs, as last measured; of the candidates.
        before, after: losses with every head windowed, and with all but the chosen ones.
    """

    kept: list[Head]
    retrieval: dict[Head, float]
    cost: dict[Head, float]
    before: Loss
    after: Loss

    def to_dict(self) -> dict:
        """As JSON, `kept` by layer."""
        heads = [
            {"layer": layer, "head": head, "retrieval": score, "cost": self.cost.get((layer, head))}
            for (layer, head), score in self.retrieval.items()
        ]
        losses = {"before": asdict(self.before), "after": asdict(self.after)}
        return {"kept": heads_by_layer(self.kept), "heads": heads, "loss": losses}

    def table(self) -> Table:
        """The chosen heads, for people."""
        before, after = self.before, self.after
        title = f"kept heads: recall {before.recall:.3f} -> {after.recall:.3f} nats per token, by a few words "
        title += f"{before.cued_recall:.3f} -> {after.cued_recall:.3f}, likelihood {before.likelihood:.3f} -> "
        title += f"{after.likelihood:.3f}"
        table = Table(title=title, title_justify="left")
        for name in ("layer", "key head", "retrieval", "windowed costs"):
            table.add_column(name, justify="right")
        for layer, head in self.kept:
            score, cost = self.retrieval[layer, head], self.cost[layer, head]
            table.add_row(str(layer), str(head), f"{score:.3f}", f"{cost:.3f}")
        return table


def calibrate(
    model: PreTrainedModel, config: LinearAttentionConfig, texts: Tensor, count: int, console: Console
) -> Calibration:
    """The `count` heads worth keeping where the others see the window and sinks of `config`.

    Args:
        model: is left linearized.
        texts: [N, L].

    Raises:
        StageError: as `retrieval_scores`.
    """
    retrieval = retrieval_scores(model, texts.repeat(1, 2))
    config = window_alone(config)
    heads = sorted(retrieval, key=retrieval.get, reverse=True)
    if len(heads) > AFFORDABLE:
        heads = heads[: SHORTLIST * count]
    sizes = [size for size in (SHORTLIST * count, count) if size < len(heads)]

    def loss_with(heads: list[Head]) -> Loss:
        return recall_loss(install(model, config, heads_by_layer(heads)), texts)

    cost, measured = {}, 0
    with TokenProgress(console, len(heads) + sum(sizes[:-1]), 4 * texts.numel()) as bar:
        for size in sizes:
            all_kept = loss_with(heads)
            for head in heads:
                cost[head] = loss_with([other for other in heads if other != head]).total - all_kept.total
                measured += 1
                bar.show(measured, "heads windowed one by one")
            heads = sorted(heads, key=cost.get, reverse=True)[:size]
    return Calibration(heads, retrieval, cost, before=loss_with([]), after=loss_with(heads))
