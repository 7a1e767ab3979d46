"""The model as each stage leaves it: one model in memory, brought forward stage by stage."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from linearize.convert import sources
from linearize.convert.context import STAGES, Context, StageError, put
from linearize.convert.keep import named_heads
from linearize.hub.saved import check_saved
from linearize.layers.attending import head_shapes, is_encoder_decoder
from linearize.layers.seam import install
from linearize.recipes.schema import FinetuneSection

WEIGHTS = "weights.safetensors"
KEPT = "kept.json"
LINEAR = ".linear_attention."


def softmax_model(context: Context, **placing) -> PreTrainedModel:
    """The model as stage load left it; `placing` as `sources.load_model` takes it."""
    directory = context.stage_directory("load") / "model"
    recipe = context.recipe.model
    source = sources.Source(str(directory))
    if not directory.is_dir():
        loaded = context.state("load")["metrics"]
        source = sources.locate(recipe.source, loaded["revision"])
    try:
        return sources.load_model(source, recipe.dtype, recipe.head, **placing)
    except (OSError, ValueError) as error:
        raise StageError(f"model.source: {error}") from error


def model_after(context: Context, stage: str, softmax: PreTrainedModel | None = None) -> nn.Module:
    """The converted model as `stage` (or the last stage of the recipe before it that changes the model) left it;
    adapters of stage finetune are in place, not merged. `softmax`, if given, becomes it."""
    *_, (_, model) = stages_of(context, softmax or softmax_model(context), stage)
    return model


def merged_model(context: Context) -> PreTrainedModel:
    """The converted model after its last stage, adapters merged into the weights."""
    model = model_after(context, "finetune")
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def stages_of(context: Context, model: PreTrainedModel, last: str = "finetune") -> Iterator[tuple[str, nn.Module]]:
    """Bring a softmax model forward in place, yielding (stage, model) after each finished stage that changes it, up
    to stage `last`; first after install, or after load where its attention stays."""
    if context.recipe.attention is None:
        yield "load", model.eval()
    else:
        install(model, context.recipe.attention.config, kept_heads(context, model))
        # There are none where the layers have no parameters.
        if (context.stage_directory("install") / WEIGHTS).is_file():
            load_weights(model, context.stage_directory("install"))
        yield "install", model.eval()
    for stage in ("transfer", "finetune"):
        section = getattr(context.recipe, stage)
        if STAGES.index(stage) > STAGES.index(last):
            return
        if section is None:
            continue
        if not (context.stage_directory(stage) / WEIGHTS).is_file():
            raise StageError(
                f"{context.stage_directory(stage) / WEIGHTS}: is gone; --from {stage} makes it again"
            )
        if stage == "finetune" and section.method == "lora":
            model = with_adapters(model, section)
        load_weights(model, context.stage_directory(stage))
        if stage == "finetune":
            config = model.config.get_text_config(decoder=True)
            if section.longest > getattr(config, "max_position_embeddings", section.longest):
                config.max_position_embeddings = section.longest
        yield stage, model.eval()


def kept_heads(context: Context, model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """layer -> key heads that stay softmax: those that the recipe names, or that stage install has measured."""
    keep = context.recipe.keep
    if keep is None:
        return {}
    if keep.kv_budget is None:
        return named_heads(keep, {layer: kv_heads for layer, (_, kv_heads, _) in head_shapes(model).items()})
    path = context.stage_directory("install") / KEPT
    if not path.is_file():
        raise StageError(f"{path}: is gone; --from install makes it again")
    return {int(layer): tuple(heads) for layer, heads in json.loads(path.read_text("utf-8"))["kept"].items()}


def with_adapters(model: PreTrainedModel, section: FinetuneSection) -> PeftModel:
    """`model` with LoRA adapters, which alone are trainable, but for what tells classes."""
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=section.targets, task_type=task(model))
    return get_peft_model(model, config)


def task(model: PreTrainedModel) -> TaskType:
    """What PEFT is to know of a model."""
    if type(model).__name__.endswith(sources.CLASSIFIER):
        return TaskType.SEQ_CLS
    if is_encoder_decoder(model):
        return TaskType.SEQ_2_SEQ_LM
    return TaskType.FEATURE_EXTRACTION if getattr(model, "is_encoder", False) else TaskType.CAUSAL_LM


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are merged into the weights; behind, all is to the bit what it was."""
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [module.get_base_layer().weight.data for module in adapted]
    for module in adapted:
        # In copies of the weights.
        module.merge(safe_merge=True)
    try:
        yield
    finally:
        for module, weight in zip(adapted, before, strict=True):
            module.get_base_layer().weight.data = weight
            module.merged_adapters.clear()


def prepare_finetune(model: PreTrainedModel, section: FinetuneSection) -> nn.Module:
    """`model` with what `section` trains made trainable, in fp32 whatever the model's dtype.

    Raises:
        ValueError: naming `finetune.targets` when the model has no module of one of these names.
    """
    if section.method == "full":
        train_only(model, lambda name: section.train_attention or LINEAR not in name)
        return model.float()
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in section.targets:
        if target not in names:
            raise ValueError(
                f"finetune.targets: this model has no module named {target}; it has {', '.join(sorted(names))}"
            )
    model = with_adapters(model, section)
    # A new classifier, which adapters would not train, is saved with them.
    wanted = ("lora_", "modules_to_save", *([LINEAR] if section.train_attention else []))
    train_only(model, lambda name: any(part in name for part in wanted))
    return model


def to_bfloat16(model: nn.Module) -> None:
    """As a model that is loaded in bfloat16: the attention layers' masters stay as they are."""
    for name, parameter in model.named_parameters():
        if LINEAR not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def train_only(model: nn.Module, wanted) -> None:
    """Make exactly the parameters trainable whose name `wanted` accepts."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(wanted(name)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_weights(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Write `weights` as a whole file or not at all.

    Raises:
        StageError: what was written is not all of them, such as a part that ZeRO-3 has given this process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (WEIGHTS + ".part")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary)
    try:
        check_saved([temporary], weights)
    except ValueError as error:
        raise StageError(f"{directory}: the weights were not saved whole: {error}") from error
    put(temporary, directory / WEIGHTS)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a stage has written to `path`.

    Raises:
        StageError: the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        stage = next(name for name in reversed(path.parts) if name in STAGES)
        raise StageError(f"{path}: is damaged ({error}); --from {stage} makes it again") from error


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy saved weights into the parameters of the same names.

    Raises:
        StageError: the file is damaged; ValueError: when a saved weight has no parameter here.
    """
    parameters = dict(model.named_parameters())
    saved = read_tensors(directory / WEIGHTS)
    unknown = saved.keys() - parameters.keys()
    if unknown:
        raise ValueError(f"{directory / WEIGHTS}: holds {sorted(unknown)[0]}, which this model has not")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
