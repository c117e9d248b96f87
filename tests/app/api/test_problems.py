import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Query
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import app.errors
import shm.errors
import transfer.errors
from app.api import problems
from app.api.application import create_app
from app.api.problems import MEDIA_TYPE, OTHER_PROBLEM_TYPES, PROBLEM_TYPES, Problem, problem_responses
from app.errors import Conflict, LimitReached, NodeError, NotFound, Unavailable
from app.settings import Settings
from shm.errors import HotspareError, InvalidInput, SegmentBusy, SharedMemoryFull

PAGE = Path(__file__).parents[3] / "docs" / "problems.md"


class Body(BaseModel):
    layer: int = Field(ge=0)
    names: list[int]


class SubConflict(Conflict):
    pass


def raising(error: Exception) -> FastAPI:
    """An app whose GET / raises, and whose POST / validates."""
    app = FastAPI()
    problems.install(app)

    @app.get("/", responses=problem_responses(404, 409))
    async def get(limit: int = Query(3, le=33)) -> dict[str, int]:
        raise error

    @app.post("/")
    async def post(body: Body) -> dict[str, int]:
        return {}

    return app


async def ask(app: FastAPI, method: str = "GET", path: str = "/", **kwargs: object) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, **kwargs)  # type: ignore[arg-type]


def error_classes(module: ModuleType) -> list[type[HotspareError]]:
    return [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, HotspareError)]


@pytest.mark.parametrize("module", [shm.errors, transfer.errors, app.errors, problems], ids=lambda m: m.__name__)
def test_every_error_class_has_its_own_row(module: ModuleType) -> None:
    classes = error_classes(module)
    assert classes
    assert [c.__name__ for c in classes if c not in PROBLEM_TYPES] == []


def test_a_slug_means_one_status_and_one_title() -> None:
    kinds = {*PROBLEM_TYPES.values(), *OTHER_PROBLEM_TYPES}
    assert len({kind.slug for kind in kinds}) == len(kinds)


def test_the_page_and_the_table_agree() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \| \S.* \| \S.* \|$", PAGE.read_text(), re.MULTILINE)
    documented = {slug: int(status) for slug, status in rows}
    assert len(documented) == len(rows)
    assert documented == {k.slug: k.status for k in (*PROBLEM_TYPES.values(), *OTHER_PROBLEM_TYPES)}


async def test_a_domain_error_becomes_its_problem() -> None:
    response = await ask(raising(SegmentBusy("node-b is owned by pid 33", 33)))
    assert response.status_code == 409
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json() == {
        "type": "urn:hotspare:problem:segment-busy",
        "title": "A living daemon owns the segment",
        "status": 409,
        "detail": "node-b is owned by pid 33",
        "instance": "/",
    }


@pytest.mark.parametrize(
    ("error", "status", "slug"),
    [
        (InvalidInput("33 is too much"), 422, "invalid-input"),
        (SharedMemoryFull(3333, 33), 507, "shared-memory-full"),
        (NotFound("no restore 7"), 404, "not-found"),
        (SubConflict("it runs"), 409, "conflict"),
        (NodeError("no"), 500, "failed"),
        (HotspareError("no"), 500, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_status_and_type_come_from_the_nearest_class_of_the_table(
    error: Exception, status: int, slug: str
) -> None:
    response = await ask(raising(error))
    assert (response.status_code, response.json()["type"]) == (status, f"urn:hotspare:problem:{slug}")
    assert response.json()["detail"] == str(error)


async def test_headers_of_an_error_reach_the_client() -> None:
    unauthorized = await ask(raising(problems.Unauthorized("send a token")))
    assert unauthorized.headers["www-authenticate"] == 'Bearer realm="hotspare"'
    for error in (
        LimitReached("7 run", retry_after_s=33),
        Unavailable("filling", retry_after_s=33),
    ):
        assert (await ask(raising(error))).headers["retry-after"] == "33"


async def test_each_refused_value_is_listed() -> None:
    response = await ask(raising(RuntimeError()), "POST", json={"layer": -1, "names": [3, "x"]})
    assert response.status_code == 422
    assert response.headers["content-type"] == MEDIA_TYPE
    errors = response.json()["errors"]
    assert [(e["location"], e["field"]) for e in errors] == [("body", "layer"), ("body", "names.1")]
    assert all(e["field"] in response.json()["detail"] and e["message"] for e in errors)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"target": {}}, "give node_id or consumer_id, one of them"),
        (
            {"target": {"node_id": "n"}, "read_back": True},
            "read_back is for consumers: a node verifies its own memory anyway",
        ),
    ],
)
def test_what_a_validator_of_ours_says_is_said_without_a_word_of_pydantics(
    live_node: Callable[..., Any], body: dict[str, Any], said: str
) -> None:
    problem = live_node().ask("POST", "/v1/restores", json=body).json()
    assert [each["message"] for each in problem["errors"]] == [said]
    assert problem["detail"] == f"{problem['errors'][0]['field'] or 'body'}: {said}"


async def test_what_pydantic_says_itself_stays() -> None:
    response = await ask(raising(RuntimeError()), "POST", content=b"{", headers={"content-type": "application/json"})
    assert [each["message"] for each in response.json()["errors"]] == ["JSON decode error"]


async def test_a_refused_query_parameter_is_listed() -> None:
    response = await ask(raising(RuntimeError()), path="/?limit=34")
    assert [(e["location"], e["field"]) for e in response.json()["errors"]] == [("query", "limit")]


async def test_a_body_that_is_not_json_or_missing_is_a_problem() -> None:
    for kwargs in ({"content": b"{", "headers": {"content-type": "application/json"}}, {}):
        response = await ask(raising(RuntimeError()), "POST", **kwargs)
        assert (response.status_code, response.headers["content-type"]) == (422, MEDIA_TYPE)


async def test_a_thousand_refused_values_are_cut_to_the_limit() -> None:
    response = await ask(raising(RuntimeError()), "POST", json={"layer": 3, "names": ["x"] * 1111})
    assert len(response.json()["errors"]) == problems.FIELD_ERRORS_MAX
    assert "1108 more" in response.json()["detail"]


async def test_an_unknown_path_and_method_are_problems() -> None:
    app = raising(RuntimeError())
    missing = await ask(app, path="/nope")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:hotspare:problem:not-found")
    assert missing.json()["instance"] == "/nope"
    wrong = await ask(app, "DELETE")
    assert (wrong.status_code, wrong.json()["type"]) == (405, "urn:hotspare:problem:method-not-allowed")
    assert wrong.headers["allow"] == "GET, POST"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PATCH", "/v1/consumers/rank-0", "DELETE, GET, PUT"),  # a route for each
        ("DELETE", "/v1/restores", "GET, POST"),
        ("GET", "/v1/consumers/rank-0/renew", "POST"),
        ("POST", "/livez", "GET, HEAD"),
        ("DELETE", "/docs/assets/v1/restores", "GET, HEAD"),  # a file that is not there, not our /v1/restores
    ],
)
@pytest.mark.parametrize("prefix", ["", "/behind"])
async def test_a_wrong_method_is_told_every_method_of_the_path(method: str, path: str, allow: str, prefix: str) -> None:
    app = create_app(Settings(model="moe"))
    transport = httpx.ASGITransport(app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.request(method, prefix + path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json() == {
        "type": "urn:hotspare:problem:method-not-allowed",
        "title": "The path has no such method",
        "status": 405,
        "detail": f"{prefix}{path} does not take {method}: it takes {allow}",
        "instance": f"{prefix}{path}",
    }


async def test_another_http_exception_is_about_blank() -> None:
    response = await ask(raising(HTTPException(418, "no coffee", headers={"x-pot": "3"})))
    assert response.json()["type"] == "about:blank"
    assert (response.json()["detail"], response.headers["x-pot"]) == ("no coffee", "3")


async def test_an_unexpected_error_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        response = await ask(raising(RuntimeError("secret path /x/y")))
    assert (response.status_code, response.headers["content-type"]) == (500, MEDIA_TYPE)
    assert response.json()["type"] == "urn:hotspare:problem:unexpected"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "GET / failed: RuntimeError('secret path /x/y')" in caplog.text


async def test_where_the_system_has_no_more_threads_the_answer_is_to_come_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        response = await ask(raising(RuntimeError(problems.NO_THREAD)))
    assert (response.status_code, response.headers["content-type"]) == (503, MEDIA_TYPE)
    assert response.headers["retry-after"] == "1"
    assert response.json()["type"] == "urn:hotspare:problem:unavailable"
    assert "pids.max" in response.json()["detail"]
    assert "Traceback" not in caplog.text


async def test_the_openapi_document_names_problems_and_nothing_of_fastapis_own() -> None:
    document = (await ask(raising(RuntimeError()), path="/openapi.json")).json()
    for method, statuses in (("get", ("404", "409", "422")), ("post", ("422",))):
        for status in statuses:
            content = document["paths"]["/"][method]["responses"][status]["content"]
            assert content == {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert "application/json" in document["paths"]["/"]["get"]["responses"]["200"]["content"]
    schemas = document["components"]["schemas"]
    assert set(schemas) == {"Body", "FieldError", "Problem"}
    assert set(schemas["Problem"]["properties"]) == set(Problem.model_fields)


def test_the_openapi_document_is_generated_once() -> None:
    app = raising(RuntimeError())
    assert app.openapi() is app.openapi()
