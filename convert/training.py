"""The training loop, once: transformers' Trainer with a stage's objective, trainable parameters and data."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from linearize.convert import processes, zero
from linearize.convert.batches import TrainingBatches, shared
from linearize.convert.context import Context, StageError
from linearize.convert.data import problems_named
from linearize.convert.models import load_weights, save_weights, trainable
from linearize.convert.progress import TokenProgress
from linearize.recipes.schema import deepspeed_file
from linearize.recipes.training import Training


def label_weights(labels: Tensor) -> Tensor:
    """[B, T], by which a sum over labels [B, T] is a mean over those of each sequence, and over sequences; 0 where
    there is none (-100)."""
    has_label = (labels != -100).float()
    return has_label / has_label.sum(1, keepdim=True).clamp(min=1) / len(labels)


class Objective(Protocol):
    """What a stage minimises.

    Attributes:
        calls_backward: `loss` has already called backward, with the loss divided by `accumulation`.
        is_local: linear attention layers learn, each for itself, from the model as it is used.
    """

    calls_backward: bool
    is_local: bool

    def loss(self, model: nn.Module, batch: dict[str, Tensor], accumulation: int, step: int) -> Tensor:
        """Mean loss of a micro batch (`TrainingBatches`) of a step, counted from 0, over sequences, so that it does not
        depend on how a step's are shared out."""


class StageTrainer(Trainer):
    """Trainer whose checkpoints hold trainable parameters alone, and whose data come in their own order.

    Args:
        stage: whose name errors begin with.
        whole: the model of which `model`, or a part, is trained.
        learning_rates: of the parameters that have another one than the rest.

    Raises:
        StageError: in `train`, as soon as the loss is no number.
    """

    def __init__(
        self,
        stage: str,
        whole: nn.Module,
        objective: Objective,
        learning_rates: dict[nn.Parameter, float],
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.stage, self.whole, self.objective, self.learning_rates = stage, whole, objective, learning_rates
        # The objectives average over their own micro batch, so the accumulated mean is taken here.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.objective.loss(model, inputs, self.current_gradient_accumulation_steps, self.state.global_step)

    def create_optimizer(self, *arguments):
        optimizer = super().create_optimizer(*arguments)
        if all(lr == self.args.learning_rate for lr in self.learning_rates.values()):
            # A DeepSpeed configuration may bring an optimizer of its own, which has no groups yet.
            return optimizer
        groups = []
        for group in optimizer.param_groups:
            members = defaultdict(list)
            for parameter in group["params"]:
                members[self.learning_rates.get(parameter, group["lr"])].append(parameter)
            groups += [{**group, "params": parameters, "lr": lr} for lr, parameters in members.items()]
        # No state hangs on the old groups yet.
        optimizer.param_groups = groups
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.objective.calls_backward:
            return super().training_step(model, inputs, num_items_in_batch)
        # Where layers are local, the teacher is the model as it is used: no dropout.
        model.train(not self.objective.is_local)
        engine = model if self.is_deepspeed_enabled else None
        if engine is not None:
            engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            # The wrapper of a distributed launch knows nothing of gradients made inside the forward; the engine does.
            loss = self.compute_loss(engine or self.whole, self._prepare_inputs(inputs))
        if engine is not None:
            if self.accelerator.sync_gradients:
                engine.step()
        elif processes.count() > 1 and self.accelerator.sync_gradients:
            # Once per step, and before a common norm clips them.
            processes.average_gradients([*self.model.parameters()])
        return loss.detach() / self.current_gradient_accumulation_steps

    def log(self, logs, *arguments):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise StageError(
                f"{self.stage}: the loss of step {self.state.global_step} is {logs['loss']}; use a smaller lr "
                f"({self.args.learning_rate:g} now) or more warmup_steps"
            )
        super().log(logs, *arguments)

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def save_model(self, output_dir=None, _internal_call=False):
        save_trainable(self.whole, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.whole, Path(resume_from_checkpoint))


class ShowProgress(TrainerCallback):
    """A bar over the steps, with the loss."""

    def __init__(self, context: Context, tokens_per_step: int):
        self.context, self.tokens_per_step = context, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = TokenProgress(self.context.console, state.max_steps, self.tokens_per_step, state.global_step)
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.show(state.global_step, f"loss {logs['loss']:.4g}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


def train(
    context: Context,
    stage: str,
    model: nn.Module,
    objective: Objective,
    section: Training,
    learning_rates: dict[nn.Parameter, float] | None = None,
    documents: Sequence[Iterable[Tensor]] | None = None,
) -> list[float]:
    """Train the parameters of `model` that require gradients, going on from the newest whole checkpoint, and write
    them to the stage's directory.

    Args:
        learning_rates: of the parameters for which it is not `section.lr`.
        documents: token ids of each source's, instead of the training data's.

    Returns:
        The loss of every step, those before an interruption included.

    Raises:
        StageError: nothing is trainable, or the loss is no number.
    """
    if not trainable(model):
        raise StageError(f"{stage}: this attention has nothing to train; leave the stage out ({stage}: null)")
    directory, section = context.stage_directory(stage), shared(stage, section, processes.count())
    arguments = TrainingArguments(
        output_dir=str(directory / "checkpoints"),
        max_steps=section.steps,
        # An item of the data is a whole micro batch.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=(
            section.batch_size * section.length // section.tokens_per_pass // processes.count()
        ),
        learning_rate=section.lr,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_steps,
        lr_scheduler_type=section.schedule,
        # Layers of a local objective have nothing to do with each other, so no common norm clips them.
        max_grad_norm=0.0 if objective.is_local else 1.0,
        bf16=section.bf16,
        use_cpu=context.device.type == "cpu",
        seed=context.recipe.seed,
        save_strategy="steps",
        save_steps=section.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=context.device.type == "cuda",
        deepspeed=str(deepspeed_file(name)) if (name := getattr(section, "deepspeed", None)) else None,
    )
    if arguments.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        # One process is one device: Trainer would spread it over all GPUs by nn.DataParallel.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    with problems_named("data.train", context.recipe.data.train):
        sources = [iter(source) for source in documents or context.training_documents]
        data = TrainingBatches(sources, section, context.recipe.seed, context.tokenizer)
    if arguments.deepspeed:
        zero.prepare(model)
    trained = model
    if objective.is_local:
        # The rest of the model is no business of Trainer's, which would move and wrap it.
        trained = nn.ModuleList(model.linear_attentions().values())
        if hasattr(model, "hf_device_map"):
            # What it asks before it moves a model.
            trained.hf_device_map = model.hf_device_map
    trainer = StageTrainer(
        stage,
        model,
        objective,
        learning_rates or {},
        model=trained,
        args=arguments,
        train_dataset=data,
        data_collator=itemgetter(0),
        callbacks=[ShowProgress(context, section.batch_size * section.length)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_newest_checkpoint(directory / "checkpoints"))
    save_trainable(model, directory)
    if arguments.deepspeed:
        zero.leave()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def save_trainable(model: nn.Module, directory: Path) -> None:
    """Write what is trained, whole, in all processes together."""
    weights = trainable(model)
    with zero.gathered(weights.values()):
        if processes.is_main():
            save_weights(weights, directory)


def _newest_checkpoint(directory: Path) -> str | None:
    """The latest checkpoint whose last file, the trainer's state, is whole."""
    for checkpoint in sorted(directory.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            continue
    return None
