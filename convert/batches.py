"""What a training stage reads at each step: whole micro batches, each a function of the seed and its number alone."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize.convert.context import StageError
from linearize.convert.data import with_labels
from linearize.convert.facts import plant_facts
from linearize.recipes.training import Training

# Parts of a sequence that are repeated further on, and the tokens of the shortest.
REPEATED_PARTS = 4
SHORTEST_PART = 16


def draws(seed: int, purpose: str, index: int) -> random.Random:
    """Random numbers that do not depend on what was drawn before, so that a resumed run draws the same."""
    return random.Random(f"{seed} {purpose} {index}")


def repeat_parts(input_ids: Tensor, choice: random.Random) -> Tensor:
    """[length]: the text with parts of it, 16 tokens to half of the length, written again further on.

    Natural text rarely asks for what was said long ago. Here the second time can be told word for word by whoever
    recalls the first, which is at least an eighth of the sequence away. Long parts ask for that; short ones, as many
    octave by octave, for recognising it by few tokens.
    """
    length = len(input_ids)
    repeated = input_ids.clone()
    longest = max(1, length // 2)
    for _ in range(REPEATED_PARTS):
        size = round(math.exp(choice.uniform(math.log(min(SHORTEST_PART, longest)), math.log(longest))))
        distance = max(size, length // 8)
        source, target = sorted(choice.randint(0, length - size - distance) for _ in range(2))
        target += distance
        repeated[target : target + size] = repeated[source : source + size]
    return repeated


def read_evenly(sources: Sequence[Iterator[Tensor]], tokens: int) -> list[Tensor]:
    """Whole documents of `tokens` tokens in all: an equal share of each source, more of the others where one has less.

    The next document comes from the source of which the fewest tokens were read, so a source whose documents are long
    does not crowd out the rest.
    """
    documents, read, left = [], [0] * len(sources), list(range(len(sources)))
    while left:
        behind = min(left, key=read.__getitem__)
        if sum(read) >= tokens and read[behind] * len(sources) >= tokens:
            break
        document = next(sources[behind], None)
        if document is None:
            left.remove(behind)
        else:
            documents.append(document)
            read[behind] += len(document)
    return documents


def shared(stage: str, section: Training, count: int) -> Training:
    """What each of so many processes does of a stage: its part of the sequences of each step, in passes that are no
    larger than `section` says.

    Raises:
        StageError: the sequences of a step, or of a phase, cannot be shared out.
    """
    if count == 1:
        return section
    if section.batch_size % count:
        raise StageError(
            f"{stage}.batch_size: {count} processes cannot share the {section.batch_size} sequences of a step; use a "
            f"multiple of {count}"
        )
    part = section.batch_size // count
    section = section.model_copy(update={"micro_batch_size": math.gcd(section.micro_batch_size or part, part)})
    for _, length in section.phases:
        if section.tokens_per_pass % length:
            raise StageError(
                f"{stage}.curriculum: sequences of {length} do not fill the {section.tokens_per_pass} tokens that each "
                f"of {count} processes takes at once; use a larger batch_size, or fewer processes"
            )
    return section


class TrainingBatches(Dataset):
    """The micro batches of a stage, in order: item i is the same on every run, so training resumes exactly.

    Sequences are cut from the documents one after the other (see `data.pack`), of the length of the longest phase,
    and shuffled: a book would otherwise be read from cover to cover, and a stage that needs less would not get to the
    last one. Shorter phases cut them further. Where there are too few tokens, they repeat.

    Items have `input_ids`, `position_ids` and `labels`, each [sequences, length], or what `hide` makes of the tokens.

    Args:
        sources: token ids of each source's documents; no more of them are read than the stage needs.
        section: of the stage.
        seed: of the order, recall, facts and position offsets.
        tokenizer: writes the facts, if `section.facts`.
        hide: what of a sequence is to be predicted (`hiding.Hiding`). It is read as one, whatever documents are in it
            (RoBERTa's FULL-SENTENCES). None: every token, from those of its document before it.

    Raises:
        ValueError: there are fewer tokens than one sequence needs.
    """

    def __init__(
        self, sources: Sequence[Iterator[Tensor]], section: Training, seed: int, tokenizer=None,
        hide: Callable[[Tensor, random.Random], dict[str, Tensor]] | None = None,
    ):  # fmt: skip
        self.section, self.seed, self.tokenizer, self.hide = section, seed, tokenizer, hide
        passes_per_step = section.batch_size * section.length // section.tokens_per_pass
        self.ends = [steps * passes_per_step for steps in accumulate(steps for steps, _ in section.phases)]
        documents = read_evenly(sources, self.ends[-1] * section.tokens_per_pass)
        total, longest = sum(map(len, documents)), section.longest
        if total < longest:
            raise ValueError(f"the data has {total} tokens, but one sequence needs {longest}")
        count = total // longest
        order = draws(seed, "order", 0).sample(range(count), count)

        def shuffled(x: Tensor) -> Tensor:
            return x[: count * longest].view(count, longest)[order].flatten()

        starts = torch.zeros(total, dtype=torch.bool)
        starts[[0, *accumulate(map(len, documents[:-1]))]] = True
        starts[::longest] = True
        self.ids = shuffled(torch.cat(documents))
        self.starts = shuffled(starts)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        phase = next(i for i, end in enumerate(self.ends) if index < end)
        _, length = self.section.phases[phase]
        begin, end = index * self.section.tokens_per_pass, (index + 1) * self.section.tokens_per_pass
        sequences = [self._sequence(place, length) for place in range(begin, end, length)]
        return {name: torch.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}

    def _sequence(self, place: int, length: int) -> dict[str, Tensor]:
        """The sequence of `length` tokens that has `place` tokens before it in the stage."""
        begin = place % (len(self.ids) // length * length)
        input_ids, starts = self.ids[begin : begin + length], self.starts[begin : begin + length]
        choice = draws(self.seed, "recall", place)
        if choice.random() < self.section.recall:
            # One document, or its beginning could not be recalled from its end.
            input_ids, starts = repeat_parts(input_ids, choice), torch.zeros_like(starts)
        choice = draws(self.seed, "facts", place)
        if choice.random() < self.section.facts:
            # Last, so that what is repeated breaks off no fact.
            input_ids, starts = plant_facts(input_ids, choice, self.tokenizer), torch.zeros_like(starts)
        if self.hide is not None:
            return self.hide(input_ids, draws(self.seed, "masked", place))
        sequence = with_labels(input_ids, starts)
        offset = draws(self.seed, "position_offset", place).randint(0, self.section.position_offset)
        sequence["position_ids"] = sequence["position_ids"] + offset
        return sequence
