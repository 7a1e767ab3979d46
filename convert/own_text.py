"""Text that the converted model writes for its heads to train on: they are to guess the model, not the data."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.convert import processes
from linearize.convert.batches import read_evenly
from linearize.convert.bench import Prompt, generate
from linearize.convert.context import Context, StageError, put
from linearize.convert.data import Documents, encode, problems_named, prompts, with_labels
from linearize.convert.models import read_tensors
from linearize.convert.progress import TokenProgress

# Tokens of the data that such a text begins with.
PIECE = 32
# Its tokens at most: in longer ones small models say the same without end, which any tree guesses.
LONGEST = 192
# Texts that are written at once.
ROWS = 256
# Of so many of the recipe's prompts one is kept to measure heads on.
KEPT_OUT = 32


def length_of(context: Context) -> int:
    """Tokens of a text."""
    return min(context.recipe.medusa.length, LONGEST)


def own_prompts(context: Context, heldout_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the texts of stage medusa begin with, those to train on and those to measure on: the recipe's prompts, and
    pieces of data for what these are too few for.

    Raises:
        StageError: naming the recipe's field, when nothing is short, or long, enough.
    """
    section, data = context.recipe.medusa, context.recipe.data
    asked = user_prompts(context) if section.prompts else []
    heldout = asked[::KEPT_OUT][: -(-heldout_tokens // length_of(context))]
    asked = [prompt for number, prompt in enumerate(asked) if number % KEPT_OUT]
    left = section.own_text - len(asked) * length_of(context)
    if left > 0:
        asked += pieces(context, context.training_documents, "data.train", left)
    if not heldout:
        documents = [Documents(source, context.tokenizer) for source in data.heldout]
        with problems_named("data.heldout", data.heldout):
            heldout = pieces(context, documents, "data.heldout", heldout_tokens)
    return asked[: -(-section.own_text // length_of(context))], heldout


def user_prompts(context: Context) -> list[Tensor]:
    """The recipe's prompts that leave a third of a text for an answer."""
    sources, longest = context.recipe.medusa.prompts, 2 * length_of(context) // 3
    with problems_named("medusa.prompts", sources):
        found = read_evenly([prompts(source, context.tokenizer) for source in sources], context.recipe.medusa.own_text)
    found = [prompt for prompt in found if len(prompt) <= longest]
    if not found:
        raise StageError(f"medusa.prompts: none has {longest} tokens or fewer, which leaves some for an answer")
    return found


def pieces(context: Context, sources: Sequence[Documents], field: str, tokens: int) -> list[Tensor]:
    """Pieces of the sources for `tokens` tokens of text, where the tokenizer has a chat template every second one as a
    user's message."""
    length = length_of(context)
    found = [
        document[start : start + PIECE]
        for document in read_evenly([iter(source) for source in sources], tokens)
        for start in range(0, len(document) - PIECE, length)
    ][: -(-tokens // length)]
    if not found:
        raise StageError(f"medusa.own_text: no document of {field} has more than {PIECE} tokens to go on from")
    tokenizer = context.tokenizer
    if tokenizer.chat_template is not None:
        for index in range(1, len(found), 2):
            text = tokenizer.decode(found[index], skip_special_tokens=True)
            found[index] = encode(tokenizer, [{"role": "user", "content": text}])
    return found


def own_texts(context: Context, base: nn.Module, prompts: list[Tensor], name: str) -> list[Tensor]:
    """What the model says, greedily, after prompts, these included. Each process writes some of the batches, which are
    the same however many there are; those that were written before are read.

    Args:
        name: of their directory in the stage's.
    """
    directory, length = context.stage_directory("medusa") / name, length_of(context)
    directory.mkdir(parents=True, exist_ok=True)
    batches = {directory / f"{start:06}.safetensors": prompts[start : start + ROWS]
               for start in range(0, len(prompts), ROWS)}  # fmt: skip
    own = processes.share([*batches.items()])
    with TokenProgress(context.console, sum(len(part) for _, part in own), length) as bar:
        said = 0
        for path, part in own:
            if not _is_whole(path):
                longest = max(map(len, part))
                found = generate(base, [Prompt(ids, "") for ids in part], max(1, length - longest))
                rows = {f"{row:06}": torch.cat(pair) for row, pair in enumerate(zip(part, found.tokens, strict=True))}
                save_file(rows, path.with_suffix(".part"))
                put(path.with_suffix(".part"), path)
            said += len(part)
            bar.show(said, "text of its own")
    processes.wait()
    return [written[row] for written in map(read_tensors, batches) for row in sorted(written)]


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, to its end."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def answer(prompt: Tensor, text: Tensor) -> dict[str, Tensor]:
    """A sequence whose labels are what the model has said after a prompt."""
    sequence = with_labels(text, torch.arange(len(text)) == 0)
    sequence["labels"][: len(prompt)] = -100
    return sequence
