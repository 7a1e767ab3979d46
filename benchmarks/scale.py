"""Conversion on one GPU and on several: tokens per second and peak memory of attention transfer and LoRA, by launcher.

    python benchmarks/scale.py --out DIRECTORY [--gpus 1 2] [--shapes smollm2-135m llama-2-7b] [--steps 12]

Random weights and tokens, the stages as a recipe runs them, bfloat16 autocast; the 7B shape's frozen weights are
bfloat16, its activations recomputed in LoRA. Each GPU has the same work however many there are, so N of them should do
N times the tokens: `efficiency` is the share of that. Tokens per second are of the median step behind the first three;
memory is the largest of any GPU, as PyTorch's allocator counts it. Writes `scale.json` and `.md`.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from generate import DEVICE, SHAPES, synchronize
from rich.console import Console
from torch import distributed
from transformers import AutoModelForCausalLM, LlamaConfig

from linearize.convert import finetune, models, processes, training, transfer
from linearize.convert.context import Context
from linearize.recipes.loader import load_recipe

# Rows of each GPU in a step, and their tokens.
SIZES = {"smollm2-135m": (8, 1024), "llama-2-7b": (1, 4096), "tiny": (2, 64)}
WARM_UP = 3
JOBS = {
    "transfer": (),
    "transfer, blocks of 4": ("transfer.blocks_at_once=4",),
    "transfer, ZeRO-3 teacher": ("transfer.teacher=zero3",),
    "LoRA": (),
    "LoRA, ZeRO-2": ("finetune.deepspeed=zero2",),
    "LoRA, ZeRO-3": ("finetune.deepspeed=zero3",),
}


class Clock(training.ShowProgress):
    """When steps ended, instead of a bar."""

    ends: list[float] = []

    def on_train_begin(self, *arguments, **keywords):
        self.ends.clear()

    def on_log(self, *arguments, **keywords):
        pass

    def on_step_end(self, *arguments, **keywords):
        synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, *arguments, **keywords):
        pass


def measure(job: str, shape: str, steps: int) -> dict:
    count = processes.count()
    rows, length = SIZES[shape]
    is_large = shape == "llama-2-7b"
    stage = "transfer" if job.startswith("transfer") else "finetune"
    size = (f"{stage}.steps={steps}", f"{stage}.batch_size={rows * count}", f"{stage}.length={length}",
            f"{stage}.micro_batch_size={rows}", f"{stage}.warmup_steps=0")  # fmt: skip
    others = [f"{name}=null" for name in ("transfer", "finetune", "medusa", "evaluate", "export") if name != stage]
    dtype = "bfloat16" if is_large else "float32"
    recompute = [f"finetune.gradient_checkpointing={str(is_large).lower()}"] if stage == "finetune" else []
    recipe = load_recipe("smollm2-135m", [*size, *others, *recompute, f"model.dtype={dtype}", *JOBS[job]])
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=length, **SHAPES[shape])

    def random_model(context, **keywords):
        # A CPU would take a minute to draw so many weights.
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        if "blocks" in job:
            # They come from host memory.
            model = model.cpu()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return model

    transfer.softmax_model = models.softmax_model = random_model
    transfer.held_out = lambda context: torch.randint(32000, (1, length))
    training.ShowProgress = Clock
    with tempfile.TemporaryDirectory() as directory:
        # All processes write to the same one.
        directory = processes.alone(str, directory)
        context = Context(recipe, Path(directory), Console(quiet=True))
        context.__dict__["tokenizer"] = None
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(32000, (4 * rows * count * length,), generator=generator)
        context.__dict__["training_documents"] = [[text]]
        {"transfer": transfer, "finetune": finetune}[stage].run(context)
        if count > 1:
            distributed.barrier()
    seconds = statistics.median(b - a for a, b in zip(Clock.ends[WARM_UP - 1 :], Clock.ends[WARM_UP:], strict=False))
    memory = [torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0] * count
    if count > 1:
        distributed.all_gather_object(memory, memory[0])
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {"tokens/s": rows * count * length / seconds, "GB": max(memory) / 1e9}


def work(shape: str, jobs: list[str], steps: int, out: Path) -> None:
    """What one of the processes does."""
    processes.join()
    torch.set_float32_matmul_precision("high")
    found = {}
    for job in jobs:
        if "ZeRO-3 teacher" in job and processes.count() == 1:
            continue
        # Models are in cycles: the one before would be counted.
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
        found[job] = {"GB before": left} | measure(job, shape, steps)
        if processes.is_main():
            print(shape, processes.count(), job, found[job], flush=True)
            out.write_text(json.dumps(found))


def table(results: dict) -> str:
    """results: shape -> GPUs -> job -> figures."""
    lines = []
    for shape, by_count in results.items():
        counts = list(by_count)
        lines += [f"| {shape} | " + " | ".join(f"{n} GPU{'s' * (n != '1')}: tokens/s | GB each" for n in counts)
                  + " | efficiency |", "|---" * (2 * len(counts) + 2) + "|"]  # fmt: skip
        for job in JOBS:
            if not any(job in jobs for jobs in by_count.values()):
                continue
            cells = [by_count[n].get(job) for n in counts]
            shown = [f"{x['tokens/s']:.0f} | {x['GB']:.1f}" if x else " | " for x in cells]
            both = all(cells) and len(cells) > 1
            share = cells[-1]["tokens/s"] / cells[0]["tokens/s"] / int(counts[-1]) * int(counts[0]) if both else None
            lines.append(f"| {job} | " + " | ".join(shown) + f" | {'' if share is None else f'{share:.0%}'} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SIZES, default=["smollm2-135m", "llama-2-7b"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if processes.launched():
        (shape,), (count,) = arguments.shapes, arguments.gpus
        work(shape, arguments.jobs, arguments.steps, arguments.out / f"{shape}-{count}.json")
        return
    for shape in arguments.shapes:
        for count in arguments.gpus:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            command = [*torchrun, __file__, "--out", str(arguments.out), "--shapes", shape, "--gpus", str(count)]
            environment = os.environ | {"OMP_NUM_THREADS": "4"}
            # What was measured before it failed is kept.
            subprocess.run([*command, "--jobs", *arguments.jobs, "--steps", str(arguments.steps)], env=environment)
    results = {}
    for shape in arguments.shapes:
        files = {str(count): arguments.out / f"{shape}-{count}.json" for count in arguments.gpus}
        results[shape] = {count: json.loads(file.read_text()) for count, file in files.items() if file.is_file()}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    machine = {"device": device, "torch": torch.__version__, "steps": arguments.steps}
    found = {"machine": machine, "results": results}
    (arguments.out / "scale.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(results)
    (arguments.out / "scale.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
