"""The training loop, once: transformers' Trainer with a stage's objective, trainable parameters and data."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from linearize.convert import checkpoints, processes, zero
from linearize.convert.batches import TrainingBatches, shared
from linearize.convert.context import Context, StageError
from linearize.convert.data import problems_named
from linearize.convert.examples import ExampleBatches, read_examples
from linearize.convert.hiding import hiding
from linearize.convert.models import load_weights, save_weights, trainable
from linearize.convert.progress import TokenProgress
from linearize.convert.reporting import reporters
from linearize.recipes.training import Training

# In a stage's directory, what integrations write.
LOGS = "logs"


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
        parts: name -> values [] of what the loss is made of, one per micro batch since they were taken away to be
            logged.
    """

    calls_backward: bool
    is_local: bool
    parts: dict[str, list[Tensor]]

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
        if "loss" in logs:
            logs |= self._parts() | self._learning_rates(logs["learning_rate"])
        super().log(logs, *arguments)

    def _parts(self) -> dict[str, float]:
        """The objective's, as means over the step in all processes."""
        if not self.objective.parts:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self.objective.parts.values()])
        named = dict(zip(self.objective.parts, processes.mean(means).tolist(), strict=True))
        self.objective.parts.clear()
        return named

    def _learning_rates(self, first: float) -> dict[str, float]:
        """Of all groups of parameters, by their peaks, where these differ; `first` is that of the first group."""
        peaks = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        # They follow one schedule.
        return {f"learning_rate/{peak:g}": first / peaks[0] * peak for peak in peaks} if len({*peaks}) > 1 else {}

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _get_output_dir(self, trial):
        # Of checkpoints that are not whole yet, which Trainer must not count among the old ones.
        return str(Path(self.args.output_dir) / checkpoints.PART)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        checkpoints.finish(Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def save_model(self, output_dir=None, _internal_call=False):
        save_trainable(self.whole, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.whole, Path(resume_from_checkpoint))


class ShowProgress(TrainerCallback):
    """A bar over the steps, with the loss."""

    def __init__(self, context: Context, tokens_per_step: int):
        self.context, self.tokens_per_step, self.bar = context, tokens_per_step, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = TokenProgress(self.context.console, state.max_steps, self.tokens_per_step, state.global_step)
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.show(state.global_step, f"loss {logs['loss']:.4g}")

    def stop(self):
        """However training ended: whoever says why is not to write into the bar, nor to miss the cursor."""
        if self.bar is not None:
            self.bar.stop()


def train(
    context: Context,
    stage: str,
    model: nn.Module,
    objective: Objective,
    section: Training,
    learning_rates: dict[nn.Parameter, float] | None = None,
    documents: Sequence[Iterable[Tensor]] | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients, going on from the newest whole checkpoint, and write
    them to the stage's directory.

    Args:
        learning_rates: of the parameters for which it is not `section.lr`.
        documents: token ids of each source's, instead of the training data's.

    Returns:
        What was logged of every step, those before an interruption included: `loss`, the objective's `parts`, ...

    Raises:
        StageError: nothing is trainable, the loss is no number, or a checkpoint of DeepSpeed's is of another number of
            processes.
    """
    if not trainable(model):
        raise StageError(f"{stage}: this attention has nothing to train; leave the stage out ({stage}: null)")
    directory, section = context.stage_directory(stage), shared(stage, section, processes.count())
    deepspeed = getattr(section, "deepspeed", None)
    checkpoint = checkpoints.newest(directory / "checkpoints", context.console)
    if deepspeed and checkpoint and (before := checkpoints.saved_by(checkpoint)) != processes.count():
        raise StageError(
            f"{stage}: {checkpoint.name} is of {before} processes, and DeepSpeed's parts of it fit no other number, "
            f"{processes.count()} for one; use --gpus {before}, or --from {stage.split('/')[0]} to start again"
        )
    data = _batches(context, model, section, documents)
    trained = model
    if objective.is_local:
        # The rest of the model is no business of Trainer's, which would move and wrap it.
        trained = nn.ModuleList(model.linear_attentions().values())
        if hasattr(model, "hf_device_map"):
            # What it asks before it moves a model.
            trained.hf_device_map = model.hf_device_map
    progress = ShowProgress(context, section.batch_size * section.length)
    with zero.engaged() if deepspeed else nullcontext():
        if deepspeed:
            zero.prepare(model)
        trainer = StageTrainer(
            stage,
            model,
            objective,
            learning_rates or {},
            model=trained,
            args=_arguments(context, stage, objective, section),
            train_dataset=data,
            data_collator=itemgetter(0),
            callbacks=[progress, *reporters(context.recipe.report_to, directory / LOGS)],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.stop()
        save_trainable(model, directory)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _batches(
    context: Context, model: nn.Module, section: Training, documents: Sequence[Iterable[Tensor]] | None
) -> Dataset:
    recipe = context.recipe
    if recipe.data.has_examples:
        count = section.steps * section.batch_size
        some = read_examples(
            "data.train", recipe.data, context.tokenizer, section.length, context.labels, count, recipe.seed
        )
        return ExampleBatches(some, section, recipe.seed, model.config)
    with problems_named("data.train", recipe.data.train):
        sources = [iter(source) for source in documents or context.training_documents]
        hide = hiding(recipe.model.head, context.tokenizer, model.config)
        return TrainingBatches(sources, section, recipe.seed, context.tokenizer, hide)


def _arguments(context: Context, stage: str, objective: Objective, section: Training) -> TrainingArguments:
    """Trainer's, of a process's share of `section`."""
    deepspeed = getattr(section, "deepspeed", None)
    arguments = TrainingArguments(
        output_dir=str(context.stage_directory(stage) / "checkpoints"),
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
        # DeepSpeed's configuration says it itself.
        bf16=section.bf16 and not deepspeed,
        use_cpu=context.device.type == "cpu",
        seed=context.recipe.seed,
        save_strategy="steps",
        save_steps=section.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # Callbacks that are given report.
        report_to="none",
        project=context.recipe.name,
        run_name=f"{context.recipe.name}/{stage}",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=context.device.type == "cuda",
        deepspeed=zero.configuration(deepspeed, section.bf16) if deepspeed else None,
    )
    if arguments.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        # One process is one device: Trainer would spread it over all GPUs by nn.DataParallel.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def save_trainable(model: nn.Module, directory: Path) -> None:
    """Write what is trained, whole, in all processes together."""
    weights = trainable(model)
    with zero.gathered(weights.values()):
        if processes.is_main():
            save_weights(weights, directory)
