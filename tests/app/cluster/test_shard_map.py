from __future__ import annotations

from typing import Any

import pytest

from app.cluster.shard_map import Holder, entries, select
from shm.block import DENSE, ExpertKey, TensorEntry
from shm.errors import BlockUnavailable
from shm.manifest import FileSpec, Manifest


@pytest.fixture
def mixed() -> Manifest:
    """Dense tensors outside any layer and in layers 0 to 1; experts 0 to 2 in layer 1."""
    keys = [(DENSE, DENSE), (0, DENSE), (1, DENSE), (1, 0), (1, 1), (1, 2)]
    blocks = {
        ExpertKey(*key): [TensorEntry(f"t{number}", "U8", (number + 3,), 0, 0)] for number, key in enumerate(keys)
    }
    return Manifest.build("mixed", "", "all", [FileSpec("f", 333, "")], blocks)


@pytest.mark.parametrize(
    ("layer", "expert", "rows"),
    [(None, None, [0, 1, 2, 3, 4, 5]), (1, None, [2, 3, 4, 5]), (None, 2, [5]), (1, 1, [4]), (0, None, [1])],
)
def test_rows_are_chosen_by_layer_and_expert(
    mixed: Manifest, layer: int | None, expert: int | None, rows: list[int]
) -> None:
    assert select(mixed, layer, expert) == rows


@pytest.mark.parametrize(
    ("layer", "expert", "said"), [(2, None, "layer 2"), (None, 3, "expert 3"), (0, 1, "layer 0 expert 1")]
)
def test_what_the_model_lacks_is_named(mixed: Manifest, layer: int | None, expert: int | None, said: str) -> None:
    with pytest.raises(BlockUnavailable, match=f"mixed keeps no block of {said}$"):
        select(mixed, layer, expert)


@pytest.mark.parametrize(
    ("layer", "expert", "blocks", "rows"),
    [
        (None, None, [(1, 2), (1, 0)], [3, 5]),
        (None, None, [(1, 2), (1, 2)], [5]),
        (None, 0, [(1, 2), (1, 0)], [3]),
        (1, None, [(0, DENSE), (1, 1)], [4]),
    ],
)
def test_rows_are_chosen_by_name(
    mixed: Manifest, layer: int | None, expert: int | None, blocks: list[tuple[int, int]], rows: list[int]
) -> None:
    assert select(mixed, layer, expert, [ExpertKey(*block) for block in blocks]) == rows


def test_a_name_that_the_model_lacks_is_told(mixed: Manifest) -> None:
    with pytest.raises(BlockUnavailable, match="mixed has no expert 3 in layer 1"):
        select(mixed, blocks=[ExpertKey(1, 0), ExpertKey(1, 3)])


RIGHT, OTHER = bytes([0xEE] * 16), bytes([0xFF] * 16)


def holder(node: str, *rows: int, checksum: bytes = RIGHT) -> Holder:
    return Holder(node, f"{node}:1", {row: (33 + row, checksum) for row in rows})


def where(node: str, row: int) -> dict[str, Any]:
    return {"node_id": node, "session_id": f"{node}:1", "address": 33 + row}


def test_experts_and_dense_blocks_are_apart_and_a_layer_outside_is_null(mixed: Manifest) -> None:
    experts, dense = entries(mixed, range(6), [holder("n", 0, 2, 4)])
    said = RIGHT.hex()
    assert experts == [{"layer": 1, "expert": 1, "nbytes": 7, "checksum": said, "replicas": [where("n", 4)]}]
    assert dense == [
        {"layer": None, "nbytes": 3, "checksum": said, "replicas": [where("n", 0)]},
        {"layer": 1, "nbytes": 5, "checksum": said, "replicas": [where("n", 2)]},
    ]


def test_a_replica_of_other_content_is_left_out(mixed: Manifest) -> None:
    experts, _ = entries(mixed, [4], [holder("n", 4), holder("p", 4, checksum=OTHER), holder("q", 4)])
    assert experts[0]["replicas"] == [where("n", 4), where("q", 4)]
    assert experts[0]["checksum"] == RIGHT.hex()


def test_what_nobody_has_is_not_in_the_map(mixed: Manifest) -> None:
    assert entries(mixed, range(6), [holder("n"), holder("p")]) == ([], [])


def test_only_what_is_asked_for_is_in_the_map(mixed: Manifest) -> None:
    experts, dense = entries(mixed, [5], [holder("n", *range(6)), holder("p", *range(6))])
    assert [(entry["layer"], entry["expert"]) for entry in experts] == [(1, 2)]
    assert dense == []
