"""What a run has measured, read for people: the models by their names, and the rows of one table of them all.

`convert/evaluate.py` says what the results of stage evaluate hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

TEACHER = "teacher (softmax)"
TUNED_TEACHER = "teacher (softmax), finetuned alike"
# What a model that is measured at all is measured by, one of them.
FIRST = ("text", "embedding", "classes", "answers")
# measure -> what its size counts.
SHARES = {"copying": "tokens", "passkey": "tokens", "recall": "pairs"}


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        group: `models` or `ablations`.
        cells: column -> figure, of what was measured on it.
    """

    name: str
    group: str
    cells: dict[str, str]


def converted(results: dict) -> str:
    """The name of the model that the run comes to: stages follow each other."""
    return list(results["models"])[-1]


def reference(results: dict) -> str | None:
    """The teacher that others are compared with: the one finetuned alike where there is one."""
    return next((name for name in (TUNED_TEACHER, TEACHER) if name in results["models"]), None)


def ratio(results: dict, name: str, length: str) -> float | None:
    """Perplexity of a model in windows of `length`, over that of `reference`."""
    teacher = reference(results)
    if teacher is None:
        return None
    of = {model: results["models"][model].get("text", {}).get(length) for model in (name, teacher)}
    return None if None in of.values() else of[name]["perplexity"] / of[teacher]["perplexity"]


def rows(results: dict) -> list[Row]:
    """Perplexity by length of the window, with its ratio to the teacher's in brackets, and shares of what was asked; of
    encoders, cosines to the teacher's by length of the text; of models that learn from examples, how they do those."""
    teacher = reference(results)
    compared = results["models"][teacher].get("text", {}) if teacher else {}

    def cells(figures: dict) -> dict[str, str]:
        row = {}
        for length, cosine in figures.get("embedding", {}).items():
            row[f"cosine @{length}"] = f"{cosine['mean']:.3f}"
        row |= of_examples(figures)
        for length, text in figures.get("text", {}).items():
            cell = f"{text['perplexity']:.2f}"
            if length in compared:
                cell += f" ({text['perplexity'] / compared[length]['perplexity']:.2f})"
            row[f"perplexity @{length}"] = cell
        for measure, unit in SHARES.items():
            for size, asked in figures.get(measure, {}).items():
                row[f"{measure}, {size} {unit}"] = f"{asked['accuracy']:.0%}"
        return row

    return [
        Row(name, group, cells(figures))
        for group in ("models", "ablations")
        for name, figures in results[group].items()
        # An ablation of what a model has not is not measured.
        if any(figures.get(name) for name in FIRST)
    ]


def of_examples(figures: dict) -> dict[str, str]:
    """Cells of what was measured on examples, column -> figure."""
    row = {}
    for told in figures.get("classes", {}).values():
        row["accuracy"] = f"{told['accuracy']:.1%}"
    for told in figures.get("answers", {}).values():
        row["perplexity of answers"] = f"{told['perplexity']:.2f}"
    for told in figures.get("rouge", {}).values():
        row |= {f"ROUGE-{name.removeprefix('rouge')}": f"{100 * share:.1f}" for name, share in told.items()}
    return row


def columns(table: list[Row]) -> list[str]:
    """Of all rows, in their order."""
    return list(dict.fromkeys(column for row in table for column in row.cells))


def measured_with(results: dict, measure: str, figure: Callable[[dict], dict]) -> dict[str, dict[str, dict]]:
    """size -> model -> what `figure` takes out of its figures, where that is not empty."""
    found: dict[str, dict[str, dict]] = {}
    for name, figures in results["models"].items():
        for size, values in figures.get(measure, {}).items():
            if taken := figure(values):
                found.setdefault(size, {})[name] = taken
    return found


def chosen_tree(medusa: dict) -> dict:
    """Of `tree_sizes`, the one that was chosen for one sequence at a time."""
    nodes = len(medusa["tree"]) + 1
    return next(size for size in medusa["tree_sizes"] if size["nodes"] == nodes)
