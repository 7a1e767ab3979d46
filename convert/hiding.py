"""What is hidden of a text for a model to predict: single tokens, or spans."""

import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedConfig

from linearize.convert.data import ended
from linearize.convert.examples import with_answers
from linearize.convert.sources import SENTINEL, SENTINELS
from linearize.recipes.model import Head

# Share of tokens that are hidden, as BERT and T5 have it, and the mean length of spans, as T5 has it.
HIDDEN = 0.15
SPAN = 3

# Of a text [T] and what is drawn by: what the model reads, and `labels`.
Hiding = Callable[[Tensor, random.Random], dict[str, Tensor]]


def hiding(head: Head, tokenizer, config: PreTrainedConfig) -> Hiding | None:
    """How texts are hidden from a model that ends in `head`; None of one that reads them as they are."""
    if head == "masked-lm":
        return MaskedTokens(tokenizer)
    return HiddenSpans(tokenizer, config) if head == "seq2seq-lm" else None


class MaskedTokens:
    """15% of the tokens are to be predicted from what is on both sides: `labels` has those, -100 elsewhere. In their
    place, 80% are masked, 10% others (BERT's rule)."""

    def __init__(self, tokenizer):
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=HIDDEN)

    def __call__(self, ids: Tensor, choice: random.Random) -> dict[str, Tensor]:
        self.masking.generator = torch.Generator().manual_seed(choice.getrandbits(63))
        masked, labels = self.masking.torch_mask_tokens(ids[None].clone())
        return {"input_ids": masked[0], "position_ids": torch.arange(len(ids)), "labels": labels[0]}


class HiddenSpans:
    """15% of the tokens, in spans of 3 on average, give way to one sentinel each, and are to be written in order behind
    theirs (T5, arXiv 1910.10683, section 3.1.4).

    Raises:
        ValueError: the tokenizer has no sentinels.
    """

    def __init__(self, tokenizer, config: PreTrainedConfig):
        self.tokenizer, self.config = tokenizer, config
        vocabulary = tokenizer.get_vocab()
        names = [SENTINEL.format(number) for number in range(SENTINELS)]
        self.sentinels = [vocabulary[name] for name in names if name in vocabulary]
        if not self.sentinels:
            raise ValueError(
                f"spans of running text are hidden, for which this tokenizer has no {names[0]}; name a column with "
                "answers (target)"
            )

    def __call__(self, ids: Tensor, choice: random.Random) -> dict[str, Tensor]:
        length = len(ids)
        hidden = max(1, round(HIDDEN * length))
        spans = min(max(1, round(hidden / SPAN)), len(self.sentinels), length - hidden)

        def parts(total: int) -> list[int]:
            """Of so many tokens, as many parts as there are spans, none of them empty."""
            ends = [0, *sorted(choice.sample(range(1, total), spans - 1)), total]
            return [end - start for start, end in pairwise(ends)]

        read, labels, left = [], [], ids.tolist()
        for sentinel, shown, away in zip(self.sentinels, parts(length - hidden), parts(hidden), strict=False):
            read += [*left[:shown], sentinel]
            labels += [sentinel, *left[shown : shown + away]]
            left = left[shown + away :]
        answers = with_answers(torch.tensor([ended(labels, self.tokenizer)]), self.config)
        return {"input_ids": torch.tensor(ended(read, self.tokenizer))} | {name: x[0] for name, x in answers.items()}
