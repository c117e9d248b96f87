"""Blocks of other hosts, brought here one at a time to be looked at: of slots that hold parts of a block no checksum is
on record, so what they hold can only be compared with the block itself. Where it lies in no memory of this host, a
rank that shares none with its node for instance, it is read from a peer into a host buffer, and forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from shm.checksum import checksum
from shm.manifest import Manifest
from transfer.engine import Copy, TransferEngine
from transfer.errors import EngineError, TransferFailed
from transfer.memory import view
from transfer.plan import Limits, sliced, split
from transfer.shard_map import Mapped
from transfer.slots.mismatch import Reference
from transfer.slots.staging import Buffer, Staging


def borrowed(
    engine: TransferEngine,
    staging: Staging,
    manifest: Manifest,
    found: Mapping[int, Mapped],
    note: Callable[[str], None],
) -> Iterator[tuple[int, Reference]]:
    """Manifest row, and its block, which is good until the next one is asked for.

    One after the other of those that were found; what cannot be had right is noted, and left out.
    """
    try:
        staging.prepare(engine)
        for row, mapped in found.items():
            with staging.take() as buffer:
                if _is_brought(engine, buffer, int(manifest.nbytes[row]), mapped, note):
                    yield row, Reference(mapped.checksum, buffer.address)
    except EngineError as error:
        note(str(error))


def _is_brought(
    engine: TransferEngine, buffer: Buffer, nbytes: int, mapped: Mapped, note: Callable[[str], None]
) -> bool:
    for replica in mapped.replicas:
        try:
            for call in split(sliced([Copy(buffer.address, replica.address, nbytes)]), Limits()):
                engine.read(replica.session_id, call)
        except TransferFailed as error:
            note(f"{replica.node_id}: {error}")
            if error.timed_out:  # it may arrive later
                buffer.is_retired = True
                return False
            continue
        if checksum(view(buffer.address, nbytes)) == mapped.checksum:
            return True
        note(f"{replica.node_id} has other bytes of a block than it says")
    return False
