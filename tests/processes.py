"""Processes that tests start: all that is waited for has a deadline, and they die with the one that runs the tests."""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0  # starting a node takes one second, and on a machine with a load of 12 as many as ten
POLL_S = 0.005  # and ever more slowly: asking a node takes processor time that it may need itself
POLL_MAX_S = 0.05
PR_SET_PDEATHSIG = 1
NODE_MODULES = (  # what a node has imported once it serves; but Mooncake, whose random ports would be the same in all
    "app.cli.daemon", "app.api.application", "uvicorn.lifespan.on", "uvicorn.loops.asyncio",
    "uvicorn.protocols.http.auto", "httpcore", "anyio._backends._asyncio",
)  # fmt: skip

_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str = "", deadline_s: float = DEADLINE_S) -> Any:
    """The condition's first true answer; fails after the deadline."""
    end, pause_s = time.monotonic() + deadline_s, POLL_S
    while not (answer := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what or condition}")
        time.sleep(pause_s)
        pause_s = min(1.3 * pause_s, POLL_MAX_S)
    return answer


def pause(pid: int) -> None:
    """SIGSTOP, and wait until no thread of it runs: until then it may still answer."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(map(_stands_still, Path(f"/proc/{pid}/task").iterdir())), f"{pid} stands still")


def _stands_still(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return True


def processor_time(work: Callable[[], Any], attempts: int = 5) -> float:
    """Seconds of a processor that the work takes in this thread, at best: to be compared with those of other work.

    Seconds by the clock say little on a machine with other work, and seconds alone little of any machine.
    """
    taken = []
    for _ in range(attempts):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return min(taken)


class Process(Protocol):
    """As much of `subprocess.Popen` as tests need."""

    args: Any
    returncode: Any

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """What the zygote forked. It is the zygote's child, which tells through a pipe what it is and how it ended."""

    def __init__(self, command: Sequence[str], told: int) -> None:
        self.args = [sys.executable, *command]
        self.returncode: int | None = None
        self._told = os.fdopen(told, "rb", buffering=0)
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        if self.returncode is None and self._is_told(0):
            self._note()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._is_told(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._note()
        assert self.returncode is not None
        return self.returncode

    def _is_told(self, timeout: float | None) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._told, selectors.EVENT_READ)
            return bool(selector.select(timeout))

    def _note(self) -> None:
        with self._told:
            self.returncode = int(self._told.readline())

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """Forks processes that have these modules already; see tests/zygote.py."""

    def __init__(self, *modules: str) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *modules], cwd=ROOT,
                pass_fds=[theirs.fileno()], preexec_fn=die_with_parent,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # a process that forks has one
            )  # fmt: skip

    def fork(
        self,
        command: Sequence[str],
        streams: Sequence[int],
        environment: Mapping[str, str] | None = None,
        directory: Path = ROOT,
        network: str = "",
    ) -> Forked:
        """Run `-m MODULE …` or `-c CODE …`, in a network namespace if one is named, or its path given.

        The streams are descriptors of stdin, stdout and stderr, which stay the caller's to close.
        """
        told, tells = os.pipe()
        request = {
            "command": list(command), "environment": dict(os.environ if environment is None else environment),
            "directory": str(directory), "network": network,
        }  # fmt: skip
        try:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [*streams, tells])
        finally:
            os.close(tells)
        return Forked(command, told)

    def close(self) -> None:
        """End it, and with it what it forked."""
        self._requests.close()
        self._process.wait(DEADLINE_S)


def start_anew(command: Sequence[str], streams: Sequence[int], **options: Any) -> Process:
    """A process that is not forked but started."""
    stdin, stdout, stderr = streams
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, preexec_fn=die_with_parent, **options)


class Child:
    """A process that says on stdout how far it is, and goes on when it is told to."""

    def __init__(self, start: Callable[[list[int]], Process]) -> None:
        """`start` is given descriptors of stdin, stdout and stderr for it."""
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self._stderr = os.memfd_create("stderr")  # a pipe that nobody reads would hold up who writes much
        try:
            self._process = start([stdin, stdout, self._stderr])
        finally:
            os.close(stdin)
            os.close(stdout)
        self._said = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect(self, word: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait for a line that begins with `word`; the rest of that line."""
        end = time.monotonic() + deadline_s
        while True:
            line, newline, rest = self._said.partition(b"\n")
            if newline:
                self._said = rest
                if line.startswith(word.encode()):
                    return line.decode()[len(word) :].strip()
                continue
            assert self._hear(end), f"it ended before {word!r}: {self._errors()}"

    def _hear(self, end: float) -> bool:
        """Take what it says next; whether it said anything before it ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            assert selector.select(max(0.0, end - time.monotonic())), f"silent since {self._said!r}: {self._errors()}"
        more = os.read(self._stdout, 65536)
        self._said += more
        return bool(more)

    def _errors(self) -> str:
        nbytes = os.fstat(self._stderr).st_size
        return os.pread(self._stderr, nbytes, 0).decode()  # which leaves the place alone that the process writes at

    def tell(self, word: str = "") -> None:
        os.write(self._stdin, word.encode() + b"\n")

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Ask it to stop, and wait for its end."""
        self._process.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(DEADLINE_S)

    def wait(self) -> tuple[int, str, str]:
        """Wait for its end: exit status, and what it said on stdout and stderr."""
        end = time.monotonic() + DEADLINE_S
        self._hang_up()
        while self._hear(end):
            continue
        status = self._process.wait(max(0.0, end - time.monotonic()))
        return status, self._said.decode(), self._errors()

    def _hang_up(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def close(self) -> None:
        self.kill()
        self._hang_up()
        os.close(self._stdout)
        os.close(self._stderr)


class Daemon:
    """A `hotspare serve` of its own process."""

    def __init__(
        self, node_id: str, port: int, options: Sequence[str], environment: Mapping[str, str], log: Path, zygote: Zygote
    ) -> None:
        self.node_id = node_id
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._http = httpx.Client(trust_env=False, timeout=DEADLINE_S, verify=False)
        command = ["-m", "app.cli", "serve", "--node-id", node_id, "--listen", f"127.0.0.1:{port}", *options]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_"))}
        with log.open("ab") as output, open(os.devnull) as nothing:
            self.process: Process = zygote.fork(
                command, [nothing.fileno(), output.fileno(), output.fileno()], {**own, **environment}
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """Everything on its stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, self.url + path, **options)

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _answers(self, path: str) -> bool:
        assert self.process.poll() is None, f"{self.node_id} ended with {self.process.returncode}:\n{self.said()}"
        try:
            return self.ask("GET", path).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_live(self) -> Daemon:
        return self._wait_for("/livez")

    def wait_ready(self) -> Daemon:
        return self._wait_for("/readyz")

    def _wait_for(self, path: str) -> Daemon:
        try:
            wait_until(lambda: self._answers(path), f"{path} of {self.node_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error
        return self

    def wait_alive(self, *peers: str) -> Daemon:
        """Until it sees these peers alive."""

        def seen() -> bool:
            alive = {n["node_id"] for n in self.get("/v1/nodes")["nodes"] if n["state"] == "alive"}
            return alive >= set(peers)

        wait_until(seen, f"{self.node_id} sees {peers}")
        return self

    def restore(self, target: str | None = None, **body: Any) -> str:
        """Start a restore; its id."""
        answer = self.ask("POST", "/v1/restores", json={"target": {"node_id": target or self.node_id}, **body})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait_restore(self, restore_id: str) -> dict[str, Any]:
        """Until it has ended; its document."""

        def ended() -> Any:
            document = self.get(f"/v1/restores/{restore_id}")
            return document if document["state"] in ("succeeded", "failed", "cancelled") else None

        document: dict[str, Any] = wait_until(ended, f"end of restore {restore_id}:\n{self.said()}")
        return document

    def bytes_by_source(self) -> dict[str, int]:
        """What all its restores together brought."""
        total = {"local": 0, "peer": 0, "disk": 0}
        for restore in self.get("/v1/restores")["restores"]:
            for source, nbytes in restore["bytes_by_source"].items():
                total[source] += nbytes
        return total

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def pause(self) -> None:
        """SIGSTOP: it holds its connections, and answers nothing."""
        pause(self.pid)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.kill()
        self._http.close()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)
