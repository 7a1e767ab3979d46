"""What this machine offers, and which backends are used on it."""

import importlib.metadata
import platform
from collections import defaultdict
from itertools import takewhile

import torch

from linearize import __version__
from linearize.convert.transfer import teacher_backend
from linearize.layers.attention import LinearAttention
from linearize.layers.config import PRESETS
from linearize.layers.kernels import BACKENDS, Features, Problem, backend_for
from linearize.layers.tokens import whole_sequences

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "triton", "flash-attn", "deepspeed", "lm-eval")


def preset_backend(preset: str, device: torch.device) -> str:
    """What computes sequences of a preset in heads of 64, in bfloat16 on GPUs; and why not what comes before it."""
    config = PRESETS[preset]
    layer = LinearAttention(config, 1, 1, 64).to(device)
    x = torch.zeros(1, 1, 128, 64, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
    raw = x if config.rope == "after" else x.clone()
    queries, keys = (Features(raw, layer.phi_q), Features(raw, layer.phi_k)) if layer.features else (None, None)
    tokens = whole_sequences(None, 1, x.shape[2], device)
    problem = Problem(x, x, x, queries, keys, tokens, None, None, config, layer.weights(device), scale=1.0)
    chosen = backend_for(problem)
    passed_over = defaultdict(list)
    for name in takewhile(lambda name: name != chosen, reversed(BACKENDS)):
        passed_over[BACKENDS[name].refuses(problem)].append(name)
    return "; ".join([chosen, *(f"not {', '.join(names)}: {reason}" for reason, names in passed_over.items())])


def environment() -> dict[str, str]:
    """Facts by name."""
    facts = {"linearize": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    facts["device"] = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    facts["linear attention backends"] = ", ".join(BACKENDS)
    # What is added to a baseline changes nothing here.
    for preset in (name for name in PRESETS if "+" not in name):
        facts[f"backend of {preset}"] = preset_backend(preset, device)
    facts["teacher's softmax attention"] = teacher_backend(device)
    return facts
