"""How much attention each head gives to what lies beyond a window: linear heads, and the softmax heads before them."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from linearize.layers.config import LinearAttentionConfig
from linearize.layers.tokens import near

IMPLEMENTATION = "linearize_softmax_weights"
T = TypeVar("T")


def divides_mass(config: LinearAttentionConfig) -> bool:
    """Whether near and far keys of a layer share one softmax-like distribution, so that far has a share of it."""
    return config.combine == "shared" and config.window is not None and config.feature_map is not None


@torch.no_grad()
def attention_weights(model: nn.Module, ids: Tensor, of: Callable[[Tensor], T]) -> dict[int, T]:
    """layer_idx -> what `of` makes of the weights [H, T, T] (query, key), fp32, with which the layer adds up values
    when `model` reads `ids` [T]; those of one layer at a time.

    The layer itself says them: fed with one-hot values its output is its weights. The convolution is left out.

    Args:
        model: linearized, or a softmax model.
    """
    found: dict[int, T] = {}
    ids = ids[None].to(next(model.parameters()).device)
    if not hasattr(model, "linear_attentions"):
        sdpa, before = AttentionInterface()["sdpa"], model.config._attn_implementation

        def attend(module, query, key, value, attention_mask, **kwargs):
            weights, _ = sdpa(module, query.float(), key.float(), _one_hot(key), attention_mask, **kwargs)
            found[module.layer_idx] = of(weights[0].transpose(0, 1))
            return sdpa(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation(IMPLEMENTATION)
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            model.set_attn_implementation(before)
        return found

    def ask(index: int, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
        q, k, _ = args
        branches, backend = layer.branches, layer.backend
        layer.branches, layer.backend = branches - {"conv"}, "reference"
        # Not by a call of the layer, which would come here again.
        found[index] = of(layer.forward(q, k, _one_hot(k), **kwargs)[0])
        layer.branches, layer.backend = branches, backend

    hooks = [
        layer.register_forward_pre_hook(partial(ask, index), with_kwargs=True)
        for index, layer in model.linear_attentions().items()
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _one_hot(k: Tensor) -> Tensor:
    """Values [B, H_kv, T, T] of keys [B, H_kv, T, D]."""
    return torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)


def far_mass(model: nn.Module, ids: Tensor, config: LinearAttentionConfig) -> dict:
    """The share of the attention weight on far keys, mean over the queries of `ids` [T] that have such keys.

    Args:
        model: linearized, or a softmax model, which has no window itself.
        config: of the linear layers, whose window says what is far.

    Returns:
        `mean` over all heads that have one; `layers`: layer index -> one share per head, None of those that stay
        softmax in a linearized model.
    """
    position = torch.arange(len(ids))
    is_near = near(config, position, position).tril()
    has_far = is_near.sum(-1) <= position

    def share(weights: Tensor) -> list[float]:
        # What the near keys leave: the weights of far keys alone need not sum to it under the delta rule, whose far
        # mass is bounded from below.
        return (1 - (weights.cpu() * is_near).sum(-1)[:, has_far].mean(-1)).tolist()

    shares: dict[int, list[float | None]] = attention_weights(model, ids, share)
    for index, layer in getattr(model, "linear_attentions", dict)().items():
        groups = len(shares[index]) // (layer.kv_heads + len(layer.kept))
        shares[index] = [None if head // groups in layer.kept else x for head, x in enumerate(shares[index])]
    known = [value for row in shares.values() for value in row if value is not None]
    return {"mean": sum(known) / len(known), "layers": {str(index): row for index, row in shares.items()}}
