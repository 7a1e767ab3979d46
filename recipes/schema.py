"""What a recipe may say: typed sections that check everything that can be checked offline, without torch."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from linearize.recipes.attention import AttentionSection, KeepSection
from linearize.recipes.corpora import DataSection, DataSource, Listed
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.fields import LearningRate, Positive, Section, Text, Weight
from linearize.recipes.model import LEARNED, Dtype, ModelSection, refusal
from linearize.recipes.training import Training, TransferSection

# The configurations that come with the package.
DEEPSPEED = Path(__file__).parent / "deepspeed"


def deepspeed_file(name: str) -> Path:
    """The JSON file of a shipped DeepSpeed configuration, or what `name` is the path of."""
    shipped = DEEPSPEED / f"{name}.json"
    return shipped if shipped.is_file() else Path(name).expanduser()


# Of text that is measured; longer ones are read in pieces, with a cache between them.
LONGEST_AT_ONCE = 2048


class ShardedTraining(Training):
    """Training by several processes that may share out optimizer, gradients and weights, too.

    Attributes:
        deepspeed: `zero2`, `zero3`, `zero3-offload` (to the CPU), or the path of a DeepSpeed JSON configuration.
    """

    deepspeed: Text | None = None

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_exists(cls, name: str | None) -> str | None:
        if name and not deepspeed_file(name).is_file():
            shipped = ", ".join(sorted(path.stem for path in DEEPSPEED.glob("*.json")))
            raise ValueError(f"no such file: {name}; there are {shipped}, or a path")
        return name


class FinetuneSection(ShardedTraining):
    """End-to-end finetuning of the converted model, on sequences that may be longer than the model knows where its
    positions are rotations.

    Attributes:
        method: `lora` adapters or `full` weights.
        rank: of the adapters.
        alpha: scale of the adapters, as in LoRA.
        targets: names of the linear modules that get an adapter.
        train_attention: also train what the linear attention layers added.
        next_token: weight of the cross-entropy of next tokens, or of what else the model is to tell: masked tokens,
            answers, classes; an encoder has none.
        distill: weight of the KL divergence from the same model in softmax mode; of an encoder, of the squared error of
            its hidden states relative to those in softmax mode.
        attention_lr: peak learning rate of what the linear attention layers added; None is `lr`.
        gradient_checkpointing: recompute activations in the backward pass.
        chunk: tokens of each sequence that go through the model at once, with a cache from one chunk to the next, so
            that memory for activations does not grow with `length`. It divides the length of every phase, or is as
            long. What still grows: the keys and values of heads that are kept softmax (unless `kept_window` bounds
            them), with `backward: exact` once per chunk, and with `distill` the teacher's logits. None: whole
            sequences. `evaluate.tuned_teacher` learns from whole sequences all the same.
        backward: with `chunk`, `exact` gives the gradient of the whole sequence, for one forward pass more and a cache
            per chunk; `truncated` takes each chunk's cache as given, so that nothing learns to remember further.
    """

    method: Literal["lora", "full"] = "lora"
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    targets: Annotated[list[Text], Field(min_length=1)] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    train_attention: bool = True
    next_token: Weight = 1.0
    distill: Weight = 0.0
    attention_lr: LearningRate | None = None
    gradient_checkpointing: bool = False
    chunk: Annotated[int, Field(ge=2)] | None = None
    backward: Literal["exact", "truncated"] = "exact"
    lr: LearningRate = 1e-3

    @field_validator("distill")
    @classmethod
    def _some_loss(cls, distill: float, info: ValidationInfo) -> float:
        if distill and info.data.get("method") == "full":
            raise ValueError("the teacher is the model without its adapters, so distill needs method: lora")
        if not distill and info.data.get("next_token") == 0:
            raise ValueError("next_token and distill are both 0, so there is no loss; give one of them a weight")
        return distill

    @field_validator("attention_lr")
    @classmethod
    def _attention_learns(cls, lr: float | None, info: ValidationInfo) -> float | None:
        if lr is not None and info.data.get("train_attention") is False:
            raise ValueError("train_attention is false, so no attention layer has a learning rate")
        return lr

    @model_validator(mode="after")
    def _chunks_fit(self) -> "FinetuneSection":
        if self.chunk is None:
            return self
        for _, length in self.phases:
            if self.chunk < length and length % self.chunk:
                raise ValueError(f"chunk: {self.chunk} does not divide sequences of {length} tokens")
        return self


class MedusaSection(ShardedTraining):
    """Medusa heads for speculative decoding.

    Attributes:
        heads: head i, counted from 0, predicts the token i + 1 places after the next one.
        projection: whether the heads share the model's output projection or own one each.
        sequential: whether a head sees the tokens guessed before its own (Hydra), or the hidden state alone (Medusa).
        decay: the loss of head i is weighted by `decay ** i`.
        own_text: tokens of text that the converted model writes for its heads to train on, going on from pieces of the
            training data: they are to guess the model, not the data. None: the data.
        prompts: what users ask it, as texts or chats: it answers these before it goes on from pieces. Heads guess best
            what is like the text that they were trained on.
    """

    heads: Positive = 4
    projection: Literal["shared", "own"] = "shared"
    sequential: bool = True
    decay: Annotated[float, Field(gt=0)] = 0.8
    own_text: Positive | None = None
    prompts: Annotated[list[DataSource], Listed] = []
    lr: LearningRate = 1e-3

    @field_validator("own_text")
    @classmethod
    def _fills_a_sequence(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        length = info.data.get("length")
        if tokens and length and tokens < 2 * length:
            raise ValueError(f"{tokens} tokens are too few for sequences of {length}; use {2 * length} or more")
        return tokens

    @field_validator("prompts")
    @classmethod
    def _are_answered(cls, prompts: list[DataSource], info: ValidationInfo) -> list[DataSource]:
        if prompts and not info.data.get("own_text"):
            raise ValueError("nothing is written in answer to them; set own_text, to so many tokens")
        return prompts


class ExportSection(Section):
    """The published directory: largest file (`5GB`, `500MB`) and dtype of the weights, None as in memory."""

    max_shard_size: str = "5GB"
    dtype: Dtype | None = None

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, size: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(GB|MB)", size):
            raise ValueError(f"expected a size such as 5GB or 500MB, got {size!r}")
        return size


class PushSection(Section):
    """Where the exported model is published, on the Hugging Face Hub.

    Attributes:
        repo: `namespace/name`, or a name in the namespace of whoever the token is; created where there is none.
        private: create it as a private one; a public one that is there already is refused.
        revision: branch to commit to, created from `main` where there is none, or `refs/pr/<number>`; None is `main`.
        create_pr: open a pull request instead.
    """

    repo: Text
    private: bool = False
    revision: Text | None = None
    create_pr: bool = False

    @field_validator("repo")
    @classmethod
    def _name(cls, repo: str) -> str:
        # Loads an HTTP client, which recipes without this section do without.
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo)
        return repo

    @field_validator("revision")
    @classmethod
    def _branch(cls, revision: str | None) -> str | None:
        if revision is None or re.fullmatch(r"refs/pr/\d+", revision):
            return revision
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(f"{revision} is a commit, which nothing can be added to; name a branch")
        if revision.startswith("refs/") or not re.fullmatch(r"\w+([./-]\w+)*", revision):
            raise ValueError(f"{revision!r} is not the name of a branch")
        return revision

    @field_validator("create_pr")
    @classmethod
    def _to_main(cls, create_pr: bool, info: ValidationInfo) -> bool:
        if create_pr and info.data.get("revision") is not None:
            raise ValueError("a pull request is opened against main; leave revision out")
        return create_pr


class Recipe(Section):
    """Everything one conversion needs to know. A stage that is None is left out.

    Attributes:
        name: of the converted model.
        output: directory for the stages' results. Relative paths are relative to the working directory.
        seed: of every random number generator.
        attention: what replaces softmax attention; null: the model stays as it is, and what is trained and exported is
            an ordinary checkpoint.
        report_to: what shows losses and learning rates while a stage trains: `trackio`, `tensorboard`, `wandb` or
            another of transformers' integrations. No result depends on it.
    """

    name: Text = "linearized"
    output: Text
    seed: Annotated[int, Field(ge=0)] = 0
    report_to: Annotated[list[Text], Listed] = []
    model: ModelSection
    attention: AttentionSection | None = AttentionSection()
    keep: Annotated[KeepSection | None, Field(validate_default=True)] = None
    data: DataSection
    transfer: TransferSection | None = None
    finetune: FinetuneSection | None = None
    medusa: MedusaSection | None = None
    evaluate: EvaluateSection | None = None
    export: ExportSection | None = None
    push: PushSection | None = None

    @field_validator("attention")
    @classmethod
    def _stays_softmax(cls, attention: AttentionSection | None, info: ValidationInfo) -> AttentionSection | None:
        model = info.data.get("model")
        if attention is not None and model is not None and model.head == "masked-lm":
            raise ValueError("model.head: masked-lm is of softmax models; set attention: null, or head: encoder")
        if attention is None and model is not None and model.head == "encoder":
            raise ValueError("null leaves an encoder nothing to learn; use another attention, or model.head: masked-lm")
        return attention

    @field_validator("data")
    @classmethod
    def _tells_what_is_learned(cls, data: DataSection, info: ValidationInfo) -> DataSection:
        model = info.data.get("model")
        if model is None:
            return data
        learned = LEARNED.get(model.head)
        for place, source in data.sources.items():
            for name in ("label", "target"):
                if getattr(source, name) is not None and name != learned:
                    heads = [head for head, field in LEARNED.items() if field == name]
                    raise ValueError(f"{place}.{name}: is for model.head: {heads[0]}; leave it out, or set that")
            if source.second is not None and learned != "label":
                raise ValueError(f"{place}.second: is for model.head: sequence-classification; leave it out")
        if learned == "label" and (missing := [p for p, source in data.sources.items() if source.label is None]):
            raise ValueError(f"{missing[0]}.label: required, the column with a text's class")
        if len({source.target is None for source in data.sources.values()}) > 1:
            raise ValueError("some sources have a target and some have none; give all of them one, or none")
        return data

    @field_validator("evaluate")
    @classmethod
    def _has_answers(cls, evaluate: EvaluateSection | None, info: ValidationInfo) -> EvaluateSection | None:
        model, data = info.data.get("model"), info.data.get("data")
        asks = evaluate is not None and model is not None and model.head == "seq2seq-lm"
        if asks and data is not None and data.heldout[0].target is None:
            raise ValueError("measures answers, of which data.heldout has none; name their column (target)")
        return evaluate

    @field_validator("keep")
    @classmethod
    def _kept_window_is_of_kept_heads(cls, keep: KeepSection | None, info: ValidationInfo) -> KeepSection | None:
        attention = info.data.get("attention")
        if keep is None and attention is not None and attention.kept_window is not None:
            raise ValueError("attention.kept_window is for heads that are kept; say which, or set it to null")
        if keep is not None and attention is None and "attention" in info.data:
            raise ValueError("attention: null keeps all heads softmax; leave keep out")
        return keep

    @field_validator("transfer", "medusa")
    @classmethod
    def _needs_linear_attention(cls, section: Training | None, info: ValidationInfo) -> Training | None:
        if section is not None and info.data.get("attention", section) is None:
            raise ValueError("attention: null leaves no linear attention, which this stage is for; leave it out")
        return section

    @field_validator("transfer")
    @classmethod
    def _has_a_teacher(cls, transfer: TransferSection | None, info: ValidationInfo) -> TransferSection | None:
        model = info.data.get("model")
        if transfer is not None and model is not None and model.config is not None:
            raise ValueError("a model without weights teaches nothing; leave transfer out, finetune trains it")
        return transfer

    @field_validator("finetune")
    @classmethod
    def _trains_what_is_there(cls, finetune: FinetuneSection | None, info: ValidationInfo) -> FinetuneSection | None:
        model, attention = info.data.get("model"), info.data.get("attention", finetune)
        if finetune is None:
            return finetune
        if model is not None and model.config is not None and finetune.method == "lora":
            raise ValueError("method: adapters of random weights learn little; use method: full")
        if attention is None and finetune.chunk is not None:
            raise ValueError("chunk: softmax attention has no cache of constant size to carry on; use chunk: null")
        return finetune

    @field_validator("transfer", "finetune", "medusa")
    @classmethod
    def _documents_start_at_zero(cls, section: Training | None, info: ValidationInfo) -> Training | None:
        attention = info.data.get("attention")
        if section is not None and section.position_offset and attention is not None and attention.sink_distance:
            raise ValueError(
                f"position_offset: {section.position_offset} moves the sinks, whose place sink_distance relies on; "
                "set attention.sink_distance: null"
            )
        return section

    @field_validator("keep", "transfer", "finetune", "medusa", "evaluate")
    @classmethod
    def _is_for_this_head(cls, section: Section | None, info: ValidationInfo) -> Section | None:
        model = info.data.get("model")
        if section is not None and model is not None and (why := refusal(model.head, info.field_name, section)):
            raise ValueError(why)
        return section

    @field_validator("finetune", "medusa", "evaluate")
    @classmethod
    def _goes_on_from_a_cache(cls, section: Section | None, info: ValidationInfo) -> Section | None:
        attention = info.data.get("attention")
        if section is None or attention is None or attention.far == "features":
            return section
        uses = {
            "finetune": ["chunk"] if getattr(section, "chunk", None) else [],
            "medusa": ["heads"],
            "evaluate": [
                name
                for name in ("lengths", "passkey", "speed")
                if (values := getattr(section, name, [])) and (name == "speed" or max(values) > LONGEST_AT_ONCE)
            ],
        }[info.field_name]
        if uses:
            raise ValueError(
                f"{uses[0]}: needs a cache to go on from, which attention.far: {attention.far} does not have; leave it "
                f"out{f', or up to {LONGEST_AT_ONCE} tokens' if info.field_name == 'evaluate' else ''}"
            )
        return section

    @field_validator("medusa")
    @classmethod
    def _guesses_fit_the_cache(cls, medusa: MedusaSection | None, info: ValidationInfo) -> MedusaSection | None:
        attention = info.data.get("attention")
        if medusa is not None and attention is not None and medusa.heads > attention.config.slack:
            raise ValueError(
                f"heads: {medusa.heads} heads guess further than the {attention.config.slack} tokens that the cache "
                "keeps in reserve; use fewer, or a larger attention.slack"
            )
        return medusa

    @field_validator("transfer")
    @classmethod
    def _objectives_fit_the_attention(
        cls, transfer: TransferSection | None, info: ValidationInfo
    ) -> TransferSection | None:
        attention = info.data.get("attention")
        if transfer is not None and attention is not None and (why := transfer.contradiction(attention.config)):
            raise ValueError(why)
        return transfer

    @field_validator("finetune")
    @classmethod
    def _chunks_fill_the_cache(cls, finetune: FinetuneSection | None, info: ValidationInfo) -> FinetuneSection | None:
        attention = info.data.get("attention")
        if finetune is None or finetune.chunk is None or attention is None:
            return finetune
        recent = attention.config.ring_size
        if finetune.chunk < min(recent, finetune.longest):
            raise ValueError(
                f"chunk: the {recent} latest tokens (window, convolution and slack) go with every chunk, and are more "
                f"than its {finetune.chunk}; use {recent} or more"
            )
        return finetune

    @field_validator("evaluate")
    @classmethod
    def _tunable_teacher(cls, evaluate: EvaluateSection | None, info: ValidationInfo) -> EvaluateSection | None:
        if evaluate is not None and evaluate.tuned_teacher and info.data.get("attention", evaluate) is None:
            raise ValueError("tuned_teacher: with attention: null the model is that itself; leave it out")
        if evaluate is not None and evaluate.tuned_teacher and "finetune" in info.data:
            finetune = info.data["finetune"]
            if finetune is None:
                raise ValueError("tuned_teacher: needs the section finetune, which says how to tune it")
            if not finetune.next_token:
                raise ValueError("tuned_teacher: with finetune.next_token 0 the teacher would learn from itself alone")
        return evaluate

    @field_validator("push")
    @classmethod
    def _exported_before(cls, push: PushSection | None, info: ValidationInfo) -> PushSection | None:
        if push is not None and info.data.get("export", push) is None:
            raise ValueError("only an exported model can be pushed; add the section export, which may be {}")
        if push is not None and info.data.get("attention", push) is None:
            raise ValueError("linear models are pushed; leave push out and upload the exported directory by hf upload")
        return push
