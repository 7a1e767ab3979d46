"""Stage install: give every attention module its linear attention layer, untrained."""

import json

import torch
from transformers import PreTrainedModel

from linearize.convert.calibrate import Calibration, calibrate, needles
from linearize.convert.context import Artifact, Context, write_atomically
from linearize.convert.data import packed
from linearize.convert.keep import head_budget
from linearize.convert.models import KEPT, LINEAR, kept_heads, save_weights, softmax_model
from linearize.layers.seam import head_shapes, install


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
    data = packed("data.train", context.recipe.data.train, context.tokenizer, keep.length, keep.texts)
    texts = torch.stack([sequence["input_ids"] for sequence in data.sequences])
    asking = needles(context.tokenizer, texts)
    texts = texts.repeat(1, 2).to(context.device)
    count = head_budget(keep, {layer: kv_heads for layer, (_, kv_heads, _) in head_shapes(model).items()})
    return calibrate(model, context.recipe.attention.config, texts, asking, count, context.console)
