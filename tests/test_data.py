"""Data: documents become token ids, and token ids become packed sequences."""

import json
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from linearize.convert.context import StageError
from linearize.convert.data import Documents, PackedDataset, check_tokenizer, documents, pack, token_stream
from linearize.recipes.corpora import DataSource

WORDS = ["<unk>", "<eos>", "<bos>", "user", "assistant", "system", "a", "b", "c"]
UNK, EOS, BOS, USER, ASSISTANT, SYSTEM, A, B, C = range(9)
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | list[dict]) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        return str(path)

    return write


def test_text_file(write, tokenizer):
    source = DataSource(source=write("x.txt", "a b\n\nc\f \n\fb"))
    assert list(documents(source, tokenizer)) == [[A, B, C, EOS], [B, EOS]]


def test_builtin_data_are_two_whole_books(tokenizer):
    train, heldout = ([*documents(DataSource(source=f"builtin:{n}"), tokenizer)] for n in ("train", "heldout"))
    assert len(train) == len(heldout) == 1
    assert len(train[0]) > 50_000 and len(heldout[0]) > 8192


def test_special_tokens_are_the_tokenizers_own(write, tokenizer):
    source = DataSource(source=write("x.txt", "a b"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    assert list(documents(source, tokenizer)) == [[BOS, A, B, EOS]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.eos_token = None
    assert list(documents(source, tokenizer)) == [[A, B]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_text(write, tmp_path, tokenizer, kind):
    rows = [{"story": "a b"}, {"story": "  "}, {"story": None}, {"story": "c"}]
    path = write("x.jsonl", rows)
    if kind == "parquet":
        import datasets

        path = str(tmp_path / "x.parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert list(documents(DataSource(source=path, field="story"), tokenizer)) == [[A, B, EOS], [C, EOS]]


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}],
    ],
)
def test_chat(write, tokenizer, chat):
    source = DataSource(source=write("x.jsonl", [{"chat": chat}, {"chat": []}]), field="chat")
    with pytest.raises(ValueError) as caught:
        list(documents(source, tokenizer))
    assert str(caught.value) == f"{source.source} holds chat messages, but the tokenizer has no chat template"
    tokenizer.chat_template = TEMPLATE
    assert list(documents(source, tokenizer)) == [[SYSTEM, A, USER, B, ASSISTANT, C, EOS]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"txt": "a", "id": 1}], "{} has no field 'text'; its fields are txt, id"),
        ([{"text": 3}], "field 'text' of {} holds int, not text or chat messages"),
        ([{"text": ["a"]}], "field 'text' of {} holds list, not text or chat messages"),
        (
            [{"text": [{"who": "user", "what": "a"}]}],
            "field 'text' of {} holds messages of who, what, not of role, content or from, value",
        ),
        ([{"text": " "}], "{} has no documents"),
    ],
)
def test_rows_that_are_no_documents(write, tokenizer, rows, expected):
    tokenizer.chat_template = TEMPLATE
    source = DataSource(source=write("x.jsonl", rows))
    with pytest.raises(ValueError) as caught:
        list(documents(source, tokenizer))
    assert str(caught.value) == expected.format(source.source)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    length=st.integers(1, 12),
)
def test_pack(sizes, length):
    # Each token is different, so that a token tells its document and its place there.
    ends = torch.tensor(sizes).cumsum(0).tolist()
    corpus = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    first_tokens = {document[0] for document in corpus}
    total = sum(sizes)
    if total < length:
        with pytest.raises(ValueError, match=f"^the data has {total} tokens, but one sequence needs {length}$"):
            list(pack(corpus, length))
        return
    sequences = list(pack(corpus, length))
    assert len(sequences) == total // length
    assert torch.cat([s["input_ids"] for s in sequences]).tolist() == list(chain(*corpus))[: total // length * length]
    for sequence in sequences:
        ids, positions, labels = (sequence[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        for i, token in enumerate(ids):
            starts = i == 0 or token in first_tokens
            assert positions[i] == (0 if starts else positions[i - 1] + 1)
            assert labels[i] == (-100 if starts else token)
        assert all(tensor.dtype == torch.long and tensor.shape == (length,) for tensor in sequence.values())


def test_pack_without_documents():
    with pytest.raises(ValueError, match="^the data has 0 tokens, but one sequence needs 4$"):
        list(pack([], 4))


def test_packed_dataset_wraps_around_and_is_repeatable(write, tokenizer):
    sources = [DataSource(source=write("x.txt", "a b c a b c a"))]
    dataset = PackedDataset(sources, tokenizer, length=3, size=5)
    assert [item["input_ids"].tolist() for item in dataset] == [[A, B, C], [A, B, C]] * 2 + [[A, B, C]]
    assert len(dataset) == 5
    again = PackedDataset(sources, tokenizer, length=3, size=5)
    assert all(torch.equal(dataset[i][name], again[i][name]) for i in range(5) for name in dataset[i])
    with pytest.raises(IndexError):
        dataset[5]


def test_packed_dataset_takes_sources_in_turns(write, tokenizer):
    sources = [DataSource(source=write("x.txt", "a\fa\fa")), DataSource(source=write("y.txt", "b"))]
    dataset = PackedDataset(sources, tokenizer, length=8, size=1)
    assert dataset[0]["input_ids"].tolist() == [A, EOS, B, EOS, A, EOS, A, EOS]


@pytest.fixture
def counting(tokenizer):
    """A tokenizer that notes what it is given in `.calls`."""

    def counting(text, **kwargs):
        counting.calls.append(text)
        return tokenizer(text, **kwargs)

    counting.calls, counting.eos_token_id = [], EOS
    return counting


def test_packed_dataset_reads_no_more_than_it_needs(write, counting):
    sources = [DataSource(source=write(f"{i}.txt", "\f".join(["a b c"] * 100))) for i in range(4)]
    assert len(PackedDataset(sources, counting, length=4, size=3)) == 3
    assert len(counting.calls) == 3


def test_documents_are_tokenized_once_and_when_asked_for(write, counting):
    kept = Documents(DataSource(source=write("x.txt", "a b\fb\fc")), counting)
    assert not counting.calls
    assert next(iter(kept)).tolist() == [A, B, EOS] and len(counting.calls) == 1
    for _ in range(2):
        assert [ids.tolist() for ids in kept] == [[A, B, EOS], [B, EOS], [C, EOS]]
    assert len(counting.calls) == 3


def test_a_glance_reads_the_beginning_of_a_text(write, counting):
    source = DataSource(source=write("x.txt", " \n a b c a b c\fb"))
    assert list(documents(source, counting, characters=3)) == [[A, B, EOS], [B, EOS]]


def test_packed_dataset_raises_what_its_data_raise(write, tokenizer):
    with pytest.raises(ValueError, match="^the data has 2 tokens, but one sequence needs 4$"):
        PackedDataset([DataSource(source=write("x.txt", "a"))], tokenizer, length=4, size=1)
    with pytest.raises(ValueError, match="has no documents$"):
        PackedDataset([DataSource(source=write("y.txt", " "))], tokenizer, length=4, size=1)


def test_token_stream_joins_documents_as_they_come(write, tokenizer):
    first = DataSource(source=write("1.txt", "a b\fc"))
    second = DataSource(source=write("2.txt", "b c b"))
    joined = [A, B, EOS, B, C, B, EOS, C, EOS]
    assert token_stream("data.heldout", [first, second], tokenizer, 100).tolist() == joined
    assert token_stream("data.heldout", [first, second], tokenizer, 4).tolist() == joined[:4]
    blank = DataSource(source=write("blank.txt", " \n"))
    with pytest.raises(StageError, match="data.heldout: .*blank.txt has no documents"):
        token_stream("data.heldout", [blank], tokenizer, 4)


def test_check_tokenizer(tokenizer):
    check_tokenizer(tokenizer, len(WORDS))
    with pytest.raises(ValueError, match="^tokenizer has 9 tokens but the model's embedding has 8 rows$"):
        check_tokenizer(tokenizer, 8)
