"""The model card: what the Hub reads at its head, and what people read below it, from made-up metrics."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from linearize.convert.sources import Source, base_card
from linearize.hub.card import CARD_FIGURES, model_card
from linearize.hub.figures import drawings
from linearize.hub.metadata import metadata

from .measured import full_metrics, measured_recipe
from .runs import converted


def card(*changes: str, metrics: dict | None = None) -> str:
    metrics = metrics or full_metrics()
    return model_card(measured_recipe(*changes), metrics, drawings(metrics, CARD_FIGURES)[0])


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.license=My Own Licence!", "model.license_link=https://example.org/licence"),
        ("model.license=null", "model.base_model=null"),
        ("data.heldout=[{source: Salesforce/wikitext, name: wikitext-2-raw-v1, split: test}]",),
        ("data.train=[{source: HuggingFaceH4/no_robots, field: messages}, {source: 'builtin:train'}]", "evaluate=null"),
    ],
)
def test_card_passes_the_hubs_validation_and_comes_back_as_it_went(changes, hub, tmp_path):
    metrics = full_metrics()
    if "evaluate=null" in changes:
        del metrics["evaluate"]
    text = card(*changes, metrics=metrics)
    parsed = ModelCard(text)
    parsed.validate()
    assert str(parsed) == text
    data = metadata(measured_recipe(*changes), metrics).to_dict()
    assert parsed.data.to_dict() == data
    assert ModelCardData(**data).to_dict() == data
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == data


def test_stand_in_for_the_hub_refuses_what_the_hub_does(hub):
    text = card()
    for good, bad in [
        ("license: apache-2.0", "license: my own"),
        ("base_model: HuggingFaceTB/", "base_model: some body/"),
        ("base_model_relation: finetune", "base_model_relation: conversion"),
        ("      type: custom", "      kind: custom"),
    ]:
        assert good in text
        with pytest.raises(ValueError):
            ModelCard(text.replace(good, bad)).validate()


@pytest.mark.parametrize("changes", [(), ("medusa=null", "evaluate=null")])
def test_headings_stand_by_themselves(changes):
    lines = card(*changes, metrics={k: v for k, v in full_metrics().items() if f"{k}=null" not in changes}).split("\n")
    headings = [number for number, line in enumerate(lines) if line.startswith("## ")]
    assert len(headings) > 5 and all(lines[number - 1] == lines[number + 1] == "" for number in headings)


def test_measured_perplexities_are_in_the_model_index():
    wikitext = "data.heldout=[{source: Salesforce/wikitext, name: wikitext-2-raw-v1, split: test}]"
    results = ModelCard(card(wikitext)).data.eval_results
    measured = full_metrics()["evaluate"]["models"]["after finetune"]["text"]
    assert [result.metric_value for result in results] == [
        pytest.approx(measured[length]["perplexity"], abs=1e-4) for length in ("256", "1024")
    ]
    for result, length in zip(results, ("256", "1024"), strict=True):
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
            "Salesforce/wikitext", "wikitext-2-raw-v1", "test",
        )  # fmt: skip
        assert (result.task_type, result.metric_type) == ("text-generation", "perplexity")
        assert result.metric_name == f"perplexity in windows of {length} tokens"
    # Text that the Hub has not is not passed off as a data set of it.
    assert {result.dataset_type for result in ModelCard(card()).data.eval_results} == {"custom"}
    metrics = full_metrics()
    metrics["evaluate"]["models"]["after finetune"]["text"]["256"]["perplexity"] = float("inf")
    assert len(ModelCard(card(metrics=metrics)).data.eval_results) == 1


def test_metadata_name_what_the_model_is_made_of():
    data = ModelCard(card("data.train=[{source: HuggingFaceH4/no_robots}, {source: 'builtin:train'}]")).data
    assert (data.base_model, data.base_model_relation) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune")
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.datasets == ["HuggingFaceH4/no_robots"]
    assert {"linearize", "linear-attention"} <= set(data.tags)
    assert data.get("language") is None
    metrics = full_metrics()
    metrics["load"]["card"] = {"language": ["en", "fr"]}
    assert ModelCard(card(metrics=metrics)).data.language == ["en", "fr"]


OWN = {"license": "other", "license_name": "own-1.0", "license_link": "LICENSE"}
LINK = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/LICENSE"


@pytest.mark.parametrize(
    "changes, base, expected",
    [
        ([], {}, {"license": "apache-2.0"}),
        ([], OWN, {"license": "apache-2.0"}),
        (["model.license=null"], {}, {"license": "unknown"}),
        (["model.license=null"], {"license": "llama3.2"}, {"license": "llama3.2"}),
        (["model.license=null"], {"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}),
        (["model.license=null"], OWN, {**OWN, "license_link": LINK}),
        (["model.license=null", "model.base_model=null"], OWN, {"license": "other", "license_name": "own-1.0"}),
        (["model.license=MIT"], {}, {"license": "mit"}),
        (
            ["model.license=Tongyi Qianwen", "model.license_link=https://example.org/l"],
            {},
            {"license": "other", "license_name": "tongyi-qianwen", "license_link": "https://example.org/l"},
        ),
    ],
)
def test_licence_is_the_recipes_or_the_base_models(changes, base, expected):
    head = metadata(measured_recipe(*changes), {"load": {"card": base}}).to_dict()
    assert {field: value for field, value in head.items() if field.startswith("license")} == expected


def test_card_of_a_local_model_is_read_when_it_is_loaded(tmp_path):
    assert base_card(Source(str(tmp_path))) == {}
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: llama3\nlanguage: [en]\ntags: [x]\n---\n# A model\n")
    assert base_card(Source(str(tmp_path))) == {"license": "llama3", "language": ["en"]}
    for text in ("# No head\n", "---\n- a list\n---\n", "---\nlicense: [\n---\n"):
        readme.write_text(text)
        assert base_card(Source(str(tmp_path))) == {}
    # Of the Hub's, which is not at hand here.
    assert base_card(Source("somebody/nothing")) == {}


def test_table_compares_with_the_teacher_and_shows_the_ablations():
    lines = card().splitlines()
    assert "| teacher (softmax), finetuned alike | 12.91 (1.00) | 8.01 (1.00) | 97% | 97% | 48% | 97% |" in lines
    assert "| **this model** (after finetune) | 15.11 (1.17) | 9.38 (1.17) | 42% | 42% | 21% | 42% |" in lines
    assert "| local only | 15.11 (1.17) | 9.38 (1.17) | 42% |  |  |  |" in lines
    header = lines.index(next(line for line in lines if line.startswith("| model |")))
    # All rows have the header's columns, or the Hub shows no table.
    table = lines[header : lines.index("", header)]
    assert {line.count("|") for line in table} == {8} and len(table) == 2 + 7 + 3


def test_limits_say_what_was_forgotten():
    text = card("attention.window_size=64", "export.dtype=bfloat16")
    assert "window of 64 tokens" in text
    assert "42% of a text of 512 tokens said again are predicted (teacher 97%)" in text
    assert "21% of pass keys in 4096 tokens are found (teacher 48%)" in text
    assert "trained on sequences of up to 512 tokens, and measured in windows of up to 1024" in text
    assert "saved in bfloat16, those of the attention layers in float32" in text and "measured in float32" in text


def test_card_says_where_nothing_was_measured():
    metrics = {stage: figures for stage, figures in full_metrics().items() if stage not in ("evaluate", "medusa")}
    text = card("evaluate=null", "medusa=null", metrics=metrics)
    assert "Nothing: its recipe has no section `evaluate`." in text
    assert "how much is lost was not measured" in text
    assert "model-index" not in text and "| model |" not in text and "](speed.png)" not in text
    assert "speculate" not in text and "Medusa" not in text


def test_figures_are_beside_the_card_only_if_they_were_measured():
    text = card()
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == [f"{name}.png" for name in CARD_FIGURES]
    metrics = full_metrics()
    for figures in metrics["evaluate"]["models"].values():
        figures.pop("speed", None)
    assert "](speed.png)" not in card(metrics=metrics) and "## Speed" not in card(metrics=metrics)


def test_exported_model_inherits_its_licence_and_has_its_figures(linearize, recipe, tiny_model, tmp_path):
    local = shutil.copytree(tiny_model, tmp_path / "base")
    (local / "README.md").write_text("---\nlicense: llama3.2\nlanguage: en\n---\n")
    path = recipe(model={"source": str(local)}, transfer=None, finetune=None, medusa=None)
    converted(linearize, path)
    model = tmp_path / "run" / "export" / "model"
    data = ModelCard.load(model / "README.md").data
    assert (data.license, data.language, data.base_model) == ("llama3.2", "en", None)
    figures = re.findall(r"\]\(([^)]+\.png)\)", (model / "README.md").read_text())
    assert {path.name for path in model.glob("*.png")} == set(figures)
    assert all((model / name).read_bytes().startswith(b"\x89PNG") for name in figures)
