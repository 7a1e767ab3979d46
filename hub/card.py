"""The model card: where the model comes from, what was done to it, and what was measured."""

import textwrap
from pathlib import Path

import yaml

from linearize.hub.published import Published
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
{sections}
"""

RECIPE = """{results}
## Recipe

```yaml
{recipe}```"""

IMPORTED = """
## Where it comes from

Nothing was trained to make this model. `linearize import` merged into one what {paper} published:

- base: {base}
{checkpoints}

{about} What is computed is their formula, {groups}the same in training, prefill and decoding.

```yaml
attention:
{attention}```"""

PAPERS = {
    "lolcats": "LoLCATs ([arXiv 2410.10254](https://arxiv.org/abs/2410.10254))",
    "linearized-llm": "Linearized-LLM ([arXiv 2406.07368](https://arxiv.org/abs/2406.07368))",
}


def model_card(recipe: Recipe, metrics: dict) -> str:
    """README.md of an exported model; metadata as the Hub reads them.

    Args:
        metrics: stage -> its metrics.
    """
    named = not Path(recipe.model.source).exists() and not recipe.model.source.startswith("package:")
    base = recipe.model.base_model or (recipe.model.source if named else None)
    memory = _memory(metrics["install"]["kept_heads"], recipe.attention.kept_window)
    sections = RECIPE.format(results=_results(metrics), recipe=dump_recipe(recipe))
    return _card(recipe.name, base, recipe.model.license, memory, sections)


def imported_card(name: str, base: str, checkpoints: list[str], published: Published, alpha: float | None) -> str:
    """README.md of a model that others trained.

    Args:
        base: Hub id, or a directory, which is not told.
        checkpoints: their Hub ids or paths, of which names are told.
        alpha: of the adapters; None: twice their rank.
    """
    hub_base = None if Path(base).exists() else base
    config = published.config
    about = [f"Left out: {what}." for what in published.left_out]
    if published.adapters:
        ranks = sorted({len(A) for A, _ in published.adapters.values()})
        scale = "twice the rank" if alpha is None else f"{alpha:g}"
        about.append(f"LoRA adapters of rank {', '.join(map(str, ranks))} are merged with alpha {scale}.")
    if published.weights:
        about.append(f"{len(published.weights)} of the base's weights were trained themselves.")
    sections = IMPORTED.format(
        paper=PAPERS[published.format],
        base=hub_base or Path(base).name,
        checkpoints="\n".join(f"- {Path(path).name if Path(path).exists() else path}" for path in checkpoints),
        about=" ".join(about),
        groups="in groups counted from the text's beginning, " if config.window in ("block", "terrace") else "",
        attention=textwrap.indent(yaml.safe_dump(config.to_dict(), sort_keys=False), "  "),
    )
    return _card(name, hub_base, None, _memory(published.kept, config.kept_window), sections)


def _card(name: str, base: str | None, license: str | None, memory: str, sections: str) -> str:
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": license or "other",
        "tags": ["linearize", "linear-attention"],
    }
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "finetune"}
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=name,
        base=base or "A model",
        memory=memory,
        sections=sections,
    )


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
