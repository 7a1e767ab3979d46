"""Processes that end with the one that started them."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """On Linux this process gets the signal when the one that started it ends: nothing goes on unseen, and writes what
    another run goes on from."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
