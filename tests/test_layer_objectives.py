"""What layers minimise in attention transfer: against hand-made sums, and that each can be learned."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from linearize.convert import objectives
from linearize.convert.models import LINEAR, train_only
from linearize.convert.objectives import FAR_FLOOR, OBJECTIVES, SMOOTHING, far_mass, output_mse, weights_kl
from linearize.convert.transfer import IMPLEMENTATION, AttentionTransfer, Task
from linearize.layers.attention import BRANCHES
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import install
from linearize.layers.tokens import near
from linearize.recipes.training import TransferSection

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = LinearAttentionConfig(window_size=8, sinks=2, sink_distance=20, conv_taps=4)
LOLCATS = replace(PRESETS["lolcats"], window_size=8)
LENGTH = 96


def converted(config=CONFIG, base=None, kept=None):
    torch.manual_seed(0)
    model = base or LlamaForCausalLM(LlamaConfig(**SMALL))
    # Sharper than random weights are, so that what is near and far differs.
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 10
    install(model.eval(), config, kept)
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def batch(padding=0):
    """Rows of two packed documents, or of one behind padding."""
    ids = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding:
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        return {"input_ids": ids, "attention_mask": mask}
    positions = torch.cat([torch.arange(36), torch.arange(LENGTH - 36)])
    return {"input_ids": ids, "position_ids": positions.expand(2, -1)}


@pytest.fixture
def examples(monkeypatch):
    """Runs a model and returns the `Example` of each of its layers."""

    def run(model, data):
        caught = []
        monkeypatch.setitem(OBJECTIVES, "output_mse", lambda example: caught.append(example) or torch.zeros(()))
        for layer in model.linear_attentions().values():
            layer.task = Task({"output_mse": 1.0})
        with torch.no_grad():
            model.base_model(**data, use_cache=False)
        return caught

    return run


def transfer(model, section, data, step=0):
    return AttentionTransfer(section, seed=0).loss(model, data, 1, step)


def random_weights(model):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if LINEAR in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).abs() * 0.5
    return model


@pytest.mark.parametrize("config", [CONFIG, LOLCATS])
@pytest.mark.parametrize("padding", [0, 10])
def test_weights_give_the_outputs(examples, without_gradients, config, padding):
    """Each side's weights times the values is that side's output; fp32 sums of up to 96 terms in another order."""
    for example in examples(random_weights(converted(config)), batch(padding)):
        weights, value = example.weights, example.value.repeat_interleave(2, dim=1)
        valid = torch.ones(2, LENGTH).bool() if not padding else example.inputs.segments > 0
        for matrix, expected in (
            (weights.student, example.output(BRANCHES - {"conv"})),
            (weights.teacher, example.target),
        ):
            actual = (matrix @ value).transpose(1, 2)
            torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(matrix.sum(-1).transpose(1, 2)[valid], torch.ones(valid.sum(), 4))


def test_weights_are_those_of_the_beginning(examples, monkeypatch):
    model, data = random_weights(converted()), batch()
    whole = examples(model, data)[0].weights
    monkeypatch.setattr(objectives, "WEIGHTS_PREFIX", 50)
    part = examples(model, data)[0].weights
    assert part.far.shape[-1] == 50
    for name in ("teacher", "student"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[:, :, :50, :50])


@pytest.mark.parametrize("padding", [0, 10])
def test_kl_and_far_mass_by_hand(examples, without_gradients, padding):
    """Queries one by one, in fp64, as a mean over sequences; the weights are fp32."""
    example = examples(random_weights(converted()), batch(padding))[1]
    weights, segments = example.weights, example.inputs.segments
    values = example.value.repeat_interleave(2, dim=1).double()
    divergence, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    # Of the share and of what it adds, in each row: squared error, squared target, squared whole.
    share, added = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for row, head, i in product(range(2), range(4), range(LENGTH)):
        if segments[row, i] == 0:
            continue
        keys = [j for j in range(i + 1) if segments[row, j] == segments[row, i]]
        p, q = (x[row, head, i, keys].double() for x in (weights.teacher, weights.student))
        p_smooth, q_smooth = ((x + SMOOTHING) / (x + SMOOTHING).sum() for x in (p, q))
        divergence[row] += (p_smooth * (p_smooth / q_smooth).log()).sum()
        count[row] += 1
        place = torch.arange(len(keys))
        far = ~near(CONFIG, place[-1:], place)[0]
        p, q, v = p[far], q[far], values[row, head, keys][far]
        share[row] += torch.stack([(p.sum() - q.sum()) ** 2, p.sum() ** 2, torch.tensor(1.0)])
        whole = example.target[row, i, head].double()
        added[row] += torch.stack([x.square().sum() for x in (p @ v - q @ v, p @ v, whole)])
    torch.testing.assert_close(weights_kl(example).double(), (divergence / count).mean(), rtol=1e-4, atol=0)
    expected = sum((x[:, 0] / (x[:, 1] + FAR_FLOOR * x[:, 2])).mean() for x in (share, added))
    torch.testing.assert_close(far_mass(example).double(), expected, rtol=1e-4, atol=0)


def test_weights_that_are_the_teachers_cost_nothing(examples):
    config = replace(CONFIG, window_size=LENGTH, sink_distance=None, conv_taps=0)
    for example in examples(converted(config), batch()):
        assert weights_kl(example).item() == pytest.approx(0, abs=1e-6)
        assert far_mass(example).item() == 0


def test_a_silent_far_branch_has_an_error_of_one_and_one(examples):
    for example in examples(converted(), batch()):
        assert far_mass(example).item() == pytest.approx(2, rel=0.01)


def test_far_of_a_teacher_with_a_narrower_window_is_nothing(examples):
    base = MistralForCausalLM(MistralConfig(sliding_window=6, **SMALL))
    model = converted(replace(CONFIG, sinks=0), base)
    for example in examples(model, batch()):
        assert (example.weights.teacher * example.weights.far).sum() == 0
        assert far_mass(example).item() == 0


def gradients(model, section, step=0):
    model.zero_grad()
    transfer(model, section, batch(), step)
    return {name: p.grad for name, p in model.named_parameters() if LINEAR in name}


@pytest.mark.parametrize("config", [CONFIG, LOLCATS, replace(PRESETS["augmented-icml"], window_size=8)])
@pytest.mark.parametrize("kind", ["linear_mse", "window_dropout"])
def test_without_the_window_the_feature_maps_learn_from_the_first_step(config, kind):
    """Where the far branch starts at weight 0, the whole output teaches its feature map nothing."""
    model = converted(config)
    if kind == "window_dropout":
        section = TransferSection(steps=1, window_dropout=1.0)
    else:
        section = TransferSection(steps=1, objectives={"output_mse": 0.0, "linear_mse": 1.0})
    grads = gradients(model, section)
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())
    learned = "alpha" if config.combine == "sum" else "phi_"
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if learned in name)
    if config == CONFIG:
        silent = gradients(model, TransferSection(steps=1))
        assert all(grad.abs().sum() == 0 for name, grad in silent.items() if "phi_" in name)
    assert all(layer.branches == BRANCHES for layer in model.linear_attentions().values())


@pytest.mark.parametrize("config", [CONFIG, LOLCATS])
@pytest.mark.parametrize("name", ["linear_mse", "weights_kl", "far_mass"])
def test_each_objective_is_learned(config, name):
    model, data = converted(config), batch()
    section = TransferSection(steps=1, objectives={"output_mse": 0.0, name: 1.0})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(transfer(model, section, data).item())
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    assert losses[-1] < losses[15] < losses[0]


def test_objectives_add_up():
    model, data = converted(), batch()
    weights = {"output_mse": 0.5, "linear_mse": 2.0, "weights_kl": 0.25, "far_mass": 3.0}
    alone = {
        name: transfer(model, TransferSection(steps=1, objectives={"output_mse": 0.0, name: 1.0}), data)
        for name in weights
    }
    together = transfer(model, TransferSection(steps=1, objectives=weights), data)
    torch.testing.assert_close(together, sum(weight * alone[name] for name, weight in weights.items()))


@pytest.mark.parametrize("state", ["additive", "decay", "delta"])
def test_kept_heads_have_no_error_in_any_precision(examples, state):
    """A layer of kept heads alone, beside one of both kinds that still learns: bf16 keeps 8 bits."""
    config = replace(CONFIG, state=state)
    model = converted(config, kept={0: (0, 1), 1: (1,)}).to(torch.bfloat16)
    whole, half = examples(model, batch())
    for objective in (output_mse, weights_kl, far_mass):
        assert objective(whole) < 1e-3 < objective(half), objective.__name__
    student, teacher = half.weights.student[:, 2:], half.weights.teacher[:, 2:]
    torch.testing.assert_close(student, teacher, rtol=0.02, atol=1e-4)


def test_window_dropout_falls_to_nothing_and_is_repeatable():
    section = TransferSection(steps=1000, window_dropout=0.8)
    dropped = ["local" not in AttentionTransfer(section, 0)._branches(step) for step in range(1000)]
    assert dropped == ["local" not in AttentionTransfer(section, 0)._branches(step) for step in range(1000)]
    # Means 0.76, 0.4 and 0.04 of 100 draws; four standard deviations are at most 20.
    first, middle, last = (sum(dropped[start : start + 100]) for start in (0, 450, 900))
    assert 56 < first < 96 and 20 < middle < 60 and last < 24
    assert not any("local" not in AttentionTransfer(TransferSection(steps=9), 0)._branches(step) for step in range(9))


def test_a_layer_that_stopped_costs_and_learns_nothing(monkeypatch):
    model = converted()
    section = TransferSection(steps=5, layers={"0": {"steps": 2}})
    assert all(grad is not None for grad in gradients(model, section, step=1).values())
    grads = gradients(model, section, step=2)
    assert all((grad is None) == ("layers.0." in name) for name, grad in grads.items())
    calls = []
    monkeypatch.setitem(OBJECTIVES, "output_mse", lambda example: calls.append(example) or torch.zeros(()))
    transfer(model, section, batch(), step=4)
    assert len(calls) == 1
