"""Stage transfer: each layer learns its softmax layer's output, by an attention function that does all of it.

The function computes the softmax output from the very q, k, v that it is given, runs the linear layer under
`enable_grad`, calls backward at once, and hands the softmax output on. So there is one model in memory, gradients
of one layer at a time, and every layer sees the teacher's inputs.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

from linearize.convert.context import Artifact, Context
from linearize.convert.models import LINEAR, model_after, train_only
from linearize.convert.training import train
from linearize.layers.seam import IMPLEMENTATIONS, Inputs, attend, segments_mask, take_inputs

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
        index = torch.arange(length, device=value.device)
        distance = index[:, None] - index
        mask = (distance >= 0) & (distance < (sliding_window or length))
        if segments is not None:
            # Padding sees padding: a row without any key would be NaN.
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        mask = mask.expand(value.shape[0], length, length)[:, None]
    function = AttentionInterface()[backend]
    return function(module, inputs.q, inputs.k, value, mask, scaling=scaling, **kwargs)[0]


def relative_error(output: Tensor, target: Tensor, segments: Tensor | None) -> Tensor:
    """|output - target|^2 / |target|^2 over tokens that are no padding; both [B, T, H, D_v]."""
    output, target = output.float(), target.float()
    if segments is not None:
        valid = (segments > 0)[..., None, None]
        output, target = output * valid, target * valid
    return (output - target).square().sum() / target.square().sum()


def transfer_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function: returns the softmax output and leaves gradients in the layer's parameters."""
    inputs = take_inputs(module, query, key, attention_mask, kwargs)
    layer = module.linear_attention
    target = softmax_attention(module, inputs, value, scaling, kwargs)
    with torch.enable_grad():
        error = relative_error(attend(module, inputs, value, scaling), target, inputs.segments)
        if error.requires_grad:
            (error / layer.accumulation).backward()
    layer.transfer_error = error.detach()
    return target, None


AttentionInterface.register(IMPLEMENTATION, transfer_attention)
AttentionMaskInterface.register(IMPLEMENTATION, segments_mask)
IMPLEMENTATIONS.add(IMPLEMENTATION)


class OutputMSE:
    """Mean over layers of the relative squared error of the attention output (LoLCATs' objective, made
    independent of each layer's scale)."""

    is_local = True

    def loss(self, model, batch, accumulation):
        layers = model.linear_attentions().values()
        for layer in layers:
            layer.accumulation = accumulation
        with torch.no_grad():
            model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        return torch.stack([layer.transfer_error.to(batch["input_ids"].device) for layer in layers]).mean()


OBJECTIVES = {"output_mse": OutputMSE}


def run(context: Context) -> Artifact:
    model = model_after(context, "install")
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(IMPLEMENTATION)
    section = context.recipe.transfer
    losses = train(context, "transfer", model, OBJECTIVES[section.objective](), section)
    errors = {str(index): layer.transfer_error.item() for index, layer in model.linear_attentions().items()}
    return Artifact(context.stage_directory("transfer"), {"loss": losses, "last_error_of_layer": errors})
