"""An engine's start, or its reload: every tensor of a checkpoint by its name, from the nearest memory that has it.

    this host's segment, without a copy ──▶ peers' memory, by way of a ring ──▶ the checkpoint's files

A start never fails for a node's sake. What no memory has, the files give; where the files are of other weights than
the nodes keep, nothing is taken from memory at all; only what is in neither is an error. Every block is verified before
it is handed out: here, on the device that it goes to, unless this host's node says that it did so since it began.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shm.attachment import Attachment
from shm.block import NBYTES_MAX
from shm.checksum import checksum
from shm.errors import BlockUnavailable, HotspareError
from shm.manifest import Manifest
from transfer.checkpoint.content import PinnedCheckpoint
from transfer.client.bound_slots import CPU, BoundTable, ring
from transfer.client.catalogue import Assembler, Catalogue, windows
from transfer.client.control_plane import ControlPlane
from transfer.client.engine_lease import EngineLease
from transfer.client.ladder import Ladder, Reach
from transfer.client.last_resort import LastResort
from transfer.client.report import PROGRESS_INTERVAL_S, Tally
from transfer.client.surroundings import Surroundings
from transfer.errors import CheckpointError, RestoreError
from transfer.slots.staging import Staging
from transfer.slots.whole import offsets_of, whole_blocks
from transfer.sources import SourceKind

if TYPE_CHECKING:
    import torch

WINDOW_NBYTES = 1 << 30
AHEAD = 2  # windows under way while one is handed out: one begins while another ends
VERIFY_THREADS_MAX = 16  # a checksum reaches the memory's speed before that
MISSING_SHOWN = 3
EVERYTHING = "all"  # what a manifest includes that has dense tensors too
EXPERTS_ALONE = (
    "the nodes keep experts alone, and there are no files for the other tensors: keep all with `hotspare serve "
    "--include all`, give the checkpoint's files, or ask for experts only"
)

Wanted = Callable[[str], bool]
Named = tuple[str, "torch.Tensor"]

_log = logging.getLogger("hotspare.loader")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded until now. Bytes are of blocks, and of tensors that are in none, by where they came from."""

    tensors: int
    bytes_by_source: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...]
    """Places that could not be used, and why."""
    is_whole: bool = True
    """Whether every tensor was asked about: not where nodes keep experts alone and there are no files."""

    @property
    def bytes_total(self) -> int:
        return sum(self.bytes_by_source.values())


Progress = Callable[[LoadReport], None]


class _Brought(NamedTuple):
    """One window: its blocks by manifest row, the last one first, uint8 [bytes] each; and what was noted."""

    blocks: dict[int, torch.Tensor]
    tally: Tally


class Loader:
    """Loads one checkpoint. For one thread at a time.

        with Loader("http://127.0.0.1:8470", checkpoint="/models/qwen3") as loader:
            for name, tensor in loader.tensors(device="cuda:0"):
                parameters[name].copy_(tensor)

    A tensor stays valid for as long as it is kept, also after `close`. One in CPU memory may lie on the segment's own
    pages, which nobody can write: `.clone()` it before changing it in place, which would end the process.
    """

    def __init__(
        self,
        url: str,
        *,
        checkpoint: str | Path | None = None,
        token: str | None = None,
        model: str | None = None,
        namespace: str = "default",
        node: str | None = None,
        engine: Any = None,
        engine_host: str | None = None,
        transport: str = "tcp",
    ) -> None:
        """`url` is this host's node, which need not be up, and `checkpoint` the directory that is to be loaded: its
        files need not be there if the nodes keep all that is wanted. The rest is as for a `Restorer`.
        """
        self._control = ControlPlane(url, token)
        self._disk = LastResort(checkpoint)
        self._around = Surroundings(self._control, self._disk, model, namespace, node)
        self._lease = EngineLease(engine, engine_host, transport, self._control.address)
        self._staging: Staging | None = None
        self._starting, self._reading = threading.Lock(), threading.Lock()
        """Held by a window while it has the engine started, or the files looked at."""
        self._has_memory = False
        self.report = LoadReport(0, {}, 0.0, ())
        """Of the load that is under way, or the last one."""

    @property
    def content_digest(self) -> str | None:
        """Which content was loaded, in hex; None where all came from the files, and nobody told it."""
        return self._around.content.digest if self._has_memory else None

    def close(self) -> None:
        """Let the segment, the ring and the engine go. Tensors that were handed out stay."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close(is_engine_gone=False)
        self._around.segment.close()
        self._lease.drop()
        self._control.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- loading ---------------------------------------------------------------------------------------------

    def find(self) -> Manifest | None:
        """Look around, and load nothing: the manifest of what may be taken from memory. None where all would come from
        the files; `report.notes` says why.
        """
        count = _Count(self, None)
        manifest = self._find(count.tally, self._around.told_manifest)
        count.tell()
        return manifest

    def load(
        self, wanted: Wanted | None = None, *, device: str = CPU, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """Every tensor that is wanted, by its name, brought all at once. As `tensors`."""
        return dict(self.tensors(wanted, device=device, progress=progress, window_nbytes=NBYTES_MAX))

    def tensors(
        self,
        wanted: Wanted | None = None,
        *,
        device: str = CPU,
        progress: Progress | None = None,
        window_nbytes: int = WINDOW_NBYTES,
    ) -> Iterator[Named]:
        """Hand out each tensor whose name is wanted, all by default, on a device; in no promised order.

        What does not lie in this host's memory as it is asked for is brought in windows of `window_nbytes` bytes, one
        or two ahead: memory that is free again once the window's tensors are. `progress` is called with a LoadReport
        now and then, and at the end.

        Raises RestoreError for tensors that neither memory nor files have, and EngineError for a device that cannot be
        used. Nothing else that a node, a segment, a peer or a file does is raised while the others have what is wanted.
        Which tensors a checkpoint has besides experts is unknown where the nodes keep no others and no files are there:
        then all cannot be asked for, and of what is wanted the experts come (`LoadReport.is_whole`).
        """
        count = _Count(self, progress)
        had_files = self._disk.has_files
        manifest = self._find(count.tally, self._around.manifest)
        self._has_memory = manifest is not None
        count.is_whole = had_files or (manifest is not None and manifest.include == EVERYTHING)
        if wanted is None and manifest is not None and not count.is_whole:
            raise RestoreError(EXPERTS_ALONE)
        wanted = wanted or (lambda _: True)
        catalogue = None if manifest is None else Catalogue(manifest, wanted)
        if manifest is not None and catalogue is not None:
            yield from self._from_memory(manifest, catalogue, device, count, window_nbytes)
        known = catalogue.all_names if catalogue else frozenset()
        if not self._disk.has_files:
            _check_without_files(manifest, count.tally.notes, had_files=had_files)
        else:
            yield from self._from_files(known, wanted, device, count)
        count.end()

    def _find(self, tally: Tally, elsewhere: Callable[[Tally], Manifest | None]) -> Manifest | None:
        """Look around; the manifest of what may be taken from memory, None where nothing may.

        Without a segment on this host it is what `elsewhere` gives.
        """
        if (host := self._around.ask_node(tally)) is not None:
            self._lease.suggest_host(host)
        attachment = self._around.attach(None, tally)
        manifest = attachment.manifest if attachment is not None else elsewhere(tally)
        if manifest is not None and self._disk.has_files:
            try:
                self._disk.of(manifest, self._around.content)
            except CheckpointError as error:
                tally.note(str(error))
                return None
        return manifest

    # -- from memory -----------------------------------------------------------------------------------------

    def _from_memory(
        self, manifest: Manifest, catalogue: Catalogue, device: str, count: _Count, window_nbytes: int
    ) -> Iterator[Named]:
        assembler = Assembler(catalogue, device)
        missing = list(catalogue.parts)
        if device == CPU and (attachment := self._around.segment.attachment) is not None:
            wrong: list[int] = []
            here: set[int] = set()
            for row, block in self._in_place(attachment, missing, wrong):
                here.add(row)
                count.add(SourceKind.LOCAL, block.nbytes)
                yield from count.each(assembler.add(row, block))
            if wrong:
                self._tell(manifest, {None: wrong}, count.tally)
            missing = [row for row in missing if row not in here]
        self._prepare(manifest, missing, device, count.tally)
        bring = partial(self._bring, manifest, device)
        with ThreadPoolExecutor(AHEAD, "hotspare-load") as pool:
            for brought in _ahead(pool, bring, windows(manifest, missing, window_nbytes)):
                count.merge(brought.tally)
                while brought.blocks:
                    yield from count.each(assembler.add(*brought.blocks.popitem()))

    def _in_place(
        self, attachment: Attachment, rows: Sequence[int], wrong: list[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks where they lie in this host's segment, verified; those that are not right are added to `wrong`."""
        held = attachment.held(rows)
        is_proved = self._is_proved(attachment)
        threads = min(VERIFY_THREADS_MAX, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, "hotspare-verify") as pool:
            is_right = partial(_is_right, attachment, is_proved=is_proved)
            for row, verdict in zip(held, pool.map(is_right, held), strict=True):
                try:
                    block = attachment.block_tensor(row) if verdict else None
                except BlockUnavailable:  # its owner found it wrong in this moment
                    block = None
                if block is None:
                    wrong.append(row)
                else:
                    yield row, block

    def _is_proved(self, attachment: Attachment) -> bool:
        """Whether the segment's owner says that it has proved all of it since it began."""
        try:
            said = self._control.node(self._control.urls[0])
        except HotspareError:
            return False
        owner = said.node_id, said.segment, said.content_digest
        is_owner = owner == (attachment.name.node, attachment.name.object_name, attachment.content_digest)
        return is_owner and said.blocks_unproved == 0

    def _prepare(self, manifest: Manifest, rows: Sequence[int], device: str, tally: Tally) -> None:
        """What all windows share: the ring, and page-locked memory to copy from."""
        if not rows:
            return
        if self._staging is None or self._staging.is_spent:
            self._staging = ring(manifest, range(len(manifest)), device)
        if device != CPU and (attachment := self._around.segment.attachment) is not None:
            tally.attempt(attachment.pin, rows, device)

    def _bring(self, manifest: Manifest, device: str, rows: list[int]) -> _Brought:
        """Bring blocks into memory of their own. Raises RestoreError for what nobody has."""
        import torch

        offsets, nbytes = offsets_of(manifest, rows)
        memory = torch.empty(max(1, nbytes), dtype=torch.uint8, device=device)
        bound = BoundTable(whole_blocks(manifest, offsets, memory), device, self._staging)
        tally = Tally()
        ladder = Ladder(bound, rows, tally)
        self._climb(ladder, bound, tally)
        self._tell(manifest, ladder.wrong, tally)
        if ladder.missing:
            raise RestoreError(_said(manifest, ladder.missing))
        sizes = manifest.nbytes.tolist()
        return _Brought({row: memory[at : at + sizes[row]] for row, at in reversed(offsets.items())}, tally)

    def _climb(self, ladder: Ladder, bound: BoundTable, tally: Tally) -> None:
        attachment = self._around.segment.attachment
        held = self._around.segment.held(ladder.missing)
        bound.memory.follow(wait=False)
        if attachment is not None and bound.device != CPU:
            tally.attempt(bound.page_lock, attachment)
            ladder.climb_local(attachment, held)
        checkpoint = partial(self._checkpoint_of, bound.manifest) if self._disk.has_files else None
        ladder.climb_all(partial(self._around.find, held, tally), partial(self._reach, tally), checkpoint)

    def _reach(self, tally: Tally) -> Reach:
        with self._starting:
            tally.attempt(self._lease.start)
        return Reach(self._lease.engine, self._lease.fence)

    def _checkpoint_of(self, manifest: Manifest) -> PinnedCheckpoint:
        with self._reading:
            return self._disk.of(manifest, self._around.content)

    def _tell(self, manifest: Manifest, wrong: Mapping[str | None, Sequence[int]], tally: Tally) -> None:
        for node, rows in wrong.items():
            tally.note(f"{len(rows)} blocks were wrong in the memory of {node or 'this host'}")
        self._around.tell_who_was_wrong(manifest, wrong)

    # -- from files ------------------------------------------------------------------------------------------

    def _from_files(self, known: frozenset[str], wanted: Wanted, device: str, count: _Count) -> Iterator[Named]:
        """What no block has: dense tensors, unless the nodes keep those too; or everything, without nodes."""
        from safetensors import SafetensorError, safe_open

        for path in self._disk.files():
            try:
                with safe_open(path, framework="pt", device=device) as file:
                    for name in file.keys():  # noqa: SIM118 - it is no mapping
                        if name not in known and wanted(name):
                            tensor = file.get_tensor(name)
                            count.add(SourceKind.DISK, tensor.nbytes)
                            yield from count.each([(name, tensor)])
            except (SafetensorError, OSError) as error:
                raise RestoreError(f"{path} cannot be read: {error}; download it again") from error


def _check_without_files(manifest: Manifest | None, notes: Sequence[str], *, had_files: bool) -> None:
    """Raise RestoreError if something that only files have was wanted, and they are not there."""
    if had_files:
        raise RestoreError("the checkpoint's files went away in the middle of the load: put them back, and load again")
    if manifest is None:
        raise RestoreError(f"nothing can be loaded: {'; '.join(notes)}, and there are no files")


class _Count:
    """What one load has handed out."""

    def __init__(self, loader: Loader, progress: Progress | None) -> None:
        self.tally = Tally()
        self._loader = loader
        self._progress = progress
        self._began_s = self._told_s = time.monotonic()
        self._tensors = 0
        self.is_whole = True
        self._bytes = dict.fromkeys(map(str, SourceKind), 0)

    def add(self, kind: SourceKind, nbytes: int) -> None:
        self._bytes[kind.value] += nbytes

    def each(self, named: Sequence[Named] | Iterator[Named]) -> Iterator[Named]:
        for each in named:
            self._tensors += 1
            if time.monotonic() - self._told_s >= PROGRESS_INTERVAL_S:
                self.tell()
            yield each

    def merge(self, tally: Tally) -> None:
        """Count what a window brought."""
        for kind, nbytes in tally.report().bytes_by_source.items():
            self._bytes[kind] += nbytes
        for note in tally.notes:
            self.tally.note(note)
        self.tell()

    def tell(self) -> None:
        seconds = time.monotonic() - self._began_s
        notes = tuple(self.tally.notes)
        self._loader.report = LoadReport(self._tensors, dict(self._bytes), seconds, notes, self.is_whole)
        self._told_s = time.monotonic()
        if self._progress is not None:
            try:
                self._progress(self._loader.report)
            except Exception:
                _log.exception("the progress callback failed; the load goes on without it")
                self._progress = None

    def end(self) -> None:
        self.tell()
        report = self._loader.report
        said = ", ".join(f"{nbytes / 1e9:.3g} GB from {kind}" for kind, nbytes in report.bytes_by_source.items())
        _log.info("loaded %d tensors in %.2f s: %s", report.tensors, report.seconds, said)
        for note in report.notes:
            _log.warning("loaded, but: %s", note)


def _is_right(attachment: Attachment, row: int, *, is_proved: bool) -> bool:
    try:
        return is_proved or checksum(attachment.block(row)) == attachment.checksum(row)
    except BlockUnavailable:
        return False


def _ahead(
    pool: ThreadPoolExecutor, bring: Callable[[list[int]], _Brought], groups: Iterator[list[int]]
) -> Iterator[_Brought]:
    """What is brought of each group, in order, while the next AHEAD are on their way."""
    coming = deque(pool.submit(bring, rows) for rows in islice(groups, AHEAD))
    try:
        while coming:
            brought = coming.popleft().result()
            coming.extend(pool.submit(bring, rows) for rows in islice(groups, 1))
            yield brought
            del brought  # its memory is the next window's
    finally:
        for future in coming:
            future.cancel()


def _said(manifest: Manifest, missing: Mapping[int, Sequence[str]]) -> str:
    shown = [f"{manifest.keys[row]}: {'; '.join(why) or 'nobody has it'}" for row, why in list(missing.items())]
    more = f", and {len(shown) - MISSING_SHOWN} more" if len(shown) > MISSING_SHOWN else ""
    return (
        f"{len(missing)} blocks are in no memory and in no file, first {', '.join(shown[:MISSING_SHOWN])}{more}: "
        "give the checkpoint's directory, or restore them on a node"
    )
