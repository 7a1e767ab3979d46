"""What DeepSpeed's ZeRO asks of whoever trains with it, and leaves behind."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from linearize.convert import processes
from linearize.layers.attention import LinearAttention
from linearize.recipes.schema import deepspeed_file


def configuration(name: str, bf16: bool) -> dict:
    """DeepSpeed's, of a recipe's `deepspeed`.

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


def autocast(engine: nn.Module) -> AbstractContextManager:
    """Inside, what does not go through an engine's forward is computed in the precision of what does."""
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    return autocast_if_enabled(engine)


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
                from deepspeed.utils import groups

                distributed.destroy_process_group()
                # Its clone of that group, which it would take for one of the next group.
                groups._WORLD_GROUP = None
            for name in processes.VARIABLES:
                del os.environ[name]


@contextmanager
def partitioned(load: Callable[[], PreTrainedModel], dtype: str) -> Iterator[PreTrainedModel]:
    """Inside, the base model that `load` gives computes without gradients from weights of which each process holds a
    part (ZeRO-3), put together module by module; what is added to it there stays whole. Behind, it has no weights.

    Args:
        dtype: of the weights; DeepSpeed asks for it before it is asked to load.
    """
    from deepspeed.runtime.zero import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    # DeepSpeed waits for the last of several parameters, before which gloo need not have got the others: what comes
    # late would overwrite what was loaded. One after the other, they are not to be fetched ahead either, as DeepSpeed
    # then takes for whole what it has let go since.
    on_cpu = not torch.cuda.is_available()
    ahead = {"prefetch_bucket_size": 0} if on_cpu else {}
    configuration = {
        "zero_optimization": {"stage": 3, "stage3_allgather_sequential": on_cpu},
        "bf16": {"enabled": dtype == "bfloat16"},
        "train_micro_batch_size_per_gpu": 1,
    }
    # As long as it lives, transformers loads parts.
    loading = HfDeepSpeedConfig(configuration)
    try:
        model = load()
    finally:
        del loading
    hooks = DeepSpeedZeRoOffload(model.base_model, NoopTimer(), configuration, **ahead)
    try:
        yield model
    finally:
        hooks.destroy()
        # DeepSpeed's caches of modules outlive the model.
        for parameter in model.parameters():
            if hasattr(parameter, "ds_tensor"):
                parameter.data, parameter.ds_tensor.data = (x.new_empty(0) for x in (parameter, parameter.ds_tensor))
