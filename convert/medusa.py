"""Stage medusa: heads that predict further tokens, trained on the frozen converted model."""

import torch
from torch import nn

from linearize.convert.context import Artifact, Context
from linearize.convert.data import PackedDataset, packed
from linearize.convert.models import load_weights, merged_model, train_only
from linearize.convert.training import train
from linearize.layers.medusa import MedusaHeads
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.schema import MedusaSection


class MedusaModel(nn.Module):
    """The converted model, frozen, and its heads."""

    def __init__(self, base: nn.Module, section: MedusaSection):
        super().__init__()
        self.base = base
        self.heads = MedusaHeads(base.get_output_embeddings(), section.heads, section.projection)
        train_only(self, lambda name: name.startswith("heads."))

    def train(self, mode: bool = True):
        """Training mode is for the heads: what they learn from is the model as it is used."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per head (logits [N, V], labels [N]) of a batch of packed sequences."""
        with torch.no_grad():
            hidden = self.base.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
        pairs = []
        for i, logits in enumerate(self.heads(hidden, self.base.get_output_embeddings())):
            ahead = i + 2
            # A label counts if no document begins on the way to it: positions then go on without a restart.
            labels, position = batch["labels"][:, ahead:], batch["position_ids"]
            same = position[:, ahead:] - position[:, :-ahead] == ahead
            pairs.append((logits[:, :-ahead].flatten(0, 1), torch.where(same, labels, -100).flatten()))
        return pairs


class WeightedHeads:
    """Sum over heads of decay^i * cross-entropy."""

    is_local = False

    def __init__(self, decay: float):
        self.decay = decay

    def loss(self, model, batch, accumulation, step):
        losses = [nn.functional.cross_entropy(logits.float(), labels) for logits, labels in model(batch)]
        return sum(self.decay**i * loss for i, loss in enumerate(losses))


def head_accuracy(model: MedusaModel, data: PackedDataset, device: torch.device) -> list[dict[str, float]]:
    """Per head the share of held-out tokens that are its first, or among its first five, guesses."""
    count = len(model.heads.blocks)
    hits, total = torch.zeros(count, 2), torch.zeros(count, 1)
    for sequence in data.sequences:
        batch = {name: value[None].to(device) for name, value in sequence.items()}
        with torch.no_grad():
            for i, (logits, labels) in enumerate(model(batch)):
                counted = labels != -100
                right = logits[counted].topk(5).indices == labels[counted, None]
                hits[i] += torch.stack([right[:, 0].sum(), right.any(-1).sum()]).cpu()
                total[i] += counted.sum().cpu()
    return [{"top1": top1, "top5": top5} for top1, top5 in (hits / total).tolist()]


def run(context: Context) -> Artifact:
    section = context.recipe.medusa
    torch.manual_seed(context.recipe.seed)
    model = MedusaModel(merged_model(context), section)
    losses = train(context, "medusa", model, WeightedHeads(section.decay), section)
    tokens = (context.recipe.evaluate or EvaluateSection()).tokens
    data = packed(
        "data.heldout", context.recipe.data.heldout, context.tokenizer, section.length, -(-tokens // section.length)
    )
    accuracy = head_accuracy(model.eval(), data, context.device)
    return Artifact(context.stage_directory("medusa"), {"loss": losses, "head_accuracy": accuracy})


def trained_heads(context: Context, base: nn.Module) -> MedusaHeads:
    """The heads that the stage trained."""
    model = MedusaModel(base, context.recipe.medusa)
    load_weights(model, context.stage_directory("medusa"))
    return model.heads
