"""Downstream tasks by lm-eval, from files on this machine or from the Hub: a model, and its teacher beside it.

Files in a directory are read as these tasks, with lm-eval's own prompts, shots and figures:

    NAME.jsonl   {query, choices, gold}                          the likeliest choice (PIQA, ARC, COPA, OpenBookQA ..)
                 {context_options, continuation, gold}           the context that makes it likeliest (WinoGrande)
                 {activity_label, ctx_a, ctx_b, endings, label}  HellaSwag, as it is published
    mmlu/        dev/SUBJECT_dev.csv, test/SUBJECT_test.csv      five shots of dev
    bbh/         TASK.json {examples: [{input, target}]}         three shots, which lm-eval brings; exact match

The results file holds, by task and model, `acc` (`acc_norm`, `exact_match`) and their standard errors, `items`, and the
`chance` of guessing. What it holds is not measured again; answers that a task had before an interruption are in
`answers.db` beside it.
"""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from linearize.convert.context import StageError, write_atomically
from linearize.convert.sources import first_line

TEACHER = "teacher"
CONVERTED = "converted"
# What is told of a task: the first of these that it has.
FIGURES = ("acc_norm", "acc", "exact_match")
# Requests at once where nothing is gained by more.
CPU_BATCH = 8
LETTERS = "ABCD"


def tasks_of(directory: Path) -> dict[str, Path]:
    """Name -> file or directory of each task there."""
    found = {path.stem: path for path in sorted(directory.glob("*.jsonl"))}
    return found | {name: directory / name for name in ("mmlu", "bbh") if (directory / name).is_dir()}


def locate(name: str, directory: Path) -> Path:
    """Where the task of this name is: `openbookqa` may be `openbook_qa.jsonl`, `hellaswag` `hellaswag_val.jsonl`.

    Raises:
        StageError: there is none.
    """
    found = tasks_of(directory)

    def plain(text: str) -> str:
        return text.replace("_", "").replace("-", "").lower()

    matching = [path for stem, path in found.items() if plain(stem) == plain(name)]
    matching += [path for stem, path in found.items() if plain(stem).startswith(plain(name))]
    if matching:
        return matching[0]
    close = get_close_matches(name, found, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    there = ", ".join(found) or "no tasks"
    raise StageError(f"--tasks {name}: {directory} has no such task{hint}; there are {there}")


def rows_of(path: Path) -> list[dict]:
    """The rows of a .jsonl file.

    Raises:
        StageError: naming the line that is no row of a kind that is known, or of another kind than the first.
    """
    rows, kind = [], None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StageError(f"{path}:{number}: is no JSON ({error})") from error
        found = next((name for name, (fields, _) in KINDS.items() if isinstance(row, dict) and fields <= {*row}), None)
        if found is None or found != (kind or found):
            kinds = [KINDS[kind]] if kind else KINDS.values()
            expected = " or ".join("{" + ", ".join(sorted(fields)) + "}" for fields, _ in kinds)
            raise StageError(f"{path}:{number}: expected {expected}")
        kind = found
        rows.append(row)
    if not rows:
        raise StageError(f"{path}: has no rows")
    return rows


def _choices(rows: list[dict]) -> list[dict]:
    """PIQA and ARC ask "Question: ..", to which lm-eval has the choices answer."""
    found = []
    for row in rows:
        query = row["query"].rstrip()
        query += "\nAnswer:" if query.startswith("Question:") else ""
        found.append({"query": query, "choices": row["choices"], "gold": row["gold"]})
    return found


def _hellaswag(rows: list[dict]) -> list[dict]:
    from lm_eval.tasks.hellaswag.utils import preprocess

    return [
        {
            "query": preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            "choices": [preprocess(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }
        for row in rows
    ]


def _same(rows: list[dict]) -> list[dict]:
    return rows


# Kind of a row -> the fields that tell it, and what lm-eval is given for such rows.
KINDS: dict[str, tuple[set[str], Callable[[list[dict]], list[dict]]]] = {
    "choices": ({"query", "choices", "gold"}, _choices),
    "contexts": ({"context_options", "continuation", "gold"}, _same),
    "hellaswag": ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
}


def _configurations(name: str, path: Path) -> dict[str, dict]:
    """lm-eval's configurations of the parts of a task, by their names; `chance` is ours."""
    if path.name == "mmlu":
        return dict(_mmlu(path))
    if path.name == "bbh":
        return dict(_bbh(path))
    rows = rows_of(path)
    kind = next(kind for kind, (fields, _) in KINDS.items() if fields <= {*rows[0]})
    documents = KINDS[kind][1](rows)
    if kind == "contexts":
        # The choices are before what is scored.
        asked = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        measured, options = ["acc"], "context_options"
    else:
        asked = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        measured, options = ["acc", "acc_norm"], "choices"
    return {
        name: {
            "output_type": "multiple_choice",
            "metric_list": [{"metric": metric} for metric in measured],
            "documents": {"test": documents},
            "chance": fmean(1 / len(row[options]) for row in documents),
            **asked,
        }
    }


def _mmlu(path: Path) -> Iterator[tuple[str, dict]]:
    for file in sorted((path / "test").glob("*_test.csv")):
        subject = file.stem.removesuffix("_test")
        shots = path / "dev" / f"{subject}_dev.csv"
        if not shots.is_file():
            raise StageError(f"{shots}: is missing, which has the shots of {file.name}")
        yield f"mmlu_{subject}", {
            "output_type": "multiple_choice",
            "description": f"The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": [*LETTERS],
            "doc_to_target": "answer",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": 5,
            "metric_list": [{"metric": "acc"}],
            "documents": {"test": _questions(file), "dev": _questions(shots)},
            "chance": 1 / len(LETTERS),
        }


def _questions(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in LETTERS:
            raise StageError(f"{path}: row {number} is not question, four choices and the letter of one")
    return [{"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])} for row in rows]


def _bbh(path: Path) -> Iterator[tuple[str, dict]]:
    import lm_eval

    brought = Path(lm_eval.__file__).parent / "tasks" / "bbh" / "fewshot"
    common = yaml.safe_load((brought / "_fewshot_template_yaml").read_text("utf-8"))
    for file in sorted(path.glob("*.json")):
        if not (brought / f"{file.stem}.yaml").is_file():
            raise StageError(f"{file}: lm-eval knows no task of BIG-Bench Hard of that name")
        own = yaml.safe_load((brought / f"{file.stem}.yaml").read_text("utf-8"))
        try:
            examples = json.loads(file.read_text("utf-8"))["examples"]
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{file}: expected {{examples: [{{input, target}}]}}") from error
        config = {name: value for name, value in (common | own).items() if not name.startswith(("dataset", "include"))}
        yield f"bbh_{file.stem}", config | {"documents": {"test": examples}, "chance": None}


def prepare(names: list[str], directory: Path | None) -> tuple[dict[str, tuple[list, float | None]], object]:
    """Name -> (what lm-eval is asked for, the chance of guessing right), in the order of `names`; and what knows the
    rest of lm-eval's tasks, which takes long to list.

    Args:
        directory: with the tasks' files; None: lm-eval's own tasks, by their names.

    Raises:
        StageError: a task is not there, or its files are not what they should be.
    """
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise StageError("lm-eval is not installed; pip install linearize[eval]") from error
    if directory is None:
        manager = TaskManager()
        known = manager.all_tasks
        for name in names:
            if name not in known:
                close = ", ".join(get_close_matches(name, known, n=3))
                hint = f"; did you mean {close}?" if close else ""
                raise StageError(f"--tasks {name}: lm-eval has no such task{hint}")
        return {name: ([name], None) for name in names}, manager
    if not directory.is_dir():
        raise StageError(f"--data {directory}: is no directory")
    from datasets import Dataset

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = {}
    for name in names:
        configurations = _configurations(name, locate(name, directory))
        chances = [config.pop("chance") for config in configurations.values()]
        tasks = []
        for part, config in configurations.items():
            splits = {split: Dataset.from_list(rows) for split, rows in config.pop("documents").items()}
            given = {"test_split": "test"} | config | {"task": part}
            # lm-eval asks for the documents itself.
            tasks.append(ConfigurableTask(config=given | {"custom_dataset": lambda splits=splits, **_: splits}))
        found[name] = tasks, None if None in chances else fmean(chances)
    return found, TaskManager(include_defaults=False)


def evaluate(
    model: PreTrainedModel, tokenizer, tasks: list, manager, limit: int | None, batch: int | None, answers: Path
) -> dict[str, float]:
    """Figures of one task, of several parts the means over their items.

    Args:
        tasks, manager: as `prepare` has them.
        limit: items of each part at most.
        batch: requests at once; None: as many as fit a GPU's memory, eight on a CPU.
        answers: a database of answers that are not asked for again.

    Raises:
        StageError: lm-eval cannot get its task from the Hub.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device
    size = batch or ("auto" if device.type == "cuda" else CPU_BATCH)
    measured = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
    try:
        results = simple_evaluate(
            model=measured, tasks=tasks, task_manager=manager, limit=limit, use_cache=str(answers), bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise StageError(f"--tasks {', '.join(map(str, tasks))}: {first_line(error)}; --data reads files") from error
    parts = results["results"].values()
    items = [results["n-samples"][name]["effective"] for name in results["results"] if name in results["n-samples"]]
    figures: dict[str, float] = {"items": sum(items)}
    for figure in FIGURES:
        # Behind the comma is what is done to answers before they are scored.
        values = [next((part[key] for key in part if key.partition(",")[0] == figure), None) for part in parts]
        if values and None not in values:
            figures[figure] = sum(n * value for n, value in zip(items, values, strict=True)) / sum(items)
            # Of a share of so many items, whatever the parts.
            share = figures[figure]
            figures[f"{figure}_stderr"] = math.sqrt(share * (1 - share) / max(1, sum(items) - 1))
    return figures


def run(
    models: dict[str, Callable[[], tuple[PreTrainedModel, object]]], names: list[str], directory: Path | None,
    limit: int | None, batch: int | None, out: Path, settings: dict, console: Console,
) -> dict:  # fmt: skip
    """Measure what `out` does not hold yet; models one after the other, each loaded when it is asked for.

    Args:
        models: `TEACHER`, `CONVERTED` -> what loads model and tokenizer.
        settings: of the models and of what is asked, by which results that go together are known.

    Raises:
        StageError: `out` holds results of other models or limits, or a task is not what it should be.
    """
    prepared, manager = prepare(names, directory)
    results = {"settings": settings, "tasks": {}}
    if out.is_file():
        try:
            results = json.loads(out.read_text("utf-8"))
        except ValueError as error:
            raise StageError(f"{out}: is no JSON ({error})") from error
        if results.get("settings") != settings:
            raise StageError(f"--out {out}: holds results of other models, data or limits; choose another file")
    for who, load in models.items():
        left = [name for name in names if who not in results["tasks"].get(name, {})]
        if not left:
            continue
        model, tokenizer = load()
        for name in left:
            console.print(f"[bold]{who}[/bold] {name}", highlight=False)
            tasks, chance = prepared[name]
            with torch.inference_mode(), _answers(out, who) as answers:
                figures = evaluate(model, tokenizer, tasks, manager, limit, batch, answers)
            results["tasks"].setdefault(name, {})[who] = figures | {"chance": chance}
            write_atomically(out, json.dumps(results, indent=2) + "\n")
        del model
    return results


@contextmanager
def _answers(out: Path, who: str) -> Iterator[Path]:
    """The database of a model's answers, which is of no use once they are scored."""
    path = out.with_name(f"{out.stem}-{who}-answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def table(results: dict) -> Table:
    """A row for each task: what each model reaches, and what is kept of what is above chance."""
    shown = Table("task", "items", "figure", title="with standard errors", title_justify="left")
    models = list(dict.fromkeys(who for by_model in results["tasks"].values() for who in by_model))
    for who in models:
        shown.add_column(who, justify="right")
    both = {TEACHER, CONVERTED} <= {*models}
    for column in ("difference", "kept above chance") if both else ():
        shown.add_column(column, justify="right")
    means = {who: [] for who in models}
    for name, by_model in results["tasks"].items():
        first = next(iter(by_model.values()))
        figure = next((figure for figure in FIGURES if figure in first), None)
        if figure is None:
            continue
        cells = []
        for who in models:
            found = by_model[who]
            means[who].append(found[figure])
            cells.append(f"{found[figure]:.1%} ± {found[f'{figure}_stderr']:.1%}")
        if both:
            cells += _compared(*(by_model[who][figure] for who in (TEACHER, CONVERTED)), first["chance"])
        shown.add_row(name, str(first["items"]), figure, *cells)
    shown.add_section()
    shown.add_row("mean", "", "", *(f"{fmean(values):.1%}" if values else "" for values in means.values()))
    return shown


def _compared(teacher: float, converted: float, chance: float | None) -> list[str]:
    above = None if chance is None else teacher - chance
    # Of a teacher that guesses nothing is left to keep.
    kept = f"{(converted - chance) / above:.0%}" if above is not None and above > 0 else "-"
    return [f"{converted - teacher:+.1%}", kept]
