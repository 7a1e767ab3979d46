"""Stage install: give every attention module its linear attention layer, untrained."""

import torch

from linearize.convert.context import Artifact, Context
from linearize.convert.models import LINEAR, model_after, save_weights


def run(context: Context) -> Artifact:
    torch.manual_seed(context.recipe.seed)
    model = model_after(context, "install")
    weights = {name: value for name, value in model.named_parameters() if LINEAR in name}
    directory = context.stage_directory("install")
    if weights:
        save_weights(weights, directory)
    parameters = sum(value.numel() for value in weights.values())
    return Artifact(directory, {"layers": len(model.linear_attentions()), "parameters": parameters})
