"""What is measured of models that learn from examples: how many texts are put in the right class, or how near answers
come to those of people."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from linearize.convert.context import Context
from linearize.convert.examples import IGNORED, collated, read_examples
from linearize.convert.measures import BATCH_TOKENS, Measure, accuracy, perplexity

ROUGE = ("rouge1", "rouge2", "rougeL")
# One example: token ids of a text, and of its answer or its class.
Examples = Sequence[tuple[list[int], list[int] | int]]


def _batches(model: nn.Module, some: Examples) -> Iterator[dict[str, Tensor]]:
    """On the model's device; examples of like lengths go together, so their order is another one."""
    device = next(model.parameters()).device
    ordered = sorted(some, key=lambda example: len(example[0]))
    rows = max(1, BATCH_TOKENS[device.type] // len(ordered[-1][0]))
    for start in range(0, len(ordered), rows):
        batch = collated(ordered[start : start + rows], model.config)
        yield {name: x.to(device) for name, x in batch.items()}


@torch.no_grad()
def classes(model: nn.Module, some: Examples) -> dict[str, float]:
    """`accuracy`, the share of texts that are put in their class, and `loss`, the mean negative log-likelihood of these
    (nats)."""
    losses, hits = [], []
    for batch in _batches(model, some):
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").cpu())
        hits.append((logits.argmax(-1) == labels).cpu())
    return {"accuracy": accuracy(torch.cat(hits)), "loss": torch.cat(losses).double().mean().item()}


@torch.no_grad()
def answers(model: nn.Module, some: Examples) -> dict[str, float]:
    """`perplexity` of the answers that people gave."""
    losses = []
    for batch in _batches(model, some):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits.float()
        told = nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        losses.append(told[labels != IGNORED].cpu())
    return {"perplexity": perplexity(torch.cat(losses))}


@torch.no_grad()
def rouge(model: nn.Module, some: Examples, tokenizer, length: int) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F1, stemmed words; Lin 2004), means over answers that the model gives greedily, of up to
    `length` tokens, beside those that people gave."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, found = RougeScorer(ROUGE, use_stemmer=True), []
    for batch in _batches(model, some):
        given = batch["labels"].masked_fill(batch["labels"] == IGNORED, model.config.pad_token_id)
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_start_token_id=model.config.decoder_start_token_id,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (given, written))
        found += [scorer.score(expected, answer) for expected, answer in zip(*texts, strict=True)]
    return {name: sum(score[name].fmeasure for score in found) / len(found) for name in ROUGE}


def example_measures(context: Context) -> list[Measure]:
    """The measurements of a model that learns from examples, on the recipe's held-out ones.

    Raises:
        StageError: these cannot be read.
    """
    recipe, tokenizer, length = context.recipe, context.tokenizer, max(context.recipe.evaluate.lengths)
    some = read_examples(
        "data.heldout", recipe.data, tokenizer, length, context.labels, recipe.evaluate.examples
    )
    tokens, limit = sum(len(ids) for ids, _ in some), recipe.data.answer_length
    if context.labels is not None:
        return [Measure("classes", str(length), tokens, partial(classes, some=some))]
    writing = partial(rouge, some=some, tokenizer=tokenizer, length=limit)
    return [
        Measure("answers", str(length), tokens, partial(answers, some=some)),
        Measure("rouge", str(length), len(some) * limit, writing),
    ]
