"""Probes: every token asked for was told where they say, and nothing easier gives it away."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from linearize.convert import probes
from linearize.convert.data import token_stream
from linearize.recipes.corpora import DataSource


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    """The tiny model's, with a token for each pass key that is drawn here: to it numbers are unknown."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([str(random.Random(seed).randrange(10**4, 10**5)) for seed in range(4)])
    return tokenizer


@pytest.fixture(scope="module")
def stream(tokenizer):
    return token_stream("data", [DataSource(source="builtin:heldout")], tokenizer, 2000)


def test_windows_do_not_overlap_and_drop_the_rest():
    assert probes.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="11 tokens are more than the 10 held-out tokens"):
        probes.windows(torch.arange(10), 11)


def test_copies_ask_for_all_but_the_first_token_of_the_second_time():
    first, second = probes.copies(torch.arange(100), 2, 5)
    assert first.ids.tolist() == [0, 1, 2, 3, 4] * 2 and second.ids.tolist() == [5, 6, 7, 8, 9] * 2
    assert first.ids[first.asked].tolist() == [1, 2, 3, 4]
    assert torch.equal(first.ids[first.asked], first.ids[first.asked - first.distance])
    with pytest.raises(ValueError, match="3 texts of 40 tokens are more than the 100 held-out tokens"):
        probes.copies(torch.arange(100), 3, 40)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_passkey_is_told_at_its_depth_and_asked_at_the_end(tokenizer, stream, depth):
    probe = probes.passkey(tokenizer, stream, 200, depth, seed=3)
    assert len(probe.ids) == 200
    key = tokenizer.decode(probe.ids[probe.asked]).strip()
    assert len(key) == 5 and key.isdigit()
    assert probe.asked[-1] == 199
    # Told twice in the needle and nowhere else before the question.
    told = [i for i in range(200) if tokenizer.decode(probe.ids[i]).strip() == key]
    assert len(told) == 3
    begin = told[2] - probe.distance[0].item()
    assert begin < told[0] < told[1] < begin + 15
    needle = len(tokenizer(probes.NEEDLE.format(key=key))["input_ids"])
    asking = len(tokenizer(f"{probes.QUESTION} {key}")["input_ids"])
    assert begin == round(depth * (200 - needle - asking))
    # The rest is text of the stream as it stands there.
    filler = torch.cat([probe.ids[:begin], probe.ids[begin + needle : 200 - asking]])
    assert any(torch.equal(filler, stream[i : i + len(filler)]) for i in range(len(stream)))


def test_passkey_is_another_for_another_seed_alone(tokenizer, stream):
    first, again, other = (probes.passkey(tokenizer, stream, 150, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids[first.asked], other.ids[other.asked])


def test_passkey_that_does_not_fit(tokenizer, stream):
    with pytest.raises(ValueError, match="20 tokens do not hold the .* of the pass key and its question"):
        probes.passkey(tokenizer, stream, 20, 0.5, 0)
    with pytest.raises(ValueError, match="5000 tokens are more than the 2000 held-out tokens fill"):
        probes.passkey(tokenizer, stream, 5000, 0.5, 0)


def test_recall_asks_each_value_once_after_its_key(tokenizer, stream):
    probe = probes.recall(tokenizer, probes.words_of(tokenizer, stream), 8, seed=0)
    ids = probe.ids.tolist()
    # This tokenizer has no newlines: a line is key, colon, value.
    lines = [tuple(ids[i : i + 3]) for i in range(0, len(ids), 3)]
    first, second, third = lines[:8], lines[8:16], lines[16:]
    assert set(first) == set(second) == set(third)
    assert first != second and second != third
    assert len({token for line in first for token in (line[0], line[2])}) == 16
    assert probe.asked.tolist() == [48 + 3 * i + 2 for i in range(8)]
    told = probe.asked - probe.distance
    assert torch.equal(probe.ids[told], probe.ids[probe.asked])
    assert ((told >= 24) & (told < 48)).all()


def test_recall_without_enough_words(tokenizer):
    with pytest.raises(ValueError, match="8 pairs need 16 words of one token, the held-out text has 15"):
        probes.recall(tokenizer, list(range(15)), 8, 0)


def test_words_are_whole_words_of_the_stream(tokenizer):
    vocabulary = tokenizer.get_vocab()
    text = [vocabulary[word] for word in ("the", "of", "the", "and", "<unk>", "<eos>")]
    assert probes.words_of(tokenizer, torch.tensor(text)) == [vocabulary["the"], vocabulary["and"]]


def test_far_repeats():
    #      0  1  2  3  4  5  6  7  8  9 10 11 12
    ids = [1, 2, 3, 7, 8, 1, 2, 3, 9, 1, 2, 3, 4]
    # 3 at 7 was told at 2 (5 - 1 = 4 before the token that predicts it), 3 at 11 at 7 (3 before).
    assert probes.far_repeats(ids, 2).nonzero().flatten().tolist() == [7, 11]
    assert probes.far_repeats(ids, 3).nonzero().flatten().tolist() == [7]
    assert probes.far_repeats(ids, 4).nonzero().flatten().tolist() == []


def test_doubling():
    assert list(probes.doubling(64)) == [(0, 64)]
    assert list(probes.doubling(129)) == [(0, 64), (64, 128), (128, 256)]
