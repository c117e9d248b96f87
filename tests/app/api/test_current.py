"""How routes get at their daemon's context, also before there is one."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.api import problems
from app.api.current import CurrentContext


def test_a_node_that_is_starting_says_so_and_when_to_come_again() -> None:
    app = FastAPI()
    problems.install(app)

    @app.get("/")
    def route(context: CurrentContext) -> str:
        return context.node.settings.node_id

    answer = TestClient(app).get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["detail"] == "the node is starting"
