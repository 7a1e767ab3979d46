"""The model card: where the model comes from, how to use it, what was measured, and what it cannot do."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from linearize import __version__
from linearize.hub.figures import describe
from linearize.hub.measured import chosen_tree, columns, converted, reference, rows
from linearize.hub.metadata import HUB, base_model, data_name, hub_dataset, imported_metadata, metadata
from linearize.hub.published import Published
from linearize.recipes.loader import dump_recipe
from linearize.recipes.schema import Recipe

# Which of `figures.FIGURES` are beside the card, as PNG files.
CARD_FIGURES = ("speed", "memory")
TRAINING = ("transfer", "finetune", "medusa")
PAPERS = {
    "lolcats": "LoLCATs ([arXiv 2410.10254](https://arxiv.org/abs/2410.10254))",
    "linearized-llm": "Linearized-LLM ([arXiv 2406.07368](https://arxiv.org/abs/2406.07368))",
}


def model_card(recipe: Recipe, metrics: dict, figures: dict[str, Figure] | None = None) -> str:
    """README.md of an exported model, metadata as the Hub reads them at its head.

    Args:
        metrics: stage -> its metrics.
        figures: those of `CARD_FIGURES` that are saved beside it.
    """
    evaluated, medusa = metrics.get("evaluate"), metrics.get("medusa")
    tree = chosen_tree(medusa) if medusa else None
    table = rows(evaluated) if evaluated else []
    text = _render(
        "card.md",
        base=base_model(recipe),
        columns=columns(table),
        converted=converted(evaluated) if evaluated else None,
        data=[(data, hub_dataset(data), data_name(data)) for data in recipe.data.train],
        head=recipe.model.head,
        limits=list(_limits(recipe, metrics)),
        medusa=medusa,
        linear=recipe.attention is not None,
        memory=_cost(recipe, metrics),
        name=recipe.name,
        new=recipe.model.config,
        plots={name: describe(figure) for name, figure in (figures or {}).items()},
        recipe=recipe,
        reference=reference(evaluated) if evaluated else None,
        table=table,
        tree=tree,
        training={stage: section for stage in TRAINING if (section := getattr(recipe, stage)) is not None},
        yaml=dump_recipe(recipe, public=True),
    )
    return f"---\n{metadata(recipe, metrics).to_yaml()}\n---\n\n{text}\n"


def imported_card(
    name: str, base: str, checkpoints: list[str], published: Published, alpha: float | None, base_card: dict[str, Any]
) -> str:
    """README.md of a model that others trained.

    Args:
        base: Hub id, or a directory, which is not told.
        checkpoints: their Hub ids or paths, of which names are told.
        alpha: of the adapters; None: twice their rank.
        base_card: metadata of the base model's own card.
    """
    on_hub = None if Path(base).exists() else base
    text = _render(
        "imported.md",
        alpha=alpha,
        base=on_hub,
        base_name=Path(base).name,
        checkpoints=[Path(path).name if Path(path).exists() else path for path in checkpoints],
        head="causal-lm",
        linear=True,
        medusa=None,
        memory=_memory(published.kept, published.config.kept_window),
        name=name,
        new=None,
        paper=PAPERS[published.format],
        published=published,
        ranks=sorted({len(A) for A, _ in published.adapters.values()}),
        yaml=yaml.safe_dump({"attention": published.config.to_dict()}, sort_keys=False),
    )
    return f"---\n{imported_metadata(on_hub, base_card).to_yaml()}\n---\n\n{text}\n"


def card_for(repo: str, card: str) -> str:
    """A card whose example loads the model from `repo`, not from a directory."""
    return re.sub(r'"path/to/[^"]*"', f'"{repo}"', card)


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(hub=HUB, version=__version__, **values)


def _cost(recipe: Recipe, metrics: dict) -> str:
    """What linear attention takes; nothing of a model that has none."""
    if recipe.attention is None:
        return ""
    if recipe.model.head in ("encoder", "sequence-classification"):
        return "time and memory are linear in length."
    if recipe.model.head == "seq2seq-lm":
        kept = ", but for what the decoder sees of the text, which stays softmax"
        kept = kept if recipe.attention.cross == "softmax" else ""
        return f"time is linear in the length of the text and of the answer{kept}."
    return _memory(metrics["install"]["kept_heads"], recipe.attention.kept_window)


def _memory(kept_heads: dict, kept_window: int | None) -> str:
    kept = {layer: heads for layer, heads in kept_heads.items() if heads}
    if not kept:
        return "memory per generated token is constant, prefill is linear in length."
    names = "; ".join(f"layer {layer}: {', '.join(map(str, heads))}" for layer, heads in kept.items())
    if kept_window is not None:
        return (
            "memory per generated token is constant and prefill linear in length; some key heads stay softmax over\n"
            f"the last {kept_window} tokens ({names})."
        )
    return (
        "memory per generated token is constant and prefill linear in length, except for the key heads that stay\n"
        f"softmax and keep their cache ({names})."
    )


def _limits(recipe: Recipe, metrics: dict) -> Iterator[str]:
    evaluated = metrics.get("evaluate")
    if recipe.attention is not None:
        yield _forgotten(recipe, evaluated)
    trained = [section.longest for stage in TRAINING[:2] if (section := getattr(recipe, stage)) is not None]
    known = f"It was trained on sequences of up to {max(trained)} tokens" if trained else "It was not trained"
    measured = f"measured in windows of up to {max(map(int, evaluated['tokens']))}" if evaluated else "not measured"
    yield f"{known}, and {measured}; what it does with longer ones is unknown."
    saved = (recipe.export and recipe.export.dtype) or recipe.model.dtype
    masters = ""
    if saved != "float32" and recipe.attention is not None:
        masters = ", those of the attention layers in float32, which they stay when loaded"
    done = "measured" if evaluated else "made"
    yield f"Its weights are saved in {saved}{masters}; it was {done} in {recipe.model.dtype}."
    if recipe.attention is not None:
        yield "It runs code from its directory (`trust_remote_code`); read it, or pin a revision that you have read."
    if recipe.model.config is None:
        yield "What its base model says wrongly or harmfully, it says, too: the conversion does nothing about that."
    else:
        yield "It knows what the training data below say, however wrong or harmful, and nothing else."


def _forgotten(recipe: Recipe, evaluated: dict | None) -> str:
    config = recipe.attention.config
    beyond = f"What lies beyond its window of {config.window_size} tokens" if config.window else "What it has read"
    held = "is held in a state of fixed size, and much of it is not remembered word for word"
    if not config.has_far:
        held = "is not seen"
    elif config.far != "features":
        held = f"is weighed by {config.far} attention"
    kept = " (by heads that do not stay softmax)" if recipe.keep else ""
    if recipe.model.head == "encoder":
        return f"{beyond}, on either side of a token, {held.partition(',')[0]}{kept}."
    return f"{beyond} {held}{kept}{_recalled(evaluated) if evaluated else '; how much is lost was not measured'}."


def _recalled(evaluated: dict) -> str:
    """What was measured of it, beside the teacher."""
    models = evaluated["models"]
    last, teacher = models[converted(evaluated)], models.get(reference(evaluated), {})
    asked = {
        "copying": "of a text of {} tokens said again are predicted",
        "passkey": "of pass keys in {} tokens are found",
        "recall": "of values are recalled from {} pairs",
    }
    told = []
    for measure, what in asked.items():
        for size, figures in last.get(measure, {}).items():
            beside = teacher.get(measure, {}).get(size)
            compared = f" (teacher {beside['accuracy']:.0%})" if beside else ""
            told.append(f"{figures['accuracy']:.0%} {what.format(size)}{compared}")
    return f": {', '.join(told)}" if told else "; how much is lost was not measured"
