"""Processes of one run, forked from a process that has imported everything, so that starting some costs no seconds.

Run by itself, this file is that process: it reads one request per line, answers with the process ids, and, when all
have ended, with their exit codes. As launchers do, it ends the others where one fails.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process does: not even one that nobody has asked for its exit code."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Run:
    """Ranks of `linearize` that have been started.

    Attributes:
        pids: by rank.
        outputs: by rank, files of what they print.
    """

    pids: list[int]
    outputs: list[Path]
    server: subprocess.Popen
    codes: list[int] | None = None

    def wait(self) -> list[int]:
        """Exit codes by rank, or less than 0, the signal that ended one."""
        self.codes = self.codes or json.loads(self.server.stdout.readline())
        return self.codes

    def has_ended(self) -> bool:
        """Whether all have, or are about to be ended since one has failed."""
        return not all(is_running(pid) for pid in self.pids)

    def kill(self, *numbers: signal.Signals | None) -> list[int]:
        """Exit codes after ranks got these signals, where they had not ended before."""
        for pid, number in zip(self.pids, numbers, strict=True):
            if number is not None and is_running(pid):
                os.kill(pid, number)
        return self.wait()

    def text(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text("utf-8", "replace")


class Ranks:
    """Starts ranks; one run at a time."""

    def __init__(self, directory: Path):
        self.directory, self.runs = directory, []
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # Whether there is a GPU is asked of its driver's tool: CUDA does not outlive a fork.
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )  # fmt: skip

    def start(self, count: int, *arguments, limits: dict[int, int] | None = None) -> Run:
        """`linearize` with these arguments, as that many ranks.

        Args:
            limits: rank -> bytes that a file of it may have, as if its disk were full then.
        """
        if self.runs:
            # A test may have failed before it came to that.
            self.runs[-1].wait()
        outputs = [self.directory / f"{len(self.runs)}.{rank}" for rank in range(count)]
        for output in outputs:
            output.touch()
        limits = [(limits or {}).get(rank, resource.RLIM_INFINITY) for rank in range(count)]
        request = {
            "arguments": list(map(str, arguments)),
            "outputs": list(map(str, outputs)),
            "limits": limits,
            "directory": os.getcwd(),
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.runs.append(Run(json.loads(self.server.stdout.readline()), outputs, self.server))
        return self.runs[-1]

    def finish(self, count: int, *arguments) -> str:
        """What the first rank prints of a run that succeeds."""
        run = self.start(count, *arguments)
        assert run.wait() == [0] * count, "\n".join(run.text(rank) for rank in range(count))
        return run.text()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> None:
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import transformers.models.llama.modeling_llama  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    from linearize.convert import pipeline, plan  # noqa: F401
    from linearize.convert.context import STAGES

    for stage in STAGES:
        __import__(f"linearize.convert.{stage}")
    # Here, not in the ranks: one that is killed while it builds leaves a lock, for which all others would wait.
    build_shm_op()
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        pids = [_fork(rank, port, request) for rank in range(len(request["outputs"]))]
        print(json.dumps(pids), file=answers)
        print(json.dumps(_wait(pids)), file=answers)


def _fork(rank: int, port: int, request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    from linearize import cli

    output = os.open(request["outputs"][rank], os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    values = (rank, rank, len(request["outputs"]), "localhost", port)
    os.environ |= dict(
        zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), map(str, values), strict=True)
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limits"][rank],) * 2)
    sys.argv = ["linearize", *request["arguments"]]
    os.chdir(request["directory"])
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
