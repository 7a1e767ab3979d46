"""The tree that makes the fewest steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.convert.tree import Places, grown, tokens_per_step
from linearize.layers.draft import COPY, RANKS, DraftTree


def places_of(right, *lengths):
    return Places(right, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))


def test_grown_trees():
    right = torch.zeros(10, 2, RANKS + 1, dtype=torch.bool)
    # Depth 1: the first guess at 6 of 10 places, the second at 2 others, the copied one where the first is, and at 1.
    right[:6, 0, 0] = right[6:8, 0, 1] = right[:5, 0, COPY] = right[8, 0, COPY] = True
    # Depth 2: at half of the former 6, and the copied one at the latter 2.
    right[:3, 1, 0] = right[6:8, 1, COPY] = True
    # Each place is taken twelve times, as a text of three places in which nothing is right behind it.
    alone = torch.zeros(10, 3, 2, RANKS + 1, dtype=torch.bool)
    alone[:, 0] = right
    places = places_of(alone.flatten(0, 1), *10 * [3])
    paths = grown(places, 4)
    assert paths == [[0], [0, 0], [1]]
    tree = DraftTree.of(paths)
    assert tokens_per_step(tree, places) == pytest.approx(30 / (30 - 6 - 3 - 2))
    assert grown(places, 5) == [*paths, [1, COPY]]
    # What adds nothing is left out.
    whole = DraftTree.of(grown(places, 99))
    assert whole.paths == [[0], [1], [COPY], [0, 0], [1, COPY]] and whole.heads == 2
    assert tokens_per_step(whole, places) == pytest.approx(30 / (30 - 9 - 5))
    assert tree.ancestors.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.ways.tolist() == [[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 1, 3]]


def test_a_text_that_repeats_itself_takes_few_steps():
    """At 30 places all copies are right, at 20 the first guess of a head: it saves more steps than a fourth copy."""
    right = torch.zeros(50, 10, RANKS + 1, dtype=torch.bool)
    right[:30, :, COPY] = right[30:, 0, 0] = True
    places = places_of(right, 30, 20)
    assert grown(places, 4) == [[COPY], [0], [COPY, COPY]]
    tree = DraftTree.of([[0], [COPY], [COPY, COPY]])
    # 10 steps of three tokens, and 10 of two.
    assert tokens_per_step(tree, places) == 50 / 20


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=1, max_size=4))
def test_walks(texts):
    """Step by step, text by text."""
    accepted = [x for text in texts for x in text]
    places = places_of(torch.empty(len(accepted), 0, 0), *map(len, texts))
    begins, steps = places.walk(torch.tensor(accepted))
    expected, left = [], []

    def rest(text, place):
        return 0 if place >= len(text) else 1 + rest(text, place + text[place])

    for text in texts:
        at, way = 0, set()
        while at < len(text):
            way.add(at)
            at += text[at]
        expected += [place in way for place in range(len(text))]
        left += [rest(text, place) for place in range(len(text))]
    assert begins.tolist() == expected and steps.tolist() == [*left, 0]
