"""ETags: which requests have the document already."""

from __future__ import annotations

import pytest
from fastapi import Request

from app.api.caching import etag, not_modified

TAG = etag("n0;7")


def asking(*tags: str) -> Request:
    return Request({"type": "http", "headers": [(b"if-none-match", tag.encode()) for tag in tags]})


@pytest.mark.parametrize(
    "tags",
    [(TAG,), (f"W/{TAG}",), ("*",), (f'"another", {TAG}',), (f'"another",W/{TAG}',), ('"another"', TAG)],
    ids=["it", "made weak on the way", "any", "among others", "weak, among others", "in a second header"],
)
def test_who_has_it_gets_it_not_again(tags: tuple[str, ...]) -> None:
    answer = not_modified(asking(*tags), TAG)
    assert answer is not None
    assert (answer.status_code, answer.headers["etag"], answer.body) == (304, TAG, b"")


@pytest.mark.parametrize("tags", [(), ('"another"',), ("n0;7",), ('W/"n0;77"',)])
def test_who_has_another_or_none_gets_it(tags: tuple[str, ...]) -> None:
    assert not_modified(asking(*tags), TAG) is None


def test_a_tag_is_one_quoted_text_whatever_it_is_made_of() -> None:
    assert etag('a"b') == '"a\'b"'
