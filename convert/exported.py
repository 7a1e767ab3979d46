"""Exported models, and softmax models to compare with, as the command line's verbs take them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME

from linearize.convert.context import StageError
from linearize.convert.sources import READ_ERRORS, check_weights, first_line

# An owner and a name.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Exported:
    """A model's directory.

    Attributes:
        name: what the user calls it.
        is_linear: whether it is a linearized model.
        has_heads: whether it has heads that guess ahead.
    """

    name: str
    path: Path
    is_linear: bool
    has_heads: bool

    def check(self) -> None:
        """
        Raises:
            StageError: a file of weights is missing or damaged.
        """
        with _problems_named(self.name):
            check_weights(self.path)

    def load(self, dtype: str = "auto") -> tuple[PreTrainedModel, object]:
        """Model, on the GPU where there is one, and tokenizer; code is run from linearized ones alone.

        Raises:
            StageError: a file is missing or damaged.
        """
        trusted = {"trust_remote_code": self.is_linear}
        self.check()
        with _problems_named(self.name):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **trusted)
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, **trusted).eval()
        return model.cuda() if torch.cuda.is_available() else model, tokenizer


def find(
    model: str, trust_remote_code: bool = False, linear: bool = True, heads: bool = False, on_hub: bool = True
) -> Exported:
    """What a run's directory, a model's, or a Hub id stands for; from the Hub it is downloaded.

    Args:
        trust_remote_code: code from the Hub may be run; that in local directories is the user's own.
        linear, heads: it is to be a linearized one, to have heads.
        on_hub: whether `model` may be a Hub id.

    Raises:
        StageError: there is none, or not such a one.
    """
    directory = Path(model).expanduser()
    local = next((path for path in (directory / "export" / "model", directory) if (path / CONFIG_NAME).is_file()), None)
    if local is None and not (on_hub and HUB_ID.fullmatch(model) and not directory.exists()):
        raise StageError(f"{model}: holds no exported model; run linearize convert, or name a model's directory")
    with _problems_named(model):
        file = Path(hf_hub_download(model, CONFIG_NAME)) if local is None else local / CONFIG_NAME
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise StageError(f"{file}: is no JSON ({error})") from error
    exported = Exported(model, file.parent, "linear_attention" in config, "medusa" in config)
    if linear and not exported.is_linear:
        raise StageError(f"{model}: is not a linearized model; run linearize convert first")
    auto = [name for name in config.get("auto_map", {}) if name != "AutoConfig"]
    if exported.is_linear and auto != ["AutoModelForCausalLM"]:
        raise StageError(
            f"{model}: does not go on with a text, and is measured by its recipe; transformers' {auto[0]} loads it"
        )
    if heads and not exported.has_heads:
        raise StageError(f"{model}: has no Medusa heads; convert it with a medusa section, or leave --speculative out")
    if local is None:
        if exported.is_linear and not trust_remote_code:
            raise StageError(
                f"{model}: brings code of its own, which is run with --trust-remote-code alone; read it first, at "
                f"{constants.ENDPOINT}/{model}/tree/main"
            )
        with _problems_named(model):
            # The commit whose configuration was read.
            snapshot_download(model, revision=exported.path.name)
    return exported


@contextmanager
def _problems_named(model: str) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise StageError(f"{model}: cannot be used: {first_line(error)}") from error
