"""Finetuning on longer sequences than the model knows makes it one that knows them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .runs import converted

LONGER = {"steps": 1, "batch_size": 1, "length": 1024, "chunk": 256}


@pytest.fixture
def short_model(tiny_model, tmp_path):
    """Of 512 positions, to which its tokenizer cuts texts."""
    path = tmp_path / "short"
    shutil.copytree(tiny_model, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    return path


def exported(linearize, path, run):
    converted(linearize, path)
    tokenizer = AutoTokenizer.from_pretrained(run / "export" / "model", trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True).eval(), tokenizer


def test_finetuned_on_longer_sequences(linearize, recipe, short_model, tmp_path):
    attention = {"preset": "augmented", "window_size": 16, "sinks": 0, "sink_distance": None, "slack": 8}
    path = recipe(
        model={"source": str(short_model)}, attention=attention, finetune=LONGER, transfer=None, evaluate=None,
        medusa={"steps": 1, "batch_size": 1, "length": 1024, "heads": 1},
    )  # fmt: skip
    model, tokenizer = exported(linearize, path, tmp_path / "run")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 1024
    # Without sinks, nothing depends on where a text stands: no position is one that is not known.
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        # Everything takes part, and scores are no longer all alike.
        parameter.data += ("linear_attention" in name) * 0.3 * torch.rand(parameter.shape, generator=generator)
        parameter.data *= 10 if "_proj" in name else 1
    ids, positions = torch.randint(0, 256, (1, 1024), generator=generator), torch.arange(1024)[None]
    with torch.no_grad():
        logits, moved = (model(ids, position_ids=x, use_cache=False).logits for x in (positions, positions + 5000))
    # Angles of thousands have 2^-12 for a last place. Feature maps of rotated keys would change logits by 1e-1.
    torch.testing.assert_close(moved, logits, rtol=0, atol=1e-4)


def test_finetuned_on_what_it_knows(linearize, recipe, short_model, tmp_path):
    sections = {"transfer": None, "evaluate": None, "medusa": None}
    path = recipe(model={"source": str(short_model)}, finetune=LONGER | {"length": 256}, **sections)
    model, tokenizer = exported(linearize, path, tmp_path / "run")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
