"""Tiny random models of many families, built from their configurations alone; tests import this file."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 99
PAD = 0
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Longer than any text of the tests: the softmax model sees everything.
    "sliding_window": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_intermediate_size": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

# Model type -> what `TINY` lacks for it.
FAMILIES: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": MIXED,
    "ctrl": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "dff": 48},
    "cwm": MIXED,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": MIXED | {"sliding_window_pattern": 2},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": MIXED | {"attn_logit_softcapping": None},
    "gemma3_text": MIXED,
    "glm": {},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "minimax_m2": {},
    "ministral": MIXED,
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": MIXED,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {},
}

# Families whose positions are learned or fixed vectors added to the input.
WITHOUT_ROTARY = {"biogpt", "ctrl", "gpt2", "gpt_bigcode", "opt"}
# Families in which some layers do not rotate q and k: which of the two layers do.
PARTLY_ROTARY = {"cohere2": [True, False], "exaone4": [True, False], "smollm3": [True, False]}


def tiny_model(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model of two layers in eval mode; its weights are large enough for attention to be far from uniform."""
    default = AutoConfig.for_model(name)
    known = set(default.to_dict()) | set(type(default).attribute_map)
    tiny = {key: value for key, value in TINY.items() if key in known}
    config = AutoConfig.for_model(name, **(tiny | FAMILIES.get(name, {}) | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    # Generation in the tests ends by length alone.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model
