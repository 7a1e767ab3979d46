"""What a recipe may say about training: the part that every stage has, and attention transfer."""

import re
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from linearize.layers.config import LinearAttentionConfig
from linearize.recipes.fields import LearningRate, Positive, Probability, Section, TextKeys, Weight

# Attention weights are compared on so many tokens of each sequence's beginning: they are quadratic in length, and 512
# tokens of 32 heads are 32 MiB per sequence.
WEIGHTS_PREFIX = 512


class Phase(Section):
    """A part of a length curriculum: sequences of `length` tokens for a `share` of the stage's steps."""

    length: Annotated[int, Field(ge=2)]
    share: Annotated[float, Field(gt=0, le=1)]


class Training(Section):
    """What every training stage has.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per optimizer step.
        micro_batch_size: sequences per forward pass; divides `batch_size`. None takes them all at once.
        length: tokens per packed sequence.
        curriculum: phases of other lengths, one after the other. Tokens per step and per forward pass stay those of
            `length`, so a phase of half the length has twice the sequences. Empty: `length` for the whole stage.
        recall: share of the sequences in which parts of the text are repeated further on (see `batches`).
        facts: share of the sequences, drawn apart from those of `recall`, in which short facts are told and asked for
            far later (see `facts`); for sequences of 256 tokens or more.
        position_offset: the positions of each sequence begin at a random number from 0 to this one.
        lr: peak learning rate.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        schedule: of the learning rate after the warm-up.
        save_every: steps between checkpoints.
        bf16: compute under bfloat16 autocast.
    """

    steps: Positive
    batch_size: Positive = 8
    micro_batch_size: Positive | None = None
    length: Annotated[int, Field(ge=2)] = 1024
    curriculum: list[Phase] = []
    recall: Probability = 0.0
    facts: Probability = 0.0
    position_offset: Annotated[int, Field(ge=0)] = 0
    lr: LearningRate
    weight_decay: Weight = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    save_every: Positive = 100
    bf16: bool = False

    @field_validator("micro_batch_size")
    @classmethod
    def _divides(cls, micro: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("batch_size")
        if micro and batch and batch % micro:
            raise ValueError(f"{micro} does not divide the batch_size of {batch}")
        return micro

    @model_validator(mode="after")
    def _curriculum_fits(self) -> "Training":
        if not self.curriculum:
            return self
        total = sum(phase.share for phase in self.curriculum)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"curriculum: the shares sum to {total:g}, not to 1")
        for phase in self.curriculum:
            if self.tokens_per_pass % phase.length:
                raise ValueError(
                    f"curriculum: sequences of {phase.length} do not fill the {self.tokens_per_pass} tokens of a "
                    "forward pass (micro_batch_size, or else batch_size, times length)"
                )
        if any(steps == 0 for steps, _ in self.phases):
            raise ValueError(f"curriculum: {self.steps} steps are too few, a phase would get none")
        return self

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of one forward pass, the same in every phase."""
        return (self.micro_batch_size or self.batch_size) * self.length

    @property
    def longest(self) -> int:
        """Tokens of its longest sequences."""
        return max(length for _, length in self.phases)

    @property
    def phases(self) -> list[tuple[int, int]]:
        """(steps, length) of the phases in order."""
        if not self.curriculum:
            return [(self.steps, self.length)]
        ends = [round(self.steps * share) for share in accumulate(phase.share for phase in self.curriculum)]
        return [
            (end - start, phase.length)
            for start, end, phase in zip([0, *ends[:-1]], ends, self.curriculum, strict=True)
        ]


class Objectives(Section):
    """Weights of what the layers minimise in attention transfer (see `objectives`).

    Attributes:
        output_mse: error of the layer's output (LoLCATs' objective).
        linear_mse: error of the output of its linear branch alone.
        weights_kl: KL divergence of its attention weights.
        far_mass: error of what it adds of the keys outside its window: their share of the weights, and that times
            their mean value.
    """

    output_mse: Weight = 1.0
    linear_mse: Weight = 0.0
    weights_kl: Weight = 0.0
    far_mass: Weight = 0.0

    @model_validator(mode="after")
    def _some_objective(self) -> "Objectives":
        if not self.active:
            raise ValueError("all weights are 0, so there is no loss; give one of them a weight")
        return self

    @property
    def active(self) -> dict[str, float]:
        """Name -> weight of those that count."""
        return {name: weight for name, weight in self if weight}


class LayerTraining(Section):
    """What some layers have of their own; None is as the stage has it.

    Attributes:
        lr: peak learning rate.
        steps: the layer learns in so many first steps, and costs nothing after them.
    """

    lr: LearningRate | None = None
    steps: Positive | None = None


def layer_range(text: str) -> range:
    """The layers that `5` or `0-3` (both ends included) names.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError(f"layers: {text!r} names no layers; write 5, or 0-3 for layers 0 to 3")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


class TransferSection(Training):
    """Attention transfer: the new layers learn the softmax layers' outputs, everything else stays frozen.

    Attributes:
        objectives: what they minimise, by weights.
        window_dropout: share of the steps at the stage's beginning in which output_mse is taken without the local
            branch, so that the linear one must carry the output; it falls linearly to 0 over the stage.
        layers: learning rates and numbers of steps of some layers (`5`, `0-3`). The schedule of the learning rate
            stays the stage's.
        teacher: where the frozen model is: `replicated`, whole on each process's device; `zero3`, a part of every
            weight in each of several processes (DeepSpeed's ZeRO-3), put together module by module as they compute; or
            `spread` over the devices of one process, then host memory, then disk. What is trained, and its optimizer's
            state, is whole wherever it computes.
        blocks_at_once: so many decoder blocks of a replicated model are on the device at a time: all of a step goes
            through them before the next ones come. The others wait in host memory, where processes share them if
            `model.dtype` is that of the model's files, which are memory-mapped. None: all of them stay.
    """

    objectives: Objectives = Objectives()
    window_dropout: Probability = 0.0
    layers: Annotated[dict[str, LayerTraining], TextKeys] = {}
    teacher: Literal["replicated", "zero3", "spread"] = "replicated"
    blocks_at_once: Positive | None = None
    lr: LearningRate = 1e-2

    @field_validator("blocks_at_once")
    @classmethod
    def _blocks_are_in_host_memory(cls, blocks: int | None, info: ValidationInfo) -> int | None:
        teacher = info.data.get("teacher")
        if blocks and teacher in ("zero3", "spread"):
            raise ValueError(f"whole blocks come from host memory, where teacher: {teacher} has none; drop one of them")
        return blocks

    @model_validator(mode="after")
    def _dropout_has_an_effect(self) -> "TransferSection":
        if self.window_dropout and not self.objectives.output_mse:
            raise ValueError("window_dropout: it is for output_mse, whose weight is 0")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> "TransferSection":
        owner: dict[int, str] = {}
        for text, training in self.layers.items():
            for index in layer_range(text):
                if index in owner:
                    raise ValueError(f"layers: {owner[index]} and {text} both name layer {index}")
                owner[index] = text
            if (training.steps or 0) > self.steps:
                raise ValueError(f"layers: {text} has {training.steps} steps, more than the stage's {self.steps}")
        return self

    def layer(self, index: int) -> tuple[float, int]:
        """Learning rate and steps of one layer."""
        own = next((own for text, own in self.layers.items() if index in layer_range(text)), LayerTraining())
        return own.lr or self.lr, own.steps or self.steps

    def misplaced(self, count: int) -> str | None:
        """Why so many processes cannot have the teacher where it is to be, naming the field, or None."""
        if self.teacher == "zero3" and count == 1:
            return (
                "teacher: zero3 gives each of several processes a part, and this is one; use --gpus 2 or more, or "
                "replicated"
            )
        if self.teacher == "spread" and count > 1:
            return f"teacher: spread gives all devices to one process, not to {count}; use --launch none, or zero3"
        return None

    def contradiction(self, attention: LinearAttentionConfig) -> str | None:
        """Why these objectives cannot be had with that attention, naming the field, or None."""
        branch = [name for name in self.objectives.active if name != "output_mse"]
        if self.window_dropout and attention.window is None:
            return "window_dropout: this attention has no window to drop (window: null)"
        if self.window_dropout and attention.feature_map is None:
            return "window_dropout: this attention has no linear branch (feature_map: null)"
        if branch and attention.feature_map is None:
            return f"objectives: {branch[0]} needs a linear branch, but feature_map is null"
        if attention.state == "delta" and attention.combine == "shared":
            for name, active in (
                ("window_dropout:", self.window_dropout),
                ("objectives: linear_mse", self.objectives.linear_mse),
            ):
                if active:
                    return (
                        f"{name} takes the linear branch alone, whose mass under state: delta may be 0, so it cannot "
                        "be the denominator; use another state, or combine: sum"
                    )
        weights = [name for name in branch if name != "linear_mse"]
        if weights and attention.combine == "sum":
            return f"objectives: {weights[0]} needs attention weights, which combine: sum does not have; use shared"
        compared = min(WEIGHTS_PREFIX, self.longest)
        if weights and attention.window is not None and attention.near_reach + 1 >= compared:
            return (
                f"objectives: {weights[0]} looks at the first {compared} tokens of a sequence, all of which this "
                "window keeps near"
            )
        return None
