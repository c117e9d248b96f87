"""The token and the limit on bodies, over real sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.api import access
from app.api.application import create_app
from app.api.problems import MEDIA_TYPE, Problem
from app.settings import Settings
from tests.processes import DEADLINE_S, wait_until

TOKEN = "s3cret-of-33"
OPEN = {"/livez", "/readyz"}


def operations() -> list[tuple[str, str]]:
    """Every (method, path) of the OpenAPI document, placeholders filled."""
    document = create_app(Settings()).openapi()
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in sorted(document["paths"].items())
        for method in methods
    ]


@pytest.fixture(scope="module")
def guarded(shared_live_node: Callable[..., Any]) -> Any:
    return shared_live_node(token=TOKEN)


def test_every_operation_but_the_probes_wants_the_token(guarded: Any) -> None:
    assert len(operations()) > 10
    for method, path in operations():
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = guarded.ask(method, path, headers=headers, content=b"{")
            if path in OPEN:
                assert answer.status_code != 401, path
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["content-type"] == MEDIA_TYPE
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert Problem.model_validate_json(answer.content).instance == path


def test_with_the_token_everything_answers(guarded: Any) -> None:
    for method, path in operations():
        answer = guarded.ask(method, path, headers={"Authorization": f"Bearer {TOKEN}"}, content=b"{")
        assert answer.status_code != 401, (method, path)


@pytest.mark.parametrize(
    ("shown", "status"),
    [(f"bearer {TOKEN}", 200), (f"Bearer  {TOKEN}", 200), (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401),
     (f"Basic {TOKEN}", 401), (TOKEN, 401), ("Bearer", 401), ("", 401)],
)  # fmt: skip
def test_the_token_must_be_shown_as_a_bearers_and_whole(guarded: Any, shown: str, status: int) -> None:
    assert guarded.ask("GET", "/v1/node", headers={"Authorization": shown}).status_code == status


@pytest.mark.parametrize("path", ["/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/livez"])
def test_how_to_ask_can_be_read_without_the_token(guarded: Any, path: str) -> None:
    assert guarded.ask("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nope", "/", "/livez/", "/LIVEZ", "//v1/node", "/docs%2f..%2fv1/node"])
def test_what_is_not_named_open_is_closed(guarded: Any, path: str) -> None:
    assert raw(guarded.url, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())[0] in (
        401,
        404,
    )
    assert guarded.ask("GET", "/v1/nope").status_code == 401


def test_a_token_that_is_not_ascii_is_wrong_not_an_error(guarded: Any) -> None:
    request = "GET /v1/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"
    assert raw(guarded.url, request.encode("latin-1"))[0] == 401


def test_without_a_token_set_nobody_is_asked_for_one(live_node: Callable[..., Any]) -> None:
    assert live_node().ask("GET", "/v1/node").status_code == 200


# -- the limit -------------------------------------------------------------------------------------------------


def raw(url: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; status, headers and body of the answer."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S) as connection:
        with suppress(OSError):  # it may answer and hang up before all is sent
            connection.sendall(request)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
    head, _, body = said.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def chunks(total: int) -> Iterator[bytes]:
    """A chunked body of a JSON string."""
    body = b'"' + b"x" * (total - 2) + b'"'
    for at in range(0, total, 3333):
        part = body[at : at + 3333]
        yield b"%x\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


@pytest.fixture(scope="module")
def bounded(shared_live_node: Callable[..., Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # the limit is read once, when the node starts
        patch.setattr(access.Gate.__init__, "__defaults__", (33_333,))
        return shared_live_node()


HEAD = b"POST /v1/restores HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunked", "with a length"])
def test_a_body_above_the_limit_is_a_413(bounded: Any, is_chunked: bool) -> None:
    if is_chunked:
        request = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks(33_334))
    else:
        request = HEAD + b"Content-Length: 33334\r\n\r\n" + b'"' + b"x" * 33_332 + b'"'
    status, headers, body = raw(bounded.url, request)
    assert (status, headers["content-type"]) == (413, MEDIA_TYPE)
    assert "33,333 bytes" in Problem.model_validate_json(body.split(b"\r\n")[0]).detail
    assert bounded.ask("GET", "/livez").status_code == 200


@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunked", "with a length"])
def test_a_body_at_the_limit_is_read(bounded: Any, is_chunked: bool) -> None:
    if is_chunked:
        request = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks(33_333))
    else:
        request = HEAD + b"Content-Length: 33333\r\n\r\n" + b'"' + b"x" * 33_331 + b'"'
    status, _, body = raw(bounded.url, request)
    assert status == 422
    assert json.loads(body)["errors"][0]["location"] == "body"


def test_an_endless_body_is_cut_off_at_the_limit(bounded: Any) -> None:
    where = urlsplit(bounded.url)
    with socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(12):
            connection.sendall(b"d05\r\n" + b"x" * 3333 + b"\r\n")
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


def test_all_bodies_together_have_a_limit_too(bounded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODIES_NBYTES_MAX", 50_000)
    where = urlsplit(bounded.url)
    with ExitStack() as stack:
        for _ in range(2):
            slow = stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S))
            slow.sendall(HEAD + b"Content-Length: 30000\r\n\r\n" + b" " * 20_000)

        def asked() -> int:
            status, headers, _ = raw(bounded.url, HEAD + b"Content-Length: 20000\r\n\r\n" + b" " * 20_000)
            assert status != 503 or headers["retry-after"] == "5"
            return status

        wait_until(lambda: asked() == 503, "what the slow ones have sent has arrived, and there is no room")
    wait_until(lambda: asked() == 422, "they have hung up, and there is room again")


# -- web pages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unguarded(shared_live_node: Callable[..., Any]) -> Any:
    return shared_live_node()


def asked_by(node: Any, host: str | None, origin: str | None, path: str = "/v1/node", method: str = "GET") -> int:
    lines = [f"{method} {path} HTTP/1.{0 if host is None else 1}"]
    lines += [f"{name}: {said}" for name, said in (("Host", host), ("Origin", origin)) if said is not None]
    status, _, body = raw(node.url, "\r\n".join([*lines, "Connection: close", "Content-Length: 0", "", ""]).encode())
    if status == 403:
        assert Problem.model_validate_json(body).type == "urn:hotspare:problem:forbidden"
    return status


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8470", None, 200), ("[::1]:8470", None, 200), ("localhost", None, 200), ("LOCALHOST:33", None, 200),
        ("a.localhost:8470", None, 200), (socket.gethostname(), None, 200), (None, None, 200), ("10.9.8.7", None, 200),
        ("127.0.0.1:8470", "http://127.0.0.1:8470", 200), ("localhost:8470", "http://localhost:8470", 200),
        # made to point at this host: it asks its own host, as far as the browser can tell
        ("evil.example:8470", None, 403), ("evil.example:8470", "http://evil.example:8470", 403),
        ("localhost.evil.example", None, 403), ("127.0.0.1.evil.example:8470", None, 403), ("1.2.3.4.5", None, 403),
        # asks another host than its own
        ("127.0.0.1:8470", "http://evil.example", 403), ("127.0.0.1:8470", "null", 403),
        ("127.0.0.1:8470", "http://127.0.0.1:3000", 403), ("127.0.0.1:8470", "", 403),
        # no host at all
        ("[", None, 403), ("a b", None, 403), ("x/y", None, 403), ("h:port", None, 403), ("", None, 403),
        ("user@localhost", None, 403), ("localhost:8470:1", None, 403), ("l\u00f6calhost", None, 403),
    ],
)  # fmt: skip
def test_no_page_of_anybody_elses_may_ask(unguarded: Any, host: str | None, origin: str | None, status: int) -> None:
    assert asked_by(unguarded, host, origin) == status
    if status == 403:
        assert asked_by(unguarded, host, origin, "/v1/restores/x/cancel", "POST") == 403
        assert asked_by(unguarded, host, origin, "/nope") == 403


def test_beyond_loopback_a_name_is_held_against_browsers_only(live_node: Callable[..., Any]) -> None:
    """Peers call a node by names that it does not know."""
    beyond, host = live_node(listen="0.0.0.0:0", insecure=True), "node-a.cluster.example:8470"
    assert asked_by(beyond, host, None) == 200
    assert asked_by(beyond, host, f"http://{host}") == 403
    assert asked_by(beyond, "10.9.8.7:8470", "http://10.9.8.7:8470") == 200


def test_with_a_token_it_decides_and_no_name(guarded: Any) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "node.example", "Origin": "https://dashboard.example"}
    assert guarded.ask("GET", "/v1/node", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["[", "a b", "\u00ff", "x" * 9000], ids=lambda host: repr(host[:9]))
def test_a_host_that_is_none_breaks_nothing(guarded: Any, host: str) -> None:
    for path in ("/v1/node", "/v1/nodes", "/nope", "/docs", "/docs/assets/nope"):
        lines = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
        assert raw(guarded.url, lines.encode("latin-1"))[0] < 500, path
