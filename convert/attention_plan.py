"""What a plan says of attention: heads, and the memory that each token and each state takes."""

from linearize.convert.keep import head_budget, heads_by_layer, named_heads
from linearize.layers.attending import attention_modules, head_shapes, is_causal
from linearize.layers.attention import LinearAttention
from linearize.layers.flash import FlashForCausalLM
from linearize.layers.rotary import is_rotary
from linearize.layers.seam import install
from linearize.recipes.attention import KeepSection
from linearize.recipes.schema import Recipe

CONTEXTS = (2048, 8192, 32768, 131072)
KINDS = {
    "causal-lm": "a causal language model",
    "masked-lm": "a masked language model",
    "encoder": "an encoder",
    "seq2seq-lm": "an encoder-decoder",
    "sequence-classification": "a family that has classifiers",
}
BYTES = {"float32": 4, "bfloat16": 2}


def state_bytes(layer: LinearAttention, rotary: bool, item: int, value_dim: int | None = None) -> int:
    """Bytes of the linear heads' cache of one layer for one sequence; `item` is the size of a key's number, `value_dim`
    what is cached of a value, if that is not as long as a key."""
    config, value_dim = layer.config, value_dim or layer.head_dim
    # k and v, and k before its rotation where the feature map wants that.
    keys = 2 if rotary and layer.features and config.rope == "before" else 1
    recent = (config.ring_size + config.sinks) * (keys * layer.head_dim + value_dim) * item
    return layer.kv_heads * (recent + layer.features * (value_dim + 1) * 4)


def kept_bytes(layer: LinearAttention, item: int) -> int:
    """Bytes by which the cache of one layer's kept heads grows with every token."""
    return len(layer.kept) * 2 * layer.head_dim * item


def linear(recipe: Recipe, model) -> dict:
    """Makes `model` linear; what `Plan` says of its attention."""
    if isinstance(model, FlashForCausalLM):
        for name in ("keep", "transfer", "evaluate.tuned_teacher"):
            section, _, field = name.partition(".")
            found = getattr(recipe, section)
            if found and (not field or getattr(found, field)):
                raise ValueError(f"{name}: is about softmax attention, which FLASH has not; leave it out")
    modules, shapes = attention_modules(model), head_shapes(model)
    is_encoder, has_cache = recipe.model.head == "encoder", recipe.model.head == "causal-lm"
    if (is_encoder or has_cache) and is_encoder == all(map(is_causal, modules.values())):
        other = "causal-lm" if is_encoder else "encoder"
        looks = "sees only what is before a token" if is_encoder else "sees what is behind a token"
        kind = KINDS[recipe.model.head]
        raise ValueError(f"model.head: {type(model).__name__} {looks}, so it is not {kind}; use head: {other}")
    heads, kv_heads, head_dim = next(iter(shapes.values()))
    kept = _planned_heads(recipe.keep, {layer: kv_heads for layer, (_, kv_heads, _) in shapes.items()})
    try:
        install(model, recipe.attention.config, kept)
    except ValueError as error:
        raise ValueError(f"attention.{error}") from error
    item, layers = BYTES[recipe.model.dtype], model.linear_attentions()
    values = {index: getattr(module, "cached_dim", head_dim) for index, module in modules.items()}
    held = (state_bytes(layers[index], is_rotary(module), item, values[index]) for index, module in modules.items())
    per_token = kv_heads * sum(head_dim + size for size in values.values()) * item
    return {
        "layers": len(modules),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "features": max(layer.features for layer in layers.values()),
        "kept_heads": sum(map(len, kept.values())),
        "kept_bytes": sum(kept_bytes(layer, item) for layer in layers.values()),
        "kept_tokens": recipe.attention.config.kept_tokens,
        "state_bytes": sum(held) if has_cache else 0,
        "kv_bytes": {length: per_token * length for length in CONTEXTS} if has_cache else {},
    }


def softmax(recipe: Recipe, model) -> dict:
    """What `Plan` says of a model whose attention stays as it is: all of its heads are kept."""
    config = model.config.get_text_config(decoder=True)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = next((m.cached_dim for m in model.modules() if hasattr(m, "cached_dim")), head_dim)
    per_token = layers * kv_heads * (head_dim + values) * BYTES[recipe.model.dtype]
    return {
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "features": 0,
        "kept_heads": layers * kv_heads,
        "kept_bytes": per_token,
        "kept_tokens": None,
        "state_bytes": 0,
        "kv_bytes": {length: per_token * length for length in CONTEXTS} if recipe.model.head == "causal-lm" else {},
    }


def _planned_heads(keep: KeepSection | None, kv_heads: dict[int, int]) -> dict[int, tuple[int, ...]]:
    if keep is None:
        return {}
    if keep.kv_budget is None:
        return named_heads(keep, kv_heads)
    # Which heads is measured later; for what they cost, the first so many stand for them.
    every = [(layer, head) for layer, count in kv_heads.items() for head in range(count)]
    return heads_by_layer(every[: head_budget(keep, kv_heads)])
