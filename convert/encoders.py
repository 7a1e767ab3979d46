"""What is different where a model is an encoder: how it reads a piece of text, and what it is measured by."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from linearize.convert import probes
from linearize.convert.measures import Measure
from linearize.recipes.evaluation import EvaluateSection

# Tokens that go through the model together.
AT_ONCE = 8192


def edges(tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts around a text, such as [CLS] and [SEP]."""
    around = tokenizer("")["input_ids"]
    before = len(around) // 2
    return around[:before], around[before:]


def framed(ids: Tensor, around: tuple[list[int], list[int]]) -> Tensor:
    """[B, T] pieces of a longer text as whole ones: what stands at their ends gives way to `edges`."""
    ids, (before, behind) = ids.clone(), around
    ids[:, : len(before)] = ids.new_tensor(before)
    ids[:, ids.shape[1] - len(behind) :] = ids.new_tensor(behind)
    return ids


@torch.no_grad()
def embed(model: nn.Module, rows: Tensor) -> Tensor:
    """[N, C] mean hidden states, fp32, on the CPU, of texts [N, T] without padding: what sentence-transformers calls
    mean pooling."""
    device = next(model.parameters()).device
    parts = rows.split(max(1, AT_ONCE // rows.shape[1]))
    return torch.cat([model(input_ids=part.to(device)).last_hidden_state.float().mean(1).cpu() for part in parts])


def embedding(model: nn.Module, rows: Tensor, teacher: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Cosines between a model's `embed` and its teacher's of the same texts: their `mean`, and the `p5` below which one
    in twenty is."""
    cosines = nn.functional.cosine_similarity(embed(model, rows), teacher(rows), dim=-1)
    return {"mean": cosines.mean().item(), "p5": cosines.quantile(0.05).item()}


def encoder_measures(
    section: EvaluateSection, stream: Tensor, around: tuple[list[int], list[int]], positions: int | None,
    teacher: Callable[[Tensor], Tensor],
) -> list[Measure]:  # fmt: skip
    """The measurements of an encoder that a recipe's section asks for.

    Args:
        stream: [L] held-out tokens.
        positions: that the model has, None for any number.
        teacher: gives its `embed` of texts.

    Raises:
        ValueError: naming the field that asks for what the model or the held-out text cannot give.
    """
    measures = []
    for length in section.lengths:
        if positions is not None and length > positions:
            raise ValueError(f"lengths: {length} tokens are more than the {positions} positions that the model has")
        try:
            rows = framed(probes.windows(stream, length), around)
        except ValueError as error:
            raise ValueError(f"lengths: {error}") from error
        run = partial(embedding, rows=rows, teacher=teacher)
        measures.append(Measure("embedding", str(length), rows.numel(), run))
    return measures
