"""The model card: where the model comes from, what was done to it, and what was measured."""

import re
from pathlib import Path
from typing import Any

import yaml

from linearize.recipes.loader import dump_recipe
from linearize.recipes.schema import Recipe

CARD = """---
{metadata}---

# {name}

{base} with its softmax attention turned into augmented linear attention by
linearize: {memory}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("path/to/{name}", trust_remote_code=True)
```

`trust_remote_code` is needed: the code is in this directory, and without it nothing loads this model as the softmax
model that it was.
{results}
## Recipe

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, metrics: dict) -> str:
    """README.md of an exported model; metadata as the Hub reads them.

    Args:
        metrics: stage -> its metrics.
    """
    metadata = card_metadata(recipe)
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=recipe.name,
        base=metadata.get("base_model", "A model"),
        memory=_memory(metrics["install"], recipe.attention.kept_window),
        results=_results(metrics),
        recipe=dump_recipe(recipe),
    )


def card_metadata(recipe: Recipe) -> dict[str, Any]:
    """What stands before the card's text, known before anything is trained."""
    named = not Path(recipe.model.source).exists() and not recipe.model.source.startswith("package:")
    base = recipe.model.base_model or (recipe.model.source if named else None)
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": recipe.model.license or "other",
        "tags": ["linearize", "linear-attention"],
    }
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "finetune"}
    return metadata


def card_for(repo: str, card: str) -> str:
    """A card whose example loads the model from `repo`, not from a directory."""
    return re.sub(r'from_pretrained\("path/to/[^"]*"', f'from_pretrained("{repo}"', card)


def _memory(installed: dict, kept_window: int | None) -> str:
    kept = {layer: heads for layer, heads in installed["kept_heads"].items() if heads}
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


def _results(metrics: dict) -> str:
    if "evaluate" not in metrics:
        return ""
    measured = metrics["evaluate"]
    rows = {name: _figures(figures) for group in ("models", "ablations") for name, figures in measured[group].items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [
        "",
        "## Measured",
        "",
        "Perplexity of held-out text by length of the window; the share of tokens predicted when a text is said again, "
        "of pass keys found in a text of so many tokens, and of values recalled from so many `key: value` pairs. "
        "`metrics.json` has the details.",
        "",
        f"| model | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += [f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |" for name, row in rows.items()]
    for i, accuracy in enumerate(metrics.get("medusa", {}).get("head_accuracy", [])):
        if i == 0:
            lines += ["", "| Medusa head | top-1 | top-5 |", "|---|---|---|"]
        lines.append(f"| {i + 1} | {accuracy['top1']:.3f} | {accuracy['top5']:.3f} |")
    if "medusa" in metrics:
        nodes = len(metrics["medusa"]["tree"]) + 1
        chosen = next(size for size in metrics["medusa"]["tree_sizes"] if size["nodes"] == nodes)
        lines += [
            "",
            f"Speculative decoding (`model.generate(..., custom_generate=model.speculate)`) verifies {nodes} tokens at "
            f"once and is expected to accept {chosen['tokens']:.2f} of them per step; the text stays the same.",
        ]
    return "\n".join([*lines, ""])


def _figures(measured: dict) -> dict[str, str]:
    """Column -> figure of one model."""
    row = {f"perplexity, {length}": f"{figures['perplexity']:.2f}" for length, figures in measured["text"].items()}
    for name, unit in (("copying", "tokens"), ("passkey", "tokens"), ("recall", "pairs")):
        for size, figures in measured.get(name, {}).items():
            row[f"{name}, {size} {unit}"] = f"{figures['accuracy']:.0%}"
    return row
