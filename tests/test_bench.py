"""`linearize generate` and `linearize bench`: a file of prompts through an exported model."""

import json

import pytest

from linearize.layers.draft import COPIED


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "the and of"},
        {"turns": ["to a in that he", "and then"], "category": "writing"},
        {"messages": [{"role": "user", "content": "was it"}], "category": "writing"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(text: str) -> dict[int, dict]:
    return {answer["prompt"]: answer for answer in map(json.loads, text.splitlines())}


def test_generate(linearize, finished, prompts, tmp_path):
    run, *_ = finished
    command = "generate", run, "--prompts", prompts, "--max-new-tokens", 12, "--batch-size"
    plain = answers(linearize(*command, 2).stdout)
    assert sorted(plain) == [1, 2, 3] and all(0 < answer["tokens"] <= 12 for answer in plain.values())
    guessed = answers(linearize(*command, 3, "--speculative").stdout)
    assert {n: x["text"] for n, x in guessed.items()} == {n: x["text"] for n, x in plain.items()}
    sampled = answers(linearize(*command, 2, "--temperature", 1.5, "--seed", 3).stdout)
    assert sampled != plain and sampled == answers(linearize(*command, 2, "--temperature", 1.5, "--seed", 3).stdout)
    typical = linearize(*command, 2, "--temperature", 1.0, "--speculative", "--typical", 0.09)
    assert typical.code == 0 and len(answers(typical.stdout)) == 3


def test_generate_goes_on_with_a_file(linearize, finished, prompts, tmp_path):
    run, *_ = finished
    out = tmp_path / "answers.jsonl"
    command = "generate", run, "--prompts", prompts, "--max-new-tokens", 5, "--out", out
    assert linearize(*command).code == 0
    whole = answers(out.read_text())
    kept = json.dumps(whole[2] | {"text": "kept"}) + "\n"
    out.write_text(kept)
    assert linearize(*command).code == 0
    assert out.read_text().startswith(kept)
    assert answers(out.read_text()) == whole | {2: json.loads(kept)}


def test_bench(linearize, finished, prompts, tiny_model):
    run, *_ = finished
    command = "bench", run, "--prompts", prompts, "--max-new-tokens", 8, "--batch", 1, "--batch", 2
    found = json.loads(linearize(*command, "--teacher", tiny_model, "--json").stdout)
    for result in found["results"].values():
        assert result["prompts"] == result["same text"] == 3 and result["gaps"] == []
        assert result["plain"]["tokens"] == result["speculative"]["tokens"] <= 24
        assert all(result[name]["tokens/s"] > 0 for name in ("teacher", "plain", "speculative"))
        assert set(result["speculative"]["by category"]) == {"all", "writing"}
        # Texts of a random model repeat themselves.
        assert 1 <= result["speculative"]["tokens/step"] <= 1 + COPIED
    assert "speculative" in linearize(*command, "--limit", 1).stdout


def test_bench_of_another_tree(linearize, finished, prompts, tmp_path):
    run, *_ = finished
    tree = tmp_path / "tree.json"
    command = "bench", run, "--prompts", prompts, "--max-new-tokens", 20, "--batch", 3, "--tree", tree, "--json"
    tree.write_text(json.dumps([[0], [1], [0, 0], [10], [10, 10], [10, 10, 10]]))
    found = json.loads(linearize(*command).stdout)
    assert found["model"]["tree"] == json.loads(tree.read_text())
    assert found["results"]["3"]["same text"] == 3
    for text, message in (
        ("[[0], [0, 0], [0, 0, 0]]", "the tree is 3 guesses deep and asks 3 heads; there are 2 heads"),
        ("[[0, 0]]", "[0] before it is missing"),
        ("[0]", "tree.json: "),
        ("none", "tree.json: "),
    ):
        tree.write_text(text)
        result = linearize(*command)
        assert result.code == 2 and message in result.stderr


def test_prompts_that_are_none(linearize, finished, tiny_model, tmp_path):
    run, *_ = finished
    path = tmp_path / "prompts.jsonl"
    for text, message in (
        ('{"prompt": "the"}\n{"question": "the"}\n', f'{path}:2: expected {{"prompt": "..."}}, or messages, or turns'),
        ("the and of\n", f"{path}:1: expected"),
        ("", f"{path}: holds no prompt"),
    ):
        path.write_text(text)
        for verb in ("generate", "bench"):
            result = linearize(verb, run, "--prompts", path)
            assert result.code == 2 and message in result.stderr
    path.write_text('{"prompt": "the"}\n')
    result = linearize("generate", tiny_model, "--prompts", path)
    assert result.code == 2 and "is not a linearized model" in result.stderr
    result = linearize("generate", run, "--prompts", path, "--typical", 0.1)
    assert result.code == 2 and "add --speculative and a --temperature above 0" in result.stderr
    result = linearize("bench", run, "--prompts", path, "--dtype", "int3")
    assert result.code == 2 and "expected auto, float32" in result.stderr
    (tmp_path / "answers.jsonl").write_text("something\n")
    result = linearize("generate", run, "--prompts", path, "--out", tmp_path / "answers.jsonl")
    assert result.code == 2 and "holds something else than answers" in result.stderr
