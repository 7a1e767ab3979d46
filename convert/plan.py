"""What a recipe will do and need, found out before any weights are read."""

import importlib.util
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from linearize.convert import sources
from linearize.convert.attention_plan import BYTES, KINDS, linear, softmax
from linearize.convert.blocks import decoder_blocks
from linearize.convert.chunks import cannot_carry
from linearize.convert.context import Context, StageError, write_atomically
from linearize.convert.data import check_tokenizer, documents, packed, problems_named, prompts, token_stream
from linearize.convert.encoders import edges, embed, encoder_measures
from linearize.convert.examples import Labels, class_names, read_examples
from linearize.convert.hiding import hiding
from linearize.convert.measures import make_measures, position_limit
from linearize.convert.models import LINEAR, prepare_finetune, train_only, trainable
from linearize.convert.reporting import check_reporting
from linearize.layers.attending import UnsupportedModelError
from linearize.layers.config import window_alone
from linearize.layers.medusa import MedusaHeads
from linearize.recipes.schema import Recipe, ShardedTraining, deepspeed_file
from linearize.recipes.training import Training, TransferSection, layer_range

PLAN = "plan.json"
# Characters of a source's first text that show whether it can be read.
GLANCE = 1000


@dataclass(frozen=True)
class StagePlan:
    """One training stage: optimizer steps, tokens in all, parameters trained of how many there are."""

    stage: str
    steps: int
    tokens: int
    trained: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What `linearize check` shows. Memory and disk are in bytes, for one process.

    Attributes:
        kv_bytes: context length -> bytes of the softmax model's KV cache, one sequence.
        kept_heads: key heads that stay softmax, in all layers.
        kept_bytes: bytes that their cache grows by with every token.
        kept_tokens: tokens at which it stops growing, or None.
        state_bytes: bytes of the linear heads' cache, one sequence, any length.
        memory: weights, gradients and optimizer of the largest stage, activations left out.
        disk: stage directories and the exported model.
    """

    model: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    parameters: int
    stages: list[StagePlan]
    kept_heads: int
    kept_bytes: int
    kept_tokens: int | None
    state_bytes: int
    kv_bytes: dict[int, int]
    memory: int
    disk: int


def make_plan(context: Context) -> Plan:
    """Check everything that can be checked without weights, and count.

    Reads the model's configuration, its tokenizer and the data's beginning; a local directory's safetensors headers.

    Raises:
        StageError: with the recipe's field and one sentence.
    """
    recipe = context.recipe
    try:
        return _make_plan(recipe)
    except StageError:
        raise
    except UnsupportedModelError as error:
        raise StageError(f"model.source: {error}") from error
    except ValueError as error:
        raise StageError(str(error)) from error


def _make_plan(recipe: Recipe) -> Plan:
    check_reporting(recipe.report_to)
    new = recipe.model.config is not None
    tokenizer, source = None, None
    if new:
        tokenizer = sources.tokenizer_of(recipe.model)
        config = sources.new_config(recipe.model, tokenizer)
    else:
        source = sources.locate(recipe.model.source, recipe.model.revision)
        config = sources.load_config(source)
    if (names := class_names(recipe)) is not None:
        config.id2label = dict(enumerate(names))
    model = _empty_model(recipe, config)
    text = config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    attention = softmax(recipe, model) if recipe.attention is None else linear(recipe, model)
    if source is not None and source.gguf is None and Path(source.path).is_dir():
        try:
            sources.check_weights(Path(source.path))
        except ValueError as error:
            raise ValueError(f"model.source: {error}") from error

    tokenizer = tokenizer or sources.tokenizer_of(recipe.model)
    try:
        check_tokenizer(tokenizer, text.vocab_size)
    except ValueError as error:
        raise ValueError(f"model.tokenizer: {error}") from error
    _check_data(recipe, tokenizer, model, None if names is None else Labels(names))

    for field, wanted in (
        ("finetune.deepspeed", recipe.finetune and recipe.finetune.deepspeed),
        ("medusa.deepspeed", recipe.medusa and recipe.medusa.deepspeed),
        ("transfer.teacher", recipe.transfer and recipe.transfer.teacher == "zero3"),
    ):
        if wanted and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(f"{field}: deepspeed is not installed; pip install 'linearize[deepspeed]'")
    if recipe.transfer and recipe.transfer.blocks_at_once:
        # Raises where there are none.
        decoder_blocks(model)
    for stage in ("finetune", "medusa"):
        section = getattr(recipe, stage)
        if section and section.deepspeed:
            _check_deepspeed(stage, section)
    if recipe.finetune and recipe.finetune.chunk and (reason := cannot_carry(model)):
        raise ValueError(f"finetune.chunk: {reason}; use chunk: null")
    stages = _plan_stages(recipe, model)
    item = BYTES[recipe.model.dtype]
    largest = max((stage.trained for stage in stages), default=0)
    # The copy of stage load, the exported model, and what is trained, with two checkpoints of it and one that is being
    # written.
    copies = (1 if new or source.gguf else 0) + (1 if recipe.export else 0)
    return Plan(
        model=recipe.model.source or f"new {config.model_type}",
        parameters=parameters,
        stages=stages,
        **attention,
        # fp32 gradient and two moments for what is trained.
        memory=parameters * item + largest * 12,
        disk=copies * parameters * item + sum(stage.trained for stage in stages) * 4 + 3 * largest * 12,
    )


def _empty_model(recipe: Recipe, config):
    """The model of a configuration, without memory for its weights."""
    field = "model.source" if recipe.model.config is None else "model.config"
    try:
        with torch.device("meta"):
            return sources.AUTO_CLASSES[recipe.model.head].from_config(config)
    except ValueError as error:
        kind = KINDS[recipe.model.head]
        raise ValueError(f"{field}: {type(config).__name__} is not the configuration of {kind}") from error


def _check_deepspeed(stage: str, section: ShardedTraining) -> None:
    configuration = json.loads(deepspeed_file(section.deepspeed).read_text("utf-8"))
    for precision in ("bf16", "fp16"):
        if configuration.get(precision, {}).get("enabled") is True:
            raise ValueError(
                f"{stage}.deepspeed: {precision}.enabled rounds what is trained; leave it out, and let {stage}.bf16 "
                "say what it is computed in"
            )
    if getattr(section, "attention_lr", None) is not None and "optimizer" in configuration:
        raise ValueError(f"{stage}.attention_lr: the DeepSpeed configuration has an optimizer of its own; drop one")


def _plan_stages(recipe: Recipe, model) -> list[StagePlan]:
    stages = []

    def add(stage: str, section: Training, model) -> None:
        counts = [sum(p.numel() for p in ps) for ps in (trainable(model).values(), model.parameters())]
        stages.append(StagePlan(stage, section.steps, section.steps * section.batch_size * section.length, *counts))

    if recipe.transfer is not None:
        train_only(model, lambda name: LINEAR in name)
        if not trainable(model):
            raise ValueError(
                f"transfer: attention preset {recipe.attention.preset} has nothing to train; set transfer: null"
            )
        _check_layers(recipe.transfer, model.linear_attentions())
        add("transfer", recipe.transfer, model)
    if (finetune := recipe.finetune) is not None:
        model = prepare_finetune(model, finetune)
        add("finetune", finetune, model)
        if recipe.evaluate is not None and recipe.evaluate.tuned_teacher:
            # The same without the linear layers, which the teacher has not.
            tuned = [name for name in trainable(model) if LINEAR not in name]
            train_only(model, lambda name: name in tuned)
            add("tuned teacher", finetune, model)
    if recipe.medusa is not None:
        output = model.get_output_embeddings()
        if not isinstance(output, torch.nn.Linear):
            raise ValueError(f"medusa: heads need a linear output projection, not {type(output).__name__}")
        train_only(model, lambda name: False)
        heads = MedusaHeads(output, recipe.medusa.heads, recipe.medusa.projection, recipe.medusa.sequential)
        add("medusa", recipe.medusa, torch.nn.ModuleList([model, heads]))
    return stages


def _check_layers(section: TransferSection, layers: Collection[int]) -> None:
    for text in section.layers:
        named = layer_range(text)
        if named[-1] > max(layers) or not set(named) & set(layers):
            raise ValueError(
                f"transfer.layers: {text} is not among this model's attention layers, which are {min(layers)} to "
                f"{max(layers)}"
            )
    last = max(section.layer(index)[1] for index in layers)
    if last < section.steps:
        raise ValueError(f"transfer.layers: every layer stops by step {last}, so {section.steps} steps are too many")


def _check_data(recipe: Recipe, tokenizer, model, labels: Labels | None) -> None:
    """Training and calibration stay within the positions that the model knows, to which finetuning may add, measures
    within those that it can read (`measures.position_limit`)."""
    config = model.config.get_text_config(decoder=True)
    known = getattr(config, "max_position_embeddings", None)
    wanted = []

    def want(field: str, data: str, length: int) -> None:
        if known is not None and length > known:
            raise ValueError(f"{field}: {length} is longer than the {known} positions that the model knows")
        wanted.append((data, length))

    if recipe.keep is not None and recipe.keep.kv_budget is not None:
        _check_calibration(recipe, known)
        want("keep.length", "train", recipe.keep.length)
    for stage in ("transfer", "finetune", "medusa"):
        if (section := getattr(recipe, stage)) is None:
            continue
        field = f"{stage}.curriculum" if section.curriculum else f"{stage}.length"
        if stage == "finetune" and known is not None and section.longest > known:
            if reason := _cannot_extend(model):
                raise ValueError(f"{field}: {section.longest} is longer than the {known} positions that {reason}")
            if section.distill:
                raise ValueError(
                    f"finetune.distill: the teacher knows {known} positions, not the {section.longest} of these "
                    "sequences; use distill: 0, or shorter ones"
                )
            known = section.longest
        for _, length in section.phases:
            want(field, "train", length)
        if known is not None and section.longest + section.position_offset > known:
            raise ValueError(
                f"{stage}.position_offset: {section.position_offset} and a length of {section.longest} are more than "
                f"the {known} positions that the model knows"
            )
    if recipe.evaluate is not None and recipe.data.has_examples:
        if recipe.model.head == "seq2seq-lm" and importlib.util.find_spec("rouge_score") is None:
            raise ValueError("evaluate: rouge-score is not installed; pip install 'linearize[eval]'")
        want("evaluate.lengths", "heldout", max(recipe.evaluate.lengths))
    if recipe.transfer is not None:
        # Any text will do for the heads' errors.
        wanted.append(("heldout", 1))
    if recipe.medusa is not None:
        want("medusa.length", "heldout", recipe.medusa.length)
    for data in ("train", "heldout"):
        sources, lengths = getattr(recipe.data, data), [length for of, length in wanted if of == data]
        if not lengths:
            continue
        if recipe.data.has_examples:
            read_examples(f"data.{data}", recipe.data, tokenizer, max(lengths), labels, len(sources))
            continue
        with problems_named(f"data.{data}", sources):
            for source in sources:
                next(documents(source, tokenizer, GLANCE))
            if data == "train":
                # Raises where the tokenizer cannot.
                hiding(recipe.model.head, tokenizer, config)
        packed(f"data.{data}", sources, tokenizer, max(lengths), 1)
    if recipe.medusa is not None:
        with problems_named("medusa.prompts", recipe.medusa.prompts):
            for source in recipe.medusa.prompts:
                next(prompts(source, tokenizer))
    if recipe.evaluate is not None and not recipe.data.has_examples:
        stream = token_stream("data.heldout", recipe.data.heldout, tokenizer, recipe.evaluate.tokens)
        try:
            if recipe.model.head == "encoder":
                encoder_measures(recipe.evaluate, stream, edges(tokenizer), position_limit(model), embed)
            else:
                config = recipe.attention and recipe.attention.config
                make_measures(recipe.evaluate, stream, tokenizer, config, position_limit(model))
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from error


def _cannot_extend(model) -> str | None:
    """Why `model` cannot learn more positions than it knows, behind "positions that", or None."""
    if position_limit(model) is not None:
        return "the model has, which are a table, not rotations; use shorter sequences"
    ropes = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # Layers of some kinds may have their own.
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        kind = rope.get("rope_type")
        if kind == "dynamic" or kind in ("yarn", "longrope") and rope.get("factor") is None:
            return f"its rotary embedding ({kind}) is made for; use shorter sequences"
    return None


def _check_calibration(recipe: Recipe, positions: int | None) -> None:
    length, window = recipe.keep.length, window_alone(recipe.attention.config)
    if positions is not None and 2 * length > positions:
        raise ValueError(f"keep.length: {length} tokens twice are longer than the {positions} positions of the model")
    if length <= window.reach + 1:
        raise ValueError(
            f"keep.length: a text of {length} tokens is repeated within the window, where every head sees it; "
            f"use more than {window.reach + 1}"
        )


def save_plan(plan: Plan, directory: Path) -> None:
    write_atomically(directory / PLAN, json.dumps(asdict(plan), indent=2) + "\n")


def load_plan(directory: Path) -> Plan:
    """The plan that a run was started with."""
    plan = json.loads((directory / PLAN).read_text("utf-8"))
    plan["stages"] = [StagePlan(**stage) for stage in plan["stages"]]
    plan["kv_bytes"] = {int(length): size for length, size in plan["kv_bytes"].items()}
    return Plan(**plan)


def show_plan(plan: Plan, console: Console) -> None:
    """The plan as tables."""
    console.print(
        f"[bold]{plan.model}[/bold]: {count_text(plan.parameters)} parameters, {plan.layers} attention layers, "
        f"{plan.heads} query and {plan.kv_heads} key heads of {plan.head_dim}, {plan.features} features"
    )
    if plan.kept_heads:
        total = plan.layers * plan.kv_heads
        bound = "" if plan.kept_tokens is None else f", of {plan.kept_tokens} tokens at most"
        console.print(
            f"{plan.kept_heads} of {total} key heads stay softmax: {plan.kept_heads / total:.1%} of the KV cache{bound}"
        )
    table = Table()
    for name in ("stage", "steps", "tokens", "trained", "share"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        share = f"{stage.trained / stage.parameters:.2%}"
        table.add_row(stage.stage, str(stage.steps), count_text(stage.tokens), count_text(stage.trained), share)
    console.print(table)
    console.print(f"memory {size_text(plan.memory)} + activations, disk {size_text(plan.disk)}")


def memory_by_context(plan: Plan) -> list[tuple[int, int, int]]:
    """(tokens, bytes of the KV cache, bytes of what replaces it) of one sequence."""
    found = []
    for length, size in plan.kv_bytes.items():
        kept = length if plan.kept_tokens is None else min(length, plan.kept_tokens)
        found.append((length, size, plan.state_bytes + plan.kept_bytes * kept))
    return found


def show_memory(plan: Plan, console: Console) -> None:
    """The linear cache, kept heads included, beside the KV cache that it replaces, if it does."""
    if not plan.kv_bytes or not plan.state_bytes:
        return
    table = Table()
    table.add_column("context")
    table.add_column("KV cache", justify="right")
    table.add_column("linear state + kept heads" if plan.kept_heads else "linear state", justify="right")
    table.add_column("ratio", justify="right")
    for length, size, held in memory_by_context(plan):
        table.add_row(f"{length // 1024}k", size_text(size), size_text(held), f"{size / held:.1f}")
    console.print(table)


def count_text(number: int) -> str:
    for unit in ("", "k", "M", "B"):
        if number < 1000 or unit == "B":
            return f"{number:.3g}{unit}" if unit else str(number)
        number /= 1000


def size_text(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.1f} {unit}"
        number /= 1024
