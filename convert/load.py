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
    labels = class_names(context.recipe)
    told = {} if labels is None else {"labels": labels}
    if recipe.config is not None:
        config = sources.new_config(recipe, tokenizer)
        if recipe.head in LEARNED:
            sources.fit_to_examples(config, tokenizer, labels)
        sources.new_model(config, context.recipe.seed, recipe.head).save_pretrained(directory / "model")
        return Artifact(directory, {"source": None, "revision": None, "card": {}, **told})
    source = sources.locate(recipe.source, recipe.revision)
    if recipe.head in LEARNED:
        config = sources.load_config(source)
        told |= {"new_classifier": sources.trained_classes(config) is None} if labels else {}
        sources.fit_to_examples(config, tokenizer, labels)
        # Of weights that are not there yet.
        torch.manual_seed(context.recipe.seed)
        model = sources.load_model(source, recipe.dtype, recipe.head, config=config)
        if config.is_encoder_decoder and model.can_generate():
            # What `generate` reads, which does not come with the configuration.
            model.generation_config.decoder_start_token_id = config.decoder_start_token_id
        model.save_pretrained(directory / "model")
    elif source.gguf:
        sources.load_model(source, recipe.dtype, recipe.head).save_pretrained(directory / "model")
    # A branch on the Hub moves; what is converted is the commit that it pointed to.
    commit = getattr(sources.load_config(source), "_commit_hash", None)
    metrics = {"source": recipe.source, "revision": commit or recipe.revision, "card": sources.base_card(source)}
    return Artifact(directory, metrics | told)
