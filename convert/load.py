"""Stage load: find the model, keep its tokenizer, and unpack it where its form is slow to read (GGUF), or where it
is given a classifier; or make one."""

import torch

from linearize.convert import sources
from linearize.convert.context import Artifact, Context
from linearize.convert.examples import class_names
from linearize.recipes.model import LEARNED


def run(context: Context) -> Artifact:
    recipe = context.recipe.model
    directory = context.stage_directory("load")
    tokenizer = sources.tokenizer_of(recipe)
    tokenizer.save_pretrained(directory / "tokenizer")
    labels, source = class_names(context.recipe), None
    if recipe.config is not None:
        config = sources.new_config(recipe, tokenizer)
    else:
        source = sources.locate(recipe.source, recipe.revision)
        config = sources.load_config(source)
    told = {} if labels is None else {"labels": labels}
    if labels is not None and source is not None:
        told["new_classifier"] = sources.trained_classes(config) is None
    # A branch on the Hub moves; what is converted is the commit that it pointed to.
    revision = getattr(config, "_commit_hash", None) or recipe.revision
    learns = recipe.head in LEARNED
    if learns:
        sources.fit_to_examples(config, tokenizer, labels)
    # Of weights that are not there yet.
    torch.manual_seed(context.recipe.seed)
    model = None
    if source is None:
        model = sources.new_model(config, recipe.head)
    elif learns:
        model = sources.load_model(source, recipe.dtype, recipe.head, config=config)
    elif source.gguf:
        model = sources.load_model(source, recipe.dtype, recipe.head)
    if model is not None:
        if learns and config.is_encoder_decoder and model.can_generate():
            # What `generate` reads, which does not come with the configuration.
            model.generation_config.decoder_start_token_id = config.decoder_start_token_id
        model.save_pretrained(directory / "model")
    card = {} if source is None else sources.base_card(source)
    return Artifact(directory, {"source": recipe.source, "revision": revision, "card": card, **told})
