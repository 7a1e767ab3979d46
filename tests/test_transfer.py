"""Attention transfer: layer-local gradients, the teacher's own output, memory of one layer at a time."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from linearize.convert.models import LINEAR, train_only
from linearize.convert.transfer import IMPLEMENTATION, AttentionTransfer, Task, errors_of_heads, losses_of_layers
from linearize.layers.config import PRESETS, LinearAttentionConfig
from linearize.layers.seam import install
from linearize.recipes.training import TransferSection

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = LinearAttentionConfig(window_size=8, sinks=2, conv_taps=4)
TRANSFER = AttentionTransfer(TransferSection(steps=1), seed=0)


def transfer_model(layers: int = 2, config=CONFIG, base=None, kept=None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = base or LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SMALL))
    install(model.eval(), config, kept)
    train_only(model, lambda name: LINEAR in name)
    model.set_attn_implementation(IMPLEMENTATION)
    for layer in model.linear_attentions().values():
        layer.task = Task({"output_mse": 1.0})
    return model


def batch(length: int = 96, rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows of two packed documents each."""
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    half = torch.arange(length // 2)
    return {"input_ids": ids, "position_ids": torch.cat([half, half])[None].expand(rows, -1)}


def test_the_model_computes_what_the_teacher_computes():
    data = batch()
    model = transfer_model()
    hidden = model.base_model(**data, use_cache=False).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(hidden, model.base_model(**data, use_cache=False).last_hidden_state)


def test_a_sliding_window_of_the_teacher_is_kept():
    data = batch()
    model = transfer_model(base=MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=12, **SMALL)))
    hidden = model.base_model(**data, use_cache=False).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(hidden, model.base_model(**data, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("rope", ["before", "after"])
def test_an_offset_of_the_positions_changes_maps_of_rotated_keys_alone(rope):
    """The teacher and the documents are the same; its angles at 300 are rounded to 1e-5."""
    data = batch()
    moved = {**data, "position_ids": data["position_ids"] + 300}
    model = transfer_model(config=replace(CONFIG, rope=rope))
    hidden = [model.base_model(**inputs, use_cache=False).last_hidden_state for inputs in (data, moved)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in model.linear_attentions().values():
            layer.lam.fill_(1.0)
    losses = [TRANSFER.loss(model, inputs, 1, 0).item() for inputs in (data, moved)]
    assert (abs(losses[0] - losses[1]) < 1e-5 * losses[0]) == (rope == "before")


def test_only_the_new_parameters_get_gradients_and_each_from_its_own_layer():
    model = transfer_model()
    TRANSFER.loss(model, batch(), 1, 0)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all((LINEAR in name) == (grad is not None) for name, grad in grads.items())
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    # What layer 1 learns does not depend on how layer 0 answers: it hears the teacher.
    with torch.no_grad():
        model.linear_attentions()[0].lam.fill_(5.0)
    model.zero_grad()
    TRANSFER.loss(model, batch(), 1, 0)
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.1.") and LINEAR in name:
            torch.testing.assert_close(parameter.grad, grads[name])


def test_mini_batches_add_up():
    data = batch(rows=4)
    model = transfer_model()
    errors = [TRANSFER.loss(model, {k: v[i : i + 2] for k, v in data.items()}, 2, 0) for i in (0, 2)]
    summed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    singles = []
    for i in (0, 2):
        model.zero_grad()
        TRANSFER.loss(model, {k: v[i : i + 2] for k, v in data.items()}, 1, 0)
        singles.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in summed.items():
        torch.testing.assert_close(grad, (singles[0][name] + singles[1][name]) / 2)
    assert all(error.isfinite() for error in errors)


@pytest.mark.parametrize(
    "preset",
    ["augmented", "augmented-icml", "augmented-relu2", "lolcats", "hedgehog", "t2r", "linformer", "yoso+group",
     "rfa+conv+group"],
)  # fmt: skip
def test_training_lowers_the_error_of_every_layer(preset):
    model = transfer_model(config=PRESETS[preset])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    # Documents long enough that every preset has something far.
    data = batch(length=384)

    def errors():
        return torch.stack([layer.task.losses[-1] for layer in model.linear_attentions().values()])

    TRANSFER.loss(model, data, 1, 0)
    first = errors()
    for _ in range(20):
        optimizer.zero_grad()
        TRANSFER.loss(model, data, 1, 0)
        optimizer.step()
    assert (errors() < first).all()


def saved_at_once(layers: int) -> int:
    """The most bytes that autograd holds for the backward pass at any time of one transfer step."""
    model, data = transfer_model(layers), batch()
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor, self.size = tensor, tensor.nbytes
            held += self.size
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        TRANSFER.loss(model, data, 1, 0)
    assert held == 0
    return most


def test_memory_for_the_backward_pass_does_not_grow_with_depth():
    assert saved_at_once(8) == saved_at_once(2) > 0


def test_error_of_each_head():
    """Of what the layers say when they are asked apart from any transfer; kept heads are the softmax heads."""
    model = transfer_model(kept={1: (0,)})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if LINEAR in name:
            parameter.data = torch.rand(parameter.shape, generator=generator)
    ids = batch(rows=3)["input_ids"]
    errors = errors_of_heads(model, {"input_ids": ids})
    assert all(parameter.grad is None for parameter in model.parameters())
    heard, outputs = {}, {"sdpa": {}, "linearize": {}}

    def hear(module, args, kwargs):
        heard.setdefault(module.layer_idx, kwargs)

    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(hear, with_kwargs=True, prepend=True)
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, index=index: outputs[model.config._attn_implementation].update({index: args[0]})
        )
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        model.base_model(ids, use_cache=False)
        for index, block in enumerate(model.model.layers):
            for implementation in outputs:
                model.set_attn_implementation(implementation)
                block.self_attn(**heard[index] | {"attention_mask": None})
            target, output = (found[index].unflatten(-1, (4, -1)) for found in outputs.values())
            expected = (output - target).square().sum((0, 1, 3)) / target.square().sum((0, 1, 3))
            torch.testing.assert_close(torch.tensor(errors[str(index)]), expected, rtol=1e-4, atol=1e-10)
    assert errors.keys() == {"0", "1"} and all(len(row) == 4 for row in errors.values())
    # fp32, by other kernels.
    assert max(errors["1"][:2]) < 1e-10 and min(errors["0"] + errors["1"][2:]) > 1e-3


def test_losses_of_layers_are_means_over_equal_spans():
    steps = [{"loss": 0.0, "loss_of_layer/0": float(step)} for step in range(1000)]
    for step in steps[:302]:
        step["loss_of_layer/3"] = 1.0
    found = losses_of_layers(steps)
    assert found["0"] == [5 * span + 2.0 for span in range(200)] and found["3"] == [1.0] * 61
    assert losses_of_layers(steps[:7]) == {"0": [*map(float, range(7))], "3": [1.0] * 7}
    # 200 spans of 301 steps are of one or two.
    assert sum(losses_of_layers(steps[:301])["0"]) / 200 == pytest.approx(150, abs=1)
