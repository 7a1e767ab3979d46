"""The fused layer of any state's rule equals the reference in float64, on a GPU or in Triton's interpreter."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from linearize.layers import kernels
from linearize.layers.attention import LinearAttention
from linearize.layers.cache import LinearCacheLayer
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.feature_maps import FEATURE_MAPS
from linearize.layers.kernels import State
from linearize.layers.kernels.fused import gated
from linearize.layers.kernels.fused import segments as cut
from linearize.layers.kernels.fused.shape import fits_learned
from linearize.layers.tokens import PADDING, Tokens, whole_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUGMENTED = replace(PRESETS["augmented"], sink_distance=30)
CONFIGS = {
    "augmented": AUGMENTED,
    "decay": LinearAttentionConfig(state="decay", conv_taps=1),
    "additive": LinearAttentionConfig(sinks=0, conv_taps=0, far_weight="one"),
    "terrace": replace(AUGMENTED, window="terrace", far_weight="learned", sink_distance=None),
    "block": replace(AUGMENTED, window="block"),
}
# RMS of the error over that of what is expected: sums of some hundred products in single precision; for bfloat16 what
# the rounding of features, states and weights adds up to.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3}


def tolerance_of(name, dtype):
    """In bfloat16, gradients of scores are differences; those by features pass two more roundings, which softmax's own
    gradient, a difference too, enlarges (plain PyTorch in bfloat16 has 1.0e-2, of lam_query and raw_k); and in the few
    numbers that all tokens share, terms of both signs cancel."""
    if dtype == torch.float32 or name in ("out", "v", "conv"):
        return TOLERANCE[dtype]
    if name in ("q", "k", "sink_q"):
        return 7.5e-3
    return 1.1e-2 if name in ("raw_q", "raw_k", "lam_query") or name.startswith("phi") else 1e-1


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setitem(kernels.BACKENDS, "fused", kernels.Backend(gated.attention, gated.refuses))


def make(config, heads=2, kv_heads=1, dim=16, dtype=torch.float32, batch=1, length=200):
    """A layer with random parameters, and q, k, v, raw_q, raw_k, sink_q."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    layer = LinearAttention(config, heads, kv_heads, dim).to(DEVICE)
    for name, parameter in layer.named_parameters():
        start = 1 if name.startswith("lam") and "query" not in name else 0
        scale = 0.02 if name.startswith("gates.bias") else 0.3
        parameter.data += start + scale * normal(*parameter.shape)
    shapes = [heads, kv_heads, kv_heads, heads, kv_heads, heads]
    return layer, [normal(batch, n, length, dim).to(dtype).requires_grad_() for n in shapes]


def run(layer, inputs, **keywords):
    q, k, v, raw_q, raw_k, sink_q = inputs
    raw = {"raw_q": raw_q, "raw_k": raw_k, "sink_q": sink_q if layer.config.sink_distance else None}
    return layer(q, k, v, scale=q.shape[-1] ** -0.5, **raw, **keywords)


def exact(layer, inputs):
    """The same in float64; weights of maps are rounded to the dtype of what they are applied to."""
    reference = deepcopy(layer).double()
    for part in (reference.phi_q, reference.phi_k):
        part.weight.data = part.weight.to(inputs[0].dtype).double()
    reference.backend = "reference"
    return reference, [x.detach().double().requires_grad_() for x in inputs]


def close(actual, expected, tolerance, what):
    error = ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    assert error <= tolerance, (what, error)


@pytest.fixture
def in_segments(monkeypatch):
    """Sequences are cut, here into so many chunks."""

    def cut_into(chunks):
        for name, value in (("WHOLE", 0), ("AT_ONCE", 1), ("LEAST", chunks)):
            monkeypatch.setattr(cut, name, value)

    return cut_into


@pytest.fixture
def maps_inside(monkeypatch):
    """Features are made with the layer, as on a GPU in bfloat16."""
    monkeypatch.setattr(gated, "fuses", lambda x, map: isinstance(map, FEATURE_MAPS["hedgehog"]))
    monkeypatch.setattr(gated, "computed_in", lambda x: x.dtype)


def poison():
    """Memory that the next tensors get holds no zeros by chance."""
    if DEVICE == "cuda":
        torch.full((64, 1024, 1024), float("nan"), device=DEVICE)


def check(config, segments=None, **sizes):
    layer, inputs = make(config, **sizes)
    dtype = inputs[0].dtype
    reference, exact_inputs = exact(layer, inputs)
    valid = torch.ones(inputs[0].shape[0], 1, inputs[0].shape[2], 1, device=DEVICE, dtype=torch.bool)
    if segments is not None:
        segments = segments.to(DEVICE)
        valid = (segments > 0)[:, None, :, None]
    # The same on all devices: in few numbers that all tokens share, terms of both signs may cancel nearly to nothing.
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(valid.device, dtype) * valid
    expected = run(reference, exact_inputs, segments=segments)
    layer.backend = "fused"
    poison()
    actual = run(layer, inputs, segments=segments)
    close(actual.where(valid, 0), expected.where(valid, 0), tolerance_of("out", dtype), "out")

    def gradients(out, layer, inputs):
        leaves = [*inputs, *layer.parameters()]
        return torch.autograd.grad((out * weights.to(out.dtype)).where(valid, 0).sum(), leaves, allow_unused=True)

    names = ["q", "k", "v", "raw_q", "raw_k", "sink_q", *(name for name, _ in layer.named_parameters())]
    poison()
    found = gradients(actual, layer, inputs)
    for name, x, y in zip(names, found, gradients(expected, reference, exact_inputs), strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            x, y = (z.where(valid, 0) if z.dim() == 4 else z for z in (x, y))
            close(x, y, tolerance_of(name, dtype), name)


@pytest.mark.parametrize("dtype", TOLERANCE if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name, dtype):
    check(CONFIGS[name], dtype=dtype)


def packed():
    """Rows of documents and padding."""
    segments = torch.zeros(2, 260, dtype=torch.long)
    for number, (start, end) in enumerate(pairwise([0, 130, 134, 240]), start=1):
        segments[0, start:end] = number
    segments[1, 9:] = 1
    return segments


@pytest.mark.parametrize("name", ["augmented", "block"])
def test_documents_and_padding(name):
    check(CONFIGS[name], segments=packed(), batch=2, length=260)


@pytest.mark.parametrize("dtype", TOLERANCE if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_in_segments(name, chunks, dtype, in_segments):
    in_segments(chunks)
    check(CONFIGS[name], heads=4, kv_heads=2, length=290, dtype=dtype)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", ["augmented", "terrace", "block"])
def test_documents_and_padding_in_segments(name, chunks, in_segments):
    in_segments(chunks)
    check(CONFIGS[name], segments=packed(), batch=2, length=260)


@pytest.mark.parametrize("name", ["augmented", "decay", "additive"])
@pytest.mark.parametrize("chunks", [2, 9])
def test_maps_inside(name, chunks, in_segments, maps_inside):
    """Features of a segment at a time, of more features than a map has."""
    in_segments(chunks)
    check(replace(CONFIGS[name], feature_expansion=1, feature_dim=24), length=290)


@pytest.mark.parametrize("chunks", [2, 9])
def test_maps_inside_of_documents(chunks, in_segments, maps_inside):
    in_segments(chunks)
    check(CONFIGS["augmented"], segments=packed(), batch=2, length=260)


def test_without_gradients_nothing_is_left_for_backward(monkeypatch, without_gradients):
    found = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *tensors, **constants: found.append(constants["STORE"])

    monkeypatch.setattr(gated, "forward", Recorded())
    layer, inputs = make(CONFIGS["augmented"])
    layer.backend = "fused"
    run(layer, inputs)
    assert found == [False]


@pytest.mark.parametrize("chunks", [1, 9])
@pytest.mark.parametrize("name", ["augmented", "terrace"])
def test_prompts_in_parts(name, chunks, in_segments, without_gradients):
    """The second part goes on from sinks, a ring and a state."""
    in_segments(chunks)
    layer, inputs = make(CONFIGS[name], batch=2, length=330)
    reference, exact_inputs = exact(layer, inputs)
    segments = torch.ones(2, 330, dtype=torch.long, device=DEVICE)
    segments[1, :100] = 0
    expected = run(reference, exact_inputs, segments=segments)
    cache = LinearCacheLayer(layer.config)
    for start, end, backend in ((0, 220, "torch"), (220, 330, "fused")):
        layer.backend = backend
        out = run(layer, [x[:, :, start:end] for x in inputs], segments=segments[:, start:end], cache=cache)
    close(out, expected[:, :, 220:], TOLERANCE[torch.float32], "out")


@pytest.mark.parametrize(
    ("name", "is_packed", "chunks"),
    [("augmented", True, 1), ("terrace", True, 9), ("block", False, 1), ("decay", False, 9), ("additive", False, 1)],
)
def test_gradients_of_a_later_part(name, is_packed, chunks, in_segments):
    """Of sinks, ring and state before it, too: what a first part has left there, once by documents of padded rows."""
    in_segments(chunks)
    layer, inputs = make(CONFIGS[name], batch=2, length=290)
    segments = None
    if is_packed:
        segments = torch.ones(2, 290, dtype=torch.long, device=DEVICE)
        segments[0, 240:] = 2
        segments[1, :10] = 0
    weights = torch.randn(2, 2, 70, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients(layer, inputs, backend):
        cache = LinearCacheLayer(layer.config)
        for start, end, taken in ((0, 220, layer.backend), (220, 290, backend)):
            layer.backend = taken
            part = None if segments is None else segments[:, start:end]
            out = run(layer, [x[:, :, start:end] for x in inputs], segments=part, cache=cache)
            if end == 220:
                cache = cache.branch(cache.shared, lambda x: x.detach().requires_grad_())
                before = cache.contents()
        learned = dict(layer.named_parameters())
        names = ["q", "k", "v", "raw_q", "raw_k", "sink_q", *range(len(before)), *learned]
        found = torch.autograd.grad((out * weights).sum(), [*inputs, *before, *learned.values()], allow_unused=True)
        return dict(zip(names, found, strict=True))

    reference, exact_inputs = exact(layer, inputs)
    expected, layer.backend = gradients(reference, exact_inputs, "reference"), "torch"
    poison()
    for which, x in gradients(layer, inputs, "fused").items():
        assert (x is None) == (expected[which] is None), which
        if x is not None:
            close(x, expected[which], TOLERANCE[torch.float32], which)


@pytest.mark.parametrize("chunks", [1, 9])
@pytest.mark.parametrize("name", ["augmented", "decay", "additive"])
def test_the_state_after_many_keys(name, chunks, in_segments, without_gradients):
    """Of rows that go on from a state, one with sinks in hand, one that ends early."""
    in_segments(chunks)
    config = CONFIGS[name]
    layer, inputs = make(replace(config, feature_expansion=1, feature_dim=24), kv_heads=2, batch=2)
    _, k, v, _, raw_k, _ = (x.double() for x in inputs)
    features = deepcopy(layer).double().far_keys({"k": k, "raw": raw_k})
    single = layer.far_keys({"k": k, "raw": raw_k.float()})
    position = torch.arange(200, device=DEVICE).repeat(2, 1)
    position[:, 4:] += 700
    document = torch.zeros_like(position)
    document[1, 120:] = PADDING
    S = torch.rand(2, 2, 24, 16, dtype=torch.float64, device=DEVICE)
    state, tokens = State(S, S.sum(-1)), Tokens(document, position)
    expected = kernels.fold(features, v, state, tokens, config)
    actual = gated.end_state(single, v.float(), State(S.float(), S.sum(-1).float()), tokens, config)
    close(actual.S, expected.S, TOLERANCE[torch.float32], "S")
    close(actual.z, expected.z, TOLERANCE[torch.float32], "z")


@pytest.mark.parametrize("length", [3, 150])
@pytest.mark.parametrize("chunks", [1, 9])
@pytest.mark.parametrize("name", ["augmented", "decay", "additive"])
def test_the_state_after_first_tokens(name, chunks, length, in_segments, maps_inside, without_gradients):
    """Nobody has asked for features of them, which are made with the state then."""
    in_segments(chunks)
    config = CONFIGS[name]
    layer, (_, k, v, _, raw_k, _) = make(config, kv_heads=2, batch=2)
    part, width = slice(0, length), layer.features
    features = deepcopy(layer).double().far_keys({"k": k.double(), "raw": raw_k.double()})
    single = layer.far_keys({"k": k, "raw": raw_k}).part(part)
    S = torch.zeros(2, 2, width, 16, device=DEVICE)
    tokens = whole_sequences(None, 2, length, v.device)
    exact_state = State(S.double(), S.sum(-1).double())
    expected = kernels.fold(features.part(part), v.double()[:, :, part], exact_state, tokens, config)
    actual = gated.end_state(single, v[:, :, part], State(S, S.sum(-1)), tokens, config)
    assert not single.is_computed
    for name in ("S", "z"):
        close(getattr(actual, name), getattr(expected, name), TOLERANCE[torch.float32], name)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1)])
def test_sizes(heads, kv_heads, dim, dtype):
    if dtype == torch.float32 and dim > 64 or not fits_learned(dim):
        pytest.skip("refused: it does not fit")
    check(CONFIGS["augmented"], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, batch=2, length=391)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"feature_map": "linear"}, "features are not of hedgehog"),
        ({"window_size": 48}, "64 tokens"),
        ({"sinks": 20}, "more than 16 sinks"),
        ({"conv_taps": 64}, "convolution"),
    ],
)
def test_what_it_refuses_is_named(change, reason):
    layer, inputs = make(replace(AUGMENTED, **change), length=3)
    layer.backend = "fused"
    with pytest.raises(ValueError, match=reason):
        run(layer, inputs)


def test_what_does_not_fit_shared_memory_is_left_to_others():
    """In bfloat16; compiled for a GPU, it asks for more than it has."""
    layer, inputs = make(AUGMENTED, dim=80, dtype=torch.bfloat16, length=3)
    layer.backend = "fused"
    with pytest.raises(ValueError, match="fits shared memory"):
        run(layer, inputs)
