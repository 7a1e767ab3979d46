"""Stage evaluate: held-out perplexity of the teacher, the baseline, each stage, and the model without each branch."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.table import Table
from torch import nn

from linearize.convert.context import Artifact, Context, write_atomically
from linearize.convert.data import PackedDataset, packed
from linearize.convert.models import softmax_model, stages_of
from linearize.convert.progress import TokenProgress
from linearize.layers.attention import BRANCHES
from linearize.layers.config import PRESETS
from linearize.layers.seam import install

RESULTS = "results.json"
NAMES = {"install": "installed", "transfer": "after transfer", "finetune": "after finetune"}
ABLATIONS = {
    "full": BRANCHES,
    "local only": frozenset({"local"}),
    "linear only": frozenset({"linear"}),
    "conv off": BRANCHES - {"conv"},
}


def batches(data: PackedDataset, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The sequences that there are, each once, as batches of one."""
    for sequence in data.sequences:
        yield {name: value[None].to(device) for name, value in sequence.items()}


def perplexity(model: nn.Module, data: PackedDataset) -> float:
    """exp of the mean negative log-likelihood of the next token, over all tokens with a label."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches(data, device):
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        total += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return math.exp(total / count)


def ablate(model: nn.Module, data: PackedDataset) -> Iterator[tuple[str, float]]:
    """Perplexity of a linearized model with all branches and without some, by the names of `ABLATIONS`."""
    # By name: a loaded export brings its own copies of these classes.
    layers = model.linear_attentions().values()
    for name, branches in ABLATIONS.items():
        for layer in layers:
            layer.branches = branches
        yield name, perplexity(model, data)
    for layer in layers:
        layer.branches = BRANCHES


def results_table(results: dict) -> Table:
    """What `run` measured, for people."""
    tokens, length = results["tokens"], results["length"]
    table = Table(title=f"held-out perplexity, {tokens} tokens in sequences of {length}", title_justify="left")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("x teacher", justify="right")
    for group in ("models", "ablations"):
        for name, value in results[group].items():
            table.add_row(name, f"{value:.2f}", f"{value / results['models']['teacher (softmax)']:.2f}")
        table.add_section()
    return table


def run(context: Context) -> Artifact:
    section = context.recipe.evaluate
    data = packed(
        "data.heldout", context.recipe.data.heldout, context.tokenizer, section.length, section.tokens // section.length
    )
    tokens = len(data.sequences) * section.length
    results = {"tokens": tokens, "length": section.length, "models": {}, "ablations": {}}
    model = softmax_model(context).to(context.device)
    # The published baseline, and the same at this recipe's own window.
    own = context.recipe.attention.config
    baselines = [PRESETS["swa"]]
    if own.window is not None:
        same_window = replace(PRESETS["swa"], window=own.window, window_size=own.window_size, sinks=own.sinks)
        baselines += [same_window] if same_window not in baselines else []
    trained = sum(stage in context.stages() for stage in ("transfer", "finetune"))
    variants = 2 + len(baselines) + trained + len(ABLATIONS)
    with TokenProgress(context.console, variants, tokens) as bar:

        def measured(group: str, name: str, value: float) -> None:
            results[group][name] = value
            bar.show(len(results["models"]) + len(results["ablations"]), f"{name} {value:.2f}")

        measured("models", "teacher (softmax)", perplexity(model, data))
        for config in baselines:
            name = f"{config.window} window {config.window_size} + {config.sinks} sinks, untrained"
            measured("models", name, perplexity(install(model, config), data))
        for stage, converted in stages_of(context, model):
            measured("models", NAMES[stage], perplexity(converted, data))
        for name, value in ablate(converted, data):
            measured("ablations", name, value)
    directory = context.stage_directory("evaluate")
    write_atomically(directory / RESULTS, json.dumps(results, indent=2) + "\n")
    return Artifact(directory, results)
