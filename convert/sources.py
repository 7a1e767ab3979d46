"""Where models come from: a Hub id, a local directory, a GGUF file, or a file inside an installed package."""

import difflib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

import linearize.layers.flash  # noqa: F401  (a family that transformers is to know)
from linearize.recipes.model import Head, ModelSection, package_file

# What loads a model by what it ends in.
AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "encoder": AutoModel,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
CLASSIFIER = "ForSequenceClassification"

# What reading a model that is not there, or damaged, ends in.
READ_ERRORS = (OSError, ValueError, KeyError, struct.error)

# Embeddings of other sizes make for slow products on GPUs.
VOCABULARY_MULTIPLE = 64
MASK = "<mask>"
# Stands for the first span that is hidden of a text, and so on; as many as T5 has.
SENTINEL, SENTINELS = "<extra_id_{}>", 100

CARD = "README.md"
CARD_FIELDS = ("license", "license_name", "license_link", "language")


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
        ValueError: transformers cannot find or read it, or the model is linearized already.
    """
    try:
        if source.gguf is None and "linear_attention" in PreTrainedConfig.get_config_dict(source.path)[0]:
            raise ValueError("it is linearized already; convert the model that it came from")
        return AutoConfig.from_pretrained(source.path, trust_remote_code=False, **source.arguments)
    except READ_ERRORS as error:
        raise ValueError(f"model.source: cannot use {source.path}: {first_line(error)}") from error


def new_config(model: ModelSection, tokenizer) -> PreTrainedConfig:
    """The configuration `model.config`, the tokenizer's vocabulary and special tokens in it where it names none.

    Raises:
        ValueError: transformers does not know the family, a field, or its value.
    """
    given = dict(model.config)
    family = given.pop("model_type")
    try:
        default = AutoConfig.for_model(family)
    except ValueError as error:
        raise ValueError(f"model.config: transformers knows no model_type {family}") from error
    known = {*default.to_dict(), *type(default).attribute_map}
    if "transformers_version" not in given:
        # Written by hand: what is saved by transformers may have fields of older versions.
        for name in given.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ValueError(f"model.config.{name}: {family} has no such field{hint}")
    size = max(tokenizer.get_vocab().values()) + 1
    filled = {"vocab_size": -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        filled[name] = getattr(tokenizer, name)
    try:
        return AutoConfig.for_model(family, **{name: filled[name] for name in filled if name in known} | given)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.config: {first_line(error)}") from error


def trained_classes(config: PreTrainedConfig) -> list[str] | None:
    """Names of the classes that a model has been trained to tell, or None."""
    if not any(name.endswith(CLASSIFIER) for name in config.architectures or []):
        return None
    return [config.id2label[number] for number in range(config.num_labels)]


def fit_to_examples(config: PreTrainedConfig, tokenizer, labels: list[str] | None) -> None:
    """Put in a configuration what batches of examples need and it may lack: a token that pads, the one that answers
    begin with, and the classes."""
    if config.pad_token_id is None:
        pads = tokenizer.pad_token_id
        config.pad_token_id = (tokenizer.eos_token_id or 0) if pads is None else pads
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        # Nobody goes on from a text that has its class.
        config.use_cache = False


def new_model(config: PreTrainedConfig, head: Head) -> PreTrainedModel:
    """A model with random weights, in fp32."""
    return AUTO_CLASSES[head].from_config(config, dtype=torch.float32).eval()


def tokenizer_of(model: ModelSection):
    """`load_tokenizer`, with tokens that stand for what a model is to predict, where it is: new ones, where it is new.

    Raises:
        ValueError: as `load_tokenizer`, or a model with weights has no such token.
    """
    tokenizer = load_tokenizer(model)
    if model.head == "masked-lm" and tokenizer.mask_token is None:
        if model.config is None:
            raise ValueError("model.head: the model's tokenizer has no token that masks others; use head: causal-lm")
        tokenizer.add_special_tokens({"mask_token": MASK})
    if model.head == "seq2seq-lm" and model.config is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [SENTINEL.format(i) for i in range(SENTINELS)]})
    return tokenizer


def load_tokenizer(model: ModelSection):
    """The tokenizer of `model.tokenizer`, or the model's own.

    Raises:
        ValueError: transformers cannot find or read it.
    """
    source = locate(model.tokenizer) if model.tokenizer else locate(model.source, model.revision)
    field = "model.tokenizer" if model.tokenizer else "model.source"
    try:
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **source.arguments)
    except READ_ERRORS as error:
        raise ValueError(f"{field}: no tokenizer at {source.path}: {first_line(error)}") from error


def base_card(source: Source) -> dict[str, str | list[str]]:
    """What the model's own card says of its licence and language; nothing where no card is at hand."""
    try:
        if Path(source.path).is_dir():
            card = metadata_load(Path(source.path) / CARD)
        else:
            card = metadata_load(hf_hub_download(source.path, CARD, revision=source.revision))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {field: card[field] for field in CARD_FIELDS if card and card.get(field)}


def check_weights(directory: Path) -> None:
    """Look at a local model's weight files: all there, and every safetensors header whole.

    Raises:
        ValueError: naming the first file that is missing or damaged.
    """
    files = {file for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern)}
    for index in directory.glob("*.index.json"):
        files |= {directory / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    if not files:
        raise ValueError(f"{directory} holds no weights (*.safetensors)")
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(f"{file} is missing, but the index beside it names it")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a whole safetensors file: {first_line(error)}") from error


def load_model(source: Source, dtype: str, head: Head = "causal-lm", **placing) -> PreTrainedModel:
    """The softmax model in evaluation mode, dense weights in `dtype`, on the CPU, or where `placing` has
    `from_pretrained` put them (`device_map`, ..). A classifier that has not been trained is one with random weights.

    Raises:
        ValueError: when weights are missing or of another shape; OSError: when files are.
    """
    model, report = AUTO_CLASSES[head].from_pretrained(
        source.path, dtype=dtype, output_loading_info=True, **source.arguments, **placing
    )
    missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if head == "encoder" and missing and all(key.startswith("pooler.") for key in missing):
        # What was trained on masked tokens has none, and hidden states do without.
        model.pooler, missing = None, []
    if head == "sequence-classification" and trained_classes(load_config(source)) is None:
        missing = [key for key in missing if key.startswith(model.base_model_prefix) and ".pooler." not in key]
    if missing:
        raise ValueError(f"{source.path} has no fitting weights for {sorted(missing)[0]} ({len(missing)} in all)")
    if source.gguf:
        # transformers keeps regarding what came out of a GGUF file as quantized, and refuses to save it.
        dense = AUTO_CLASSES[head].from_config(placing.get("config") or load_config(source), dtype=dtype)
        dense.load_state_dict(model.state_dict())
        dense.generation_config = model.generation_config
        model = dense
    return model.eval()


def first_line(error: Exception) -> str:
    """What an error says, without the rest of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
