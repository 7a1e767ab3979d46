"""Stage finetune: the converted model end to end, by LoRA or in full, on next tokens and/or its softmax self."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from linearize.convert.context import Artifact, Context
from linearize.convert.models import LINEAR, model_after, prepare_finetune, trainable
from linearize.convert.training import train
from linearize.recipes.schema import FinetuneSection

# Logits are taken to fp32 and to probabilities for so many tokens at a time: 128 MiB each with 128k words.
TOKENS_AT_ONCE = 256


class NextTokenAndDistillation:
    """`next_token` * cross-entropy + `distill` * KL(teacher || student).

    The teacher is the same model with adapters off and softmax attention on: no second copy is loaded.
    """

    is_local = False

    def __init__(self, section: FinetuneSection):
        self.section = section

    def loss(self, model, batch, accumulation, step):
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        logits = model(**inputs).logits
        # The logits of the last token have no label.
        labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        # The wrapper of a distributed launch has no adapters to switch off.
        unwrapped = getattr(model, "module", model)
        teacher = self._teacher_logits(unwrapped, inputs) if self.section.distill else logits.detach()
        # A mean over the labels of each sequence, and over sequences.
        has_label = (labels != -100).float()
        weights = has_label / has_label.sum(1, keepdim=True).clamp(min=1) / len(labels)
        # Split, not sliced: the gradient of each slice would be as large as all logits.
        parts = zip(*(x.flatten(0, 1).split(TOKENS_AT_ONCE) for x in (logits, teacher, labels, weights)), strict=True)
        return sum(
            checkpoint(self._weighted, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
        )

    def _weighted(self, logits, teacher, labels, weights):
        """The loss summed over tokens by their weights [N], 0 without a label; logits [N, V], labels [N]."""
        student = logits.float().log_softmax(-1)
        loss = self.section.next_token * nn.functional.nll_loss(student, labels, reduction="none")
        if self.section.distill:
            teacher = teacher.float().log_softmax(-1)
            divergence = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            loss = loss + self.section.distill * divergence
        return (loss * weights).sum()

    def _teacher_logits(self, model, inputs):
        base = model.get_base_model()
        student = base.config._attn_implementation
        base.set_attn_implementation("sdpa")
        model.eval()
        try:
            # Under the trainer's precision, but without its copy of the logits in fp32.
            autocast = torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self.section.bf16)
            with torch.no_grad(), autocast, model.disable_adapter():
                return base(**inputs).logits
        finally:
            base.set_attn_implementation(student)
            model.train()


def tune(context: Context, stage: str, model: nn.Module) -> tuple[nn.Module, list[float]]:
    """Train `model` as the recipe's section `finetune` says, into the directory of `stage`: (the model with what was
    trained, the loss of every step)."""
    section = context.recipe.finetune
    model = prepare_finetune(model, section)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # Frozen embeddings would otherwise cut the graph in front of the first recomputed block.
        model.enable_input_require_grads()
    attention_lr = section.attention_lr or section.lr
    learning_rates = {value: attention_lr for name, value in trainable(model).items() if LINEAR in name}
    return model, train(context, stage, model, NextTokenAndDistillation(section), section, learning_rates)


def run(context: Context) -> Artifact:
    before = "install" if context.recipe.transfer is None else "transfer"
    torch.manual_seed(context.recipe.seed)
    model, losses = tune(context, "finetune", model_after(context, before))
    # ZeRO-3 leaves parts.
    trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable(model).values())
    return Artifact(context.stage_directory("finetune"), {"loss": losses, "trained_parameters": trained})
