"""What a request may say: the rules that are more than a field's own limits."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.documents import EXPERTS_MAX, RestoreRequest

NODE = {"node_id": "n0"}
EXPERT = {"layer": 3, "expert": 5}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"target": {}}, "give node_id or consumer_id, one of them"),
        ({"target": {**NODE, "consumer_id": "rank-0"}}, "give node_id or consumer_id, one of them"),
        ({"target": NODE, "read_back": True}, "read_back is for consumers"),
        ({"target": NODE, "experts": []}, "at least 1 item"),
        ({"target": NODE, "experts": [EXPERT] * (EXPERTS_MAX + 1)}, "at most 131072 items"),
        ({"target": NODE, "experts": [{"layer": -1, "expert": 5}]}, "greater than or equal to 0"),
        ({"target": NODE, "sources": []}, "at least 1 item"),
        ({"target": NODE, "sources": ["tape"]}, "'peer' or 'disk'"),
        ({"target": NODE, "fast": True}, "Extra inputs are not permitted"),
    ],
)
def test_a_restore_that_contradicts_itself_is_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RestoreRequest.model_validate(body)


def test_what_is_not_said_is_everything_from_anywhere() -> None:
    request = RestoreRequest.model_validate({"target": NODE})
    assert (request.experts, request.sources, request.read_back) == (None, None, False)
    assert RestoreRequest.model_validate({"target": {"consumer_id": "rank-0"}, "read_back": True}).read_back
