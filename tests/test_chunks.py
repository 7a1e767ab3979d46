"""Sequences that are learned chunk by chunk: the gradient is that of the whole sequence, the memory that of a chunk."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linearize.convert.chunks import Chunks, recompute_blocks
from linearize.convert.finetune import LabelsAndDistillation
from linearize.convert.models import LINEAR, prepare_finetune
from linearize.convert.training import label_weights
from linearize.layers.cache import LinearCache
from linearize.layers.config import BASELINES, PRESETS, LinearAttentionConfig
from linearize.layers.kernels import State
from linearize.layers.kernels.fused import additive, gated
from linearize.layers.seam import install
from linearize.recipes.loader import RecipeError, load_recipe
from linearize.recipes.schema import FinetuneSection

from . import families
from .layers import Sequence, make_layer, run_split

SMALL = {"window_size": 5, "sinks": 2, "sink_distance": 20, "conv_taps": 3, "slack": 3}
CONFIGS = {
    name: replace(preset, **{key: value for key, value in SMALL.items() if getattr(preset, key)})
    for name, preset in PRESETS.items()
    if name.partition("+")[0] not in BASELINES
} | {state: LinearAttentionConfig(**SMALL, state=state) for state in ("additive", "decay")}
# Documents that end within chunks, at their ends, and go on through several: 40 and 17 + 23 tokens; 8 + 30 + 2.
STARTS = [[0, 17], [8, 38]]


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config)


def batch_of(starts, length=40, seed=0):
    ids = torch.randint(0, 50, (len(starts), length), generator=torch.Generator().manual_seed(seed))
    index = torch.arange(length).expand_as(ids)
    begin = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in enumerate(starts):
        begin[row, [0, *places]] = True
    positions = index - torch.where(begin, index, 0).cummax(1).values
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def make(config, kept=None, dtype=torch.float64, base=None, **section):
    """A model to be finetuned in which everything that learns takes part."""
    section = FinetuneSection(steps=1, **section)
    model = prepare_finetune(install(base or llama(), config, kept), section).to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if LINEAR in name or "lora_B" in name:
            random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * random.abs().to(dtype)
    return model


def learn(model, batch, accumulation=1, **section):
    """The loss, and the gradients that a micro batch leaves."""
    model.zero_grad()
    # Of a section, whose length is not that of the batch here, any chunk is as good.
    objective = LabelsAndDistillation(FinetuneSection(steps=1, length=2, **section))
    loss = objective.loss(model, batch, accumulation, 0)
    if not objective.calls_backward:
        (loss / accumulation).backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(actual, expected):
    """In float64, up to the order of sums."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("chunk", [7, 16])
@pytest.mark.parametrize("preset", CONFIGS)
def test_exact_is_the_whole_sequence(preset, chunk):
    model, batch = make(CONFIGS[preset]), batch_of(STARTS)
    whole = learn(model, batch)
    # Without this, what is missing on both sides would go unseen.
    assert all(value.abs().max() > 0 for value in whole.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} < whole.keys()
    assert_same(learn(model, batch, chunk=chunk), whole)


@pytest.mark.parametrize("kept_window", [None, 6])
def test_exact_with_kept_heads(kept_window):
    """Heads of some layers, and all of one."""
    config = replace(CONFIGS["augmented"], kept_window=kept_window)
    model, batch = make(config, kept={0: (1,), 1: (0, 1)}), batch_of(STARTS)
    assert_same(learn(model, batch, chunk=7), learn(model, batch))


def test_exact_of_one_document_per_row():
    """Nothing is packed, so nothing is told of documents."""
    model, batch = make(CONFIGS["augmented"]), batch_of([[], []])
    assert_same(learn(model, batch, chunk=8), learn(model, batch))


def test_exact_in_full_with_distillation_and_accumulation():
    batch = batch_of(STARTS)
    section = {"next_token": 0.5, "distill": 2.0}
    model = make(CONFIGS["decay"], **section)
    assert_same(learn(model, batch, 4, chunk=16, **section), learn(model, batch, 4, **section))
    model = make(CONFIGS["additive"], method="full")
    assert_same(learn(model, batch, 2, chunk=16, method="full"), learn(model, batch, 2, method="full"))


@pytest.mark.parametrize("backward", ["exact", "truncated"])
def test_blocks_computed_again_change_nothing(backward):
    model, batch = make(CONFIGS["augmented"], kept={1: (0,)}), batch_of(STARTS)
    expected = learn(model, batch, chunk=16, backward=backward)
    recompute_blocks(model)
    assert_same(learn(model, batch, chunk=16, backward=backward), expected)


def test_truncated_has_the_loss_of_the_whole_sequence():
    model, batch = make(CONFIGS["augmented"]), batch_of(STARTS)
    whole, truncated = learn(model, batch), learn(model, batch, chunk=7, backward="truncated")
    torch.testing.assert_close(truncated.pop("loss"), whole["loss"], rtol=1e-9, atol=0)
    # Keys and values of every layer are looked at from further on.
    for name in truncated:
        if "k_proj" in name or "v_proj" in name:
            assert (truncated[name] - whole[name]).norm() > 1e-3 * whole[name].norm(), name


def test_truncated_is_exact_where_no_document_spans_chunks():
    model, batch = make(CONFIGS["augmented"]), batch_of([[8, 16, 24, 30, 32], [4, 8, 16, 24, 32]])
    assert_same(learn(model, batch, chunk=8, backward="truncated"), learn(model, batch))


def test_dropout_is_the_same_in_both_passes():
    """The gradient of a sequence in chunks, all in one graph, with the masks that `exact` has had."""
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, resid_pdrop=0.3, embd_pdrop=0.3)
    config.attn_pdrop = 0.0
    model, batch = make(CONFIGS["additive"], base=GPT2LMHeadModel(config), method="full"), batch_of(STARTS)
    torch.manual_seed(3)
    actual = learn(model, batch, chunk=16, method="full")
    model.zero_grad()
    torch.manual_seed(3)
    chunks, cache = Chunks(model, batch["input_ids"], batch["position_ids"], 16), LinearCache(model)
    logits = []
    for place, seed in zip(chunks.places, torch.randint(2**62, (3,)).tolist(), strict=True):
        torch.manual_seed(seed)
        cache = cache.branch(lambda x: x, chunks.segments[:, place])
        ids, positions = batch["input_ids"][:, place], batch["position_ids"][:, place]
        logits.append(model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits)
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(torch.cat(logits, 1)[:, :-1].transpose(1, 2), labels, reduction="none")
    loss = (losses * label_weights(labels)).sum()
    loss.backward()
    assert_same(actual, {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("preset", CONFIGS)
def test_gradients_pass_the_cache_of_padded_rows(preset, backend):
    """Of one layer: padding before, between and behind documents; splits within and between them."""
    documents = [[0] * 3 + [1] * 30 + [2] * 50 + [0] * 7, [1] * 20 + [0] * 5 + [2] * 3 + [3] * 62]
    x = Sequence.random(2, 90, segments=torch.tensor(documents))
    layer = make_layer(CONFIGS[preset], backend=backend)
    found = []
    for ends in ([90], [2, 21, 28, 80, 90]):
        leaves = x.map(lambda part: part.clone().requires_grad_())
        out = run_split(layer, leaves, ends) * x.valid[:, None, :, None]
        # Some linear function of the outputs, another number for each.
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        layer.zero_grad()
        (out * weight).sum().backward()
        inputs = {name: getattr(leaves, name).grad for name in ("q", "k", "v", "raw_q", "raw_k", "sink_q")}
        named = inputs | {name: parameter.grad for name, parameter in layer.named_parameters()}
        found.append({name: value for name, value in named.items() if value is not None})
    assert {"q", "k", "v"} <= found[0].keys()
    assert_same(found[1], found[0])


def peak(model, batch, **section):
    """Bytes that backward passes wait for, at most at once."""
    held = {}
    most = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal most
            # Not the tensor itself: what an operation saves of its own output would go round in a circle.
            self.tensor = tensor.detach()
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            size, times = held.get(self.key, (storage.nbytes(), 0))
            held[self.key] = size, times + 1
            most = max(most, sum(size for size, _ in held.values()))

        def __del__(self):
            size, times = held.pop(self.key)
            if times > 1:
                held[self.key] = size, times - 1

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        learn(model, batch, **section)
    return most


@pytest.mark.parametrize("backward", ["exact", "truncated"])
def test_memory_is_that_of_one_chunk(backward):
    model = make(CONFIGS["augmented"], dtype=torch.float32)
    short, long = (batch_of([[length // 3]], length) for length in (128, 256))
    of_chunks = [peak(model, batch, chunk=32, backward=backward) for batch in (short, long)]
    of_whole = [peak(model, batch) for batch in (short, long)]
    # What a batch says of its tokens is 8 bytes for each of them.
    assert of_chunks[1] < 1.01 * of_chunks[0]
    assert of_whole[1] > 1.5 * of_whole[0] > 3 * of_chunks[0]


def test_state_of_a_chunk_is_single_precision_under_autocast():
    model, batch = make(CONFIGS["augmented"], dtype=torch.float32), batch_of(STARTS)
    chunks = Chunks(model.get_base_model(), batch["input_ids"], batch["position_ids"], 16)
    cache = LinearCache(chunks.model).branch(Tensor.detach, chunks.segments[:, :16])
    with torch.autocast("cpu", torch.bfloat16):
        chunks.model(batch["input_ids"][:, :16], past_key_values=cache, use_cache=True)
    assert cache.layers[0].ring["v"].dtype == torch.bfloat16
    assert cache.layers[0].state.S.dtype == torch.float32
    expected, worst = learn(model, batch), 0.0
    with torch.autocast("cpu", torch.bfloat16):
        actual = learn(model, batch, chunk=16)
    for name, value in expected.items():
        worst = max(worst, ((actual[name] - value).norm() / value.norm()).item())
    # What whole sequences have in bfloat16, too: gradients are small differences of numbers with 8 bits.
    assert 0 < worst < 0.1


def test_fused_kernels_that_know_no_gradient_of_the_cache_leave_it_to_others():
    """The one that does is tested with the other kernels (`test_gated`)."""
    state = State(torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 4, requires_grad=True))
    new = torch.zeros(1, 2, 8, 4)
    config = PRESETS["lolcats"]
    given = dict(state=state, q_features=new, q=new, k=new, v=new, config=config)
    problem = SimpleNamespace(**given, ancestors=None, causal=True, bias=None)
    assert additive.refuses(problem) == "the state needs a gradient"
    features = SimpleNamespace(map=SimpleNamespace(dim=16))
    v = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 8, 64))
    assert not gated.folds(features, v, PRESETS["augmented"])
    with torch.no_grad():
        assert gated.folds(features, v, PRESETS["augmented"])


def test_layers_that_carry_no_gradients_are_refused(linearize, recipe, tiny_model, tmp_path):
    model = families.tiny_model("lfm2", vocab_size=300)
    model.save_pretrained(tmp_path / "lfm2")
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, tmp_path / "lfm2")
    section = {"steps": 2, "length": 64, "batch_size": 2, "chunk": 32, "targets": ["q_proj"]}
    path = recipe(model={"source": str(tmp_path / "lfm2")}, finetune=section, transfer=None)
    result = linearize("check", path)
    assert result.code == 2
    assert "finetune.chunk: this model has layers that are not attention" in " ".join(result.stderr.split())
    section.pop("chunk")
    assert linearize("check", recipe(model={"source": str(tmp_path / "lfm2")}, finetune=section)).code == 0


@pytest.mark.parametrize(
    ("finetune", "problem"),
    [
        ({"chunk": 48}, "finetune.chunk: 48 does not divide sequences of 64 tokens"),
        ({"chunk": 16}, "finetune.chunk: the 23 latest tokens (window, convolution and slack)"),
        ({"chunk": 1}, "finetune.chunk: expected 2 or more, got 1"),
        ({"chunk": 32, "backward": "some"}, "finetune.backward: expected "),
        ({"chunk": 48, "length": 32, "curriculum": [{"length": 64, "share": 1.0}]}, "48 does not divide"),
    ],
)
def test_chunks_that_do_not_fit(recipe, finetune, problem):
    with pytest.raises(RecipeError, match=re.escape(problem)):
        load_recipe(str(recipe(finetune={"steps": 2, "length": 64, "batch_size": 2} | finetune)))


def test_convert_in_chunks_learns_the_same(linearize, recipe, tmp_path):
    """In fp32, through Trainer: 3 steps add up what rounding differs by, 1e-7 each time, enlarged by Adam."""
    losses = {}
    training = {"steps": 3, "lr": 1e-2, "batch_size": 4, "micro_batch_size": 2, "length": 64, "distill": 0.5}
    exact = {"chunk": 32, "gradient_checkpointing": True}
    for name, more in {"whole": {}, "exact": exact, "truncated": exact | {"backward": "truncated"}}.items():
        path = recipe(output=str(tmp_path / name), finetune=training | more, transfer=None, medusa=None)
        result = linearize("convert", path, "evaluate=null", "export=null")
        assert result.code == 0, result.stderr
        state = json.loads((tmp_path / name / "finetune" / "state.json").read_text())
        losses[name] = state["metrics"]["loss"]
    assert losses["exact"] == pytest.approx(losses["whole"], rel=1e-5)
    # The same before the first step, on another way after it.
    assert losses["truncated"][0] == pytest.approx(losses["whole"][0], rel=1e-5)
    assert losses["truncated"][2] != pytest.approx(losses["whole"][2], rel=1e-5)


def test_the_tuned_teacher_learns_from_whole_sequences(linearize, recipe):
    """It is a softmax model, without caches to go from chunk to chunk."""
    training = {"steps": 2, "batch_size": 2, "length": 64, "chunk": 32, "gradient_checkpointing": True}
    evaluate = {"tokens": 128, "lengths": [64], "tuned_teacher": True, "copying": None}
    path = recipe(finetune=training, transfer=None, medusa=None, export=None, evaluate=evaluate)
    result = linearize("convert", path)
    assert result.code == 0, result.stderr
