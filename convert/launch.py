"""Starting a conversion on several devices: accelerate's or DeepSpeed's launcher runs the same command in each process.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from linearize.convert.context import StageError
from linearize.convert.parent import REASON, end_with_parent
from linearize.convert.processes import launched

Launcher = Literal["auto", "none", "accelerate", "deepspeed"]
LOG = "launch.log"


def processes_wanted(launcher: Launcher, gpus: int | None) -> int:
    """How many processes to start; 1 to go on in this one.

    Raises:
        StageError: there is no such launcher, or more are asked for than there are GPUs.
    """
    if launcher not in get_args(Launcher):
        raise StageError(f"--launch {launcher}: expected {', '.join(get_args(Launcher))}")
    present = torch.cuda.device_count()
    if gpus is not None and present and gpus > present:
        raise StageError(f"--gpus {gpus}: this machine has {present}")
    if launcher == "none":
        if gpus not in (None, 1):
            raise StageError(f"--launch none: runs as one process, not as --gpus {gpus}")
        return 1
    return gpus or max(present, 1)


def command(launcher: Launcher, processes: int, arguments: list[str]) -> list[str]:
    """The command line that starts so many processes of `linearize` with these arguments on this machine."""
    if launcher == "deepspeed":
        # Behind a dash, or it takes --launch for one of its own.
        options = ["--num_gpus", str(processes), "--no_local_rank", "--module", "--"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options, "linearize.cli", *arguments]
    module = ["--module", "linearize.cli", *arguments]
    if not torch.cuda.is_available():
        # accelerate starts several processes on CPUs by MPI alone.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc_per_node", str(processes), *module]
    options = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    listed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Port 0: any that is free.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    return [*accelerate, *listed, *module]


@contextmanager
def interruptions_named(directory: Path) -> Iterator[None]:
    """Inside, SIGTERM is Ctrl-C, but not in one of several processes, which may be waiting for others: it ends there.

    Raises:
        StageError: one of them came.
    """
    if launched():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise StageError(
            f"{directory}: stopped before its work was done; --resume goes on from what was saved before"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def launch_workers(launcher: Launcher, processes: int, arguments: list[str], directory: Path) -> None:
    """Run `linearize` with these arguments in so many processes, and wait for them.

    Raises:
        StageError: with what the first that failed said it ended for, or else which log tells.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / LOG
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as errors:
        # A pipe, as the reason may be that the disk is full.
        reason = Path(scratch) / "reason"
        os.mkfifo(reason)
        told = os.open(reason, os.O_RDONLY | os.O_NONBLOCK)
        child = subprocess.Popen(
            command(launcher, processes, arguments),
            stderr=errors,
            env=os.environ | {REASON: str(reason)},
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
        before = {
            number: signal.signal(number, lambda number, _: child.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        sentences = os.read(told, 65536).decode().splitlines()
        os.close(told)
    if code:
        # What all have found, all say.
        raise StageError(
            sentences[0]
            if sentences
            else f"{directory}: a process ended before its work was done ({log} says how); --resume goes on from the "
            "last checkpoint"
        )
