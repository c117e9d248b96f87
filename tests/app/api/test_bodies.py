"""Large bodies are read without holding the event loop up, and whatever is wrong with one is a problem that says so."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import orjson
import pytest
from fastapi.routing import APIRoute

from app.api.bodies import SMALL_NBYTES, VALUES_MAX, BodyRoute
from app.api.routes import cluster, consumers, health, metrics, restores
from app.api.routes import node as node_routes
from app.documents import EXPERTS_MAX, give_way
from tests.processes import DEADLINE_S

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def node(shared_live_node: Callable[..., Any]) -> Any:
    return shared_live_node()


def post(node: Any, content: bytes, **headers: str) -> Any:
    return node.ask("POST", "/v1/restores", content=content, headers=JSON | headers)


def restore(experts: Any) -> bytes:
    return orjson.dumps({"target": {"node_id": "n"}, "experts": experts})


LARGE = b" " * SMALL_NBYTES  # before a body, so that it is read in a thread


@pytest.mark.parametrize("before", [b"", LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", None), (b"{", None), (b"\xff", ""), (b"[" * 33_333, ""), (b"9" * 5000, ""), (b"nonsense", None),
        (b"[]", ""), (b"null", ""), (b'"x"', ""), (restore([{"layer": -1, "expert": 3}]), "experts.0.layer"),
        (restore(3), "experts"), (restore([[]]), "experts.0"), (b'{"target": NaN}', "target"),
        (b'{"target": {"node_id": "n"}, "experts": [{"layer": 1e999, "expert": 3}]}', "experts.0.layer"),
    ],
    ids=lambda value: repr(value and value[:30]),
)  # fmt: skip
def test_what_is_wrong_with_a_body_is_said_and_no_failure_of_ours(
    node: Any, before: bytes, body: bytes, field: str | None
) -> None:
    answer = post(node, before + body)
    assert answer.status_code == 422, answer.text
    first = answer.json()["errors"][0]
    assert first["location"] == "body"
    if field is None:  # it is where the text ceases to make sense
        assert first["field"] == "" or len(before) <= int(first["field"]) <= len(before + body)
    else:
        assert first["field"] == field


def test_every_route_that_takes_a_body_reads_it_so() -> None:
    routers = [module.router for module in (cluster, consumers, health, metrics, node_routes, restores)]
    taking = [r for router in routers for r in router.routes if isinstance(r, APIRoute) and r.body_field is not None]
    assert len(taking) > 3
    assert [r.path for r in taking if not isinstance(r, BodyRoute)] == []


def test_a_body_that_is_not_called_json_is_refused(node: Any) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(node, LARGE + restore(None), **{"Content-Type": content_type}).status_code == 422
    assert post(node, LARGE + restore(None), **{"Content-Type": "application/vnd.x+json; a=b"}).status_code == 202


@pytest.mark.parametrize("wrong", ["x", -1])
def test_of_many_faults_the_first_is_told(node: Any, wrong: Any) -> None:
    answer = post(node, restore([{"layer": 3, "expert": wrong}] * EXPERTS_MAX))
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["experts.0.expert"]


def longest_wait(node: Any, work: Callable[[], Any]) -> tuple[float, float]:
    """The longest that the event loop was held up while the work was done, and how long that took, in seconds."""
    with ThreadPoolExecutor(1) as pool:
        started, longest = time.monotonic(), 0.0
        working = pool.submit(work)
        while not working.done():
            asked = time.monotonic()
            assert node.ask("GET", "/livez").status_code == 200
            longest = max(longest, time.monotonic() - asked)
        working.result()
        return longest, time.monotonic() - started


def put_route() -> BodyRoute:
    return next(r for r in consumers.router.routes if isinstance(r, BodyRoute) and "PUT" in r.methods)


def consumer(slots: int) -> bytes:
    copy = {"block_offset": 0, "base": 0, "offset": 0, "rows": 3, "run_nbytes": 3, "block_pitch": 3, "pitch": 3}
    return orjson.dumps({
        "session_id": "127.0.0.1:15333", "manifest_digest": "a" * 64, "ranges": [[4096, 1 << 30]], "forms": [[copy]],
        "slots": [
            {"layer": i // 256, "expert": i % 256, "form": 0, "bases": [140_000_000_000_000 + i * 4096] * 3}
            for i in range(slots)
        ],
    })  # fmt: skip


def test_a_table_of_ten_megabytes_holds_nobody_up(node: Any) -> None:
    body = consumer(100_000)
    assert len(body) > 9_000_000

    def put() -> None:
        answer = node.ask("PUT", "/v1/consumers/rank-0", content=body, headers=JSON)
        assert answer.status_code == 503, "it was read, and there is no manifest to hold it against"

    shares = []
    for _ in range(5):  # of a machine with a load of 12, one in five is enough
        longest, took = longest_wait(node, put)
        shares.append(longest / took)
    assert min(shares) < 1 / 2, "it is near 1 where it is read on the event loop"


def reading(route: BodyRoute, body: bytes) -> tuple[float, float]:
    """The longest that reading keeps others out for sure, and all that it takes: seconds of this thread's own processor
    time, so that it is no matter who else is running. Each call of a Python function lets others in."""
    turns = []
    sys.setprofile(lambda *_: turns.append(time.thread_time()))
    try:
        document = route._read(body)
        del document
    finally:
        sys.setprofile(None)
    return max(later - turn for turn, later in pairwise(turns)), turns[-1] - turns[0]


def test_nothing_in_the_reading_of_a_large_table_keeps_others_out_for_long() -> None:
    """Neither parser nor validator nor garbage collector, of which the latter held all up for longest by far."""
    gc.collect()
    gc.freeze()  # as a node does: here, what all other tests have imported
    try:
        longest, all_of_it = map(min, zip(*(reading(put_route(), consumer(100_000)) for _ in range(3)), strict=True))
    finally:
        gc.unfreeze()
    assert longest < all_of_it / 15


def test_a_slot_of_a_table_is_one_thing_to_the_garbage_collector() -> None:
    """As a document it is four: itself, its dictionary, the set of its fields, the list of its bases."""
    gc.collect()
    before = len(gc.get_objects())
    document = put_route()._read(consumer(33_333))
    gc.collect()  # which finds out that a tuple of numbers is none of its business
    assert len(gc.get_objects()) - before < 1.1 * len(document.slots)


def test_numbers_without_end_are_counted_before_they_are_parsed(node: Any) -> None:
    answer = post(node, b"[" + b"1," * (VALUES_MAX + 1) + b"1]")
    assert answer.status_code == 422
    assert "2,000,001 values" in answer.json()["errors"][0]["message"]


def test_parsing_gives_way() -> None:
    """Another thread runs while one document is parsed and validated, many times."""
    turns, ended = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not ended.wait(0.001):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    document = put_route()._read(consumer(30_000))
    ended.set()
    other.join(DEADLINE_S)
    assert len(document.slots) == 30_000
    assert turns > 5
    assert give_way(3) == 3
