"""The process of `hotspare serve`: listen, open the node, serve until told to stop.

The port is taken first: a node that cannot be asked need not claim memory. The segment is opened while the web
framework is imported, since a restart that adopts it has to be quick.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from app.cli.stop_deadline import StopDeadline
from app.settings import Address, Settings
from app.terminal import streams
from app.terminal.streams import say
from app.terminal.units import duration, size
from shm.errors import HotspareError
from shm.layout import SegmentName

if TYPE_CHECKING:
    import uvicorn

    from app.api.context import Context

BACKLOG = 1024
DESCRIPTORS_MAX = 1 << 16
READY_POLL_S = 0.02
GRACEFUL_SHUTDOWN_S = 1  # streams of events are cut after that
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CHATTY_LOGGERS = ("httpx", "httpcore", "uvicorn", "asyncio")

_log = logging.getLogger("hotspare.daemon")


class ListenFailed(HotspareError):
    """The control plane's address cannot be listened on."""


class Stopper:
    """Notes a signal that asks the process to stop. It never raises: that could break an import or a claim half-way.

    A node that is being opened stops as soon as it is open.
    """

    def __init__(self, deadline: StopDeadline) -> None:
        self._asked = False
        self._deadline = deadline
        self._server: uvicorn.Server | None = None
        for number in STOPPING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._deadline.tell()
        if self._server is not None:
            self._server.should_exit = True

    def watch(self, server: uvicorn.Server) -> None:
        """Stop this server too, at once if the signal has come already."""
        self._server = server
        if self._asked:
            server.should_exit = True


def bind(address: Address) -> socket.socket:
    """A socket that listens there. Raises ListenFailed."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenFailed(f"--listen {address}: {address.host} has no address here ({error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenFailed(_explain(address, error)) from error
    return listener


def _explain(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{address} is in use: stop the process that listens there, or give --listen another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--listen {address}: {address.host} is not an address of this host"
    return f"--listen {address}: {error.strerror}"


def configure_logging(level: str) -> None:
    """Log to stderr, through a descriptor of its own: fd 2 may be turned away for a while.

    What cannot be written there is lost, without a word: a full disk must not fill with tracebacks once it has room.
    """
    logging.raiseExceptions = False
    stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), stream=stream, format=form)
    if level != "debug":
        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def silence_native_output() -> Iterator[None]:
    """Keep what libraries write straight to fd 2 out of sight; Mooncake does as it starts, whatever its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def raise_descriptor_limit() -> None:
    """Have as many descriptors as the host allows: 1,024 are usual, for the sake of programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _import_server() -> None:

    import app.api.application  # noqa: F401


def open_context(settings: Settings, *, debug: bool) -> Context:
    """Open the node while the rest of the server is imported in another thread."""
    importer = threading.Thread(target=_import_server, name="hotspare-import", daemon=True)
    importer.start()
    from app.api.context import Context

    if debug:
        return Context.open(settings)
    with silence_native_output():
        return Context.open(settings)


def run(settings: Settings, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises what keeps the node from starting, and leaves nothing then."""
    started_s = time.monotonic()
    raise_descriptor_limit()
    name = SegmentName(settings.namespace, settings.require_model(), settings.node_id)
    deadline = StopDeadline(name, partial(say, f"{settings.node_id} stopped"))
    stopper = Stopper(deadline)
    listener = bind(settings.address)
    configure_logging(log_level)
    debug = log_level == "debug"
    try:
        context = open_context(settings, debug=debug)
        deadline.hurry = context.hurry
        try:
            _announce(settings, listener, context)
            threading.Thread(target=_announce_ready, args=(context, started_s), name="ready", daemon=True).start()
            _serve(settings, listener, context, stopper, debug=debug)
        finally:
            context.stop()  # a second time, if it served: harmless, and needed where it did not
    finally:
        listener.close()
    deadline.stand_down()
    say(f"{settings.node_id} stopped")


def leave(status: int = 0) -> NoReturn:
    """End the process after `run`, which has let everything go, also where it failed.

    Python would take Mooncake's engine down first: a second in which nothing is left to do, and a restart waits for it.
    """
    logging.shutdown()
    streams.flush()
    os._exit(status)


def _serve(settings: Settings, listener: socket.socket, context: Context, stopper: Stopper, *, debug: bool) -> None:
    from app.api.application import create_app
    from app.api.server import make_server

    server = make_server(create_app(settings, context), access_log=debug, graceful_s=GRACEFUL_SHUTDOWN_S)
    stopper.watch(server)
    gc.freeze()  # what was imported stays: to look through it again at each full collection holds all up for 40 ms
    server.run(sockets=[listener])


def _announce(settings: Settings, listener: socket.socket, context: Context) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{Address(host, port)}"
    node = context.node
    segment = f"segment {node.name.object_name}: {node.state}"
    say(f"{settings.node_id} of {node.name.model} at {url} (API: {url}/docs), {segment}")
    if not settings.address.is_loopback and settings.token is None:
        _log.warning("--insecure: whoever reaches %s may read the maps and start restores", url)


def _announce_ready(context: Context, started_s: float) -> None:
    """Say once that the node is ready, how long it took, and where its bytes came from."""
    from app.node.node import NodeState

    node = context.node
    while node.state is not NodeState.READY:
        if node.state is NodeState.STOPPING:
            return
        time.sleep(READY_POLL_S)
    seconds = time.monotonic() - started_s
    moved: dict[str, int] = {}
    for document in context.restores.documents():
        for source, nbytes in document.bytes_by_source.items():
            moved[source.value] = moved.get(source.value, 0) + nbytes
    came = ", ".join(f"{size(nbytes)} from {source}" for source, nbytes in moved.items() if nbytes)
    blocks = len(node.published())
    say(f"{node.settings.node_id} is ready after {duration(seconds)}: {blocks} blocks, {came or 'adopted'}")
