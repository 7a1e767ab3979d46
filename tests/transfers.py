"""One step of attention transfer of a tiny model; tests, and processes that they start, import this file."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.convert.blocks import Blocks
from linearize.convert.models import LINEAR, train_only
from linearize.convert.transfer import IMPLEMENTATION, AttentionTransfer, errors_of_heads
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.seam import install
from linearize.recipes.training import TransferSection

ROWS, LENGTH = 6, 40
SECTION = TransferSection(steps=1, batch_size=ROWS, micro_batch_size=2, length=LENGTH)
# Two documents in a row.
BATCH = {
    "input_ids": torch.randint(3, 90, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)),
    "position_ids": torch.cat([torch.arange(17), torch.arange(LENGTH - 17)]).expand(ROWS, -1),
}


def student(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with linear attention, of which everything takes part, to be trained."""
    install(model, LinearAttentionConfig(window_size=5, sinks=2, sink_distance=20, conv_taps=3))
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(IMPLEMENTATION)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if LINEAR in name:
            parameter.data = torch.rand(parameter.shape, generator=generator).to(parameter.device)
    return model


def step(model: PreTrainedModel, blocks: Blocks | None = None) -> dict[str, Tensor]:
    """The loss of a step of three micro batches, and the gradients that it leaves, by name."""
    objective = AttentionTransfer(SECTION, 0, blocks)
    if blocks is None:
        passes = [{name: x[start : start + 2] for name, x in BATCH.items()} for start in range(0, ROWS, 2)]
        loss = sum(objective.loss(model, batch, 3, 0) for batch in passes) / 3
    else:
        loss = objective.loss(model, BATCH, 1, 0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == gradients.keys()
    # Without this, what is missing on both sides would go unseen.
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return {"loss": loss} | gradients


def errors(model: PreTrainedModel, blocks: Blocks | None = None) -> dict[str, Tensor]:
    """Layer -> the error of each of its heads, by name."""
    found = errors_of_heads(model, BATCH, blocks)
    return {f"errors of layer {layer}": torch.tensor(row) for layer, row in found.items()}
