"""The demo's rank as the story sees it: commands to its process, and its answers."""

from __future__ import annotations

import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from app.demo.fleet import LOG_LINES_SHOWN, MODEL, DemoFailed, NodeProcess, die_with_parent, environment
from app.demo.interruption import Interruption

ANSWER_TIMEOUT_S = 600.0  # the largest demo, compared byte for byte
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
ANSWER_NBYTES_MAX = 1 << 20


class RankProcess:
    """Answers one command at a time."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, interruption: Interruption) -> None:
        self._process = process
        self._log = log
        self._interruption = interruption

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command of `app.demo.rank`. Raises DemoFailed with the process's last words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(command) from None
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(POLL_S):
                self._interruption.check()
                if time.monotonic() > deadline:
                    raise self._failure(command)
        line = self._process.stdout.readline(ANSWER_NBYTES_MAX)
        if not line.endswith(b"\n"):
            raise self._failure(command)
        answer: dict[str, Any] = orjson.loads(line)
        return answer

    def _failure(self, command: str) -> DemoFailed:
        said = self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return DemoFailed("\n".join([f"the rank did not answer to {command!r}; its last words:", *said]))


@contextmanager
def rank_beside(
    node: NodeProcess, checkpoint: Path, namespace: str, log: Path, interruption: Interruption
) -> Iterator[RankProcess]:
    """A rank on the host of `node`; gone at the end."""
    command = [sys.executable, "-m", "app.demo.rank", str(checkpoint), MODEL, namespace, node.node_id, node.url]
    with log.open("wb") as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            cwd=log.parent,
            env=environment() | {"OMP_NUM_THREADS": "1"},  # comparing is no work for threads that spin
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        yield RankProcess(process, log, interruption)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
