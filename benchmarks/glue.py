"""Linear attentions on GLUE: softmax, seven published ones and the same augmented, in models of three families.

    python benchmarks/glue.py --glue DIRECTORY --text FILE.txt --out DIRECTORY [--workers N] [--minutes M]
                              [--families ..] [--attentions ..] [--tasks ..] [--models DIRECTORY]
                              [--pretrained FAMILY=SOURCE ..]

The form of Linearized-LLM's tables 1-3 (arXiv 2406.07368). Small models of each family are trained from scratch on
`--text` by the recipes bert-scratch, gpt2-scratch and t5-scratch (or found in `--models`, where a run before has left
them; or they are somebody's, `--pretrained`, whatever a recipe's model.source may be). Each is converted and finetuned
by the recipe `glue`, once for each attention and task, from the same weights with the same settings and examples,
`--workers` runs at a time. `--glue` holds the tasks as GLUE gives them out (SST-2/train.tsv, ..); test sets without
labels are not read: SST-2 and WNLI are measured on `test.tsv` where that has labels, RTE on `dev.tsv`, and QNLI, if
only `dev.tsv` is there, on a fifth of it, the rest being trained on.

Results are added to `glue.jsonl` one by one, and what is there is not run again, nor anything begun after `--minutes`.
Writes `glue.md`.
"""

import argparse
import csv
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BASELINES = ("flash-local", "flash-global", "linformer", "performer", "transnormer", "yoso", "relu")
AUGMENTED = "+conv+group"
ATTENTIONS = ("softmax", *BASELINES, *(f"{name}{AUGMENTED}" for name in BASELINES), "augmented-icml")
# Task -> columns of its texts, steps of 32 examples, tokens of a text.
TASKS = {
    "SST-2": (("sentence",), 500, 64),
    "RTE": (("sentence1", "sentence2"), 240, 192),
    "WNLI": (("sentence1", "sentence2"), 60, 96),
    "QNLI": (("question", "sentence"), 400, 128),
}
# Shares of what is published, for 110M to 220M parameters: the averages of tables 1-3, 14.
PUBLISHED = {
    "bert": dict(zip(ATTENTIONS, (78.96, 74.26, 59.21, 66.19, 59.23, 68.46, 76.86, 67.05), strict=False)),
    "gpt2": dict(zip(ATTENTIONS, (77.61, 70.22, 53.49, 60.59, 65.69, 65.47, 72.68, 70.79), strict=False)),
    "t5": dict(zip(ATTENTIONS, (76.91, 62.75, 63.58, 55.91, 66.45, 62.29, 61.39, 69.52), strict=False)),
}
VOCABULARY = 8192
SIZES = {
    "bert": {
        "model_type": "bert", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4,
        "intermediate_size": 1024, "max_position_embeddings": 512,
    },
    "gpt2": {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 512},
    "t5": {
        "model_type": "t5", "num_layers": 4, "d_model": 256, "num_heads": 4, "d_kv": 64, "d_ff": 704,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def make_tokenizer(family: str, text: Path, directory: Path) -> Path:
    """A byte-level BPE that puts around texts what the family's do."""
    special = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"] if family == "bert" else ["</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    names = {"eos_token": special[0], "pad_token": special[1]}
    if family == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


def pretrain(family: str, text: Path, out: Path, changes: list[str]) -> Path:
    """The directory of a model that the family's recipe has trained, by the command line."""
    run = out / family
    model = run / "export" / "model"
    if model.is_dir():
        return model
    tokenizer = make_tokenizer(family, text, out / f"{family}-tokenizer")
    command = [
        sys.executable, "-m", "linearize.cli", "convert", f"{family}-scratch",
        f"model.config={json.dumps(SIZES[family])}", f"model.tokenizer={tokenizer}",
        f"data.train=[{{source: {text}}}]", f"data.heldout=[{{source: {text}}}]", "finetune.length=512",
        "evaluate=null", *changes, "--out", str(run), "--launch", "none", "--resume",
    ]  # fmt: skip
    with (out / f"{family}.log").open("w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            raise RuntimeError(f"{family}: training it ended early; {log.name} says why")
    return model


def write_task(task: str, glue: Path, out: Path) -> None:
    """`train.jsonl` and `heldout.jsonl` of a task."""
    columns, *_ = TASKS[task]

    def rows(name: str) -> list[dict]:
        path = glue / task / f"{name}.tsv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        # Tests whose labels are secret have none, or -1.
        return [row for row in found if row.get("label") not in (None, "", "-1")]

    train, dev, test = map(rows, ("train", "dev", "test"))
    if not train:
        train, dev = [row for i, row in enumerate(dev) if i % 5], dev[::5]
    elif test:
        train, dev = train + (dev if task == "WNLI" else []), test
    (out / task).mkdir(parents=True, exist_ok=True)
    for name, some in (("train", train), ("heldout", dev)):
        lines = [json.dumps({name: row[name] for name in (*columns, "label")}) for row in some]
        (out / task / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def changes_for(family: str, attention: str, task: str, model: Path | str, data: Path) -> list[str]:
    """What a run changes in the recipe `glue`."""
    columns, steps, length = TASKS[task]
    second = f", second: {columns[1]}" if len(columns) == 2 else ""
    source = "data.{0}=[{{source: {1}/{0}.jsonl, field: {2}{3}, label: label}}]"
    preset = "null" if attention == "softmax" else f"{{preset: {attention}}}"
    return [
        f"name={family}-{task}-{attention}", f"model.source={model}", "model.labels=null", f"attention={preset}",
        *(source.format(name, data / task, columns[0], second) for name in ("train", "heldout")),
        "transfer=null", f"finetune.steps={steps}", f"finetune.length={length}", "finetune.lr=3e-4",
        "finetune.attention_lr=3e-3", f"finetune.warmup_steps={steps // 10}", f"finetune.save_every={steps}",
        f"evaluate.lengths=[{length}]", "evaluate.tuned_teacher=false", "export=null",
    ]  # fmt: skip


def prepare_worker() -> None:
    """All attentions by the same arithmetic, and no kernel is compiled for runs of seconds."""
    import torch

    from linearize.layers.kernels import BACKENDS, triton_kernels
    from linearize.terminal import quieten

    quieten()
    torch.set_num_threads(1)
    BACKENDS.pop("triton", None)
    triton_kernels.features = None


def run_one(job: tuple[str, str, str], model: Path | str, data: Path, out: Path) -> dict:
    """One attention in one family's model on one task."""
    from rich.console import Console

    from linearize.convert.context import Context
    from linearize.convert.pipeline import run, stages_to_run
    from linearize.recipes.loader import load_recipe

    family, attention, task = job
    directory = out / "runs" / "-".join(job)
    shutil.rmtree(directory, ignore_errors=True)
    began = time.monotonic()
    context = Context(load_recipe("glue", changes_for(*job, model, data)), directory, Console(quiet=True))
    run(context, stages_to_run(context, None, None, False))
    measured = context.state("evaluate")["metrics"]["models"]["after finetune"]["classes"]
    losses = context.state("finetune")["metrics"]["loss"]
    shutil.rmtree(directory)
    figures = next(iter(measured.values()))
    return {
        "family": family, "attention": attention, "task": task, **figures, "training_loss": sum(losses[-20:]) / 20,
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def table(found: list[dict]) -> str:
    """Accuracies in percent, one table for each family, and the gain of augmentation."""
    shares = {(row["family"], row["attention"], row["task"]): 100 * row["accuracy"] for row in found}
    lines, gains = [], defaultdict(list)
    for family in dict.fromkeys(row["family"] for row in found):
        tasks = [task for task in TASKS if any(key[0] == family and key[2] == task for key in shares)]
        lines += [f"\n{family}\n", f"| attention | {' | '.join(tasks)} | average | published |"]
        lines.append("|---" * (len(tasks) + 3) + "|")
        average = {}
        for attention in ATTENTIONS:
            cells = [shares.get((family, attention, task), math.nan) for task in tasks]
            average[attention] = sum(cells) / len(cells)
            published = PUBLISHED[family].get(attention, "")
            shown = " | ".join(f"{cell:.1f}" for cell in (*cells, average[attention]))
            lines.append(f"| {attention} | {shown} | {published} |")
        for name in BASELINES:
            gains[family].append(average[name + AUGMENTED] - average[name])
    lines.append("\nAverage gain of augmentation over the seven, in points")
    every = [gain for of_family in gains.values() for gain in of_family]
    for family, of_family in (*gains.items(), ("all", every)):
        told = ", ".join(f"{gain:+.1f}" for gain in of_family) if family != "all" else ""
        lines.append(f"- {family}: {sum(of_family) / len(of_family):+.2f}" + (f" ({told})" if told else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="To train models of families on that are not given.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="Where the trained models are, or are to be; in --out.")
    parser.add_argument("--pretrained", nargs="*", default=[], metavar="FAMILY=SOURCE")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--families", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--pretraining", nargs="*", default=[], metavar="CHANGE", help="Of the recipes from scratch.")
    arguments = parser.parse_args()
    out, end = arguments.out.resolve(), time.monotonic() + 60 * arguments.minutes
    at = (arguments.models or arguments.out / "models").resolve()
    for path in (out, at):
        path.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        write_task(task, arguments.glue, out / "data")
    text = arguments.text.resolve()
    sources = dict(given.split("=", 1) for given in arguments.pretrained)
    new = [family for family in arguments.families if family not in sources]
    with ThreadPoolExecutor() as pool:
        trained = pool.map(lambda family: pretrain(family, text, at, arguments.pretraining), new)
        sources |= zip(new, trained, strict=True)

    path = out / "glue.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(row["family"], row["attention"], row["task"]) for row in found}
    jobs = [
        job
        for task in sorted(arguments.tasks, key=lambda task: -TASKS[task][1])
        for attention in arguments.attentions
        for family in arguments.families
        if (job := (family, attention, task)) not in done
    ]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(arguments.workers, context, prepare_worker)
    waiting, running = list(reversed(jobs)), {}
    with path.open("a") as file:
        while (waiting and time.monotonic() < end) or running:
            while waiting and len(running) < arguments.workers and time.monotonic() < end:
                job = waiting.pop()
                running[pool.submit(run_one, job, sources[job[0]], out / "data", out)] = job
            future = next(as_completed(running))
            job = running.pop(future)
            try:
                row = future.result()
            except Exception as error:  # one run that fails is told, and the others go on
                print(f"{' '.join(job)}: {type(error).__name__}: {error}", flush=True)
                continue
            found.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{' '.join(job)}: {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
    pool.shutdown()
    (out / "glue.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
