"""A model as a self-contained directory: weights, configuration, and the code that it needs.

A linearized model gets a type of its own, so that nothing loads it as the softmax model that it was:
`AutoModelForCausalLM`, or whichever of transformers' Auto classes it is for, refuses the directory unless
`trust_remote_code=True`. The code is a few generated lines beside copies of `layers/`. A model whose attention is still
its family's is an ordinary checkpoint, which brings code only where transformers does not know the family.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

import linearize.layers
from linearize import __version__
from linearize.hub.saved import check_saved
from linearize.layers.attending import is_encoder_decoder
from linearize.layers.flash import FlashForCausalLM
from linearize.layers.medusa import MedusaHeads
from linearize.layers.seam import LinearizedMixin
from linearize.layers.speculative import GENERATE_FILE, HEADS_FILE

MODULE = "modeling_linearized"
PREFIX = "linearize_"
# The family that transformers does not know, `layers/flash.py`.
FAMILY = "flash"
ORIGIN = "# Copied from linearize {version}, layers/{path}.\n"

TEMPLATE = '''"""{base} with augmented linear attention."""

{imports}from .{prefix}kernels import BACKENDS, triton_kernels
from .{prefix}seam import LinearizedMixin

try:
    # Faster backends than the copies here, where the same version of the package is installed.
    import linearize
    from linearize.layers import kernels

    if linearize.__version__ == "{version}":
        BACKENDS.update(kernels.BACKENDS)
        vars(triton_kernels).update(vars(kernels.triton_kernels))
except ImportError:
    pass


class Linearized{config}({config}):
    model_type = "linearized_{model_type}"

    def save_pretrained(self, *args, **kwargs):
        self.architectures = {architectures}
        super().save_pretrained(*args, **kwargs)


class Linearized{base}(LinearizedMixin, {base}):
    config_class = Linearized{config}
'''

# transformers puts this in the place of a loaded model's `generate`, whether asked for or not.
GENERATE = '''"""With `custom_generate` this directory, speculative decoding: what `generate` returns, faster."""


def generate(*inputs, model, custom_generate=None, streamer=None, **arguments):
    if custom_generate is None:
        return type(model).generate(model, *inputs, streamer=streamer, **arguments)
    return type(model).generate(model, *inputs, **arguments, custom_generate=model.speculate, token_streamer=streamer)
'''


def export_model(
    model: PreTrainedModel,
    directory: Path,
    tokenizer=None,
    draft: tuple[MedusaHeads, dict] | None = None,
    max_shard_size: str = "5GB",
    files: dict[str, str | dict | bytes] | None = None,
) -> None:
    """Write `model` (adapters merged) so that `AutoModelForCausalLM.from_pretrained(directory,
    trust_remote_code=True)`, or what `auto_class` says, gives it back, without this package.

    Args:
        tokenizer: saved beside the weights, chat template included.
        draft: heads, saved as `medusa_heads.safetensors`, and the trees of their guesses that are verified at once:
            `tree`, the paths of the largest one, of which the first are the smaller ones, and `nodes` of each by the
            fewest sequences at once that it is for.
        max_shard_size: of the weight files.
        files: further files by name; a dict becomes JSON.

    Raises:
        ValueError: the files do not hold the weights.
    """
    families = ("transformers.models.", FlashForCausalLM.__module__)
    base = next(cls for cls in type(model).__mro__ if cls.__module__.startswith(families))
    directory.mkdir(parents=True, exist_ok=True)
    # In the layout of memory: transformers renames weights by model type on loading, and this type is its own.
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=False)
    check_saved(directory.glob("model*.safetensors"), model.state_dict())
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)

    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config_class = type(model.config).__name__
    model_type = config["model_type"]
    config["linearize_version"] = __version__
    code = {}
    if isinstance(model, LinearizedMixin):
        auto = auto_class(base.__name__, model)
        config["model_type"] = f"linearized_{model_type}"
        config["architectures"] = architectures(base.__name__, auto)
        config["auto_map"] = _auto_map(MODULE, f"Linearized{config_class}", auto, f"Linearized{base.__name__}")
        code = remote_code(base.__name__, config_class, model_type, auto)
    elif base is FlashForCausalLM:
        config["auto_map"] = _auto_map(f"{PREFIX}{FAMILY}", config_class, "AutoModelForCausalLM", base.__name__)
        code = {f"{PREFIX}{FAMILY}.py": _copy((FAMILY,), (), Path(linearize.layers.__file__).with_name(f"{FAMILY}.py"))}
    if draft is not None:
        heads, trees = draft
        save_file(heads.state_dict(), directory / HEADS_FILE)
        check_saved([directory / HEADS_FILE], heads.state_dict())
        config["medusa"] = {
            "heads": len(heads.blocks),
            "projection": "own" if heads.projections else "shared",
            "sequential": heads.sequential,
            **trees,
        }
        generate = directory / GENERATE_FILE
        generate.parent.mkdir(exist_ok=True)
        generate.write_text(GENERATE, "utf-8")
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    for name, text in code.items():
        (directory / name).write_text(text, "utf-8")
    for name, content in (files or {}).items():
        if isinstance(content, dict):
            content = json.dumps(content, indent=2) + "\n"
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def auto_class(base: str, model: LinearizedMixin) -> str:
    """Which of transformers' Auto classes loads a model whose own class is `base`."""
    for head in ("ForSequenceClassification", "ForMaskedLM"):
        if base.endswith(head):
            return f"AutoModel{head}"
    if is_encoder_decoder(model):
        return "AutoModelForSeq2SeqLM" if model.can_generate() else "AutoModel"
    return "AutoModel" if model.is_encoder else "AutoModelForCausalLM"


def architectures(base: str, auto: str) -> list[str]:
    """What `transformers serve` and others look for in transformers, and nowhere else, is the first one."""
    served = [auto] if auto == "AutoModelForCausalLM" else []
    return [*served, f"Linearized{base}"]


def _auto_map(module: str, config: str, auto: str, model: str) -> dict[str, str]:
    return {"AutoConfig": f"{module}.{config}", auto: f"{module}.{model}"}


def remote_code(base: str, config: str, model_type: str, auto: str) -> dict[str, str]:
    """File name -> text of the code that a directory carries."""
    found = json.dumps(architectures(base, auto))
    own = base == FlashForCausalLM.__name__
    imports = f"from {f'.{PREFIX}{FAMILY}' if own else 'transformers'} import {config}, {base}\n"
    imports += "" if own else "\n"
    names = {"base": base, "config": config, "model_type": model_type, "architectures": found, "imports": imports}
    code = {f"{MODULE}.py": TEMPLATE.format(**names, prefix=PREFIX, version=__version__)}
    root = Path(linearize.layers.__file__).parent
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts == ("__init__",) or "fused" in parts or parts == (FAMILY,) and not own:
            continue
        package = parts[:-1]
        name = _flat_name(package if parts[-1] == "__init__" else parts)
        code[f"{name}.py"] = _copy(parts, package, file)
    return code


def _copy(parts: tuple[str, ...], package: tuple[str, ...], file: Path) -> str:
    """A file of `layers/` with the names of the others as they lie beside its copy."""

    def flatten(match):
        dots, module = match.groups()
        return f"from .{_flat_name((*package[: len(package) - len(dots) + 1], *module.split('.')))} import"

    # transformers copies modules that are imported from the same folder, no deeper.
    text = re.sub(r"^from (\.+)(\S+) import", flatten, file.read_text("utf-8"), flags=re.MULTILINE)
    return ORIGIN.format(version=__version__, path="/".join(parts) + ".py") + text


def _flat_name(parts: tuple[str, ...]) -> str:
    return PREFIX + "_".join(parts)
