"""Stage load: find the model, keep its tokenizer, and unpack it where its form is slow to read (GGUF); or make one."""

from linearize.convert import sources
from linearize.convert.context import Artifact, Context


def run(context: Context) -> Artifact:
    recipe = context.recipe.model
    directory = context.stage_directory("load")
    tokenizer = sources.tokenizer_of(recipe)
    tokenizer.save_pretrained(directory / "tokenizer")
    if recipe.config is not None:
        config = sources.new_config(recipe, tokenizer)
        sources.new_model(config, context.recipe.seed, recipe.head).save_pretrained(directory / "model")
        return Artifact(directory, {"source": None, "revision": None, "card": {}})
    source = sources.locate(recipe.source, recipe.revision)
    if source.gguf:
        sources.load_model(source, recipe.dtype, recipe.head).save_pretrained(directory / "model")
    # A branch on the Hub moves; what is converted is the commit that it pointed to.
    commit = getattr(sources.load_config(source), "_commit_hash", None)
    metrics = {"source": recipe.source, "revision": commit or recipe.revision, "card": sources.base_card(source)}
    return Artifact(directory, metrics)
