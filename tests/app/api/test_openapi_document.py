import json
from pathlib import Path

import pytest

from app.api.openapi_document import check, render
from app.api.problems import MEDIA_TYPE


def test_a_document_as_the_code_says_is_in_order(tmp_path: Path) -> None:
    path = tmp_path / "openapi.json"
    path.write_text(render())
    assert check(path) is None


def test_a_document_that_drifted_shows_where_and_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "openapi.json"
    path.write_text(render().replace('"/livez"', '"/alive"'))
    fault = check(path)
    assert fault is not None
    assert '-    "/alive"' in fault
    assert '+    "/livez"' in fault
    assert "make openapi" in fault


def test_a_missing_document_says_what_to_run(tmp_path: Path) -> None:
    assert "make openapi" in (check(tmp_path / "none.json") or "")


def test_the_document_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = render()
    monkeypatch.setenv("HOTSPARE_PEERS", "nonsense")
    assert render() == before


def test_every_error_in_the_document_is_a_problem() -> None:
    document = json.loads(render())
    answers = {
        f"{method} {path} {status}": set(response["content"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status, response in operation["responses"].items()
        if int(status) >= 400 and path != "/readyz"  # its 503 is the same list of checks as its 200
    }
    assert answers
    assert {where: media for where, media in answers.items() if media != {MEDIA_TYPE}} == {}
