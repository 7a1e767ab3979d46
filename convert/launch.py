"""Starting a conversion on several devices: accelerate's or DeepSpeed's launcher runs the same command in each process.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

import torch

from linearize.convert.context import StageError

Launcher = Literal["auto", "none", "accelerate", "deepspeed"]
# Where the main process writes why it ended, for `launch` to say it, instead of to standard error.
REASON = "LINEARIZE_REASON"
LOG = "launch.log"


def processes_wanted(launcher: Launcher, gpus: int | None, deepspeed: bool) -> int:
    """How many processes to start; 0 to go on in this one.

    Args:
        deepspeed: whether a stage uses it; it reads a launcher's environment even as one process.

    Raises:
        StageError: there is no such launcher, more are asked for than there are GPUs, or DeepSpeed without a launcher.
    """
    if launcher not in get_args(Launcher):
        raise StageError(f"--launch {launcher}: expected {', '.join(get_args(Launcher))}")
    present = torch.cuda.device_count()
    if gpus is not None and present and gpus > present:
        raise StageError(f"--gpus {gpus}: this machine has {present}")
    if launcher == "none":
        if gpus not in (None, 1):
            raise StageError(f"--launch none: runs as one process, not as --gpus {gpus}")
        if deepspeed:
            raise StageError("--launch none: DeepSpeed is started by a launcher, as one process too; use --launch auto")
        return 0
    wanted = gpus or max(present, 1)
    return wanted if wanted > 1 or deepspeed else 0


def command(launcher: Launcher, processes: int, arguments: list[str]) -> list[str]:
    """The command line that starts so many processes of `linearize` with these arguments on this machine."""
    module = ["--module", "linearize.cli", *arguments]
    if launcher == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), *module]
    if not torch.cuda.is_available() or processes == 1:
        # accelerate starts several processes on CPUs by MPI alone, and a single one without a launcher's environment.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc_per_node", str(processes), *module]
    options = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    listed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Port 0: any that is free.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    return [*accelerate, *listed, *module]


def launch_workers(launcher: Launcher, processes: int, arguments: list[str], directory: Path) -> None:
    """Run `linearize` with these arguments in so many processes, and wait for them.

    Raises:
        StageError: with what the main process said it ended for, or else which log tells.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / LOG
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as errors:
        reason = Path(scratch) / "reason"
        environment = os.environ | {REASON: str(reason)}
        child = subprocess.Popen(command(launcher, processes, arguments), stderr=errors, env=environment)
        before = {
            number: signal.signal(number, lambda number, _: child.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if not code:
            return
        told = reason.read_text("utf-8").strip() if reason.is_file() else ""
    raise StageError(
        told
        or f"{directory}: a process ended before its work was done ({log} says how); --resume goes on from the last "
        "checkpoint"
    )
