"""Stage finetune: the converted model end to end, by LoRA or in full, on next tokens and/or its softmax self."""

import torch
from torch import nn

from linearize.convert.context import Artifact, Context
from linearize.convert.models import model_after, prepare_finetune
from linearize.convert.training import train
from linearize.recipes.schema import FinetuneSection


class NextTokenAndDistillation:
    """`next_token` * cross-entropy + `distill` * KL(teacher || student).

    The teacher is the same model with adapters off and softmax attention on: no second copy is loaded.
    """

    is_local = False

    def __init__(self, section: FinetuneSection):
        self.section = section

    def loss(self, model, batch, accumulation):
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        # The logits of the last token have no label.
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.section.next_token:
            loss = loss + self.section.next_token * nn.functional.cross_entropy(logits.float(), labels)
        if self.section.distill:
            teacher = self._teacher_logits(model, inputs)[:, :-1].flatten(0, 1)
            learned = labels != -100
            divergence = nn.functional.kl_div(
                logits[learned].float().log_softmax(-1),
                teacher[learned].float().log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + self.section.distill * divergence
        return loss

    def _teacher_logits(self, model, inputs):
        base = model.get_base_model()
        student = base.config._attn_implementation
        base.set_attn_implementation("sdpa")
        model.eval()
        try:
            with torch.no_grad(), model.disable_adapter():
                return model(**inputs).logits
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
    return model, train(context, stage, model, NextTokenAndDistillation(section), section)


def run(context: Context) -> Artifact:
    before = "install" if context.recipe.transfer is None else "transfer"
    torch.manual_seed(context.recipe.seed)
    model, losses = tune(context, "finetune", model_after(context, before))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Artifact(context.stage_directory("finetune"), {"loss": losses, "trained_parameters": trained})
