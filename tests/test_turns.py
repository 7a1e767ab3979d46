"""Texts that take turns on the same graphs go on as each would alone: on a GPU, and without one by stand-ins."""

from copy import deepcopy

import pytest
import torch
from transformers.generation import StoppingCriteria

from linearize.layers import graphs
from linearize.layers.cache import LinearCache
from linearize.layers.config import PRESETS

from .layers import memory_of, row_of
from .test_decoding import HYBRID, ON_GPU, Listener, use_ours, use_stand_ins, use_steps
from .test_speculative import SMALL, make


@pytest.fixture(params=["stand-ins", pytest.param("cuda", marks=ON_GPU)])
def talk(request, monkeypatch):
    """A model, and how it goes on with a text [B, T] by graphs, or by steps: `generate`'s output with the cache."""
    device = "cpu" if request.param == "stand-ins" else "cuda"

    def begin(kept=None):
        if device == "cuda":
            model = make(PRESETS["augmented"], kept=kept).float().cuda()
        else:
            model = make(SMALL["augmented"], kept=kept)
            use_ours(monkeypatch)

        def go_on(ids, by_graphs=True, **keywords):
            settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            with monkeypatch.context() as patch:
                if not by_graphs:
                    use_steps(patch)
                elif device == "cpu":
                    use_stand_ins(patch)
                return model.generate(
                    ids.to(device), return_dict_in_generate=True, **settings | {"use_cache": True} | keywords
                )

        return model, go_on

    return begin


def whole(rows, length, seed):
    """Rows without padding."""
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def free_places(model):
    places = {id(each.place): each.place for each in graphs._graphs[model].values()}.values()
    assert not any(place.taken for place in places)
    return list(places)


@pytest.mark.parametrize("kept", [None, HYBRID], ids=["pure", "hybrid"])
def test_conversations_take_turns(kept, talk):
    """Each goes on from its own cache, whatever graphs did in between; also where it was cropped, or left by steps."""
    model, go_on = talk(kept)

    def converse(by_graphs):
        """What is said in turn, and what the caches hold in the end."""
        said, caches = [], {}
        for turn, (name, rows, length) in enumerate([
            ("one", 1, 30), ("two", 1, 20), ("three", 3, 20), ("one", 1, 9), ("three", 3, 40), ("two", 1, 3),
            ("cropped", 1, 5), ("four", 3, 25), ("one", 1, 5), ("steps", 1, 20), ("two", 1, 7), ("steps", 1, 20),
        ]):  # fmt: skip
            ids, cache = whole(rows, length, turn), None
            if name == "cropped":
                ids, cache = torch.cat([said[3][:, :-3].cpu(), ids], dim=1), deepcopy(caches["one"][1])
                cache.crop(-4)
            elif name in caches:
                before, cache = caches[name]
                ids = torch.cat([said[before].cpu(), ids], dim=1)
            out = go_on(ids, by_graphs and not (name == "steps" and cache is None), past_key_values=cache)
            said.append(out.sequences)
            caches[name] = turn, out.past_key_values
        return said, [cache for _, cache in caches.values()]

    expected, wanted = converse(False)
    for _ in range(2):
        said, found = converse(True)
        for turn, (x, y) in enumerate(zip(said, expected, strict=True)):
            assert torch.equal(x, y), turn
        places = {x.data_ptr() for place in free_places(model) for x in place.cache.tensors() if x.numel()}
        for ours, theirs in zip(found, wanted, strict=True):
            assert not places & {x.data_ptr() for x in ours.tensors()}
            for x, y in zip(ours.layers, theirs.layers, strict=True):
                assert torch.equal(x.length, y.length) and x.seen == y.seen
                for row in range(len(x.length)):
                    for a, b in zip(memory_of(row_of(x, row)), memory_of(row_of(y, row)), strict=True):
                        torch.testing.assert_close(a, b)
    # Prompts are read, and texts written, in the same caches: of one row and of three.
    kinds = [(key[1], each.place.key[1]) for key, each in graphs._graphs[model].items()]
    assert sorted((kind.__name__, rows) for kind, rows in kinds) == [
        ("Reading", 1), ("Reading", 3), ("Step", 1), ("Step", 3),
    ]  # fmt: skip
    assert len(free_places(model)) == 2


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kept", [None, HYBRID], ids=["pure", "hybrid"])
def test_a_text_that_was_interrupted_goes_on(kept, talk):
    model, go_on = talk(kept)
    ids, other = whole(1, 20, 0), whole(1, 25, 1)
    expected, others = (go_on(x, by_graphs=False).sequences for x in (ids, other))

    def interrupt():
        raise Interrupted

    # The first time steps and then chains are captured.
    for _ in range(3):
        for after in (21, 26):
            listener, cache = Listener(after, interrupt), LinearCache(model)
            with pytest.raises(Interrupted):
                go_on(ids, past_key_values=cache, streamer=listener)
            free_places(model)
            assert torch.equal(go_on(other).sequences, others)
            text = torch.tensor([listener.tokens])
            assert cache.length.tolist() == [after - 1]
            found = go_on(text, past_key_values=cache, max_new_tokens=32 - after).sequences
            assert torch.equal(found, expected)


def test_a_text_within_a_text(talk):
    """A streamer may have the model write something else in between."""
    model, go_on = talk()
    ids, other = whole(1, 20, 0), whole(1, 25, 1)
    expected, others = (go_on(x, by_graphs=False).sequences for x in (ids, other))
    for _ in range(3):
        within = []
        listener = Listener(25, lambda: within.append(go_on(other).sequences))  # noqa: B023
        assert torch.equal(go_on(ids, streamer=listener).sequences, expected)
        assert torch.equal(within[0], others)
        free_places(model)


def test_graphs_outlive_inference_mode(talk):
    model, go_on = talk()
    ids = whole(1, 20, 0)
    expected = go_on(ids, by_graphs=False).sequences
    with torch.inference_mode():
        first = [go_on(ids) for _ in range(2)]
    assert all(torch.equal(x.sequences, expected) for x in [*first, go_on(ids)])
    longer = torch.cat([expected.cpu(), ids], dim=1)
    found = go_on(longer, past_key_values=first[1].past_key_values)
    assert torch.equal(found.sequences, go_on(longer, by_graphs=False).sequences)


def test_steps_that_read_the_text_follow_a_graph(talk):
    """The prompt is read by a graph; steps that a criterion looks at go on from the cache itself."""
    model, go_on = talk(HYBRID)

    class Patient(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids, patient = whole(1, 20, 0), {"stopping_criteria": [Patient()]}
    expected = go_on(ids, by_graphs=False, custom_generate=model.speculate, **patient)
    for _ in range(2):
        go_on(ids)
        found = go_on(ids, custom_generate=model.speculate, **patient)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.past_key_values.length, expected.past_key_values.length)
        free_places(model)
