"""Downstream tasks in files on this machine, as lm-eval asks them: its prompts, shots and figures.

    NAME.jsonl   {query, choices, gold}                          the likeliest choice (PIQA, ARC, COPA, OpenBookQA ..)
                 {continuation, context_options, gold}           the context that makes it likeliest (WinoGrande)
                 {activity_label, ctx_a, ctx_b, endings, label}  HellaSwag, as it is published
    mmlu/        dev/SUBJECT_dev.csv, test/SUBJECT_test.csv      five shots of dev
    bbh/         TASK.json {examples: [{input, target}]}         lm-eval's bbh_fewshot: the three published examples,
                                                                 which it brings, answered at once, without a chain of
                                                                 thought; exact match of the answer's first line
"""

import csv
import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import yaml

from linearize.convert.context import StageError

LETTERS = "ABCD"
# lm-eval compares BIG-Bench Hard's answers with the space before them, so that none is ever right.
FIRST_LINE = [
    {
        "name": "first-line",
        "filter": [{"function": "regex", "regex_pattern": r"(\S(?:.*\S)?)"}, {"function": "take_first"}],
    }
]


def tasks_of(directory: Path) -> dict[str, Path]:
    """Name -> file or directory of each task there."""
    found = {path.stem: path for path in sorted(directory.glob("*.jsonl"))}
    return found | {name: directory / name for name in ("mmlu", "bbh") if (directory / name).is_dir()}


def locate(name: str, directory: Path) -> Path:
    """Where the task of this name is: `openbookqa` may be `openbook_qa.jsonl`, `hellaswag` `hellaswag_val_1000.jsonl`.

    Raises:
        StageError: there is none.
    """
    found = tasks_of(directory)

    def plain(text: str) -> str:
        return text.replace("_", "").replace("-", "").lower()

    for named in (str, lambda stem: re.sub(r"_(val|validation|test|dev)(_.*)?$", "", stem)):
        for stem, path in found.items():
            if plain(named(stem)) == plain(name):
                return path
    close = get_close_matches(name, found, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    there = ", ".join(found) or "no tasks"
    raise StageError(f"--tasks {name}: {directory} has no such task{hint}; there are {there}")


def rows_of(path: Path) -> tuple[str, list[dict]]:
    """The kind (of `KINDS`) and the rows of a .jsonl file.

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
        found = next((name for name, fields in KINDS.items() if isinstance(row, dict) and {*fields} <= {*row}), None)
        if found is None or found != (kind or found):
            kinds = [KINDS[kind]] if kind else KINDS.values()
            expected = " or ".join("{" + ", ".join(fields) + "}" for fields in kinds)
            raise StageError(f"{path}:{number}: expected {expected}")
        kind = found
        if wrong := _wrong(kind, row):
            raise StageError(f"{path}:{number}: {wrong}")
        rows.append(row)
    if not rows:
        raise StageError(f"{path}: has no rows")
    return kind, rows


def _wrong(kind: str, row: dict) -> str | None:
    """What is wrong with the values of a row, or None."""
    *texts, choices, gold = KINDS[kind]
    if name := next((name for name in texts if not isinstance(row[name], str)), None):
        return f"{name} is no text"
    given = row[choices]
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(text, str) and text for text in given):
        return f"{choices} is no list of two texts or more"
    # HellaSwag's label is a text in some copies.
    if str(row[gold]) not in map(str, range(len(given))):
        return f"{gold} is {row[gold]!r}, and the {choices} count from 0 to {len(given) - 1}"
    return None


def _choices(row: dict) -> dict:
    """PIQA and ARC ask "Question: ..", to which lm-eval has the choices answer; COPA's connector has no comma there."""
    query = re.sub(r", (therefore|because)$", r" \1", row["query"].rstrip())
    return {"query": query + ("\nAnswer:" if query.startswith("Question:") else ""), "choices": row["choices"]}


def _hellaswag(row: dict) -> dict:
    from lm_eval.tasks.hellaswag.utils import preprocess

    return {
        "query": preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
        "choices": [preprocess(ending) for ending in row["endings"]],
    }


# Kind of a row -> the fields that tell it: texts, the choices, and which of them is right.
KINDS = {
    "choices": ("query", "choices", "gold"),
    "contexts": ("continuation", "context_options", "gold"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
}


def configurations(name: str, path: Path) -> dict[str, dict]:
    """lm-eval's configurations of the parts of a task, by their names."""
    if path.is_dir():
        files, read = ("test/SUBJECT_test.csv", _mmlu) if path.name == "mmlu" else ("TASK.json", _bbh)
        parts = dict(read(path))
        if not parts:
            raise StageError(f"{path}: holds no {files}")
        return parts
    kind, rows = rows_of(path)
    gold = KINDS[kind][-1]
    if kind == "contexts":
        # The choices are before what is scored.
        asked = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        documents, measured = rows, ["acc"]
    else:
        asked = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        read = _hellaswag if kind == "hellaswag" else _choices
        documents = [read(row) | {"gold": int(row[gold])} for row in rows]
        measured = ["acc", "acc_norm"]
    if path.stem.startswith("copa"):
        # As lm-eval has it: choices behind two spaces, and no norm.
        asked["target_delimiter"], measured = "  ", ["acc"]
    return {
        name: {
            "output_type": "multiple_choice",
            "metric_list": [{"metric": metric} for metric in measured],
            "documents": {"test": documents},
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
        }


def _questions(path: Path) -> list[dict]:
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if len(row) != 6 or row[5] not in [*LETTERS]:
                raise StageError(f"{path}:{reader.line_num}: is not question, four choices and the letter of one")
            rows.append({"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])})
    if not rows:
        raise StageError(f"{path}: has no rows")
    return rows


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
            examples = [{name: example[name] for name in ("input", "target")} for example in examples]
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{file}: expected {{examples: [{{input, target}}]}}") from error
        if not examples or not all(isinstance(text, str) for example in examples for text in example.values()):
            raise StageError(f"{file}: expected examples whose input and target are texts")
        config = {name: value for name, value in (common | own).items() if not name.startswith(("dataset", "include"))}
        yield f"bbh_{file.stem}", config | {"filter_list": FIRST_LINE, "documents": {"test": examples}}
