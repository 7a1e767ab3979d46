"""What attention transfer costs: tokens per second, and where the time goes, beside a plain forward of the teacher.

    python benchmarks/transfer.py --out DIRECTORY [--shape smollm2-135m] [--presets augmented lolcats] [--batch 8]
        [--length 1024] [--backends auto torch]

Random weights and tokens, one document per row, bfloat16 autocast as in the recipes, AdamW on all layers; medians of
steps. Teacher: its softmax attention; student: the linear layer, its loss and backward; rest: everything else of the
step. The plain forward is the softmax model's without gradients, with the same attention. Writes `transfer.json` and
`.md`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from generate import DEVICE, SHAPES, seconds, synchronize
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from linearize.convert import transfer
from linearize.convert.models import LINEAR, train_only
from linearize.layers.config import PRESETS
from linearize.layers.seam import install
from linearize.recipes.training import TransferSection


class Stopwatch:
    """Milliseconds spent in functions, by the device's own clock where it has one."""

    def __init__(self):
        self.spans = []

    def wrap(self, function):
        def timed(*arguments, **keywords):
            if DEVICE == "cpu":
                began = time.perf_counter()
                found = function(*arguments, **keywords)
                self.spans.append((time.perf_counter() - began) * 1e3)
                return found
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            found = function(*arguments, **keywords)
            ended.record()
            self.spans.append((began, ended))
            return found

        return timed

    def take(self) -> float:
        """All spans since the last call."""
        synchronize()
        total = sum(x if isinstance(x, float) else x[0].elapsed_time(x[1]) for x in self.spans)
        self.spans.clear()
        return total


def measure(shape: str, preset: str, backend: str, batch: int, length: int, steps: int) -> dict:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, max_position_embeddings=length, **SHAPES[shape])).eval()
    model.set_attn_implementation(transfer.teacher_backend(torch.device(DEVICE)))
    ids = torch.randint(0, 32000, (batch, length), device=DEVICE)
    positions = torch.arange(length, device=DEVICE).expand(batch, -1)

    def plain():
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)

    plain()
    forward = statistics.median(seconds(plain) for _ in range(steps))

    install(model, PRESETS[preset]).to(DEVICE)
    for layer in model.linear_attentions().values():
        layer.backend = backend
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(transfer.IMPLEMENTATION)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    objective = transfer.AttentionTransfer(TransferSection(steps=steps, lr=1e-3), seed=0)
    whole, teacher = Stopwatch(), Stopwatch()
    softmax = transfer.softmax_attention
    transfer.softmax_attention = teacher.wrap(softmax)
    AttentionInterface.register(transfer.IMPLEMENTATION, whole.wrap(transfer.transfer_attention))
    try:

        def step():
            with torch.autocast(DEVICE, torch.bfloat16):
                objective.loss(model, {"input_ids": ids, "position_ids": positions}, 1, 0)
            optimizer.step()
            optimizer.zero_grad()

        step()
        whole.take(), teacher.take()
        taken = [(seconds(step) * 1e3, whole.take(), teacher.take()) for _ in range(steps)]
    finally:
        transfer.softmax_attention = softmax
        AttentionInterface.register(transfer.IMPLEMENTATION, transfer.transfer_attention)
    total, attention, softmax_ms = (statistics.median(x) for x in zip(*taken, strict=True))
    tokens = batch * length
    return {
        "forward tokens/s": tokens / forward, "transfer tokens/s": tokens / total * 1e3,
        "of forward": forward * 1e3 / total, "teacher ms": softmax_ms, "student ms": attention - softmax_ms,
        "rest ms": total - attention,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["augmented", "lolcats", "augmented-icml"])
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    results = {}
    for preset in arguments.presets:
        for backend in arguments.backends:
            size = arguments.batch, arguments.length, arguments.steps
            results[f"{preset}, {backend}"] = measure(arguments.shape, preset, backend, *size)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    machine = {"device": device, "torch": torch.__version__, **vars(arguments), "out": None}
    found = {"machine": machine, "results": results}
    (arguments.out / "transfer.json").write_text(json.dumps(found, indent=2) + "\n")
    columns = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[x]:.4g}" for x in columns) + " |" for name, row in results.items()]
    text = "\n".join(lines) + "\n"
    (arguments.out / "transfer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
