"""Checkpoints that others have published become an exported model, as stage export writes it."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearize.convert import sources
from linearize.convert.context import StageError
from linearize.convert.exported import HUB_ID
from linearize.hub.card import imported_card
from linearize.hub.export import export_model
from linearize.hub.published import (
    DIRECTORY_FILES,
    Base,
    Format,
    Published,
    Window,
    files_of,
    gather,
    published,
    window_of,
)
from linearize.layers.attending import UnsupportedModelError, head_shapes
from linearize.layers.seam import install
from linearize.recipes.model import ModelSection


def import_published(
    checkpoints: list[str],
    base: str,
    out: Path,
    console: Console,
    *,
    format: Format | None = None,
    alpha: float | None = None,
    window: Window | None = None,
    window_size: int | None = None,
    softmax_layers: Iterable[int] = (),
) -> Published:
    """Write the model that `checkpoints` make of `base` to `out`, adapters merged; returns what they hold.

    Args:
        checkpoints: files, directories or Hub ids.
        base: Hub id or directory.
        alpha: of the adapters, which no checkpoint holds; None: twice their rank, as all published ones have it.
        window, window_size: None takes what the files' names say, or what was published most.
        format, softmax_layers: as `hub.published.published` takes them.

    Raises:
        StageError: in one sentence, before anything is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StageError(f"{out}: is there already; name an empty directory by --out, or remove it")
    try:
        source = sources.locate(base)
        of_base = _describe(source)
        files = [file for checkpoint in checkpoints for file in files_of(_on_disk(checkpoint))]
        named_window, named_size = window_of(files)
        result = published(
            gather(files), of_base, format, window or named_window, window_size or named_size, softmax_layers
        )
        tokenizer = sources.load_tokenizer(ModelSection(source=base))
        model = sources.load_model(source, "auto")
    except (*sources.READ_ERRORS, UnsupportedModelError) as error:
        raise StageError(sources.first_line(error).replace("model.source:", "--base:")) from error
    apply(result, model, alpha)
    card = imported_card(out.name, base, checkpoints, result, alpha, sources.base_card(source))
    # Nobody takes half a model for one.
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        export_model(model, part, tokenizer=tokenizer, files={"README.md": card})
    except ValueError as error:
        raise StageError(f"{out}: the model could not be saved: {error}") from error
    if out.exists():
        out.rmdir()
    part.rename(out)
    for line in result.left_out:
        console.print(f"left out: {line}", highlight=False)
    return result


def _on_disk(checkpoint: str) -> Path:
    """A path, or where a model of the Hub was put."""
    path = Path(checkpoint).expanduser()
    patterns = [pattern for patterns in DIRECTORY_FILES for pattern in patterns]
    is_file = any(path.match(pattern) for pattern in patterns)
    if path.exists() or is_file or not HUB_ID.fullmatch(checkpoint):
        return path
    try:
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except sources.READ_ERRORS as error:
        raise ValueError(f"{checkpoint}: cannot be had from the Hub: {sources.first_line(error)}") from error


def _describe(source: sources.Source) -> Base:
    """The base's heads and weights; of a directory, headers alone are read.

    Raises:
        ValueError: its modules are not named as Llama's and Mistral's are, or a file of its weights is damaged.
    """
    config = sources.load_config(source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"--base: {type(config).__name__} is not that of a causal language model") from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    if name not in shapes:
        raise ValueError(
            f"--base: {source.path} is a {type(model).__name__}, which has no {name}; what is imported goes with "
            "models that name their modules as Llama and Mistral do"
        )
    if Path(source.path).is_dir():
        sources.check_weights(Path(source.path))
    return Base(source.path, head_shapes(model), shapes)


def apply(result: Published, model: PreTrainedModel, alpha: float | None = None) -> None:
    """Make of `model`, a softmax model, what `result` says, in place; `alpha` as of `import_published`."""
    install(model, result.config, result.kept)
    weights = model.state_dict()
    with torch.no_grad():
        for name, value in result.weights.items():
            weights[name].copy_(value)
        for name, (A, B) in result.adapters.items():
            scale = 2.0 if alpha is None else alpha / len(A)
            # Rounded once, to the dtype of the weight.
            weights[name].copy_(weights[name].float() + scale * B @ A)
        layers = model.linear_attentions()
        for index, values in result.attention.items():
            own = dict(layers[index].named_parameters())
            for name, value in values.items():
                own[name].copy_(value)
