"""One run on several processes: the environment that a launcher gives each, and what one of them does for all."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from linearize.convert.context import StageError

T = TypeVar("T")
# What torchrun, and all that starts processes as it does, sets in each.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The others wait while one evaluates; a process that has died ends them all before.
PATIENCE = timedelta(days=7)


def launched() -> bool:
    """Whether a launcher has started this process.

    Raises:
        StageError: naming what is missing of its environment.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and len(missing) < len(VARIABLES):
        present = next(name for name in VARIABLES if name in os.environ)
        raise StageError(
            f"{present} is set, as a launcher sets it, but not {', '.join(missing)}; start the processes with "
            "torchrun, accelerate launch or --launch, or unset it to run as one process"
        )
    return not missing


def join() -> None:
    """Meet the other processes, if a launcher has started some."""
    if launched() and not distributed.is_initialized():
        # What Trainer would begin with.
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process does what only one does: it prints, and writes results."""
    return rank() == 0


def share(work: Sequence[T]) -> Sequence[T]:
    """What this process does of work that all do together."""
    return work[rank() :: count()]


def wait() -> None:
    """Until all processes have come so far."""
    if distributed.is_initialized():
        PartialState().wait_for_everyone()


def alone(work: Callable[..., T], *arguments) -> T:
    """What `work` returns in the main process, for all; where it fails there, the others end with it."""
    if not distributed.is_initialized():
        return work(*arguments)
    outcome: list = [False, None]
    try:
        if is_main():
            outcome = [True, work(*arguments)]
    finally:
        distributed.broadcast_object_list(outcome)
    if not outcome[0]:
        sys.exit(2)
    return outcome[1]


def everyone(value: T) -> list[T]:
    """What every process gives, by rank, for all."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def mean(x: torch.Tensor) -> torch.Tensor:
    """Over all processes, each of which has a tensor of the same shape."""
    if not distributed.is_initialized():
        return x
    distributed.all_reduce(x)
    return x / count()


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Make the gradients of every process their mean over all processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = (flat / count()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(x) for part, x in zip(parts, gradients, strict=True)])
