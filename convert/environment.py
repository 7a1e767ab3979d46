"""What this machine offers, and which backends are used on it."""

import importlib.metadata
import platform

import torch

from linearize import __version__
from linearize.convert.transfer import teacher_backend
from linearize.layers.kernels import BACKENDS

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "triton", "flash-attn", "deepspeed", "lm-eval")


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
    facts["linear attention backends"] = ", ".join(BACKENDS) + "; auto takes the last that can do what is asked"
    facts["teacher's softmax attention"] = teacher_backend(device)
    return facts
