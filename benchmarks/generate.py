"""Whole models with random weights: prefill and decoding, softmax beside linear, as in Linearized-LLM's Table 4.

    python benchmarks/generate.py --out DIRECTORY [--shape llama-2-7b] [--presets augmented augmented-icml]
        [--contexts 2048 8192 32768 131072] [--batches 1 16 64] [--steps 32]

In bfloat16, with the class that exported models have. Prefill: milliseconds until the last logits of a prompt that
long (median of 3; beyond 32k tokens one) and peak memory beyond the weights. Decoding: tokens per second over all rows,
a forward pass per token, when so many tokens are in the cache, and the same replayed as one CUDA graph; softmax's cache
is filled with random keys and values, since only its size counts. Softmax is the backend that SDPA picks, under a graph
the faster of cuDNN and flash, over a cache of the very size, without a mask: no static cache can be faster. A cell is
empty where memory runs out. Writes `generate.json`, `.md`, and `generate.png`.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS
from linearize.layers.seam import linearized_class

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "llama-2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama-3-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "tiny": dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
}
SOFTMAX = "softmax (SDPA)"
# SDPA without a mask: transformers makes one of a single token while a graph is captured, which neither cuDNN's nor
# flash's kernels take.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, AttentionInterface()["sdpa"])
ANY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def make(shape: str, name: str, longest: int) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=longest, **SHAPES[shape])
    config._attn_implementation = "sdpa"
    cls = LlamaForCausalLM
    if name != SOFTMAX:
        config.linear_attention = PRESETS[name].to_dict()
        cls = linearized_class(LlamaForCausalLM)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = cls(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for module_name, module in model.named_modules():
        if module_name.endswith("linear_attention"):
            module.float()
    if name != SOFTMAX:
        model.set_attn_implementation("linearize")
    return model


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call) -> float:
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def prefill(model, length: int) -> dict:
    ids = torch.randint(0, 32000, (1, length), device=DEVICE)

    def call():
        cache = DynamicCache() if not hasattr(model, "linear_attentions") else LinearCache(model)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    result = {}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    call()
    if DEVICE == "cuda":
        result["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    result["ms"] = statistics.median(seconds(call) for _ in range(3 if length <= 32768 else 1)) * 1e3
    return result


def read_prompt(model, context: int) -> LinearCache:
    cache = LinearCache(model)
    for start in range(0, context, 8192):
        ids = torch.randint(0, 32000, (1, min(8192, context - start)), device=DEVICE)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


class LastPlace(DynamicLayer):
    """A cache of one size, whose last place every new token takes: what a graph of one step can replay."""

    def update(self, key_states, value_states, *arguments, **keywords):
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self, *arguments) -> int:
        return self.keys.shape[2] - 1


def random_cache(config, context: int, batch: int, graph: bool) -> DynamicCache:
    cache = DynamicCache()
    shape = batch, config.num_key_value_heads, context + graph, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)), layer)
        if graph:
            cache.layers[layer].__class__ = LastPlace
    return cache


def decode(model, cache, batch: int, steps: int, graph: bool) -> float:
    """Tokens per second; with `graph`, of replays of one captured step, which moves a linear cache on by itself."""
    ids = torch.randint(0, 32000, (batch, 1), device=DEVICE)
    positions = torch.full_like(ids, cache.get_seq_length())

    def step():
        found = model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        ids.copy_(found)
        positions.add_(1)

    for _ in range(4):
        step()
    call = step
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        call = captured.replay

    def generate():
        for _ in range(steps):
            call()

    return batch * steps / seconds(generate)


@torch.inference_mode()
def measure(model, contexts: list[int], batches: list[int], steps: int) -> dict:
    linear = hasattr(model, "linear_attentions")
    results = {"prefill": {}, "decode": {batch: {} for batch in batches}}
    if DEVICE == "cuda":
        results["decode by CUDA graph"] = {batch: {} for batch in batches}

    def attempt(found: dict, key: int, call) -> None:
        try:
            found[key] = call()
        except RuntimeError as error:  # out of memory, for one
            print(f"at {key} tokens: {str(error).splitlines()[0]}", flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    for context in contexts:
        attempt(results["prefill"], context, lambda context=context: prefill(model, context))
        # All rows are alike: a prompt is read once, and its state repeated.
        prompt = read_prompt(model, context) if linear else None
        for how, by_batch in results.items():
            for batch, found in () if how == "prefill" else by_batch.items():

                def call(context=context, batch=batch, how=how, prompt=prompt):
                    graph = "graph" in how
                    if linear:
                        cache = copy.deepcopy(prompt)
                        cache.batch_repeat_interleave(batch)
                        return decode(model, cache, batch, steps, graph)
                    cache, rates = random_cache(model.config, context, batch, graph), []
                    model.set_attn_implementation(UNMASKED if graph else "sdpa")
                    for backends in [[SDPBackend.CUDNN_ATTENTION], [SDPBackend.FLASH_ATTENTION]] if graph else [ANY]:
                        with sdpa_kernel(backends):
                            rates.append(decode(model, cache, batch, steps, graph))
                    return max(rates)

                attempt(found, context, call)
    return results


def tables(results: dict, contexts: list[int], batches: list[int]) -> str:
    def table(title, cell):
        lines = [f"| {title} | " + " | ".join(map(str, contexts)) + " |", "|---" * (len(contexts) + 1) + "|"]
        for name, found in results.items():
            cells = [cell(found, context) for context in contexts]
            lines.append(f"| {name} | " + " | ".join("" if x is None else f"{x:.4g}" for x in cells) + " |")
        return "\n".join(lines) + "\n"

    parts = [
        table("prefill, ms", lambda found, n: found["prefill"].get(n, {}).get("ms")),
        table("prefill, GiB beyond weights", lambda found, n: found["prefill"].get(n, {}).get("GiB")),
    ]
    for how in ("decode", "decode by CUDA graph"):
        for batch in batches:
            parts.append(
                table(f"{how}, tokens/s, batch {batch}", lambda found, n, at=(how, batch): (
                    found.get(at[0], {}).get(at[1], {}).get(n)
                ))
            )  # fmt: skip
    return "\n".join(parts)


def plot(results: dict, batches: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name, found in results.items():
        style = "--" if name == SOFTMAX else "-"
        milliseconds = [x["ms"] for x in found["prefill"].values()]
        axes[0].loglog(list(found["prefill"]), milliseconds, style, marker=".", label=name)
        for batch in batches:
            points = found.get("decode by CUDA graph", found["decode"])[batch]
            milliseconds = [batch / rate * 1e3 for rate in points.values()]
            axes[1].loglog(list(points), milliseconds, style, marker=".", label=f"{name}, batch {batch}")
    axes[0].set(title="prefill", xlabel="tokens", ylabel="ms")
    axes[1].set(title="decoding by CUDA graph", xlabel="tokens in the cache", ylabel="ms per step")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["augmented", "augmented-icml"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    results = {}
    for name in (SOFTMAX, *arguments.presets):
        model = make(arguments.shape, name, max(arguments.contexts) + arguments.steps + 8)
        results[name] = measure(model, arguments.contexts, arguments.batches, arguments.steps)
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        machine = {"device": device, "torch": torch.__version__, "shape": arguments.shape}
        found = {"machine": machine, "results": results}
        (arguments.out / "generate.json").write_text(json.dumps(found, indent=2) + "\n")
        text = tables(results, arguments.contexts, arguments.batches)
        (arguments.out / "generate.md").write_text(text)
    plot(results, arguments.batches, arguments.out / "generate.png")
    print(text)


if __name__ == "__main__":
    main()
