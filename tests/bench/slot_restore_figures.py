"""Restoring into CPU tensors from local shared memory, as ratios.

    python tests/bench/slot_restore_figures.py [--gb 1] [--experts 16] [--layers 58] [--json]

`--gb` is how much is restored, in layers of `--experts`; `--layers` how many of DeepSeek-V3's are planned for, of 256
experts each. Every time is the best of REPEATS, after one that does not count.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from workbench import arguments, namespace

from shm.attachment import attach
from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.layout import SegmentName
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment
from transfer import Restorer
from transfer.ledger import Ledger
from transfer.plan import Limits, Offer, Want
from transfer.slots import Slots
from transfer.slots.copies import apply_copies
from transfer.slots.host import HostSlots
from transfer.slots.mismatch import Reference
from transfer.slots.proof import compare
from transfer.slots.table import SlotTable
from transfer.sources import LOCAL_LANES_MAX
from transfer.standing import Party

REPEATS = 5
NOBODY = "http://127.0.0.1:9"
THREADS = max(2, min(LOCAL_LANES_MAX, os.cpu_count() or 2))
LAYERS, EXPERTS = 58, 256  # of DeepSeek-V3
# name → (H, I, dtype, has scales)
SHAPES = {"DeepSeek-V3, fp8": (7168, 2048, "F8_E4M3", True), "Qwen3-30B-A3B, bf16": (2048, 768, "BF16", False)}
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}


def manifest_of(shape: str, layers: int, experts: int, scale: int = 1) -> Manifest:
    hidden, inner, dtype, has_scales = SHAPES[shape]
    hidden, inner = hidden // scale, inner // scale
    entries = []
    for part, (rows, columns) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        stem = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{part}_proj.weight"
        entries.append(TensorEntry(stem, dtype, (rows, columns), 0, 0))
        if has_scales:
            entries.append(TensorEntry(f"{stem}_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)), 0, 0))
    keys = [ExpertKey(layer, expert) for layer in range(layers) for expert in range(experts)]
    return Manifest.build("bench", "", "experts", [FileSpec("f", 1 << 40, "")], dict.fromkeys(keys, entries))


def parameters(shape: str, layers: int, experts: int, scale: int = 1) -> dict[str, torch.Tensor]:
    hidden, inner, dtype, has_scales = SHAPES[shape]
    hidden, inner = hidden // scale, inner // scale
    held = {}
    for layer in range(layers):
        for part, rows, columns in (("w13", 2 * inner, hidden), ("w2", hidden, inner)):
            stem = f"model.layers.{layer}.mlp.experts.{part}_weight"
            held[stem] = torch.ones((experts, rows, columns), dtype=torch.uint8).view(-1)
            if dtype == "BF16":
                held[stem] = torch.ones(experts * rows * columns, dtype=torch.bfloat16)
            held[stem] = held[stem].view(TORCH[dtype]).view(experts, rows, columns)
            if has_scales:
                sides = (
                    experts,
                    (2 if part == "w13" else 1) * -(-(rows // (2 if part == "w13" else 1)) // 128),
                    -(-columns // 128),
                )
                held[f"{stem}_scale_inv"] = torch.ones(sides)
    return held


def best(*runs: Callable[[], object]) -> list[float]:
    """Seconds of each, the best of REPEATS rounds: they take turns, so that a busy moment hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS + 1):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return [min(taken[1:]) for taken in times]


def in_threads(do: Callable[[int], object], rows: Iterable[int]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(do, rows))


def fill(segment: Segment, manifest: Manifest) -> None:
    rows = list(range(len(manifest)))
    segment.allocate(manifest, rows)

    def one(row: int) -> None:
        block = segment.block(row)
        for tensor in manifest.schema(row).tensors:
            block[tensor.offset : tensor.offset + tensor.nbytes] = os.urandom(4096) * (tensor.nbytes // 4096) + bytes(
                tensor.nbytes % 4096
            )
        segment.publish(row, checksum(block))

    in_threads(one, rows)
    segment.seal()


def copying(shape: str, nbytes: int, experts: int) -> dict[str, float]:
    layers = max(1, round(nbytes / int(manifest_of(shape, 1, 1).nbytes[0]) / experts))
    manifest = manifest_of(shape, layers, experts)
    total = int(manifest.nbytes.sum())
    name = SegmentName(namespace(), "bench", "here")
    segment = Segment.claim(name)
    try:
        fill(segment, manifest)
        slots = Slots.fused(parameters(shape, layers, experts))
        plain = torch.ones(total, dtype=torch.uint8)
        rows = list(range(len(manifest)))
        starts = (manifest.nbytes.cumsum() - manifest.nbytes).tolist()
        sizes = manifest.nbytes.tolist()
        table = SlotTable(slots.plan(manifest), manifest)
        into = plain.data_ptr()
        with (
            attach("bench", namespace=name.namespace) as weights,
            Restorer(NOBODY, model="bench", namespace=name.namespace) as restorer,
        ):
            address = [weights.address(row) for row in rows]
            copies = [table.by_slot(row)[0] for row in rows]
            restorer.bind(slots, proof="none")
            assert restorer.restore().ok
            memory = HostSlots(table)
            references = {row: Reference(weights.checksum(row)) for row in rows}
            memcpy, slot_copy, verify, restore, proof, bind = best(
                lambda: in_threads(lambda r: ctypes.memmove(into + starts[r], address[r], sizes[r]), rows),
                lambda: in_threads(lambda r: apply_copies(weights.block(r), copies[r]), rows),
                lambda: in_threads(lambda r: checksum(weights.block(r)), rows),
                restorer.restore,
                lambda: compare(table, memory, references, rows),
                lambda: restorer.bind(slots),
            )
            (sampled,) = best(lambda: restorer.bind(slots, proof="sample"))
    finally:
        segment.unlink()
    return {
        "GB": total / 1e9,
        "memcpy GB/s": total / memcpy / 1e9,
        "into slots GB/s": total / slot_copy / 1e9,
        "checksums alone GB/s": total / verify / 1e9,
        "restore with verification GB/s": total / restore / 1e9,
        "into slots / memcpy": memcpy / slot_copy,
        "restore with verification / memcpy": memcpy / restore,
        "restore / memcpy then checksums": (memcpy + verify) / restore,
        "proof of slots GB/s": total / proof / 1e9,
        "proof of slots / checksums alone, of whole blocks": verify / proof,
        "bind with all proved GB/s": total / bind / 1e9,
        "bind with a sample proved, ms": sampled * 1e3,
    }


def planning(layers: int) -> dict[str, float]:
    """Every block of DeepSeek-V3, its sides divided: what is compared and planned does not depend on them."""
    shape, scale = "DeepSeek-V3, fp8", 64
    manifest = manifest_of(shape, layers, EXPERTS, scale)
    slots = Slots.fused(parameters(shape, layers, EXPERTS, scale))
    expected = bytes(16)

    def compare() -> SlotTable:
        return SlotTable(slots.plan(manifest), manifest)

    table = compare()

    def lay_out() -> None:
        sizes = manifest.nbytes.tolist()
        wants = [Want(row, sizes[row], expected) for row in table.rows]
        offers = {row: [Offer("local", row << 20)] for row in table.rows}
        ledger = Ledger(wants, offers, {"local": Party("local", 0, THREADS, Limits(nbytes=32 << 20))})
        while batches := ledger.next(0.0).move:
            for batch in batches:
                ledger.moved(batch, dict.fromkeys((want.row for want in batch.wants), expected), 0.0)

    at_bind, at_restore = best(compare, lay_out)
    return {
        "blocks": float(len(manifest)),
        "comparing slots with the manifest, at bind, ms": at_bind * 1e3,
        "the ledger, over a whole restore, ms": at_restore * 1e3,
    }


def main() -> None:
    given = arguments(
        __doc__, gb=(1.0, "GB to restore"), experts=(16, "experts a layer"), layers=(LAYERS, "layers to plan for")
    )
    figures = {shape: copying(shape, int(given.gb * 1e9), given.experts) for shape in SHAPES}
    figures["planning"] = planning(given.layers)
    if given.json:
        print(json.dumps({"threads": THREADS, **figures}))
        return
    print(f"{THREADS} threads, {os.cpu_count()} cores")
    for title, rows in figures.items():
        print(f"\n{title}")
        for what, value in rows.items():
            print(f"  {what:<48} {value:10.2f}")


if __name__ == "__main__":
    main()
