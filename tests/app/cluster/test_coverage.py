"""Coverage: what is counted is what nodes hold, no more and no less."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cluster.coverage import cover
from app.cluster.placement import Placement
from shm.block import DENSE, ExpertKey, TensorEntry
from shm.errors import InvalidInput
from shm.manifest import FileSpec, Manifest
from tests.processes import processor_time


def manifest_of(keys: list[ExpertKey]) -> Manifest:
    entry = [TensorEntry("l.{layer}.e.{expert}.w", "U8", (333,), 0, 0)]
    return Manifest.build("model", "", "experts", [FileSpec("f", 333, "")], dict.fromkeys(keys, entry))


def experts_of(layers: int, experts: int) -> Manifest:
    return manifest_of([ExpertKey(layer, expert) for layer in range(layers) for expert in range(experts)])


@pytest.fixture(scope="module")
def thirteen() -> Manifest:
    """Layers 3 and 5, of 7 and 6 experts."""
    return manifest_of([ExpertKey(3, e) for e in range(7)] + [ExpertKey(5, e) for e in range(6)])


def test_blocks_are_counted_by_layer_and_in_total(thirteen: Manifest) -> None:
    coverage = cover(thirteen, {"a": [0, 1, 2, 7], "b": [2, 3, 7], "c": [7]}, 2)
    assert coverage.layers[3].by_replicas == {0: 3, 1: 3, 2: 1, 3: 0}
    assert coverage.layers[5].by_replicas == {0: 5, 1: 0, 2: 0, 3: 1}
    assert coverage.total.by_replicas == {0: 8, 1: 3, 2: 1, 3: 1}
    assert [coverage.layers[3].blocks, coverage.layers[5].blocks, coverage.total.blocks] == [7, 6, 13]
    assert list(coverage.layers) == [3, 5]


def test_blocks_that_no_node_has_are_lost(thirteen: Manifest) -> None:
    coverage = cover(thirteen, {"a": range(1, 12), "b": []}, 1)
    assert coverage.lost == (ExpertKey(3, 0), ExpertKey(5, 5))
    assert coverage.under_replicated == ()


def test_blocks_with_fewer_replicas_than_wanted_are_named_apart_from_lost_ones(thirteen: Manifest) -> None:
    coverage = cover(thirteen, {"a": range(1, 13), "b": range(2, 12)}, 2)
    assert coverage.lost == (ExpertKey(3, 0),)
    assert coverage.under_replicated == (ExpertKey(3, 1), ExpertKey(5, 5))


def test_without_any_node_everything_is_lost(thirteen: Manifest) -> None:
    coverage = cover(thirteen, {}, 2)
    assert coverage.lost == thirteen.keys
    assert coverage.total.by_replicas == {0: 13, 1: 0, 2: 0}


def test_more_replicas_than_wanted_are_counted_as_they_are(thirteen: Manifest) -> None:
    coverage = cover(thirteen, {node: range(13) for node in "abcd"}, 2)
    assert coverage.total.by_replicas == {0: 0, 1: 0, 2: 0, 3: 0, 4: 13}
    assert coverage.lost == coverage.under_replicated == ()


def test_a_row_that_a_node_names_twice_counts_once(thirteen: Manifest) -> None:
    assert cover(thirteen, {"a": [4, 4, 4]}, 1).total.by_replicas == {0: 12, 1: 1}


def test_lists_sets_ranges_keys_and_arrays_are_taken_alike(thirteen: Manifest) -> None:
    rows = ([1, 2], {1, 2}, range(1, 3), {1: "", 2: ""}.keys(), np.array([1, 2]), np.array([1, 2], dtype=np.uint32))
    coverages = [cover(thirteen, {"a": held}, 1) for held in rows]
    assert all(coverage == coverages[0] for coverage in coverages)
    assert coverages[0].total.by_replicas[1] == 2


def test_dense_blocks_count_in_their_layer() -> None:
    manifest = manifest_of([ExpertKey(DENSE, DENSE), ExpertKey(0, DENSE), ExpertKey(0, 0)])
    coverage = cover(manifest, {"a": [2]}, 1)
    assert coverage.lost == (ExpertKey(DENSE, DENSE), ExpertKey(0, DENSE))
    assert coverage.layers[DENSE].by_replicas == {0: 1, 1: 0}
    assert coverage.layers[0].by_replicas == {0: 1, 1: 1}


@pytest.mark.parametrize("rows", [[13], [-1], [0, 99]])
def test_rows_of_another_manifest_are_refused_by_the_name_of_the_node(thirteen: Manifest, rows: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"^b says it has rows .* of a manifest of 13"):
        cover(thirteen, {"a": [0], "b": rows}, 1)


@given(
    st.integers(1, 4), st.integers(1, 7), st.integers(1, 4),
    st.dictionaries(st.sampled_from("abcde"), st.sets(st.integers(0, 27))),
)  # fmt: skip
def test_the_counts_are_those_of_counting_one_by_one(
    layers: int, experts: int, replicas: int, said: dict[str, set[int]]
) -> None:
    manifest = experts_of(layers, experts)
    held = {node: {row for row in rows if row < len(manifest)} for node, rows in said.items()}
    coverage = cover(manifest, held, replicas)
    found = Counter(sum(row in rows for rows in held.values()) for row in range(len(manifest)))
    assert {n: count for n, count in coverage.total.by_replicas.items() if count} == found
    assert set(range(replicas + 1)) <= coverage.total.by_replicas.keys()
    summed = Counter[int]()
    for count in coverage.layers.values():
        assert sum(count.by_replicas.values()) == count.blocks == experts
        summed.update(count.by_replicas)
    assert summed == Counter(coverage.total.by_replicas)


@given(st.data())
def test_a_placement_that_is_filled_loses_nothing_while_fewer_than_its_replicas_die(data: st.DataObject) -> None:
    nodes = [f"node-{i}" for i in range(data.draw(st.integers(1, 6)))]
    manifest = experts_of(2, data.draw(st.integers(1, 13)))
    placement = Placement.compute(manifest, nodes, data.draw(st.integers(1, len(nodes))))
    dead = data.draw(st.sets(st.sampled_from(nodes), max_size=placement.replicas - 1))
    coverage = cover(manifest, {n: placement.rows_of(n) for n in nodes if n not in dead}, placement.replicas)
    assert coverage.lost == ()
    hit = {row for node in dead for row in placement.rows_of(node).tolist()}
    assert coverage.under_replicated == tuple(manifest.keys[row] for row in sorted(hit))


def test_deepseek_v3_on_eight_nodes_is_counted_faster_than_block_by_block() -> None:
    manifest = experts_of(58, 256)
    placement = Placement.compute(manifest, [f"node-{i}" for i in range(8)], 2)
    held = {node: placement.rows_of(node) for node in placement.nodes[1:]}
    manifest.keys  # noqa: B018 - spelled out once a manifest
    assert len(cover(manifest, held, 2).under_replicated) == len(placement.rows_of("node-0"))
    one_by_one = processor_time(lambda: Counter(row for rows in held.values() for row in rows.tolist()))
    assert processor_time(lambda: cover(manifest, held, 2)) < one_by_one
