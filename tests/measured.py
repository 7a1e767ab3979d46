"""Metrics of a run that has measured everything, made up: three layers of four heads, the last head of layer 1 kept."""

import copy
from math import exp

from linearize.hub.measured import TEACHER, TUNED_TEACHER
from linearize.recipes.loader import load_recipe
from linearize.recipes.schema import Recipe

WINDOW = "sliding window 16 + 2 sinks, untrained"
LAYERS, HEADS, STEPS = 3, 4, 500


def _text(perplexity: float, length: int) -> dict:
    ends = [64 * 2**i for i in range(10) if 64 * 2**i <= length]
    ranges = {f"{0 if end == 64 else end // 2}-{end}": perplexity * (1 + 8 / end) for end in ends}
    return {
        "perplexity": perplexity,
        "by_position": ranges,
        "far_repeats": perplexity / 2,
        "other_tokens": perplexity,
        "far_share": 0.1,
    }


def _everything(perplexity: float, recalled: float, growth: float) -> dict:
    depths = ("0.1", "0.3", "0.5", "0.7", "0.9")
    distances = ("0-64", "64-128", "128-256")
    return {
        "text": {str(length): _text(perplexity * 1000 / (1000 + length), length) for length in (256, 1024)},
        "copying": {"512": {"accuracy": recalled, "perplexity": 2.0}},
        "passkey": {
            "1024": {"accuracy": recalled, "by_depth": {d: recalled * float(d) for d in depths}, "perplexity": 2.0},
            "4096": {"accuracy": recalled / 2, "by_depth": dict.fromkeys(depths, recalled / 2), "perplexity": 2.0},
        },
        "recall": {
            "16": {"accuracy": recalled, "by_distance": {d: recalled / (i + 1) for i, d in enumerate(distances)}}
        },
        "speed": {
            str(length): {
                "prefill_seconds": 1e-4 * length * (1 + growth * length / 1000),
                "decode_seconds": 0.01 * (1 + growth * length / 1000),
                "cache_bytes": int(2**20 * (1 + growth * length)),
            }
            for length in (512, 1024, 2048)
        },
    }


def _far(share: float) -> dict:
    rows = {str(layer): [share * (head + 1) / HEADS for head in range(HEADS)] for layer in range(LAYERS)}
    return {"1024": {"mean": share, "layers": rows}}


def full_metrics() -> dict:
    """stage -> metrics, as `state.json` of finished stages has them."""
    final = _everything(18.98, 0.42, 0.0) | {"far_mass": _far(0.2)}
    final["far_mass"]["1024"]["layers"]["1"][-1] = None
    few = {"text": {"256": _text(30.0, 256)}}
    cheap = {name: copy.deepcopy(final[name]) for name in ("text", "copying")}
    fall = [0.1 + exp(-step / 100) for step in range(STEPS)]
    return {
        "load": {"source": "somebody/tiny", "revision": None, "seconds": 0.1},
        "install": {"layers": LAYERS, "parameters": 944, "kept_heads": {"0": [], "1": [1]}, "seconds": 0.1},
        "transfer": {
            "loss": fall,
            "last_loss_of_layer": {str(layer): 0.1 * (layer + 1) for layer in range(LAYERS)},
            "loss_of_layer": {str(layer): [x * (layer + 1) for x in fall[::5]] for layer in range(LAYERS)},
            "error_of_head": {
                str(layer): [0.05 * (layer + 1) * (head + 1) for head in range(HEADS)] for layer in range(LAYERS)
            },
            "seconds": 12.0,
        },
        "finetune": {"loss": [3.0, 2.5, 2.4], "trained_parameters": 4528, "seconds": 5.0},
        "medusa": {
            "loss": [9.5, 9.4],
            "head_accuracy": [{"top1": 0.4, "top5": 0.6, "ranks": []}, {"top1": 0.2, "top5": 0.3, "ranks": []}],
            "copy_accuracy": [0.3, 0.25, 0.2],
            "tree": [[0], [0, 10], [10]],
            "nodes": {"1": 4},
            "tree_sizes": [
                {"sequences": 1, "nodes": 1, "tokens": 1.0, "ms": 3.5},
                {"sequences": 1, "nodes": 4, "tokens": 1.68, "ms": 3.7},
            ],
            "seconds": 4.0,
        },
        "evaluate": {
            "tokens": {"256": 8192, "1024": 8192},
            "models": {
                TEACHER: _everything(16.5, 0.99, 0.01) | {"far_mass": _far(0.3)},
                TUNED_TEACHER: _everything(16.21, 0.97, 0.01),
                "sliding window 64 + 4 sinks, untrained": few,
                WINDOW: _everything(40.0, 0.1, 0.0),
                "installed": few,
                "after transfer": few,
                "after finetune": final,
            },
            "ablations": {"local only": cheap, "linear only": cheap, "conv off": cheap},
            "seconds": 60.0,
        },
        "export": {"bytes": 376184, "seconds": 0.2},
    }


def measured_recipe(*changes: str) -> Recipe:
    """The demo's, of a model in a directory: the package of the demo's model need not be installed."""
    return load_recipe("demo", ["model.source=.", *changes])
