"""How long an encoder takes to read a text, by its length: softmax beside linear, random weights.

    python benchmarks/encoders.py --out DIRECTORY [--shape minilm] [--presets augmented-encoder performer+conv+group]
        [--lengths 512 2048 8192] [--batch 1]

A table of positions as long as the longest text, so that lengths beyond the 512 of BERT's own can be read at all.
Milliseconds are medians of 5 passes (bfloat16 on a GPU, float32 on a CPU); memory is the peak beyond the weights, on a
GPU alone. Softmax is the backend that SDPA picks. Writes `encoders.json` and `.md`.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
import transformers
from generate import DEVICE, seconds
from transformers import BertConfig, BertModel

from linearize.layers.config import PRESETS
from linearize.layers.seam import install

SHAPES = {
    "minilm": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
    "bert-base": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
}
SOFTMAX = "softmax (SDPA)"
REPEATS = 5


@torch.inference_mode()
def measure(shape: str, name: str, lengths: list[int], batch: int) -> dict[int, dict[str, float]]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, max_position_embeddings=max(lengths), **SHAPES[shape])
    model = BertModel(config, add_pooling_layer=False).eval()
    if name != SOFTMAX:
        install(model, PRESETS[name])
    model = model.to(DEVICE)
    if DEVICE == "cuda":
        for module in model.modules():
            if not any(part in type(module).__name__ for part in ("LinearAttention", "FeatureMap")):
                module.to(torch.bfloat16)
    found = {}
    for length in lengths:
        ids = torch.randint(1000, 30000, (batch, length), device=DEVICE)
        read = lambda ids=ids: model(input_ids=ids)  # noqa: E731
        try:
            read()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            found[length] = {"ms": statistics.median(seconds(read) for _ in range(REPEATS)) * 1e3}
            if DEVICE == "cuda":
                found[length]["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        except torch.OutOfMemoryError as error:
            print(f"{name} at {length} tokens: {str(error).splitlines()[0]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["augmented-encoder", "performer+conv+group"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    names = (SOFTMAX, *arguments.presets)
    results = {name: measure(arguments.shape, name, arguments.lengths, arguments.batch) for name in names}
    machine = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.processor() or 'cpu'}",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "shape": arguments.shape, "batch": arguments.batch,
    }  # fmt: skip
    found = {"machine": machine, "results": results}
    (arguments.out / "encoders.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = ["| ms | " + " | ".join(map(str, arguments.lengths)) + " |", "|---" * (len(arguments.lengths) + 1) + "|"]
    for name, by_length in results.items():
        cells = [f"{by_length[n]['ms']:.1f}" if n in by_length else "" for n in arguments.lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (arguments.out / "encoders.md").write_text(text)
    print(json.dumps(machine), text, sep="\n")


if __name__ == "__main__":
    main()
