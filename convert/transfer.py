"""Stage transfer: each layer learns its softmax layer's output, by an attention function that does all of it.

The function computes the softmax output from the very q, k, v that it is given, runs the linear layer under
`enable_grad`, calls backward at once, and hands the softmax output on. So there is one model in memory, gradients
of one layer at a time, and every layer sees the teacher's inputs.

The stage's metrics: `loss` of every step, `loss_of_layer` (`losses_of_layers`), `last_loss_of_layer`, and, when the
layers have learned, `error_of_head` (`errors_of_heads`).
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean

import torch
from accelerate.utils import get_max_memory
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from linearize.convert import processes, zero
from linearize.convert.batches import draws, shared
from linearize.convert.blocks import Blocks
from linearize.convert.context import Artifact, Context
from linearize.convert.data import token_stream
from linearize.convert.encoders import edges, framed
from linearize.convert.models import LINEAR, model_after, softmax_model, train_only
from linearize.convert.objectives import OBJECTIVES, Example, softmax_mask
from linearize.convert.probes import windows
from linearize.convert.training import train
from linearize.layers.attention import BRANCHES
from linearize.layers.bias import bias_of_pairs
from linearize.layers.seam import IMPLEMENTATIONS, Inputs, segments_mask, softmax_of_states, take_inputs
from linearize.recipes.training import TransferSection

IMPLEMENTATION = "linearize_transfer"
# What is logged at each step, in front of a layer's index.
LOSS_OF_LAYER = "loss_of_layer/"
# A stage's metrics have the means over so many parts of it, whatever its length.
SPANS = 200
# Sequences of held-out text on which the heads' errors are measured.
HELD_OUT = 4
# Share of each device's free memory that `teacher: spread` fills; the rest is for what is trained, and activations.
ROOM_FOR_WEIGHTS = 0.8


def teacher_backend(device: torch.device) -> str:
    """Which of transformers' attention functions computes softmax attention."""
    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def softmax_attention(module: nn.Module, inputs: Inputs, value: Tensor, scaling: float | None, kwargs: dict) -> Tensor:
    """The output [B, T, H, D_v] that the module had before it was linearized."""
    if module.linear_attention.crosses:
        return softmax_of_states(inputs.q, inputs.k, value, inputs.segments, scaling)
    backend = teacher_backend(value.device)
    segments, length = inputs.segments, value.shape[2]
    if segments is not None or value.dtype == torch.float32:
        # flash-attn takes neither documents by segment nor single precision.
        backend = "sdpa"
    sliding_window = kwargs.get("sliding_window")
    mask = None
    if backend == "sdpa" and (segments is not None or sliding_window is not None):
        mask = softmax_mask(segments, length, sliding_window, value.device, module.linear_attention.causal)
        mask = mask.expand(value.shape[0], length, length)[:, None]
    if inputs.bias is not None:
        kwargs = {**kwargs, "position_bias": bias_of_pairs(inputs.bias, length)}
    function = AttentionInterface()[backend]
    return function(module, inputs.q, inputs.k, value, mask, scaling=scaling, **kwargs)[0]


@dataclass
class Task:
    """A layer's part in a step: in each forward pass it leaves gradients in its parameters.

    Attributes:
        objectives: name -> weight.
        branches: that make its output.
        accumulation: forward passes per step.
        losses: afterwards, the weighted sum of the objectives in each pass.
    """

    objectives: dict[str, float]
    branches: frozenset[str] = BRANCHES
    accumulation: int = 1
    losses: list[Tensor] = field(default_factory=list)

    def __call__(self, example: Example) -> None:
        example = replace(example, branches=self.branches)
        with torch.enable_grad():
            loss = sum(weight * OBJECTIVES[name](example) for name, weight in self.objectives.items())
            if loss.requires_grad:
                (loss / self.accumulation).backward()
        self.losses.append(loss.detach())


@dataclass
class HeadErrors:
    """What a layer that has learned is asked for instead.

    Attributes:
        error, scale: [H], sums over all forward passes of |output - target|^2 and |target|^2 of each query head.
    """

    error: Tensor | float = 0.0
    scale: Tensor | float = 0.0

    def __call__(self, example: Example) -> None:
        output, target = example.output(BRANCHES).float(), example.target.float()
        self.error = self.error + (output - target).square().sum((0, 1, 3))
        self.scale = self.scale + target.square().sum((0, 1, 3))

    @property
    def relative(self) -> Tensor:
        """[H], 0 of a head that gives nothing."""
        return self.error / self.scale.clamp(min=torch.finfo(self.scale.dtype).tiny)


def transfer_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function: returns the softmax output, which a layer that has a `task` (`Task`, `HeadErrors`) is
    compared with before."""
    # Of a model on several devices; kernels are launched on the current one.
    with torch.cuda.device_of(value):
        if not hasattr(module, "linear_attention"):
            return softmax_of_states(query, key, value, attention_mask, scaling), None
        inputs = take_inputs(module, query, key, attention_mask, kwargs)
        target = softmax_attention(module, inputs, value, scaling, kwargs)
        task = module.linear_attention.task
        if task is not None:
            task(Example(module, inputs, value, scaling, target, kwargs.get("sliding_window")))
    return target, None


AttentionInterface.register(IMPLEMENTATION, transfer_attention)
AttentionMaskInterface.register(IMPLEMENTATION, segments_mask)
IMPLEMENTATIONS.add(IMPLEMENTATION)


class AttentionTransfer:
    """Mean over the layers that are still learning of their weighted objectives.

    Args:
        section: as `batches.shared` has it.
        seed: of what is drawn.
        blocks: that a whole step goes through, in passes of no more tokens than `section` says; None: a batch is one
            pass through the model.
        around: of an encoder, what its tokenizer puts around each sequence (`encoders.edges`).
    """

    calls_backward = is_local = True

    def __init__(
        self, section: TransferSection, seed: int, blocks: Blocks | None = None,
        around: tuple[list[int], list[int]] | None = None,
    ):  # fmt: skip
        self.section, self.seed, self.blocks, self.around = section, seed, blocks, around
        self.parts = {}

    def loss(self, model, batch, accumulation, step):
        ids, positions = batch["input_ids"], batch["position_ids"]
        if self.around is not None:
            ids = framed(ids, self.around)
        rows = len(ids) if self.blocks is None else self.section.tokens_per_pass // ids.shape[1]
        passes = [
            _reading(model, ids, positions)
            for ids, positions in zip(ids.split(rows), positions.split(rows), strict=True)
        ]
        layers = model.linear_attentions()
        for index, layer in layers.items():
            _, steps = self.section.layer(index)
            layer.task = None
            if step < steps:
                layer.task = Task(self.section.objectives.active, self._branches(step), accumulation * len(passes))
        if self.blocks is None:
            with torch.no_grad():
                model.base_model(**passes[0])
        else:
            self.blocks.run(passes)
        losses = {
            f"{LOSS_OF_LAYER}{index}": torch.stack(layer.task.losses).mean().to(ids.device)
            for index, layer in layers.items()
            if layer.task is not None
        }
        for name, loss in losses.items():
            self.parts.setdefault(name, []).append(loss)
        return torch.stack([*losses.values()]).mean()

    def _branches(self, step: int) -> frozenset[str]:
        dropout = self.section.window_dropout * (1 - step / self.section.steps)
        dropped = draws(self.seed, "window_dropout", step).random() < dropout
        return BRANCHES - {"local"} if dropped else BRANCHES


def _reading(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> dict[str, Tensor | bool]:
    """Arguments of a pass through the base model. Encoders count positions themselves, and not all are told them."""
    if model.is_encoder:
        return {"input_ids": ids}
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


@contextmanager
def frozen_model(context: Context) -> Iterator[PreTrainedModel]:
    """The softmax model, where `transfer.teacher` says; in host memory, if its blocks are to come one by one."""
    section = context.recipe.transfer
    if section.teacher == "zero3":
        with zero.partitioned(lambda: softmax_model(context), context.recipe.model.dtype) as model:
            yield model
    elif section.teacher == "spread":
        room = {device: int(size * ROOM_FOR_WEIGHTS) for device, size in get_max_memory().items()}
        # For weights that wait on disk in another form than the model's own files have.
        folder = context.stage_directory("transfer") / "offloaded"
        try:
            yield softmax_model(context, device_map="auto", max_memory=room, offload_folder=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        model = softmax_model(context)
        yield model if section.blocks_at_once else model.to(context.device)


def losses_of_layers(steps: list[dict[str, float]]) -> dict[str, list[float]]:
    """Layer index -> its loss, as means over `SPANS` equal spans of the stage, or over single steps if these are not as
    many; a layer that learns in the first steps alone has fewer.

    Args:
        steps: what was logged of each.
    """
    count = min(SPANS, len(steps))
    ends = [round(span * len(steps) / count) for span in range(count + 1)]
    losses = defaultdict(list)
    for start, end in pairwise(ends):
        found = defaultdict(list)
        for step in steps[start:end]:
            for name, value in step.items():
                if name.startswith(LOSS_OF_LAYER):
                    found[name.removeprefix(LOSS_OF_LAYER)].append(value)
        for layer, values in found.items():
            losses[layer].append(fmean(values))
    return dict(losses)


def held_out(context: Context) -> Tensor:
    """[N, T] windows of held-out text, of the stage's length, or one of all that there is."""
    length, sources = context.recipe.transfer.length, context.recipe.data.heldout
    stream = token_stream("data.heldout", sources, context.tokenizer, HELD_OUT * length)
    return windows(stream, min(length, len(stream)))


def errors_of_heads(model: PreTrainedModel, ids: Tensor, blocks: Blocks | None = None) -> dict[str, list[float]]:
    """Layer index -> of each query head, kept ones included, the squared error of its output on `ids` [N, T] relative
    to the softmax output, which every layer hears. All processes measure the same, as ZeRO-3 has it.

    Args:
        model: under `IMPLEMENTATION`; blocks: as in `AttentionTransfer`.
    """
    layers = model.linear_attentions()
    for layer in layers.values():
        layer.task = HeadErrors()
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # One by one, as no step takes less memory.
    passes = [_reading(model, row[None], positions) for row in ids]
    if blocks is not None:
        blocks.run(passes)
    else:
        with torch.no_grad():
            for inputs in passes:
                model.base_model(**inputs)
    return {str(index): layer.task.relative.tolist() for index, layer in layers.items()}


def run(context: Context) -> Artifact:
    section, seed = shared("transfer", context.recipe.transfer, processes.count()), context.recipe.seed
    # What is wrong with these is said before hours of training.
    ids, around = held_out(context).to(context.device), None
    if context.recipe.model.head == "encoder":
        around = edges(context.tokenizer)
        ids = framed(ids, around)
    with frozen_model(context) as softmax:
        model = model_after(context, "install", softmax)
        train_only(model, lambda name: LINEAR in name)
        model.set_attn_implementation(IMPLEMENTATION)
        layers = model.linear_attentions()
        learning_rates = {
            parameter: section.layer(index)[0] for index, layer in layers.items() for parameter in layer.parameters()
        }
        blocks, batches = None, section
        if section.blocks_at_once is not None:
            blocks = Blocks(model, context.device, section.blocks_at_once)
            # Whole steps, which the objective divides.
            batches = section.model_copy(update={"micro_batch_size": None})
        objective = AttentionTransfer(section, seed, blocks, around)
        steps = train(context, "transfer", model, objective, batches, learning_rates)
        last = {
            str(index): layer.task.losses[-1].item()
            for index, layer in layers.items()
            # None in layers that stopped before, and where only the end of an interrupted stage was left to do.
            if getattr(layer, "task", None) is not None
        }
        with torch.autocast(context.device.type, torch.bfloat16, enabled=section.bf16):
            errors = errors_of_heads(model, ids, blocks)
    metrics = {
        "loss": [step["loss"] for step in steps],
        "last_loss_of_layer": last,
        "loss_of_layer": losses_of_layers(steps),
        "error_of_head": errors,
    }
    return Artifact(context.stage_directory("transfer"), metrics)
