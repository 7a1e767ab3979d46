"""The command line: one thin function per verb. Heavy libraries are imported by the verbs that need them."""

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

from linearize.convert.parent import REASON, end_with_parent
from linearize.recipes.loader import RecipeError, load_recipe, shipped_recipes

app = typer.Typer(
    help="Turn a pretrained softmax transformer into one with augmented linear attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()
errors = Console(stderr=True, soft_wrap=True)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, such as transfer.steps=20.")]
Out = Annotated[Path | None, typer.Option("--out", help="Directory of the run instead of the recipe's output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Model = Annotated[Path, typer.Argument(help="An exported model, or the directory of a run.")]


class BadInput(ValueError):
    """Something on the command line that cannot be used."""


def _context(recipe: str, overrides: list[str] | None, out: Path | None, quiet: bool = False):
    loaded = load_recipe(recipe, overrides or [])
    _quieten()
    from linearize.convert.context import Context

    return Context(loaded, out or Path(loaded.output).expanduser(), Console(stderr=True) if quiet else console)


def _quieten() -> None:
    """Progress is ours to show; libraries keep to errors."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Importing datasets to say so would take seconds, and text files do without it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
    """Run a recipe: load, install, transfer, finetune, medusa, evaluate, export."""
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
    """Write a run's report again: one HTML file of what its stages have measured so far."""
    if out is not None:
        _check_report(out)
    _quieten()
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
    """Validate a recipe and print what it will do and need; no weights are read."""
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


def _model_directory(directory: Path) -> Path:
    """The exported model in a run's directory, or the directory itself.

    Raises:
        BadInput: there is none.
    """
    for candidate in (directory / "export" / "model", directory):
        if (candidate / "config.json").is_file():
            return candidate
    raise BadInput(f"{directory}: holds no exported model; run linearize convert, or name a model's directory")


def _is_linear(path: Path) -> bool:
    return "linear_attention" in json_module.loads((path / "config.json").read_text("utf-8"))


def _has_heads(path: Path) -> bool:
    return "medusa" in json_module.loads((path / "config.json").read_text("utf-8"))


def _check_heads(path: Path) -> None:
    if not _has_heads(path):
        raise BadInput(f"{path}: has no Medusa heads; convert it with a medusa section, or leave --speculative out")


def _load(path: Path, dtype: str = "auto"):
    """Model and tokenizer of a model's directory; code is run from linearized ones alone."""
    linear = _is_linear(path)
    _quieten()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from linearize.convert.sources import READ_ERRORS, check_weights, first_line

    try:
        check_weights(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=linear)
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=linear, dtype=dtype).eval()
    except READ_ERRORS as error:
        raise BadInput(f"{path}: cannot be loaded: {first_line(error)}") from error
    return model.cuda() if torch.cuda.is_available() else model, tokenizer


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and stop.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the model's Medusa heads.")] = False,
    json: Json = False,
):
    """Talk to an exported model; greedy, streamed."""
    from linearize.convert.chat import reply

    path = _model_directory(model)
    if not _is_linear(path):
        raise BadInput(f"{path}: is not a linearized model; run linearize convert first")
    if speculative:
        _check_heads(path)
    loaded, tokenizer = _load(path)
    messages = []
    while True:
        if prompt is None:
            try:
                text = console.input("[bold]you[/bold]  ")
            except EOFError:
                return
        else:
            text = prompt
        messages.append({"role": "user", "content": text})
        if not json:
            console.print("[bold]model[/bold]  ", end="")
        answer, cache_bytes = reply(loaded, tokenizer, messages, max_new_tokens, not json, speculative)
        messages.append({"role": "assistant", "content": answer})
        if json:
            print(json_module.dumps({"reply": answer, "cache_bytes": cache_bytes}))
        else:
            grows = getattr(loaded.config, "kept_heads", None) and not loaded.config.linear_attention.get("kept_window")
            length = "so far" if grows else "whatever the length"
            console.print(f"[dim](cache: {cache_bytes / 2**20:.1f} MiB, {length})[/dim]")
        if prompt is not None:
            return


Prompts = Annotated[
    Path, typer.Option(help="JSON Lines, each with prompt, messages or turns.", exists=True, dir_okay=False)
]


@app.command()
def generate(
    model: Model,
    prompts: Prompts,
    out: Annotated[Path | None, typer.Option(help="Add JSON Lines there, of prompts it does not have.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: greedy.")] = 0.0,
    typical: Annotated[
        float | None, typer.Option(help="With --speculative, accept guesses likelier than this, or nearly so.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the model's Medusa heads.")] = False,
):
    """Answer the prompts of a file, many at once, as JSON Lines: prompt number, text, tokens, forward passes."""
    path = _model_directory(model)
    if not _is_linear(path):
        raise BadInput(f"{path}: is not a linearized model; run linearize convert first")
    if speculative:
        _check_heads(path)
    if typical is not None and not (speculative and temperature):
        raise BadInput("--typical is for sampling with guesses: add --speculative and a --temperature above 0")
    loaded, tokenizer = _load(path)
    import torch

    from linearize.convert.bench import answers, read_prompts

    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature, "top_k": None, "top_p": None} if temperature else {}
    if typical is not None:
        how["typical_acceptance"] = typical
    found = answers(
        loaded, tokenizer, read_prompts(prompts, tokenizer, None), batch_size, max_new_tokens, speculative, out,
        Console(stderr=True), **how,
    )  # fmt: skip
    for answer in found:
        if out is None:
            print(json_module.dumps(answer), flush=True)


@app.command()
def bench(
    model: Model,
    prompts: Prompts,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Prompts at once, 1; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts alone.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    teacher: Annotated[
        Path | None, typer.Option(help="The softmax model's directory, to be decoded beside by transformers.")
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(help="JSON list of paths of ranks, 10 for a copy, instead of the model's own tree.", exists=True),
    ] = None,
    json: Json = False,
):
    """Measure how fast a model generates, greedily, and with its Medusa heads: is the text the same?"""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    path = _model_directory(model)
    if not _is_linear(path):
        raise BadInput(f"{path}: is not a linearized model; run linearize convert first")
    loaded, tokenizer = _load(path, dtype)
    softmax = None if teacher is None else _load(_model_directory(teacher), dtype)[0]
    from linearize.convert.bench import compare, draft_with, read_prompts, table

    if tree is not None:
        _check_heads(path)
        draft_with(loaded, tree)

    asked, results = read_prompts(prompts, tokenizer, limit), {}
    for size in batch or [1]:
        results[size] = compare(loaded, asked, size, max_new_tokens, _has_heads(path), softmax)
    if json:
        print(json_module.dumps({"model": loaded.config.to_dict().get("medusa"), "results": results}, indent=2))
    else:
        console.print(table(results))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="An exported model, the directory of a run, or a softmax model's.")],
    data: Annotated[str, typer.Option(help="builtin:heldout, a local file or a dataset's Hub id.")] = "builtin:heldout",
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to measure on.")] = 8192,
    lengths: Annotated[list[int] | None, typer.Option(min=2, help="Of the windows, 1024; may be repeated.")] = None,
    copying: Annotated[int, typer.Option(min=0, help="Tokens of a text said again; 0: none.")] = 512,
    passkey: Annotated[list[int] | None, typer.Option(min=1, help="Tokens around a pass key; likewise.")] = None,
    recall: Annotated[list[int] | None, typer.Option(min=1, help="Number of key: value pairs; likewise.")] = None,
    speed: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of context to be timed after.")] = None,
    json: Json = False,
):
    """Measure a model on held-out data, a linearized one also without each branch; see evaluate in a recipe."""
    from pydantic import ValidationError

    from linearize.recipes.evaluation import EvaluateSection
    from linearize.recipes.schema import DataSource

    try:
        source = DataSource(source=data)
    except ValidationError as error:
        raise BadInput(f"--data {data}: {error.errors()[0]['msg']}") from None
    try:
        section = EvaluateSection(
            tokens=tokens,
            lengths=lengths or [1024],
            copying={"length": copying} if copying else None,
            passkey=passkey or [],
            recall=recall or [],
            speed=speed or [],
        )
    except ValidationError as error:
        raise BadInput(f"--{error.errors()[0]['ctx']['error']}") from None
    loaded, tokenizer = _load(_model_directory(model))
    from linearize.convert.data import token_stream
    from linearize.convert.evaluate import evaluate_model
    from linearize.convert.report import results_table

    stream = token_stream("--data", [source], tokenizer, tokens)
    try:
        results = evaluate_model(loaded, tokenizer, stream, section, Console(stderr=True) if json else console)
    except ValueError as error:
        raise BadInput(f"--{error}") from error
    if json:
        print(json_module.dumps(results, indent=2))
    else:
        console.print(results_table(results))


@app.command()
def env(json: Json = False):
    """Versions, devices, and which backends are used."""
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
