"""xxh3-128 of blocks where they lie in GPU memory, taken by the GPU: 1 ms for 44 MB, and many blocks side by side.

So what is verified is what is in the slot, and the processor has no part in it: next to a transfer over TCP its cores
are busy, and reading every byte once more took a fifth of the speed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.cuda.driver import Cuda, Stream
from transfer.cuda.kernels import Kernels
from transfer.memory import view
from transfer.slots.host import agreed
from transfer.slots.table import SlotTable

ROUND_NBYTES = 1024
SUM_NBYTES = 64  # of a round, on the device
WORD_NBYTES = 8  # the kernels read whole words
NBYTES_MIN = 241  # shorter input is hashed in other ways
SUMS_NBYTES = 16 << 20  # of a lane, for 256 MiB of blocks at once, unless one block is larger
SUBJECTS_MAX = 1024  # slots looked at together
THREADS = 256
GRID_MAX = 4096

# The default secret and the start of the sums, as published with the algorithm (xxHash, doc/xxhash_spec.md).
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = (
    0x00000000C2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x0000000085EBCA77, 0x27D4EB2F165667C5, 0x000000009E3779B1,
)  # fmt: skip

RUN = np.dtype([("address", "<u8"), ("offset", "<u8"), ("nbytes", "<u8")])
SUBJECT = np.dtype([("first_run", "<u8"), ("runs", "<u8"), ("nbytes", "<u8"), ("at", "<u8")])


def _words(offset: int, count: int) -> list[int]:
    return [int.from_bytes(SECRET[at : at + 8], "little") for at in range(offset, offset + 8 * count, 8)]


def source() -> str:
    """The kernels, with the constants that they name."""
    constants = {
        "SECRET": _words(0, 24),
        "LAST": _words(121, 8),  # for the last stripe
        "LOW": _words(11, 8),  # for merging, to the low and the high half
        "HIGH": _words(117, 8),
        "START": list(START),
    }
    told = [
        f"__constant__ unsigned long long {name}[] = {{{', '.join(f'{word:#x}ULL' for word in words)}}};"
        for name, words in constants.items()
    ]
    return "\n".join([*told, Path(__file__).with_name("xxh3.cu").read_text(encoding="utf-8")])


@dataclass(frozen=True, slots=True)
class Workspace:
    """What checksums under way on one stream need: addresses, and what keeps the memory alive."""

    subjects: int
    staged: npt.NDArray[np.void]
    digests: npt.NDArray[np.uint64]
    sums: int
    alive: tuple[Any, ...]


@functools.cache
def loaded(device: str) -> Kernels:
    """The kernels, compiled and loaded once a device. Raises DeviceFailed."""
    return Kernels(Cuda(device), source(), ("add_rounds", "chain"))


class DeviceChecksums:
    """Of the slots in a table, which `can_take`. Raises DeviceFailed where the compiler or device memory is wanting."""

    def __init__(self, table: SlotTable, cuda: Cuda) -> None:
        self._cuda = cuda
        self._kernels = loaded(cuda.device)
        copies, number = table.copies_of(table.rows)
        starts = np.flatnonzero(np.diff(number, prepend=-1) | np.diff(copies["slot"], prepend=0))
        self._subjects = np.zeros(len(starts), SUBJECT)
        self._subjects["first_run"] = starts
        self._subjects["runs"] = np.diff(starts, append=len(copies))
        rows = np.array(table.rows, np.int64)[number[starts]]
        self._subjects["nbytes"] = table.manifest.nbytes[rows]
        self._rounds = (self._subjects["nbytes"].astype(np.int64) - 1) // ROUND_NBYTES + 1
        first = np.searchsorted(rows, table.rows).tolist()
        self._of = dict(zip(table.rows, map(slice, first, [*first[1:], len(rows)]), strict=True))
        total = int(self._rounds.sum())
        self._rounds_max = max(int(self._rounds.max()), min(SUMS_NBYTES // SUM_NBYTES, total))
        self._runs, self._alive = self._upload(copies)

    def open_workspace(self) -> Workspace:
        subjects, kept = self._cuda.allocate_on_device(SUBJECTS_MAX * SUBJECT.itemsize)
        sums, kept_sums = self._cuda.allocate_on_device(self._rounds_max * SUM_NBYTES)
        staged, kept_staged = self._cuda.allocate(SUBJECTS_MAX * SUBJECT.itemsize)
        digests, kept_digests = self._cuda.allocate(SUBJECTS_MAX * 16)
        return Workspace(
            subjects,
            _array(staged, SUBJECT, SUBJECTS_MAX),
            _array(digests, np.dtype(np.uint64), 2 * SUBJECTS_MAX),
            sums,
            (kept, kept_sums, kept_staged, kept_digests),
        )

    def take(self, rows: Sequence[int], workspace: Workspace, stream: Stream) -> dict[int, bytes]:
        """The checksums of these blocks once all that is queued on the stream is done: waits for it.

        `host_slots.UNEQUAL` for a block whose slots differ.
        """
        numbers = [number for row in rows for number in range(self._of[row].start, self._of[row].stop)]
        taken: dict[int, bytes] = {}
        for chunk in self._chunks(numbers):
            self._queue(chunk, workspace, stream)
            stream.wait()
            raw = workspace.digests[: 2 * len(chunk)].astype(">u8").tobytes()
            taken |= {number: raw[16 * at : 16 * at + 16] for at, number in enumerate(chunk)}
        return {
            row: agreed(taken[number] for number in range(*self._of[row].indices(len(self._rounds)))) for row in rows
        }

    def _chunks(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """What fits into a workspace together."""
        chunk: list[int] = []
        rounds = 0
        for number in numbers:
            more = int(self._rounds[number])
            if chunk and (len(chunk) == SUBJECTS_MAX or rounds + more > self._rounds_max):
                yield chunk
                chunk, rounds = [], 0
            chunk.append(number)
            rounds += more
        if chunk:
            yield chunk

    def _queue(self, chunk: Sequence[int], workspace: Workspace, stream: Stream) -> None:
        rounds = self._rounds[chunk]
        subjects = self._subjects[chunk]
        subjects["at"] = np.cumsum(rounds) - rounds
        workspace.staged[: len(chunk)] = subjects
        self._copy(workspace.subjects, workspace.staged, len(chunk) * SUBJECT.itemsize, stream)
        grid = min(GRID_MAX, -(-int(rounds.max()) * 32 // THREADS)), len(chunk)
        self._kernels.launch("add_rounds", grid, THREADS, (workspace.subjects, self._runs, workspace.sums), stream)
        digests = int(workspace.digests.ctypes.data)
        self._kernels.launch("chain", (len(chunk), 1), 8, (workspace.subjects, workspace.sums, digests), stream)

    def _copy(self, to: int, source: npt.NDArray[Any], nbytes: int, stream: Stream) -> None:
        to_one, source_one, size = (np.array([value], np.int64) for value in (to, source.ctypes.data, nbytes))
        self._cuda.runs("to_device", to_one, source_one, size, stream)

    def _upload(self, copies: npt.NDArray[np.void]) -> tuple[int, Any]:
        """The runs of all slots, which do not change while they are bound."""
        runs = np.zeros(len(copies), RUN)
        for ours, theirs in {"address": "address", "offset": "block_offset", "nbytes": "run_nbytes"}.items():
            runs[ours] = copies[theirs]
        address, kept = self._cuda.allocate_on_device(runs.nbytes)
        staged, _kept_staged = self._cuda.allocate(runs.nbytes)
        from_host = _array(staged, RUN, len(runs))
        from_host[:] = runs
        stream = self._cuda.open_stream()
        self._copy(address, from_host, runs.nbytes, stream)
        stream.wait()
        return address, kept


def can_take(table: SlotTable) -> bool:
    """Whether all blocks can be hashed where they lie: every slot holds all of one, in runs of whole words."""
    copies, _ = table.copies_of(table.rows)
    nbytes = table.manifest.nbytes[table.rows]
    return bool(
        all(map(table.is_direct, table.rows))
        and not any((copies[name] % WORD_NBYTES).any() for name in ("address", "block_offset", "run_nbytes"))
        and not (nbytes % WORD_NBYTES).any()
        and (nbytes >= NBYTES_MIN).all()
    )


def _array(address: int, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Memory by address, as an array; the caller keeps it alive."""
    return np.frombuffer(view(address, dtype.itemsize * count), dtype, count)
