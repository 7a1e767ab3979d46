"""Downstream tasks from local files, by lm-eval: prompts, figures, and a run that goes on where it stopped."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoTokenizer

from linearize.convert import tasks as downstream
from linearize.convert.context import StageError

from .exports import load
from .test_lm_eval import score

CHOICES = [
    {"query": "the and of", "choices": ["the of", "was that it"], "gold": 0},
    {"query": "Question: of a to in was he\n", "choices": ["he", "to it that"], "gold": 1},
    {"query": "was", "choices": ["in the", "of"], "gold": 0},
]
CONTEXTS = [
    {"context_options": ["the man was", "the woman was"], "continuation": "in the house.", "gold": 1},
    {"context_options": ["of his", "of her and"], "continuation": "was it", "gold": 0},
]
ENDINGS = {
    "activity_label": "Was", "ctx_a": "the [header] man", "ctx_b": "and he", "label": "1",
    "endings": ["was in the.", "[step] of it.", "to", "that"],
}  # fmt: skip
SETTINGS = {"a": "run"}


@pytest.fixture
def data(tmp_path) -> Path:
    directory = tmp_path / "data"
    for folder in ("mmlu/dev", "mmlu/test", "bbh"):
        (directory / folder).mkdir(parents=True)

    def write(name, rows):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("pi_qa.jsonl", CHOICES)
    write("winogrande.jsonl", CONTEXTS)
    write("hellaswag_val.jsonl", [ENDINGS])
    question = "What is it?,the,of,was,in,{}\n"
    (directory / "mmlu/dev/some_history_dev.csv").write_text("".join(question.format(x) for x in "ABCDA"))
    (directory / "mmlu/test/some_history_test.csv").write_text(question.format("B") + '"the, of",a,to,in,was,D\n')
    examples = [{"input": "not True is", "target": "False"}]
    (directory / "bbh/boolean_expressions.json").write_text(json.dumps({"examples": examples}))
    return directory


def measure(exported, names, data, out, who=downstream.CONVERTED, **options):
    loaded = {who: lambda: (load(exported), AutoTokenizer.from_pretrained(exported))}
    given = {"limit": None, "batch": 2, "settings": SETTINGS, "console": Console(quiet=True)} | options
    return downstream.run(loaded, names, data, out=out, **given)


def prompts(names, data) -> dict[str, list]:
    """Part -> the arguments of lm-eval's requests."""
    found = {}
    for tasks, _ in downstream.prepare(names, data)[0].values():
        for task in tasks:
            task.build_all_requests()
            found[task.config.task] = [instance.args for instance in task.instances]
    return found


def test_prompts_are_the_published_ones(data):
    found = prompts(["piqa", "winogrande", "hellaswag", "mmlu", "bbh"], data)
    assert found["piqa"][:2] == [("the and of", " the of"), ("the and of", " was that it")]
    assert found["piqa"][2] == ("Question: of a to in was he\nAnswer:", " he")
    assert found["winogrande"][:2] == [("the man was", " in the house."), ("the woman was", " in the house.")]
    # As lm-eval has it, spaces included.
    assert found["hellaswag"][1] == ("Was: the man And he", "  of it.")
    context, choice = found["mmlu_some_history"][0]
    assert context.startswith("The following are multiple choice questions (with answers) about some history.\n\nWhat")
    assert context.count("Answer:") == 6 and context.endswith("D. in\nAnswer:") and choice == " A"
    assert [shot[0] for shot in context.split("Answer: ")[1:]] == [*"ABCDA"]
    ((context, arguments),) = found["bbh_boolean_expressions"]
    assert context.count("\nA:") == 4 and context.endswith("Q: not True is\nA:") and "Q" in arguments["until"]


def test_figures_are_those_of_the_model(exported, data, tmp_path):
    names = ["piqa", "winogrande", "mmlu", "bbh"]
    results = measure(exported, names, data, tmp_path / "tasks.json")["tasks"]
    model, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    right, norm = 0, 0
    for row, (context, _) in zip(CHOICES, prompts(["piqa"], data)["piqa"][::2], strict=True):
        choices, gold = row["choices"], row["gold"]
        scores = torch.tensor([score(model, tokenizer, context, choice) for choice in choices])
        right += scores.argmax() == gold
        norm += (scores / torch.tensor([len(choice) for choice in choices])).argmax() == gold
    found = results["piqa"]["converted"]
    assert found["acc"] == pytest.approx(right / 3) and found["acc_norm"] == pytest.approx(norm / 3)
    assert found["items"] == 3 and found["chance"] == 0.5
    assert results["mmlu"]["converted"]["items"] == 2 and results["mmlu"]["converted"]["chance"] == 0.25
    assert results["bbh"]["converted"].keys() >= {"exact_match", "exact_match_stderr"}
    one_by_one = measure(exported, names[:-1], data, tmp_path / "one.json", batch=1)["tasks"]
    assert one_by_one == {name: results[name] for name in names[:-1]}


def test_what_is_measured_is_not_measured_again(exported, data, tmp_path, monkeypatch):
    out, asked = tmp_path / "tasks.json", []
    evaluate = downstream.evaluate
    monkeypatch.setattr(downstream, "evaluate", lambda *given: asked.append(given) or evaluate(*given))
    measure(exported, ["piqa"], data, out)
    both = measure(exported, ["piqa", "winogrande"], data, out)
    assert len(asked) == 2 and both["tasks"].keys() == {"piqa", "winogrande"}
    measure(exported, ["piqa"], data, out, who=downstream.TEACHER)
    tasks = {"piqa": json.loads(out.read_text())["tasks"]["piqa"]}
    columns = downstream.table({"tasks": tasks}).columns
    assert [column.header for column in columns][-2:] == ["difference", "kept above chance"]
    with pytest.raises(StageError, match="holds results of other models"):
        measure(exported, ["piqa"], data, out, settings={"another": "run"})
    assert not [*tmp_path.glob("*answers*")]


def test_an_interrupted_task_goes_on_behind_its_last_answer(exported, data, tmp_path, monkeypatch):
    out, calls, own = tmp_path / "tasks.json", [], HFLM._model_call

    def counted(self, inps, *arguments, **keywords):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(inps))
        return own(self, inps, *arguments, **keywords)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(exported, ["piqa"], data, out, batch=1)
    assert not out.exists() and [*tmp_path.glob("*answers*")]
    calls.clear()
    found = measure(exported, ["piqa"], data, out, batch=1)
    # Of six requests four had been answered.
    assert len(calls) == 2
    monkeypatch.setattr(HFLM, "_model_call", own)
    assert found["tasks"] == measure(exported, ["piqa"], data, tmp_path / "whole.json", batch=1)["tasks"]


def test_command_line(linearize, exported, data, tmp_path):
    arguments = ["tasks", exported, "--tasks", "piqa,winogrande", "--data", data, "--out", tmp_path / "tasks.json"]
    result = linearize(*arguments, "--json")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["tasks"].keys() == {"piqa", "winogrande"}
    again = linearize(*arguments)
    assert again.code == 0 and "winogrande" in again.stdout and "±" in again.stdout


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("piqa2", None, "--tasks piqa2: .* has no such task, did you mean pi_qa"),
        ("broken", '{"query": "a", "choices": ["b"], "gold": 0}\n{"query": 1}\n', "broken.jsonl:2: expected {choices"),
        ("broken", "{\n", "broken.jsonl:1: is no JSON"),
        ("broken", "\n", "broken.jsonl: has no rows"),
        ("broken", '{"text": "a"}\n', "broken.jsonl:1: expected {choices, gold, query} or {context_options"),
    ],
)
def test_bad_input(linearize, exported, data, tmp_path, name, content, sentence):
    if content is not None:
        (data / f"{name}.jsonl").write_text(content)
    result = linearize("tasks", exported, "--tasks", name, "--data", data, "--out", tmp_path / "tasks.json")
    assert result.code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert re.search(sentence, result.stderr), result.stderr


def test_a_task_that_lm_eval_does_not_know(linearize, exported, tmp_path, monkeypatch):
    # To list all of them takes long.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["hellaswag", "piqa"]))
    result = linearize("tasks", exported, "--tasks", "hellaswagg", "--out", tmp_path / "tasks.json")
    assert result.code == 2 and "did you mean hellaswag" in result.stderr
