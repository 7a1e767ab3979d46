"""From text and chat data to packed sequences of tokens."""

import csv
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset

from linearize.convert.context import StageError
from linearize.convert.sources import first_line
from linearize.recipes.corpora import BUILTIN_DATA, DataSource

T = TypeVar("T")
# What `datasets` reads them as; the values of .tsv files are not quoted, as GLUE's are not.
FILE_KINDS = {
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
}
# Rows of a data set on the Hub that are shuffled among each other.
BUFFER = 10_000
# ShareGPT's speakers; the other names (system, tool, ...) are those of chat templates already.
ROLES = {"human": "user", "gpt": "assistant"}


def documents(source: DataSource, tokenizer, characters: int | None = None) -> Iterator[list[int]]:
    """Token ids of each document of a source, in its order; blank ones are left out.

    A text file is one document, or several with form feeds between them. Rows of .jsonl and .parquet files and of
    datasets on the Hub (streamed) are one document each. Every document ends with the tokenizer's eos token, where
    it has one, and starts with bos where the tokenizer itself puts it.

    Args:
        characters: of a text's beginning, the rest is left out; None: all of it.

    Raises:
        ValueError: the field is not in the data or holds neither text nor chat messages, the tokenizer has no
            template for chat data, or there are no documents.
    """
    for value in _present(source, tokenizer):
        if isinstance(value, str):
            ids = tokenizer(value.lstrip()[:characters] if characters else value, verbose=False)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(value, return_dict=False)
        yield ended(ids, tokenizer)


def ended(ids: list[int], tokenizer) -> list[int]:
    """With the tokenizer's eos token behind them, where it has one."""
    if tokenizer.eos_token_id is None or ids and ids[-1] == tokenizer.eos_token_id:
        return ids
    return [*ids, tokenizer.eos_token_id]


def prompts(source: DataSource, tokenizer) -> Iterator[torch.Tensor]:
    """Token ids of what each document of a source asks for: a text is a user's message; of chat messages, what comes
    after the user's last one is left out.

    Raises:
        ValueError: as `documents`, or no user says anything in a chat.
    """
    for value in _present(source, tokenizer):
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        ends = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
        if not ends:
            raise ValueError(f"field {source.field!r} of {source.source} holds a chat without a user's message")
        yield encode(tokenizer, messages[: ends[-1]])


def encode(tokenizer, messages: list[dict]) -> torch.Tensor:
    """[T] tokens of a chat, or of its last message where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"][0]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"][0]


class Documents:
    """`documents`, tokenized when they are first asked for and kept: every stage reads them from the beginning."""

    def __init__(self, source: DataSource, tokenizer):
        self._kept: list[torch.Tensor] = []
        self._rest = documents(source, tokenizer)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in count():
            if index == len(self._kept):
                ids = next(self._rest, None)
                if ids is None:
                    return
                self._kept.append(torch.tensor(ids))
            yield self._kept[index]


def _present(source: DataSource, tokenizer) -> Iterator[str | list[dict]]:
    """Texts, and chats as messages with `role` and `content`, that are not blank."""
    empty = True
    for row in rows(source):
        value = row[source.field]
        if not value or isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, list) and isinstance(value[0], dict):
            value = _messages(value, source, tokenizer)
        elif not isinstance(value, str):
            raise ValueError(
                f"field {source.field!r} of {source.source} holds {type(value).__name__}, not text or chat messages"
            )
        empty = False
        yield value
    if empty:
        raise ValueError(f"{source.source} has no documents")


def rows(source: DataSource, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a source, column -> value; pieces of a text file have the column that `source.field` names alone.

    Args:
        seed: of their order, as files may have one class behind the other: of a file, of all rows; of a data set on the
            Hub, which is not read as a whole, of its files, and of so many rows at a time as `BUFFER` says. None: as
            they come.

    Raises:
        ValueError: naming the column that is not there.
    """
    wanted = [name for name in (source.field, source.second, source.label, source.target) if name is not None]
    path = BUILTIN_DATA.get(source.source, Path(source.source).expanduser())
    if path.suffix == ".txt":
        found = ({source.field: piece} for piece in path.read_text("utf-8").split("\f"))
    else:
        from datasets import load_dataset

        if path.suffix in FILE_KINDS:
            kind, options = FILE_KINDS[path.suffix]
            found = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
            if seed is not None:
                found = list(found)
                random.Random(seed).shuffle(found)
        else:
            found = load_dataset(source.source, source.name, split=source.split, streaming=True)
            if seed is not None:
                found = found.shuffle(seed, buffer_size=BUFFER)
    for row in found:
        for name in wanted:
            if name not in row:
                raise ValueError(f"{source.source} has no field {name!r}; its fields are {', '.join(row)}")
        yield row


def _messages(value: list[dict], source: DataSource, tokenizer) -> list[dict]:
    if tokenizer.chat_template is None:
        raise ValueError(f"{source.source} holds chat messages, but the tokenizer has no chat template")
    if "role" in value[0]:
        return value
    if not {"from", "value"} <= set(value[0]):
        raise ValueError(
            f"field {source.field!r} of {source.source} holds messages of {', '.join(value[0])}, "
            "not of role, content or from, value"
        )
    return [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]


def with_labels(input_ids: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A packed sequence of tokens.

    Args:
        input_ids: [length]; starts: [length] bool, True at every document's first token. What a sequence begins with
            is a document of its own, whether or not it is the beginning of one.

    Returns:
        `input_ids`; `position_ids` [length], which start at 0 with every document; `labels` [length], the input ids
        except -100 at every document's first token, which nothing of the same document predicts.
    """
    index = torch.arange(len(input_ids))
    position_ids = index - torch.where(starts, index, 0).cummax(0).values
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": input_ids.masked_fill(position_ids == 0, -100),
    }


def pack(documents: Iterable[list[int]], length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sequences of `length` tokens, filled with one document after the other (see `with_labels`).

    A document that a sequence's end cuts goes on in the next sequence as a document of its own. What does not fill
    the last sequence is dropped.

    Raises:
        ValueError: there are fewer than `length` tokens in all.
    """
    ids, starts = [], []
    full = False
    for document in documents:
        begin = 0
        while begin < len(document):
            piece = document[begin : begin + length - len(ids)]
            begin += len(piece)
            ids += piece
            starts += [True] + [False] * (len(piece) - 1)
            if len(ids) == length:
                full = True
                yield with_labels(torch.tensor(ids), torch.tensor(starts))
                ids, starts = [], []
    if not full:
        raise ValueError(f"the data has {len(ids)} tokens, but one sequence needs {length}")


def in_turns(sources: Sequence[DataSource], tokenizer) -> Iterator[list[int]]:
    """Token ids of the documents of several sources, which take turns."""
    return turns([documents(source, tokenizer) for source in sources])


def turns(iterators: Sequence[Iterator[T]]) -> Iterator[T]:
    """One item of each, and again, until none has any left."""
    left = list(iterators)
    while left:
        for iterator in list(left):
            for item in islice(iterator, 1):
                yield item
                break
            else:
                left.remove(iterator)


class PackedDataset(Dataset):
    """The first `size` packed sequences of some sources; where there are fewer, they repeat in the same order.

    Item i is the same on every run, so training resumes exactly from an index. Documents of several sources take
    turns, and no more of them are read than the sequences need.

    Args:
        sources: where the documents come from.
        tokenizer: turns them into tokens.
        length: tokens per sequence.
        size: sequences asked for, e.g. steps * batch_size.

    Raises:
        ValueError: as in `documents` and `pack`.
    """

    def __init__(self, sources: Sequence[DataSource], tokenizer, length: int, size: int):
        self.sequences = list(islice(pack(in_turns(sources, tokenizer), length), size))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.sequences[index % len(self.sequences)]


@contextmanager
def problems_named(field: str, sources: Sequence[DataSource]) -> Iterator[None]:
    """What goes wrong with data inside is told by the recipe's `field`.

    Raises:
        StageError: the data cannot be read or are too few.
    """
    try:
        yield
    except (ValueError, OSError, TemplateError) as error:
        names = ", ".join(source.source for source in sources)
        text = first_line(error)
        raise StageError(f"{field}: {text if names in text else f'{names}: {text}'}") from error


def packed(field: str, sources: Sequence[DataSource], tokenizer, length: int, size: int) -> PackedDataset:
    """A `PackedDataset`, whose errors name the recipe's `field`.

    Raises:
        StageError: the data cannot be read or are too few.
    """
    with problems_named(field, sources):
        return PackedDataset(sources, tokenizer, length, size)


def token_stream(field: str, sources: Sequence[DataSource], tokenizer, tokens: int) -> torch.Tensor:
    """[L] the first `tokens` tokens, or all there are, of documents joined as they come (several sources take turns).

    Raises:
        StageError: naming the recipe's `field`, when the data cannot be read.
    """
    with problems_named(field, sources):
        return torch.tensor(list(islice(chain.from_iterable(in_turns(sources, tokenizer)), tokens)))


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids do not all have a row in the model's embedding.

    Raises:
        ValueError: the largest id is `vocab_size` or more.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > vocab_size:
        raise ValueError(f"tokenizer has {tokens} tokens but the model's embedding has {vocab_size} rows")
