"""How far back kept heads must look: a finished run measured with their memory bounded, quality against bytes.

    python benchmarks/kept_window.py RUN --out DIRECTORY [--windows N ...]

RUN is the directory of a conversion that keeps heads. Its weights stay; `attention.kept_window` alone changes (N = 0:
all tokens). Trained at lengths up to N, a run with window N has the same weights. Measures what the recipe does, and
copying of texts of `COPIED` tokens. Bytes are of the cache in bfloat16 at 8192 tokens. Writes `kept_window.json` and
`.md`.
"""

import argparse
import json
from pathlib import Path

from recall import CONTEXT, cache_bytes, table
from rich.console import Console

from linearize.convert.context import Context
from linearize.convert.data import token_stream
from linearize.convert.evaluate import measure_all
from linearize.convert.measures import Measure, make_measures
from linearize.convert.models import merged_model
from linearize.convert.pipeline import RESOLVED
from linearize.recipes.loader import load_recipe

COPIED = (512, 1024, 2048)


def measures_of(context: Context) -> list[Measure]:
    recipe, section = context.recipe, context.recipe.evaluate
    stream = token_stream("data.heldout", recipe.data.heldout, context.tokenizer, section.tokens)
    found = {}
    for length in COPIED:
        copying = section.copying.model_copy(update={"length": length})
        asked = section.model_copy(update={"copying": copying})
        measures = make_measures(asked, stream, context.tokenizer, recipe.attention.config)
        found |= {(measure.name, measure.size): measure for measure in measures}
    return [measure for measure in found.values() if measure.name != "far_mass"]


def row(window: str, size: int, figures: dict) -> dict:
    cells = {f"text {length}": found["perplexity"] for length, found in figures["text"].items()}
    for name in ("copying", "passkey"):
        cells |= {f"{name} {length}": found["accuracy"] for length, found in figures.get(name, {}).items()}
    return {"kept heads look back": window, f"MiB at {CONTEXT}": size / 2**20} | cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256, 512, 1024])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    rows, results = [], {}
    for window in arguments.windows:
        override = f"attention.kept_window={window or 'null'}"
        recipe = load_recipe(str(arguments.run / RESOLVED), [override])
        context = Context(recipe, arguments.run, console)
        model = merged_model(context).to(context.device).eval()
        name, measures = str(window or "all"), measures_of(context)
        found = measure_all([(("models", name), model)], {("models", name): measures}, console)
        results[name] = found["models"][name]
        rows.append(row(name, cache_bytes(model), results[name]))
        (arguments.out / "kept_window.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        (arguments.out / "kept_window.md").write_text(table(rows), "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
