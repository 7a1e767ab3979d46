"""Recipes for models that learn from examples: classifiers of three families, and answers of an encoder-decoder."""

import json
import random

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from linearize.convert.data import ended
from linearize.convert.examples import Labels, collated, read_examples, text_ids
from linearize.convert.hiding import HiddenSpans
from linearize.convert.sources import SENTINEL
from linearize.recipes.corpora import DataSection, DataSource

from .runs import TWO_PROCESSES, assert_same_training, converted, results, state
from .test_scratch import interrupt

SMALL = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES = {
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=256, max_position_embeddings=64, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=256, eos_token_id=1, dropout_rate=0.0, **T5_SIZES)
    ),
}
ATTENTION = {"preset": "augmented-encoder", "window_size": 4, "conv_taps": 2, "slack": 8}
CLASSES, ANSWERS = "sequence-classification", "seq2seq-lm"
TRAINING = {"batch_size": 8, "length": 24, "save_every": 5, "lr": 1e-2}


@pytest.fixture(scope="module")
def words(tiny_model):
    """Those that the tiny model's tokenizer knows."""
    vocabulary = AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    return sorted(vocabulary, key=vocabulary.get)[4:]


@pytest.fixture(scope="module")
def model_of(tiny_model, tmp_path_factory):
    """A directory with a random model of a family, which has no classifier, and the tiny model's tokenizer."""
    made = {}

    def make(family):
        if family not in made:
            directory = made[family] = tmp_path_factory.mktemp(family) / "model"
            torch.manual_seed(0)
            FAMILIES[family]().save_pretrained(directory)
            AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
        return made[family]

    return make


@pytest.fixture(scope="module")
def data(words, tmp_path_factory):
    """Texts of 6 to 12 words, in two parts, with a class that one of two words tells, and their first words as an
    answer."""
    directory = tmp_path_factory.mktemp("examples")
    choice = random.Random(0)
    for name, count in (("train", 2000), ("heldout", 40)):
        with (directory / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                text = choice.choices(words[20:], k=choice.randint(4, 10))
                label = choice.choice(["no", "yes"])
                text[choice.randrange(len(text))] = words[0] if label == "no" else words[1]
                rest = " ".join(choice.choices(words[20:], k=2))
                row = {"text": " ".join(text), "rest": rest, "label": label, "answer": " ".join(text[:3])}
                file.write(json.dumps(row) + "\n")
    return directory


@pytest.fixture
def recipe_of(model_of, data, tmp_path):
    """Writes a recipe; `changes` replace sections or leave them out (None)."""

    def write(family, head, attention=ATTENTION, model=None, **changes):
        columns = {"label": "label", "second": "rest"} if head == CLASSES else {"target": "answer"}
        content = {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "model": {"source": str(model_of(family)), "license": "mit", "head": head, **(model or {})},
            "attention": attention,
            "data": {
                **{name: {"source": str(data / f"{name}.jsonl"), **columns} for name in ("train", "heldout")},
                "answer_length": 6,
            },
            "transfer": {"steps": 10, **TRAINING},
            "finetune": {"steps": 100, "method": "full", **TRAINING, "lr": 4e-3},
            "evaluate": {"lengths": [24], "copying": None},
            "export": {},
        }
        path = tmp_path / "recipe.yaml"
        content = {name: section for name, section in (content | changes).items() if section is not None}
        path.write_text(yaml.safe_dump({"attention": None, **content}))
        return path

    return write


def heldout(data, field) -> list:
    return [json.loads(line)[field] for line in (data / "heldout.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers(linearize, recipe_of, data, tmp_path, family):
    """From a model without a classifier to one that transformers' pipeline runs, by LoRA where it is a decoder."""
    adapters = {"steps": 100, "targets": ["c_attn", "c_fc"], "rank": 16, **TRAINING}
    changes = {"finetune": adapters} if family == "gpt2" else {}
    printed = converted(linearize, recipe_of(family, CLASSES, **changes))
    measured = state(tmp_path / "run", "evaluate")["metrics"]
    # A classifier that nobody has trained is not measured.
    assert list(measured["models"]) == ["after finetune"]
    found = measured["models"]["after finetune"]["classes"]["24"]
    assert found["accuracy"] > 0.85, found
    assert f"{found['accuracy']:.1%}" in printed
    assert measured["ablations"]["local only"]["classes"]["24"]["loss"] != found["loss"]
    directory = tmp_path / "run" / "export" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
    assert model.config.id2label == {0: "no", 1: "yes"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    right = 0
    for text, rest, label in zip(*(heldout(data, name) for name in ("text", "rest", "label")), strict=True):
        ids = torch.tensor([text_ids(text, rest, tokenizer, 24)])
        with torch.no_grad():
            right += model.config.id2label[model(input_ids=ids).logits.argmax().item()] == label
    assert right / 40 == pytest.approx(found["accuracy"])
    told = pipeline("text-classification", model=model, tokenizer=tokenizer)("the of <eos>")
    assert told[0]["label"] in ("no", "yes")
    card = (directory / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "put in their class" in card and "linearize chat" not in card
    refused = linearize("chat", tmp_path / "run", "--prompt", "the")
    assert refused.code == 2 and "transformers' AutoModelForSequenceClassification loads it" in refused.stderr


def test_a_trained_classifier_keeps_its_classes(linearize, recipe_of, model_of, tiny_model, tmp_path):
    """And is the baseline of what becomes of it; the softmax model finetuned alike is another."""
    torch.manual_seed(1)
    config = BertConfig(vocab_size=256, max_position_embeddings=64, id2label={0: "yes", 1: "no"}, **SMALL)
    directory = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    changes = {
        "evaluate": {"lengths": [24], "copying": None, "tuned_teacher": True},
        "finetune": {"steps": 4, "method": "full", **TRAINING},
    }
    path = recipe_of("bert", CLASSES, model={"source": str(directory)}, export=None, **changes)
    converted(linearize, path)
    assert state(tmp_path / "run", "load")["metrics"]["labels"] == ["yes", "no"]
    names = list(state(tmp_path / "run", "evaluate")["metrics"]["models"])
    assert names[:2] == ["teacher (softmax)", "teacher (softmax), finetuned alike"] and len(names) == 6
    refused = linearize("check", path, "model.labels=[a, b, c]")
    assert refused.code == 2 and "model.labels: names 3 classes, but the model has been trained" in refused.stderr
    refused = linearize("check", path, "model.labels=[a, b]")
    assert refused.code == 2 and "which is none of the model's classes (a, b)" in refused.stderr


def test_softmax_classifiers_are_baselines(linearize, recipe_of, tmp_path):
    """An ordinary checkpoint comes of it."""
    path = recipe_of("t5", CLASSES, attention=None, transfer=None)
    converted(linearize, path, "finetune.steps=5")
    directory = tmp_path / "run" / "export" / "model"
    assert not list(directory.glob("*.py"))
    assert type(AutoModelForSequenceClassification.from_pretrained(directory)).__name__ == "T5ForSequenceClassification"


@pytest.mark.parametrize("cross", ["softmax", "linear"])
def test_answers(linearize, recipe_of, data, tmp_path, monkeypatch, cross):
    """An encoder-decoder that learns to repeat the first words, killed on the way and resumed."""
    pytest.importorskip("rouge_score")
    path = recipe_of("t5", ANSWERS, ATTENTION | {"cross": cross})
    converted(linearize, path)
    losses = state(tmp_path / "run", "transfer")["metrics"]["loss_of_layer"]
    assert len(losses) == (4 if cross == "softmax" else 6)
    measured = state(tmp_path / "run", "evaluate")["metrics"]["models"]
    before, after = measured["teacher (softmax)"], measured["after finetune"]
    assert after["answers"]["24"]["perplexity"] < 0.6 * before["answers"]["24"]["perplexity"]
    assert {*after["rouge"]["24"]} == {"rouge1", "rouge2", "rougeL"}

    from rouge_score.rouge_scorer import RougeScorer

    directory = tmp_path / "run" / "export" / "model"
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for text, answer in zip(*(heldout(data, name) for name in ("text", "answer")), strict=True):
        ids = torch.tensor([text_ids(text, None, tokenizer, 24)])
        written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0]
        written = tokenizer.decode(written, skip_special_tokens=True)
        scores.append(RougeScorer(["rouge1"], use_stemmer=True).score(answer, written)["rouge1"].fmeasure)
    assert sum(scores) / len(scores) == pytest.approx(after["rouge"]["24"]["rouge1"])
    card = (directory / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card and "ROUGE-L" in card and ("stays softmax" in card) == (cross == "softmax")

    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert linearize("convert", path, "--out", tmp_path / "killed").code
    converted(linearize, path, "--out", tmp_path / "killed", "--resume")
    assert results(tmp_path / "run") == results(tmp_path / "killed")


@TWO_PROCESSES
def test_two_processes_learn_what_one_does(linearize, ranks, recipe_of, tmp_path):
    path = recipe_of("t5", ANSWERS, ATTENTION | {"cross": "linear"}, evaluate=None, export=None)
    short = ["transfer.steps=5", "finetune.steps=6"]
    converted(linearize, path, *short, "--launch", "none")
    ranks.finish(2, "convert", path, *short, "--out", tmp_path / "two")
    for stage in ("transfer", "finetune"):
        assert_same_training(tmp_path / "run", tmp_path / "two", stage)


def test_an_encoder_decoder_from_scratch_fills_in_what_is_hidden(linearize, recipe_of, tiny_model, tmp_path):
    """From running text; another recipe takes it up, transfer on running text included."""
    config = {"model_type": "t5", **T5_SIZES}
    running = {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}}
    path = recipe_of("t5", ANSWERS, attention=None, transfer=None, evaluate=None, data=running)
    content = yaml.safe_load(path.read_text())
    content["model"] = {"config": config, "tokenizer": str(tiny_model), "head": "seq2seq-lm"}
    path.write_text(yaml.safe_dump(content))
    converted(linearize, path, "finetune.length=40", "finetune.steps=20")
    losses = state(tmp_path / "run", "finetune")["metrics"]["loss"]
    assert losses[-1] < losses[0] - 0.5
    exported = tmp_path / "run" / "export" / "model"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert tokenizer.convert_tokens_to_ids(SENTINEL.format(99)) == 243 + 100 < model.config.vocab_size
    # By itself, without being told what answers begin with.
    assert model.generate(input_ids=torch.tensor([[5, 6, 1]]), max_new_tokens=4).shape[1] >= 2

    path = recipe_of("t5", ANSWERS, model={"source": str(exported)}, evaluate=None, finetune=None, data=running)
    converted(linearize, path, "--out", tmp_path / "linear")
    found = state(tmp_path / "linear", "transfer")["metrics"]
    assert len(found["error_of_head"]) == 4 and found["loss"][-1] < found["loss"][0]
    refused = linearize("check", recipe_of("t5", ANSWERS, evaluate=None, data=running))
    assert refused.code == 2 and "data.train: " in refused.stderr and "no <extra_id_0>; name a column" in refused.stderr


class Words:
    """A tokenizer of numbers: 20 is its end."""

    eos_token_id = 20

    def get_vocab(self):
        return {SENTINEL.format(number): 100 + number for number in range(30)}


@given(length=st.integers(2, 150), seed=st.integers(0, 99))
def test_what_is_hidden_can_be_put_back(length, seed):
    config = T5Config(pad_token_id=0, decoder_start_token_id=7)
    ids = torch.randint(21, 99, (length,), generator=torch.Generator().manual_seed(seed))
    item = HiddenSpans(Words(), config)(ids, random.Random(seed))
    read, labels = item["input_ids"].tolist(), item["labels"].tolist()
    assert read.pop() == labels.pop() == 20
    assert item["decoder_input_ids"].tolist() == [7, *item["labels"].tolist()[:-1]]
    spans, answer = {}, None
    for token in labels:
        if token >= 100:
            answer = spans[token] = []
        else:
            answer.append(token)
    assert all(spans.values()) and sorted(spans) == [*spans]
    assert sum(map(len, spans.values())) == max(1, round(0.15 * length))
    assert [x for token in read for x in spans.get(token, [token])] == ids.tolist()


def test_examples_are_put_together_as_the_tokenizer_does_or_with_an_end_each(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    end, first, second = tokenizer.eos_token_id, *(tokenizer(text)["input_ids"] for text in ("the of and", "to in"))
    assert text_ids("the of and", None, tokenizer, 9) == [*first, end]
    assert text_ids("the of and", "to in", tokenizer, 9) == [*first, end, *second, end]
    assert text_ids("the of and", "to in", tokenizer, 5) == [first[0], end, *second, end]
    content = json.loads((tiny_model / "tokenizer.json").read_text())
    around = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("user", "assistant")]
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = {token: content["model"]["vocab"][token] for token in ("user", "assistant")}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [around[0], a, around[1]],
        "pair": [around[0], a, around[1], b, around[1]],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in ids.items()},
    }
    framed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    begin, sep = ids.values()
    assert text_ids("the of and", "to in", framed, 9) == [begin, *first, sep, *second, sep]
    assert ended([3, 4], framed) == [3, 4] and ended([3, end], tokenizer) == [3, end]


def test_batches_are_padded():
    config = T5Config(pad_token_id=5, decoder_start_token_id=7)
    batch = collated([([1, 2, 3], [8, 9]), ([1] * 9, [8])], config)
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 5).all()
    assert batch["labels"][0, :3].tolist() == [8, 9, -100] and (batch["labels"][1, 1:] == -100).all()
    assert batch["decoder_input_ids"][:, :4].tolist() == [[7, 8, 9, 5], [7, 8, 5, 5]]
    assert torch.equal(collated([([1], 1), ([2], 0)], config)["labels"], torch.tensor([1, 0]))


def test_examples_are_of_all_classes_whatever_their_order(tmp_path, tiny_model):
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the {number}", "label": number // 500}) for number in range(1000)))
    source = DataSource(source=str(path), label="label")
    data = DataSection(train=[source], heldout=[source])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    drawn = [read_examples("data.train", data, tokenizer, 8, Labels(["0", "1"]), 100, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Of a hundred coins, fewer than 30 heads come once in some 25000 times.
    assert 30 <= sum(label for _, label in drawn[0]) <= 70


def test_tables_are_read(linearize, recipe_of, data, tmp_path):
    """As GLUE's are written, quotes and all."""
    columns = {"field": "sentence", "label": "label"}
    for name in ("train", "heldout"):
        labels = heldout(data, "label")
        lines = [f'{text} "\t{int(label == "yes")}' for text, label in zip(heldout(data, "text"), labels, strict=True)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    sources = {name: {"source": str(tmp_path / f"{name}.tsv"), **columns} for name in ("train", "heldout")}
    path = recipe_of("bert", CLASSES, data=sources, transfer=None, export=None)
    converted(linearize, path, "finetune.steps=2")
    assert state(tmp_path / "run", "load")["metrics"]["labels"] == ["0", "1"]
    files = sorted(file.name for file in (tmp_path / "run" / "finetune").glob("*.safetensors"))
    assert any("classifier" in name for name in load_file(tmp_path / "run" / "finetune" / files[0]))


@pytest.mark.parametrize(
    ("family", "head", "changes", "expected"),
    [
        ("bert", CLASSES, {"medusa": {"steps": 1}}, "medusa: heads guess next tokens of a text"),
        ("bert", CLASSES, {"evaluate": {}}, "evaluate.copying: goes on with a text"),
        ("t5", ANSWERS, {"finetune": {"steps": 1, "recall": 0.5}}, "finetune.recall: "),
        ("t5", ANSWERS, {"transfer": {"steps": 1, "curriculum": [{"length": 4, "share": 1.0}]}}, "transfer.curriculum"),
        ("t5", ANSWERS, {"model": {"labels": ["a", "b"]}}, "model.labels: only head: sequence-classification tells"),
        ("bert", ANSWERS, {}, "BertConfig is not the configuration of an encoder-decoder"),
        ("bert", CLASSES, {"attention": ATTENTION | {"cross": "linear"}}, "attends to no other sequence"),
    ],
)
def test_what_examples_cannot_do(linearize, recipe_of, family, head, changes, expected):
    result = linearize("check", recipe_of(family, head, **changes))
    assert result.code == 2 and expected in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    ("head", "columns", "expected"),
    [
        ("causal-lm", {"label": "label"}, "data: train.0.label: is for model.head: sequence-classification; leave it"),
        ("causal-lm", {"target": "answer"}, "data: train.0.target: is for model.head: seq2seq-lm"),
        (ANSWERS, {"target": "answer", "second": "rest"}, "data: train.0.second: is for model.head: sequence-class"),
        (CLASSES, {}, "data: train.0.label: required, the column with a text's class"),
        (CLASSES, {"label": "kind"}, "has no field 'kind'; its fields are text, rest, label, answer"),
        (ANSWERS, {}, "evaluate: measures answers, of which data.heldout has none"),
        (ANSWERS, {"target": "summary"}, "has no field 'summary'"),
    ],
)
def test_columns_that_do_not_fit(linearize, recipe_of, data, head, columns, expected):
    sources = {name: {"source": str(data / f"{name}.jsonl"), **columns} for name in ("train", "heldout")}
    result = linearize("check", recipe_of("t5", head, data=sources))
    assert result.code == 2 and expected in result.stderr and result.stderr.count("\n") == 1, result.stderr
