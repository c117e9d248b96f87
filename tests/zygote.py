"""A process that has imported what nodes import, and forks into one at each request.

Starting a node takes 0.8 s of a core, and all but 0.15 s of that is imports: two hundred nodes of a run are a third of
its processor time. What is forked here is a process like any other, with its own memory, files, signals and end; only
its modules are there already. Tests of how a process starts start it anew.

    python -m tests.zygote SOCKET MODULE…

A request is a message on the socket: a JSON document, and four descriptors (stdin, stdout, stderr, and a pipe). The
pipe is told the process's id, and, when it has ended, its exit status.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

REQUEST_NBYTES_MAX = 1 << 17
DESCRIPTORS = 4
PR_SET_PDEATHSIG = 1
CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)


def wait_for_a_request(requests: socket.socket) -> dict[str, Any]:
    """Returns in each forked process, and never in this one, which ends with who asks it."""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    selector.unregister(key.fd)
                    _tell_its_end(key.fd, *key.data)
                    continue
                message, descriptors, _, _ = socket.recv_fds(requests, REQUEST_NBYTES_MAX, DESCRIPTORS)
                if not message:
                    raise SystemExit
                *streams, told = descriptors
                pid = os.fork()
                if not pid:
                    _let_go(selector, requests, told)
                    _take(streams)
                    return dict(json.loads(message))
                for descriptor in streams:
                    os.close(descriptor)
                os.write(told, f"{pid}\n".encode())
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, told))


def _tell_its_end(pidfd: int, pid: int, told: int) -> None:
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(told, f"{status}\n".encode())
    os.close(told)


def _let_go(selector: selectors.BaseSelector, requests: socket.socket, told: int) -> None:
    """Of a forked process: what belongs to the one that forks."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for key in list(selector.get_map().values()):
        if key.data is not None:
            os.close(key.fd)
            os.close(key.data[1])
    selector.close()
    requests.close()
    os.close(told)


def _take(streams: list[int]) -> None:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)


def become(request: dict[str, Any]) -> None:
    """Run what was asked for as `python -m MODULE` or `python -c CODE` would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    if request["network"]:
        _enter(request["network"])
    how, what, *arguments = request["command"]
    if how == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _enter(network: str) -> None:
    """Go on in a network namespace: one that `ip netns` has made, by its name, or one that a path leads to."""
    with (Path("/run/netns") / network).open() as namespace:
        if _libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"no network namespace {network}")


def leave(error: BaseException | None) -> NoReturn:
    """End as Python does, but do not take every module apart first: that is 0.2 s for nothing."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for those who run the tests, who will end this
    requests = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    request = wait_for_a_request(requests)
    try:
        become(request)
    except BaseException as error:
        leave(error)
    leave(None)


if __name__ == "__main__":
    main()
