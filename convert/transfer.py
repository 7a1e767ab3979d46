"""Stage transfer: each layer learns its softmax layer's output, by an attention function that does all of it.

The function computes the softmax output from the very q, k, v that it is given, runs the linear layer under
`enable_grad`, calls backward at once, and hands the softmax output on. So there is one model in memory, gradients
of one layer at a time, and every layer sees the teacher's inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

from linearize.convert.batches import draws
from linearize.convert.context import Artifact, Context
from linearize.convert.models import LINEAR, model_after, train_only
from linearize.convert.objectives import OBJECTIVES, Example, softmax_mask
from linearize.convert.training import train
from linearize.layers.attention import BRANCHES
from linearize.layers.seam import IMPLEMENTATIONS, Inputs, segments_mask, take_inputs
from linearize.recipes.training import TransferSection

IMPLEMENTATION = "linearize_transfer"


def teacher_backend(device: torch.device) -> str:
    """Which of transformers' attention functions computes softmax attention."""
    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def softmax_attention(module: nn.Module, inputs: Inputs, value: Tensor, scaling: float | None, kwargs: dict) -> Tensor:
    """The output [B, T, H, D_v] that the module had before it was linearized."""
    backend = teacher_backend(value.device)
    segments, length = inputs.segments, value.shape[2]
    if segments is not None or value.dtype == torch.float32:
        # flash-attn takes neither documents by segment nor single precision.
        backend = "sdpa"
    sliding_window = kwargs.get("sliding_window")
    mask = None
    if backend == "sdpa" and (segments is not None or sliding_window is not None):
        mask = softmax_mask(segments, length, sliding_window, value.device)
        mask = mask.expand(value.shape[0], length, length)[:, None]
    function = AttentionInterface()[backend]
    return function(module, inputs.q, inputs.k, value, mask, scaling=scaling, **kwargs)[0]


@dataclass
class Task:
    """What a layer does in one forward pass.

    Attributes:
        objectives: name -> weight.
        branches: that make its output.
        accumulation: forward passes per step.
        loss: afterwards, the weighted sum of the objectives.
    """

    objectives: dict[str, float]
    branches: frozenset[str] = BRANCHES
    accumulation: int = 1
    loss: Tensor | None = None


def transfer_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function: returns the softmax output and leaves gradients in the parameters of a layer that has a
    `task`."""
    inputs = take_inputs(module, query, key, attention_mask, kwargs)
    target = softmax_attention(module, inputs, value, scaling, kwargs)
    task = module.linear_attention.task
    if task is not None:
        with torch.enable_grad():
            example = Example(module, inputs, value, scaling, target, kwargs.get("sliding_window"), task.branches)
            loss = sum(weight * OBJECTIVES[name](example) for name, weight in task.objectives.items())
            if loss.requires_grad:
                (loss / task.accumulation).backward()
        task.loss = loss.detach()
    return target, None


AttentionInterface.register(IMPLEMENTATION, transfer_attention)
AttentionMaskInterface.register(IMPLEMENTATION, segments_mask)
IMPLEMENTATIONS.add(IMPLEMENTATION)


class AttentionTransfer:
    """Mean over the layers that are still learning of their weighted objectives."""

    calls_backward = is_local = True

    def __init__(self, section: TransferSection, seed: int):
        self.section, self.seed = section, seed

    def loss(self, model, batch, accumulation, step):
        layers = model.linear_attentions()
        for index, layer in layers.items():
            _, steps = self.section.layer(index)
            layer.task = None
            if step < steps:
                layer.task = Task(self.section.objectives.active, self._branches(step), accumulation)
        with torch.no_grad():
            model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        losses = [layer.task.loss for layer in layers.values() if layer.task is not None]
        return torch.stack([loss.to(batch["input_ids"].device) for loss in losses]).mean()

    def _branches(self, step: int) -> frozenset[str]:
        dropout = self.section.window_dropout * (1 - step / self.section.steps)
        dropped = draws(self.seed, "window_dropout", step).random() < dropout
        return BRANCHES - {"local"} if dropped else BRANCHES


def run(context: Context) -> Artifact:
    model = model_after(context, "install")
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(IMPLEMENTATION)
    section = context.recipe.transfer
    layers = model.linear_attentions()
    learning_rates = {
        parameter: section.layer(index)[0] for index, layer in layers.items() for parameter in layer.parameters()
    }
    objective = AttentionTransfer(section, context.recipe.seed)
    losses = train(context, "transfer", model, objective, section, learning_rates)
    last = {
        str(index): layer.task.loss.item()
        for index, layer in layers.items()
        # None in layers that stopped before, and where only the end of an interrupted stage was left to do.
        if getattr(layer, "task", None) is not None
    }
    return Artifact(context.stage_directory("transfer"), {"loss": losses, "last_loss_of_layer": last})
