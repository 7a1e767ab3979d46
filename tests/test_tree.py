"""Draft trees verified by fused kernels, and what is accepted of them, equal the reference in double precision."""

from dataclasses import replace

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import Draft, LinearCacheLayer
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
