"""Where campaigns happen: real nodes in a namespace and a directory of their own, of which nothing is left at the end.

A `Ground` is there for a whole run, a `Field` for one round of a campaign. Both end whatever ends the run, Ctrl-C too;
and should the run itself be killed, its processes die with it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from shm import posix
from shm.layout import PREFIX, SHM_DIRECTORY, SegmentName
from tests.processes import NODE_MODULES, Child, Daemon, Process, Zygote, start_anew, wait_until
from transfer.checkpoint.synth import write_checkpoint

MODEL = "moe"
PORTS = range(18_000, 32_000)  # above Mooncake's, below those that the kernel hands out to whoever connects
TORCH_MODULES = ("torch", "safetensors.torch", "transfer.slots", "transfer.checkpoint", "transfer.push")
QUICK = {"MC_TRANSFER_TIMEOUT": "2"}  # seconds: many pauses are longer

_numbers = itertools.count()


def interrupt_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does: everything is cleared away."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


class Traced:
    """Starts a process under strace, which kills it at the n-th of some system call. Takes the place of a `Zygote`."""

    def __init__(self, call: str, number: int) -> None:
        self._call, self._number = call, number

    def fork(self, command: Sequence[str], streams: Sequence[int], environment: Mapping[str, str]) -> Process:
        # -D: the process is our child, and strace its grandchild, so that both end with it. No --seccomp-bpf, quick as
        # it would be: with it strace 6.1 injects nothing.
        strace = ["strace", "-D", "-f", "-qq", "-o", os.devnull, "-e", f"trace={self._call}"]
        inject = f"inject={self._call}:signal=SIGKILL:when={self._number}"
        return start_anew([*strace, "-e", inject, sys.executable, *command], streams, env=environment)


class Elsewhere:
    """Forks into another network. Takes the place of a `Zygote`."""

    def __init__(self, zygote: Zygote, network: str) -> None:
        self._zygote, self._network = zygote, network

    def fork(self, command: Sequence[str], streams: Sequence[int], environment: Mapping[str, str]) -> Process:
        return self._zygote.fork(command, streams, environment, network=self._network)


class Field:
    """One round's nodes, files and segments. `network` is the path of the network that its processes are in."""

    def __init__(self, ground: Ground, directory: Path, network: str = "") -> None:
        self.namespace = f"soak{os.getpid()}x{next(_numbers)}"
        self.directory = directory
        self._ground = ground
        self._network = network
        self._daemons: list[Daemon] = []
        self._children: list[Child] = []
        self._ports: dict[str, int] = {}

    def port(self, node: str) -> int:
        if node not in self._ports:
            self._ports[node] = self._ground.free_port()
        return self._ports[node]

    def serve(
        self,
        node: str,
        peers: Sequence[str],
        *,
        checkpoint: Path | None = None,
        traced: Traced | None = None,
        **options: object,
    ) -> Daemon:
        """Start a node; it is killed when the round ends."""
        arguments = ["--model", MODEL, "--namespace", self.namespace]
        for peer in peers:
            if peer != node:
                arguments += ["--peer", f"{peer}=http://127.0.0.1:{self.port(peer)}"]
        if checkpoint is not None:
            arguments += ["--checkpoint", str(checkpoint)]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        zygote: Any = traced or Elsewhere(self._ground.node_zygote, self._network)
        daemon = Daemon(node, self.port(node), arguments, QUICK, self.log(node), zygote)
        self._daemons.append(daemon)
        return daemon

    def python(self, module: str, *arguments: object) -> Child:
        """A process with torch that runs `-m module`; it is killed when the round ends."""
        environment = {**os.environ, **QUICK}
        command = ["-m", module, *map(str, arguments)]
        zygote = Elsewhere(self._ground.torch_zygote, self._network)
        self._children.append(Child(lambda to: zygote.fork(command, to, environment)))
        return self._children[-1]

    def log(self, node: str) -> Path:
        return self.directory / f"{node}.log"

    def segment(self, node: str) -> Path:
        return Path(SHM_DIRECTORY, SegmentName(self.namespace, MODEL, node).object_name)

    def objects(self) -> list[str]:
        """Names of all that is left of it in /dev/shm."""
        return [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(f"{PREFIX}.{self.namespace}.")]

    def close(self) -> None:
        for process in (*self._daemons, *self._children):
            process.close()
        for name in self.objects():
            posix.unlink(name)


class Ground:
    """A directory, processes to fork from, ports, and checkpoints that rounds share."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._before = set(psutil.Process().children(recursive=True))
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hotspare-soak-")))
        self._zygotes: dict[tuple[str, ...], Zygote] = {}
        self._free = iter(PORTS)
        self._checkpoints: dict[tuple[Any, ...], Path] = {}

    def __enter__(self) -> Ground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        for zygote in self._zygotes.values():
            zygote.close()
        self._stack.close()
        wait_until(lambda: not self.left(), f"end of {self.left()}")

    def left(self) -> list[psutil.Process]:
        """Processes started by this one that still run."""
        children = set(psutil.Process().children(recursive=True)) - self._before
        return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    def _zygote(self, modules: tuple[str, ...]) -> Zygote:
        if modules not in self._zygotes:
            self._zygotes[modules] = Zygote(*modules)
        return self._zygotes[modules]

    def prepare(self) -> None:
        """Have what processes are forked from. It stays in the network that it was made in: not in one of a round."""
        assert self.node_zygote
        assert self.torch_zygote

    @property
    def node_zygote(self) -> Zygote:
        return self._zygote(NODE_MODULES)

    @property
    def torch_zygote(self) -> Zygote:
        return self._zygote(TORCH_MODULES)

    def free_port(self) -> int:
        """One of 127.0.0.1 that nobody listens on, and that no other run on this machine is given meanwhile."""
        for port in self._free:
            claim = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            with suppress(OSError), socket.socket() as probe:
                claim.bind(f"\0hotspare-tests.{port}")
                probe.bind(("127.0.0.1", port))
                return port
        raise AssertionError(f"no port left of {PORTS}")

    def checkpoint(self, seed: int, *, scale: float = 0.06, file_nbytes: int = 3333333) -> Path:
        """Three layers of 13 experts, block fp8; another seed, only other bytes. Read only."""
        asked = (seed, scale, file_nbytes)
        if asked not in self._checkpoints:
            directory = self.directory / f"checkpoint-{len(self._checkpoints)}"
            write_checkpoint(
                directory, "deepseek-v3", layers=6, experts=13, scale=scale, seed=seed, file_nbytes=file_nbytes
            )
            self._checkpoints[asked] = directory
        return self._checkpoints[asked]

    @contextmanager
    def field(self, keep: Path | None = None, network: str = "") -> Iterator[Field]:
        """A place for one round. Its logs are copied into `keep`."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        made = Field(self, directory, network)
        try:
            yield made
        finally:
            made.close()
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for log in directory.glob("*.log"):
                    shutil.copy(log, keep)
            shutil.rmtree(directory)
            assert made.objects() == []
