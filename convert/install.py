"""Stage install: give every attention module its linear attention layer, untrained."""

import json

import torch
from transformers import PreTrainedModel

from linearize.convert.batches import TrainingBatches
from linearize.convert.calibrate import Calibration, calibrate
from linearize.convert.context import Artifact, Context, write_atomically
from linearize.convert.data import problems_named
from linearize.convert.keep import head_budget
from linearize.convert.models import KEPT, LINEAR, kept_heads, save_weights, softmax_model
from linearize.layers.attending import head_shapes
from linearize.layers.seam import install
from linearize.recipes.training import Training


def run(context: Context) -> Artifact:
    keep = context.recipe.keep
    directory = context.stage_directory("install")
    model = softmax_model(context)
    if keep is not None and keep.kv_budget is not None:
        measured = _calibrate(context, model.to(context.device))
        write_atomically(directory / KEPT, json.dumps(measured.to_dict(), indent=2) + "\n")
        context.console.print(measured.table())
    torch.manual_seed(context.recipe.seed)
    install(model, context.recipe.attention.config, kept_heads(context, model))
    weights = {name: value for name, value in model.named_parameters() if LINEAR in name}
    if weights:
        save_weights(weights, directory)
    parameters = sum(value.numel() for value in weights.values())
    metrics = {"layers": len(model.linear_attentions()), "parameters": parameters}
    return Artifact(directory, metrics | {"kept_heads": kept_heads(context, model)})


def _calibrate(context: Context, model: PreTrainedModel) -> Calibration:
    keep = context.recipe.keep
    # As training reads them, so from all sources.
    section = Training(steps=1, batch_size=keep.texts, length=keep.length, lr=1)
    with problems_named("data.train", context.recipe.data.train):
        batches = TrainingBatches([iter(documents) for documents in context.training_documents], section, seed=0)
    texts = batches[0]["input_ids"].to(context.device)
    count = head_budget(keep, {layer: kv_heads for layer, (_, kv_heads, _) in head_shapes(model).items()})
    return calibrate(model, context.recipe.attention.config, texts, count, context.console)
