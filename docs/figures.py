"""Draws the figures of the documentation: `python docs/figures.py` writes docs/figures/*.svg.

Perplexities are read from `benchmarks/results`; the other figures are drawings.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
NEAR, FAR, CONV, NOTHING = "#2a6f97", "#e9a03b", "#8f3985", "#f4f4f4"

# Label, file, run, model, colour, dashes: as in README.md's table.
CURVES = (
    ("softmax, finetuned alike", "smollm2-135m", "window + sinks, retrained", "teacher (softmax), finetuned alike",
     "#333333", "--"),
    ("window 64 + 4 sinks, finetuned alike", "smollm2-135m", "window + sinks, retrained", "after finetune",
     "#999999", "-"),
    ("LoLCATs", "smollm2-135m", "lolcats", "after finetune", "#c44536", "-"),
    ("augmented, every head linear", "smollm2-135m", "augmented, seed 1", "after finetune", NEAR, "-"),
    ("the same, 20M tokens, rank 128", "smollm2-135m-long",
     "rank 128, seed 0 (6f2e560; measured on an H100 and an H200)", "linearized", "#61a5c2", "-"),
    ("augmented, a tenth of the KV heads softmax", "smollm2-135m-facts", "10% of KV heads kept, seed 0",
     "after finetune", FAR, "-"),
)  # fmt: skip


def perplexity():
    """Of WikiText-2's test split, by length of the windows that it is read in."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for label, file, run, model, colour, dashes in CURVES:
        text = json.loads((RESULTS / f"{file}.json").read_text())[run]["models"][model]["text"]
        lengths = sorted(map(int, text))
        values = [text[str(length)]["perplexity"] for length in lengths]
        axes.plot(lengths, values, dashes, color=colour, marker="o", markersize=4, label=label)
    axes.set(xscale="log", ylim=(12, 40), xlabel="tokens read", ylabel="perplexity, WikiText-2")
    axes.set_xticks(lengths, [f"{length:,}".replace(",", " ") for length in lengths])
    axes.minorticks_off()
    axes.axvline(8192, color="#bbbbbb", linewidth=1, linestyle=":")
    axes.text(8192, 39.3, " the model's own maximum", color="#777777", fontsize=8, va="top")
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def attention(tokens: int = 16, window: int = 5, sinks: int = 2, taps: int = 3):
    """Which keys a query sees by which branch."""
    query, key = np.mgrid[:tokens, :tokens]
    past = key <= query
    near = past & ((query - key < window) | (key < sinks))
    cells = np.where(near, 1, np.where(past, 2, 0))
    figure, axes = plt.subplots(figsize=(5, 4))
    axes.pcolormesh(cells, cmap=ListedColormap([NOTHING, NEAR, FAR]), edgecolors="white", linewidth=0.6)
    for i in range(tokens):
        for tap in range(min(taps, i + 1)):
            axes.plot(i - tap + 0.5, i + 0.5, "s", color="white", markersize=3)
    axes.invert_yaxis()
    axes.set(xlabel="key", ylabel="query", aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    names = {NEAR: "near: softmax", FAR: "far: linear, through the state", NOTHING: "future"}
    handles = [Patch(color=colour, label=name) for colour, name in names.items()]
    handles.append(axes.plot([], [], "s", color="#888888", markersize=4, label="white dots: convolution of values")[0])
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def tree():
    """A draft tree: nodes of one depth share a position."""
    parents = [None, 0, 0, 0, 1, 1, 2, 4, 4, 6]
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    accepted = {0, 1, 4, 8}
    height = [sum(d == depth[i] for d in depth[:i]) for i in range(len(parents))]
    figure, axes = plt.subplots(figsize=(6, 2.6))
    for i, parent in enumerate(parents):
        if parent is not None:
            line = {i, parent} <= accepted
            axes.plot([depth[parent], depth[i]], [-height[parent], -height[i]], color=NEAR if line else "#cccccc",
                      linewidth=2 if line else 1, zorder=1)  # fmt: skip
        axes.scatter(depth[i], -height[i], s=180, color=NEAR if i in accepted else "#dddddd", zorder=2)
        colour = "white" if i in accepted else "#555555"
        axes.text(depth[i], -height[i], str(i), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xticks=range(4), xticklabels=["p", "p + 1", "p + 2", "p + 3"], yticks=[], xlabel="position")
    axes.set(xlim=(-0.4, 3.4), ylim=(-2.6, 0.6))
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


if __name__ == "__main__":
    # The same bytes each time.
    plt.rcParams.update({"svg.hashsalt": "linearize", "svg.fonttype": "none", "font.family": "sans-serif"})
    (HERE / "figures").mkdir(exist_ok=True)
    for draw in (perplexity, attention, tree):
        path = HERE / "figures" / f"{draw.__name__}.svg"
        draw().savefig(path, bbox_inches="tight", metadata={"Date": None})
        print(path)
