"""What DeepSpeed's ZeRO asks of whoever trains with it, and leaves behind."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from linearize.layers.attention import LinearAttention


def prepare(model: nn.Module) -> None:
    """Have the parameters of a linear attention layer gathered together, before its forward and its backward pass:
    kernels read those of its parts without calling these."""
    from deepspeed.utils import set_z3_leaf_modules

    if any(isinstance(module, LinearAttention) for module in model.modules()):
        set_z3_leaf_modules(model, [LinearAttention])


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters are whole in every process, also those of which ZeRO-3 gives each a part."""
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with ExitStack() as stack:
        if parts:
            from deepspeed.runtime.zero import GatheredParameters

            # One by one: of several, DeepSpeed waits for the last, before which gloo need not have got the others.
            for part in parts:
                stack.enter_context(GatheredParameters([part]))
        yield


def add_gradients(engine: nn.Module, root: Tensor, is_last: bool) -> None:
    """One of several backward passes of a micro batch, each behind a forward pass of the engine; gradients are reduced
    at each, as with gradient accumulation, and summed.

    Args:
        root: a scalar.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(boundary and is_last)
    engine.backward(root, scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(boundary)


def leave() -> None:
    """What is trained or loaded next knows nothing of DeepSpeed."""
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state()
