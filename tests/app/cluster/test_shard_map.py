from __future__ import annotations

from typing import Any

import pytest

from app.cluster.shard_map import entries, select
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
    assert select(mixed, layer, expert).tolist() == rows


@pytest.mark.parametrize(
    ("layer", "expert", "said"), [(2, None, "layer 2"), (None, 3, "expert 3"), (0, 1, "layer 0 expert 1")]
)
def test_what_the_model_lacks_is_named(mixed: Manifest, layer: int | None, expert: int | None, said: str) -> None:
    with pytest.raises(BlockUnavailable, match=f"mixed keeps no block of {said}$"):
        select(mixed, layer, expert)


def where(node: str) -> dict[str, Any]:
    return {"node_id": node, "session_id": f"{node}:1", "address": 33}


def test_experts_and_dense_blocks_are_apart_and_a_layer_outside_is_null(mixed: Manifest) -> None:
    experts, dense = entries(mixed, range(6), [{0: ("aa", where("n")), 2: ("cc", where("n")), 4: ("ee", where("n"))}])
    assert experts == [{"layer": 1, "expert": 1, "nbytes": 7, "checksum": "ee", "replicas": [where("n")]}]
    assert dense == [
        {"layer": None, "nbytes": 3, "checksum": "aa", "replicas": [where("n")]},
        {"layer": 1, "nbytes": 5, "checksum": "cc", "replicas": [where("n")]},
    ]


def test_a_replica_of_other_content_is_left_out(mixed: Manifest) -> None:
    experts, _ = entries(mixed, [4], [{4: ("ee", where("n"))}, {4: ("ff", where("p"))}, {4: ("ee", where("q"))}])
    assert experts[0]["replicas"] == [where("n"), where("q")]
    assert experts[0]["checksum"] == "ee"


def test_what_nobody_has_is_not_in_the_map(mixed: Manifest) -> None:
    assert entries(mixed, range(6), [{}, {}]) == ([], [])
