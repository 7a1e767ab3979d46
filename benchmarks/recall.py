"""What keeping heads buys: a text said again, by how many key heads stay softmax and how far back these look.

    python benchmarks/recall.py MODEL --train FILE --heldout FILE --out DIRECTORY [--heads N ...] [--windows N ...]

Nothing is trained: heads that are not kept see window 64 and 4 sinks, so this is what the far branch and finetuning
start from. Which heads are kept is measured on the training text (`convert.calibrate`), everything else on the
held-out one. Bytes are of the cache in bfloat16 at `CONTEXT` tokens. Writes `recall.json`, `.md` and `.png`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.convert import probes
from linearize.convert.attention_plan import kept_bytes, state_bytes
from linearize.convert.calibrate import calibrate
from linearize.convert.keep import heads_by_layer
from linearize.convert.measures import copying, text
from linearize.layers.config import PRESETS
from linearize.layers.seam import install

CONTEXT = 8192
COPIED = (512, 1024)
TEXTS, WINDOWS_OF_TEXT = 4, 16
BYTES = 2


def cache_bytes(model) -> int:
    total = 0
    for layer in model.linear_attentions().values():
        tokens = min(CONTEXT, layer.config.kept_tokens or CONTEXT)
        total += state_bytes(layer, True, BYTES) + kept_bytes(layer, BYTES) * tokens
    return total


def measure(model, stream: torch.Tensor) -> dict[str, float]:
    figures = {"perplexity": text(model, probes.windows(stream, 1024)[:WINDOWS_OF_TEXT], 64)["perplexity"]}
    for length in COPIED:
        figures[f"copy {length}"] = copying(model, probes.copies(stream, TEXTS, length))["accuracy"]
    return figures


def table(rows: list[dict]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, len(COPIED), figsize=(5 * len(COPIED), 4), sharey=True, layout="constrained")
    for axis, length in zip(axes, COPIED, strict=True):
        for window in dict.fromkeys(row["window"] for row in rows):
            chosen = [row for row in rows if row["window"] == window]
            axis.plot([row["MiB"] for row in chosen], [row[f"copy {length}"] for row in chosen], "o-", label=window)
        axis.set(title=f"a text of {length} tokens said again", xlabel=f"MiB at {CONTEXT} tokens", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy")
    axes[0].legend(title="kept heads look back")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 3, 5, 9, 14])
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024])
    arguments = parser.parse_args()
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trained, stream = (
        torch.tensor(tokenizer(path.read_text("utf-8"), verbose=False)["input_ids"])
        for path in (arguments.train, arguments.heldout)
    )
    texts = trained[: TEXTS * 512].view(TEXTS, 512).to(device)
    found = calibrate(model, PRESETS["swa"], texts, max(arguments.heads), console)
    # All heads kept are the softmax model.
    choices = [(None, list(found.retrieval))]
    choices += [(window, found.kept[:count]) for window in (None, *arguments.windows) for count in arguments.heads]
    rows = []
    for window, kept in choices:
        install(model, replace(PRESETS["swa"], kept_window=window), heads_by_layer(kept))
        row = {"kept": len(kept), "window": window or "all", "MiB": cache_bytes(model) / 2**20}
        rows.append(row | measure(model, stream))
        console.print(rows[-1])
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {"model": arguments.model, "device": device, "calibration": found.to_dict(), "rows": rows}
    (arguments.out / "recall.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    (arguments.out / "recall.md").write_text(table(rows), "utf-8")
    plot(rows[1:], arguments.out / "recall.png")
    print(table(rows))


if __name__ == "__main__":
    main()
