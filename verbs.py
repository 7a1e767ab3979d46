"""Verbs that take a model: an exported one, a softmax model, or checkpoints that others published. `cli` registers
them."""

import json as json_module
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linearize.terminal import BadInput, Json, console, quieten

Model = Annotated[str, typer.Argument(help="A run's directory, an exported model's, or its id on the Hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a model from the Hub brings.")]
Prompts = Annotated[
    Path, typer.Option(help="JSON Lines, each with prompt, messages or turns.", exists=True, dir_okay=False)
]


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
    quieten()
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
    quieten()
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
    quieten()
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


def tasks(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names, with commas between them.")],
    data: Annotated[
        Path | None, typer.Option(help="Directory with the tasks' files; otherwise lm-eval's own, from the Hub.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The softmax model, likewise, to be measured beside.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task, of each part of it, at most.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Requests at once; as many as fit, on a CPU few.")] = None,
    out: Annotated[Path, typer.Option(help="Results, which are added to and not measured again.")] = Path("tasks.json"),
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
):
    """Measure a model on downstream tasks, by lm-eval.

    From local files, or from the Hub by lm-eval's names; interrupted, it goes on where it stopped.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    quieten()
    from linearize.convert import tasks as downstream
    from linearize.convert.exported import find

    models = {} if teacher is None else {downstream.TEACHER: find(teacher, linear=False)}
    models[downstream.CONVERTED] = find(model, trust_remote_code)
    names = list(dict.fromkeys(filter(None, map(str.strip, tasks.split(",")))))
    settings = {name: downstream.identity(found.path) for name, found in models.items()}
    settings |= {"data": None if data is None else str(data.expanduser().resolve()), "limit": limit, "dtype": dtype}
    results = downstream.run(
        {name: partial(found.load, dtype) for name, found in models.items()}, names,
        None if data is None else data.expanduser(), limit, batch, out.expanduser(), settings, Console(stderr=True),
    )  # fmt: skip
    if json:
        print(json_module.dumps(results, indent=2))
    else:
        console.print(downstream.table(results))


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
    quieten()
    from linearize.convert.importing import import_published

    import_published(
        checkpoints, base, out.expanduser(), console, format=format, alpha=alpha, window=window,
        window_size=window_size, softmax_layers=softmax_layer or (),
    )  # fmt: skip
    console.print(f"[bold]{out}[/bold]", highlight=False)


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

    from linearize.recipes.corpora import DataSource
    from linearize.recipes.evaluation import EvaluateSection

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
    quieten()
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
    quieten()
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
