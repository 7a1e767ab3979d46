"""Relative position bias (T5, arXiv 1910.10683): what a family adds to scores, by distance instead of pair by pair."""

from functools import partial

import torch
from torch import Tensor, nn

from .kernels import at_distance


def tell_distances(module: nn.Module, implementations: set[str]) -> None:
    """From now on, under one of these attention implementations, a module that computes such a bias [1, H, Q, K] hands
    on [1, H, 1, 2 R - 1] instead, of keys R - 1 before the query to R - 1 behind it; further away nothing changes."""
    if hasattr(module, "compute_bias") and not isinstance(module.compute_bias, partial):
        module.compute_bias = partial(_compute_bias, module, implementations)


def _compute_bias(module: nn.Module, implementations: set[str], queries: int, keys: int, device=None, **past) -> Tensor:
    compute = type(module).compute_bias
    if module.config._attn_implementation not in implementations:
        return compute(module, queries, keys, device=device, **past)
    reach = module.relative_attention_max_distance
    return compute(module, 1, 2 * reach + 1, device=device, past_seen_tokens=reach)


def bias_by_distance(module: nn.Module, bias: Tensor | None) -> Tensor | None:
    """[H, 2 R - 1] of what came to the attention function as the bias; None for the zeros of modules without one."""
    if bias is None or bias.shape[2:] != (1, 2 * module.relative_attention_max_distance + 1):
        return None
    return bias[0, :, 0]


def bias_of_pairs(bias: Tensor, length: int) -> Tensor:
    """[1, H, T, T] of a bias by distance, for softmax attention."""
    position = torch.arange(length, device=bias.device)[None]
    return at_distance(bias, position, position)
