"""Downstream tasks by lm-eval, from files on this machine (`local_tasks`) or from the Hub: a model, and its teacher
beside it.

The results file holds, by task and model, `acc` (`acc_norm`, `exact_match`) with their standard errors and a digit for
each item, right or wrong; what else lm-eval measures; `items`, and the `chance` of guessing. What it holds is not
measured again; answers that a task had before an interruption are in a database beside it.
"""

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from linearize.convert.context import StageError, write_atomically
from linearize.convert.local_tasks import configurations, locate
from linearize.convert.measures import BATCH_TOKENS
from linearize.convert.sources import first_line

TEACHER = "teacher"
CONVERTED = "converted"
# What is told of a task: the first of these that it has.
FIGURES = ("acc_norm", "acc", "exact_match")
# A margin above chance of so many standard errors is one of which a share can be told.
CLEAR = 2


def prepare(names: list[str], directory: Path | None) -> tuple[dict[str, list], object]:
    """Name -> lm-eval's tasks, or its group of them, in the order of `names`; and what knows the rest of lm-eval's
    tasks, which takes long to list.

    Args:
        directory: with the tasks' files; None: lm-eval's own tasks, by their names.

    Raises:
        StageError: a task is not there, or its files are not what they should be, or the Hub does not answer.
    """
    if not names:
        raise StageError("--tasks: names no task")
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise StageError("lm-eval is not installed; pip install linearize[eval]") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if directory is None:
        manager, found = TaskManager(), {}
        known = manager.all_tasks
        for name in names:
            if name not in known:
                close = ", ".join(get_close_matches(name, known, n=3))
                hint = f"; did you mean {close}?" if close else ""
                raise StageError(f"--tasks {name}: lm-eval has no such task{hint}")
        for name in names:
            try:
                loaded = manager.load([name])
            except OSError as error:
                raise StageError(f"--tasks {name}: {first_line(error)}; --data DIRECTORY reads files") from error
            group = loaded["groups"].get(name)
            found[name] = [group] if group else [*loaded["tasks"].values()]
        return found, manager
    if not directory.is_dir():
        raise StageError(f"--data {directory}: is no directory")
    from datasets import Dataset

    found = {}
    for name in names:
        found[name] = tasks = []
        for part, config in configurations(name, locate(name, directory)).items():
            splits = {split: Dataset.from_list(rows) for split, rows in config.pop("documents").items()}
            given = {"test_split": "test"} | config | {"task": part}
            # lm-eval asks for the documents itself.
            tasks.append(ConfigurableTask(config=given | {"custom_dataset": lambda splits=splits, **_: splits}))
    return found, TaskManager(include_defaults=False)


def evaluate(
    model: PreTrainedModel, tokenizer, tasks: list, manager, limit: int | None, batch: int | None, answers: Path
) -> dict:
    """Figures of one task, of several parts the means over their items.

    Args:
        tasks, manager: as `prepare` has them.
        limit: items of each part at most.
        batch: requests at once; None: as many as fit a GPU's memory, on a CPU `BATCH_TOKENS` tokens.
        answers: a database of answers that are not asked for again.
    """
    from lm_eval import simple_evaluate

    size = batch or ("auto" if next(model.parameters()).device.type == "cuda" else None)
    # What it says of batches goes where it says all else.
    with redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=_wrapped(model, tokenizer, size), tasks=tasks, task_manager=manager, limit=limit,
            use_cache=str(answers), bootstrap_iters=0,
        )  # fmt: skip
    return figures_of(results)


def _wrapped(model: PreTrainedModel, tokenizer, batch: int | str | None):
    """lm-eval's wrapper of a model; batch None: batches of about `BATCH_TOKENS` tokens, whatever the task."""
    from lm_eval.models.huggingface import HFLM

    class ByTokens(HFLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            self._fit(["".join(request.args) for request in requests])
            return super().loglikelihood(requests, disable_tqdm)

        def generate_until(self, requests, disable_tqdm=False):
            self._fit([request.args[0] for request in requests])
            return super().generate_until(requests, disable_tqdm)

        def _fit(self, texts: list[str]) -> None:
            longest = len(self.tok_encode(max(texts, key=len)))
            self.batch_size_per_gpu = max(1, BATCH_TOKENS[self.device.type] // longest)

    if batch is None:
        return ByTokens(pretrained=model, tokenizer=tokenizer)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def figures_of(results: dict) -> dict:
    """What the results file holds of lm-eval's results of one task, or of the parts of one."""
    samples = {part: rows for part, rows in results["samples"].items() if rows}
    items = {part: len({row["doc_id"] for row in rows}) for part, rows in samples.items()}
    total = sum(items.values())
    # Of parts within parts, the outermost.
    inner = {child for children in results["group_subtasks"].values() for child in children}
    whole = next((found for name, found in results.get("groups", {}).items() if name not in inner), {})
    # Behind the comma is what is done to answers before they are scored; lm-eval puts the strictest first.
    keys: dict[str, str] = {}
    for part in (whole, *(results["results"][part] for part in samples)):
        for key in part:
            if "," in key and "_stderr" not in key:
                keys.setdefault(key.partition(",")[0], key)
    figures: dict = {"items": total}
    for figure, key in keys.items():
        values = [results["results"][part].get(key) for part in samples]
        if None in values:
            continue
        figures[figure] = whole.get(key, sum(n * x for n, x in zip(items.values(), values, strict=True)) / total)
        if figure in FIGURES:
            # Of a share of so many items, whatever the parts.
            figures[f"{figure}_stderr"] = math.sqrt(figures[figure] * (1 - figures[figure]) / max(1, total - 1))
            step = key.partition(",")[2]
            rows = [row for part in samples.values() for row in part if row["filter"] == step]
            figures[f"{figure}_of_items"] = "".join(str(int(row[figure])) for row in rows)
    kinds = {results["configs"][part]["output_type"] for part in samples}
    guessed = [1 / len(row["arguments"]) for rows in samples.values() for row in rows]
    figures["chance"] = fmean(guessed) if kinds == {"multiple_choice"} else None
    return figures


def identity(directory: Path) -> str:
    """Of a model's directory: changes when another model is written to it."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*")):
        if file.suffix in (".json", ".safetensors", ".bin"):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{directory.resolve()} {digest.hexdigest()[:16]}"


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
            with torch.inference_mode(), _answers(out, who, settings) as answers:
                figures = evaluate(model, tokenizer, prepared[name], manager, limit, batch, answers)
            results["tasks"].setdefault(name, {})[who] = figures
            write_atomically(out, json.dumps(results, indent=2) + "\n")
        del model
    return results


@contextmanager
def _answers(out: Path, who: str, settings: dict) -> Iterator[Path]:
    """The database of a model's answers, which is of no use once they are scored, and to no other model."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = out.with_name(f"{out.stem}-{who}-{digest}-answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def table(results: dict) -> Table:
    """A row for each task: what each model reaches, and what is kept of what is clearly above chance."""
    shown = Table("task", "items", "figure", title="with standard errors", title_justify="left")
    models = list(dict.fromkeys(who for by_model in results["tasks"].values() for who in by_model))
    for who in models:
        shown.add_column(who, justify="right")
    both = {TEACHER, CONVERTED} <= {*models}
    for column in ("difference", "kept above chance") if both else ():
        shown.add_column(column, justify="right")
    columns: list[list[tuple[float, float]]] = []
    for name, by_model in results["tasks"].items():
        first = next(iter(by_model.values()))
        figure = next((figure for figure in FIGURES if figure in first), None)
        if figure is None or by_model.keys() != {*models}:
            # What is no share, or not measured of both, has no place in the mean.
            for other in [figure] if figure else _others(first):
                shown.add_row(name, str(first["items"]), other, *_plain(by_model, models, other))
            continue
        cells = [(by_model[who][figure], by_model[who][f"{figure}_stderr"]) for who in models]
        kept = []
        if both:
            cells.append(difference(*(by_model[who][f"{figure}_of_items"] for who in (TEACHER, CONVERTED))))
            kept = [_kept(*(by_model[who] for who in (TEACHER, CONVERTED)), figure)]
        columns.append(cells)
        shown.add_row(name, str(first["items"]), figure, *_cells(cells, len(models)), *kept)
    if columns:
        shown.add_section()
        # Tasks have no items in common.
        means = [
            (fmean(value for value, _ in cells), math.hypot(*(error for _, error in cells)) / len(cells))
            for cells in zip(*columns, strict=True)
        ]
        shown.add_row("mean", "", "", *_cells(means, len(models)))
    return shown


def _cells(cells: list[tuple[float, float]], models: int) -> list[str]:
    """Of models, then of their difference."""
    signs = [""] * models + ["+"]
    return [f"{value:{sign}.1%} ± {error:.1%}" for (value, error), sign in zip(cells, signs, strict=False)]


def _others(figures: dict) -> list[str]:
    return [name for name, value in figures.items() if isinstance(value, float) and name != "chance"]


def _plain(by_model: dict, models: list[str], figure: str) -> list[str]:
    return [f"{by_model[who][figure]:.4g}" if who in by_model else "" for who in models]


def difference(teacher: str, converted: str) -> tuple[float, float]:
    """Mean and standard error of what the second gets right more often, of the same items: `_of_items` of both."""
    gained = [int(y) - int(x) for x, y in zip(teacher, converted, strict=True)]
    mean = fmean(gained)
    return mean, math.sqrt(fmean((x - mean) ** 2 for x in gained) / max(1, len(gained) - 1))


def _kept(teacher: dict, converted: dict, figure: str) -> str:
    """The share of the teacher's margin above chance; of a margin that may be luck nothing is told."""
    if teacher["chance"] is None or teacher[figure] - teacher["chance"] < CLEAR * teacher[f"{figure}_stderr"]:
        return "-"
    return f"{(converted[figure] - teacher['chance']) / (teacher[figure] - teacher['chance']):.0%}"
