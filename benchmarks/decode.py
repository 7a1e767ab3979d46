"""One decoding step of one layer, by batch and context: linear beside softmax, and beside fla's recurrent step; and
the verification of a draft tree, in which every node has two children.

    python benchmarks/decode.py --out DIRECTORY [--presets augmented-icml lolcats augmented] [--backends auto]
        [--batches 1 16 128] [--contexts 256 2048 8192 32768] [--heads 32] [--kv-heads 8] [--tree 64]

Microseconds, medians of CUDA graph replays, bfloat16, heads of 128. Softmax is SDPA's fastest of cuDNN and flash over a
cache of `context` tokens. Linear steps know no context, so they are measured once per batch, with the ring full: means
over replays, as every 16th step writes the state, of all rows at once here. The floor is the bytes of ring and state,
read, at the bandwidth of a copy measured here. Writes `decode.json`, `.md`, and `.png`.
"""

import argparse
import json
from pathlib import Path

import torch
from attention import DIM, SDPA, bandwidth, layer_of, milliseconds
from torch.nn.attention import sdpa_kernel

from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS
from linearize.layers.draft import DraftTree


def new_tokens(batch: int, heads: int, kv_heads: int, length: int = 1) -> list[torch.Tensor]:
    return [
        torch.randn(batch, n, length, DIM, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    ]


def linear(preset: str, backend: str, batch: int, heads: int, kv_heads: int, nodes: int) -> tuple[float, float, int]:
    """Microseconds of a step and of a tree, and bytes of ring and state."""
    layer = layer_of(preset, heads, kv_heads)
    config, cache = layer.config, LinearCacheLayer(layer.config)

    def call(q, k, v, ancestors=None):
        raw = {} if config.rope == "after" else {"raw_q": q, "raw_k": k}
        sink = {"sink_q": q} if config.sink_distance is not None else {}
        return layer(q, k, v, scale=DIM**-0.5, cache=cache, ancestors=ancestors, **raw, **sink)

    layer.backend = "auto"
    call(*new_tokens(batch, heads, kv_heads, 2 * config.ring_size))
    size = cache.nbytes
    layer.backend = backend
    token, tree = (new_tokens(batch, heads, kv_heads, length) for length in (1, nodes))
    ancestors = DraftTree(tuple((node - 1) // 2 for node in range(nodes)), (0,) * nodes).ancestors.cuda()
    step = milliseconds(lambda: call(*token), "mean")
    return step * 1e3, milliseconds(lambda: call(*tree, ancestors)) * 1e3, size


def softmax(batch: int, context: int, heads: int, kv_heads: int) -> float:
    q, _, _ = new_tokens(batch, heads, kv_heads)
    _, k, v = new_tokens(batch, heads, kv_heads, context)
    found = []
    for backend in SDPA.values():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            found.append(milliseconds(call) * 1e3)
        except RuntimeError as error:
            print(f"{backend}: {str(error).splitlines()[0][:120]}", flush=True)
    return min(found)


def recurrent(batch: int, heads: int) -> float:
    """fla's fused recurrent step, with a state per query head."""
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    q, k, v = (x.transpose(1, 2) for x in new_tokens(batch, heads, heads))
    state = torch.randn(batch, heads, DIM, DIM, device="cuda")

    def call():
        return fused_recurrent_linear_attn(q, k, v, initial_state=state, output_final_state=True, normalize=False)

    return milliseconds(call) * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["augmented-icml", "lolcats", "augmented"])
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192, 32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--tree", type=int, default=64)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    speed, heads = bandwidth(), (arguments.heads, arguments.kv_heads)
    results = {}
    for batch in arguments.batches:
        rows = results[batch] = {}
        for preset in arguments.presets:
            for backend in arguments.backends:
                try:
                    step, tree, size = linear(preset, backend, batch, *heads, arguments.tree)
                    rows[f"{preset}, {backend}"] = dict.fromkeys(arguments.contexts, step)
                    rows[f"{preset}, {backend}, tree of {arguments.tree}"] = dict.fromkeys(arguments.contexts, tree)
                    rows[f"{preset}, floor"] = dict.fromkeys(arguments.contexts, size / speed * 1e6)
                except (ValueError, RuntimeError) as error:
                    print(f"{preset}, {backend}: {str(error).splitlines()[0][:160]}", flush=True)
        try:
            rows["fla recurrent"] = dict.fromkeys(arguments.contexts, recurrent(batch, arguments.heads))
        except ImportError:
            print("fla is not installed: left out")
        rows["SDPA"] = {}
        for context in arguments.contexts:
            try:
                rows["SDPA"][context] = softmax(batch, context, *heads)
            except torch.OutOfMemoryError:
                print(f"SDPA: out of memory at {context} tokens, batch {batch}", flush=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy TB/s": speed / 1e12}
    (arguments.out / "decode.json").write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    lines = []
    for batch, rows in results.items():
        lines += [f"| batch {batch}, us | " + " | ".join(map(str, arguments.contexts)) + " |"]
        lines += ["|---" * (len(arguments.contexts) + 1) + "|"]
        for name, found in rows.items():
            cells = [f"{found[context]:.1f}" if context in found else "" for context in arguments.contexts]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    (arguments.out / "decode.md").write_text(text)
    print(json.dumps(machine), text, sep="\n")
    plot(results, arguments.out / "decode.png")


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5.5 * len(results), 4.5), squeeze=False)
    for axis, (batch, rows) in zip(axes[0], results.items(), strict=True):
        for name, found in rows.items():
            style = ":" if name.endswith("floor") else "--" if name in ("SDPA", "fla recurrent") else "-"
            axis.loglog(list(found), list(found.values()), style, label=name)
        axis.set(title=f"batch {batch}", xlabel="tokens in the cache", ylabel="microseconds per step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
