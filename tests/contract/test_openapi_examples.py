"""The OpenAPI document as a stranger's tools read it, held against a live node."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from app.api.access import OPEN_PATHS
from app.api.application import create_app
from app.api.problems import MEDIA_TYPE
from app.settings import Settings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def values(node: Any, key: str) -> Iterator[Any]:
    """Every value of this key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for each in node:
            yield from values(each, key)


def test_every_operation_has_a_name_a_summary_and_a_tag_that_is_explained(document: dict[str, Any]) -> None:
    explained = {tag["name"] for tag in document["tags"]}
    for method, path, operation in operations(document):
        assert operation["summary"], (method, path)
        assert set(operation["tags"]) <= explained, (method, path)
    names = Counter(operation["operationId"] for _, _, operation in operations(document))
    assert set(names.values()) == {1}


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: dict[str, Any]) -> None:
    used = {reference.removeprefix("#/components/schemas/") for reference in values(document, "$ref")}
    assert used == set(document["components"]["schemas"])


def test_path_parameters_are_those_of_the_path(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == set(re.findall(r"\{(\w+)\}", path)), (method, path)


def test_every_error_is_a_problem(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and (path, status) != ("/readyz", "503"):  # it has the checks, as its 200
                assert set(answer["content"]) == {MEDIA_TYPE}, (method, path, status)


def test_all_but_the_probes_say_that_they_may_want_a_token(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        assert bool(operation.get("security")) is (path not in OPEN_PATHS), (method, path)
        assert ("401" in operation["responses"]) is (path not in OPEN_PATHS), (method, path)


def test_what_takes_a_body_says_how_it_is_refused(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            assert "422" in operation["responses"], (method, path)


def test_the_schema_of_a_target_wants_one_of_the_two_as_text(document: dict[str, Any]) -> None:
    choices = document["components"]["schemas"]["RestoreTarget"]["oneOf"]
    assert [(choice["required"], choice["properties"]) for choice in choices] == [
        ([name], {name: {"type": "string"}}) for name in ("node_id", "consumer_id")
    ]


def test_what_a_live_node_serves_is_this_document(trio: dict[str, Any], document: dict[str, Any]) -> None:
    assert trio["a"].get("/openapi.json") == json.loads(json.dumps(document))


def test_every_documented_path_is_served(trio: dict[str, Any], document: dict[str, Any]) -> None:
    """A path that is not there says so in other words than one whose thing is not there."""
    for method, path, _ in operations(document):
        answer = trio["a"].ask(method.upper(), re.sub(r"\{\w+\}", "nothing", path), content=b"{")
        assert "GET /openapi.json lists what there is" not in answer.text, (method, path)
        assert answer.status_code < 500, (method, path, answer.text)
