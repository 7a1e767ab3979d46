"""Where models come from: a Hub id, a local directory, a GGUF file, or a file inside an installed package."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.recipes.schema import ModelSection, package_file


@dataclass(frozen=True)
class Source:
    """Arguments of transformers' `from_pretrained`.

    Attributes:
        path: Hub id or directory.
        gguf: name of a GGUF file in that directory, or None.
        revision: on the Hub, or None.
    """

    path: str
    gguf: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict:
        arguments = {"gguf_file": self.gguf, "revision": self.revision}
        return {name: value for name, value in arguments.items() if value is not None}


def locate(source: str, revision: str | None = None) -> Source:
    """What a recipe's `model.source` or `model.tokenizer` stands for."""
    path = package_file(source) if source.startswith("package:") else Path(source).expanduser()
    if path.suffix == ".gguf":
        return Source(str(path.parent), gguf=path.name)
    return Source(str(path) if path.is_dir() else source, revision=revision)


def load_config(source: Source):
    """The model's configuration; no weights are read.

    Raises:
        ValueError: transformers cannot find or read it.
    """
    try:
        return AutoConfig.from_pretrained(source.path, **source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.source: no model configuration at {source.path}: {_first_line(error)}") from error


def load_tokenizer(model: ModelSection):
    """The tokenizer of `model.tokenizer`, or the model's own.

    Raises:
        ValueError: transformers cannot find or read it.
    """
    source = locate(model.tokenizer) if model.tokenizer else locate(model.source, model.revision)
    field = "model.tokenizer" if model.tokenizer else "model.source"
    try:
        return AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: no tokenizer at {source.path}: {_first_line(error)}") from error


def check_weights(source: Source) -> None:
    """Open every safetensors header of a local directory.

    Raises:
        ValueError: naming the first file that is damaged.
    """
    for file in sorted(Path(source.path).glob("*.safetensors")) if Path(source.path).is_dir() else []:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.source: {file} is not a whole safetensors file: {_first_line(error)}") from error


def load_model(source: Source, dtype: str) -> PreTrainedModel:
    """The softmax model in evaluation mode, dense weights in `dtype`, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **source.arguments)
    if source.gguf:
        # transformers keeps regarding what came out of a GGUF file as quantized, and refuses to save it.
        dense = AutoModelForCausalLM.from_config(load_config(source), dtype=dtype)
        dense.load_state_dict(model.state_dict())
        dense.generation_config = model.generation_config
        model = dense
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
