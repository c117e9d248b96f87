"""The comparison of segments with the checkpoint: it must see what is wrong."""

from __future__ import annotations

from pathlib import Path

import torch

from app.demo.comparison import compare, same
from shm.attachment import attach
from shm.layout import SegmentName
from shm.segment import Segment
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.reader import BlockReader
from transfer.checkpoint.synth import write_checkpoint


def test_the_comparison_sees_one_byte_a_lost_tensor_and_one_that_is_no_experts(tmp_path: Path, namespace: str) -> None:
    directory = tmp_path / "checkpoint"
    write_checkpoint(directory, "deepseek-v3", layers=4, experts=5, scale=0.03125, file_nbytes=333_333)
    opened = read_checkpoint(directory, "m", "all")
    name = SegmentName(namespace, "m", "a")
    segment = Segment.claim(name)
    try:
        segment.allocate(opened.manifest, range(len(opened.manifest)))
        disk = BlockReader(opened)
        for row in range(len(opened.manifest)):
            segment.publish(row, disk.read_block(row, segment.block(row)))
        disk.close()
        segment.seal()
        with attach("m", namespace=name.namespace) as weights:
            found = compare(directory, {"a": weights})
            assert (found.tensors, found.compared, found.replicas_min, found.differing) == (30, 30, 1, [])
            assert any("shared_experts" in each for each in found.unexpected), "the dense ones are none of experts"
            assert not found.ok
            row = opened.manifest.index(3, 4)
            segment.block(row)[-1] ^= 0x80
            (difference,) = compare(directory, {"a": weights}).differing
            assert difference == f"{opened.manifest.block(row).tensors[-1].name} on a"
            segment.quarantine(row)
            lacking = compare(directory, {"a": weights})
            assert (lacking.tensors, lacking.compared, lacking.replicas_min, lacking.ok) == (30, 24, 0, False)
    finally:
        segment.unlink()


def test_tensors_of_another_dtype_or_shape_are_not_the_same() -> None:
    ours = torch.zeros(3, 5)
    assert same(ours, torch.zeros(3, 5))
    assert not same(ours, torch.zeros(5, 3))
    assert not same(ours, torch.zeros(3, 5, dtype=torch.int32))
    assert not same(ours, -torch.zeros(3, 5)), "equal as numbers, and other bytes"
