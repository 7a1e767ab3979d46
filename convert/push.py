"""Stage push: the exported model on the Hugging Face Hub."""

from dataclasses import asdict

from linearize.convert import sources
from linearize.convert.context import Artifact, Context, StageError
from linearize.hub.metadata import metadata
from linearize.hub.push import push
from linearize.hub.repository import PushError, identity, look


def check(context: Context) -> None:
    """Whether the model that the recipe is to make may be pushed, before it is made; asks the Hub.

    Raises:
        StageError: no.
    """
    recipe = context.recipe
    if recipe.model.config is not None:
        card, config = {}, sources.new_config(recipe.model, sources.tokenizer_of(recipe.model))
    else:
        source = sources.locate(recipe.model.source, recipe.model.revision)
        card, config = sources.base_card(source), sources.load_config(source)
    head = metadata(recipe, {"load": {"card": card}})
    model = identity(config.to_dict(), head.to_dict())
    try:
        look(recipe.push, model, f"---\n{head.to_yaml()}\n---\n")
    except PushError as error:
        raise StageError(f"push: {error}") from error


def run(context: Context) -> Artifact:
    model = context.stage_directory("export") / "model"
    try:
        sources.check_weights(model)
    except ValueError as error:
        raise StageError(f"{error}; --from export makes it again") from error
    try:
        pushed = push(model, context.recipe.push, progress=True)
    except PushError as error:
        raise StageError(f"push: {error}") from error
    context.console.print(f"  {pushed.url}", highlight=False, soft_wrap=True)
    return Artifact(context.stage_directory("push"), asdict(pushed))
