"""Requests that wait for others leave places to those that do not, and large answers are taken or given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api import lanes
from app.api.application import create_app
from app.api.lanes import LANES, THREADS, Lane, Lanes
from app.settings import Settings
from tests.processes import DEADLINE_S


def lane_of(method: str, path: str) -> str | None:
    return next((lane.name for lane in LANES if lane.takes(method, path)), None)


def test_there_are_more_threads_than_places() -> None:
    assert sum(lane.places for lane in LANES if not lane.is_stream) < THREADS


def test_every_route_but_the_probes_and_the_pages_has_a_lane() -> None:
    document = create_app(Settings()).openapi()
    found = {
        (method.upper(), path): lane_of(method.upper(), path)
        for path, each in document["paths"].items()
        for method in each
    }
    assert {path for (_, path), lane in found.items() if lane is None} == {"/livez", "/readyz"}
    assert found["DELETE", "/v1/consumers/{consumer_id}"] == "removals"
    assert found["PUT", "/v1/consumers/{consumer_id}"] == "registrations"
    assert found["POST", "/v1/consumers/{consumer_id}/lease"] == "others", "who waits for a lease to end waits for this"
    assert found["GET", "/v1/restores/{restore_id}/events"] == "events"
    assert found["POST", "/v1/restores"] == "restores"


def test_the_probes_answer_while_sixty_wait_for_an_engine_that_does_not_let_go(live_node: Callable[..., Any]) -> None:
    """Sixty DELETEs of an engine that was stopped made /readyz wait for 7.5 s."""
    live = live_node()
    begun, go = threading.Semaphore(0), threading.Event()

    def wait(consumer_id: str) -> None:
        begun.release()
        go.wait(DEADLINE_S)

    live.context.consumers.remove = wait
    places = next(lane.places for lane in LANES if lane.name == "removals")
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(live.ask, "DELETE", "/v1/consumers/stopped") for _ in range(60)]
        for _ in range(places):
            assert begun.acquire(timeout=DEADLINE_S)
        try:
            assert live.ask("GET", "/livez").status_code == 200
            assert live.ask("GET", "/readyz").status_code == 503  # it has nothing
            assert live.ask("POST", "/v1/consumers/stopped/renew").status_code == 404
            assert not any(each.done() for each in waiting), "they all wait still"
        finally:
            go.set()
        statuses = {each.result().status_code for each in waiting}
    assert statuses <= {204, 503}


def test_whoever_waits_too_long_for_a_place_is_told_to_ask_again(
    live_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_node()
    monkeypatch.setattr(lanes, "LANE_WAIT_S", 0.1)
    begun, go = threading.Semaphore(0), threading.Event()

    def wait(consumer_id: str) -> None:
        begun.release()
        go.wait(DEADLINE_S)

    live.context.consumers.remove = wait
    places = next(lane.places for lane in LANES if lane.name == "removals")
    with ThreadPoolExecutor(places) as pool:
        for _ in range(places):
            pool.submit(live.ask, "DELETE", "/v1/consumers/stopped")
            assert begun.acquire(timeout=DEADLINE_S)
        refused = live.ask("DELETE", "/v1/consumers/stopped")
        go.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "ask again" in refused.json()["detail"]


SCOPE: Scope = {"type": "http", "method": "GET", "path": "/large"}


async def test_a_large_answer_is_handed_over_in_pieces_and_a_place_is_free_once_it_was_taken() -> None:
    body = bytes(3 * lanes.SEND_PIECE_NBYTES + 3333)
    taken: list[Message] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def take(message: Message) -> None:
        taken.append(message)

    app = Lanes(answer, (Lane("all", 1, lambda method, path: True),))
    for _ in range(2):
        taken.clear()
        await app(SCOPE, None, take)  # type: ignore[arg-type]
        pieces = [message for message in taken if message["type"] == "http.response.body"]
        assert b"".join(piece["body"] for piece in pieces) == body
        assert [piece.get("more_body") for piece in pieces] == [True, True, True, False]


async def test_an_answer_that_nobody_takes_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ANSWER_TIMEOUT_S", 0.05)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": bytes(2 * lanes.SEND_PIECE_NBYTES)})

    async def never(message: Message) -> None:
        await asyncio.Event().wait()

    app = Lanes(answer, (Lane("all", 1, lambda method, path: True),))
    for _ in range(3):
        await asyncio.wait_for(app(SCOPE, None, never), DEADLINE_S)  # type: ignore[arg-type]
