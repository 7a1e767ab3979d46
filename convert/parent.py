"""What a process has to do with the one of `launch_workers` that started it."""

import ctypes
import signal
import sys

# Where it writes why it ended, for that one to say it, instead of to standard error.
REASON = "LINEARIZE_REASON"
PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """On Linux this process gets the signal when its parent ends: nothing goes on unseen, and writes what another run
    goes on from."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
