"""Draft trees verified by fused kernels, and what is accepted of them, equal the reference in double precision."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import Draft, LinearCache, LinearCacheLayer
from linearize.layers.kernels.fused import step

from .layers import ancestors_of
from .test_step import CONFIGS, DEVICE, TOLERANCES, random_layers

BRANCHING = ancestors_of([-1, 0, 0, 1, 2, 4, 5, 6, 3, -1])
CASES = {name: (config, 4, 2, BRANCHING) for name, config in CONFIGS.items()}
# A path of 20 nodes makes more keys far than are turned at once.
CASES["deep"] = replace(CONFIGS["augmented"], window_size=24), 2, 1, ancestors_of([*range(-1, 19), 4, 20, 0])
CASES["many nodes"] = CONFIGS["lolcats"], 3, 1, ancestors_of([-1, *(i // 2 for i in range(39))])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_trees(name, dtype, without_gradients):
    """A tree after a prompt, after steps, and after what was accepted of trees before; rows accept different paths,
    or nothing, until the ring has been full. One row begins within the sinks."""
    (config, heads, kv_heads, ancestors), tolerance = CASES[name], TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    dim, rows, prompt = 16, 3, 33
    nodes = len(ancestors)
    ancestors = ancestors.to(DEVICE)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer, exact = random_layers(config, heads, kv_heads, dim, normal)
    cache, wanted = LinearCacheLayer(config), LinearCacheLayer(config)

    def tokens(length):
        """As a model lays them out."""
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
        if config.rope == "before":
            sizes |= {"raw_q": heads, "raw_k": kv_heads, "sink_q": heads}
        return {name: normal(rows, length, n, dim).to(dtype).transpose(1, 2) for name, n in sizes.items()}

    def expected(x, **kwargs):
        return exact(**{name: y.double() for name, y in x.items()}, scale=0.3, cache=wanted, **kwargs)

    def fused(function, x, *rest):
        given = (x.get(name) for name in ("q", "k", "v", "raw_q", "raw_k", "sink_q"))
        return function(layer, cache, *given, 0.3, *rest)

    def error(actual, wanted):
        return (actual - wanted).norm() / wanted.norm()

    x = tokens(prompt)
    segments = torch.ones(rows, prompt, dtype=torch.long, device=DEVICE)
    segments[0, : prompt - 2] = 0
    layer(**x, scale=0.3, cache=cache, segments=segments)
    expected(x, segments=segments)
    assert step.refuses(layer, cache, nodes) is None
    deepest = ancestors[ancestors.sum(1).argmax()].nonzero().flatten()
    full = False
    for accepted in [5, "step", 5, 5, 5, len(deepest), 3]:
        if accepted == "step":
            x = tokens(1)
            assert error(fused(step.step, x), expected(x)) <= tolerance
            continue
        x = tokens(nodes)
        out, far = fused(step.verify, x, ancestors)
        assert error(out, expected(x, ancestors=ancestors)) <= tolerance
        path = deepest[:accepted].repeat(rows, 1)
        path[1, accepted // 5 :] = -1
        path[2, accepted - 1 :] = -1
        held = cache.count.clone()
        keys = {"k": x["k"], "v": x["v"]} | ({"raw": x["raw_k"]} if "raw_k" in x else {})
        cache.draft = Draft(keys, layer.far_keys, far)
        for either in (cache, wanted):
            either.accept(path)
        full |= cache.far is not None and (cache.count < held).any()
        assert torch.equal(cache.length, wanted.length)
        assert torch.equal(cache.segment, wanted.segment)
    assert full
    x = tokens(4)
    assert error(layer(**x, scale=0.3, cache=cache), expected(x)) <= tolerance
    assert cache.seen == wanted.seen
    for name in ("S", "z"):
        assert error(getattr(cache.state, name), getattr(wanted.state, name)) <= tolerance


@pytest.mark.parametrize("name, size", [*((name, 5) for name in CONFIGS), ("long chains", 20)])
def test_chains_from_nothing(name, size, without_gradients):
    """A prompt that is read chain by chain, of rows that end in different places, is the prompt read whole."""
    # Of 20 nodes more enter than leave the ring at once.
    config = replace(CONFIGS["augmented"], window_size=24) if size == 20 else CONFIGS[name]
    dtype, counts = torch.float32, [78, 64, 4] if size == 20 else [43, 30, 4]
    generator = torch.Generator().manual_seed(0)
    rows, length, dim = len(counts), max(counts) + 2, 16

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer, exact = random_layers(config, 4, 2, dim, normal)
    sizes = {"q": 4, "k": 2, "v": 2}
    if config.rope == "before":
        sizes |= {"raw_q": 4, "raw_k": 2, "sink_q": 4}
    x = {name: normal(rows, length, n, dim).transpose(1, 2) for name, n in sizes.items()}
    other, wanted = LinearCacheLayer(config), LinearCacheLayer(config)
    layer(**x, scale=0.3, cache=other)
    step.remember(layer, other)
    config = LlamaConfig(num_hidden_layers=1)
    modules = [SimpleNamespace(layer_idx=0, linear_attention=layer)]
    model = SimpleNamespace(is_encoder=False, config=config, linear_modules=lambda: modules)
    begun, known = LinearCache(model), LinearCache(model)
    known.layers = [other]
    begun.take(known)
    begun.clear()
    (cache,) = begun.layers

    index = torch.arange(size, device=DEVICE)
    count = torch.tensor(counts, device=DEVICE)[:, None]
    outputs, chain = [], torch.ones(size, size, dtype=torch.bool, device=DEVICE).tril()
    for start in range(0, length, size):
        part = {name: y[:, :, start : start + size] for name, y in x.items()}
        given = (part.get(name) for name in ("q", "k", "v", "raw_q", "raw_k", "sink_q"))
        out, far = step.verify(layer, cache, *given, 0.3, chain)
        keys = {"k": part["k"], "v": part["v"]} | ({"raw": part["raw_k"]} if "raw_k" in part else {})
        cache.draft = Draft(keys, layer.far_keys, far)
        cache.accept(torch.where(start + index < count, index, -1))
        assert cache.far is not None
        outputs.append(out)
    present = torch.arange(length, device=DEVICE) < count
    doubled = {name: y.double() for name, y in x.items()}
    expected = exact(**doubled, scale=0.3, cache=wanted, segments=present.long())
    found, expected = (y.transpose(1, 2)[present] for y in (torch.cat(outputs, dim=2), expected))
    tolerance = TOLERANCES[dtype]
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert cache.length.tolist() == wanted.length.tolist() == counts
    # What is in the ring of one is in the state of the other, until the same token comes.
    y = {name: normal(rows, 4, n, dim).transpose(1, 2) for name, n in sizes.items()}
    found = layer(**y, scale=0.3, cache=cache)
    expected = exact(**{name: z.double() for name, z in y.items()}, scale=0.3, cache=wanted)
    assert (found - expected).norm() <= tolerance * expected.norm()
    for name in ("S", "z"):
        found, expected = getattr(cache.state, name), getattr(wanted.state, name)
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_a_tree_that_may_be_deeper_than_the_window_is_refused(without_gradients):
    config = CONFIGS["augmented"]
    layer, cache = LinearAttention(config, 4, 2, 16), LinearCacheLayer(config)
    q, k, v = (torch.randn(1, heads, 3, 16) for heads in (4, 2, 2))
    layer(q, k, v, scale=0.3, raw_q=q, raw_k=k, sink_q=q, cache=cache)
    assert step.refuses(layer, cache, config.window_size) is None
    assert "longer" in step.refuses(layer, cache, config.window_size + 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="a layer takes these kernels on a GPU")
def test_layers_take_these_kernels(without_gradients):
    config, heads, kv_heads, ancestors = CASES["augmented"]
    layer, cache = LinearAttention(config, heads, kv_heads, 16).to(DEVICE), LinearCacheLayer(config)
    for length, tree in ((30, None), (len(ancestors), ancestors.to(DEVICE))):
        q, k, v = (torch.randn(1, n, length, 16, device=DEVICE) for n in (heads, kv_heads, kv_heads))
        layer(q, k, v, scale=0.3, raw_q=q, raw_k=k, sink_q=q, cache=cache, ancestors=tree)
    assert cache.draft.far is not None
    cache.accept(torch.zeros(1, 1, dtype=torch.long, device=DEVICE))
    assert cache.far is not None and cache.length.item() == 31
