"""Exported models at work on a file of prompts: their answers; how fast they are, plainly and with their draft heads;
and whether the text is the same."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from linearize.convert.context import StageError
from linearize.convert.data import encode
from linearize.convert.progress import TokenProgress
from linearize.convert.sources import first_line
from linearize.layers.speculative import load_heads


@dataclass(frozen=True)
class Prompt:
    """ids: [T]; category: what results are grouped by."""

    ids: Tensor
    category: str


def read_prompts(path: Path, tokenizer, limit: int | None) -> list[Prompt]:
    """Prompts of a JSON Lines file: `prompt` (text), `messages` (of a chat) or `turns` (of which the first is asked,
    as in MT-Bench), and perhaps `category`. Texts go through the chat template, where there is one.

    Raises:
        StageError: naming the line that has none of them.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines()[:limit], start=1):
        try:
            question = json.loads(line)
            messages = question.get("messages")
            if messages is None:
                text = question["turns"][0] if "turns" in question else question["prompt"]
                messages = [{"role": "user", "content": text}]
            ids = encode(tokenizer, messages)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise StageError(f'{path}:{number}: expected {{"prompt": "..."}}, or messages, or turns') from None
        found.append(Prompt(ids, question.get("category", "all")))
    if not found:
        raise StageError(f"{path}: holds no prompt")
    return found


def draft_with(model, path: Path) -> None:
    """Let an exported model draft the tree of a JSON file, its paths (see `DraftTree.of`).

    Raises:
        StageError: the file holds none, or one that the model cannot draft.
    """
    try:
        model.config.medusa |= {"tree": json.loads(path.read_text("utf-8")), "nodes": None}
        load_heads(model)
    except (ValueError, TypeError) as error:
        raise StageError(f"{path}: {first_line(error)}") from None


@dataclass
class Texts:
    """What was generated for some prompts: tokens of each, forward passes that each took, and seconds in all."""

    tokens: list[Tensor]
    steps: list[int]
    seconds: float


def generate(model, prompts: list[Prompt], new_tokens: int, speculative: bool = False, **how) -> Texts:
    """Prompts of one batch, left-padded; greedy unless `how` says otherwise."""
    width = max(len(prompt.ids) for prompt in prompts)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
    ids = torch.stack([torch.nn.functional.pad(x.ids, (width - len(x.ids), 0)) for x in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(x.ids) for x in prompts]).long()
    how = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True} | how
    if speculative:
        how["custom_generate"] = model.speculate
    began = time.perf_counter()
    # An exported model's own `generate` takes `custom_generate` for its directory's.
    out = type(model).generate(
        model, input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new_tokens, **how
    )
    sequences = out.sequences.cpu()[:, width:]
    seconds = time.perf_counter() - began
    tokens = []
    for row in sequences:
        ended = torch.isin(row, ends).nonzero()
        tokens.append(row[: int(ended[0]) + 1] if len(ended) else row)
    steps = getattr(out, "steps", None)
    return Texts(tokens, [len(row) for row in tokens] if steps is None else steps.tolist(), seconds)


def answers(
    model, tokenizer, prompts: list[Prompt], batch: int, new_tokens: int, speculative: bool, out: Path | None,
    console: Console, **how,
) -> Iterator[dict]:  # fmt: skip
    """Per prompt its number from 1, `text`, `tokens`, and the forward passes that it took, `steps`.

    Args:
        out: JSON Lines to which they are added; prompts whose answer is there are left out.

    Raises:
        StageError: `out` is something else.
    """
    done = set()
    if out is not None and out.exists():
        try:
            done = {json.loads(line)["prompt"] for line in out.read_text("utf-8").splitlines()}
        except (ValueError, KeyError, TypeError):
            raise StageError(f"{out}: is there already, and holds something else than answers") from None
    todo = [(number, prompt) for number, prompt in enumerate(prompts, start=1) if number not in done]
    todo.sort(key=lambda pair: len(pair[1].ids))
    with TokenProgress(console, len(todo), new_tokens) as bar:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            texts = generate(model, [prompt for _, prompt in part], new_tokens, speculative, **how)
            found = [
                {"prompt": number, "text": tokenizer.decode(row, skip_special_tokens=True), "tokens": len(row),
                 "steps": steps}
                for (number, _), row, steps in zip(part, texts.tokens, texts.steps, strict=True)
            ]  # fmt: skip
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(answer) + "\n" for answer in found)
            yield from found
            bar.show(start + len(part), f"{start + len(part)} of {len(todo)} prompts")


def compare(model, prompts: list[Prompt], batch: int, new_tokens: int, speculative: bool, teacher=None) -> dict:
    """Figures of all prompts, `batch` at a time, those of alike lengths together.

    Tokens per second are of whole calls, prompts included, and of what comes after the first token. Of prompts whose
    text is another one when it is guessed, `gaps` has the distance between the logits of the two tokens where texts
    part, in units of the last place of the logits' dtype: 1 or less is a tie but for rounding.

    Args:
        speculative: with the draft heads, too.
        teacher: the softmax model, decoded by transformers' own loop.
    """
    ways = {"plain": (model, {})}
    if speculative:
        ways["speculative"] = (model, {"speculative": True})
    if teacher is not None:
        ways["teacher"] = (teacher, {})
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    groups = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    texts = {name: [] for name in ways}
    first = dict.fromkeys(ways, 0.0)
    # Kernels are compiled, and graphs captured, by the first texts of as many rows.
    for size in {len(group) for group in groups}:
        for asked, how in ways.values():
            generate(asked, [groups[0][0]] * size, 8, **how)
    for group in groups:
        for name, (asked, how) in ways.items():
            first[name] += generate(asked, group, 1, **how).seconds
            texts[name].append(generate(asked, group, new_tokens, **how))
    result = {"prompts": len(prompts)}
    for name, found in texts.items():
        tokens = sum(len(row) for part in found for row in part.tokens)
        seconds = sum(part.seconds for part in found)
        rate = (tokens - len(prompts)) / (seconds - first[name])
        result[name] = {"tokens": tokens, "tokens/s": tokens / seconds, "tokens/s after the first": rate}
    if speculative:
        result["speculative"] |= _acceptance(groups, texts["speculative"])
        result |= _differences(model, groups, texts["plain"], texts["speculative"])
    return result


def _acceptance(groups: list[list[Prompt]], texts: list[Texts]) -> dict:
    tokens, steps = defaultdict(int), defaultdict(int)
    for group, part in zip(groups, texts, strict=True):
        for prompt, row, taken in zip(group, part.tokens, part.steps, strict=True):
            # The first token is the prompt's.
            tokens[prompt.category] += len(row) - 1
            steps[prompt.category] += taken
    by_category = {name: tokens[name] / max(1, steps[name]) for name in sorted(tokens)}
    return {"tokens/step": sum(tokens.values()) / max(1, sum(steps.values())), "by category": by_category}


def _differences(model, groups: list[list[Prompt]], plain: list[Texts], speculative: list[Texts]) -> dict:
    same, gaps = 0, []
    for group, one, other in zip(groups, plain, speculative, strict=True):
        for prompt, x, y in zip(group, one.tokens, other.tokens, strict=True):
            length = min(len(x), len(y))
            different = (x[:length] != y[:length]).nonzero()
            if not len(different):
                same += 1
                continue
            at = int(different[0])
            context = torch.cat([prompt.ids, x[:at]])[None].to(model.device)
            with torch.no_grad():
                logits = model(context, use_cache=False).logits[0, -1]
            pair = logits[[int(x[at]), int(y[at])]]
            unit = pair.abs().max().float() * torch.finfo(pair.dtype).eps
            gaps.append(float((pair[0] - pair[1]).abs().float() / unit))
    return {"same text": same, "gaps": gaps}


def table(results: dict[int, dict]) -> Table:
    """Of `compare` by batch size."""
    shown = Table("batch", "", "tokens/s", "after the first", "tokens/step", "same text")
    for batch, found in results.items():
        for name in ("teacher", "plain", "speculative"):
            if name not in found:
                continue
            x, same = found[name], ""
            if name == "speculative":
                same = f"{found['same text']} of {found['prompts']}"
                if found["gaps"]:
                    same += f", others part within {max(found['gaps']):.1f} units"
            accepted = f"{x['tokens/step']:.2f}" if "tokens/step" in x else ""
            rates = (f"{x[rate]:.1f}" for rate in ("tokens/s", "tokens/s after the first"))
            shown.add_row(str(batch), name, *rates, accepted, same)
    return shown
