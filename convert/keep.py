"""Which key heads a recipe's `keep` section asks to stay softmax.

Everywhere `kv_heads` is layer index -> key heads that the layer has; chosen heads are layer index -> heads.
"""

from linearize.recipes.attention import KeepSection


def head_budget(keep: KeepSection, kv_heads: dict[int, int]) -> int:
    """How many heads `keep.kv_budget` pays for.

    Raises:
        ValueError: not one.
    """
    total = sum(kv_heads.values())
    # 0.29 * 100 is a little less than 29.
    count = int(keep.kv_budget * total + 1e-6)
    if count == 0:
        raise ValueError(
            f"keep.kv_budget: {keep.kv_budget:g} of the model's {total} key heads is not one head; "
            f"use {1 / total:.3g} or more, or keep: null"
        )
    return count


def named_heads(keep: KeepSection, kv_heads: dict[int, int]) -> dict[int, tuple[int, ...]]:
    """The heads of `keep.layers` or `keep.heads`.

    Raises:
        ValueError: naming a layer or head that the model has not, or when nothing is left to linearize.
    """
    field = "heads" if keep.layers is None else "layers"
    by_name = {str(layer): layer for layer in kv_heads}
    kept = {}
    for name in map(str, keep.layers or keep.heads):
        if name not in by_name:
            names = ", ".join(by_name)
            raise ValueError(f"keep.{field}: the model has no attention layer {name}; it has {names}")
        layer = by_name[name]
        heads = range(kv_heads[layer]) if keep.heads is None else sorted(set(keep.heads[name]))
        if heads[-1] >= kv_heads[layer]:
            raise ValueError(
                f"keep.heads: layer {layer} has no key head {heads[-1]}; its heads are 0 to {kv_heads[layer] - 1}"
            )
        kept[layer] = tuple(heads)
    if sum(map(len, kept.values())) == sum(kv_heads.values()):
        raise ValueError(f"keep.{field}: these are all of the model's heads, so nothing is left to linearize")
    return dict(sorted(kept.items()))


def heads_by_layer(heads: list[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """(layer, head) pairs by layer."""
    layers = sorted({layer for layer, _ in heads})
    return {layer: tuple(sorted(head for at, head in heads if at == layer)) for layer in layers}
