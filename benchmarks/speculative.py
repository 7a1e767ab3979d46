"""Speculative beside plain decoding of an exported model: is the text the same, and how much faster is it?

    python benchmarks/speculative.py MODEL --prompts mt_bench_question.jsonl --out DIRECTORY [--new-tokens 128]
        [--batches 1 8] [--limit N] [--dtype float32] [--nodes N]

Prompts are `turns[0]` of each line, by the model's chat template, in batches of alike lengths; greedy. Per batch size:
tokens per second of both, tokens accepted per step, by category too, the share of prompts with the same text, and of
each other prompt the gap between the two tokens' logits where texts part, in units of the last place of the logits'
dtype: 1 or less is a tie but for rounding. `--nodes` grows a tree of this size from the accuracies that the directory
states, instead of the one that the conversion found fastest. Writes `speculative.json` and prints a table.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.layers.draft import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(path: Path, tokenizer, limit: int) -> list[tuple[str, torch.Tensor]]:
    """Category and prompt, sorted by length."""
    found = []
    for line in path.read_text("utf-8").splitlines()[:limit]:
        question = json.loads(line)
        messages = [{"role": "user", "content": question["turns"][0]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found.append((question["category"], ids["input_ids"][0]))
    return sorted(found, key=lambda prompt: len(prompt[1]))


def generate(model, prompts: list[torch.Tensor], new_tokens: int, pad: int, **how) -> tuple[list[torch.Tensor], float]:
    """What follows each prompt, and the seconds that it took."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0), value=pad) for x in prompts]).to(DEVICE)
    mask = torch.stack([torch.arange(width) >= width - len(x) for x in prompts]).long().to(DEVICE)
    began = time.perf_counter()
    out = type(model).generate(
        model, input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, **how
    ).cpu()
    taken = time.perf_counter() - began
    return [row[width:] for row in out], taken


def gap(model, prompt: torch.Tensor, text: torch.Tensor, other: torch.Tensor) -> float:
    """Between the logits of the first two tokens that differ, in units of the last place."""
    length = min(len(text), len(other))
    at = int((text[:length] != other[:length]).nonzero()[0])
    with torch.no_grad():
        logits = model(torch.cat([prompt, text[:at]])[None].to(DEVICE), use_cache=False).logits[0, -1]
    pair = logits[[int(text[at]), int(other[at])]]
    return float((pair[0] - pair[1]).abs().float() / (pair.abs().max().float() * torch.finfo(pair.dtype).eps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nodes", type=int)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, trust_remote_code=True, dtype=getattr(torch, arguments.dtype)
    )
    model = model.eval().to(DEVICE)
    if arguments.nodes is not None:
        measured = json.loads((arguments.model / "metrics.json").read_text("utf-8"))["medusa"]["head_accuracy"]
        model.config.medusa["tree"] = DraftTree.grown([head["ranks"] for head in measured], arguments.nodes).paths
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts = read(arguments.prompts, tokenizer, arguments.limit)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    results = {}
    for batch in arguments.batches:
        rows, times, gaps = defaultdict(list), {"plain": 0.0, "speculative": 0.0}, []
        generate(model, [prompts[0][1]], 8, pad)
        generate(model, [prompts[0][1]], 8, pad, custom_generate=model.speculate)
        tokens = same = 0
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            texts = [prompt for _, prompt in part]
            plain, taken = generate(model, texts, arguments.new_tokens, pad)
            times["plain"] += taken
            steps.clear()
            found, taken = generate(model, texts, arguments.new_tokens, pad, custom_generate=model.speculate)
            times["speculative"] += taken
            for (category, prompt), x, y in zip(part, plain, found, strict=True):
                length = min(len(x), len(y))
                equal = torch.equal(x[:length], y[:length])
                same += equal
                if not equal:
                    gaps.append(gap(model, prompt, x, y))
                tokens += len(y)
                rows[category].append(len(y) / max(1, len(steps) - 1))
        results[batch] = {
            "prompts": len(prompts), "same text": same, "gaps": gaps,
            "plain tokens/s": tokens / times["plain"], "speculative tokens/s": tokens / times["speculative"],
            "tokens per step": sum(map(sum, rows.values())) / len(prompts),
            "by category": {name: sum(x) / len(x) for name, x in rows.items()},
        }  # fmt: skip
        print(batch, results[batch], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "dtype": arguments.dtype, "tree": model.config.medusa}
    found = {"machine": machine, "results": results}
    (arguments.out / "speculative.json").write_text(json.dumps(found, indent=2) + "\n")
    print("| batch | plain, tokens/s | speculative | tokens per step | same text |\n|---|---|---|---|---|")
    for batch, x in results.items():
        print(f"| {batch} | {x['plain tokens/s']:.1f} | {x['speculative tokens/s']:.1f} | {x['tokens per step']:.2f} | "
              f"{x['same text']} of {x['prompts']} |")  # fmt: skip


if __name__ == "__main__":
    main()
