"""What DeepSpeed's ZeRO asks of whoever trains with it, and leaves behind."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from accelerate.state import AcceleratorState
from torch import distributed, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from linearize.convert import processes
from linearize.layers.attention import LinearAttention
from linearize.recipes.schema import deepspeed_file


def configuration(name: str, bf16: bool) -> dict:
    """DeepSpeed's, of a recipe's `finetune.deepspeed`.

    bfloat16 is for computing, as without DeepSpeed: what DeepSpeed itself calls bf16 rounds the model's weights, also
    those that are trained.
    """
    found = json.loads(deepspeed_file(name).read_text("utf-8"))
    # No modules whose gradients and weights are sent in bfloat16.
    found["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return found


def prepare(model: nn.Module) -> None:
    """Have the parameters of a linear attention layer gathered together, before its forward and its backward pass:
    kernels read those of its parts without calling these."""
    from deepspeed.utils import set_z3_leaf_modules

    if any(isinstance(module, LinearAttention) for module in model.modules()):
        set_z3_leaf_modules(model, [LinearAttention])


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside, parameters are whole in every process, also those of which ZeRO-3 gives each a part."""
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parts)


@contextmanager
def engaged() -> Iterator[None]:
    """Inside, Trainer may be given a configuration of DeepSpeed's; what is trained or loaded afterwards knows nothing
    of it."""
    # It talks to a group of processes, also where one that no launcher has started is all of it.
    own = not processes.launched()
    if own:
        # Port 0: any that is free.
        os.environ |= dict(zip(processes.VARIABLES, ("0", "0", "1", "localhost", "0"), strict=True))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state()
        if own:
            if distributed.is_initialized():
                distributed.destroy_process_group()
            for name in processes.VARIABLES:
                del os.environ[name]
