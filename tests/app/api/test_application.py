"""The application's life: what it touches before it starts, and what it leaves when it stops."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.application import create_app
from app.api.problems import MEDIA_TYPE
from app.settings import Settings
from shm.errors import SegmentBusy
from shm.layout import SHM_DIRECTORY


async def ask(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get(path)


def objects(namespace: str) -> list[str]:
    return [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(f"hotspare.{namespace}.")]


def settings(namespace: str, **options: Any) -> Settings:
    return Settings.model_validate({"model": "moe", "node_id": "n", "namespace": namespace, "fill": "none", **options})


def test_the_document_needs_no_configuration_and_touches_nothing() -> None:
    threads, there = set(threading.enumerate()), objects(Settings().namespace)  # this host's own node may run meanwhile
    assert create_app(Settings()).openapi()["info"]["title"] == "Hotspare"
    assert set(threading.enumerate()) <= threads
    assert objects(Settings().namespace) == there


@pytest.mark.parametrize("path", ["/readyz", "/v1/node", "/v1/manifest", "/v1/shard-map", "/v1/restores", "/metrics"])
async def test_before_it_starts_only_liveness_answers(path: str) -> None:
    app = create_app(Settings())
    answer = await ask(app, path)
    assert (answer.status_code, answer.headers["content-type"]) == (503, MEDIA_TYPE)
    assert answer.headers["retry-after"] == "1"
    assert (await ask(app, "/livez")).json() == {"status": "ok"}


async def test_it_opens_its_own_node_and_closes_it(namespace: str) -> None:
    app = create_app(settings(namespace))
    async with app.router.lifespan_context(app):
        assert len(objects(namespace)) == 1
        assert (await ask(app, "/v1/node")).json()["state"] == "waiting"
    assert objects(namespace) == [], "an unsealed segment goes with its node"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hotspare-")]
    assert (await ask(app, "/readyz")).status_code == 503


async def test_a_sealed_segment_stays_and_is_adopted(
    namespace: str, moe_checkpoint: Path, wait_until: Callable[..., Any]
) -> None:
    app = create_app(settings(namespace, checkpoint=moe_checkpoint, fill="disk"))
    async with app.router.lifespan_context(app):
        wait_until(lambda: all(app.state.context.node.checks().values()), "filled")
        first = (await ask(app, "/v1/shard-map")).json()["experts"]
    assert len(objects(namespace)) == 1
    app = create_app(settings(namespace))
    async with app.router.lifespan_context(app):
        assert (await ask(app, "/readyz")).status_code == 200
        again = (await ask(app, "/v1/shard-map")).json()["experts"]
    assert [(e["layer"], e["expert"], e["checksum"]) for e in again] == [
        (e["layer"], e["expert"], e["checksum"]) for e in first
    ]


async def test_a_node_that_cannot_open_does_not_start(namespace: str) -> None:
    app, second = create_app(settings(namespace)), create_app(settings(namespace))
    async with app.router.lifespan_context(app):
        with pytest.raises(SegmentBusy):
            async with second.router.lifespan_context(second):
                raise AssertionError("two nodes own one segment")
        assert (await ask(app, "/v1/node")).status_code == 200


def test_stopping_twice_is_harmless(live_node: Callable[..., Any]) -> None:
    context = live_node().context
    context.stop()
    context.stop()
