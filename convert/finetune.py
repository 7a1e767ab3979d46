"""Stage finetune: the converted model end to end, by LoRA or in full, on labels and/or its softmax self."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearize.convert.chunks import Chunks, recompute_blocks
from linearize.convert.context import Artifact, Context
from linearize.convert.encoders import edges, framed
from linearize.convert.examples import IGNORED
from linearize.convert.models import LINEAR, model_after, prepare_finetune, trainable
from linearize.convert.objectives import relative_error
from linearize.convert.training import label_weights, train
from linearize.layers.seam import LinearizedMixin
from linearize.recipes.schema import FinetuneSection

# So many tokens' logits are taken to fp32 and to probabilities at a time: 128 MiB each with 128k words; or, where words
# are few, so many logits, as each part takes some 60 launches.
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 256, 256 * 49152


class LabelsAndDistillation:
    """`next_token` * cross-entropy of labels + `distill` * KL(teacher || student).

    The teacher is the same model with adapters off and softmax attention on: no second copy is loaded. It reads whole
    sequences: where the student goes through them chunk by chunk, all of the teacher's logits wait for it.

    Args:
        next_tokens: labels are those of the tokens that the model reads, and of each the next one is told. Otherwise
            they are what is told: of each token, or of each text.
    """

    is_local = False

    def __init__(self, section: FinetuneSection, next_tokens: bool = True):
        self.section, self.next_tokens = section, next_tokens
        self.calls_backward, self.parts = section.chunk is not None, {}

    def loss(self, model, batch, accumulation, step):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        labels = batch["labels"]
        if self.next_tokens:
            inputs["use_cache"] = False
            # The logits of the last token have no label.
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        elif labels.dim() == 1:
            labels = labels[:, None]
        weights = label_weights(labels)
        # The wrapper of a distributed launch has no adapters to switch off.
        unwrapped = getattr(model, "module", model)
        teacher = self._teacher_logits(unwrapped, inputs).view(*labels.shape, -1) if self.section.distill else None
        if self.section.chunk is None:
            return self._weighted(model(**inputs).logits.view(*labels.shape, -1), teacher, labels, weights)

        def share(logits: Tensor, place: slice) -> Tensor:
            part = None if teacher is None else teacher[:, place]
            return self._weighted(logits, part, labels[:, place], weights[:, place] / accumulation)

        base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        engine = None if model is unwrapped else model
        chunks = Chunks(base, batch["input_ids"], batch["position_ids"], self.section.chunk, engine)
        return chunks.backward(share, exact=self.section.backward == "exact") * accumulation

    def _weighted(self, logits: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss summed by weights [B, T], which are 0 without a label; logits [B, T, V], labels [B, T]."""
        teacher = logits.detach() if teacher is None else teacher
        # Split, not sliced: the gradient of each slice would be as large as all logits.
        size = max(TOKENS_AT_ONCE, LOGITS_AT_ONCE // logits.shape[-1])
        parts = zip(*(x.flatten(0, 1).split(size) for x in (logits, teacher, labels, weights)), strict=True)
        return sum(checkpoint(self._part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)

    def _part(self, logits: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """`_weighted` of logits [N, V], labels and weights [N]."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        student = logits.to(dtype).log_softmax(-1)
        loss = self.section.next_token * nn.functional.nll_loss(student, labels, reduction="none")
        if self.section.distill:
            teacher = teacher.to(dtype).log_softmax(-1)
            divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            loss = loss + self.section.distill * divergence
        return (loss * weights).sum()

    def _teacher_logits(self, model, inputs):
        with softmax_self(model, inputs["input_ids"].device, self.section.bf16) as teacher:
            return teacher(**inputs).logits


class HiddenStates:
    """Squared error of an encoder's hidden states relative to those of the same model with adapters off and softmax
    attention on, mean over sequences.

    Args:
        around: what its tokenizer puts around each sequence (`encoders.edges`).
    """

    is_local = calls_backward = False

    def __init__(self, section: FinetuneSection, around: tuple[list[int], list[int]]):
        self.section, self.around, self.parts = section, around, {}

    def loss(self, model, batch, accumulation, step):
        ids = framed(batch["input_ids"], self.around)
        with softmax_self(getattr(model, "module", model), ids.device, self.section.bf16) as teacher:
            target = teacher(input_ids=ids).last_hidden_state
        return relative_error(model(input_ids=ids).last_hidden_state, target, None)


@contextmanager
def softmax_self(model: PeftModel, device: torch.device, bf16: bool) -> Iterator[PreTrainedModel]:
    """Inside, without gradients, what the model was before it was converted: adapters off, softmax attention on."""
    base = model.get_base_model()
    student = base.config._attn_implementation
    base.set_attn_implementation("sdpa")
    model.eval()
    try:
        # Under the trainer's precision, but without its copy of the logits in fp32.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16), model.disable_adapter():
            yield base
    finally:
        base.set_attn_implementation(student)
        model.train()


def tune(context: Context, stage: str, model: nn.Module) -> tuple[nn.Module, list[float]]:
    """Train `model` as the recipe's section `finetune` says, into the directory of `stage`: (the model with what was
    trained, the loss of every step)."""
    section = context.recipe.finetune
    if not isinstance(model, LinearizedMixin):
        # A softmax model has no cache of constant size to carry from chunk to chunk.
        section = section.model_copy(update={"chunk": None})
    model = prepare_finetune(model, section)
    if section.gradient_checkpointing and section.chunk:
        recompute_blocks(model)
    elif section.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if section.gradient_checkpointing or section.deepspeed:
        # Behind frozen embeddings, a graph would begin inside the first block: not at what is recomputed, nor at the
        # input of a layer, whose gradient ZeRO-3 takes for a sign that the layer's own are there.
        model.enable_input_require_grads()
    attention_lr = section.attention_lr or section.lr
    learning_rates = {value: attention_lr for name, value in trainable(model).items() if LINEAR in name}
    objective = LabelsAndDistillation(section, context.recipe.model.head == "causal-lm")
    if context.recipe.model.head == "encoder":
        objective = HiddenStates(section, edges(context.tokenizer))
    steps = train(context, stage, model, objective, section, learning_rates)
    return model, [step["loss"] for step in steps]


def run(context: Context) -> Artifact:
    before = "install" if context.recipe.transfer is None else "transfer"
    torch.manual_seed(context.recipe.seed)
    model, losses = tune(context, "finetune", model_after(context, before))
    # ZeRO-3 leaves parts.
    trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable(model).values())
    return Artifact(context.stage_directory("finetune"), {"loss": losses, "trained_parameters": trained})
