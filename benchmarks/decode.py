"""One decoding step of one layer, by batch and context: linear beside softmax, and beside fla's recurrent step; and
the verification of a draft tree, in which every node has two children.

    python benchmarks/decode.py --out DIRECTORY [--presets augmented-icml lolcats augmented] [--backends auto]
        [--batches 1 16 128] [--contexts 256 2048 8192 32768] [--heads 32] [--kv-heads 8] [--tree 64] [--stack 32]

Microseconds of CUDA graph replays with a cold L2 cache, bfloat16, heads of 128: of one layer alone, and per layer of a
stack, each with a cache of its own, one after the other in one graph, as a model has them (of fewer where their caches
take more than `ROOM`). Softmax is SDPA's fastest of cuDNN and flash over a cache of `context` tokens, the median.
Linear steps know no context, so they are measured once per batch, with the ring full: means, as every 16th step writes
the state, of all rows at once here. The floor is the bytes of ring and state, read, at the bandwidth of a copy measured
here. Writes `decode.json`, `.md`, and `.png`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from attention import DIM, SDPA, bandwidth, layer_of, milliseconds
from torch.nn.attention import sdpa_kernel

from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS
from linearize.layers.draft import DraftTree

# Bytes that the caches of a stack may take.
ROOM = 32e9


def new_tokens(batch: int, heads: int, kv_heads: int, length: int = 1) -> list[torch.Tensor]:
    return [
        torch.randn(batch, n, length, DIM, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    ]


def per_layer(make, size: int, stack: int, mode: str) -> tuple[float, float]:
    """Microseconds of one layer alone, and of one in a stack.

    Args:
        make: gives a layer's call, with a cache of `size` bytes.
    """
    calls = [make() for _ in range(max(1, min(stack, int(ROOM / size))))]

    def call_all():
        for call in calls:
            call()

    return milliseconds(calls[0], mode) * 1e3, milliseconds(call_all, mode) * 1e3 / len(calls)


def linear(preset: str, backend: str, batch: int, heads: int, kv_heads: int, nodes: int, stack: int) -> tuple:
    """Microseconds of a step, alone and in a stack, and of a tree, and bytes of ring and state."""
    config = PRESETS[preset]
    token, tree, prompt = (
        new_tokens(batch, heads, kv_heads, length) for length in (1, nodes, 2 * config.ring_size)
    )
    ancestors = DraftTree(tuple((node - 1) // 2 for node in range(nodes)), (0,) * nodes).ancestors.cuda()

    def make():
        layer, cache = layer_of(preset, heads, kv_heads), LinearCacheLayer(config)

        def call(q, k, v, ancestors=None):
            raw = {} if config.rope == "after" else {"raw_q": q, "raw_k": k}
            sink = {"sink_q": q} if config.sink_distance is not None else {}
            return layer(q, k, v, scale=DIM**-0.5, cache=cache, ancestors=ancestors, **raw, **sink)

        call(*prompt)
        layer.backend = backend
        return call, cache

    call, cache = make()
    size = cache.nbytes
    steps = per_layer(lambda: partial(make()[0], *token), size, stack, "mean")
    return *steps, milliseconds(lambda: call(*tree, ancestors)) * 1e3, size


def softmax(batch: int, context: int, heads: int, kv_heads: int, stack: int) -> tuple[float, float]:
    q, _, _ = new_tokens(batch, heads, kv_heads)
    found = []
    for backend in SDPA.values():

        def make(backend=backend):
            _, k, v = new_tokens(batch, heads, kv_heads, context)

            def call():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            return call

        try:
            found.append(per_layer(make, 4 * batch * kv_heads * context * DIM, stack, "median"))
        except RuntimeError as error:
            print(f"{backend}: {str(error).splitlines()[0][:120]}", flush=True)
        torch.cuda.empty_cache()
    return tuple(map(min, zip(*found, strict=True)))


def recurrent(batch: int, heads: int, stack: int) -> tuple[float, float]:
    """fla's fused recurrent step, with a state per query head."""
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    q, k, v = (x.transpose(1, 2) for x in new_tokens(batch, heads, heads))

    def make():
        state = torch.randn(batch, heads, DIM, DIM, device="cuda")
        options = dict(initial_state=state, output_final_state=True, normalize=False)
        return lambda: fused_recurrent_linear_attn(q, k, v, **options)

    return per_layer(make, 4 * batch * heads * DIM * DIM, stack, "median")


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
    parser.add_argument("--stack", type=int, default=32)
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
                    alone, stacked, tree, size = linear(
                        preset, backend, batch, *heads, arguments.tree, arguments.stack
                    )
                    rows[f"{preset}, {backend}"] = dict.fromkeys(arguments.contexts, alone)
                    rows[f"{preset}, {backend}, in a stack"] = dict.fromkeys(arguments.contexts, stacked)
                    rows[f"{preset}, {backend}, tree of {arguments.tree}"] = dict.fromkeys(arguments.contexts, tree)
                    rows[f"{preset}, floor"] = dict.fromkeys(arguments.contexts, size / speed * 1e6)
                except (ValueError, RuntimeError) as error:
                    print(f"{preset}, {backend}: {str(error).splitlines()[0][:160]}", flush=True)
        try:
            alone, stacked = recurrent(batch, arguments.heads, arguments.stack)
            rows["fla recurrent"] = dict.fromkeys(arguments.contexts, alone)
            rows["fla recurrent, in a stack"] = dict.fromkeys(arguments.contexts, stacked)
        except ImportError:
            print("fla is not installed: left out")
        rows["SDPA"], rows["SDPA, in a stack"] = {}, {}
        for context in arguments.contexts:
            try:
                found = softmax(batch, context, *heads, arguments.stack)
                rows["SDPA"][context], rows["SDPA, in a stack"][context] = found
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
            style = ":" if name.endswith("floor") else "--" if name.startswith(("SDPA", "fla")) else "-"
            axis.loglog(list(found), list(found.values()), style, label=name)
        axis.set(title=f"batch {batch}", xlabel="tokens in the cache", ylabel="microseconds per step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
