"""Stage evaluate: what is measured on whom, going on where it stopped, and the teacher that is finetuned alike."""

import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file

from linearize.convert import measures
from linearize.convert.finetune import LabelsAndDistillation
from linearize.convert.report import results_table
from linearize.hub.measured import TEACHER, TUNED_TEACHER

EVALUATE = {"tokens": 256, "lengths": [64, 128], "copying": {"texts": 2, "length": 32}, "passkey": [100]}


@pytest.fixture
def convert(linearize):
    def run(*arguments):
        result = linearize("convert", *arguments)
        assert result.code == 0, result.stderr

    return run


def results(run) -> dict:
    return json.loads((run / "evaluate" / "results.json").read_text())


def numbers(value, name: str = "") -> dict[str, float | None]:
    """Every number in results, by where it stands."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: number for key, item in items for place, number in numbers(item, f"{name}/{key}").items()}


class Stopped(Exception):
    pass


def stops_after(function, calls):
    """`function` that fails when it is called once more than `calls` times; counts its calls in `.calls`."""

    def stopping(*arguments, **kwargs):
        if stopping.calls == calls:
            raise Stopped
        stopping.calls += 1
        return function(*arguments, **kwargs)

    stopping.calls = 0
    return stopping


def test_who_is_measured_on_what(convert, recipe, tmp_path):
    convert(recipe(evaluate=EVALUATE, medusa=None, export=None))
    measured = results(tmp_path / "run")
    assert measured["tokens"] == {"64": 256, "128": 256}
    sizes = {
        name: {measure: list(sizes) for measure, sizes in figures.items()}
        for name, figures in (measured["models"] | measured["ablations"]).items()
    }
    first = {"text": ["64"]}
    cheap = {"text": ["64", "128"], "copying": ["32"]}
    everything = {**cheap, "passkey": ["100"]}
    assert list(sizes.items()) == [
        (TEACHER, {**everything, "far_mass": ["128"]}),
        ("sliding window 64 + 4 sinks, untrained", first),
        ("sliding window 16 + 2 sinks, untrained", everything),
        ("installed", first),
        ("after transfer", first),
        ("after finetune", {**everything, "far_mass": ["128"]}),
        ("local only", cheap),
        ("linear only", cheap),
        ("conv off", cheap),
    ]
    perplexities = {name: figures["text"]["64"]["perplexity"] for name, figures in measured["models"].items()}
    assert len(set(perplexities.values())) == 5  # installed is the window + sinks
    assert measured["ablations"]["linear only"]["text"]["64"] != measured["models"]["after finetune"]["text"]["64"]

    convert(recipe(evaluate=EVALUATE, medusa=None, export=None), "evaluate.baselines=false", "--from", "evaluate")
    alone = results(tmp_path / "run")
    assert list(alone["models"]) == ["installed", "after transfer", "after finetune"]
    assert alone["models"]["after finetune"] == measured["models"]["after finetune"]


def test_stopped_stage_goes_on_behind_its_last_measurement(convert, recipe, tmp_path, monkeypatch):
    path = recipe(evaluate=EVALUATE, medusa=None, export=None)
    score = measures.score
    counting = stops_after(score, 10**6)
    monkeypatch.setattr(measures, "score", counting)
    convert(path)
    whole = results(tmp_path / "run")

    stopping = stops_after(score, 5)
    monkeypatch.setattr(measures, "score", stopping)
    with pytest.raises(Stopped):
        convert(path, "--from", "evaluate")
    assert list(results(tmp_path / "run")["models"]["sliding window 16 + 2 sinks, untrained"]) == []
    rest = stops_after(score, 10**6)
    monkeypatch.setattr(measures, "score", rest)
    convert(path, "--resume")
    assert rest.calls == counting.calls - 5
    assert results(tmp_path / "run") == whole
    state = json.loads((tmp_path / "run" / "evaluate" / "state.json").read_text())
    assert whole.items() <= state["metrics"].items()


def test_teacher_finetuned_alike_is_what_finetuning_makes_of_a_window_over_everything(convert, recipe, tmp_path):
    """Then the student is the softmax model; fp32, other kernels, 6 steps of Adam."""
    path = recipe(
        attention={"preset": "swa", "window_size": 512},
        transfer=None,
        medusa=None,
        export=None,
        evaluate={**EVALUATE, "tuned_teacher": True},
    )
    convert(path, "finetune.distill=0.5")
    models = results(tmp_path / "run")["models"]
    teacher, tuned, student = (models[name]["text"]["128"] for name in (TEACHER, TUNED_TEACHER, "after finetune"))
    assert tuned["perplexity"] == pytest.approx(student["perplexity"], rel=1e-3)
    assert tuned["perplexity"] < 0.99 * teacher["perplexity"]
    assert list(models)[:2] == [TEACHER, TUNED_TEACHER]
    assert models[TUNED_TEACHER].keys() == models[TEACHER].keys()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_teacher_is_finetuned_once_and_from_its_last_checkpoint(convert, recipe, tmp_path, monkeypatch, method):
    path = recipe(medusa=None, export=None, evaluate={**EVALUATE, "tuned_teacher": True})
    method = f"finetune.method={method}"
    loss = LabelsAndDistillation.loss
    for stage in ("load", "install", "transfer", "finetune"):
        convert(path, method, "--only", stage)
    monkeypatch.setattr(LabelsAndDistillation, "loss", stops_after(loss, 5))
    with pytest.raises(Stopped):
        convert(path, method)
    monkeypatch.setattr(LabelsAndDistillation, "loss", stops_after(loss, 2))
    monkeypatch.setattr(measures, "score", stops_after(measures.score, 3))
    with pytest.raises(Stopped):
        convert(path, method, "--resume")
    directory = tmp_path / "run" / "evaluate" / "tuned_teacher"
    assert [file.name for file in directory.iterdir()] == ["weights.safetensors"]
    names = load_file(directory / "weights.safetensors")
    assert not any("linear_attention" in name for name in names)
    monkeypatch.undo()
    monkeypatch.setattr(LabelsAndDistillation, "loss", stops_after(loss, 0))
    convert(path, method, "--resume")
    resumed = results(tmp_path / "run")
    monkeypatch.undo()
    convert(path, method, "--out", tmp_path / "whole")
    # Last bits of single precision follow from where in memory matrices lie.
    assert numbers(resumed) == pytest.approx(numbers(results(tmp_path / "whole")), rel=1e-6)


def test_check_counts_the_teachers_finetuning(linearize, recipe):
    path = recipe(medusa=None, evaluate={**EVALUATE, "tuned_teacher": True})
    plan = json.loads(linearize("check", path, "--json").stdout)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert stages["tuned teacher"]["tokens"] == stages["finetune"]["tokens"]
    # 2 layers, rank 8, adapters on q, k, v, o of 32 -> 32, 16, 16, 32.
    assert stages["tuned teacher"]["trained"] == 2 * 8 * (64 + 48 + 48 + 64)


def shown(content: dict) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table(content))
    return console.file.getvalue()


def text(perplexity: float) -> dict:
    return {
        "perplexity": perplexity,
        "by_position": {"0-64": perplexity},
        "far_repeats": None,
        "other_tokens": perplexity,
        "far_share": 0.0,
    }


def test_table_compares_with_both_teachers_at_every_length():
    content = {
        "tokens": {"64": 256, "128": 256},
        "models": {
            TEACHER: {
                "text": {"64": text(10.0), "128": text(8.0)},
                "copying": {"32": {"accuracy": 0.5, "perplexity": 3.0}},
            },
            TUNED_TEACHER: {"text": {"64": text(5.0), "128": text(4.0)}},
            "installed": {"text": {"64": text(20.0)}},
        },
        "ablations": {"local only": {"text": {"64": text(15.0), "128": text(16.0)}}},
    }
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(content).splitlines()]
    assert ["installed", "20.00 (2.00, 4.00)", ""] in lines
    assert ["local only", "15.00 (1.50, 3.00)", "16.00 (2.00, 4.00)"] in lines
    assert [TEACHER, "50%", "3.00"] in lines
    assert [TEACHER, "-", "8.00"] in lines


def test_table_names_the_heads_that_look_farthest():
    content = {
        "tokens": {"64": 256},
        "models": {
            "linearized": {
                "text": {"64": text(10.0)},
                "far_mass": {"256": {"mean": 0.2, "layers": {"0": [0.1, 0.3], "3": [0.05, 0.35]}}},
            }
        },
        "ablations": {},
    }
    line = "attention beyond the window, linearized: 20.0% on average; most in (layer.head) "
    assert line + "3.1 35.0%, 0.1 30.0%, 0.0 10.0%, 3.0 5.0%" in shown(content)
