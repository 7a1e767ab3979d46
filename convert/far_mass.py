"""How much attention each head of a linear layer gives to what lies beyond its window."""

from functools import partial

import torch
from torch import Tensor, nn

from linearize.layers.config import LinearAttentionConfig
from linearize.layers.tokens import near


def divides_mass(config: LinearAttentionConfig) -> bool:
    """Whether near and far keys of a layer share one softmax-like distribution, so that far has a share of it."""
    return config.combine == "shared" and config.window is not None and config.feature_map is not None


@torch.no_grad()
def attention_weights(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """layer_idx -> the weights [H, T, T] (query, key) with which the layer adds up values when `model` reads `ids` [T].

    The layer itself says them: fed with one-hot values its output is its weights. The convolution is left out.
    """
    weights: dict[int, Tensor] = {}

    def ask(index: int, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
        q, k, _ = args
        values = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
        branches, backend = layer.branches, layer.backend
        layer.branches, layer.backend = branches - {"conv"}, "reference"
        # Not by a call of the layer, which would come here again.
        weights[index] = layer.forward(q, k, values, **kwargs)[0]
        layer.branches, layer.backend = branches, backend

    hooks = [
        layer.register_forward_pre_hook(partial(ask, index), with_kwargs=True)
        for index, layer in model.linear_attentions().items()
    ]
    try:
        model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return weights


def far_mass(model: nn.Module, ids: Tensor) -> dict:
    """The share of the attention weight on far keys, mean over the queries of `ids` [T] that have such keys.

    Returns:
        `mean` over all linear heads; `layers`: layer index -> one share per head, None of those that stay softmax.
    """
    position = torch.arange(len(ids))
    layers = model.linear_attentions()
    shares = {}
    for index, weights in attention_weights(model, ids).items():
        layer = layers[index]
        is_near = near(layer.config, position, position).tril()
        has_far = is_near.sum(-1) <= position
        # What the near keys leave: the weights of far keys alone need not sum to it under the delta rule, whose far
        # mass is bounded from below.
        share = 1 - (weights.cpu() * is_near).sum(-1)[:, has_far].mean(-1)
        shares[str(index)] = [
            None if head // layer.groups in layer.kept else value for head, value in enumerate(share.tolist())
        ]
    linear = [value for row in shares.values() for value in row if value is not None]
    return {"mean": sum(linear) / len(linear), "layers": shares}
