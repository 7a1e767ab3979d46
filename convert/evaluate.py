"""Stage evaluate: the teacher, the baselines, each stage's model, and the final one without each branch, measured.

`results.json` (and the stage's metrics) hold, where sizes are numbers as text:

    tokens      window length -> held-out tokens measured at it
    models      model -> measure -> size -> figures
    ablations   the same, of the final model without some of its branches

    text        size: window length -> `measures.text`       copying     size: length of a text -> `measures.copying`
    passkey     size: length -> `measures.passkey`           recall      size: number of pairs -> `measures.recall`
    speed       size: length of the context -> `speed.speed`, of the teacher and the final model
    far_mass    size: length of the text -> `far_mass.far_mass`, of the same where linear heads divide their mass
    embedding   size: length of a text -> `encoders.embedding`, of encoders, of which nothing else is measured
    classes, answers, rouge
                size: where texts are cut -> the same of `example_measures`, of models that learn from examples, of
                which nothing else is measured

The file is written after every measurement, and an interrupted stage goes on behind the last one. Models between the
first and the last are measured by the first measure alone, ablations by those of `ABLATED`. A classifier that is new
is measured when it has been trained.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.convert import processes
from linearize.convert.context import Artifact, Context, write_atomically
from linearize.convert.data import token_stream
from linearize.convert.encoders import edges, embed, encoder_measures
from linearize.convert.example_measures import example_measures
from linearize.convert.finetune import tune
from linearize.convert.measures import Measure, make_measures, position_limit
from linearize.convert.models import WEIGHTS, load_weights, softmax_model, stages_of, with_adapters
from linearize.convert.progress import TokenProgress
from linearize.hub.measured import FIRST, TEACHER, TUNED_TEACHER
from linearize.layers.attention import BRANCHES
from linearize.layers.config import PRESETS, LinearAttentionConfig, window_alone
from linearize.layers.seam import install
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.model import Head

RESULTS = "results.json"
TUNED_STAGE = "evaluate/tuned_teacher"
NAMES = {"install": "installed", "transfer": "after transfer", "finetune": "after finetune"}
ABLATIONS = {
    "local only": frozenset({"local"}),
    "linear only": frozenset({"linear"}),
    "conv off": BRANCHES - {"conv"},
}
# What shows cheaply what a branch is good for.
ABLATED = (*FIRST, "copying")
# (group, model) as in the results -> what is measured on it.
Schedule = dict[tuple[str, str], list[Measure]]


def ablations(model: nn.Module) -> Iterator[tuple[tuple[str, str], nn.Module]]:
    """A linearized model without some of its branches, by the names of `ABLATIONS`."""
    # By name: a loaded export brings its own copies of these classes.
    layers = model.linear_attentions().values()
    for name, branches in ABLATIONS.items():
        for layer in layers:
            layer.branches = branches
        yield ("ablations", name), model
    for layer in layers:
        layer.branches = BRANCHES


def final_schedule(name: str, measures: list[Measure]) -> Schedule:
    """Everything for the final model, and `ABLATED` for its ablations."""
    ablated = [measure for measure in measures if measure.name in ABLATED]
    return {("models", name): measures} | {("ablations", ablation): ablated for ablation in ABLATIONS}


def measure_all(
    models: Iterable[tuple[tuple[str, str], nn.Module]], schedule: Schedule, console: Console, path: Path | None = None
) -> dict:
    """Results as at the top of this file, of models in turn; what `path` holds already is not measured again.

    Args:
        models: (group, name) and a model in evaluation mode, made when it is asked for; those that are not in
            `schedule` are passed over.
    """
    results = {"tokens": {}, "models": {}, "ablations": {}}
    for (group, name), measures in schedule.items():
        results[group][name] = {}
        whole = [measure for measure in measures if measure.name in FIRST]
        results["tokens"] |= {measure.size: measure.tokens for measure in whole}
    if path is not None and path.is_file():
        results = json.loads(path.read_text("utf-8"))
    total = sum(measure.tokens for measures in schedule.values() for measure in measures)
    completed = 0
    with TokenProgress(console, total, 1) as bar:
        for (group, name), model in models:
            if (group, name) not in schedule:
                continue
            figures = results[group][name]
            for measure in schedule[group, name]:
                if measure.size not in figures.get(measure.name, {}):
                    bar.show(completed, f"{name}: {measure.name} {measure.size}")
                    figures.setdefault(measure.name, {})[measure.size] = measure.run(model)
                    if path is not None:
                        write_atomically(path, json.dumps(results, indent=2) + "\n")
                completed += measure.tokens
            # The next one may be a second copy, or need the memory to be trained.
            del model
        bar.show(total, "measured")
    return results


def train_tuned_teacher(context: Context) -> None:
    """Finetune the softmax model by the recipe's section `finetune`, where that has not been done."""
    directory = context.stage_directory(TUNED_STAGE)
    if not (directory / WEIGHTS).is_file():
        torch.manual_seed(context.recipe.seed)
        tune(context, TUNED_STAGE, softmax_model(context))
    processes.alone(shutil.rmtree, directory / "checkpoints", True)


def tuned_teacher(context: Context) -> nn.Module:
    """What `train_tuned_teacher` made."""
    model, section = softmax_model(context), context.recipe.finetune
    if section.method == "lora":
        model = with_adapters(model, section)
    load_weights(model, context.stage_directory(TUNED_STAGE))
    return model.to(context.device).eval()


def baselines(own: LinearAttentionConfig, head: Head) -> dict[str, LinearAttentionConfig]:
    """Name -> window + sinks alone: the published baseline, which is for causal models, and last the one at this
    recipe's own window."""
    configs = (PRESETS["swa"], window_alone(own)) if head == "causal-lm" else (window_alone(own),)
    return {f"{c.window} window {c.window_size} + {c.sinks} sinks, untrained": c for c in configs}


def _schedule(context: Context, measures: list[Measure]) -> Schedule:
    recipe = context.recipe
    everything = [measure for measure in measures if measure.name not in ("far_mass", "speed")]
    names = [name for stage, name in NAMES.items() if stage in context.stages()]
    if _is_new_classifier(context):
        names = names[-1:]
    schedule = {}
    if _has_baselines(context):
        schedule["models", TEACHER] = measures
    if recipe.attention is None:
        return schedule | {("models", name): everything for name in names}
    if recipe.evaluate.tuned_teacher:
        schedule["models", TUNED_TEACHER] = everything
    if _has_baselines(context):
        *published, own = baselines(recipe.attention.config, recipe.model.head)
        schedule |= {("models", name): measures[:1] for name in published} | {("models", own): everything}
    *before, last = names
    schedule |= {("models", name): measures[:1] for name in before}
    return schedule | final_schedule(last, measures)


def _has_baselines(context: Context) -> bool:
    """Whether the model as it came is measured: random weights would be nobody's baseline."""
    untrained = context.recipe.model.config is not None
    alone = context.recipe.attention is None and context.recipe.finetune is None
    wanted = context.recipe.evaluate.baselines and not untrained and not _is_new_classifier(context)
    return alone or wanted


def _is_new_classifier(context: Context) -> bool:
    return context.state("load")["metrics"].get("new_classifier", False)


def _models(context: Context) -> Iterator[tuple[tuple[str, str], nn.Module]]:
    if context.recipe.evaluate.tuned_teacher:
        yield ("models", TUNED_TEACHER), tuned_teacher(context)
    model = softmax_model(context).to(context.device)
    if _has_baselines(context):
        yield ("models", TEACHER), model
        if context.recipe.attention is not None:
            for name, config in baselines(context.recipe.attention.config, context.recipe.model.head).items():
                yield ("models", name), install(model, config)
    for stage, converted in stages_of(context, model):
        if stage == "load":
            continue
        # PEFT calls the model's forward past the hook that makes its cache.
        model = converted.get_base_model() if isinstance(converted, PeftModel) else converted
        yield ("models", NAMES[stage]), model
    if context.recipe.attention is not None:
        yield from ablations(model)


def run(context: Context) -> Artifact:
    recipe = context.recipe

    def stream() -> Tensor:
        return token_stream("data.heldout", recipe.data.heldout, context.tokenizer, recipe.evaluate.tokens)

    # The plan has refused what the model's positions do not allow.
    if recipe.data.has_examples:
        measures = example_measures(context)
    elif recipe.model.head == "encoder":
        # Of each length once: the texts that models share are the same tensor.
        teacher = cache(lambda rows: embed(softmax_model(context).to(context.device), rows))
        measures = encoder_measures(recipe.evaluate, stream(), edges(context.tokenizer), None, teacher)
    else:
        config = recipe.attention and recipe.attention.config
        measures = make_measures(recipe.evaluate, stream(), context.tokenizer, config)
    if recipe.evaluate.tuned_teacher:
        train_tuned_teacher(context)
    directory = context.stage_directory("evaluate")
    schedule, path = _schedule(context, measures), directory / RESULTS
    results = processes.alone(measure_all, _models(context), schedule, context.console, path)
    return Artifact(directory, results)


def evaluate_model(
    model: PreTrainedModel, tokenizer, stream: Tensor, section: EvaluateSection, console: Console
) -> dict:
    """Results of one model by itself, as at the top of this file: a softmax model as the teacher, a linearized one as
    the final model with its ablations.

    Args:
        stream: [L] held-out tokens.

    Raises:
        ValueError: naming the field of the section that asks for what the model or the held-out text cannot give.
    """
    linear = getattr(model, "linear_attentions", dict)()
    config = next(iter(linear.values())).config if linear else None
    measures = make_measures(section, stream, tokenizer, config, position_limit(model))
    if linear:
        name = "linearized"
        models = chain([(("models", name), model)], ablations(model))
        return measure_all(models, final_schedule(name, measures), console)
    key = ("models", TEACHER)
    return measure_all([(key, model)], {key: measures}, console)
