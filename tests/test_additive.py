"""The fused layer with an additive state equals the reference in float64, on a GPU or in Triton's interpreter."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from linearize.layers.attention import LinearAttention
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.kernels import Features, Problem, State, augmented_attention, reference
from linearize.layers.kernels.fused import additive
from linearize.layers.kernels.fused.shape import fits_learned
from linearize.layers.tokens import locate, whole_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMED = {name: PRESETS[name] for name in ("augmented-icml", "lolcats", "hedgehog", "t2r")}
# Every tile that a window can need: far keys beside near ones in the own and in the previous chunk.
NAMED |= {
    "sliding": replace(PRESETS["lolcats"], window="sliding", window_size=64, conv_taps=3),
    "short blocks": replace(PRESETS["augmented-icml"], window_size=16, conv_taps=1),
    "short terraces": replace(PRESETS["lolcats"], window_size=32),
    "window far and near summed": LinearAttentionConfig(
        window="sliding", window_size=32, sinks=0, feature_map="t2r", rope="after", combine="sum", conv_taps=4
    ),
}
# RMS of the error over that of what is expected: sums of some hundred products in single precision; for bfloat16 what
# the rounding of inputs to products and of outputs adds up to.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def make(config, heads=2, kv_heads=1, dim=16, value_dim=None, dtype=torch.float32, batch=1, length=200, past=0, seed=0,
         segments=None, with_state=False):  # fmt: skip
    """A problem with random weights, and its leaves by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    value_dim = value_dim or dim
    layer = LinearAttention(config, heads, kv_heads, dim).to(DEVICE)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE) * 0.3
    with torch.no_grad():
        for name in ("alpha", "gate"):
            if hasattr(layer, name):
                getattr(layer, name).add_(0.7)
    q = normal(batch, heads, length, dim)
    k, v = normal(batch, kv_heads, past + length, dim), normal(batch, kv_heads, past + length, value_dim)
    if segments is None:
        tokens = whole_sequences(None, batch, past + length, torch.device(DEVICE))
        tokens = replace(tokens, whole=not past)
    else:
        nothing = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        tokens = locate(segments.to(DEVICE), nothing, nothing)
    state = None
    if with_state:
        S = torch.rand(batch, kv_heads, layer.features, value_dim, generator=generator).to(DEVICE) * 20
        state = State(S, torch.rand(batch, kv_heads, layer.features, generator=generator).to(DEVICE) * 20)
    leaves = {"q": q, "k": k, "v": v, **dict(layer.named_parameters())}
    problem = Problem(
        q, k, v, Features(q, layer.phi_q), Features(k, layer.phi_k), tokens, state, None, config,
        layer.weights(q.device), dim**-0.5,
    )  # fmt: skip
    return layer, problem, leaves


def expected_of(layer, problem, leaves, weights):
    """Output and gradients by the reference in float64 from the same numbers."""
    exact = LinearAttention(layer.config, layer.heads, layer.kv_heads, layer.head_dim).to(DEVICE, torch.float64)
    # Weights of maps are rounded to the dtype of what they are applied to.
    dtype = problem.q.dtype
    exact.load_state_dict({
        name: (x.to(dtype) if name.startswith("phi") else x).double() for name, x in layer.state_dict().items()
    })
    inputs = {name: leaves[name].detach().double().requires_grad_() for name in "qkv"}
    state = None if problem.state is None else State(problem.state.S.double(), problem.state.z.double())
    q, k, v = inputs.values()
    out = reference(replace(
        problem, q=q, k=k, v=v, q_features=Features(q, exact.phi_q), k_features=Features(k, exact.phi_k),
        state=state, weights=exact.weights(q.device),
    ))  # fmt: skip
    named = inputs | dict(exact.named_parameters())
    return out, gradients(out, named, weights)


def gradients(out, leaves, weights):
    found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def ratio(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def check(config, **kwargs):
    layer, problem, leaves = make(config, **kwargs)
    assert additive.refuses(problem) is None
    tolerance = TOLERANCE[problem.v.dtype]
    valid = problem.keys.valid[:, problem.past :, None].transpose(1, 2)[..., None]  # (B, 1, T, 1)
    weights = torch.randn(problem.q.shape[:3] + problem.v.shape[3:], device=DEVICE) * valid
    weights = weights.to(problem.v.dtype)
    expected, expected_gradients = expected_of(layer, problem, leaves, weights)
    poison()
    actual = additive.attention(problem)
    assert ratio(actual.where(valid, 0), expected.where(valid, 0)) <= tolerance
    poison()
    for name, gradient in gradients(actual, leaves, weights).items():
        assert (gradient is None) == (expected_gradients[name] is None), name
        if gradient is not None:
            mask = problem.keys.valid[:, -gradient.shape[2] :, None][:, None] if name in "qkv" else True
            found, wanted = (x if mask is True else x.where(mask, 0) for x in (gradient, expected_gradients[name]))
            assert ratio(found, wanted) <= tolerance, name


def poison():
    """Memory that the next tensors get holds no zeros by chance."""
    if DEVICE == "cuda":
        torch.full((64, 1024, 1024), float("nan"), device=DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("name", NAMED)
def test_outputs_and_gradients(name, dtype, monkeypatch):
    monkeypatch.setattr(additive, "PROGRAMS", 6)  # three segments for two heads
    check(NAMED[name], dtype=dtype, length=300)


@pytest.mark.parametrize("name", ["augmented-icml", "lolcats", "short terraces"])
def test_documents_padding_and_a_state(name, monkeypatch):
    monkeypatch.setattr(additive, "PROGRAMS", 4)
    ends = [0, 70, 130, 134, 330]
    segments = torch.zeros(2, 350, dtype=torch.long)
    for number, (start, end) in enumerate(pairwise(ends), start=1):
        segments[0, start:end] = number
    segments[1, 9:] = 1
    check(NAMED[name], batch=2, length=350, segments=segments, with_state=True)


@pytest.mark.parametrize("name", ["augmented-icml", "lolcats"])
def test_queries_after_remembered_keys(name, monkeypatch):
    monkeypatch.setattr(additive, "PROGRAMS", 4)
    check(NAMED[name], length=150, past=90, with_state=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (4, 1), (8, 1)])
@pytest.mark.parametrize("name", ["augmented-icml", "lolcats"])
def test_sizes(name, heads, kv_heads, dim, dtype):
    if dtype == torch.float32 and dim > 64 or name == "lolcats" and not fits_learned(dim):
        pytest.skip("refused: it does not fit")
    check(NAMED[name], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, batch=2, length=391)


@pytest.mark.parametrize(("dim", "fits"), [(16, True), (64, True), (80, False), (96, False), (128, True), (256, False)])
@pytest.mark.parametrize("name", ["augmented-icml", "lolcats"])
def test_what_does_not_fit_shared_memory_is_left_to_others(name, dim, fits):
    """In bfloat16; compiled for a GPU, these ask for more than it has."""
    _, problem, _ = make(NAMED[name], dim=dim, dtype=torch.bfloat16)
    reason = additive.refuses(problem)
    assert reason is None if fits or name == "augmented-icml" else "which is what fits shared memory" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"feature_map": "relu"}, "feature_map relu"),
        ({"state": "decay"}, "additive states"),
        ({"norm": "count"}, "norm count"),
        ({"local": "relu2"}, "near keys are weighted by relu2"),
        ({"rope": "before"}, "after the rotary embedding"),
        ({"window_size": 48}, "chunks of 96 tokens"),
        ({"feature_map": "hedgehog", "feature_dim": 66}, "features are larger than 64"),
        ({"feature_map": None}, "no far branch"),
    ],
)
def test_what_it_refuses_is_named(change, reason):
    config = replace(PRESETS["augmented-icml"], conv_taps=3, **change)
    layer, problem, _ = make(replace(config, feature_map="elu1")) if config.feature_map is None else make(config)
    if config.feature_map is None:
        problem.q_features = None
    if config.rope == "before":
        problem.q_features = Features(problem.q + 1, layer.phi_q)
    problem.config = config
    assert reason in additive.refuses(problem)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has it")
def test_a_backend_that_cannot_says_so():
    _, problem, _ = make(NAMED["augmented-icml"])
    with pytest.raises(ValueError, match="triton cannot do this: Triton's kernels need a GPU; choose auto"):
        augmented_attention(problem, "triton")
    torch.testing.assert_close(augmented_attention(problem), augmented_attention(problem, "torch"))
