"""How fast a model reads a text and goes on with it, and what it remembers then: what `generate` does for one user."""

import statistics
import time

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from linearize.convert.models import merged

# Tokens that are written after the first.
DECODED = 16
REPEATS = 3
# How often a context is read, the first time for its cache alone; that also warms up, but for the graphs of a GPU.
RUNS = 1 + REPEATS


class Clock(BaseStreamer):
    """When `generate` begins to read, and when each token is there; it hands on tokens that it has waited for."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def cache_bytes(cache: Cache) -> int:
    """What a cache has in memory: a linearized model's by its own count, of others all tensors of its layers."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor))


def speed(model: nn.Module, ids: Tensor) -> dict:
    """Greedy decoding after the context `ids` [T], one sequence; adapters are merged, as an export has them.

    Returns:
        `prefill_seconds` until the first token, `decode_seconds` for each further one, medians over `REPEATS`;
        `cache_bytes` after the context.
    """
    ids = ids[None].to(next(model.parameters()).device)
    # The model's own may end a text, or sample.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with merged(model):
            remembered = cache_bytes(_generate(model, ids, 1, Clock()))
            prefill, decode = [], []
            if ids.is_cuda:
                # Steps behind this context are captured.
                _generate(model, ids, 1 + DECODED, Clock())
            for _ in range(REPEATS):
                clock = Clock()
                _generate(model, ids, 1 + DECODED, clock)
                began, first, *_, last = clock.times
                prefill.append(first - began)
                decode.append((last - first) / DECODED)
    finally:
        model.generation_config = own
    return {
        "prefill_seconds": statistics.median(prefill),
        "decode_seconds": statistics.median(decode),
        "cache_bytes": remembered,
    }


def _generate(model: nn.Module, ids: Tensor, new_tokens: int, clock: Clock) -> Cache:
    if ids.is_cuda:
        torch.cuda.synchronize()
    out = type(model).generate(
        model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, streamer=clock,
    )  # fmt: skip
    return out.past_key_values
