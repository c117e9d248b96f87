"""Where the milliseconds of a restore into GPU memory go: the stretches between its events, seen from the bus.

`DeviceSlots` and `DeviceChecksums` are watched from outside: CUDA events around each batch's copies and at the end of
its checksums, and this process's clock around the restore. Both clocks start together; they agree to some tens of
microseconds. The bus counts as busy while any lane has copies queued that have not ended.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from transfer.cuda.checksum import DeviceChecksums, Workspace
from transfer.cuda.driver import Stream
from transfer.cuda.slots import DeviceSlots


class Stretches(NamedTuple):
    """Of one restore, in ms; the first five add up to the whole. `batches` is a count."""

    before_the_first_copy: float
    bus_busy: float
    bus_idle_between_copies: float
    checksums_after_the_last_copy: float
    after_the_last_checksum: float
    a_batch_from_copied_to_checked: float
    a_batch_from_checked_to_noticed: float
    batches: float


class Times(NamedTuple):
    """Of one batch, in ms from the start of the restore: on the device, and when its thread went on."""

    begun: float
    copied: float
    checked: float
    noticed: float


@dataclass
class Batch:
    """The events behind `Times`."""

    begun: torch.cuda.Event
    copied: torch.cuda.Event
    checked: torch.cuda.Event | None = None
    noticed_s: float | None = None


def stretches(batches: Sequence[Times], whole_ms: float) -> Stretches:
    """What becomes of the whole, and the medians over the batches."""
    first = end = min(batch.begun for batch in batches)
    busy = 0.0
    for batch in sorted(batches):
        busy += max(0.0, batch.copied - max(batch.begun, end))
        end = max(end, batch.copied)
    last = max(batch.checked for batch in batches)
    return Stretches(
        first, busy, end - first - busy, last - end, whole_ms - last,
        statistics.median(batch.checked - batch.copied for batch in batches),
        statistics.median(batch.noticed - batch.checked for batch in batches),
        len(batches),
    )  # fmt: skip


class Timeline:
    """Watches the restores that are given to it, one after the other."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._of_stream: dict[int, Batch] = {}

    def of(self, restore: Callable[[], object]) -> Stretches:
        """Run it, and say where its time went."""
        self._batches.clear()
        torch.cuda.synchronize()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        start.synchronize()
        started = time.perf_counter()
        with self._watching():
            restore()
        whole_ms = (time.perf_counter() - started) * 1e3
        torch.cuda.synchronize()
        done = [
            Times(
                start.elapsed_time(each.begun),
                start.elapsed_time(each.copied),
                start.elapsed_time(each.checked),
                (each.noticed_s - started) * 1e3,
            )
            for each in self._batches
            if each.checked is not None and each.noticed_s is not None
        ]
        return stretches(done, whole_ms)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        copy, queue, take = DeviceSlots._copy, DeviceChecksums._queue, DeviceChecksums.take

        def watched_copy(slots: DeviceSlots, way: str, copies: Any, to: Any, source: Any, stream: Stream) -> None:
            begun = _now_on(stream)
            copy(slots, way, copies, to, source, stream)
            if way == "to_device":
                batch = self._of_stream[stream.handle] = Batch(begun, _now_on(stream))
                self._batches.append(batch)

        def watched_queue(sums: DeviceChecksums, chunk: Sequence[int], workspace: Workspace, stream: Stream) -> None:
            queue(sums, chunk, workspace, stream)
            self._of_stream[stream.handle].checked = _now_on(stream)

        def watched_take(
            sums: DeviceChecksums, rows: Sequence[int], workspace: Workspace, stream: Stream
        ) -> dict[int, bytes]:
            taken = take(sums, rows, workspace, stream)
            self._of_stream[stream.handle].noticed_s = time.perf_counter()
            return taken

        with contextlib.ExitStack() as undo:
            for owner, name, watched, plain in (
                (DeviceSlots, "_copy", watched_copy, copy),
                (DeviceChecksums, "_queue", watched_queue, queue),
                (DeviceChecksums, "take", watched_take, take),
            ):
                setattr(owner, name, watched)
                undo.callback(setattr, owner, name, plain)
            yield


def _now_on(stream: Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream._torch)
    return event


def tell(runs: Sequence[Stretches], bare_ms: float) -> str:
    """The medians, a line each."""
    lines = [
        f"  {name.replace('_', ' '):<54} {statistics.median(each):8.2f}{'' if name == 'batches' else ' ms'}"
        for name, each in zip(Stretches._fields, zip(*runs, strict=True), strict=True)
    ]
    return "\n".join(
        ["where the milliseconds go", *lines, f"  {'the bare copy, for comparison':<54} {bare_ms:8.2f} ms"]
    )
