"""What a model card tells the Hub: base model, licence, data, and the measured perplexities.

Spec: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from linearize.hub.measured import converted
from linearize.recipes.corpora import FILE_SUFFIXES, DataSource
from linearize.recipes.schema import Recipe

HUB = "https://huggingface.co"
LINEAR = "linear-attention"
# What the Hub takes as `license`, as its answer to another one lists it (2026); all else is `other`, by its name.
LICENSES = frozenset((Path(__file__).parent / "licenses.txt").read_text("utf-8").split())


# The Hub's names for what models are for.
TASKS = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "encoder": "feature-extraction",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
}


def base_model(recipe: Recipe) -> str | None:
    """Hub id of the model that was converted, where it has one."""
    source = recipe.model.source
    if source is None:
        return None
    local = source.startswith("package:") or source.endswith(".gguf") or Path(source).expanduser().exists()
    return recipe.model.base_model or (None if local else source)


def hub_dataset(data: DataSource) -> str | None:
    """Its id, unless it is a file or comes with the package."""
    return None if data.source.startswith("builtin:") or data.source.endswith(FILE_SUFFIXES) else data.source


def data_name(data: DataSource) -> str:
    """Its id, or a file's name, not where it is."""
    return data.source if hub_dataset(data) else Path(data.source).name


def license_fields(card: dict, base: str | None) -> dict[str, str | list[str]]:
    """`license`, and where the Hub has no id for it its `license_name` and `license_link`.

    Args:
        card: where these stand, in any form; a link may be to a file of `base`, a Hub id.
    """
    given = card.get("license") or "unknown"
    ids = given if isinstance(given, list) else [given]
    known = [name.lower() for name in ids if name.lower() in LICENSES]
    if len(known) == len(ids) and known != ["other"]:
        return {"license": known if len(known) > 1 else known[0]}
    name = card.get("license_name") or ", ".join(ids)
    fields = {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")}
    link = card.get("license_link")
    if link and not link.startswith(("http://", "https://")):
        # A file of the base model's repository.
        link = f"{HUB}/{base}/blob/main/{link}" if base else None
    return fields | ({"license_link": link} if link else {})


def perplexities(recipe: Recipe, results: dict) -> list[EvalResult]:
    """Of the converted model, one for each length of the windows."""
    sources = recipe.data.heldout
    known = hub_dataset(sources[0]) if len(sources) == 1 else None
    names = ", ".join(map(data_name, sources))
    dataset = {"dataset_type": known or "custom", "dataset_name": names}
    if known:
        dataset |= {"dataset_config": sources[0].name, "dataset_split": sources[0].split}
    return [
        EvalResult(
            task_type="text-generation",
            metric_type="perplexity",
            metric_name=f"perplexity in windows of {length} tokens",
            metric_value=round(text["perplexity"], 4),
            **dataset,
        )
        for length, text in results["models"][converted(results)].get("text", {}).items()
        if math.isfinite(text["perplexity"])
    ]


def metadata(recipe: Recipe, metrics: dict) -> ModelCardData:
    """The head of the card of a model that a recipe makes.

    Args:
        metrics: stage -> its metrics, of the stages that have ended: before any, none is needed.
    """
    base_card = metrics.get("load", {}).get("card", {})
    base = base_model(recipe)
    own = {"license": recipe.model.license, "license_link": recipe.model.license_link}
    datasets = list(dict.fromkeys(filter(None, map(hub_dataset, recipe.data.train))))
    measured = perplexities(recipe, metrics["evaluate"]) if "evaluate" in metrics else []
    licensed, tags = own if recipe.model.license else base_card, list(_tags(recipe))
    return ModelCardData(
        datasets=datasets or None,
        eval_results=measured or None,
        model_name=recipe.name if measured else None,
        # What is made of a model inherits its licence.
        **_of_all(base, licensed, base_card, tags, TASKS[recipe.model.head]),
    )


def imported_metadata(base: str | None, base_card: dict) -> ModelCardData:
    """The head of the card of a model that others trained from `base`, a Hub id."""
    return ModelCardData(**_of_all(base, base_card, base_card, [LINEAR]))


def _tags(recipe: Recipe) -> Iterator[str]:
    if recipe.attention is not None:
        yield LINEAR
    if recipe.medusa is not None:
        yield "medusa"


def _of_all(
    base: str | None, licensed: dict, base_card: dict, tags: list[str], task: str = "text-generation"
) -> dict:
    return {
        "base_model": base,
        # Of adapter, merge, quantized and finetune, which the Hub knows.
        "base_model_relation": "finetune" if base else None,
        "language": base_card.get("language"),
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["linearize", *tags],
        **license_fields(licensed, base),
    }
