"""Decoding steps as CUDA graphs: captured once, replayed with one launch, for later texts too.

A step launches some thousand small kernels, which takes Python longer than it takes the GPU to run them. A graph goes
on with the memory that it was captured with: graphs have caches of their own (`Place`), to which a text goes for as
long as it is read and written, by one graph after the other. Where heads are kept softmax, a place has slots for the
tokens that they remember, and another one, with twice as many, takes over before these are full.
"""

import math
import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor, nn

from .cache import LinearCache, LinearCacheLayer, copy_all
from .kernels import triton_kernels
from .norms import fused_norms

# Graphs that a model keeps; each has the activations of a step, and those of as many rows share a cache.
KEPT = 8
# The fewest slots for tokens of kept heads; a power of 2.
SLOTS = 1024
# Nodes that kept heads which forget have slots for at least, so that plain steps share a place with `reading`'s chains.
NODES = 64


@dataclass
class Place:
    """A cache that graphs go on with.

    Attributes:
        key: what its sizes depend on: the model's weights (`survey`), rows, and slots of kept heads.
        taken: whether a text is here.
    """

    key: tuple
    cache: LinearCache
    taken: bool = False


@dataclass
class Captured:
    """graph: None where a step could not be captured; step: what was captured, with all that the graph reads, on the
    cache of `place`; found: what it returns."""

    graph: torch.cuda.CUDAGraph | None
    step: object
    place: Place
    found: Tensor | tuple[Tensor, ...] | None


# model -> what a graph depends on -> Captured
_graphs = WeakKeyDictionary()


def parts(model: nn.Module) -> list[nn.Module]:
    """A model and all modules in it, in a third of the time that its `modules` takes."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def works_on(module: nn.Module) -> torch.device:
    """Where a module works: weights that accelerate brings for each call are on "meta" in between."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def survey(model) -> tuple[str | None, tuple[int, ...]]:
    """Why no step of a model can be captured as it is now, or None; where its weights are in memory, which is how
    graphs know them."""
    device = next(model.parameters()).device.type
    if device != "cuda" or triton_kernels.step is None:
        return "graphs are of a GPU's fused kernels", ()
    if torch.is_autocast_enabled(device):
        return "weights are cast anew at every step", ()
    places = []
    for module in parts(model):
        if module.training:
            return "the model is in training mode", ()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # Those of `seam` only hand on what is captured.
            if not getattr(hook, "func", hook).__module__.startswith(__package__ + "."):
                return "a module has hooks, which a graph does not call", ()
        # Not hasattr, which takes long to say no.
        if "_hf_hook" in vars(module):
            return "a module is wrapped by accelerate, which a graph does not call", ()
        places += [weight.data_ptr() for weight in module._parameters.values() if weight is not None]
    return None, tuple(places)


def refuses(step, cache: LinearCache, linear: dict) -> str | None:
    """Why a step (`decoding.Step`, `reading.Reading`) cannot be captured on a cache like this one, or None.

    Args:
        linear: the model's `linear_attentions`.
    """
    fused_step = triton_kernels.step
    if step.reads_text:
        return "a processor or criterion reads the text"
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
    return None


class Replay:
    """Runs steps that go on with `cache`, as graphs where that can be: captured when they are first run, unless that
    was done for an earlier text.

    In a `with` block: behind it, also where it has failed, the cache and the latest step hold what has been done.

    Attributes:
        refused, weights: see `survey`; linear: the model's `linear_attentions`.
        step, captured: what is run, and its graph if there is one.
        place: where the text is instead of in `cache`; None where steps are run as they are.
        room: calls until slots of kept heads may be full.
    """

    def __init__(self, model, cache: LinearCache):
        self.model, self.cache, self.graphs = model, cache, _graphs.setdefault(model, {})
        (self.refused, self.weights), self.linear = survey(model), model.linear_attentions()
        self.step = self.captured = self.place = None
        self.room = 0

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_) -> None:
        self._save()
        self._leave()

    def __call__(self, step):
        """What `step` returns."""
        if step is not self.step or not self.room:
            self.turn_to(step)
        self.room -= 1
        if self.place is None:
            return step()
        if self.captured is None:
            # Tensors made in inference mode could not be written outside of it, by later texts.
            with torch.inference_mode(False):
                twin = step.twin(self.place.cache)
            found, self.captured = capture(twin, self.place)
            self.graphs[self.key] = self.captured
            while len(self.graphs) > KEPT:
                del self.graphs[next(iter(self.graphs))]
        elif self.captured.graph is None:
            found = self.captured.step()
        else:
            self.captured.graph.replay()
            found = self.captured.found
        for layer in self.cache.layers:
            layer.seen += step.reach
        return found

    def turn_to(self, step) -> bool:
        """Make ready to run a step next, and say whether it will be a graph."""
        self._save()
        self.step, self.captured, self.room = step, None, math.inf
        if self.refused:
            return False
        slots, room = self._slots(step)
        place_key = self.weights, len(self.cache.length) if self.cache.begun else step.batch, slots
        if self.place is not None and self.place.key != place_key:
            self._leave()
        free = (each.place for each in self.graphs.values() if not each.place.taken)
        place = self.place or next((place for place in free if place.key == place_key), None)
        like = self.cache if place is None else place.cache
        # Before the first token only a place shows the sizes of a cache.
        if not like.begun or refuses(step, like, self.linear):
            self._leave()
            return False
        if self.place is None:
            self._enter(place or Place(place_key, LinearCache(self.model)), slots)
        self.room, tensors = room, step.tensors()
        self.key = place_key, type(step), step.settings, tuple(x.shape for x in tensors)
        captured = self.graphs.get(self.key)
        if captured is not None and captured.place is self.place:
            self.captured = captured
            copy_all(captured.step.tensors(), tensors)
        return True

    def _slots(self, step) -> tuple[int, float]:
        """Slots that memories of kept heads need, 0 where there are no such heads, and for how many steps."""
        config = next((linear.config for linear in self.linear.values() if linear.kept), None)
        if config is None:
            return 0, math.inf
        if config.kept_tokens is not None:
            return config.kept_tokens + max(step.nodes, NODES), math.inf
        # The length is waited for, but the tokens that were chosen before have been, too.
        cache = self.cache if self.place is None else self.place.cache
        longest = int(cache.length.max()) if cache.begun else 0
        # Twice as many each time, so that a long text takes few captures.
        slots = max(SLOTS, 1 << (longest + step.nodes - 1).bit_length())
        # A step adds `reach` tokens at most, and needs a slot for each node.
        return slots, (slots - longest - step.nodes) // step.reach + 1

    def _enter(self, place: Place, slots: int) -> None:
        begun = self.cache.begun
        if begun:
            remember(self.linear, self.cache, slots)
        if not place.cache.begun:
            # As above.
            with torch.inference_mode(False):
                place.cache.take(self.cache)
        elif begun:
            copy_all(place.cache.tensors(), self.cache.tensors())
        else:
            place.cache.clear()
        self.place, place.taken = place, True

    def _leave(self) -> None:
        place, self.place = self.place, None
        if place is not None:
            place.taken = False
            self.cache.take(place.cache)
            for layer in self.cache.layers:
                layer.memory.release()

    def _save(self) -> None:
        """Bring the step, but for its cache, to where its graph has come."""
        if self.captured is not None:
            copy_all(self.step.tensors(), self.captured.step.tensors())


def capture(step, place: Place) -> tuple[object, Captured]:
    """What a step on the cache of a place returns, and the step captured."""
    # Also because kernels must have been compiled before a capture.
    found, graph = step(), torch.cuda.CUDAGraph()
    try:
        with fused_norms(step.model), torch.cuda.graph(graph):
            return found, Captured(graph, step, place, step())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"decoding goes on without a CUDA graph, as a step cannot be captured: {reason}", stacklevel=2)
        return found, Captured(None, step, place, None)
    finally:
        # Kept here, it would never be freed: what the graph is found by is the model itself.
        step.model = proxy(step.model)


def remember(linear: dict, cache: LinearCache, slots: int) -> None:
    """Make ready for steps what a prompt has left, so that the cache has the tensors that steps go on with.

    Args:
        linear: the model's `linear_attentions`; slots: of kept heads' memories.
    """
    for index, attention in linear.items():
        layer = cache.layers[index]
        if attention.heads and layer.far is None:
            triton_kernels.step.remember(attention, layer)
        if attention.kept:
            layer.memory.reserve(slots)
