"""lm-eval's own `hf` model measures an exported directory, by tasks in local files; figures are those of the model."""

import json

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from .exports import load

# Texts of different lengths, so that rows of a batch are padded: what is scored to the right, what is continued to
# the left.
CONTEXTS = ["the and", "of a to in was he that it his", "was", "to in the of and a was he"]
CHOICES = ["the of", "was that it"]
NEW = 8


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "answer": 0}) + "\n" for text in CONTEXTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": " ",
    }
    chosen = {
        "task": "chosen", "output_type": "multiple_choice", "doc_to_choice": CHOICES, "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    written = {
        "task": "written", "output_type": "generate_until", "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (chosen, written):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return directory


def test_figures_of_lm_eval_are_those_of_the_model(exported, tasks):
    """As `lm_eval --model hf --model_args pretrained=..` comes to them."""
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported},trust_remote_code=True,dtype=float32",
        tasks=["chosen", "written"],
        # Without a look at the thousands of tasks that it brings.
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    samples, results = found["samples"], found["results"]

    model, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    right = 0
    for sample in samples["chosen"]:
        scores = [score(model, tokenizer, sample["doc"]["text"], choice) for choice in CHOICES]
        # In a batch sums are over padding, too, in fp32.
        assert [found[0][0] for found in sample["resps"]] == pytest.approx(scores, abs=1e-4)
        right += scores[0] > scores[1]
    assert results["chosen"]["acc,none"] == right / len(CONTEXTS)
    for sample in samples["written"]:
        ids = tokenizer(sample["doc"]["text"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0].split() == text.split() != []


@torch.no_grad()
def score(model, tokenizer, context: str, choice: str) -> float:
    """Log-likelihood of a choice."""
    given, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, f"{context} {choice}"))
    logits = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)[0, given.shape[1] - 1 :]
    return logits.gather(-1, ids[0, given.shape[1] :, None]).sum().item()
