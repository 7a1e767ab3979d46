"""Downstream tasks from local files, by lm-eval: prompts, figures, and a run that goes on where it stopped."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval import tasks as registry
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoTokenizer

from linearize.convert import tasks as downstream
from linearize.convert.context import StageError

from .exports import export_tiny, load
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
    loaded = {who: lambda: (load(exported), AutoTokenizer.from_pretrained(exported, trust_remote_code=True))}
    given = {"limit": None, "batch": 2, "settings": SETTINGS, "console": Console(quiet=True)} | options
    return downstream.run(loaded, names, data, out=out, **given)


def prompts(names, data) -> dict[str, list]:
    """Part -> the arguments of lm-eval's requests."""
    found = {}
    for tasks in downstream.prepare(names, data)[0].values():
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


# lm-eval's task -> its folder there, a row of a file, and the same as the Hub's data set has it.
PUBLISHED = {
    "copa": (
        "super_glue/copa",
        {"query": "The man slept, therefore", "choices": ["he woke.", "it rained."], "gold": 1},
        {"premise": "The man slept.", "question": "effect", "choice1": "He woke.", "choice2": "It rained.", "label": 1},
    ),
    "piqa": (
        "piqa",
        {"query": "Question: How to sleep?\n", "choices": ["Lie down.", "Run."], "gold": 0},
        {"goal": "How to sleep?", "sol1": "Lie down.", "sol2": "Run.", "label": 0},
    ),
    "openbookqa": (
        "openbookqa",
        {"query": "Predators eat", "choices": ["lions", "bunnies", "grass"], "gold": 1},
        {"question_stem": "Predators eat", "answerKey": "B",
         "choices": {"text": ["lions", "bunnies", "grass"], "label": ["A", "B", "C"]}},
    ),
    "arc_challenge": (
        "arc",
        {"query": "Question: What is wet?", "choices": ["Sand", "Water"], "gold": 1},
        {"question": "What is wet?", "answerKey": "B", "choices": {"text": ["Sand", "Water"], "label": ["A", "B"]}},
    ),
    "winogrande": (
        "winogrande",
        {"context_options": ["Ann saw Eve so Ann", "Ann saw Eve so Eve"], "continuation": "hid.", "gold": 1},
        {"sentence": "Ann saw Eve so _ hid.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_ask_and_measure_what_lm_eval_does(name, tmp_path):
    """By its own configuration, of the same row as the Hub has it."""
    folder, ours, hubs = PUBLISHED[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ours))
    (task,) = downstream.prepare([name], tmp_path)[0][name]
    manager = registry.TaskManager(include_path=Path(registry.__file__).parent / folder, include_defaults=False)
    splits = dict.fromkeys(("validation", "test"), Dataset.from_list([hubs]))
    given = {"task": name, "custom_dataset": lambda **_: splits, "training_split": None, "num_fewshot": 0}
    own = manager.load([{"group": "published", "task": [given]}])["tasks"][name]
    for asked in (task, own):
        asked.build_all_requests()
    assert [request.args for request in task.instances] == [request.args for request in own.instances]
    answers = [(-1.0, False), (-2.0, False), (-3.0, False)][: len(own.instances)]
    assert task.process_results(task.eval_docs[0], answers) == own.process_results(hubs, answers)


@pytest.mark.parametrize(("answer", "right"), [(" False", 1), (" False \nQ", 1), (" True\nFalse", 0), ("", 0)])
def test_an_answer_is_its_first_line_without_the_space_before_it(data, answer, right):
    (task,) = downstream.prepare(["bbh"], data)[0]["bbh"]
    task.build_all_requests()
    (request,) = task.instances
    request.resps.append(answer)
    task.apply_filters()
    assert task.process_results(request.doc, [*request.filtered_resps.values()]) == {"exact_match": right}


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
    assert found["acc_of_items"].count("1") == right and len(found["acc_of_items"]) == 3
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


def test_answers_of_a_model_are_not_another_ones(exported, tiny_model, data, tmp_path, monkeypatch):
    """Stopped before anything was written, and started again with another model."""
    own, calls = HFLM._model_call, []

    def stopped(self, *arguments, **keywords):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return own(self, *arguments, **keywords)

    out, other = tmp_path / "tasks.json", export_tiny(tiny_model, tmp_path / "other", seed=7)
    monkeypatch.setattr(HFLM, "_model_call", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(exported, ["piqa"], data, out, batch=1)

    def counted(self, *arguments, **keywords):
        calls.append(1)
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    calls.clear()
    measure(other, ["piqa"], data, out, batch=1, settings={"another": "run"})
    # Each of its six requests is answered by itself.
    assert len(calls) == 6


def test_results_are_not_those_of_a_model_that_came_in_its_place(linearize, exported, tiny_model, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    arguments = ["tasks", model, "--tasks", "winogrande", "--data", data, "--out", tmp_path / "tasks.json"]
    assert linearize(*arguments).code == 0
    shutil.rmtree(model)
    export_tiny(tiny_model, model, seed=7)
    result = linearize(*arguments)
    assert result.code == 2 and "holds results of other models" in result.stderr


def test_groups_of_lm_eval_have_the_mean_that_it_gives_them(exported, tmp_path, monkeypatch):
    for name, texts in {"one": ["the and"], "two": ["was", "of a to", "in"]}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text, "answer": 0}) + "\n" for text in texts))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test", "doc_to_text": "{{text}}", "output_type": "multiple_choice",
            "doc_to_choice": ["the of", "was that it"], "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    mean = [{"metric": "acc", "weight_by_size": False}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": mean}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    manager = registry.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(registry, "TaskManager", lambda: manager)
    found = measure(exported, ["both", "one", "two"], None, tmp_path / "tasks.json")["tasks"]
    both, one, two = (found[name]["converted"] for name in ("both", "one", "two"))
    assert both["acc"] == pytest.approx((one["acc"] + two["acc"]) / 2)
    assert both["items"] == 4 and both["acc_of_items"] == one["acc_of_items"] + two["acc_of_items"]
    assert both["chance"] == 0.5


def test_the_difference_is_of_the_same_items():
    # Three of eight changed: +1, +1, -1; mean 1/8, variance (2 * (7/8)^2 + (9/8)^2 + 5 / 64) / 8 / 7.
    assert downstream.difference("00011110", "11001110") == pytest.approx((1 / 8, (2.875 / 56) ** 0.5))
    assert downstream.difference("0101", "0101") == (0, 0)


@pytest.mark.parametrize(("right", "kept"), [(90, "50%"), (55, "-")])
def test_what_is_kept_is_told_where_the_teacher_is_clearly_above_chance(right, kept):
    """Of 100 items the standard error of .55 is .05: that may be luck."""

    def figures(right):
        share = right / 100
        items = "1" * right + "0" * (100 - right)
        return {"items": 100, "acc": share, "acc_stderr": (share * (1 - share) / 99) ** 0.5, "acc_of_items": items,
                "chance": 0.5}  # fmt: skip

    by_model = {downstream.TEACHER: figures(right), downstream.CONVERTED: figures(70)}
    shown = downstream.table({"tasks": {"piqa": by_model}})
    assert [*shown.columns[-1].cells] == [kept, ""]


def test_what_lm_eval_prints_is_not_among_the_results(exported, data, tmp_path, capsys):
    """As it does where it looks for the largest batch."""
    measure(exported, ["winogrande"], data, tmp_path / "tasks.json", batch="auto")
    printed = capsys.readouterr()
    assert not printed.out and "largest batch size" in printed.err


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
        ("broken", '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": 1}\n', "jsonl:2: expected {query"),
        ("broken", "{\n", "broken.jsonl:1: is no JSON"),
        ("broken", "\n", "broken.jsonl: has no rows"),
        ("broken", '{"text": "a"}\n', "broken.jsonl:1: expected {query, choices, gold} or {continuation"),
        ("broken", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "broken.jsonl:1: gold is 2, and"),
        ("broken", '{"query": "a", "choices": "bc", "gold": 0}', "broken.jsonl:1: choices is no list of two texts"),
        ("broken", '{"query": 1, "choices": ["b", "c"], "gold": 0}', "broken.jsonl:1: query is no text"),
        ("mmlu/test/some_history_test.csv", "q,a,b,c,d,BC\n", "some_history_test.csv:1: is not question"),
        ("mmlu/test/some_history_test.csv", None, "mmlu: holds no test/SUBJECT_test.csv"),
        ("bbh/boolean_expressions.json", '{"examples": [{"input": "a"}]}', "expressions.json: expected {examples"),
        (",", None, "--tasks: names no task"),
        ("w", None, "--tasks w: .* has no such task"),
    ],
)
def test_bad_input(linearize, exported, data, tmp_path, name, content, sentence):
    folder, _, file = name.partition("/")
    path = data / (name if file else f"{name}.jsonl")
    if content is not None:
        path.write_text(content)
    elif file:
        path.unlink()
    result = linearize("tasks", exported, "--tasks", folder, "--data", data, "--out", tmp_path / "tasks.json")
    assert result.code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert re.search(sentence, result.stderr), result.stderr


def test_a_task_that_lm_eval_does_not_know(linearize, exported, tmp_path, monkeypatch):
    # To list all of them takes long.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["hellaswag", "piqa"]))
    result = linearize("tasks", exported, "--tasks", "hellaswagg", "--out", tmp_path / "tasks.json")
    assert result.code == 2 and "did you mean hellaswag" in result.stderr
