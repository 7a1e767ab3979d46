"""Keeping heads, the user's way: named or measured, from the recipe to the exported model."""

import json

import torch
from transformers import AutoModelForCausalLM


def kept_of(run):
    return json.loads((run / "export" / "model" / "config.json").read_text())["kept_heads"]


def test_convert_with_named_heads(linearize, recipe, tmp_path):
    result = linearize("convert", recipe(keep={"heads": {1: [0]}}, medusa=None))
    assert result.code == 0, result.stderr
    run = tmp_path / "run"
    assert kept_of(run) == {"1": [0]}
    plan = json.loads((run / "plan.json").read_text())
    assert "1 of 4 key heads stay softmax: 25.0% of the KV cache" in result.stdout
    assert "linear state + kept heads" in result.stdout
    assert "layer 1: 0" in (run / "export" / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True)
    for tokens in (50, 400):
        ids = torch.randint(2, 200, (1, tokens), generator=torch.Generator().manual_seed(0))
        cache = model(ids, use_cache=True).past_key_values
        assert cache.nbytes == plan["state_bytes"] + plan["kept_bytes"] * tokens
    losses = json.loads((run / "transfer" / "state.json").read_text())["metrics"]["loss"]
    assert sum(losses[3:]) < sum(losses[:3])


def test_convert_with_whole_layers(linearize, recipe, tmp_path):
    result = linearize("convert", recipe(keep={"layers": [0]}, medusa=None))
    assert result.code == 0, result.stderr
    assert kept_of(tmp_path / "run") == {"0": [0, 1]}


def test_calibration_is_kept_and_repeatable(linearize, recipe, tmp_path):
    path = recipe(keep={"kv_budget": 0.5, "texts": 2, "length": 60}, medusa=None, finetune=None)
    measured = []
    for name in ("once", "again"):
        result = linearize("convert", path, "--out", tmp_path / name)
        assert result.code == 0, result.stderr
        assert "kept heads: recall" in result.stdout
        measured.append(json.loads((tmp_path / name / "install" / "kept.json").read_text()))
    assert measured[0] == measured[1]
    assert sum(map(len, measured[0]["kept"].values())) == 2
    assert {(head["layer"], head["head"]) for head in measured[0]["heads"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert kept_of(tmp_path / "once") == measured[0]["kept"]
    # The measurement follows from the training data; without one, the layers do not.
    other = linearize("convert", path, "--out", tmp_path / "once", "data.train.source=builtin:heldout")
    assert other.code == 2 and "stage install of another recipe" in other.stderr
    (tmp_path / "once" / "install" / "kept.json").unlink()
    gone = linearize("convert", path, "--out", tmp_path / "once", "--from", "transfer")
    assert gone.code == 2 and "kept.json: is gone; --from install makes it again" in gone.stderr
