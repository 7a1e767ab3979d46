"""Which modules of a model attend, and whether they can be replaced: by what they call, not by their family."""

import inspect

from torch import nn
from transformers import PreTrainedModel

from .attention import LinearAttention
from .cross import CrossAttention
from .rotary import is_rotary, rotates_pairs


class UnsupportedModelError(ValueError):
    """The model's attention cannot be replaced; the message names the module class."""


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module sees only what is not after a token; encoders' do not."""
    return getattr(module, "is_causal", True)


def is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(model.config, "is_encoder_decoder", False)


def is_numbered(model: nn.Module) -> bool:
    """Whether its layers go by running numbers: those of encoders have no cache to find by a layer's index, and those
    of an encoder and a decoder have the same ones."""
    return is_encoder_decoder(model) or getattr(model, "is_encoder", False)


def cross_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules by which a decoder attends to its encoder's states."""
    if not is_encoder_decoder(model):
        return []
    return [module for module in model.get_decoder().modules() if _calls_interface(module) and not is_causal(module)]


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """layer_idx, or, where there is an encoder, a running number -> self-attention module that goes through
    transformers' attention interface.

    Raises:
        UnsupportedModelError: naming the first class whose attention does not, or cannot be replaced.
    """
    found, both, crossing = {}, is_encoder_decoder(model), {*cross_attention_modules(model)}
    for name, module in model.named_modules():
        if isinstance(module, (LinearAttention, CrossAttention)) or module in crossing:
            continue
        if not (_is_named_attention(module) or _calls_interface(module)):
            continue
        # A wrapper around the real attention module (as BERT's) is no obstacle.
        if not _calls_interface(module) and any(map(_is_named_attention, list(module.modules())[1:])):
            continue
        reason = _obstacle(module)
        if reason is None and found and not both and is_causal(module) != is_causal(next(iter(found.values()))):
            reason = f"is {'' if is_causal(module) else 'not '}causal, unlike others of its modules"
        index = module.layer_idx if reason is None and is_causal(module) and not both else len(found)
        if reason is None and index in found:
            reason = f"shares layer index {index} with another attention module"
        if reason is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be linearized: {type(module).__name__} at {name} {reason}"
            )
        found[index] = module
    if found and both and not any(map(is_causal, found.values())):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be linearized: nothing in its decoder says that it is causal"
        )
    if not found:
        blocks = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")})
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be linearized: none of its modules goes through transformers' attention "
            f"interface (its layers are {', '.join(blocks) or 'unnamed'})"
        )
    return found


def _is_named_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _code(module: nn.Module):
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _calls_interface(module: nn.Module) -> bool:
    return _code(module) is not None and "ALL_ATTENTION_FUNCTIONS" in _code(module).co_names


def _obstacle(module: nn.Module) -> str | None:
    """Why an attention module cannot be replaced, or None."""
    if not _calls_interface(module):
        return "does not go through transformers' attention interface"
    if is_causal(module) and not isinstance(getattr(module, "layer_idx", None), int):
        return "has no layer index"
    if getattr(module, "is_cross_attention", False):
        return "attends to another sequence"
    if hasattr(module, "kv_lora_rank") or hasattr(module, "v_head_dim"):
        return "compresses its keys (multi-head latent attention)"
    if is_rotary(module) and not rotates_pairs(module):
        return "rotates by a function other than apply_rotary_pos_emb(q, k, cos, sin)"
    if any(isinstance(const, tuple) and "s_aux" in const for const in _code(module).co_consts):
        return "has learned sinks inside its softmax (it passes s_aux to the interface)"
    if getattr(getattr(module, "config", None), "attn_logit_softcapping", None) is not None:
        return "caps its scores (attn_logit_softcapping)"
    return None


def head_shape(module: nn.Module, config) -> tuple[int, int, int]:
    """Query heads, key heads and head dimension of an attention module, from it or its model's configuration."""
    own = getattr(module, "num_heads", None)
    heads = own if isinstance(own, int) else config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    if hasattr(module, "num_key_value_groups"):
        return heads, heads // module.num_key_value_groups, head_dim
    if getattr(config, "multi_query", False):
        return heads, 1, head_dim
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def head_shapes(model: PreTrainedModel) -> dict[int, tuple[int, int, int]]:
    """layer_idx -> `head_shape`; raises as `attention_modules`."""
    config = model.config.get_text_config(decoder=True)
    return {index: head_shape(module, config) for index, module in attention_modules(model).items()}
