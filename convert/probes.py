"""Sequences that ask for what was told before, made of a stream of held-out tokens; no model is needed here."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Probe:
    """A sequence with tokens that follow from what it said before.

    Attributes:
        ids: [T] tokens.
        asked: [n] indices of the tokens to be known, none of them the first.
        distance: [n] how many tokens before each of these it was told last.
    """

    ids: Tensor
    asked: Tensor
    distance: Tensor


def windows(stream: Tensor, length: int) -> Tensor:
    """[N, length] the non-overlapping windows that a stream [L] fills.

    Raises:
        ValueError: it does not fill one.
    """
    if len(stream) < length:
        raise ValueError(f"{length} tokens are more than the {len(stream)} held-out tokens")
    return stream[: len(stream) // length * length].view(-1, length)


def copies(stream: Tensor, texts: int, length: int) -> list[Probe]:
    """Texts of `length` tokens, each said twice; asked is the second time, but for its first token, which nothing
    announces.

    Raises:
        ValueError: the stream has fewer than texts * length tokens.
    """
    if len(stream) < texts * length:
        raise ValueError(f"{texts} texts of {length} tokens are more than the {len(stream)} held-out tokens")
    asked = torch.arange(length + 1, 2 * length)
    return [Probe(text.repeat(2), asked, torch.full_like(asked, length)) for text in windows(stream, length)[:texts]]


def passkey(tokenizer, stream: Tensor, length: int, depth: float, seed: int) -> Probe:
    """A pass key of five digits (Mohtashami & Jaggi, arXiv 2305.16300), told in `length` tokens of held-out text and
    asked for at their end.

    Args:
        depth: where it is told, as a share of the text: 0 at the beginning, 1 at the end.
        seed: of the digits and of the place in the stream where the text begins.

    Raises:
        ValueError: `length` does not hold the sentences, or the stream does not fill it.
    """
    draw = random.Random(seed)
    key = str(draw.randrange(10**4, 10**5))
    start = _start(tokenizer)
    needle = _encode(tokenizer, NEEDLE.format(key=key))
    question = _encode(tokenizer, QUESTION)
    asking = _encode(tokenizer, f"{QUESTION} {key}")
    # A tokenizer may join the answer's beginning with the question's end.
    told = next((i for i, (a, b) in enumerate(zip(question, asking, strict=False)) if a != b), len(question))
    filler = length - len(start) - len(needle) - len(asking)
    if filler < 0:
        raise ValueError(f"{length} tokens do not hold the {length - filler} of the pass key and its question")
    if filler > len(stream):
        raise ValueError(f"{length} tokens are more than the {len(stream)} held-out tokens fill")
    offset = draw.randrange(len(stream) - filler + 1)
    text = stream[offset : offset + filler].tolist()
    before = round(depth * filler)
    ids = torch.tensor([*start, *text[:before], *needle, *text[before:], *asking])
    asked = torch.arange(length - len(asking) + told, length)
    return Probe(ids, asked, asked - (len(start) + before))


def recall(tokenizer, words: list[int], pairs: int, seed: int) -> Probe:
    """Multi-query associative recall (Arora et al., arXiv 2312.04927): lines `key: value`, given three times, each time
    in another order; asked are the values of the third time, told last in the second.

    The first repetition shows that lines come again, so that not knowing this costs nothing.

    Args:
        words: tokens from which keys and values are drawn, all distinct (`words_of`).

    Raises:
        ValueError: there are too few words.
    """
    if len(words) < 2 * pairs:
        raise ValueError(f"{pairs} pairs need {2 * pairs} words of one token, the held-out text has {len(words)}")
    draw = random.Random(seed)
    chosen = draw.sample(words, 2 * pairs)
    colon, newline = _encode(tokenizer, ":"), _encode(tokenizer, "\n")
    lines = [[key, *colon, value, *newline] for key, value in zip(chosen[::2], chosen[1::2], strict=True)]
    first, second, third = (draw.sample(range(pairs), pairs) for _ in range(3))
    start = _start(tokenizer)
    ids = torch.tensor(start + sum((lines[pair] for pair in first + second + third), []))
    # The line of the second time that told what the i-th line of the third time asks.
    told = torch.tensor([second.index(pair) for pair in third])
    index = torch.arange(pairs)
    size = len(lines[0])
    asked = len(start) + 1 + len(colon) + (2 * pairs + index) * size
    return Probe(ids, asked, (pairs + index - told) * size)


def words_of(tokenizer, stream: Tensor) -> list[int]:
    """The tokens of a stream that are whole words of three letters or more, each once."""
    colon = _encode(tokenizer, ":")

    def is_word(token: int) -> bool:
        text = tokenizer.decode([token]).strip()
        return len(text) > 2 and text.isalpha() and _encode(tokenizer, f": {text}") == [*colon, token]

    special = set(tokenizer.all_special_ids)
    return [token for token in dict.fromkeys(stream.tolist()) if token not in special and is_word(token)]


def far_repeats(ids: list[int], reach: int) -> Tensor:
    """[T] bool, whether a token ends a 3-gram that the sequence has held before, the last time out of reach: more
    than `reach` tokens before the token from which it is predicted."""
    latest: dict[tuple[int, ...], int] = {}
    far = torch.zeros(len(ids), dtype=torch.bool)
    for index in range(2, len(ids)):
        gram = tuple(ids[index - 2 : index + 1])
        far[index] = gram in latest and index - 1 - latest[gram] > reach
        latest[gram] = index
    return far


def doubling(end: int, first: int = 64) -> Iterator[tuple[int, int]]:
    """Ranges (0, 64), (64, 128), (128, 256), ... up to the one that holds `end` - 1."""
    low, high = 0, first
    while low < end:
        yield low, high
        low, high = high, 2 * high


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _start(tokenizer) -> list[int]:
    """The bos token, where the tokenizer itself puts it in front of a text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
