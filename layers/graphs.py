"""Decoding steps as CUDA graphs: captured once, replayed with one launch, for later texts too.

A step launches some thousand small kernels, which takes Python longer than it takes the GPU to run them. A graph goes
on with the memory that it was captured with: the step here has a cache of its own, into which that of a prompt is
copied and out of which it is copied in the end. Where heads are kept softmax, a graph has slots for the tokens that
they remember, and another one, with twice as many, takes over before these are full.
"""

import math
import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cache import LinearCache, LinearCacheLayer
from .kernels import triton_kernels
from .norms import fused_norms

# Graphs that a model keeps; each has the activations of a step, and a cache.
KEPT = 8
# The fewest slots for tokens of kept heads; a power of 2.
SLOTS = 1024


def replayed(step):
    """What does as `step` does, as a graph where that can be."""
    return step if refuses(step) else Replay(step)


def refuses(step) -> str | None:
    """Why a step (`decoding.Step`, `reading.Reading`) cannot be captured, or None."""
    model, cache = step.model, step.cache
    fused_step = triton_kernels.step
    if step.device.type != "cuda" or fused_step is None:
        return "graphs are of a GPU's fused kernels"
    if torch.is_autocast_enabled(step.device.type):
        return "weights are cast anew at every step"
    if step.reads_text:
        return "a processor or criterion reads the text"
    linear = model.linear_attentions()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, LinearCacheLayer):
            return f"{type(layer).__name__} may move its memory"
        if not linear[index].heads:
            continue
        if linear[index].backend not in ("auto", "triton"):
            return "another backend is asked for"
        if reason := fused_step.refuses(linear[index], layer, step.nodes):
            return reason
        if step.nodes > 1 and not fused_step.accepts(layer, step.reach):
            return "the tree is too deep"
    for module in model.modules():
        if module.training:
            return "the model is in training mode"
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        # Those of `seam` only hand on what is captured.
        foreign = [hook for hook in hooks if not getattr(hook, "func", hook).__module__.startswith(__package__ + ".")]
        if foreign or hasattr(module, "_hf_hook"):
            return "a module has hooks, which a graph does not call"
    return None


class Replay:
    """In the place of `step`: its first call captures it, unless that was done for an earlier text.

    Attributes:
        fixed, key: what a graph depends on, without and with the shapes of the step's tensors.
        room: calls until slots of kept heads may be full.
    """

    def __init__(self, step):
        self.step, self.captured, self.replays, self.room = step, None, 0, 0
        self.graphs = _graphs.setdefault(step.model, {})
        self.fixed = type(step), step.settings, places(step.model)

    def __call__(self):
        if not self.room:
            self.make_room()
        self.room -= 1
        if self.captured is None and self.key in self.graphs:
            self.captured = self.graphs[self.key]
            if self.captured.graph is not None:
                torch._foreach_copy_(self.captured.tensors, self.step.tensors())
        if self.captured is None or self.captured.graph is None:
            # Also before a capture, since kernels must have been compiled by then.
            found = self.step()
            if self.captured is None:
                self.graphs[self.key] = capture(self.step)
                while len(self.graphs) > KEPT:
                    del self.graphs[next(iter(self.graphs))]
            return found
        self.captured.graph.replay()
        self.replays += 1
        return self.captured.found

    def make_room(self) -> None:
        """Before the first call, and when slots may be full: on to tensors that have more, and to their graph."""
        self.finish()
        self.captured, self.room = None, remember(self.step)
        self.key = self.fixed, tuple(x.shape for x in self.step.tensors())

    def finish(self) -> None:
        """Bring the step's own cache to where the graph has come."""
        if self.replays:
            torch._foreach_copy_(self.step.tensors(), self.captured.tensors)
        for layer in self.step.cache.layers:
            layer.seen += self.replays * self.step.reach
            layer.memory.release()
        self.replays = 0


@dataclass
class Captured:
    """graph: None where a step could not be captured; step: what was captured, with all that the graph reads; tensors:
    those of the step; found: what it returns."""

    graph: torch.cuda.CUDAGraph | None
    step: object
    tensors: list[Tensor]
    found: Tensor | tuple[Tensor, ...] | None


# model -> `Replay.key` -> Captured
_graphs = WeakKeyDictionary()


def capture(step) -> Captured:
    """A step on memory of its own; nothing is run."""
    twin, graph = step.twin(), torch.cuda.CUDAGraph()
    try:
        with fused_norms(step.model), torch.cuda.graph(graph):
            found = twin()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"decoding goes on without a CUDA graph, as a step cannot be captured: {reason}", stacklevel=2)
        return Captured(None, None, [], None)
    # Kept here, it would never be freed: what the graph is found by is the model itself.
    twin.model = None
    return Captured(graph, twin, twin.tensors(), found)


def places(module: torch.nn.Module) -> tuple[int, ...]:
    """Where weights are in memory, which is how graphs know them."""
    return tuple(weight.data_ptr() for weight in module.parameters())


def begin(model, cache: LinearCache, rows: int) -> bool:
    """Make an empty cache ready for steps, where one of as many rows has been captured, which shows its sizes."""
    weights = places(model)
    for (fixed, _), known in _graphs.get(model, {}).items():
        if known.graph is not None and weights in fixed and len(known.step.cache.length) == rows:
            cache.start_like(known.step.cache)
            return True
    return False


def remember(step) -> float:
    """Make ready for steps what a prompt has left, so that its cache has the tensors that a captured one has.

    Returns how many steps there is room for: where kept heads remember all tokens, their slots may be full then.
    """
    # The length is waited for, but the tokens that were chosen before have been, too.
    nodes, most, longest = step.nodes, step.reach, int(step.cache.length.max())
    # Twice as many each time, so that a long text takes few captures.
    slots, room = max(SLOTS, 1 << (longest + nodes - 1).bit_length()), math.inf
    for index, linear in step.model.linear_attentions().items():
        layer, limit = step.cache.layers[index], linear.config.kept_tokens
        if not linear.heads:
            # What steps write into is this layer's alone.
            layer.length, layer.count, layer.segment = layer.length.clone(), layer.count.clone(), layer.segment.clone()
        elif layer.far is None:
            triton_kernels.step.remember(linear, layer)
        if linear.kept:
            layer.memory.reserve(slots if limit is None else limit + nodes)
            if limit is None:
                # A step adds `most` tokens at most, and needs a slot for each node.
                room = (slots - longest - nodes) // most + 1
    return room
