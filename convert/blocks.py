"""Frozen models that are larger than the device: their decoder blocks come to it a few at a time.

All micro batches of a step go through those that are there; then come the next. Meanwhile the hidden states between
them wait in host memory, of one step at a time. So the frozen weights travel once per step, not once per micro batch.

What a family does around its blocks (embeddings, masks, rotary embeddings, arguments of each block) is done by its own
code: its forward pass runs every time, but blocks that are done are passed by, the first one that is not gets the
hidden states that were recorded, and the pass ends where the next blocks begin.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.layers.attending import UnsupportedModelError


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of modules that has all linear attention layers of `model` in it.

    Raises:
        UnsupportedModelError: there is none.
    """
    layers = {*model.linear_attentions().values()}
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and layers <= {*module.modules()}:
            return module
    raise UnsupportedModelError(_refusal(model, "has no list of decoder blocks"))


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return f"{type(model).__name__} {reason}; use transfer.blocks_at_once: null"


class _Recorded(Exception):
    """Ends a forward pass with the hidden states [B, T, C] that the next blocks begin with."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class Blocks:
    """Passes through a linearized model of which so many blocks are on the device at a time.

    Frozen weights of the others stay where they were, memory-mapped if the model was loaded so. All else of the base
    model moves to the device for good: what is trained, embeddings, norms. From then on it runs by `run` alone.

    Args:
        model: linearized, in host memory; what is trained requires gradients.
        device: where it computes.
        size: blocks that are there at a time.

    Raises:
        UnsupportedModelError: the model has no list of blocks; in `run`, it does not go through them one after the
            other, or hands on more than hidden states.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, size: int):
        self.model, self.device = model, device
        blocks = decoder_blocks(model)
        self.waiting = [{p: p.data for p in block.parameters() if not p.requires_grad} for block in blocks]
        self.groups = [range(len(blocks))[start : start + size] for start in range(0, len(blocks), size)]
        frozen = set().union(*self.waiting)
        for x in (*model.base_model.parameters(), *model.base_model.buffers()):
            if x not in frozen:
                x.data = x.data.to(device)
        for index, block in enumerate(blocks):
            block.forward = partial(self._block, index, block.forward)
        # Of a block's output, what comes behind the hidden states, or None where it is these alone.
        self.rest: list[tuple | None] = [None] * len(blocks)

    def run(self, passes: list[dict[str, Tensor]]) -> None:
        """Run the base model on each of some inputs, without gradients, for what its attention functions do there."""
        recorded: list[Tensor | None] = [None] * len(passes)
        for group in self.groups:
            self._bring(group)
            for number, inputs in enumerate(passes):
                recorded[number] = self._pass(group, inputs, recorded[number])
            for index in group:
                for parameter, waiting in self.waiting[index].items():
                    parameter.data = waiting

    def _bring(self, group: range) -> None:
        for index in group:
            for parameter, waiting in self.waiting[index].items():
                if self.device.type == "cuda":
                    # Pinned memory is copied while the device still computes; all of the model would be too much of it.
                    waiting = waiting.pin_memory()
                parameter.data = waiting.to(self.device, non_blocking=True)

    @torch.no_grad()
    def _pass(self, group: range, inputs: dict[str, Tensor], hidden: Tensor | None) -> Tensor | None:
        """What the blocks behind `group` begin with, if there are any; `hidden` is what it begins with itself."""
        self.group, self.hidden, self.next = group, hidden, 0
        try:
            self.model.base_model(**inputs)
        except _Recorded as recorded:
            return recorded.hidden.to("cpu", non_blocking=True)
        if self.next != len(self.rest):
            raise UnsupportedModelError(_refusal(self.model, "passes some of its blocks by"))
        return None

    def _block(self, index: int, forward: Callable, *args, **kwargs):
        """In place of the forward of block `index`."""
        if index != self.next:
            raise UnsupportedModelError(_refusal(self.model, "does not go through its blocks one after the other"))
        self.next += 1
        # In transformers, hidden states come first.
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == self.group.stop:
            raise _Recorded(hidden)
        if index < self.group.start:
            return hidden if self.rest[index] is None else (hidden, *self.rest[index])
        if index == self.group.start and index > 0:
            hidden = self.hidden.to(self.device, non_blocking=True)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
        output = forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            self.rest[index] = output[1:]
            if any(isinstance(x, Tensor) for x in self.rest[index]):
                raise UnsupportedModelError(_refusal(self.model, "hands on more than hidden states"))
        return output
