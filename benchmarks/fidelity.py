"""What is kept of a model: variants of one recipe converted side by side and measured alike, in one table.

    python benchmarks/fidelity.py RECIPE --out DIRECTORY [--variants NAME ...] [--processes N] [KEY=VALUE ...]

Every variant is the recipe with the overrides below and those of the command line; they share the unpacked model.
With the first variant the softmax model is measured, and the same finetuned alike: the teacher that all ratios are to.
A variant that is finished is not run again. Writes `table.md` and, per variant, the run itself with its log.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from linearize.convert.evaluate import RESULTS, TEACHER, TUNED_TEACHER

SEED = ["seed=1"]
KEEP = ["keep={kv_budget: 0.1}"]
WINDOW = ["attention.preset=swa", "transfer=null"]
# The same tokens per step in longer sequences.
LONG = [f"{stage}.{field}" for stage in ("transfer", "finetune") for field in ("length=2048", "batch_size=4")]
# Sequences that ask for what was said up to 4096 tokens ago.
FAR = ["finetune.curriculum=[{length: 1024, share: 0.6}, {length: 4096, share: 0.4}]", "finetune.recall=0.2"]
# The heads of SmolLM2-135M that recall, as calibration finds them: what can a state do in these alone?
RECALLING = {7: [2], 14: [1], 18: [2], 19: [1], 20: [1, 2], 23: [0, 2], 24: [0]}
OTHERS = {layer: [head for head in range(3) if head not in RECALLING.get(layer, [])] for layer in range(30)}
VARIANTS = {
    "augmented": [],
    "10% of KV heads kept": KEEP,
    "augmented, another seed": SEED,
    "10% of KV heads kept, another seed": [*KEEP, *SEED],
    "window + sinks, retrained": WINDOW,
    "10% kept, the rest window + sinks, retrained": [*KEEP, *WINDOW],
    "lolcats": ["attention.preset=lolcats", "keep=null"],
    "trained at length 2048": LONG,
    "512 features, some text repeated": [
        "attention.feature_expansion=8", "transfer.recall=0.3", "finetune.recall=0.3"
    ],
    "10% of KV heads kept, trained to recall at 4096": [*KEEP, *FAR],
    "recalling heads alone linear, 512 features": [
        f"keep={{heads: {OTHERS}}}", "attention.feature_expansion=8", "transfer.recall=1", "finetune.recall=1",
        "transfer.objectives.weights_kl=1",
    ],
    "decay": ["attention.state=decay"],
    "own and previous block near": ["attention.window=terrace"],
}


def convert(recipe: str, directory: Path, overrides: list[str], *options: str, index: int = 0) -> int:
    """Exit code of `linearize convert`, on GPU `index` modulo their number."""
    directory.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(index % gpus)} if gpus else {})
    command = [sys.executable, "-m", "linearize.cli", "convert", recipe, *overrides, "--out", directory / "run"]
    with open(directory / "log.txt", "a", encoding="utf-8") as log:
        command = [*map(str, command), "--resume", *options]
        return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode


def rows(directory: Path, names: list[str]) -> list[tuple[str, dict]]:
    """(name, measure -> size -> figures) of the teachers, the untrained baseline and every finished variant."""
    found = []
    for name in names:
        path = directory / name / "run" / "evaluate" / RESULTS
        if not path.is_file():
            continue
        models = json.loads(path.read_text("utf-8"))["models"]
        if not found:
            known = ("after finetune", "after transfer", "installed")
            found = [(model, figures) for model, figures in models.items() if model not in known]
        found.append((name, next(models[stage] for stage in ("after finetune", "installed") if stage in models)))
    return found


def table(found: list[tuple[str, dict]]) -> str:
    """Markdown; perplexities with their ratio to the teacher that was finetuned alike, where that was measured."""
    teachers = dict(found)
    teacher = teachers.get(TUNED_TEACHER) or teachers[TEACHER]
    measures = ("text", "copying", "passkey", "recall")
    columns = list(dict.fromkeys((name, size) for name in measures for _, f in found for size in f.get(name, {})))

    def cell(figures, measure, size):
        value = figures.get(measure, {}).get(size)
        if value is None:
            return ""
        if measure != "text":
            return f"{value['accuracy']:.1%}"
        return f"{value['perplexity']:.2f} ({value['perplexity'] / teacher['text'][size]['perplexity']:.3f})"

    lines = ["| model | " + " | ".join(f"{measure} {size}" for measure, size in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, figures in found:
        lines.append(f"| {name} | " + " | ".join(cell(figures, *column) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--processes", type=int, default=1)
    arguments, overrides = parser.parse_known_args()
    base = arguments.out / "model"
    if convert(arguments.recipe, base, overrides, "--only", "load"):
        sys.exit(f"the model could not be loaded; see {base / 'log.txt'}")
    unpacked = base / "run" / "load" / "model"
    if unpacked.is_dir():
        tokenizer = base / "run" / "load" / "tokenizer"
        overrides += [f"model.source={unpacked.resolve()}", f"model.tokenizer={tokenizer.resolve()}"]

    def one(index: int) -> int:
        name = arguments.variants[index]
        first = str(index == 0).lower()
        beside = [f"evaluate.baselines={first}", f"evaluate.tuned_teacher={first}"]
        return convert(arguments.recipe, arguments.out / name, [*overrides, *VARIANTS[name], *beside], index=index)

    with ThreadPoolExecutor(arguments.processes) as pool:
        codes = list(pool.map(one, range(len(arguments.variants))))
    found = rows(arguments.out, arguments.variants)
    if found:
        (arguments.out / "table.md").write_text(table(found), "utf-8")
        print(table(found))
    failed = [name for name, code in zip(arguments.variants, codes, strict=True) if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see their log.txt in {arguments.out}")


if __name__ == "__main__":
    main()
