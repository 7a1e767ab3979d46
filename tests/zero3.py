"""What each of two processes does in `test_teacher`: `zero3.py DIRECTORY FAMILY ..`, the models being in DIRECTORY."""

import sys
from functools import partial

import torch
from accelerate import PartialState
from deepspeed.runtime import zero as deepspeed_zero
from families import tiny_model
from transfers import errors, step, student

from linearize.convert import zero
from linearize.convert.blocks import decoder_blocks
from linearize.convert.sources import Source, load_model

PartialState(cpu=True)
# Nothing is too small to be taken apart again.
deepspeed_zero.DeepSpeedZeRoOffload = partial(deepspeed_zero.DeepSpeedZeRoOffload, param_persistence_threshold=0)
directory, *families = sys.argv[1:]
for family in families:
    whole = student(tiny_model(family))
    expected = step(whole) | errors(whole)
    with zero.partitioned(partial(load_model, Source(f"{directory}/{family}"), "float32"), "float32") as model:
        student(model)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        most = 0

        def look(*_, frozen=frozen):
            global most
            most = max(most, sum(parameter.numel() for parameter in frozen))

        for module in decoder_blocks(model).modules():
            module.register_forward_hook(look, prepend=True)
        found = step(model) | errors(model)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{family}: {name}: ".__add__)
        size = sum(parameter.ds_numel for parameter in frozen)
        held = sum(parameter.ds_tensor.numel() for parameter in frozen)
        # Parts are padded to the same size.
        assert size / 2 <= held <= size / 2 + len(frozen), (family, held, size)
        largest = max(parameter.ds_numel for parameter in frozen)
        assert 0 < most <= 2 * largest, (family, most, largest)
        assert not sum(parameter.numel() for parameter in frozen), family
    assert not sum(parameter.numel() + parameter.ds_tensor.numel() for parameter in frozen), family
    print(f"{family}: {most} of {size} numbers at most")
