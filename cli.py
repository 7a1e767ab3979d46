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
    epilog="Begin with: linearize recipes; linearize recipes lora > mine.yaml; linearize check mine.yaml; "
    "linearize convert mine.yaml",
    context_settings={"max_content_width": 100},
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
Model = Annotated[str, typer.Argument(help="A run's directory, an exported model's, or its id on the Hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a model from the Hub brings.")]


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
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
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


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and stop.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the model's Medusa heads.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
):
    """Talk to an exported model.

    Greedy, streamed; without --prompt it goes on until the end of input.
    """
    _quieten()
    from linearize.convert.chat import reply
    from linearize.convert.exported import find

    loaded, tokenizer = find(model, trust_remote_code, heads=speculative).load()
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
    trust_remote_code: Trust = False,
):
    """Answer the prompts of a file, many at once.

    As JSON Lines: prompt number, text, tokens, forward passes.
    """
    if typical is not None and not (speculative and temperature):
        raise BadInput("--typical is for sampling with guesses: add --speculative and a --temperature above 0")
    _quieten()
    from linearize.convert.exported import find

    loaded, tokenizer = find(model, trust_remote_code, heads=speculative).load()
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
        str | None, typer.Option(help="The softmax model, likewise, to be decoded beside by transformers.")
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(help="JSON list of paths of ranks, 10 for a copy, instead of the model's own tree.", exists=True),
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
):
    """Measure how fast an exported model generates.

    Greedily, and with its Medusa heads: is the text the same?
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    _quieten()
    from linearize.convert.bench import compare, draft_with, read_prompts, table
    from linearize.convert.exported import find

    exported = find(model, trust_remote_code, heads=tree is not None)
    loaded, tokenizer = exported.load(dtype)
    softmax = None if teacher is None else find(teacher, linear=False).load(dtype)[0]
    if tree is not None:
        draft_with(loaded, tree)
    asked, results = read_prompts(prompts, tokenizer, limit), {}
    for size in batch or [1]:
        results[size] = compare(loaded, asked, size, max_new_tokens, exported.has_heads, softmax)
    if json:
        print(json_module.dumps({"model": loaded.config.to_dict().get("medusa"), "results": results}, indent=2))
    else:
        console.print(table(results))


@app.command(name="import")
def import_(
    checkpoints: Annotated[list[str], typer.Argument(help="Files, directories or Hub ids, such as both of LoLCATs'.")],
    base: Annotated[str, typer.Option(help="Hub id or directory of the model that they were trained on.")],
    out: Annotated[Path, typer.Option(help="Directory for the model; it must not be there yet.")],
    format: Annotated[
        str | None, typer.Option(help="lolcats or linearized-llm, where names in the checkpoint do not tell.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, help="Of LoRA adapters; twice their rank, as published.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Of LoLCATs: terrace, or sliding where a file's name says wsw.")
    ] = None,
    window_size: Annotated[
        int | None, typer.Option(min=1, help="Of LoLCATs' window, or Linearized-LLM's groups; 64.")
    ] = None,
    softmax_layer: Annotated[list[int] | None, typer.Option(min=0, help="Not converted; may be repeated.")] = None,
):
    """Take over what LoLCATs or Linearized-LLM published.

    Their checkpoints and the base model become an exported model.
    """
    for name, value, choices in (
        ("format", format, (None, "lolcats", "linearized-llm")),
        ("window", window, (None, "terrace", "sliding")),
    ):
        if value not in choices:
            raise BadInput(f"--{name} {value}: expected {' or '.join(filter(None, choices))}")
    _quieten()
    from linearize.convert.importing import import_published

    import_published(
        checkpoints, base, out.expanduser(), console, format=format, alpha=alpha, window=window,
        window_size=window_size, softmax_layers=softmax_layer or (),
    )  # fmt: skip
    console.print(f"[bold]{out}[/bold]", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's directory, a model's, linear or softmax, or its Hub id.")],
    data: Annotated[str, typer.Option(help="builtin:heldout, a local file or a dataset's Hub id.")] = "builtin:heldout",
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to measure on.")] = 8192,
    lengths: Annotated[list[int] | None, typer.Option(min=2, help="Of the windows, 1024; may be repeated.")] = None,
    copying: Annotated[int, typer.Option(min=0, help="Tokens of a text said again; 0: none.")] = 512,
    passkey: Annotated[list[int] | None, typer.Option(min=1, help="Tokens around a pass key; likewise.")] = None,
    recall: Annotated[list[int] | None, typer.Option(min=1, help="Number of key: value pairs; likewise.")] = None,
    speed: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of context to be timed after.")] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
):
    """Measure what a model keeps: perplexity, recall, memory.

    On held-out data, a linearized model also without each of its branches; as a recipe's section evaluate says.
    """
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
    _quieten()
    from linearize.convert.exported import find

    loaded, tokenizer = find(model, trust_remote_code, linear=False).load()
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
def push(
    model: Annotated[str, typer.Argument(help="A run's directory, or an exported model's.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub, created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created from main where there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; change nothing.")] = False,
    json: Json = False,
):
    """Publish an exported model on the Hugging Face Hub.

    After an interruption, only what is missing is sent.
    """
    from pydantic import ValidationError

    from linearize.recipes.schema import PushSection

    try:
        section = PushSection(repo=repo, private=private, revision=revision, create_pr=create_pr)
    except ValidationError as error:
        problem = error.errors()[0]
        raise BadInput(f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}") from None
    _quieten()
    from dataclasses import asdict

    from linearize.convert.exported import find
    from linearize.hub import push as hub

    exported = find(model, on_hub=False)
    exported.check()
    try:
        found = hub.plan(exported.path, section) if dry_run else hub.push(exported.path, section, progress=not json)
    except hub.PushError as error:
        raise BadInput(str(error)) from error
    if json:
        print(json_module.dumps(asdict(found), indent=2))
    elif dry_run:
        console.print(hub.plan_table(found))
    else:
        console.print(found.url if found.changed else f"unchanged: {found.url}", highlight=False, soft_wrap=True)


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
