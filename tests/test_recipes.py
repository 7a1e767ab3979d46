"""Recipes: what is shipped loads, and what is read is written again."""

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.recipes.loader import dump_recipe, load_recipe, shipped_recipes
from linearize.recipes.schema import Recipe

# Those whose models have no weights to begin with.
SCRATCH = ["bert-scratch", "flash-small", "gpt2-scratch", "t5-scratch"]


def from_package(name: str) -> list[str]:
    """Overrides that take the model from the test's package, where it comes from one at all."""
    return [] if name in SCRATCH else ["model.source=package:tiny_model/tiny.gguf"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_round_trip(name, package, tmp_path):
    loaded = load_recipe(name, from_package(name))
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(loaded), "utf-8")
    assert load_recipe(str(path)) == loaded


def test_recipes_are_shipped():
    smollm2 = [f"smollm2-135m{kind}" for kind in ("-hybrid", "-long", "")]
    larger = ["glue", "llama-1b", "llama-8b", "lora", "minilm", "mistral-7b", "qwen-4b", "summarize"]
    assert sorted(shipped_recipes()) == sorted(["demo", *SCRATCH, *larger, *smollm2])


@pytest.mark.parametrize("name", shipped_recipes())
def test_budgets_are_what_the_recipe_says(name, package):
    recipe, text = load_recipe(name, from_package(name)), shipped_recipes()[name].read_text()
    stages = [stage for stage in (recipe.transfer, recipe.finetune) if stage is not None]
    tokens = [stage.steps * stage.batch_size * stage.length / 1e6 for stage in stages]
    told = [float(number) for number in re.findall(r"= ([\d.]+)M tokens$", text, re.MULTILINE)]
    assert told == pytest.approx(tokens[: len(told)], abs=0.06)
    for total in re.findall(r"([\d.]+)M tokens[;,]|([\d.]+)M tokens of training", text.partition("name:")[0]):
        assert float("".join(total)) == pytest.approx(sum(tokens), abs=0.6)


def test_published_budget_of_the_general_recipe():
    recipe = load_recipe("lora")
    for stage in (recipe.transfer, recipe.finetune):
        assert stage.steps * stage.batch_size * stage.length == pytest.approx(20e6, rel=0.01)


def test_schema_needs_neither_torch_nor_transformers():
    check = "import sys, linearize.recipes.loader; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_defaults(recipe_file):
    loaded = load_recipe(recipe_file("finetune: {steps: 3}\n"))
    assert loaded.attention.config == PRESETS["augmented"]
    assert (loaded.transfer, loaded.medusa, loaded.evaluate, loaded.export) == (None,) * 4
    assert (loaded.finetune.lr, loaded.finetune.method, loaded.finetune.batch_size) == (1e-3, "lora", 8)
    assert [source.source for source in loaded.data.train] == ["builtin:train"]


def test_preset_with_overrides(recipe_file):
    loaded = load_recipe(recipe_file("attention: {preset: lolcats, window_size: 32, conv_taps: 4}\n"))
    assert loaded.attention.preset == "lolcats"
    assert loaded.attention.config == LinearAttentionConfig(
        **{**PRESETS["lolcats"].to_dict(), "window_size": 32, "conv_taps": 4}
    )


def test_dumped_preset_can_still_be_changed(recipe_file):
    dumped = dump_recipe(load_recipe(recipe_file("attention: {preset: lolcats, window_size: 32}\n")))
    loaded = load_recipe(recipe_file(base=dumped), ["attention.preset=swa"])
    assert loaded.attention.config == LinearAttentionConfig(**{**PRESETS["swa"].to_dict(), "window_size": 32})


# Writing and reading the YAML of one recipe takes tens of milliseconds.
@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1), alpha=st.floats(1e-30, 1e30), preset=st.sampled_from(list(PRESETS)))
def test_round_trip(tmp_path_factory, name, alpha, preset):
    source = {"source": "builtin:train"}
    recipe = Recipe(
        name=name,
        output="runs",
        model={"source": "some/model"},
        attention={"preset": preset, "slack": 7},
        data={"train": source, "heldout": [source, source]},
        finetune={"steps": 1, "alpha": alpha},
    )
    path = tmp_path_factory.mktemp("round_trip") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    "name", ["1e-2", "1e5", "null", "yes", "12", "a: b", "ü", " ", "\\x85", "a\\u2028b", "a\\n\\nb\\n"]
)
def test_names_that_look_like_something_else_round_trip(recipe_file, name):
    loaded = load_recipe(recipe_file(), [f'name="{name}"'])
    assert load_recipe(recipe_file(base=dump_recipe(loaded))) == loaded


def test_numbers_without_a_point(recipe_file):
    assert load_recipe(recipe_file("transfer: {steps: 1, lr: 1e-2}\n")).transfer.lr == 0.01
    assert load_recipe(recipe_file("transfer: {steps: 1}\n"), ["transfer.lr=5E-4"]).transfer.lr == 5e-4


def test_layers_and_phases(recipe_file):
    text = "transfer:\n  steps: 10\n  lr: 0.5\n  layers: {0-3: {lr: 0.1, steps: 4}, 6: {steps: 5}}\n"
    text += "  curriculum: [{length: 512, share: 0.3}, {length: 2048, share: 0.7}]\n"
    loaded = load_recipe(recipe_file(text), ["transfer.layers.5.lr=0.2"])
    layers = [loaded.transfer.layer(index) for index in range(8)]
    assert layers == [(0.1, 4)] * 4 + [(0.5, 10), (0.2, 10), (0.5, 5), (0.5, 10)]
    assert loaded.transfer.phases == [(3, 512), (7, 2048)]
    assert loaded.transfer.tokens_per_pass == 8192
    assert load_recipe(recipe_file(base=dump_recipe(loaded))) == loaded


def test_overrides(recipe_file):
    path = recipe_file("transfer: {steps: 10}\nmedusa:\n  steps: 5\n  heads: 2\nevaluate: null\n")
    loaded = load_recipe(path, ["transfer.steps=20", "medusa=null", "evaluate.tokens=4096", "name=other"])
    assert (loaded.transfer.steps, loaded.medusa, loaded.evaluate.tokens, loaded.name) == (20, None, 4096, "other")


def test_override_mends_a_mistake_in_the_file(recipe_file):
    assert load_recipe(recipe_file("transfer: {steps: many}\n"), ["transfer={steps: 2}"]).transfer.steps == 2
