"""What LoLCATs and Linearized-LLM publish, for a tiny base: random checkpoints by their keys and shapes, and their
formulas by hand, as attention functions of transformers; tests import this file."""

from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, DIM, HIDDEN, RANK = 2, 4, 8, 32, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GROUP, TAPS = 16, 15
PEFT = "base_model.model."


def make_base(tiny_model: Path, directory: Path, kv_heads: int = 2) -> Path:
    """A model whose attention says something: of larger weights than fresh ones have."""
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_model, num_key_value_heads=kv_heads)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "_proj" in name or "embed" in name:
            parameter.data.mul_(12)
    model.save_pretrained(directory)
    return directory


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(seed: int = 100, rank: int = RANK, kv_heads: int = 2) -> dict[str, torch.Tensor]:
    """layers.0.self_attn.q_proj.lora_A.default.weight .. of all projections."""
    found = {}
    for layer in range(LAYERS):
        for number, name in enumerate(PROJECTIONS):
            rows = kv_heads * DIM if name in ("k_proj", "v_proj") else HIDDEN
            key = f"layers.{layer}.self_attn.{name}"
            seed += 2
            found[f"{key}.lora_A.default.weight"] = normal(rank, HIDDEN, seed=seed) * 0.1
            found[f"{key}.lora_B.default.weight"] = normal(rows, rank, seed=seed + 1) * 0.1 * (number + 1)
    return found


def merge(model, lora: dict[str, torch.Tensor], scale: float = 2.0) -> None:
    weights = model.model.state_dict()
    for name, A in lora.items():
        if ".lora_A" in name:
            B = lora[name.replace("lora_A", "lora_B")]
            weights[name.replace("lora_A.default.", "")].add_(scale * B @ A)


def maps(columns: int = 4, bias: bool = False, window: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """layers.0.self_attn.feature_map_q.mlp.layer .. of LoLCATs' stage distill."""
    found = {}
    for layer in range(LAYERS):
        attention = f"layers.{layer}.self_attn"
        for name in "qk":
            seed += 2
            found[f"{attention}.feature_map_{name}.mlp.layer"] = normal(HEADS, DIM, columns, seed=seed)
            if bias:
                # So that no q is without a feature in common with some key: of next to nothing, theirs is another part.
                found[f"{attention}.feature_map_{name}.mlp.bias"] = normal(1, HEADS, 1, 1, seed=seed + 1) + 6
        if window:
            found[f"{attention}.window_factors"] = normal(1, HEADS, 1, 1, seed=seed + 50)
    return found


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def linearized(factor: bool = True, conv: bool = True) -> dict[str, torch.Tensor]:
    """layers.0.self_attn.dwconv.weight .. of Linearized-LLM."""
    found = {}
    for layer in range(LAYERS):
        attention = f"layers.{layer}.self_attn"
        if factor:
            found[f"{attention}.global_factor"] = normal(1, seed=200 + layer) * 0.5
        if conv:
            # The taps on later tokens, which the mask leaves out, were trained too.
            found[f"{attention}.dwconv.weight"] = normal(HEADS, 1, TAPS, 1, seed=300 + layer) * 0.3
            mask = torch.ones(1, 1, TAPS, 1)
            mask[:, :, TAPS // 2 + 1 :] = 0
            found[f"{attention}.conv_mask"] = mask
    return found


def lolcats_by_hand(weights: dict[str, torch.Tensor], window: str | None, size: int = GROUP):
    """Attention function of LoLCATs (arXiv 2410.10254, eq. 6 and 7): keys repeated for every query head."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        own = {name.split("self_attn.")[1]: x for name, x in weights.items() if f"s.{module.layer_idx}." in name}

        def phi(name, x):
            y = x @ own[f"feature_map_{name}.mlp.layer"]
            if f"feature_map_{name}.mlp.bias" in own:
                return (y + own[f"feature_map_{name}.mlp.bias"]).relu().clamp(min=1e-12)
            return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=1e-12)

        far = (phi("q", query) @ phi("k", k).mT).tril()
        i = torch.arange(k.shape[2])[:, None]
        j = i.mT
        if window is None:
            return ((far @ v) / far.sum(-1, keepdim=True)).transpose(1, 2), None
        near = (j <= i) & (j // size >= i // size - 1 if window == "terrace" else i - j < size)
        scores = (query @ k.mT * DIM**-0.5).masked_fill(~near, -1e8)
        gate = own["window_factors"].sigmoid()
        local = gate * (scores - scores.amax(-1, keepdim=True)).exp() * near
        both = local + far * ~near
        return ((both / both.sum(-1, keepdim=True)) @ v).transpose(1, 2), None

    return attend


def linearized_by_hand(weights: dict[str, torch.Tensor], size: int = GROUP):
    """Attention function of Linearized-LLM (arXiv 2406.07368) as its code has it."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        own = {name.split("self_attn.")[1]: x for name, x in weights.items() if f"s.{module.layer_idx}." in name}
        cosines = normalize(query, dim=-1) @ normalize(k, dim=-1).mT
        i = torch.arange(k.shape[2])[:, None]
        same, before = i // size == i.mT // size, i // size > i.mT // size
        out = (cosines.relu().square() * (same & (i.mT <= i))) @ v
        if "global_factor" in own:
            out = out + own["global_factor"] * ((cosines * before) @ v)
        if "dwconv.weight" in own:
            filters = (own["dwconv.weight"] * own["conv_mask"])[:, :, :, 0]
            channels = v.permute(0, 3, 1, 2).flatten(0, 1)
            mixed = torch.nn.functional.conv1d(channels, filters, padding=TAPS // 2, groups=HEADS)
            out = out + mixed.unflatten(0, (len(v), DIM)).permute(0, 2, 3, 1)
        return out.transpose(1, 2), None

    return attend


def by_hand(base: Path, attend, lora: dict[str, torch.Tensor] | None = None, scale: float = 2.0):
    """The base with adapters merged and `attend` in the place of its attention, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if lora:
        merge(model, lora, scale)
    AttentionInterface.register("by_hand", attend)
    model.set_attn_implementation("by_hand")
    model.config.use_cache = False
    return model
