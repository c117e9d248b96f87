"""A node within the test's process, behind a real socket; and a peer that says whatever the test wants it to."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.application import create_app
from app.api.context import Context
from app.api.server import make_server
from app.settings import Settings
from tests.clocks import Clock
from transfer.engine import MooncakeEngine

DEADLINE_S = 30.0


class Live:
    """A running app: its address and, of a node, its parts."""

    def __init__(self, url: str, context: Context | None) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=DEADLINE_S)
        self._context = context

    @property
    def context(self) -> Context:
        assert self._context is not None
        return self._context

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, path, **options)


@contextmanager
def _served(app: Any) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _keep_engine(context: Context) -> None:
    """Let Mooncake's engine live until this process exits: destroying one holds the GIL for a second, over and over."""
    engine = context.node.engine
    assert isinstance(engine, MooncakeEngine)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._engine))


@contextmanager
def _live_nodes(namespace: str, wait_until: Callable[..., Any]) -> Iterator[Callable[..., Live]]:
    with ExitStack() as stack:

        def start(checkpoint: Path | None = None, fill: str = "none", **options: Any) -> Live:
            settings = Settings.model_validate(
                {
                    "model": "moe",
                    "node_id": "n",
                    "namespace": namespace,
                    "checkpoint": checkpoint,
                    "fill": fill,
                    **options,
                }
            )
            context = Context.open(settings)
            stack.callback(context.stop)
            _keep_engine(context)
            url = stack.enter_context(_served(create_app(settings, context)))
            wait_until(lambda: _answers(url), "the node answers")
            live = Live(url, context)
            stack.callback(live.http.close)
            return live

        yield start


@pytest.fixture(scope="module")
def shared_live_node(
    own_namespace: Callable[[], AbstractContextManager[str]], wait_until: Callable[..., Any]
) -> Iterator[Callable[..., Live]]:
    """`live_node` for nodes that the tests of a module share: ending one takes most of a second. Start each once."""
    with ExitStack() as stack:

        def start(**options: Any) -> Live:
            namespace = stack.enter_context(own_namespace())
            return stack.enter_context(_live_nodes(namespace, wait_until))(**options)

        yield start


@pytest.fixture
def live_node(namespace: str, wait_until: Callable[..., Any]) -> Iterator[Callable[..., Live]]:
    """`live_node(checkpoint=…, fill=…, peers=…, token=…)` → a `Live` node "n" of model "moe", without a fill."""
    with _live_nodes(namespace, wait_until) as start:
        yield start


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


Answer = tuple[int, bytes | Iterable[bytes]]


class OddPeer:
    """Serves what `answers` says for "METHOD /path", or for any other what `answers["*"]` says; notes each request."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[], Answer]] = {"*": (404, b"{}")}
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        odd = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self) -> None:
                odd.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                name = f"{self.command} {self.path.split('?')[0]}"
                odd.asked.append(name)
                odd.headers.append({key.lower(): value for key, value in self.headers.items()})
                said = odd.answers.get(name, odd.answers["*"])
                status, body = said() if callable(said) else said
                self.send_response(status)
                self.end_headers()
                try:
                    for chunk in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                except OSError:  # the other side hung up
                    return

            do_GET = do_POST = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """Stop listening: from now on, connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


@pytest.fixture
def odd_peer() -> Iterator[Callable[[], OddPeer]]:
    """`odd_peer()` → an `OddPeer`, closed at the end of the test."""
    made: list[OddPeer] = []

    def make() -> OddPeer:
        made.append(OddPeer())
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()
