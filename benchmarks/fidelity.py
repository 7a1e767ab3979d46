"""What is kept of a model: variants of one recipe converted side by side and measured alike, in one table.

    python benchmarks/fidelity.py RECIPE --out DIRECTORY [--variants NAME ...] [--processes N] [KEY=VALUE ...]

Every variant is the recipe with the overrides below and those of the command line; they share the unpacked model.
With the first variant the softmax model is measured, and the same finetuned alike: the teacher that ratios are to, up
to the next variant that comes with a teacher of its own, since it is finetuned on other sequences.
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

from linearize.convert.evaluate import RESULTS
from linearize.hub.measured import TEACHER, TUNED_TEACHER

SEED = ["seed=1"]
# Finetuned on other sequences, so the teacher must be, too.
TEACHER_TOO = ["evaluate.tuned_teacher=true"]
# Recipe smollm2-135m-hybrid.
KEEP = [
    "keep={kv_budget: 0.1, texts: 8}",
    "finetune.curriculum=[{length: 1024, share: 0.5}, {length: 8192, share: 0.5}]", "finetune.recall=0.3",
    "finetune.facts=0.5",
]
# Recipe smollm2-135m-long.
LONG = [
    "transfer.steps=300", "finetune.steps=2100", "finetune.warmup_steps=50", "finetune.rank=128", "finetune.alpha=64",
    "finetune.curriculum=[{length: 1024, share: 0.875}, {length: 4096, share: 0.125}]",
]
WINDOW = ["attention.preset=swa", "transfer=null"]
VARIANTS = {
    "window + sinks, retrained": WINDOW,
    "lolcats": ["attention.preset=lolcats", "keep=null"],
    "augmented": [],
    "augmented, another seed": SEED,
    "augmented, long": [*LONG, *TEACHER_TOO],
    "10% of KV heads kept": [*KEEP, *TEACHER_TOO],
    "10% of KV heads kept, another seed": [*KEEP, *SEED],
    "10% of KV heads kept, no facts trained": KEEP[:-1],
    "10% of KV heads kept, no recall trained": [KEEP[0]],
    "10% kept, the rest window + sinks, retrained": [*KEEP, *WINDOW],
    "256 features, half of the sequences ask for recall": [
        "attention.feature_expansion=4", "transfer.recall=0.5", "finetune.recall=0.5",
        "finetune.micro_batch_size=4",
    ],
    "decay": ["attention.state=decay"],
    "own and previous block near": ["attention.window=terrace"],
}


def convert(recipe: str, directory: Path, overrides: list[str], *options: str, index: int = 0) -> int:
    """Exit code of `linearize convert`, on GPU `index` modulo their number."""
    directory.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": visible[index % gpus]} if gpus else {})
    command = [sys.executable, "-m", "linearize.cli", "convert", recipe, *overrides, "--out", directory / "run"]
    with open(directory / "log.txt", "a", encoding="utf-8") as log:
        command = [*map(str, command), "--resume", *options]
        return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode


def rows(directory: Path, names: list[str]) -> list[tuple[str, dict]]:
    """(name, measure -> size -> figures) of every finished variant, below the softmax models and the untrained
    baseline where these were measured with it."""
    found = []
    for name in names:
        path = directory / name / "run" / "evaluate" / RESULTS
        if not path.is_file():
            continue
        models = json.loads(path.read_text("utf-8"))["models"]
        known = ("after finetune", "after transfer", "installed")
        found += [(model, figures) for model, figures in models.items() if model not in known]
        found.append((name, next(models[stage] for stage in ("after finetune", "installed") if stage in models)))
    return found


def table(found: list[tuple[str, dict]]) -> str:
    """Markdown; perplexities with their ratio to that of the last finetuned teacher above (the first one where there
    is none above)."""
    measures = ("text", "copying", "passkey", "recall")
    columns = list(dict.fromkeys((name, size) for name in measures for _, f in found for size in f.get(name, {})))
    teacher = next((f for name, f in found if name == TUNED_TEACHER), dict(found).get(TEACHER))

    def cell(figures, measure, size):
        value = figures.get(measure, {}).get(size)
        if value is None:
            return ""
        if measure != "text":
            return f"{value['accuracy']:.1%}"
        ratio = f" ({value['perplexity'] / teacher['text'][size]['perplexity']:.3f})" if teacher else ""
        return f"{value['perplexity']:.2f}{ratio}"

    lines = ["| model | " + " | ".join(f"{measure} {size}" for measure, size in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, figures in found:
        if name == TUNED_TEACHER:
            teacher = figures
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
        # Heads that guess further tokens change nothing of what is measured here.
        beside = ["medusa=null", f"evaluate.baselines={first}", f"evaluate.tuned_teacher={first}"]
        return convert(arguments.recipe, arguments.out / name, [*beside, *overrides, *VARIANTS[name]], index=index)

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
