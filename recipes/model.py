"""What a recipe may say about the model: where it comes from, or what a new one is to be."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from linearize.recipes.fields import Section, Text

Dtype = Literal["float32", "bfloat16"]
Head = Literal["causal-lm", "masked-lm", "encoder", "seq2seq-lm", "sequence-classification"]

# What training does to texts so that the next tokens of others are recalled.
_FOR_TEXT = [
    ("recall", 0.0, "repeats parts of a text to have them predicted"),
    ("facts", 0.0, "plants facts in a text to have them predicted"),
    ("position_offset", 0, "positions begin at 0 where a token sees the whole text"),
]
_NEXT = "asks for next tokens, which an encoder does not make"
# Of models that learn from examples, each a text with a class or an answer.
_WRITTEN = "goes on with a text, which this model is not asked for"
_OF_EXAMPLES: dict[str, list[tuple[str | None, Any, str]]] = {
    "keep": [("kv_budget", None, "measures what is copied from far back, which this model is not asked for")],
    "transfer": [
        ("blocks_at_once", None, "goes through the blocks of a model that reads text alone"),
        ("curriculum", [], "examples are as long as they are"),
        *_FOR_TEXT,
    ],
    "finetune": [
        ("chunk", None, "goes through one text, chunk by chunk"),
        ("curriculum", [], "examples are as long as they are"),
        *_FOR_TEXT,
    ],
    "medusa": [(None, None, "heads guess next tokens of a text, which this model does not go on with")],
    "evaluate": [
        ("copying", None, _WRITTEN), ("passkey", [], _WRITTEN), ("recall", [], _WRITTEN), ("speed", [], _WRITTEN),
    ],
}  # fmt: skip
# Head -> section -> (field, the value that it must have, why); of a section that is refused whole, the field is None.
_REFUSED: dict[Head, dict[str, list[tuple[str | None, Any, str]]]] = {
    "causal-lm": {},
    "masked-lm": {
        "finetune": [*_FOR_TEXT, ("distill", 0.0, "the model is its softmax self")],
        "evaluate": [(None, None, "its measures are of next tokens, and the model predicts masked ones")],
    },
    "encoder": {
        "keep": [("kv_budget", None, "measures what is copied from far back, which an encoder does not do")],
        "transfer": [("blocks_at_once", None, "goes through a decoder's blocks"), *_FOR_TEXT],
        "finetune": [
            ("next_token", 0.0, "an encoder sees the next token; learn from its softmax self, with distill"),
            ("chunk", None, "an encoder has no cache to carry from chunk to chunk"),
            *_FOR_TEXT,
        ],
        "medusa": [(None, None, "heads guess next tokens, which an encoder does not make")],
        "evaluate": [
            ("copying", None, _NEXT),
            ("passkey", [], _NEXT),
            ("recall", [], _NEXT),
            ("speed", [], "times how texts are written, which an encoder does not do"),
            ("tuned_teacher", False, "an encoder is finetuned towards its teacher itself"),
        ],
    },
    "seq2seq-lm": _OF_EXAMPLES,
    "sequence-classification": _OF_EXAMPLES,
}
# The field of a data source that names what is to be learned of a text.
LEARNED = {"seq2seq-lm": "target", "sequence-classification": "label"}


def refusal(head: Head, name: str, section: Section) -> str | None:
    """What the recipe's section `name` asks of a model that ends in `head` and cannot have, or None."""
    for field, value, why in _REFUSED[head].get(name, []):
        if field is None:
            return f"{why}; leave it out"
        if getattr(section, field) != value:
            shown = "null" if value is None else str(value).lower()
            return f"{field}: {why}; set it to {shown}"
    return None


def package_file(source: str) -> Path:
    """Path of the file or directory that `package:<import_name>/<file>` names; the package itself is not imported.

    Raises:
        ValueError: the package is not installed, or does not hold the file.
    """
    package, _, file = source.removeprefix("package:").partition("/")
    if not package.isidentifier() or not file:
        raise ValueError(f"{source!r} is not of the form package:<import_name>/<file>")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"package {package} is not installed; try pip install {package}")
    for folder in spec.submodule_search_locations or []:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise ValueError(f"package {package} is installed but holds no file {file}")


def _check_model_source(source: str) -> str:
    if source.startswith("package:"):
        package_file(source)
    elif source.endswith(".gguf"):
        if not Path(source).expanduser().is_file():
            raise ValueError(f"no such file: {source}")
    elif (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).expanduser().is_dir():
        # A Hub id has one slash at most and starts with a letter or digit.
        raise ValueError(f"no such directory: {source}")
    return source


ModelSource = Annotated[Text, AfterValidator(_check_model_source)]


def _read_config(config: Any) -> dict[str, Any] | None:
    """A model's configuration, written out or in a file."""
    if isinstance(config, str):
        path = Path(config).expanduser()
        if not path.is_file():
            raise ValueError(f"no such file: {config}; name a config.json, or write its fields here")
        try:
            config = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if config is None:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("names no model_type, such as gpt2, llama, bert or linearize_flash")
    return config


class ModelSection(Section):
    """Where the model comes from; `source` or `config`, one of them.

    Attributes:
        source: Hub id, local directory, `*.gguf` file, or `package:<import_name>/<either of these>`.
        config: of a model without weights, to train from scratch: `model_type` and what differs from transformers'
            defaults for it, or the path of a `config.json`. What it leaves out of vocabulary and special tokens is the
            tokenizer's. The weights are drawn by the recipe's seed.
        revision: branch, tag or commit on the Hub.
        head: what the model ends in: `causal-lm`, the next token's logits; `masked-lm`, those of masked tokens, of a
            model that stays softmax (`attention: null`); `encoder`, the hidden states of all tokens; `seq2seq-lm`, the
            answer's next token, of an encoder-decoder; or `sequence-classification`, the classes of a text.
        labels: names of the classes, in the order of the model's outputs. None takes them from a model that has been
            trained to tell some, or else from the training data, in the order of the alphabet.
        dtype: of the weights in memory.
        tokenizer: a model source to take the tokenizer from; None takes the model's own.
        license: for the model card, e.g. `apache-2.0`, or the name of one that the Hub does not know; None takes it
            from the model's own card.
        license_link: where one is to be read that the Hub does not know.
        base_model: Hub id that the card names where `source` is a file.
    """

    config: Annotated[Any, AfterValidator(_read_config)] = None
    source: ModelSource | None = None
    revision: Text | None = None
    head: Head = "causal-lm"
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    dtype: Dtype = "float32"
    tokenizer: ModelSource | None = None
    license: Text | None = None
    license_link: Text | None = None
    base_model: Text | None = None

    @field_validator("source")
    @classmethod
    def _some_origin(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source is None and "config" in info.data and info.data["config"] is None:
            raise ValueError("required, but missing")
        return source

    @field_validator("labels")
    @classmethod
    def _of_classes(cls, labels: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if labels is not None and info.data.get("head", "sequence-classification") != "sequence-classification":
            raise ValueError("only head: sequence-classification tells classes; leave it out")
        if labels is not None and len({*labels}) < len(labels):
            raise ValueError("names a class twice")
        return labels

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if self.config is None:
            return self
        for name in ("source", "revision", "base_model"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: config makes a model without weights; drop one of them")
        if self.head == "encoder":
            raise ValueError("head: an encoder learns from its softmax self, which knows nothing yet; use masked-lm")
        if self.tokenizer is None:
            raise ValueError("tokenizer: required, as a model without weights brings none")
        return self
