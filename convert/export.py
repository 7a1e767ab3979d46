"""Stage export: the converted model as a directory that transformers loads by itself."""

import shutil

import torch

from linearize.convert.context import Artifact, Context, StageError
from linearize.convert.medusa import trained_draft
from linearize.convert.models import LINEAR, merged_model
from linearize.hub.card import CARD_FIGURES, model_card
from linearize.hub.export import export_model
from linearize.hub.figures import drawings, png
from linearize.recipes.loader import dump_recipe, without_places


def run(context: Context) -> Artifact:
    recipe = context.recipe
    model = merged_model(context)
    draft = None if recipe.medusa is None else trained_draft(context, model)
    if recipe.export.dtype is not None:
        for name, parameter in model.named_parameters():
            if LINEAR not in name:
                parameter.data = parameter.data.to(getattr(torch, recipe.export.dtype))
    tokenizer = context.tokenizer
    if recipe.finetune is not None and recipe.model.head != "masked-lm":
        # Where texts are cut.
        tokenizer.model_max_length = max(tokenizer.model_max_length, recipe.finetune.longest)
    metrics = {stage: context.state(stage)["metrics"] for stage in context.stages() if stage not in ("export", "push")}
    figures, problems = drawings(metrics, CARD_FIGURES)
    for name, problem in problems.items():
        context.console.print(f"README.md: figure {name} is missing: {problem}", markup=False, highlight=False)
    directory = context.stage_directory("export") / "model"
    # Nobody takes half a model for one.
    part = directory.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        export_model(
            model,
            part,
            tokenizer=tokenizer,
            draft=draft,
            max_shard_size=recipe.export.max_shard_size,
            files={
                "README.md": model_card(recipe, metrics, figures),
                "recipe.yaml": dump_recipe(recipe, public=True),
                "metrics.json": without_places(metrics),
                **{f"{name}.png": png(figure) for name, figure in figures.items()},
            },
        )
    except ValueError as error:
        raise StageError(f"{directory}: the model could not be saved: {error}") from error
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)
    return Artifact(directory, {"bytes": sum(file.stat().st_size for file in directory.iterdir())})
