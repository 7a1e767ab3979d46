"""Curves while a stage trains: what integrations show is what the run records, once, from one process."""

import json
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linearize.convert.transfer import AttentionTransfer

from .runs import converted, state

SHORT = ["medusa=null", "evaluate=null", "export=null"]
RATES = ["finetune.attention_lr=3e-3", "finetune.warmup_steps=4"]


def shown(directory) -> dict[str, list[tuple[int, float]]]:
    """Curve -> (step, value) of what a stage has written for TensorBoard."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_curves_are_what_a_run_records_also_after_an_interruption(linearize, recipe, tmp_path, monkeypatch):
    path, loss = recipe(), AttentionTransfer.loss
    run = tmp_path / "run"

    def interrupted(self, model, batch, accumulation, step):
        # The checkpoint before is of step 4.
        if step == 5:
            raise InterruptedError
        return loss(self, model, batch, accumulation, step)

    monkeypatch.setattr(AttentionTransfer, "loss", interrupted)
    with pytest.raises(InterruptedError):
        linearize("convert", path, "report_to=tensorboard", *SHORT, *RATES)
    monkeypatch.setattr(AttentionTransfer, "loss", loss)
    converted(linearize, path, "report_to=[tensorboard]", *SHORT, *RATES, "--resume")

    metrics = {stage: state(run, stage)["metrics"] for stage in ("transfer", "finetune")}
    curves = {stage: shown(run / stage / "logs") for stage in metrics}
    for stage in metrics:
        # In single precision; each step once.
        assert [step for step, _ in curves[stage]["train/loss"]] == [1, 2, 3, 4, 5, 6]
        losses = [value for _, value in curves[stage]["train/loss"]]
        assert losses == pytest.approx(metrics[stage]["loss"], rel=1e-6)
    for layer, losses in metrics["transfer"]["loss_of_layer"].items():
        curve = curves["transfer"][f"train/loss_of_layer/{layer}"]
        assert [value for _, value in curve] == pytest.approx(losses, rel=1e-6)
    assert [step for step, _ in curves["transfer"]["train/learning_rate"]] == [1, 2, 3, 4, 5, 6]
    rates = {name: [x for _, x in curve] for name, curve in curves["finetune"].items() if "learning_rate/" in name}
    assert rates.keys() == {"train/learning_rate/0.003", "train/learning_rate/0.01"}
    # A warm-up of 4 steps from 0, then the cosine's first of two.
    assert rates["train/learning_rate/0.01"] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.005])
    assert rates["train/learning_rate/0.003"] == pytest.approx([0, 0.00075, 0.0015, 0.00225, 0.003, 0.0015])


def test_where_it_is_shown_changes_no_result(linearize, recipe, tmp_path):
    path = recipe(finetune=None, medusa=None, evaluate=None, export=None)
    converted(linearize, path)
    before = state(tmp_path / "run", "transfer")
    converted(linearize, path, "report_to=[tensorboard]")
    assert state(tmp_path / "run", "transfer") == before
    assert not (tmp_path / "run" / "transfer" / "logs").exists()
    converted(linearize, path, "report_to=[tensorboard]", "--from", "transfer")
    again = state(tmp_path / "run", "transfer")
    for name in ("loss", "loss_of_layer", "error_of_head"):
        assert again["metrics"][name] == before["metrics"][name]


def test_one_process_of_two_reports(ranks, recipe, tmp_path):
    path = recipe(finetune=None, medusa=None, evaluate=None, export=None)
    ranks.finish(2, "convert", path, "report_to=[tensorboard]")
    logs = tmp_path / "run" / "transfer" / "logs"
    assert len([*logs.iterdir()]) == 1
    losses = [value for _, value in shown(logs)["train/loss_of_layer/1"]]
    assert losses == pytest.approx(state(tmp_path / "run", "transfer")["metrics"]["loss_of_layer"]["1"], rel=1e-6)


def test_trackio_needs_no_server(recipe, tmp_path):
    path = recipe(finetune=None, medusa=None, evaluate=None, export=None)
    command = [sys.executable, "-m", "linearize.cli", "convert", path, "report_to=[trackio]"]
    # It looks for its directory when it is imported.
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    read = "import json, trackio; print(json.dumps(trackio.SQLiteStorage.get_logs('tiny', 'tiny/transfer')))"
    told = subprocess.run([sys.executable, "-c", read], check=True, env=environment, capture_output=True, text=True)
    steps = [step for step in json.loads(told.stdout.splitlines()[-1]) if "train/loss" in step]
    metrics = state(tmp_path / "run", "transfer")["metrics"]
    assert [step["train/loss"] for step in steps] == metrics["loss"]
    assert [step["train/loss_of_layer/0"] for step in steps] == metrics["loss_of_layer"]["0"]


def test_what_is_not_there(linearize, recipe, tmp_path):
    for name, sentence in {
        "tensorboards": "report_to: transformers has no integration tensorboards; it has azure_ml, comet_ml, ",
        "all": "report_to: transformers has no integration all; it has ",
        "wandb": "report_to: wandb is not installed; pip install wandb",
        "comet_ml": "report_to: comet_ml is not installed; pip install comet-ml",
    }.items():
        for verb in ("convert", "check"):
            result = linearize(verb, recipe(), f"report_to=[{name}]")
            assert result.code == 2 and sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert json.loads(linearize("check", recipe(), "report_to=[tensorboard]", "--json").stdout)["layers"] == 2
