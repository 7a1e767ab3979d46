"""How fast the layer is, and what it takes, beside everything that could be picked instead: one run, one GPU.

    python benchmarks/attention.py --out DIRECTORY [--lengths N ...] [--presets NAME ...] [--backends auto ...]
        [--heads 32] [--kv-heads 32]

Forward, and forward and backward, of B = 1, causal, in bfloat16, per length: presets of this package by each backend
named, SDPA with cuDNN and with flash attention, and fla's chunked linear attention with and without normaliser
where installed. Milliseconds are medians of CUDA graph replays with a cold L2 cache, random inputs; peak memory is what
a call takes beyond inputs and outputs (and gradients). The floor is the bytes that must move at the bandwidth of a copy
measured here. Writes `attention.json`, `attention.md` and `attention.png`.
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize.layers.attention import LinearAttention
from linearize.layers.config import PRESETS

SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
DIM = 128


def layer_of(preset: str, heads: int, kv_heads: int) -> LinearAttention:
    """With all branches at work."""
    torch.manual_seed(0)
    layer = LinearAttention(PRESETS[preset], heads, kv_heads, DIM).cuda()
    for name, parameter in layer.named_parameters():
        if name in ("alpha", "lam", "conv"):
            parameter.data.normal_().abs_().mul_(0.1)
    return layer


def calls(presets: list[str], backends: list[str], heads: int, kv_heads: int) -> dict:
    """Name -> function of q, k, v [B, H, T, D], and the parameters that it trains."""
    found = {}
    for name, backend in SDPA.items():

        def softmax(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=kv_heads != heads
                )

        found[name] = softmax, []
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        print("fla is not installed: left out")
        chunk_linear_attn = None
    for name, normalize in (("fla linear attention", False), ("fla, normalised", True)) if chunk_linear_attn else ():

        def linear(q, k, v, normalize=normalize):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if normalize:
                q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
            out = chunk_linear_attn(q, k, v, normalize=normalize)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found[name] = linear, []
    for preset, backend in itertools.product(presets, backends):
        layer = layer_of(preset, heads, kv_heads)
        layer.backend = backend

        def attend(q, k, v, layer=layer):
            raw = {} if layer.config.rope == "after" else {"raw_q": q, "raw_k": k}
            sink = {} if layer.config.sink_distance is None else {"sink_q": q}
            return layer(q, k, v, scale=DIM**-0.5, **raw, **sink)

        found[f"{preset}, {backend}"] = attend, list(layer.parameters())
    return found


def inputs(length: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, as a transformer's projections leave them."""
    return [
        torch.randn(1, length, n, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def milliseconds(call, mode: str = "median") -> float:
    """Median (or mean) over replays of a CUDA graph, with everything out of the L2 cache before each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return triton.testing.do_bench(graph.replay, warmup=30, rep=150, return_mode=mode)


def peak_bytes(call) -> int:
    """Most memory that is allocated during a call beyond what is there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(function, parameters: list, length: int, heads: int, kv_heads: int) -> dict:
    q, k, v, do = inputs(length, heads, kv_heads)

    def forward():
        with torch.no_grad():
            return function(q, k, v)

    results = {"forward": milliseconds(forward)}
    results["forward bytes"] = peak_bytes(forward) - q.nbytes
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both():
        out = function(*leaves)
        return torch.autograd.grad(out, [*leaves, *(x for x in parameters if x.requires_grad)], do, allow_unused=True)

    results["forward and backward"] = milliseconds(both)
    results["backward bytes"] = peak_bytes(both) - q.nbytes * 2 - 2 * k.nbytes
    return results


def bandwidth() -> float:
    """Bytes per second of a copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median") * 1e3


def floors(length: int, heads: int, kv_heads: int, speed: float) -> dict:
    """q, k, v, o once; and for the gradients q, k, v, do, dq, dk, dv."""
    row = length * DIM * 2
    forward = (2 * heads + 2 * kv_heads) * row
    return {
        "forward": forward / speed * 1e3,
        "forward and backward": (forward + (3 * heads + 4 * kv_heads) * row) / speed * 1e3,
        "forward bytes": forward, "backward bytes": (2 * heads + 2 * kv_heads + heads + 2 * kv_heads) * row,
    }  # fmt: skip


def table(results: dict, lengths: list[int], what: str) -> str:
    lines = [f"| {what}, ms | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, by_length in results.items():
        cells = [by_length.get(str(n), {}).get(what) for n in lengths]
        cells = ["" if x is None else f"{x:.3f}" if x < 10 else f"{x:.1f}" for x in cells]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, what in zip(axes, ("forward", "forward and backward"), strict=True):
        for name, by_length in results.items():
            points = [(int(n), x[what]) for n, x in by_length.items() if what in x]
            style = {"floor": ":"}.get(name, "-" if name.split(", ")[0] in PRESETS else "--")
            axis.loglog(*zip(*points, strict=True), style, marker="." if style != ":" else None, label=name)
        axis.set(title=what, xlabel="tokens", ylabel="ms")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 8192, 32768, 65536])
    parser.add_argument("--presets", nargs="+", default=["augmented-icml", "lolcats", "augmented"])
    parser.add_argument("--backends", nargs="+", default=["auto"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = arguments.heads, arguments.kv_heads
    torch.set_float32_matmul_precision("high")
    speed = bandwidth()
    results = {"floor": {str(n): floors(n, heads, kv_heads, speed) for n in arguments.lengths}}
    for name, (function, parameters) in calls(arguments.presets, arguments.backends, heads, kv_heads).items():
        results[name] = {}
        for length in arguments.lengths:
            try:
                results[name][str(length)] = measure(function, parameters, length, heads, kv_heads)
            except (ValueError, RuntimeError) as error:
                print(f"{name} at {length}: {str(error).splitlines()[0][:200]}", flush=True)
            torch.cuda.empty_cache()
        print(name, {length: round(x["forward"], 3) for length, x in results[name].items()}, flush=True)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()[0]
    machine = {
        "device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "copy TB/s": speed / 1e12,
        "heads": heads, "kv_heads": kv_heads, "dim": DIM,
    }  # fmt: skip
    (arguments.out / "attention.json").write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    tables = [table(results, arguments.lengths, what) for what in ("forward", "forward and backward")]
    largest = str(max(n for n in arguments.lengths))
    share = ["| at " + largest + " tokens | forward memory | with backward |", "|---|---|---|"]
    for name, by_length in results.items():
        if largest in by_length and name != "floor":
            found, least = by_length[largest], results["floor"][largest]
            share.append("| " + " | ".join([name, *(
                f"{found[key] / least[key]:.0%}" if not math.isnan(found.get(key, math.nan)) else ""
                for key in ("forward bytes", "backward bytes")
            )]) + " |")  # fmt: skip
    text = "\n".join([*tables, "\n".join(share)]) + "\n"
    (arguments.out / "attention.md").write_text(text)
    plot(results, arguments.out / "attention.png")
    print(json.dumps(machine))
    print(text)


if __name__ == "__main__":
    main()
