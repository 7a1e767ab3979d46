"""Where the layer meets transformers: no line here knows a model family.

Attention modules that call transformers' attention interface are found by that call. Each gets a `linear_attention`
submodule and a forward pre-hook; the interface is pointed at the function below. The hook keeps what the interface
does not pass on: the cache, and the rotary embedding, which it takes away from the family's own code (cos 1, sin 0)
so that q and k arrive un-rotated; the rotation that the window needs is done here, by the family's own function.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.masking_utils import bidirectional_mask_function

from .attending import (
    UnsupportedModelError,
    attention_modules,
    cross_attention_modules,
    head_shape,
    head_shapes,
    is_causal,
    is_encoder_decoder,
    is_numbered,
)
from .attention import LinearAttention
from .bias import bias_by_distance, tell_distances
from .cache import LinearCache, LinearCacheLayer
from .config import LinearAttentionConfig
from .cross import CrossAttention, CrossCache, CrossCacheLayer, cross_softmax
from .decoding import Choice, decode, knows
from .graphs import parts, works_on
from .rotary import Watch, is_rotary, nothing, rotary_embeddings, rotated, skip_nothing, with_capped
from .speculative import carry_heads, speculate
from .tokens import segments_from_cu_seqlens

IMPLEMENTATION = "linearize"
# Attention implementations under which the hook is at work; the transfer stage registers a second one.
IMPLEMENTATIONS = {IMPLEMENTATION}


@dataclass
class Call:
    """What one call of an attention module keeps for its attention function."""

    cache: LinearCacheLayer | CrossCacheLayer | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    sink_rotary: tuple[Tensor, Tensor] | None = None


class LinearizedMixin:
    """A transformers model whose attention is linear: `class X(LinearizedMixin, LlamaForCausalLM)`.

    `config.linear_attention` holds the layer's configuration (`LinearAttentionConfig.to_dict()`), and
    `config.kept_heads` the key heads that stay softmax: layer index, as text, -> heads.
    """

    # Masters stay fp32 when the model is loaded in half precision.
    _keep_in_fp32_modules_strict = {"linear_attention"}
    # Whether all its layers look both ways, so that there is no cache to go on from.
    is_encoder = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        kept = {int(index): tuple(heads) for index, heads in (getattr(config, "kept_heads", None) or {}).items()}
        _install(self, LinearAttentionConfig(**config.linear_attention), kept)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """transformers' own; `train_linear_attention` is off."""
        loaded = super().from_pretrained(*args, **kwargs)
        # With `output_loading_info` there is more.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.train_linear_attention(False)
        return loaded

    def train_linear_attention(self, mode: bool = True) -> None:
        """Whether gradients reach feature maps, gates and convolutions. Those of a loaded model have been learned, and
        are not to follow whatever little text it is trained on further, unless this is asked for."""
        for layer in self.linear_attentions().values():
            layer.requires_grad_(mode)

    def linear_modules(self) -> list[nn.Module]:
        """The attention modules that have a linear layer, those that attend to another sequence last."""
        # What `attention_modules` found at installation, without its look at each module's code.
        modules = [module for module in parts(self) if "linear_attention" in module._modules]
        return sorted(modules, key=lambda module: module.linear_attention.crosses)

    def linear_attentions(self) -> dict[int, LinearAttention | CrossAttention]:
        """layer_idx, where there is an encoder a running number -> layer."""
        numbered = is_numbered(self)
        return {
            number if numbered else module.layer_idx: module.linear_attention
            for number, module in enumerate(self.linear_modules())
        }

    # A decoding loop: `model.generate(.., custom_generate=model.speculate)`.
    speculate = staticmethod(speculate)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        if is_main_process:
            carry_heads(self, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """
        Raises:
            NotImplementedError: always, as transformers' continuous batching keeps keys in pages.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has a state in place of pages of keys, which continuous batching needs: use "
            "`generate`, which takes batches, or `transformers serve` without --continuous-batching"
        )

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs,
    ):  # fmt: skip
        """transformers' loop, greedy or sampling; on a GPU our own, whose steps are CUDA graphs, where it does all
        that is asked for."""
        known = knows(logits_processor, stopping_criteria, generation_config, model_kwargs)
        if input_ids.is_cuda and known and not synced_gpus and not is_encoder_decoder(self):
            choose = Choice(logits_processor, generation_config.do_sample)
            return decode(
                self, input_ids, choose, stopping_criteria, generation_config, model_kwargs, streamer=streamer
            )
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        wants_cache = generation_config.use_cache is not False and generation_mode != GenerationMode.CONTRASTIVE_SEARCH
        if wants_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = new_cache(self)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of a linearized model: a `LinearCache`, where there is an encoder with another beside it for what
    the decoder knows of the encoder's states.

    Raises:
        ValueError: all of the model's layers look both ways.
    """
    cache = LinearCache(model)
    if not is_encoder_decoder(model):
        return cache
    # Softmax cross attention has what transformers makes for it.
    linear = model.config.linear_attention.get("cross") == "linear"
    return EncoderDecoderCache(cache, CrossCache(len(cache.layers)) if linear else DynamicCache())


def linearized_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`base` with `LinearizedMixin` in front."""
    return type(f"Linearized{base.__name__}", (LinearizedMixin, base), {"__module__": __name__})


def install(
    model: PreTrainedModel, config: LinearAttentionConfig, kept: dict[int, tuple[int, ...]] | None = None
) -> PreTrainedModel:
    """Give every attention module of `model` a `LinearAttention` and switch to it, in place.

    What was installed before is replaced.

    Args:
        kept: layer index -> key heads that stay softmax, with all the query heads of their group.

    Raises:
        UnsupportedModelError: when an attention module cannot be replaced.
        ValueError: when `config` does not fit the model's heads, or a head of `kept` is not there. The model is
            untouched in both cases.
    """
    kept = kept or {}
    _install(model, config, kept)
    if not isinstance(model, LinearizedMixin):
        model.__class__ = linearized_class(type(model))
    model.config.linear_attention = config.to_dict()
    model.config.kept_heads = {str(index): list(heads) for index, heads in kept.items()}
    return model


def _install(model: PreTrainedModel, config: LinearAttentionConfig, kept: dict[int, tuple[int, ...]]) -> None:
    modules, shapes = attention_modules(model), head_shapes(model)
    for index, heads in kept.items():
        if index not in shapes or not set(heads) <= set(range(shapes[index][1])):
            raise ValueError(f"kept_heads: the model has no key heads {list(heads)} in an attention layer {index}")
    rotary = rotary_embeddings(model)
    if config.sink_distance is not None and not rotary and any(map(is_rotary, modules.values())):
        raise ValueError(
            f"sink_distance: {type(model).__name__} has no module for its rotary embedding; use sink_distance: null"
        )
    # All are built before anything is changed: a config that does not fit leaves the model as it was.
    layers = {
        index: LinearAttention(config, *shape, tuple(kept.get(index, ())), is_causal(modules[index]))
        for index, shape in shapes.items()
    }
    if config.cross == "linear":
        crossing, text_config = cross_attention_modules(model), model.config.get_text_config(decoder=True)
        if not crossing:
            raise ValueError(f"cross: {type(model).__name__} attends to no other sequence; use cross: softmax")
        for number, module in enumerate(crossing, len(modules)):
            modules[number], layers[number] = module, CrossAttention(config, *head_shape(module, text_config))
    else:
        for module in cross_attention_modules(model):
            # Of what was installed before.
            module._modules.pop("linear_attention", None)
    for index, module in modules.items():
        device = works_on(module)
        if not hasattr(module, "_linearize_hook"):
            module._linearize_hook = module.register_forward_pre_hook(_before_attention, with_kwargs=True)
            # Also when the module's own code fails half-way.
            module.register_forward_hook(_stop_watching, always_call=True)
            skip_nothing(module)
            tell_distances(module, IMPLEMENTATIONS)
        module.linear_attention = layers[index].to(device)
    model.is_encoder = not any(layer.causal for layer in layers.values())
    # What makes a cache, and hands it on.
    decoder = model.get_decoder() if is_encoder_decoder(model) else model
    if not hasattr(decoder, "_linearize_hook"):
        decoder._linearize_hook = decoder.register_forward_pre_hook(partial(_before_decoder, model), with_kwargs=True)
    for module in rotary:
        if not hasattr(module, "_linearize_hook"):
            module._linearize_hook = module.register_forward_hook(partial(_after_rotary, model), with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)


@torch.compiler.disable
def _after_rotary(model: PreTrainedModel, module: nn.Module, args: tuple, kwargs: dict, output):
    distance = model.config.linear_attention["sink_distance"]
    if model.config._attn_implementation not in IMPLEMENTATIONS or distance is None:
        return output
    return with_capped(module, args, kwargs, output, distance)


@torch.compiler.disable
def _before_decoder(model: PreTrainedModel, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Stock forwards would make a softmax cache; a linearized model makes its own."""
    if model.config._attn_implementation != IMPLEMENTATION or model.is_encoder:
        return args, kwargs
    cache = kwargs.get("past_key_values")
    if cache is None:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            has_cache = model.config.linear_attention.get("far", "features") == "features"
            use_cache = has_cache and getattr(model.config, "use_cache", True) and not model.training
        # Nobody continues a row of packed documents, and with a cache transformers does not look for them.
        position_ids = kwargs.get("position_ids")
        if kwargs.get("attention_mask") is None and position_ids is not None and (position_ids.diff() != 1).any():
            use_cache = False
        kwargs["use_cache"] = use_cache
        if use_cache:
            kwargs["past_key_values"] = new_cache(model)
    elif not isinstance(getattr(cache, "self_attention_cache", cache), LinearCache):
        raise TypeError(
            f"a linearized model cannot continue from {type(cache).__name__}: pass LinearCache(model), or no cache"
        )
    return args, kwargs


@torch.compiler.disable
def _before_attention(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    linear = module._modules.get("linear_attention")
    if linear is None or module.config._attn_implementation not in IMPLEMENTATIONS:
        return args, kwargs
    call = linear.call = Call()
    crosses = linear.crosses
    for value in (*args, *kwargs.values()):
        if isinstance(value, EncoderDecoderCache):
            value = value.cross_attention_cache if crosses else value.self_attention_cache
        if isinstance(value, CrossCache if crosses else LinearCache):
            call.cache = value.layers[module.layer_idx]
    if crosses:
        return args, kwargs
    rotary = kwargs.get("position_embeddings")
    sink_rotary = None
    if rotary is not None and linear.config.sink_distance is not None:
        # As `_after_rotary` has put them together.
        rotary, sink_rotary = zip(*(x.chunk(2, dim=-1) for x in rotary), strict=True)
        kwargs["position_embeddings"] = rotary
    if rotary is not None and not (isinstance(rotary, tuple) and len(rotary) == 2):
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be linearized: its rotary embedding is not a (cos, sin) pair"
        )
    wants_raw = linear.features and linear.config.rope == "before"
    wants_sinks = linear.config.sink_distance is not None and (linear.heads or linear.config.kept_window is not None)
    # Some layers of some families are handed an embedding that they do not apply.
    if (wants_raw or wants_sinks) and rotary is not None and linear.rotates is not False:
        call.rotary, call.sink_rotary = rotary, sink_rotary
        kwargs["position_embeddings"] = nothing(rotary)
        if linear.rotates is None:
            linear.watch = Watch(kwargs["position_embeddings"][0])
            linear.watch.__enter__()
    return args, kwargs


@torch.compiler.disable
def _stop_watching(module: nn.Module, *_) -> None:
    linear = module._modules.get("linear_attention")
    if linear is not None and linear.watch is not None:
        linear.watch.__exit__(None, None, None)
        linear.watch = None


@dataclass
class Inputs:
    """q, k of one attention call: [B, H or H_kv, T, D], rotated, and un-rotated and as sinks see q where these are not
    the same; and what else bears on it. Of a module that attends to another sequence, k is of that, and `segments`
    tells that one's padding."""

    q: Tensor
    k: Tensor
    raw_q: Tensor | None
    raw_k: Tensor | None
    sink_q: Tensor | None
    cache: LinearCacheLayer | CrossCacheLayer | None
    segments: Tensor | None
    sliding_window: int | None
    bias: Tensor | None = None


def take_inputs(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict) -> Inputs:
    """What the hook kept for this call, put together with what the interface passed.

    Raises:
        ValueError: for a 4-D mask, or keys of a softmax cache.
    """
    linear = module.linear_attention
    call, linear.call = linear.call, None
    if call is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be linearized: it calls the attention interface more than once"
        )
    if linear.crosses:
        return Inputs(query, key, None, None, None, call.cache, attention_mask, None)
    if linear.watch is not None:
        linear.rotates = linear.watch.used
        _stop_watching(module)
        if not linear.rotates:
            call.rotary = None
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"a linearized model keeps no softmax cache: layer {module.layer_idx} got {key.shape[2]} keys for "
            f"{query.shape[2]} tokens; pass LinearCache(model), or no cache"
        )
    own = None if call.cache is None else call.cache.shared.segments
    segments = attention_mask if own is None else own
    if segments is not None and segments.dim() != 2:
        raise ValueError("linear attention takes a 2-D padding mask or packed position_ids, not a 4-D mask")
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if segments is None and cu_seqlens is not None and call.cache is None:
        segments = segments_from_cu_seqlens(cu_seqlens, query.shape[2])
    sliding_window, bias = kwargs.get("sliding_window"), bias_by_distance(module, kwargs.get("position_bias"))
    if call.rotary is None:
        return Inputs(query, key, None, None, None, call.cache, segments, sliding_window, bias)
    sink_rotary = call.sink_rotary
    # No further on than the distance, sinks see q as all other keys do.
    if sink_rotary is not None and call.cache is None and query.shape[2] <= linear.config.sink_distance + 1:
        sink_rotary = None
    q, k, sink_q = rotated(module, query, key, call.rotary, sink_rotary)
    raw = (query, key) if linear.config.rope == "before" else (None, None)
    return Inputs(q, k, *raw, sink_q, call.cache, segments, sliding_window, bias)


def attend(module: nn.Module, inputs: Inputs, value: Tensor, scaling: float | None) -> Tensor:
    """[B, T, H, D_v], the module's linear attention."""
    if module.linear_attention.crosses:
        out = module.linear_attention(inputs.q, inputs.k, value, inputs.segments, inputs.cache)
        return out.transpose(1, 2)
    out = module.linear_attention(
        inputs.q,
        inputs.k,
        value,
        scale=inputs.q.shape[-1] ** -0.5 if scaling is None else scaling,
        raw_q=inputs.raw_q,
        raw_k=inputs.raw_k,
        sink_q=inputs.sink_q,
        segments=inputs.segments,
        cache=inputs.cache,
        ancestors=None if inputs.cache is None else inputs.cache.ancestors,
        sliding_window=inputs.sliding_window,
        bias=inputs.bias,
    )
    return out.transpose(1, 2)


def softmax_of_states(query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, scaling: float | None):
    """[B, T, H, D_v] of a module whose attention to an encoder's states stays softmax."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cross_softmax(query, key, value, segments, scale).transpose(1, 2).contiguous()


@torch.compiler.disable
def linear_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function: [B, H, T, D], [B, H_kv, T, D] x 2 -> ([B, T, H, D_v], None)."""
    if not hasattr(module, "linear_attention"):
        return softmax_of_states(query, key, value, attention_mask, scaling), None
    inputs = take_inputs(module, query, key, attention_mask, kwargs)
    return attend(module, inputs, value, scaling).contiguous(), None


@torch.compiler.disable
def segments_mask(batch_size, q_length, kv_length, mask_function, attention_mask=None, device=None, **kwargs):
    """The mask function: segments [B, T] of the new tokens (see `tokens`), or, of attention to another sequence, of its
    tokens; None if they need none.

    Packed documents show in transformers' own mask function: a token does not see its left neighbour.
    """
    if attention_mask is not None:
        keys = kv_length if mask_function is bidirectional_mask_function else q_length
        segments = attention_mask[:, -keys:].long()
        return None if segments.bool().all() else segments
    if q_length == 1 or kv_length != q_length:
        return None
    row = torch.arange(batch_size, device=device)[:, None]
    index = torch.arange(1, q_length, device=device)[None]
    sees_neighbour = mask_function(row, 0, index, index - 1).expand(batch_size, -1)
    if sees_neighbour.all():
        return None
    return nn.functional.pad((~sees_neighbour).long().cumsum(1), (1, 0)) + 1


AttentionInterface.register(IMPLEMENTATION, linear_attention)
AttentionMaskInterface.register(IMPLEMENTATION, segments_mask)
