"""Slots that are bound to a model: checked against its manifest, with the memory they lie in and a ring beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shm.attachment import Attachment
from shm.manifest import Manifest
from transfer.slots import Slots
from transfer.slots.host import HostSlots, SlotMemory
from transfer.slots.layouts import SlotMismatch
from transfer.slots.staging import Staging
from transfer.slots.table import SlotTable

if TYPE_CHECKING:
    from transfer.cuda.driver import Cuda
    from transfer.cuda.slots import DeviceSlots

CPU = "cpu"

_log = logging.getLogger("hotspare.restorer")


def device_of(slots: Slots) -> str:
    """The one device that all slots are on. Raises SlotMismatch for several, and for one not of CPU or CUDA."""
    devices = sorted({tensor.device for tensor in slots.tensors})
    if len(devices) > 1:
        raise SlotMismatch(f"slots on {' and '.join(devices)}: bind those of each device to a Restorer of their own")
    if devices[0] != CPU and not devices[0].startswith("cuda"):
        raise SlotMismatch(f"slots on {devices[0]}: only CPU and CUDA memory can be filled; reload from disk")
    return devices[0]


def check_not_moved(slots: Slots) -> None:
    """Raises SlotMismatch if a parameter has been given other memory since it was described."""
    for tensor in slots.tensors:
        if tensor.tensor.data_ptr() != tensor.address:
            raise SlotMismatch(
                f"{tensor.name} has moved in memory since it was bound: describe the slots and bind again"
            )


class BoundTable:
    """The slots of a table, with the memory that they lie in and a ring beside it."""

    def __init__(self, table: SlotTable, device: str, staging: Staging | None = None) -> None:
        """`staging` is the ring, where there is one already. Raises EngineError for a device that cannot be used."""
        self.manifest = table.manifest
        self.table = table
        self.device = device
        self.memory: SlotMemory
        self._on_gpu: DeviceSlots | None = None
        if device == CPU:
            self.staging = staging or ring(table.manifest, table.rows)
            self.memory = HostSlots(table)
        else:
            from transfer.cuda.driver import Cuda

            cuda = Cuda(device)
            self.staging = staging or ring(table.manifest, table.rows, device)
            with cuda.current():
                self.memory = self._on_gpu = self._on_device(cuda)

    def _on_device(self, cuda: Cuda) -> DeviceSlots:
        """The processor takes the checksums where the device cannot: it lacks the compiler, or memory to spare."""
        from transfer.cuda.checksum import DeviceChecksums, can_take
        from transfer.cuda.driver import DeviceFailed
        from transfer.cuda.slots import DeviceSlots

        try:
            if self.table.rows and can_take(self.table):
                return DeviceSlots(self.table, cuda, self.staging, DeviceChecksums(self.table, cuda))
        except DeviceFailed as error:
            _log.warning("the processor takes the checksums of GPU slots, which is slower: %s", error)
        return DeviceSlots(self.table, cuda, self.staging)

    def page_lock(self, attachment: Attachment) -> None:
        """Page-lock the blocks that these slots take, if they are on a device. Raises SegmentError."""
        if self._on_gpu is not None:
            attachment.pin(self.table.rows, self.device)
            self._on_gpu.edges = attachment.pinned_edges()

    def close(self, *, is_engine_gone: bool) -> None:
        """Give the ring back."""
        self.staging.close(is_engine_gone=is_engine_gone)


class BoundSlots(BoundTable):
    """A rank's slots for one manifest. Raises SlotMismatch where they do not fit, before a byte moves."""

    def __init__(self, slots: Slots, manifest: Manifest) -> None:
        self.slots = slots.keyed_by(manifest)
        super().__init__(SlotTable(self.slots.plan(manifest), manifest), device_of(slots))


def ring(manifest: Manifest, rows: Sequence[int], device: str = CPU) -> Staging:
    """Host buffers for these blocks on their way; page-locked for a GPU. Raises EngineError where there is none."""
    nbytes = manifest.nbytes[list(rows)]
    sizes = int(nbytes.max(initial=1)), int(nbytes.sum())  # a rank may hold no expert at all
    if device == CPU:
        return Staging(*sizes)
    from transfer.cuda.driver import Cuda

    return Staging(*sizes, Cuda(device).allocate)
