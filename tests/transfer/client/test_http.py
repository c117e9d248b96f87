"""Every exchange with a node ends: by its deadline as a whole, in bounded memory, or when the client is closed."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator

import pytest

from shm.errors import InvalidInput
from tests.liars import LIES, OK, Lie, body_drips, lying, says, silent
from tests.processes import DEADLINE_S
from transfer.client.http import NodeHttp, NodeRefused, NodeUnreachable, host_and_port, map_nbytes_max

PATIENCE_S = 0.7
SLACK_S = 15.0  # of a machine with a load of 12; a lie goes on for ever
NBYTES_MAX = 3_333_333


@pytest.fixture
def http() -> Iterator[NodeHttp]:
    made = NodeHttp()
    yield made
    made.close()


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_whatever_the_other_side_does_an_exchange_ends_in_time_and_in_little_memory(http: NodeHttp, lie: Lie) -> None:
    with lying(lie) as url:
        started, before_kb = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(NodeUnreachable):
            http.document(f"{url}/v1/node", timeout=PATIENCE_S, nbytes_max=NBYTES_MAX)
        assert time.monotonic() - started < PATIENCE_S + SLACK_S
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        assert grown_kb * 1024 < (512 << 20)  # the bomb is 2 GiB, and made here in pieces of 256 MiB


def test_one_that_drips_is_not_given_longer_for_each_drop(http: NodeHttp) -> None:
    with lying(body_drips) as url, pytest.raises(NodeUnreachable, match="ReadTimeout"):
        http.document(url, timeout=PATIENCE_S)


def test_an_answer_over_its_limit_is_cut_off_and_one_within_it_is_not(http: NodeHttp) -> None:
    said = OK + b"Content-Length: 33\r\n\r\n" + b'{"a": 3}'.ljust(33)
    with lying(says(said)) as url:
        assert http.document(url, nbytes_max=33) == {"a": 3}
    with lying(says(said)) as url, pytest.raises(NodeUnreachable, match="over 32 bytes"):
        http.document(url, nbytes_max=32)


def test_nobody_is_followed_elsewhere(http: NodeHttp) -> None:
    elsewhere = says(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 2\r\n\r\n{}")
    with lying(elsewhere) as url, pytest.raises(NodeUnreachable, match="sends us elsewhere"):
        http.document(url)


def test_nothing_is_unpacked(http: NodeHttp) -> None:
    packed = says(OK, b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}")
    with lying(packed) as url, pytest.raises(NodeUnreachable, match="compressed"):
        http.document(url)


@pytest.mark.parametrize(
    "said",
    [
        b"", b"\x00\xff", b"HTTP/1.1 200\r\nContent-Length: -3\r\n\r\n", b"HTTP/9.9 200 OK\r\n\r\n", OK + b"\r\n{",
        OK + b"Content-Length: 9\r\n\r\n{}", OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", OK + b"Content-Length: 4\r\n\r\n\xff\xfe{}",
        OK + b"\r\n" + b"[" * 100_000, b"HTTP/1.1 204 No Content\r\n\r\n", OK + b"Content-Length: 1\r\n\r\n7",
    ],
    ids=lambda said: repr(said[:40]),
)  # fmt: skip
def test_what_no_node_says_is_an_error_of_ours(http: NodeHttp, said: bytes) -> None:
    with lying(says(said)) as url, pytest.raises(NodeUnreachable):
        http.document(url)


def test_a_refusal_whose_problem_is_nonsense_is_still_a_refusal(http: NodeHttp) -> None:
    with lying(says(b"HTTP/1.1 409 No\r\nContent-Length: 3\r\n\r\n[1]")) as url:
        with pytest.raises(NodeRefused, match="409") as refused:
            http.request("GET", url)
        assert refused.value.problem == {}


@pytest.mark.parametrize(
    "url", ["http://b..c:8470", "http://", "nonsense", "http://[::1", "ftp://h:3", "http://" + "a" * 333]
)
def test_an_address_that_is_none_is_unreachable(http: NodeHttp, url: str) -> None:
    with pytest.raises(NodeUnreachable):
        http.request("GET", url)


@pytest.mark.parametrize("token", ["secret\nX: y", "sécret", "a secret", " secret", "s" * 1025])
def test_a_token_that_a_header_cannot_carry_is_refused_and_not_printed(token: str) -> None:
    with pytest.raises(InvalidInput, match="visible ASCII") as said:
        NodeHttp(token)
    assert "cret" not in str(said.value)


def test_closing_ends_what_is_under_way_and_what_would_begin(http: NodeHttp) -> None:
    ended: list[str] = []

    def ask(url: str) -> None:
        try:
            http.request("GET", url, timeout=10 * DEADLINE_S)
        except NodeUnreachable as error:
            ended.append(str(error))

    arrived = threading.Event()

    def lie(connection: object) -> None:
        arrived.set()
        silent(connection)  # type: ignore[arg-type]

    with lying(lie) as url:
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        assert arrived.wait(DEADLINE_S)
        http.close()
        asking.join(DEADLINE_S)
        assert len(ended) == 1
        with pytest.raises(NodeUnreachable, match="was closed"):
            http.request("GET", url)


def test_only_where_a_node_listens_is_a_nodes_url() -> None:
    assert host_and_port("http://h") == ("h", 80)
    assert host_and_port("https://[::1]:33") == ("::1", 33)
    for url in ("h:33", "ftp://h", "http://", "http://[::1"):
        with pytest.raises(InvalidInput, match="write http://HOST:PORT"):
            host_and_port(url)


def test_a_map_of_a_large_model_has_room_and_one_of_millions_of_replicas_has_not() -> None:
    entry_nbytes = 230  # of one replica
    assert 3 * 14_848 * entry_nbytes < map_nbytes_max(14_848)
    assert map_nbytes_max(14_848, replicas=1) < 3_000_000 * entry_nbytes / 10
