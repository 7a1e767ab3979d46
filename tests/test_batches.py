"""Training data: micro batches that are functions of the seed and their number."""

import random
import re
from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.convert.batches import REPEATED_PARTS, TrainingBatches, read_evenly, repeat_parts, shared
from linearize.convert.context import StageError
from linearize.convert.data import pack
from linearize.convert.facts import ASKED, THINGS, TOKENS_PER_FACT, TOLD, plant_facts
from linearize.convert.probes import NEEDLE, QUESTION
from linearize.recipes.training import Training


def batches(documents, seed=0, **section):
    return TrainingBatches([map(torch.tensor, documents)], Training(**{"lr": 1.0, **section}), seed)


def corpus(*sizes):
    """Documents of tokens that are all different."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    length=st.integers(2, 12),
    steps=st.integers(1, 4),
    micro=st.sampled_from([None, 1, 2]),
)
def test_without_a_curriculum_they_are_the_packed_sequences_shuffled_over_and_over(sizes, length, steps, micro):
    section = {"length": length, "steps": steps, "batch_size": 2, "micro_batch_size": micro}
    if sum(sizes) < length:
        with pytest.raises(ValueError, match=f"^the data has {sum(sizes)} tokens, but one sequence needs {length}$"):
            batches(corpus(*sizes), **section)
        return
    sequences = list(pack(corpus(*sizes), length))
    data = batches(corpus(*sizes), **section)
    rows = [{name: x[row] for name, x in data[i].items()} for i in range(len(data)) for row in range(micro or 2)]
    assert len(rows) == steps * 2
    # Tokens are all different, so the first one tells the sequence.
    place = {sequence["input_ids"][0].item(): i for i, sequence in enumerate(sequences)}
    order = [place[row["input_ids"][0].item()] for row in rows]
    assert all(same(row, sequences[i]) for row, i in zip(rows, order, strict=True))
    assert len(set(order[: len(sequences)])) == min(len(sequences), len(rows))
    assert all(again == before for again, before in zip(order[len(sequences) :], order, strict=False))


def test_a_curriculum_reads_on_with_the_same_tokens_per_step():
    phases = [{"length": 4, "share": 0.5}, {"length": 16, "share": 0.25}, {"length": 8, "share": 0.25}]
    data = batches(corpus(256), steps=8, batch_size=4, micro_batch_size=2, length=8, curriculum=phases)
    assert [tuple(item["input_ids"].shape) for item in data] == [(4, 4)] * 8 + [(1, 16)] * 4 + [(2, 8)] * 4
    read = torch.cat([item["input_ids"].flatten() for item in data])
    assert sorted(read.tolist()) == list(range(8 * 32))
    # Shorter sequences are cut from shuffled ones of the longest phase.
    assert all(torch.equal(x, x[0] + torch.arange(16)) and x[0] % 16 == 0 for x in read.split(16))
    assert all((item["position_ids"][:, 0] == 0).all() and (item["labels"][:, 0] == -100).all() for item in data)


def test_a_curriculum_over_few_tokens_begins_them_again():
    phases = [{"length": 2, "share": 0.5}, {"length": 8, "share": 0.5}]
    data = batches(corpus(11), steps=2, batch_size=1, length=8, curriculum=phases)
    assert data[0]["input_ids"].flatten().tolist() == list(range(8))
    assert data[1]["input_ids"].tolist() == [list(range(8))]


def test_no_more_is_read_than_the_stage_needs():
    def endless():
        while True:
            yield [1, 2, 3]

    assert len(batches(endless(), steps=3, batch_size=2, length=4)) == 3
    numbers = count()
    assert len(read_evenly([([next(numbers)] for _ in range(100))], 5)) == 5 and next(numbers) == 5
    with pytest.raises(IndexError):
        batches(endless(), steps=3, batch_size=2, length=4)[3]


def test_sources_give_equal_shares_of_whole_documents():
    def source(name, *sizes):
        return iter([torch.full((size,), name) for size in sizes])

    def shares(*sources, tokens):
        return dict(Counter(torch.cat(read_evenly(sources, tokens)).tolist()))

    # A book is one document; the others still give their share.
    assert shares(source(0, 90), source(1, *[10] * 9), source(2, *[2] * 40), tokens=60) == {0: 90, 1: 20, 2: 20}
    # What one lacks comes from the others.
    assert shares(source(0, 5), source(1, *[10] * 9), tokens=60) == {0: 5, 1: 60}
    assert shares(source(0, 5), source(1, 10), tokens=60) == {0: 5, 1: 10}


def test_sequences_come_from_everywhere_in_an_order_of_the_seed():
    books = corpus(4000, 4000)
    section = Training(lr=1.0, steps=20, batch_size=2, length=16)

    def first_tokens(seed):
        data = TrainingBatches([map(torch.tensor, [book]) for book in books], section, seed)
        return [row[0].item() for item in data for row in item["input_ids"]]

    read = first_tokens(0)
    assert read == first_tokens(0) != first_tokens(1)
    assert len(set(read)) == 40 and read != sorted(read)
    # 40 sequences fall on the 8 parts at random: a part left out has odds of 1 : 26.
    assert len({token // 1000 for token in read}) >= 7


@pytest.mark.parametrize("micro", [None, 1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_sequences_of_a_step(count, micro):
    """Each takes every so many of the passes, in which a step has the sequences that one process gives it."""
    section = Training(
        lr=1.0, steps=4, batch_size=8, micro_batch_size=micro, length=4,
        curriculum=[{"length": 2, "share": 0.5}, {"length": 4, "share": 0.5}],
    )  # fmt: skip

    def steps(section):
        data = TrainingBatches([map(torch.tensor, corpus(400))], section, 0)
        ids = torch.cat([item["input_ids"].flatten() for item in data])
        return len(data), ids.view(4, -1)

    part = shared("transfer", section, count)
    (passes, ids), (_, whole) = steps(part), steps(section)
    assert passes % (4 * count) == 0 and (micro is None or part.micro_batch_size <= micro)
    assert torch.equal(ids, whole)


def test_what_processes_cannot_share():
    section = Training(lr=1.0, steps=4, batch_size=6, length=4, curriculum=[{"length": 12, "share": 1.0}])
    with pytest.raises(StageError, match="transfer.batch_size: 4 processes cannot share the 6 sequences of a step"):
        shared("transfer", section, 4)
    with pytest.raises(StageError, match="sequences of 12 do not fill the 8 tokens that each of 3"):
        shared("finetune", section, 3)


def test_an_offset_moves_whole_sequences():
    plain = batches(corpus(37, 90), steps=50, batch_size=2, length=16)
    moved = batches(corpus(37, 90), steps=50, batch_size=2, length=16, position_offset=5)
    offsets = []
    for before, after in zip(plain, moved, strict=True):
        offset = after["position_ids"] - before["position_ids"]
        assert (offset == offset[:, :1]).all()
        offsets += offset[:, 0].tolist()
        assert torch.equal(before["labels"], after["labels"])
    assert set(offsets) == set(range(6))


def test_draws_depend_on_seed_and_place_alone():
    section = {"steps": 20, "batch_size": 2, "length": 32, "recall": 0.5, "position_offset": 100}
    one, again = batches(corpus(500), **section), batches(corpus(500), **section)
    # In another order, as after an interruption.
    assert all(same(again[i], one[i]) for i in reversed(range(20)))
    other = batches(corpus(500), seed=1, **section)
    assert not all(same(other[i], one[i]) for i in range(20))
    # The third time over the same text, other parts of it are repeated.
    few = batches(corpus(64), **section)
    assert not same(few[0], few[1])


@given(length=st.integers(2, 200), seed=st.integers(0, 1000))
def test_parts_are_repeated_further_on(length, seed):
    repeated = repeat_parts(torch.arange(length), random.Random(seed))
    changed = (repeated != torch.arange(length)).nonzero().flatten()
    assert len(changed)
    distance = max(1, length // 8)
    # What stands in another's place stood, or was itself repeated, far enough before.
    assert (repeated[changed] <= changed - distance).all()
    # Whole parts: each adds two breaks, its ends, to those that what it repeats has.
    breaks = (repeated[1:] != repeated[:-1] + 1).sum()
    assert breaks < 2 ** (REPEATED_PARTS + 1)


def test_short_and_long_parts_are_repeated():
    sizes = set()
    for seed in range(200):
        repeated = repeat_parts(torch.arange(1024), random.Random(seed))
        sizes.add((repeated != torch.arange(1024)).sum().item().bit_length())
    assert {8, 9, 10} <= sizes


def test_recall_sequences_are_one_document_and_as_many_as_asked():
    documents = corpus(*[7] * 400)
    plain = batches(documents, steps=100, batch_size=1, length=16)
    mixed = batches(documents, steps=100, batch_size=1, length=16, recall=0.3)
    count = 0
    for before, after in zip(plain, mixed, strict=True):
        if not same(before, after):
            count += 1
            assert after["position_ids"][0].tolist() == list(range(16))
            assert after["labels"][0].tolist() == [-100, *after["input_ids"][0, 1:].tolist()]
    # 100 draws at 0.3: five standard deviations are 23.
    assert 7 < count < 53


class Words:
    """A tokenizer of words, numbers and marks, from 10 000 on as they come, that can be read back."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens):
        words = re.findall(r"[\w'-]+|[^\w\s]|\s+", text)
        return {"input_ids": [self.ids.setdefault(word, 10_000 + len(self.ids)) for word in words]}

    def decode(self, ids):
        words = dict(zip(self.ids.values(), self.ids, strict=True))
        return "".join(words[i] for i in ids)


def sentences(planted, words):
    """(where it begins, where it ends, text) of what was planted into tokens 0, 1, 2, ..."""
    new = [i for i, token in enumerate(planted.tolist()) if token != i]
    starts = [i for i in new if i - 1 not in new]
    ends = [i + 1 for i in new if i + 1 not in new]
    for start, end in zip(starts, ends, strict=True):
        yield start, end, words.decode(planted[start:end].tolist())


def pattern(sentence):
    """Of a sentence that has a thing and a value."""
    escaped = re.escape(sentence).replace(r"\{thing\}", "(?P<thing>.+)").replace(r"\{Thing\}", "(?P<thing>.+)")
    return re.compile(r"\s+" + escaped.replace(r"\{value\}", r"(?P<value>[\w-]+( [a-z]+)?)") + r"\s+")


def fact(text):
    """All that a sentence may be saying: (thing, value) pairs."""
    found = [pattern(wording).fullmatch(text) for wording in TOLD + ASKED]
    return {(match["thing"].lower(), match["value"]) for match in found if match}


@given(length=st.integers(2, 4096), seed=st.integers(0, 1000))
def test_facts_are_told_once_and_asked_for_far_later(length, seed):
    words = Words()
    text = torch.arange(length)
    planted = plant_facts(text, random.Random(seed), words)
    assert torch.equal(text, torch.arange(length)) and len(planted) == length
    assert (len(words.ids) > 0) == (length >= TOKENS_PER_FACT)
    # Sentences that touch are told apart by no means, so there may be fewer.
    last = {}
    for start, end, sentence in sentences(planted, words):
        facts = fact(sentence)
        assert all(start - last[known] >= length / 8 for known in facts & last.keys())
        last |= dict.fromkeys(facts, end)


def test_most_facts_are_asked_for_and_whole():
    words = Words()
    asked = Counter()
    for seed in range(20):
        planted = plant_facts(torch.arange(2048), random.Random(seed), words)
        seen = [fact(sentence) for _, _, sentence in sentences(planted, words)]
        counts = Counter(known for facts in seen for known in facts)
        asked[sum(count > 1 for count in counts.values())] += 1
        # All but those that touch are sentences from their beginning to their end.
        assert sum(map(bool, seen)) >= 0.7 * len(seen) >= 6
    assert min(asked) >= 2 and asked.total() == 20


def test_facts_depend_on_seed_and_place_alone():
    words = Words()
    section = Training(lr=1.0, steps=20, batch_size=2, length=256, facts=0.5)

    def read(seed):
        return TrainingBatches([map(torch.tensor, corpus(4000))], section, seed, tokenizer=words)

    one, again = read(0), read(0)
    # In another order, as after an interruption.
    assert all(same(again[i], one[i]) for i in reversed(range(20)))
    plain = batches(corpus(4000), steps=20, batch_size=2, length=256)
    rows = [
        (before, after)
        for i in range(20)
        for before, after in zip(plain[i]["input_ids"], one[i]["input_ids"], strict=True)
    ]
    changed = [not torch.equal(before, after) for before, after in rows]
    # 40 draws at 0.5: five standard deviations are 16.
    assert 4 < sum(changed) < 36
    # Another seed, other facts.
    facts = [{token for item in read(seed) for token in item["input_ids"].flatten().tolist()} for seed in (0, 1)]
    assert max(facts[0]) >= 10_000 and facts[0] != facts[1]


def test_sequences_with_facts_are_one_document():
    section = Training(lr=1.0, steps=10, batch_size=1, length=256, facts=1.0)
    for item in TrainingBatches([map(torch.tensor, corpus(*[7] * 400))], section, seed=0, tokenizer=Words()):
        assert item["position_ids"][0].tolist() == list(range(256))
        assert item["labels"][0].tolist() == [-100, *item["input_ids"][0, 1:].tolist()]


def test_facts_are_not_in_the_words_of_what_is_measured():
    said = " ".join([*TOLD, *ASKED, *(name for name, _ in THINGS)]).lower()
    measured = set(re.findall(r"[a-z]+", f"{NEEDLE} {QUESTION}".lower().replace("{key}", "")))
    assert measured >= {"pass", "key", "remember"}
    assert set(re.findall(r"[a-z]+", said)) & measured <= {"the", "is", "it", "what"}
    # Nor is its question, which names the thing once more before the value.
    assert not any(re.search(r"what is .*\? \{thing\} is", wording.lower()) for wording in TOLD + ASKED)
