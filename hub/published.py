"""Checkpoints of LoLCATs and Linearized-LLM, as parameters of the layer and changes to its base model.

Both publish what was trained beside a base model, by the names of its modules: LoLCATs a feature map of q and one of k
per query head and a gate (stage distill), and LoRA adapters (stage finetune); Linearized-LLM one factor and a
convolution per layer, adapters, embeddings and norms, or all weights of the model with the adapters merged.
"""

import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from linearize.layers.config import PRESETS, LinearAttentionConfig

Format = Literal["lolcats", "linearized-llm"]
Window = Literal["terrace", "sliding"]
Shape = tuple[int, ...]

# Of one directory, the first of these that it has.
DIRECTORY_FILES = (("*.safetensors",), ("pytorch_model*.bin", "adapter_model.bin"), ("*.pt",))
# Where training scripts put the weights in what they save.
CONTAINERS = ("model_state_dict", "state_dict", "model")
# What wrappers (data parallel, PEFT, FSDP, torch.compile) put into names.
WRAPPERS = {
    "module", "base_model", "base_layer", "default", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip
LAYER = re.compile(r"layers\.(\d+)\.")
OURS = re.compile(r"layers\.(\d+)\.self_attn\.(.+)")
ADAPTER = re.compile(r"(.+)\.lora_([AB])(?:\.weight)?")
# Of each format, what it adds to an attention module; LoLCATs' gate has had two names.
PARTS: dict[Format, tuple[str, ...]] = {
    "lolcats": (
        "feature_map_q.mlp.layer", "feature_map_q.mlp.bias", "feature_map_k.mlp.layer", "feature_map_k.mlp.bias",
        "window_factors", "window_factor",
    ),
    "linearized-llm": ("dwconv.weight", "conv_mask", "global_factor"),
}  # fmt: skip
NAMES: dict[Format, str] = {"lolcats": "LoLCATs", "linearized-llm": "Linearized-LLM"}
# In the names of LoLCATs' configurations and checkpoints: the window's layout and size.
WINDOW_NAME = re.compile(r"_w(tk|sw)(\d+)_")
# Saved, but nothing is learned there.
BUFFERS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class PublishedError(ValueError):
    """A checkpoint cannot be imported; one sentence says where and why."""


@dataclass(frozen=True)
class Base:
    """The model that checkpoints go with.

    Attributes:
        name: for messages.
        heads: (H, H_kv, D) of each layer.
        weights: name -> shape of each weight.
    """

    name: str
    heads: dict[int, tuple[int, int, int]]
    weights: dict[str, Shape]

    def full_name(self, name: str) -> str:
        """Of a weight, in the base, of its name without what stands before the decoder's modules."""
        return name if name.startswith("lm_head.") else f"model.{name}"


@dataclass
class Published:
    """What checkpoints make of their base.

    Attributes:
        format: whose they are, in `NAMES`.
        config: of the layer.
        kept: layer -> key heads that stay softmax.
        attention: layer -> name of a parameter of its `LinearAttention` -> value.
        adapters: name of a weight of the base [out, in] -> A [r, in] and B [out, r].
        weights: name of a weight of the base -> what takes its place.
        left_out: what checkpoints of this kind may hold, and these do not.
    """

    format: Format
    config: LinearAttentionConfig
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    attention: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """One tensor of a file, by the key that it has there."""

    file: Path
    key: str
    value: Tensor

    def expect(self, shape: Iterable[int | None], base: Base) -> Tensor:
        """The tensor.

        Raises:
            PublishedError: it has not this shape, in which None stands for any size.
        """
        shape, found = tuple(shape), tuple(self.value.shape)
        if len(found) != len(shape) or any(size not in (None, n) for size, n in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise PublishedError(f"{self.file}: {self.key} is {list(found)}, but {base.name} needs [{wanted}]")
        return self.value.detach()


def files_of(path: Path) -> list[Path]:
    """A checkpoint's files: itself, or those of a directory.

    Raises:
        PublishedError: there are none.
    """
    if path.is_file():
        return [path]
    for patterns in DIRECTORY_FILES:
        if files := sorted(file for pattern in patterns for file in path.glob(pattern)):
            return files
    what = "holds no checkpoint (*.safetensors, pytorch_model*.bin, *.pt)" if path.is_dir() else "no such file"
    raise PublishedError(f"{path}: {what}")


def window_of(files: Iterable[Path]) -> tuple[Window, int]:
    """Layout and size of LoLCATs' window, as the files' names say; else terraces of 64, which all published have."""
    for file in files:
        if named := WINDOW_NAME.search(file.name):
            return "terrace" if named[1] == "tk" else "sliding", int(named[2])
    return "terrace", 64


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file by name; code is never unpickled.

    Raises:
        PublishedError: it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files of old torch versions are no archives, and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise PublishedError(
            f"{path}: is no checkpoint that holds tensors alone, and nothing else is unpickled"
        ) from error
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = content if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise PublishedError(f"{path}: holds no weights by name, under {', '.join(CONTAINERS)} or by themselves")
    return tensors


def plain_name(key: str) -> str:
    """`base_model.model.model.layers.0.x` -> `layers.0.x`: without wrappers, and what is before the decoder's parts."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[:1] == ["model"]:
        parts.pop(0)
    return ".".join(parts)


def gather(files: list[Path]) -> dict[str, Saved]:
    """All tensors of some files by plain name. What was finetuned takes the place of what it began from.

    Raises:
        PublishedError: two files hold the same, and it cannot be told which is meant.
    """
    contents = {}
    for file in files:
        tensors = contents[file] = {}
        for key, value in read(file).items():
            name = plain_name(key)
            if name in tensors:
                raise PublishedError(f"{file}: {key} and {tensors[name].key} are the same weight")
            tensors[name] = Saved(file, key, value)
    found: dict[str, Saved] = {}
    adapted = {file: any(map(ADAPTER.fullmatch, tensors)) for file, tensors in contents.items()}
    for file in sorted(contents, key=adapted.get):
        for name, saved in contents[file].items():
            if name in found and adapted[found[name].file] == adapted[file]:
                raise PublishedError(f"{found[name].file} and {file} both hold {saved.key}; leave one out")
            found[name] = saved
    return found


def published(
    saved: dict[str, Saved],
    base: Base,
    format: Format | None = None,
    window: Window = "terrace",
    window_size: int = 64,
    softmax_layers: Iterable[int] = (),
) -> Published:
    """What `gather` has found, sorted and checked against the base.

    Args:
        format: whose checkpoints, where their names do not tell.
        window, window_size: of LoLCATs; Linearized-LLM's groups are of `window_size`. No checkpoint holds them.
        softmax_layers: layers of LoLCATs that were not converted.

    Raises:
        PublishedError: naming the first tensor or layer that does not fit.
    """
    attention, adapters, weights = _sort(saved, base)
    format = format or _recognise(attention, adapters, saved)
    for layer, parts in sorted(attention.items()):
        for part, tensor in parts.items():
            if part not in PARTS[format]:
                raise PublishedError(
                    f"{tensor.file}: {tensor.key}: {NAMES[format]} saves {', '.join(PARTS[format])} in layer {layer}"
                )
    kept = {layer: tuple(range(base.heads[layer][1])) for layer in softmax_layers if layer in base.heads}
    linear = [layer for layer in base.heads if layer not in kept]
    if not linear or len(kept) < len(set(softmax_layers)):
        raise PublishedError(f"softmax layers: some of layers 0 to {len(base.heads) - 1} of {base.name}, but not all")
    if format == "lolcats":
        config = replace(PRESETS["lolcats"], window=window, window_size=window_size)
        result = _lolcats(attention, linear, base, config)
    else:
        result = _linearized_llm(attention, linear, base, replace(PRESETS["augmented-relu2"], window_size=window_size))
    result.kept = kept
    for name, halves in adapters.items():
        shape = base.weights[name]
        for half in "AB":
            if half not in halves:
                other = next(iter(halves.values()))
                raise PublishedError(f"{other.file}: {other.key} is half of an adapter; lora_{half} is missing")
        rank = len(halves["A"].value)
        A, B = halves["A"].expect((rank, shape[1]), base), halves["B"].expect((shape[0], rank), base)
        result.adapters[name] = A.float(), B.float()
    result.weights = {name: tensor.expect(base.weights[name], base) for name, tensor in weights.items()}
    if not adapters and not weights:
        result.left_out.append("LoRA adapters: this is attention transfer alone")
    return result


def _sort(saved: dict[str, Saved], base: Base) -> tuple[dict, dict, dict]:
    """Layer -> part -> what was added to its attention; weight of the base -> its adapter's halves; weight -> other."""
    attention: dict[int, dict[str, Saved]] = defaultdict(dict)
    adapters: dict[str, dict[str, Saved]] = defaultdict(dict)
    weights: dict[str, Saved] = {}
    known = {part for parts in PARTS.values() for part in parts}
    for name, tensor in saved.items():
        if BUFFERS.fullmatch(name):
            continue
        if (layer := LAYER.match(name)) and int(layer[1]) not in base.heads:
            raise PublishedError(
                f"{tensor.file}: {tensor.key}: {base.name} has layers 0 to {len(base.heads) - 1}; "
                "name the base that the checkpoint was trained on"
            )
        ours, adapter = OURS.fullmatch(name), ADAPTER.fullmatch(name)
        of_base = base.full_name(f"{adapter[1]}.weight" if adapter else name)
        if ours and ours[2] in known:
            attention[int(ours[1])][ours[2]] = tensor
        elif of_base not in base.weights:
            raise PublishedError(
                f"{tensor.file}: {tensor.key}: expected LoLCATs' feature_map_q.mlp.layer, feature_map_k.mlp.layer and "
                "window_factors, Linearized-LLM's dwconv and global_factor, and adapters (lora_A, lora_B) and weights "
                f"of {base.name}"
            )
        elif adapter:
            adapters[of_base][adapter[2]] = tensor
        else:
            weights[of_base] = tensor
    return attention, adapters, weights


def _recognise(attention: dict[int, dict[str, Saved]], adapters: dict, saved: dict[str, Saved]) -> Format:
    for parts in attention.values():
        for part in parts:
            return next(format for format, names in PARTS.items() if part in names)
    file = next(iter(saved.values())).file
    if adapters:
        raise PublishedError(
            f"{file}: holds adapters, but no feature maps: name LoLCATs' distill checkpoint (.._distill.pt), too; "
            "or --format linearized-llm, where neither factors nor a convolution were trained"
        )
    raise PublishedError(f"{file}: holds weights of the base alone; where that is Linearized-LLM's, --format says so")


def _collect(
    attention: dict[int, dict[str, Saved]],
    part: str,
    layers: list[int],
    base: Base,
    shape: Callable[[int, int], Iterable[int | None]],
    hint: str = "",
) -> dict[int, Tensor]:
    """Layer -> the tensors `part` of all layers, of sizes `shape(H, D)`; empty if no layer has it.

    Raises:
        PublishedError: naming a layer that lacks it, or where its shape is another one.
    """
    having = {layer: attention[layer][part] for layer in attention if part in attention[layer]}
    if not having:
        return {}
    some = next(iter(having.values()))
    for layer in layers:
        if layer not in having:
            raise PublishedError(f"{some.file}: layer {layer} of {base.name} has no {part}, but layers beside it{hint}")
    if extra := having.keys() - set(layers):
        raise PublishedError(f"{some.file}: layer {min(extra)} has {part}, so it did not stay softmax")
    found = {}
    for layer in layers:
        heads, _, dim = base.heads[layer]
        found[layer] = having[layer].expect(shape(heads, dim), base).float()
    for layer, value in found.items():
        if value.shape != found[layers[0]].shape:
            raise PublishedError(
                f"{having[layer].file}: {part} is {list(value.shape)} in layer {layer}, but "
                f"{list(found[layers[0]].shape)} in layer {layers[0]}"
            )
    return found


def _lolcats(
    attention: dict[int, dict[str, Saved]], layers: list[int], base: Base, windowed: LinearAttentionConfig
) -> Published:
    """softmax(xW) ++ softmax(-xW), or relu(xW + b) where there are biases; with a window where there are gates."""
    for parts in attention.values():
        if "window_factor" in parts:
            parts.setdefault("window_factors", parts.pop("window_factor"))
    hint = "; if it was left softmax, say so by --softmax-layer"

    def collect(part: str, shape: Callable[[int, int], Iterable[int | None]]) -> dict[int, Tensor]:
        return _collect(attention, part, layers, base, shape, hint)

    maps = {name: collect(f"feature_map_{name}.mlp.layer", lambda heads, dim: (heads, dim, None)) for name in "qk"}
    biases = {name: collect(f"feature_map_{name}.mlp.bias", lambda heads, dim: (1, heads, 1, 1)) for name in "qk"}
    gates = collect("window_factors", lambda heads, dim: (1, heads, 1, 1))
    if not maps["q"]:
        some = next(iter(next(iter(attention.values())).values()))
        raise PublishedError(f"{some.file}: holds {some.key}, but no feature_map_q.mlp.layer; name all its files")
    # One map for both is saved once.
    if not maps["k"]:
        maps["k"], biases["k"] = maps["q"], biases["q"]
    if bool(biases["q"]) != bool(biases["k"]) or maps["q"][layers[0]].shape != maps["k"][layers[0]].shape:
        raise PublishedError(f"layer {layers[0]}: the feature maps of q and k differ in shape")
    heads, kv_heads, _ = base.heads[layers[0]]
    columns = maps["q"][layers[0]].shape[-1]
    config = replace(
        windowed if gates else PRESETS["hedgehog"],
        feature_map="t2r" if biases["q"] else "hedgehog",
        feature_dim=columns if biases["q"] else 2 * columns,
        key_maps="key_head" if heads == kv_heads else "query_head",
    )
    result = Published("lolcats", config)
    for layer in layers:
        parameters = result.attention[layer] = {f"phi_{name}.weight": maps[name][layer] for name in "qk"}
        if biases["q"]:
            parameters |= {
                f"phi_{name}.bias": biases[name][layer].view(-1, 1, 1).expand(-1, 1, columns) for name in "qk"
            }
        if gates:
            parameters["gate"] = gates[layer].flatten()
    return result


def _linearized_llm(
    attention: dict[int, dict[str, Saved]], layers: list[int], base: Base, config: LinearAttentionConfig
) -> Published:
    """Squared relu of cosines within a group of tokens, and what is there of the factor on all groups before, and of
    the convolution: its filter is symmetric, with the taps on later tokens masked."""
    factors = _collect(attention, "global_factor", layers, base, lambda heads, dim: (1,))
    filters = _collect(attention, "dwconv.weight", layers, base, lambda heads, dim: (heads, 1, None, 1))
    taps = filters[layers[0]].shape[2] // 2 + 1 if filters else 0
    feature_map = config.feature_map if factors else None
    result = Published("linearized-llm", replace(config, feature_map=feature_map, conv_taps=taps))
    for layer in layers:
        parameters = result.attention[layer] = {}
        if factors:
            parameters["alpha"] = factors[layer].expand(base.heads[layer][0])
        if filters:
            parameters["conv"] = filters[layer][:, 0, :taps, 0].flip(-1)
    return result
