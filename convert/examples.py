"""Examples: texts of which each has something of its own to be learned, a class or an answer."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from linearize.convert import sources
from linearize.convert.batches import draws
from linearize.convert.data import ended, problems_named, rows, turns
from linearize.recipes.corpora import DataSection, DataSource
from linearize.recipes.schema import Recipe
from linearize.recipes.training import Training

# Batches are padded to a multiple of so many tokens.
MULTIPLE = 8
# Of what no loss is taken.
IGNORED = -100


class Labels:
    """Names of classes, in the order of the model's outputs."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)

    def __call__(self, value: str | int, source: DataSource) -> int:
        """The class of a row whose label is `value`, a name, or a number that counts from 0.

        Raises:
            ValueError: it is none of them.
        """
        if str(value) in self.names:
            return self.names.index(str(value))
        if isinstance(value, int) and 0 <= value < len(self.names):
            return value
        raise ValueError(
            f"field {source.label!r} of {source.source} holds {value!r}, which is none of the model's classes "
            f"({', '.join(self.names)}); name them in model.labels"
        )


def class_names(recipe: Recipe) -> list[str] | None:
    """What the recipe's model is to tell, in the order of its outputs: named by the recipe, by a model that has been
    trained to tell some, or found in the training data; None of a model that tells no classes.

    Raises:
        ValueError: the recipe names others than the model has been trained for, or the data have fewer than two.
    """
    model, data = recipe.model, recipe.data.train
    if model.head != "sequence-classification":
        return None
    config = None if model.config else sources.load_config(sources.locate(model.source, model.revision))
    trained = config and sources.trained_classes(config)
    if trained and model.labels and len(trained) != len(model.labels):
        raise ValueError(
            f"model.labels: names {len(model.labels)} classes, but the model has been trained to tell {len(trained)}"
        )
    if model.labels or trained:
        return model.labels or trained
    with problems_named("data.train", data):
        names = {str(row[source.label]) for source in data for row in rows(source)}
        if len(names) < 2:
            raise ValueError(f"{data[0].source} has one class alone; a model is to tell two or more")
    return sorted(names)


def text_ids(first: str, second: str | None, tokenizer, length: int) -> list[int]:
    """Token ids of a text, or of two, cut to `length`: as the tokenizer puts them together, or, where it puts nothing
    around them, each with its eos token behind it."""
    if tokenizer("")["input_ids"]:
        return tokenizer(first, second, truncation=True, max_length=length)["input_ids"]
    parts = [tokenizer(text, verbose=False)["input_ids"] for text in (first, second) if text is not None]
    # The longest is cut first, and an end stays an end.
    while sum(map(len, parts)) > length - len(parts):
        max(parts, key=len).pop()
    return [token for part in parts for token in ended(part, tokenizer)]


def answer_ids(text: str, tokenizer, length: int) -> list[int]:
    """Token ids of an answer, cut to `length`, its end included."""
    return ended(tokenizer(text_target=text, verbose=False)["input_ids"][: length - 1], tokenizer)


def examples(
    source: DataSource, tokenizer, length: int, answer_length: int, labels: Labels | None, seed: int
) -> Iterator[tuple[list[int], list[int] | int]]:
    """(token ids of the text, those of its answer or its class) of each row whose text is not blank, in an
    order drawn by `seed`.

    Raises:
        ValueError: a value is no text, a label no class of the model, or there are no examples.
    """
    empty = True
    for row in rows(source, seed):
        texts = [row[name] for name in (source.field, source.second, source.target) if name is not None]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{source.source} holds {type(text).__name__} where texts are looked for")
        if not texts[0].strip():
            continue
        empty = False
        second = None if source.second is None else row[source.second]
        ids = text_ids(row[source.field], second, tokenizer, length)
        if source.label is not None:
            yield ids, labels(row[source.label], source)
        else:
            yield ids, answer_ids(row[source.target], tokenizer, answer_length)
    if empty:
        raise ValueError(f"{source.source} has no examples")


def read_examples(
    field: str, data: DataSection, tokenizer, length: int, labels: Labels | None, count: int, seed: int = 0
) -> list[tuple[list[int], list[int] | int]]:
    """`count` examples, or all there are, of the recipe's `field`, whose sources take turns, drawn by `seed`.

    Raises:
        StageError: naming the field, when they cannot be read.
    """
    given = getattr(data, field.rpartition(".")[2])
    drawn = [examples(source, tokenizer, length, data.answer_length, labels, seed) for source in given]
    with problems_named(field, given):
        return list(islice(turns(drawn), count))


def padded(parts: Sequence[Sequence[int]], value: int) -> Tensor:
    """[N, T] with `value` behind those that are shorter."""
    length = -(-max(map(len, parts)) // MULTIPLE) * MULTIPLE
    return torch.tensor([[*part, *[value] * (length - len(part))] for part in parts])


def collated(some: Sequence[tuple[list[int], list[int] | int]], config: PreTrainedConfig) -> dict[str, Tensor]:
    """A batch of examples.

    Args:
        config: of the model, which knows the token that pads, and what answers begin with.

    Returns:
        `input_ids` and `attention_mask` [N, T]; `labels` [N], classes; or `labels` [N, A] of the answers, `IGNORED`
        behind them, and `decoder_input_ids` [N, A], what the decoder reads to predict them.
    """
    texts, learned = zip(*some, strict=True)
    batch = {
        "input_ids": padded(texts, config.pad_token_id),
        "attention_mask": padded([[1] * len(ids) for ids in texts], 0),
    }
    if isinstance(learned[0], int):
        return batch | {"labels": torch.tensor(learned)}
    return batch | with_answers(padded(learned, IGNORED), config)


def with_answers(labels: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
    """`labels` [N, A] with what a decoder reads to predict them."""
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    before = torch.cat([start, labels[:, :-1]], dim=1)
    return {"decoder_input_ids": before.masked_fill(before == IGNORED, config.pad_token_id), "labels": labels}


class ExampleBatches(Dataset):
    """The micro batches of a stage, in order: item i is the same on every run, so training resumes exactly.

    Every example is read once before any is read again, each time in another order. Items are as `collated` has them.
    """

    def __init__(
        self, some: Sequence[tuple[list[int], list[int] | int]], section: Training, seed: int, config: PreTrainedConfig
    ):
        self.examples, self.seed, self.config = some, seed, config
        self.rows = section.micro_batch_size or section.batch_size
        self.count = section.steps * section.batch_size // self.rows
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return collated([self._example(index * self.rows + row) for row in range(self.rows)], self.config)

    def _example(self, number: int) -> tuple[list[int], list[int] | int]:
        epoch, place = divmod(number, len(self.examples))
        if self._order[0] != epoch:
            count = len(self.examples)
            self._order = epoch, draws(self.seed, "examples", epoch).sample(range(count), count)
        return self.examples[self._order[1][place]]
