"""The command line: one thin function per verb, here those that take a recipe or a run, in `verbs` those that take a
model. Heavy libraries are imported by the verbs that need them."""

import json as json_module
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from linearize import verbs
from linearize.convert.parent import REASON, end_with_parent
from linearize.recipes.loader import RecipeError, load_recipe, shipped_recipes
from linearize.terminal import BadInput, Json, console, quieten

app = typer.Typer(
    help="Turn a pretrained softmax transformer into one with augmented linear attention.",
    epilog="Begin with: linearize recipes; linearize recipes lora > mine.yaml; linearize check mine.yaml; "
    "linearize convert mine.yaml",
    context_settings={"max_content_width": 100},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
errors = Console(stderr=True, soft_wrap=True)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, such as transfer.steps=20.")]
Out = Annotated[Path | None, typer.Option("--out", help="Directory of the run instead of the recipe's output.")]


def _context(recipe: str, overrides: list[str] | None, out: Path | None, quiet: bool = False):
    loaded = load_recipe(recipe, overrides or [])
    quieten()
    from linearize.convert.context import Context

    return Context(loaded, out or Path(loaded.output).expanduser(), Console(stderr=True) if quiet else console)


@app.command()
def convert(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Run this stage and those after it again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted stage.")] = False,
    launch: Annotated[
        str, typer.Option(help="Start several processes: auto (one per GPU), none, accelerate or deepspeed.")
    ] = "auto",
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; without a GPU, so many on the CPU.")] = None,
):
    """Run a recipe, from checkpoint to published model.

    Its stages are load, install, transfer, finetune, medusa, evaluate, export and push. Finished ones are skipped.
    """
    context = _context(recipe, overrides, out)
    from linearize.convert.context import disk_errors_named
    from linearize.convert.launch import interruptions_named

    with interruptions_named(context.directory), disk_errors_named(context.directory):
        _convert(context, only, start, resume, launch, gpus)


def _convert(context, only: str | None, start: str | None, resume: bool, launch: str, gpus: int | None) -> None:
    from linearize.convert import processes
    from linearize.convert.launch import launch_workers, processes_wanted
    from linearize.convert.pipeline import run, stages_to_run
    from linearize.convert.plan import load_plan, make_plan, save_plan, show_memory, show_plan

    wanted = 1 if processes.launched() else processes_wanted(launch, gpus)
    processes.join()
    console.quiet = not processes.is_main()
    todo = processes.alone(stages_to_run, context, only, start, resume, max(wanted, processes.count()))
    if todo:
        plan = make_plan(context)
        if "push" in todo:
            from linearize.convert.push import check as check_push

            processes.alone(check_push, context)
        if wanted > 1:
            # What can be told before is told by this process.
            launch_workers(launch, wanted, sys.argv[1:], context.directory)
            return
        show_plan(plan, console)
        processes.alone(save_plan, plan, context.directory)
        run(context, todo, start)
    if (context.state("evaluate") or {}).get("status") == "done":
        from linearize.convert.report import results_table

        console.print(results_table(context.state("evaluate")["metrics"]))
    show_memory(load_plan(context.directory), console)
    from linearize.convert.page import REPORT, write_report

    report = context.directory / REPORT
    if todo or not report.is_file():
        processes.alone(write_report, context.directory, console)
    console.print(f"[bold]{context.directory}[/bold]", highlight=False)
    console.print(f"[bold]{report}[/bold]", highlight=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The directory of a run, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="File instead of the run's own report.html.")] = None,
):
    """Write the report of a run again, as one HTML file.

    Of what its stages have measured so far.
    """
    if out is not None:
        _check_report(out)
    quieten()
    from linearize.convert.context import disk_errors_named
    from linearize.convert.page import write_report

    with disk_errors_named(run):
        print(write_report(run, console, out))


def _check_report(out: Path) -> None:
    """
    Raises:
        BadInput: nothing can be written there, or something else is there.
    """
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no directory {out.parent}")
    if out.is_dir():
        raise BadInput(f"--out {out}: is a directory; name a file in it, such as {out / 'report.html'}")
    if out.exists() and '<meta name="generator" content="linearize">' not in out.read_text("utf-8", "replace"):
        raise BadInput(f"--out {out}: exists and is no report of linearize; choose another file")


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None, json: Json = False):
    """Say what a recipe will do and need.

    It is validated, the model's configuration and the beginning of the data are read, but no weights.
    """
    context = _context(recipe, overrides, None, quiet=json)
    from dataclasses import asdict

    from linearize.convert.plan import make_plan, show_memory, show_plan

    plan = make_plan(context)
    if json:
        print(json_module.dumps(asdict(plan), indent=2))
    else:
        show_plan(plan, console)
        show_memory(plan, console)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe.")] = None, json: Json = False):
    """List the shipped recipes, or show one."""
    shipped = shipped_recipes()
    if name is not None:
        if name not in shipped:
            raise BadInput(f"{name}: no shipped recipe of that name; there are {', '.join(shipped)}")
        text = shipped[name].read_text("utf-8")
        if json:
            print(json_module.dumps({"name": name, "yaml": text}))
        elif console.is_terminal:
            console.print(Syntax(text, "yaml", background_color="default"))
        else:
            print(text, end="")
        return
    about = {name: path.read_text("utf-8").splitlines()[0].lstrip("# ") for name, path in shipped.items()}
    if json:
        print(json_module.dumps(about, indent=2))
        return
    table = Table("recipe", "what it is for")
    for row in about.items():
        table.add_row(*row)
    console.print(table)


for verb in (verbs.chat, verbs.generate, verbs.bench, verbs.evaluate, verbs.tasks, verbs.push):
    app.command()(verb)
app.command(name="import")(verbs.import_)


@app.command()
def env(json: Json = False):
    """Show versions, devices, and which kernels are used."""
    from linearize.convert.environment import environment

    facts = environment()
    if json:
        print(json_module.dumps(facts, indent=2))
        return
    table = Table("", "")
    for name, value in facts.items():
        table.add_row(name, escape(value))
    console.print(table)


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2."""
    # Before torch is imported. Its threads would spin for milliseconds where they wait for each other, and beside
    # another process that does so on the same cores everything takes fifty times as long; alone, this costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if REASON in os.environ:
        end_with_parent(signal.SIGKILL)
    try:
        app()
    except (RecipeError, BadInput) as error:
        _fail(getattr(error, "problems", [str(error)]))
    except ValueError as error:
        # Torch is loaded by now; before that only the two above are raised.
        from linearize.convert.context import DiskError, StageError

        if not isinstance(error, StageError):
            raise
        _fail([str(error)], found_alone=isinstance(error, DiskError))


def _fail(problems: list[str], found_alone: bool = False) -> None:
    """End with what is wrong, which one process of several may have found, or all."""
    if reason := os.environ.get(REASON):
        Path(reason).write_text("\n".join([*problems, ""]), "utf-8")
        sys.exit(2)
    if os.environ.get("RANK", "0") != "0" and not found_alone:
        sys.exit(2)
    for problem in problems:
        errors.print(f"linearize: {problem}", markup=False, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
