"""Attention transfer block by block: the gradients are those of the whole model, of which little is on the device."""

import pytest
import torch
from torch import nn

from linearize.convert.blocks import Blocks, decoder_blocks
from linearize.convert.transfer import AttentionTransfer
from linearize.layers.attending import UnsupportedModelError

from .families import FAMILIES, tiny_model
from .transfers import BATCH, SECTION, errors, step, student

SLIDING, FULL = "sliding_attention", "full_attention"
# Blocks with rotary embeddings; with positions added before them; of two kinds, each with its mask and embedding.
DEEP = {
    "llama": {"num_hidden_layers": 5},
    "gpt2": {"n_layer": 5},
    "gemma3_text": {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]},
}
CPU = torch.device("cpu")


def assert_same(found, expected):
    """To the bit, but for the loss, which is a mean in another order."""
    torch.testing.assert_close(found.pop("loss"), expected.pop("loss"), rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_the_same_block_by_block(family):
    model, whole = student(tiny_model(family)), student(tiny_model(family))
    blocks = Blocks(model, CPU, 1)
    assert_same(step(model, blocks) | errors(model, blocks), step(whole) | errors(whole))


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("family", DEEP)
def test_any_number_of_blocks_at_once(family, size):
    model = student(tiny_model(family, **DEEP[family]))
    assert_same(step(model, Blocks(model, CPU, size)), step(student(tiny_model(family, **DEEP[family]))))


@pytest.mark.parametrize("size", [1, 2])
def test_frozen_weights_of_no_other_blocks_are_on_the_device(size):
    """What is brought to `cpu:0` from `cpu` is a copy, as on a GPU."""
    model = student(tiny_model("llama", **DEEP["llama"]))
    layers = decoder_blocks(model)
    frozen = [[(p, p.data_ptr()) for p in block.parameters() if not p.requires_grad] for block in layers]
    trained = [(p, p.data_ptr()) for p in model.parameters() if p.requires_grad]
    assert [len(parameters) for parameters in frozen] == [9] * 5
    blocks, seen = Blocks(model, torch.device("cpu:0"), size), []

    def moved(parameters):
        (answer,) = {parameter.data_ptr() != before for parameter, before in parameters}
        return answer

    def there():
        return [index for index, parameters in enumerate(frozen) if moved(parameters)]

    for index, block in enumerate(layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: seen.append((index, there())))
    assert not there()
    step(model, blocks)
    groups = [[*range(5)[start : start + size]] for start in range(0, 5, size)]
    # All three micro batches go through a group before the next comes.
    assert seen == [(index, group) for group in groups for _ in range(3) for index in group]
    assert not there() and moved(trained)


def test_blocks_that_are_not_found():
    model = student(tiny_model("llama"))
    model.model.layers = nn.ModuleDict({str(index): block for index, block in enumerate(model.model.layers)})
    refused = "^LinearizedLlamaForCausalLM has no list of decoder blocks; use transfer.blocks_at_once: null$"
    with pytest.raises(UnsupportedModelError, match=refused):
        Blocks(model, CPU, 1)


def test_blocks_in_another_order():
    model = student(tiny_model("llama"))
    blocks, layers = Blocks(model, CPU, 1), model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    with pytest.raises(UnsupportedModelError, match="does not go through its blocks one after the other; use"):
        step(model, blocks)


def test_blocks_that_are_left_out():
    model = student(tiny_model("llama"))
    blocks = Blocks(model, CPU, 2)
    model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModelError, match="passes some of its blocks by; use"):
        step(model, blocks)


def test_blocks_that_return_tuples():
    """As older code has it: the model around them takes the first of what they return."""
    model = student(tiny_model("llama"))

    def first(block, args, output):
        assert isinstance(output, tuple) and output[1:] == (None,)
        return output[0]

    for block in model.model.layers:
        block.forward = lambda *args, forward=block.forward, **kwargs: (forward(*args, **kwargs), None)
        block.register_forward_hook(first)
    assert_same(step(model, Blocks(model, CPU, 1)), step(student(tiny_model("llama"))))


def test_blocks_that_hand_on_more_than_hidden_states():
    model = student(tiny_model("llama"))
    for block in model.model.layers:
        block.forward = lambda *args, forward=block.forward, **kwargs: (forward(*args, **kwargs), torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="hands on more than hidden states; use"):
        step(model, Blocks(model, CPU, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
def test_memory_on_a_gpu():
    """Of eight wide blocks, one at a time."""
    wide, most = {"num_hidden_layers": 8, "intermediate_size": 2**18}, []
    batch = {name: value.cuda() for name, value in BATCH.items()}
    for size in (8, 1):
        model = student(tiny_model("llama", **wide))
        blocks = Blocks(model, torch.device("cuda"), size)
        torch.cuda.reset_peak_memory_stats()
        AttentionTransfer(SECTION, 0, blocks).loss(model, batch, 1, 0)
        most.append(torch.cuda.max_memory_allocated())
        del model, blocks
    block = 3 * 32 * 2**18 * 4
    assert 6 * block < most[0] - most[1] < 8 * block
