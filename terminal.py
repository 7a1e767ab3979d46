"""What verbs of the command line share: where they print, what is wrong with what was typed, and quiet libraries."""

import os
import warnings
from typing import Annotated

import typer
from rich.console import Console

console = Console()
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


class BadInput(ValueError):
    """Something on the command line that cannot be used."""


def quieten() -> None:
    """Progress is ours to show; libraries keep to errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Importing datasets to say so would take seconds, and text files do without it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
