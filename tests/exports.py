"""Small exported models with weights in every branch; tests import this file."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.hub.export import export_model
from linearize.layers.config import LinearAttentionConfig
from linearize.layers.medusa import MedusaHeads
from linearize.layers.seam import install

from .test_families import CONFIG, randomize

# Both kinds of heads: layer -> key heads that stay softmax.
KEPT = {1: (0,)}
# Texts have as many tokens as they are asked for.
GREEDY = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 1}
TREE = {"tree": [[0], [1], [0, 0]], "nodes": {"1": 4}}


def export_tiny(
    source: Path, directory: Path, seed: int = 0, config: LinearAttentionConfig = CONFIG, **options
) -> Path:
    """`source` with linear attention, kept heads, draft heads and its tokenizer, as an exported directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    randomize(install(model, config, KEPT), seed)
    heads = MedusaHeads(model.get_output_embeddings(), 2, "shared", sequential=True)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = AutoTokenizer.from_pretrained(source, pad_token="<eos>")
    export_model(model, directory, tokenizer=tokenizer, draft=(heads, TREE), **options)
    return directory


def load(directory: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def some_ids(*shape, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 240, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def behaviour(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the texts that plain and speculative decoding write."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    texts = [model.generate(**given), model.generate(**given, custom_generate=model.speculate)]
    return [model(ids, use_cache=False).logits, *texts]


def assert_same_behaviour(model, expected: list[torch.Tensor], ids: torch.Tensor) -> None:
    found = behaviour(model, ids)
    # The same sums, in the same order.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert [text.tolist() for text in found[1:]] == [text.tolist() for text in expected[1:]]
