"""A network of its own for a round, in which all goes over one link that can be slowed down: its loopback.

The network namespace has no name, and is gone with the last process in it, whatever ends that. A thread is in it or is
not: the one that enters runs the round, and asks nodes from inside; what it has forked is told by `path` where to go.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x4000_0000
MTU = 1500  # loopback's own of 64 KiB does not fit into the bucket
SHAPE = ("burst", "32kb", "latency", "400ms")

_libc = ctypes.CDLL(None, use_errno=True)


class SlowLink:
    """The loopback of the network that this thread is in."""

    def __init__(self) -> None:
        self.path = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        self._is_slow = False
        _run("ip", "link", "set", "lo", "mtu", str(MTU), "up")

    def slow_down(self, mbit_per_s: float) -> None:
        """All that is sent shares so much; what waits already goes on at that rate. Raises RuntimeError."""
        verb = "change" if self._is_slow else "add"
        _run("tc", "qdisc", verb, "dev", "lo", "root", "tbf", "rate", f"{mbit_per_s}mbit", *SHAPE)
        self._is_slow = True

    def free(self) -> None:
        """As fast as the machine."""
        if self._is_slow:
            _run("tc", "qdisc", "del", "dev", "lo", "root")
            self._is_slow = False


@contextmanager
def slow_link() -> Iterator[SlowLink]:
    """Be in such a network for a while. Raises OSError where that is not allowed."""
    with open("/proc/thread-self/ns/net") as before:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "no network namespace of its own: be root to slow links down")
        try:
            yield SlowLink()
        finally:
            if _libc.setns(before.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "the way back to the network that was left")


def why_not() -> str:
    """Why links cannot be slowed down here; empty if they can."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        return "needs root and iproute2"
    try:
        with slow_link() as link:
            link.slow_down(1)
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
