"""One run of a recipe: its directory, what each stage left there, and what every stage asks for."""

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer

from linearize import __version__
from linearize.recipes.model import package_file
from linearize.recipes.schema import Recipe

# Which parts of a recipe each stage reads, besides what it gets from the stages before it.
STAGE_INPUTS: dict[str, tuple[str, ...]] = {
    "load": ("model.source", "model.revision", "model.dtype", "model.tokenizer"),
    "install": ("attention", "keep"),
    # Heads' errors are measured on held-out text, too, but for another one nobody trains again.
    "transfer": ("transfer", "data.train", "seed"),
    "finetune": ("finetune", "data.train", "seed"),
    "medusa": ("medusa", "data.train", "data.heldout", "evaluate.tokens", "seed"),
    "evaluate": ("evaluate", "data.heldout"),
    "export": ("export", "name", "model.license", "model.license_link", "model.base_model"),
    "push": ("push",),
}
STAGES = tuple(STAGE_INPUTS)
# Those that read data.
READERS = ("transfer", "finetune", "evaluate")
STATE = "state.json"
OPTIONAL = ("transfer", "finetune", "medusa", "evaluate", "export", "push")


@dataclass(frozen=True)
class Artifact:
    """What a stage returns: its directory, and figures for `state.json`."""

    directory: Path
    metrics: dict[str, Any] = field(default_factory=dict)


class StageError(ValueError):
    """A stage cannot run; one sentence says why and what would work."""


class DiskError(StageError):
    """A disk takes no more, which one process of several may find before the others do."""


@dataclass
class Context:
    """What stages are given.

    Attributes:
        recipe: what to do.
        directory: where the stages' directories are.
        console: where progress is shown.
    """

    recipe: Recipe
    directory: Path
    console: Console

    def stages(self) -> list[str]:
        """The stages of this recipe, in order."""
        left_out = {name for name in OPTIONAL if getattr(self.recipe, name) is None}
        if self.recipe.attention is None:
            left_out.add("install")
        return [name for name in STAGES if name not in left_out]

    def stage_directory(self, stage: str) -> Path:
        return self.directory / stage

    def state(self, stage: str) -> dict[str, Any] | None:
        """What `state.json` of a stage says, None where it never began.

        Raises:
            StageError: it is no JSON.
        """
        return read_state(self.stage_directory(stage))

    def write_state(self, stage: str, status: str, metrics: dict[str, Any]) -> None:
        state = {
            "stage": stage,
            "status": status,
            "input_hash": self.input_hash(stage),
            "versions": {
                "linearize": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "metrics": metrics,
        }
        write_atomically(self.stage_directory(stage) / STATE, json.dumps(state, indent=2) + "\n")

    def input_hash(self, stage: str) -> str:
        """Changes when anything does that the result of `stage` follows from: the recipe's parts for it and for the
        stages before it, and the local files that these name."""
        names = self.stages()
        upto = names[: names.index(stage) + 1]
        inputs = {name: STAGE_INPUTS[name] for name in upto}
        if "install" in inputs and self.recipe.keep is not None and self.recipe.keep.kv_budget is not None:
            inputs["install"] += ("data.train",)
        if self.recipe.model.head != "causal-lm":
            inputs["load"] += ("model.head",)
        if self.recipe.model.config is not None:
            inputs["load"] += ("model.config", "seed")
        if self.recipe.model.head == "sequence-classification":
            # Which classes there are, and the weights that tell them, at first.
            inputs["load"] += ("model.labels", "data.train", "seed")
        if self.recipe.data.has_examples:
            inputs |= {name: (*inputs[name], "data.answer_length") for name in inputs if name in READERS}
        parts = {name: [_part(self.recipe.model_dump(), path) for path in paths] for name, paths in inputs.items()}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for file in sorted(_local_files(parts)):
            status = os.stat(file)
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.stage_directory("load") / "tokenizer")

    @cached_property
    def training_documents(self) -> list:
        """The training data's `data.Documents`, one per source, shared by the stages that train."""
        from linearize.convert.data import Documents

        return [Documents(source, self.tokenizer) for source in self.recipe.data.train]

    @cached_property
    def labels(self):
        """`examples.Labels` of a model that tells classes, else None."""
        from linearize.convert.examples import Labels

        names = self.state("load")["metrics"].get("labels")
        return None if names is None else Labels(names)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_state(directory: Path) -> dict[str, Any] | None:
    """What `state.json` of a stage's directory says, None where there is none.

    Raises:
        StageError: it is no JSON.
    """
    path = directory / STATE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StageError(f"{path}: is damaged ({error}); --from {directory.name} makes it again") from error


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either what it held or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, "utf-8")
    put(temporary, path)


def put(temporary: Path, path: Path) -> None:
    """Give a written file its name once all of it is on the disk, which may have no room for it until then."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def disk_errors_named(directory: Path) -> Iterator[None]:
    """What a disk refuses inside is told by the directory that was written to.

    Raises:
        DiskError: it is full, or a file larger than it may be.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise DiskError(
            f"{directory}: cannot be written ({reason}); make room, and --resume goes on from what was saved before"
        ) from error


def _disk_error(error: Exception) -> str | None:
    """What a disk has said, of an error of one of the libraries that write files; None of others."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.strerror if error.errno in full else None
    text = str(error)
    # Safetensors and tokenizers, which are written in Rust.
    if code := re.search(r"\(os error (\d+)\)", text):
        return os.strerror(int(code[1])) if int(code[1]) in full else None
    # Torch says no more of what it does not write to the end.
    if "iostream error" in text or "unexpected pos" in text or "PytorchStreamWriter" in text:
        return "torch could not write a file to its end"
    return None


def _part(recipe: dict[str, Any], path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = None if value is None else value[key]
    return value


def _local_files(value: Any) -> set[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*(_local_files(item) for item in value))
    if not isinstance(value, str):
        return set()
    path = package_file(value) if value.startswith("package:") else Path(value).expanduser()
    files = path.iterdir() if path.is_dir() else [path]
    return {str(file.resolve()) for file in files if file.is_file()}
