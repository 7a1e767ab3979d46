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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from linearize.convert import processes, zero
from linearize.convert.batches import draws, shared
from linearize.convert.blocks import Blocks
from linearize.convert.context import Artifact, Context
from linearize.convert.data import token_stream
from linearize.convert.encoders import edges, framed
from linearize.convert.examples import collated, read_examples
from linearize.convert.hiding import hiding
from linearize.convert.models import LINEAR, model_after, softmax_model, train_only
from linearize.convert.objectives import OBJECTIVES, Example, softmax_mask
from linearize.convert.probes import windows
from linearize.convert.training import train
from linearize.layers.attending import is_encoder_decoder
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
        # What attends to another sequence has no window, and its output is all that there is to learn.
        objectives = {"output_mse": 1.0} if example.crosses else self.objectives
        with torch.enable_grad():
            loss = sum(weight * OBJECTIVES[name](example) for name, weight in objectives.items())
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
        ids = batch["input_ids"]
        if self.around is not None:
            batch = batch | {"input_ids": framed(ids, self.around)}
        rows = len(ids) if self.blocks is None else self.section.tokens_per_pass // ids.shape[1]
        passes = _readings(model, batch, rows)
        layers = model.linear_attentions()
        for index, layer in layers.items():
            _, steps = self.section.layer(index)
            layer.task = None
            if step < steps:
                layer.task = Task(self.section.objectives.active, self._branches(step), accumulation * len(passes))
        if self.blocks is None:
            with torch.no_grad():
                _reader(model)(**passes[0])
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


def _reader(model: PreTrainedModel) -> nn.Module:
    """What goes through all layers: no logits are asked for, but some encoder-decoders make of a text what both of
    their parts read."""
    return model if is_encoder_decoder(model) else model.base_model


def _readings(model: PreTrainedModel, batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor | bool]]:
    """Arguments of passes through `_reader`, of so many rows of a batch each. Encoders count positions themselves,
    and not all are told them."""
    left_out = {"labels", "position_ids"} if model.is_encoder else {"labels"}
    parts = {name: x.split(rows) for name, x in batch.items() if name not in left_out}
    rest = {} if model.is_encoder else {"use_cache": False}
    return [dict(zip(parts, values, strict=True)) | rest for values in zip(*parts.values(), strict=True)]


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


def held_out(context: Context, config: PreTrainedConfig) -> dict[str, Tensor]:
    """A batch of `HELD_OUT` held-out sequences as the stage reads them, or of one of all the text that there is.

    Args:
        config: of the model.
    """
    recipe, tokenizer = context.recipe, context.tokenizer
    length = recipe.transfer.length
    if recipe.data.has_examples:
        some = read_examples("data.heldout", recipe.data, tokenizer, length, context.labels, HELD_OUT)
        return collated(some, config)
    stream = token_stream("data.heldout", recipe.data.heldout, tokenizer, HELD_OUT * length)
    ids = windows(stream, min(length, len(stream)))
    if recipe.model.head == "encoder":
        ids = framed(ids, edges(tokenizer))
    if hide := hiding(recipe.model.head, tokenizer, config):
        sequences = [hide(row, draws(recipe.seed, "held out", number)) for number, row in enumerate(ids)]
        return {name: torch.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def errors_of_heads(
    model: PreTrainedModel, batch: dict[str, Tensor], blocks: Blocks | None = None
) -> dict[str, list[float]]:
    """Layer index -> of each query head, kept ones included, the squared error of its output on `batch` relative to the
    softmax output, which every layer hears. All processes measure the same, as ZeRO-3 has it.

    Args:
        model: under `IMPLEMENTATION`; blocks: as in `AttentionTransfer`.
    """
    layers = model.linear_attentions()
    for layer in layers.values():
        layer.task = HeadErrors()
    # One by one, as no step takes less memory.
    passes = _readings(model, batch, 1)
    if blocks is not None:
        blocks.run(passes)
    else:
        with torch.no_grad():
            for inputs in passes:
                _reader(model)(**inputs)
    return {str(index): layer.task.relative.tolist() for index, layer in layers.items()}


def run(context: Context) -> Artifact:
    section, seed = shared("transfer", context.recipe.transfer, processes.count()), context.recipe.seed
    around = edges(context.tokenizer) if context.recipe.model.head == "encoder" else None
    with frozen_model(context) as softmax:
        model = model_after(context, "install", softmax)
        # What is wrong with these is said before hours of training.
        measured = {name: x.to(context.device) for name, x in held_out(context, model.config).items()}
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
            errors = errors_of_heads(model, measured, blocks)
    metrics = {
        "loss": [step["loss"] for step in steps],
        "last_loss_of_layer": last,
        "loss_of_layer": losses_of_layers(steps),
        "error_of_head": errors,
    }
    return Artifact(context.stage_directory("transfer"), metrics)
