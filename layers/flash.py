"""FLASH, a family of its own (Hua et al. 2022, arXiv 2202.10447): gated attention units in place of attention and MLP.

    x' = ScaleNorm(x), half of its channels those of the token before
    u, v, z = SiLU(W x' + b)                    u, v [e], z [D] is shared by queries and keys
    q, k = rotary(gamma z + beta)               one head; the first `rotary_dim` dimensions are rotated
    x <- x + W_o (u * A v)

A = Laplace(scale q.k) with no denominator is the quadratic model, which has one cache entry per token; with
`attn_implementation="linearize"` (`seam.install`) A is local attention in groups + linear attention + convolution.

Where the paper divides scores by the length, they are divided by sqrt(D): gamma absorbs any constant, and starts at 1.
The released code's relative position bias is left out, positions being rotary and sinusoidal.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb


class FlashConfig(PreTrainedConfig):
    """FLASH-110M by default.

    Attributes:
        expansion: e / hidden_size, the width of u and v.
        head_dim: D of q and k.
        rotary_dim: dimensions of q and k that are rotated.
        kernel: of the quadratic model's attention.
    """

    model_type = "linearize_flash"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 1
    expansion: int = 2
    head_dim: int = 128
    rotary_dim: int = 32
    rope_theta: float = 10000.0
    kernel: Literal["laplace", "softmax"] = "laplace"
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def value_dim(self) -> int:
        return self.expansion * self.hidden_size


class ScaleNorm(nn.Module):
    """x / rms(x), times one learned number (Nguyen & Salazar 2019)."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.scale.to(x.dtype)


def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """[B, T, dim / 2] of positions [B, T], in fp32."""
    frequency = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    return positions[..., None].float() * frequency


class FlashRotaryEmbedding(nn.Module):
    def __init__(self, config: FlashConfig):
        super().__init__()
        self.dim, self.theta = config.rotary_dim, config.rope_theta

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned = angles(position_ids, self.dim, self.theta).repeat(1, 1, 2)
        return turned.cos().to(x.dtype), turned.sin().to(x.dtype)


class ScaledSinusoids(nn.Module):
    """Vaswani et al.'s sinusoids, times one learned number."""

    def __init__(self, config: FlashConfig):
        super().__init__()
        self.dim, self.theta = config.hidden_size, config.rope_theta
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, positions: Tensor) -> Tensor:
        turned = angles(positions, self.dim, self.theta)
        return torch.cat([turned.sin(), turned.cos()], dim=-1).to(self.scale.dtype) * self.scale


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """The quadratic model: [B, 1, T, D], [B, 1, K, D], [B, 1, K, D_v] -> ([B, T, 1, D_v], weights [B, 1, T, K])."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if scores.dtype != torch.float64:
        scores = scores.float()
    weights = scores.softmax(-1) if module.config.kernel == "softmax" else ACT2FN["laplace"](scores)
    weights = weights.to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@dataclass
class Place:
    """Where new tokens stand.

    Attributes:
        positions: [B, T], within documents.
        follows: [B, T], whether the token before (in the row, or in a cache) is of the same document.
    """

    positions: Tensor
    follows: Tensor

    @classmethod
    def of(cls, positions: Tensor) -> "Place":
        before = nn.functional.pad(positions[:, :-1], (1, 0), value=-1)
        # A row's first token follows what a cache holds, if anything.
        continues = (positions == before + 1) | (torch.arange(positions.shape[1], device=positions.device) == 0)
        return cls(positions, continues & (positions > 0))


class GatedAttentionUnit(GradientCheckpointingLayer):
    """One layer; u, v, z of every token come out of one projection."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: FlashConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.value_dim, self.shifted = config.head_dim, config.value_dim, config.hidden_size // 2
        self.cached_dim = self.value_dim + self.shifted
        self.norm = ScaleNorm(config)
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.value_dim + self.head_dim)
        self.gamma = nn.Parameter(torch.ones(2, self.head_dim))
        self.beta = nn.Parameter(torch.zeros(2, self.head_dim))
        self.out_proj = nn.Linear(self.value_dim, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        place: Place,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        normed = self.norm(hidden_states)
        shifted, kept = normed.split([self.shifted, normed.shape[-1] - self.shifted], dim=-1)
        x = torch.cat([self.tokens_before(shifted, place, past_key_values), kept], dim=-1)
        projected = nn.functional.silu(self.in_proj(x))
        u, v, z = projected.split([self.value_dim, self.value_dim, self.head_dim], dim=-1)
        q, k = (z[:, None, :, None] * self.gamma + self.beta).unbind(-2)  # [B, 1, T, D]
        cos, sin = position_embeddings
        size = cos.shape[-1]
        turned = apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin)
        q, k = (torch.cat([new, x[..., size:]], dim=-1) for new, x in zip(turned, (q, k), strict=True))
        v = v[:, None]
        if past_key_values is not None:
            # What the next token is to have of this one goes through the cache with the values, whatever is cropped,
            # reordered or taken back there; without a cache, it takes no part.
            v = torch.cat([v, shifted[:, None]], dim=-1)
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return hidden_states + self.out_proj(u * out[:, :, 0, : self.value_dim])

    def tokens_before(self, shifted: Tensor, place: Place, cache: Cache | None) -> Tensor:
        """Of `shifted` [B, T, C / 2], that of the token before each; 0 where a document begins."""
        # A stock cache makes its layers as they come.
        layer = None if cache is None or self.layer_idx >= len(cache.layers) else cache.layers[self.layer_idx]
        values = None
        if hasattr(layer, "latest"):
            # Not whether it has seen tokens: graphs are captured before that. Where there are none, nothing follows.
            values = layer.latest("v") if layer.ring else None
        elif layer is not None and layer.get_seq_length():
            values = layer.values[:, :, -1:]
        latest = torch.zeros_like(shifted[:, :1]) if values is None else values[:, 0, :, self.value_dim :]
        latest = latest.to(shifted.dtype)
        before = torch.cat([latest, shifted[:, :-1]], dim=1)
        ancestors = getattr(layer, "ancestors", None)
        if ancestors is not None:
            # Of a draft tree's node, the deepest of its other ancestors; of a root, the latest token.
            others = ancestors.tril(-1) | ancestors.triu(1)
            parent = (others * ancestors.sum(-1)).argmax(-1)
            return torch.where(others.any(-1)[:, None], shifted[:, parent], latest)
        return torch.where(place.follows[..., None], before, 0)


class FlashPreTrainedModel(PreTrainedModel):
    config: FlashConfig
    config_class = FlashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedAttentionUnit"]
    _skip_keys_device_placement = ["past_key_values"]
    # `eager_attention_forward` is this family's own attention, which softmax kernels cannot compute.
    _supports_sdpa = False
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ScaledSinusoids):
            nn.init.constant_(module.scale, std)
        elif isinstance(module, ScaleNorm):
            nn.init.ones_(module.scale)
        elif isinstance(module, GatedAttentionUnit):
            nn.init.ones_(module.gamma)
            nn.init.zeros_(module.beta)


class FlashModel(FlashPreTrainedModel):
    def __init__(self, config: FlashConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.sinusoids = ScaledSinusoids(config)
        self.rotary_emb = FlashRotaryEmbedding(config)
        self.layers = nn.ModuleList(GatedAttentionUnit(config, index) for index in range(config.num_hidden_layers))
        self.norm = ScaleNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.positions(hidden, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = hidden + self.sinusoids(position_ids)
        rotary, place = self.rotary_emb(hidden, position_ids=position_ids), Place.of(position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=rotary,
                place=place,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    @staticmethod
    def positions(hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, T] of new tokens [B, T, C], padding not counted."""
        new = hidden.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        past = 0 if cache is None else cache.get_seq_length()
        return torch.arange(past, past + new, device=hidden.device).expand(len(hidden), -1)


class FlashForCausalLM(FlashPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlashConfig):
        super().__init__(config)
        self.model = FlashModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
        return result if return_dict else result.to_tuple()


if __name__ == "linearize.layers.flash":
    # A copy that an exported model carries is named by that model's own configuration.
    AutoConfig.register(FlashConfig.model_type, FlashConfig)
    AutoModel.register(FlashConfig, FlashModel)
    AutoModelForCausalLM.register(FlashConfig, FlashForCausalLM)
