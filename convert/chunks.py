"""Long sequences through a linearized model chunk by chunk: activations of one chunk at a time, a cache between them.

`exact` is backpropagation through the whole sequence. A first pass, without gradients, leaves the cache before every
chunk. Then, from the last chunk to the first, each goes through the model again, from the cache before it; backward
starts from its loss and, with the gradient that the chunk behind it has given them, from the values of the cache that
it leaves. That gives the parameters' gradients and that of the cache before it. `truncated` goes through the model
once; each chunk takes the cache before it as given.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from linearize.convert import zero
from linearize.layers.cache import LinearCache, LinearCacheLayer


def cannot_carry(model: PreTrainedModel) -> str | None:
    """Why gradients do not get from chunk to chunk of `model`, which is linearized, or None."""
    others = [type(layer).__name__ for layer in LinearCache(model).layers if not isinstance(layer, LinearCacheLayer)]
    if not others:
        return None
    return f"this model has layers that are not attention, whose memory ({others[0]}) carries no gradients"


class Chunks:
    """Packed sequences, cut along their length.

    Args:
        model: linearized, and of no layers for which `cannot_carry` has a reason.
        input_ids, position_ids: [B, T]; a document begins where positions do not go on.
        size: tokens of each row in a chunk, 2 or more.
        engine: DeepSpeed's, around `model`.
    """

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, size: int,
        engine: nn.Module | None = None,
    ):  # fmt: skip
        self.model, self.input_ids, self.position_ids, self.engine = model, input_ids, position_ids, engine
        self.places = [slice(start, start + size) for start in range(0, input_ids.shape[1], size)]
        starts = position_ids.diff(dim=1) != 1
        self.segments = nn.functional.pad(starts.cumsum(1), (1, 0)) + 1 if starts.any() else None

    def backward(self, loss: Callable[[Tensor, slice], Tensor], exact: bool) -> Tensor:
        """Add to the gradients of the model's parameters those of a loss, and give the loss.

        Args:
            loss: gives the share of some tokens of each row, of their logits [B, n, V] and their place.
            exact: or else truncated.
        """
        if exact:
            return self._exact(loss)
        cache, total = LinearCache(self.model), 0.0
        for place in self.places:
            cache = cache.branch(Tensor.detach, self._segments(place), detached=True)
            share = loss(self._forward(self.engine or self.model, place, cache).logits, place)
            self._backward(share, is_last=place == self.places[-1])
            total = total + share.detach()
        return total

    def _exact(self, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        # Dropout is to be the same in both passes.
        seeds = torch.randint(2**62, (len(self.places),)).tolist()
        before = [LinearCache(self.model)]
        # Past the engine, whose forward does the same.
        with torch.no_grad(), nullcontext() if self.engine is None else zero.autocast(self.engine):
            for place, seed in list(zip(self.places, seeds, strict=True))[:-1]:
                cache = before[-1].branch(Tensor.detach, self._segments(place))
                torch.manual_seed(seed)
                self._forward(self.model.base_model, place, cache)
                before.append(cache.branch(Tensor.detach))
        gradients, total = [], 0.0
        for place, seed in reversed(list(zip(self.places, seeds, strict=True))):
            cache = before.pop().branch(lambda x: x.detach().requires_grad_(), self._segments(place))
            leaves = cache.contents()
            torch.manual_seed(seed)
            share = loss(self._forward(self.engine or self.model, place, cache).logits, place)
            total, root = total + share.detach(), share
            if gradients:
                # A value has no gradient that nobody has looked at, and needs none where nothing before it is trained.
                pairs = zip(cache.contents(), gradients, strict=True)
                # One number, as DeepSpeed wants, whose gradient with respect to a value is what is known of it.
                root = share + sum((x * dx).sum() for x, dx in pairs if x.requires_grad and dx is not None)
            self._backward(root, is_last=place == self.places[0])
            gradients = [x.grad for x in leaves]
        return total

    def _segments(self, place: slice) -> Tensor | None:
        return None if self.segments is None else self.segments[:, place]

    def _forward(self, module: nn.Module, place: slice, cache: LinearCache):
        ids, positions = self.input_ids[:, place], self.position_ids[:, place]
        return module(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)

    def _backward(self, root: Tensor, is_last: bool) -> None:
        # Autocast is for forward passes: here it would round what they have computed in single precision.
        with torch.autocast(root.device.type, enabled=False):
            if self.engine is None:
                root.backward()
            else:
                zero.add_gradients(self.engine, root, is_last)


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing that knows caches: transformers' own takes them away from the blocks.

    Raises:
        ValueError: naming the field, when the model has no blocks that can be checkpointed.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError("finetune.gradient_checkpointing: this model has no blocks that can be computed again")
    for block in blocks:
        layers = [module.layer_idx for module in block.modules() if "linear_attention" in module._modules]
        block.forward = partial(_recomputed, block.forward, layers)


def _recomputed(forward: Callable, layers: list[int], *args, **kwargs):
    """`forward` of a block with linear attention `layers`, each time from the cache that it is given now."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    cache = next(value for value in (*args, *kwargs.values()) if isinstance(value, LinearCache))
    before = {index: cache.layers[index] for index in layers}

    def from_before(*args, **kwargs):
        for index, layer in before.items():
            cache.layers[index] = layer.branch(layer.shared, lambda x: x)
        return forward(*args, **kwargs)

    return checkpoint(from_before, *args, use_reentrant=False, **kwargs)
