"""What is measured on a model, softmax or linear, short and long; every measure is a function from model to figures.

What it knows comes from `score`: how likely, and how clearly first choice, each token of some sequences is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from linearize.convert import probes
from linearize.convert.far_mass import divides_mass, far_mass
from linearize.convert.probes import Probe, doubling
from linearize.convert.speed import DECODED, RUNS, speed
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import rotary_embeddings
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.schema import LONGEST_AT_ONCE

# Longer sequences go through the model in pieces of this many tokens, with its cache between them.
PIECE = LONGEST_AT_ONCE
# Pieces of several sequences go through the model together up to so many tokens; a CPU gains nothing from more.
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
# The caches between them hold so many tokens: 8 GiB of a softmax model of 8B parameters.
CACHED_TOKENS = 65536
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PASSKEY_TRIALS = 10
FAR_TEXT = 256
RECALL_TRIALS = 8


@dataclass(frozen=True)
class Measure:
    """One measurement.

    Attributes:
        name, size: its place in the results, e.g. `passkey`, `4096`.
        tokens: that the model reads for it.
        run: figures of a model in evaluation mode, as JSON holds them.
    """

    name: str
    size: str
    tokens: int
    run: Callable[[nn.Module], dict]


@torch.no_grad()
def score(model: nn.Module, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token predictions of `model` for sequences [N, T], each at positions 0 .. T - 1.

    Returns:
        Negative log-likelihood (nats) of the tokens 1 .. T - 1, and whether each is the model's first choice:
        [N, T - 1], fp32 and bool, on the CPU.
    """
    device = next(model.parameters()).device
    length = sequences.shape[1]
    together = max(1, min(BATCH_TOKENS[device.type] // min(length, PIECE), CACHED_TOKENS // length))
    losses, hits = [], []
    for batch in sequences.split(together):
        batch = batch.to(device)
        cache = None
        batch_losses, batch_hits = [], []
        # The last token predicts nothing that is known.
        for start in range(0, length - 1, PIECE):
            ids = batch[:, start : start + PIECE]
            position = torch.arange(start, start + ids.shape[1], device=device).expand_as(ids)
            out = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=length > PIECE)
            cache = out.past_key_values
            labels = batch[:, start + 1 : start + PIECE + 1]
            logits = out.logits[:, : labels.shape[1]]
            # Row by row: fp32 copies of all logits would be the largest tensors of all.
            rows = zip(logits, labels, strict=True)
            batch_losses.append(
                torch.stack([nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in rows])
            )
            batch_hits.append(logits.argmax(-1) == labels)
        losses.append(torch.cat(batch_losses, dim=1).cpu())
        hits.append(torch.cat(batch_hits, dim=1).cpu())
    return torch.cat(losses), torch.cat(hits)


def perplexity(losses: Tensor) -> float | None:
    """exp of the mean of negative log-likelihoods; None of no tokens."""
    return losses.double().mean().exp().item() if losses.numel() else None


def accuracy(hits: Tensor) -> float:
    """The share of what is true."""
    return hits.double().mean().item()


def text(model: nn.Module, windows: Tensor, reach: int) -> dict:
    """Perplexities of held-out windows [N, T].

    Args:
        reach: how far back a window of the attention goes (`LinearAttentionConfig.reach`).

    Returns:
        `perplexity` of all tokens; `by_position`: of those at positions in each range, `"64-128"` without 128;
        `far_repeats` and `other_tokens`: of those that `probes.far_repeats` finds and of the rest; `far_share`: of
        far repeats among all.
    """
    losses, _ = score(model, windows)
    far = torch.stack([probes.far_repeats(window, reach) for window in windows.tolist()])[:, 1:]
    return {
        "perplexity": perplexity(losses),
        "by_position": {
            # Column i is the token at position i + 1.
            f"{low}-{high}": perplexity(losses[:, max(low - 1, 0) : high - 1])
            for low, high in doubling(windows.shape[1])
        },
        "far_repeats": perplexity(losses[far]),
        "other_tokens": perplexity(losses[~far]),
        "far_share": accuracy(far),
    }


def answers(model: nn.Module, asking: list[Probe]) -> list[tuple[Tensor, Tensor]]:
    """Per probe (negative log-likelihoods, first choices) of the tokens asked for, [n] each; all of one length."""
    losses, hits = score(model, torch.stack([probe.ids for probe in asking]))
    return [(losses[i, probe.asked - 1], hits[i, probe.asked - 1]) for i, probe in enumerate(asking)]


def copying(model: nn.Module, asking: list[Probe]) -> dict:
    """`accuracy` and `perplexity` of tokens that stood in the same order before (`probes.copies`)."""
    losses, hits = (torch.cat(parts) for parts in zip(*answers(model, asking), strict=True))
    return {"accuracy": accuracy(hits), "perplexity": perplexity(losses)}


def passkey(model: nn.Module, asking: dict[str, list[Probe]]) -> dict:
    """The share of pass keys that greedy decoding gives back: `accuracy`, and `by_depth`; `perplexity` of their tokens.

    Greedy decoding gives the key exactly where each of its tokens is first choice after the ones before.

    Args:
        asking: depth -> probes (`probes.passkey`), all of one length.
    """
    losses, hits = zip(*answers(model, sum(asking.values(), [])), strict=True)
    right = iter(torch.stack([given.all() for given in hits]))
    by_depth = {depth: torch.stack([next(right) for _ in trials]) for depth, trials in asking.items()}
    return {
        "accuracy": accuracy(torch.cat(list(by_depth.values()))),
        "by_depth": {depth: accuracy(hits) for depth, hits in by_depth.items()},
        "perplexity": perplexity(torch.cat(losses)),
    }


def recall(model: nn.Module, asking: list[Probe]) -> dict:
    """The share of values that are first choice after their key (`probes.recall`): `accuracy`, and `by_distance` in
    tokens between the pair and the question, `"64-128"` without 128."""
    hits = torch.cat([hits for _, hits in answers(model, asking)])
    distance = torch.cat([probe.distance for probe in asking])
    ranges = {f"{low}-{high}": (distance >= low) & (distance < high) for low, high in doubling(distance.max() + 1)}
    return {
        "accuracy": accuracy(hits),
        "by_distance": {name: accuracy(hits[inside]) for name, inside in ranges.items() if inside.any()},
    }


def position_limit(model: nn.Module) -> int | None:
    """How long a sequence `model` can read at all; None where its positions are rotations, which go on for ever."""
    if rotary_embeddings(model):
        return None
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def make_measures(
    section: EvaluateSection,
    stream: Tensor,
    tokenizer,
    config: LinearAttentionConfig | None,
    positions: int | None = None,
) -> list[Measure]:
    """The measurements of a recipe's section; the first is the held-out text at its first length.

    Args:
        stream: [L] held-out tokens.
        config: of the linear layers: what is beyond their window, and whether their `far_mass` can be measured. None:
            there are none; what is beyond the published baseline's window is told.
        positions: the model's `position_limit`.

    Raises:
        ValueError: naming the field of the section that asks for what the model or the held-out text cannot give.
    """
    config = config or PRESETS["swa"]
    measures = []

    def add(name: str, size: int, function: Callable, count: int, length: int) -> None:
        if positions is not None and length > positions:
            raise ValueError(f"{length} tokens are more than the {positions} positions that the model has")
        measures.append(Measure(name, str(size), count * length, function))

    for length in section.lengths:
        with _naming("lengths"):
            windows = probes.windows(stream, length)
            add("text", length, partial(text, windows=windows, reach=config.reach), *windows.shape)
    if section.copying is not None:
        with _naming("copying"):
            length = section.copying.length
            told = probes.copies(stream, section.copying.texts, length)
            add("copying", length, partial(copying, asking=told), len(told), 2 * length)
    for length in section.passkey:
        with _naming("passkey"):
            hidden = {
                str(depth): [
                    probes.passkey(tokenizer, stream, length, depth, seed=len(DEPTHS) * trial + i)
                    for trial in range(PASSKEY_TRIALS)
                ]
                for i, depth in enumerate(DEPTHS)
            }
            add("passkey", length, partial(passkey, asking=hidden), len(DEPTHS) * PASSKEY_TRIALS, length)
    words = probes.words_of(tokenizer, stream) if section.recall else []
    for pairs in section.recall:
        with _naming("recall"):
            lists = [probes.recall(tokenizer, words, pairs, seed) for seed in range(RECALL_TRIALS)]
            add("recall", pairs, partial(recall, asking=lists), RECALL_TRIALS, len(lists[0].ids))
    for length in section.speed:
        with _naming("speed"):
            # Which tokens it reads makes no difference.
            context = stream.repeat(-(-length // len(stream)))[:length]
            add("speed", length, partial(speed, ids=context), RUNS, length + DECODED)
    far_text = stream[: max(section.lengths)][: max(FAR_TEXT, 2 * config.reach)]
    if divides_mass(config) and len(far_text) > config.reach + config.sinks + 1:
        add("far_mass", len(far_text), partial(far_mass, ids=far_text, config=config), 1, len(far_text))
    return measures


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
