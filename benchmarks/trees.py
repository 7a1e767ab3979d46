"""Speculation of a whole model with random weights: what a draft tree costs, as in Linearized-LLM's Table 9.

    python benchmarks/trees.py --out DIRECTORY [--shape llama-2-7b] [--presets augmented-icml augmented] [--steps 64]

One sequence in bfloat16, Medusa's tree of 64 nodes for 7B models, 42 of them leaves; medians of CUDA graph replays.
Verification of one tree, and memory beyond weights and the sequence's own cache, by three means, each with this
package's kernels: on the linear state (`tree`); with a copy of the cache for each candidate, i.e. each way from the
root to a leaf (`copies`); with a state for each node, depth by depth (`states`). Then decoding: tokens per second
without guesses, and with four heads and such a tree of which 1 and 2 guesses are accepted in turn, 2.5 tokens per step.
Writes `trees.json` and `.md`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from generate import SHAPES, make, read_prompt, seconds
from torch import Tensor

from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS
from linearize.layers.decoding import Choice, Rows, Step
from linearize.layers.draft import DraftTree
from linearize.layers.graphs import Replay, remember
from linearize.layers.medusa import MedusaHeads

# `mc_sim_7b_63` of Medusa (arXiv 2401.10774): rank after rank of what is likeliest.
RANKS = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)
TREE = DraftTree.of([[int(rank) for rank in path] for path in RANKS.split()])
CONTEXT = 2048


class Forced(Choice):
    """Takes 1 and 2 guesses in turn, the likeliest ones."""

    def __init__(self, tree: DraftTree, device: torch.device):
        super().__init__([], sample=False)
        first = torch.tensor([not any(path) for path in [[], *tree.paths]], device=device)
        depths = torch.tensor(tree.depths, device=device)
        self.right = torch.stack([first & (depths <= 1), first & (depths <= 2)])
        self.turn = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, logits, rows, tokens, tree, parents):
        chosen, _ = super().__call__(logits, rows, tokens, tree, parents)
        right = self.right.index_select(0, self.turn).expand(len(tokens), -1)
        self.turn.bitwise_xor_(1)
        return chosen, right


def captured(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a replay, and GiB that a first call takes beyond what there was."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    size = (torch.cuda.max_memory_allocated() - before) / 2**30
    graph.replay()
    return statistics.median(seconds(graph.replay) for _ in range(20)) * 1e3, size


def forward(model, cache: LinearCache, ids: Tensor, positions: Tensor) -> Tensor:
    return model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits.argmax(-1)


def copied(cache: LinearCache, rows: int) -> LinearCache:
    """As many caches in one."""
    many = deepcopy(cache)
    many.batch_repeat_interleave(rows)
    return many


def copy_rows(source: LinearCache, index: Tensor, target: LinearCache) -> None:
    for old, new in zip(source.layers, target.layers, strict=True):
        for x, y in zip(old.tensors(), new.tensors(), strict=True):
            torch.index_select(x, 0, index, out=y)


def on_the_state(model, cache: LinearCache, tree: DraftTree) -> Callable:
    ids = torch.randint(0, 32000, (1, len(tree.parents)), device="cuda")
    ancestors, depths = tree.ancestors.cuda(), torch.tensor(tree.depths, device="cuda")

    def call():
        with cache.verifying(ancestors):
            return forward(model, cache, ids, cache.length[:, None] + depths)

    return call


def with_copies(model, cache: LinearCache, tree: DraftTree) -> tuple[Callable, LinearCache]:
    leaves = sorted(set(range(len(tree.parents))) - set(tree.parents))
    length = max(tree.depths) + 1
    ids = torch.randint(0, 32000, (len(leaves), length), device="cuda")
    chain = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    depths, first = torch.arange(length, device="cuda"), torch.zeros(len(leaves), dtype=torch.long, device="cuda")
    many = copied(cache, len(leaves))

    def call():
        copy_rows(cache, first, many)
        with many.verifying(chain):
            return forward(model, many, ids, many.length[:, None] + depths)

    return call, many


def with_states(model, cache: LinearCache, tree: DraftTree) -> tuple[Callable, list[LinearCache]]:
    levels = [[i for i, depth in enumerate(tree.depths) if depth == level] for level in range(max(tree.depths) + 1)]
    caches = [copied(cache, len(level)) for level in levels]
    index = [torch.zeros(1, dtype=torch.long, device="cuda")]
    for above, level in zip(levels, levels[1:], strict=False):
        index.append(torch.tensor([above.index(tree.parents[node]) for node in level], device="cuda"))

    def call():
        before = cache
        for level, where in zip(caches, index, strict=True):
            copy_rows(before, where, level)
            forward(model, level, torch.zeros_like(where)[:, None], level.length[:, None])
            before = level

    return call, caches


def tokens_per_second(model, cache: LinearCache, choose: Choice, draft, steps: int, per_step: float) -> float:
    ids = torch.zeros(1, CONTEXT, dtype=torch.long, device="cuda")
    last = ids[:, -1].clone()
    hidden = torch.randn(1, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    cache = deepcopy(cache)
    step = Step(model, cache, choose, Rows(ids, []), draft, last, hidden)
    with Replay(model, cache) as run:
        for _ in range(4):
            run(step).cpu()
        assert run.captured.graph is not None, "the step was not captured"

        def generate():
            for _ in range(steps):
                run(step).cpu()

        return steps * per_step / seconds(generate)


@torch.no_grad()
def measure(shape: str, preset: str, steps: int) -> dict:
    model = make(shape, preset, CONTEXT + 4096)
    cache, result = read_prompt(model, CONTEXT), {}
    heads = MedusaHeads(model.get_output_embeddings(), 4, "shared").to(torch.bfloat16)
    single = Choice([], sample=False)
    plain = tokens_per_second(model, cache, single, None, steps, 1)
    forced = tokens_per_second(model, cache, Forced(TREE, torch.device("cuda")), (heads, TREE), steps, 2.5)
    result["tokens/s"], result["tokens/s, 2.5 per step"] = plain, forced
    remember(model.linear_attentions(), cache, 0)
    result["tree"] = captured(on_the_state(model, cache, TREE))
    for name, way in (("copies", with_copies), ("states", with_states)):
        before = torch.cuda.memory_allocated()
        call, held = way(model, cache, TREE)
        beside = (torch.cuda.memory_allocated() - before) / 2**30
        ms, size = captured(call)
        result[name] = ms, size + beside
        del call, held
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["augmented-icml", "augmented"])
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for preset in arguments.presets:
        results[preset] = measure(arguments.shape, preset, arguments.steps)
        print(preset, results[preset], flush=True)
        torch.cuda.empty_cache()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": arguments.shape}
    (arguments.out / "trees.json").write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    lines = ["| | verification, ms | GiB | tokens/s |", "|---|---|---|---|"]
    for preset, found in results.items():
        for name in ("tree", "copies", "states"):
            ms, size = found[name]
            lines.append(f"| {preset}, {name} | {ms:.2f} | {size:.2f} | |")
        lines.append(f"| {preset}, no guesses | | | {found['tokens/s']:.1f} |")
        lines.append(f"| {preset}, 2.5 tokens per step | | | {found['tokens/s, 2.5 per step']:.1f} |")
    (arguments.out / "trees.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
