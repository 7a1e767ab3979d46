"""The linear attentions of the papers as configurations of the layer: their formulas, no leaks, decoding, refusals."""

from math import pi, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import AUGMENTATIONS, BASELINES, PRESETS
from linearize.layers.seam import install

from . import families
from .layers import DIM, HEADS, KV_HEADS, SCALE, VALUE_DIM, Sequence, error, run, run_split

pytestmark = pytest.mark.usefixtures("without_gradients")
NAMES = [name + suffix for name in BASELINES for suffix in AUGMENTATIONS]
PAIRWISE = ("yoso", "linformer")
STEPWISE = [name for name in NAMES if not name.startswith(PAIRWISE)]
GROUP = 64


def make(name, causal=True, kv_heads=KV_HEADS, trained=True) -> LinearAttention:
    """As if trained, so that every branch contributes."""
    layer = LinearAttention(PRESETS[name], HEADS, kv_heads, DIM, causal=causal).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters() if trained else ():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data + 0.3 * noise
    return layer


# Formulas, of what is published, on one head each of q [T, D], k [T, D], v [T, D_v].


def causal(weights):
    return weights.tril()


def normalised(x):
    return torch.nn.functional.normalize(x, dim=-1)


def same_group(length):
    group = torch.arange(length) // GROUP
    return group[:, None] == group


def linear(phi_q, phi_k, v):
    b = causal(phi_q @ phi_k.mT)
    return b @ v, b.sum(-1, keepdim=True)


def flash_local(layer, q, k, v):
    return causal((normalised(q) @ normalised(k).mT).relu().square() * same_group(len(q))) @ v


def flash_global(layer, q, k, v):
    return linear(normalised(q), normalised(k), v)[0] / torch.arange(1, len(q) + 1)[:, None]


def performer(layer, q, k, v):
    def phi(x):
        x, w = x / DIM**0.25, layer.phi_q.weight
        return (x @ w - x.square().sum(-1, keepdim=True) / 2).exp() / sqrt(w.shape[1])

    out, mass = linear(phi(q), phi(k), v)
    return out / mass


def transnormer(layer, q, k, v):
    out = linear(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v)[0]
    return out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def relu(layer, q, k, v):
    out, mass = linear(q.relu(), k.relu(), v)
    return torch.where(mass > 0, out / mass, 0)


def rfa(layer, q, k, v):
    def phi(x):
        y = normalised(x) @ layer.phi_q.weight
        return torch.cat([y.sin(), y.cos()], dim=-1) / sqrt(DIM)

    out, mass = linear(phi(q), phi(k), v)
    return out / mass


def yoso(layer, q, k, v):
    cosine = (normalised(q) @ normalised(k).mT).clamp(-1, 1)
    return normalised(causal((1 - cosine.arccos() / pi) ** 8) @ v)


def linformer(layer, q, k, v):
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i in range(len(q)):
        own = i // GROUP * GROUP
        blocks = [slice(start, start + GROUP) for start in range(0, own, GROUP)]
        keys = torch.cat([*(layer.key_rows[0] @ k[block] for block in blocks), k[own : i + 1]])
        values = torch.cat([*(layer.value_rows[0] @ v[block] for block in blocks), v[own : i + 1]])
        out[i] = (SCALE * q[i] @ keys.mT).softmax(-1) @ values
    return out


FORMULAS = {
    "flash-local": flash_local, "flash-global": flash_global, "linformer": linformer, "performer": performer,
    "transnormer": transnormer, "yoso": yoso, "relu": relu, "rfa": rfa,
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_its_published_formula(name):
    """From the start, before anything is learned."""
    layer, x = make(name, trained=False), Sequence.random(1, 150, seed=3)
    out = layer(x.q, x.k, x.v, scale=SCALE)
    # YOSO's cosines keep 1e-6 away from 1, where the slope of arccos has no end; Linformer's weight is a tenth in fp32.
    tolerance = {"yoso": 1e-4, "linformer": 1e-7}.get(name, 1e-10)
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        expected = FORMULAS[name](layer, x.q[0, head], x.k[0, kv_head], x.v[0, kv_head])
        assert error(out[0, head], expected) < tolerance, head


@pytest.mark.parametrize("name", NAMES)
def test_augmentations_add_their_branches(name):
    """Softmax within groups alone at first; a convolution that starts at nothing."""
    config, layer = PRESETS[name], make(name, trained=False)
    assert (config.conv_taps == 32) == ("+conv" in name)
    base = name.partition("+")[0]
    if "+group" not in name:
        assert error(run(layer, x := Sequence.random(1, 150)), run(make(base, trained=False), x)) < 1e-12
        return
    assert config.window == "block" and config.has_far
    x = Sequence.random(1, 150)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (x.k, x.v))
    seen = same_group(150).tril()
    if base == "flash-local":
        local = (normalised(x.q) @ normalised(k).mT).relu().square() * seen @ v
    else:
        local = (SCALE * x.q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert error(run(layer, x), local) < 1e-12
    # And what is far takes part once it is learned.
    assert error(run(make(name), x)[:, :, GROUP:], local[:, :, GROUP:]) > 1e-2


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), st.integers(2, 200), st.data())
def test_the_future_changes_nothing(name, length, data):
    place = data.draw(st.integers(0, length - 1))
    layer, x = make(name), Sequence.random(1, length)
    other = x.map(torch.clone)
    for y in (other.q, other.k, other.v, other.raw_q, other.raw_k):
        y[:, :, place] += 1
    assert torch.equal(run(layer, x)[:, :, :place], run(layer, other)[:, :, :place])


@pytest.mark.parametrize("name", STEPWISE)
def test_decoding_from_constant_memory_is_the_whole_sequence(name):
    layer, x = make(name), Sequence.random(2, 150)
    cache = LinearCacheLayer(layer.config)
    found = run_split(layer, x, [90, *range(91, 151)], cache)
    assert error(found, run(layer, x)) < 1e-9
    size = cache.nbytes
    run(layer, Sequence.random(2, 300, seed=1), cache=cache)
    assert cache.nbytes == size


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(PAIRWISE)])
def test_what_no_state_stands_for_has_no_cache(name):
    with pytest.raises(ValueError, match=f"^far: {name.partition('+')[0]} .* use_cache=False"):
        LinearCacheLayer(PRESETS[name])


@pytest.mark.parametrize("name", NAMES)
def test_both_ways(name):
    """For encoders: later tokens count, padding and other documents do not, and gradients have an end."""
    layer = make(name, causal=False)
    segments = torch.tensor([[0] * 7 + [1] * 80 + [2] * 60 + [0] * 3])
    x = Sequence.random(1, 150, segments=segments)
    out = run(layer, x)
    alone = x.map(lambda y: y[:, :, 7:87])
    alone.segments = None
    assert error(out[:, :, 7:87], run(layer, alone)) < 1e-9
    later = alone.map(torch.clone)
    later.v[:, :, 60] += 1
    assert (run(layer, later) - run(layer, alone))[:, :, :60].abs().amax() > 1e-6
    # Keys that are the queries have cosines of 1.
    same = alone.map(lambda y: y.clone())
    same.k, same.raw_k = same.q[:, :KV_HEADS].clone(), same.raw_q[:, :KV_HEADS].clone()
    with torch.enable_grad():
        same = same.map(lambda y: y.requires_grad_())
        run(layer, same).sum().backward()
    assert same.q.grad is None or same.q.grad.isfinite().all()
    assert same.v.grad.isfinite().all() and same.v.grad.shape[-1] == VALUE_DIM


def test_linformer_is_not_outweighed_by_large_scores():
    """Rows of blocks count from the maximum of all scores."""
    layer, x = make("linformer"), Sequence.random(1, 150)
    assert run(layer, x.map(lambda y: 40 * y)).isfinite().all()


def test_a_model_without_a_cache_generates_and_says_how():
    model = install(families.tiny_model("llama"), PRESETS["linformer"]).eval()
    ids = torch.arange(1, 100)[None] % families.VOCAB
    assert model(ids).past_key_values is None
    assert model.generate(ids, use_cache=False, max_new_tokens=3, do_sample=False).shape == (1, 102)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=3)
