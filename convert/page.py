"""The report of a run: one HTML file of what its stages have measured, which needs nothing but itself to be read."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from linearize.convert.context import STAGES, StageError, read_state, write_atomically
from linearize.convert.pipeline import RESOLVED
from linearize.convert.plan import PLAN, Plan, count_text, load_plan, memory_by_context, size_text
from linearize.hub.figures import COLOURS, describe, drawings, svg
from linearize.hub.measured import chosen_tree, columns, converted, of_examples, ratio, reference, rows

REPORT = "report.html"
# Of which the page's first lines tell how much memory it takes.
LONG_CONTEXT = 32768
# Section of the page -> its title and the figures that belong to it.
SECTIONS = {
    "quality": ("Quality", ("perplexity", "recall", "passkey")),
    "attention": ("Attention", ("transfer_error", "far_attention")),
    "training": ("Training", ("transfer_loss", "layer_losses", "finetune_loss", "medusa_loss")),
    "speed": ("Speed and memory", ("speed", "memory")),
    "speculation": ("Speculation", ("guesses", "draft_tree")),
    "recipe": ("Recipe and data", ()),
    "commands": ("Commands", ()),
}


@dataclass(frozen=True)
class Plot:
    """A figure as the page shows it: an `<svg>` element and the same in words, or why there is none."""

    element: Markup
    words: str
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """What a run's directory holds.

    Attributes:
        recipe: the text of its recipe.
        states: stage -> its `state.json`, of the stages that were begun.
    """

    directory: Path
    recipe: str
    states: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """
        Raises:
            StageError: there is no run, or a file of it is damaged.
        """
        recipe = directory / RESOLVED
        if not recipe.is_file():
            raise StageError(f"{directory}: holds no run; name the directory that linearize convert printed")
        states = {stage: read_state(directory / stage) for stage in STAGES}
        return cls(directory, recipe.read_text("utf-8"), {stage: it for stage, it in states.items() if it is not None})

    @cached_property
    def metrics(self) -> dict[str, dict]:
        """stage -> metrics, of the finished ones."""
        return {stage: state["metrics"] for stage, state in self.states.items() if state["status"] == "done"}

    @cached_property
    def plan(self) -> Plan | None:
        return load_plan(self.directory) if (self.directory / PLAN).is_file() else None

    @property
    def versions(self) -> dict[str, str]:
        """library -> the versions that the stages ran with."""
        found: dict[str, dict[str, None]] = {}
        for state in self.states.values():
            for library, version in state["versions"].items():
                found.setdefault(library, {})[version] = None
        return {library: ", ".join(versions) for library, versions in found.items()}


def write_report(directory: Path, console: Console, out: Path | None = None) -> Path:
    """Write the report of the run in `directory`, there or to `out`, and say where it lacks a figure.

    Raises:
        StageError: there is no run, or a file of it is damaged.
    """
    run, path = Run.read(directory), out or directory / REPORT
    figures, problems = drawings(run.metrics)
    for name, problem in problems.items():
        console.print(f"{path}: figure {name} is missing: {problem}", markup=False, highlight=False)
    plots = {name: Plot(Markup(svg(figure, name)), describe(figure)) for name, figure in figures.items()}
    plots |= {name: Plot(Markup(), "", problem) for name, problem in problems.items()}
    write_atomically(path, page(run, plots))
    return path


def page(run: Run, plots: dict[str, Plot]) -> str:
    """The report's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count_text, "size": size_text}
    recipe = yaml.safe_load(run.recipe)
    new = recipe["model"].get("config")
    evaluated, medusa = run.metrics.get("evaluate"), run.metrics.get("medusa")
    kept = {layer: heads for layer, heads in run.metrics.get("install", {}).get("kept_heads", {}).items() if heads}
    table = rows(evaluated) if evaluated else []
    shown = {
        "quality": bool(table),
        "attention": bool(kept),
        "speed": run.plan is not None,
        "speculation": medusa is not None,
        "recipe": True,
        "commands": True,
    }
    return environment.get_template("page.html").render(
        colours=COLOURS,
        commands=_commands(run),
        contexts=memory_by_context(run.plan) if run.plan else [],
        columns=columns(table),
        converted=converted(evaluated) if evaluated else None,
        headline=list(_headline(run)),
        kept=kept,
        medusa=medusa,
        model=recipe["model"].get("base_model") or recipe["model"]["source"] or f"A new {new['model_type']}",
        new=new,
        model_directory=repr(str(run.directory / "export" / "model")),
        plots=plots,
        recipe=recipe,
        reference=reference(evaluated) if evaluated else None,
        run=run,
        sections={
            name: title
            for name, (title, figures) in SECTIONS.items()
            if shown.get(name) or any(figure in plots for figure in figures)
        },
        table=table,
        trained={stage.stage: stage for stage in run.plan.stages} if run.plan else {},
    )


def _headline(run: Run) -> Iterator[tuple[str, str]]:
    """(figure, what it is) of what is asked first."""
    if evaluated := run.metrics.get("evaluate"):
        name, teacher = converted(evaluated), reference(evaluated)
        for length in evaluated["tokens"]:
            if (times := ratio(evaluated, name, length)) is not None:
                yield f"{times:.2f} ×", f"perplexity of the {teacher}, in windows of {length} tokens"
        for length, cosine in evaluated["models"][name].get("embedding", {}).items():
            yield f"{cosine['mean']:.3f}", f"cosine to the teacher's mean hidden state, of texts of {length} tokens"
        for column, cell in of_examples(evaluated["models"][name]).items():
            yield cell, f"{column}, on held-out examples"
        for size, figures in evaluated["models"][name].get("copying", {}).items():
            beside = ""
            if teacher and size in evaluated["models"][teacher].get("copying", {}):
                beside = f"; teacher {evaluated['models'][teacher]['copying'][size]['accuracy']:.0%}"
            yield f"{figures['accuracy']:.0%}", f"of a text of {size} tokens copied when it is said again{beside}"
    if run.plan and run.plan.state_bytes and run.plan.kv_bytes:
        _, softmax, held = next(row for row in memory_by_context(run.plan) if row[0] == LONG_CONTEXT)
        yield f"{softmax / held:.1f} ×", f"less memory than the KV cache of {LONG_CONTEXT} tokens"
    if medusa := run.metrics.get("medusa"):
        yield f"{chosen_tree(medusa)['tokens']:.2f}", "tokens expected per step of speculation, one sequence at a time"


def _commands(run: Run) -> dict[str, str]:
    """What it does -> command."""
    directory = shlex.quote(str(run.directory))
    commands = {"run it again, elsewhere": f"linearize convert {shlex.quote(str(run.directory / RESOLVED))} --out NEW"}
    # Encoders, which have no cache, neither talk nor are measured without their teacher.
    if "export" in run.metrics and not (run.plan and not run.plan.kv_bytes):
        commands["talk to the model"] = f"linearize chat {directory}"
        if "medusa" in run.metrics:
            commands["talk to it with speculation"] = f"linearize chat {directory} --speculative"
        commands["measure it on a text of yours"] = f"linearize evaluate {directory} --data FILE.txt"
    commands["write this page again"] = f"linearize report {directory}"
    return commands
