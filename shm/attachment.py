"""The reader's side: map a sealed segment read-only and hand out tensors on its pages.

Needs no daemon and no HTTP: the name leads to the object, and its header says the rest. Nothing here creates, writes
or unlinks. A tensor keeps the mapping alive, so it outlives the `Attachment` it came from. The pages are read-only:
writing to a tensor in place ends the process with SIGSEGV; `.clone()` first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shm import posix
from shm.block import COMMON, DENSE, SHARE, ExpertKey, HeldBlock, TensorTemplate, fill_template, whole_name
from shm.checksum import checksum
from shm.errors import (
    BlockUnavailable,
    SegmentCorrupt,
    SegmentError,
    SegmentForeign,
    SegmentTruncated,
    SegmentUnsealed,
)
from shm.header import Header
from shm.layout import BLOCK_ALIGNMENT, SHM_DIRECTORY, BlockState, Entries, Int64s, SegmentName, SegmentState
from shm.lookup import find_segment, read_header, read_manifest
from shm.manifest import Manifest
from shm.rules import check_entries
from shm.table import Mask, read_entries, table_copies

if TYPE_CHECKING:
    import torch

    from shm.pinning import PageLock

ATTACH_ATTEMPTS_MAX = 5  # a table read while its owner extends it may break a rule: read again
ATTACH_RETRY_S = 0.002
VERIFY_LOOKS = 2
VERIFY_THREADS_MAX = 16  # xxh3 reaches the memory's speed before that

NOWHERE = -1

# torch's names for the dtypes of the safetensors format; one that this torch lacks is refused when it is asked for.
_TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_PACKED = {"F4": 2}  # elements in one element of the torch dtype


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype name; raises BlockUnavailable if this torch has none."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise BlockUnavailable(f"torch {torch.__version__} has no dtype for {name}: use a newer torch")
    return dtype


def shaped(flat: torch.Tensor, template: TensorTemplate) -> torch.Tensor:
    """The bytes of a tensor, uint8 [bytes], with its dtype and shape. Raises BlockUnavailable as `torch_dtype` does."""
    dtype, shape = torch_dtype(template.dtype), list(template.shape)
    if template.dtype in _PACKED:
        if shape[-1] % _PACKED[template.dtype]:
            raise BlockUnavailable(f"{template.name} is {template.dtype} {shape}: torch packs whole bytes in a row")
        shape[-1] //= _PACKED[template.dtype]
    return flat.view(dtype).view(shape)


class ExpertTensors(dict[str, "torch.Tensor"]):
    """Checkpoint name → tensor of one expert. The slice of a fused tensor also answers to `<name>[<expert>]`, what all
    experts of a layer have in common to `<name>[*<expert>]`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], expert: int) -> None:
        super().__init__(tensors)
        self._key = ExpertKey(DENSE, expert)

    def __missing__(self, name: str) -> torch.Tensor:
        for suffix in (SHARE, COMMON):
            whole = name.removesuffix(fill_template(suffix, self._key))
            if whole != name and whole in self:
                return self[whole]
        raise KeyError(name)


def attach(model: str, *, namespace: str = "default", node: str | None = None) -> Attachment:
    """Map the sealed segment of `model` on this host, read-only and without a copy.

    Raises SegmentNotFound, SegmentAmbiguous, SegmentUnsealed, SegmentForeign, SegmentTruncated, SegmentTooNew,
    SegmentCorrupt or SegmentForbidden.
    """
    object_name = find_segment(model, namespace, node)
    where = f"{SHM_DIRECTORY}/{object_name}"
    fd = posix.open_existing(object_name, read_only=True)
    try:
        for attempt in range(ATTACH_ATTEMPTS_MAX):
            header = read_header(fd, object_name)
            if header.name != SegmentName(namespace, model, header.name.node if node is None else node):
                raise SegmentForeign(f"{where} is the segment of {header.name}")
            try:
                return Attachment(header, _map(fd, header, where))
            except SegmentCorrupt:  # or its owner is in the middle of extending it
                if attempt + 1 == ATTACH_ATTEMPTS_MAX:
                    raise
            time.sleep(ATTACH_RETRY_S)
    finally:
        os.close(fd)
    raise AssertionError("unreachable")


def _map(fd: int, header: Header, where: str) -> mmap.mmap:
    if header.state is not SegmentState.SEALED:
        raise SegmentUnsealed(
            f"{header.name} is not filled yet: wait until its node is ready (`hotspare status`), then attach again"
        )
    try:
        return mmap.mmap(fd, header.total_nbytes, access=mmap.ACCESS_READ)
    except ValueError as error:  # cut short since its header was read
        raise SegmentTruncated(f"{where} is shorter than its header says: `hotspare rm` it, refill") from error
    except OSError as error:
        raise SegmentError(
            f"{where} cannot be mapped ({error}): raise the limit of address space (`ulimit -v unlimited`)"
        ) from error


class Attachment(Mapping[str, "torch.Tensor"]):
    """A read-only mapping of a sealed segment: tensor name → `torch.Tensor` on the shared pages."""

    def __init__(self, header: Header, mapping: mmap.mmap) -> None:
        self.name = header.name
        self._header = header
        whole: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self._address = int(whole.ctypes.data)
        self._view: memoryview = memoryview(mapping)
        where = f"{SHM_DIRECTORY}/{self.name.object_name}"
        self.manifest: Manifest = read_manifest(self._view, header, where)
        self._rows = np.arange(len(self.manifest))
        self._copies = table_copies(self._view, header.table_offset, header.table_nbytes)
        entries, lost = read_entries(self._copies, self._rows)
        check_entries(entries, lost, self.manifest, header, where)
        is_placed = ~lost & (entries["state"] != BlockState.ABSENT)
        self._offsets = np.where(is_placed, entries["offset"].astype(np.int64), NOWHERE)
        # What a block's access is settled by, where its entry is as it was.
        self._states: npt.NDArray[Any] = self._copies[0]["state"]
        self._places: npt.NDArray[Any] = self._copies[0]["offset"]
        # torch keeps this object, and with it the mapping, for as long as a tensor lives.
        self._bytes = (ctypes.c_ubyte * header.total_nbytes).from_address(self._address)
        self._bytes.mapping = mapping  # type: ignore[attr-defined]
        self._page_locks: list[PageLock] = []
        self._pinned = np.zeros(len(self._rows), dtype=bool)
        self._closed = False

    # -- what is here ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the whole segment."""
        return self._header.total_nbytes

    @property
    def generation(self) -> int:
        """Differs between segments that had this name one after the other."""
        return self._header.generation

    @property
    def content_digest(self) -> str | None:
        """The identity of the content's bytes, as nodes tell it; None where it is not known."""
        digest = self._header.content_digest
        return digest.hex() if any(digest) else None

    def rows(self) -> Int64s:
        """Ascending manifest rows of the blocks published here."""
        _, is_here, _ = self._look(self._rows)
        return np.flatnonzero(is_here)

    def _look(self, rows: Int64s) -> tuple[Entries, Mask, Mask]:
        """Entries as they are now, which of them are of a block that is published here, and which are lost."""
        self._check_open()
        entries, lost = read_entries(self._copies, rows)
        is_shown = ~lost & (entries["state"] == BlockState.PUBLISHED)
        return entries, is_shown & (entries["offset"] == self._offsets[rows].astype(np.uint64)), lost

    def damaged(self) -> list[ExpertKey]:
        """Of which blocks nothing can be said: their entry in the block table is right in no copy. The rest is."""
        _, _, lost = self._look(self._rows)
        return [self.manifest.keys[row] for row in np.flatnonzero(lost).tolist()]

    def experts(self) -> list[ExpertKey]:
        """The experts held here, ascending."""
        keys = (self.manifest.keys[row] for row in self.rows().tolist())
        return [key for key in keys if key.is_expert]

    def holds(self, row: int) -> bool:
        """Whether the block of this manifest row is published here."""
        return self._is_as_it_was(row) or bool(self._look(np.array([row]))[1][0])

    def _is_as_it_was(self, row: int) -> bool:
        """Whether the block is published where it was: what is asked of every tensor, and so must be quick."""
        self._check_open()
        return bool(self._states[row] == BlockState.PUBLISHED and self._places[row] == self._offsets[row])

    def __iter__(self) -> Iterator[str]:
        for row in self.rows().tolist():
            yield from self.manifest.tensor_names(row)

    def __len__(self) -> int:
        return sum(len(self.manifest.schema(row).tensors) for row in self.rows().tolist())

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.holds(self.manifest.find(name)[0])
        except BlockUnavailable:
            return False

    # -- bytes and tensors -----------------------------------------------------------------------------------

    def _offset(self, row: int) -> int:
        """Where a published block begins. Raises BlockUnavailable."""
        if not self._is_as_it_was(row):
            entries, is_here, lost = self._look(np.array([row]))
            if not is_here[0]:
                raise BlockUnavailable(self._why_not(row, entries["state"][0], lost[0]))
        return int(self._offsets[row])

    def _why_not(self, row: int, state: int, is_lost: bool) -> str:
        layer, expert = self.manifest.keys[row]
        if is_lost:
            return (
                f"the table's entry for expert {expert} of layer {layer} is damaged in {self.name}: restore it "
                f"(`hotspare restore --node {self.name.node}`, or start the node again), then attach again"
            )
        if state == BlockState.PUBLISHED:
            return f"{self.name} has grown, or was mended, since it was attached to: attach again"
        return (
            f"expert {expert} of layer {layer} is not published in {self.name}: it is placed on another node, or "
            "being mended"
        )

    def block(self, row: int) -> memoryview:
        """The bytes of a block, read-only. Raises BlockUnavailable."""
        offset = self._offset(row)
        return self._view[offset : offset + int(self.manifest.nbytes[row])]

    def address(self, row: int) -> int:
        """Where a block lies in this process's memory. Raises BlockUnavailable."""
        return self._address + self._offset(row)

    def held(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """Of these manifest rows those whose block is published here. Quick also for all of a large model."""
        asked = np.fromiter(rows, np.int64)
        entries, is_here, _ = self._look(asked)
        here = asked[is_here]
        addresses = (self._offsets[here] + self._address).tolist()
        found = zip(addresses, entries["checksum"][is_here].tolist(), strict=True)
        return {row: HeldBlock(*block) for row, block in zip(here.tolist(), found, strict=True)}

    def checksum(self, row: int) -> bytes:
        """The xxh3-128 recorded for the block. Raises BlockUnavailable if that is damaged."""
        entries, _, lost = self._look(np.array([row]))
        if lost[0]:
            raise BlockUnavailable(self._why_not(row, 0, True))
        return bytes(entries["checksum"][0])

    def block_tensor(self, row: int) -> torch.Tensor:
        """The bytes of a block as a tensor, uint8 [bytes], on the shared pages. Raises BlockUnavailable."""
        return self._bytes_at(self._offset(row), int(self.manifest.nbytes[row]))

    def _bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        import torch

        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._bytes, dtype=torch.uint8, count=nbytes, offset=offset)

    def _tensor(self, block_offset: int, template: TensorTemplate) -> torch.Tensor:
        return shaped(self._bytes_at(block_offset + template.offset, template.nbytes), template)

    def __getitem__(self, name: str) -> torch.Tensor:
        row, template = self.manifest.find(name)
        return self._tensor(self._offset(row), template)

    def expert(self, layer: int, expert: int) -> ExpertTensors:
        """Checkpoint name → tensor of one logical expert; of a fused tensor, its slice. Raises BlockUnavailable."""
        row = self.manifest.index(layer, expert)
        key, offset = self.manifest.keys[row], self._offset(row)
        tensors = {
            fill_template(whole_name(t.name), key): self._tensor(offset, t) for t in self.manifest.schema(row).tensors
        }
        return ExpertTensors(tensors, expert)

    def dense(self, layer: int = DENSE) -> dict[str, torch.Tensor]:
        """The dense tensors of a layer, or those outside any layer; only where the node keeps all (`--include all`)."""
        return dict(self.expert(layer, DENSE))

    # -- verification and CUDA -------------------------------------------------------------------------------

    def verify(self) -> list[ExpertKey]:
        """Take every published block's checksum anew; the keys of those whose bytes differ, and of those `damaged`."""
        entries, is_here, lost = self._look(self._rows)
        rows, recorded = np.flatnonzero(is_here), entries["checksum"][is_here]
        threads = min(VERIFY_THREADS_MAX, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, thread_name_prefix="hotspare-verify") as pool:
            lost[rows] = list(pool.map(self._differs, rows.tolist(), recorded.tolist()))
        return [self.manifest.keys[row] for row in np.flatnonzero(lost).tolist()]

    def _differs(self, row: int, recorded: bytes) -> bool:
        """Looks twice before it says so: the owner may be mending the block, which is then hidden, or whole again."""
        for _ in range(VERIFY_LOOKS):
            try:
                taken = checksum(self.block(row))
                if taken == recorded or taken == self.checksum(row):
                    return False
            except BlockUnavailable:
                return bool(self._look(np.array([row]))[2][0])
        return self.holds(row)

    def pin(self, rows: Iterable[int] | None = None, device: str | int | None = None) -> None:
        """Page-lock published blocks for CUDA, all or those of some manifest rows; undone by `close`.

        Takes about 0.05 s a GB, and makes copies to any device run at bus speed. `device` is the one that does it, by
        default the calling thread's current one. Once is enough. Raises SegmentError without CUDA.
        """
        from shm.pinning import PageLock, joined

        asked = self._rows if rows is None else np.fromiter(rows, np.int64)
        asked = asked[~self._pinned[asked]]  # first of all: this is called before each restore
        if not len(asked):
            return
        wanted = np.intersect1d(asked, self.rows())
        if not len(wanted):
            return
        wanted = wanted[np.argsort(self._offsets[wanted])]
        pages = -(-self.manifest.nbytes[wanted] // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        spans = zip((self._offsets[wanted] + self._address).tolist(), pages.tolist(), strict=True)
        self._page_locks.append(PageLock(joined(spans), device))
        self._pinned[wanted] = True

    def is_pinned(self, rows: Iterable[int] | None = None) -> bool:
        """Whether these blocks, or all that are published here, are page-locked."""
        return bool(self._pinned[self.rows() if rows is None else np.fromiter(rows, np.int64)].all())

    def pinned_edges(self) -> npt.NDArray[np.int64]:
        """Addresses, ascending, at which page-locked pieces begin or end: CUDA refuses a copy that crosses one."""
        pieces = [piece for lock in self._page_locks for piece in lock.pieces]
        return np.unique(np.array([(address, address + nbytes) for address, nbytes in pieces], np.int64))

    def _check_open(self) -> None:
        if self._closed:
            raise BlockUnavailable(f"the attachment to {self.name} is closed: attach again")

    def close(self) -> None:
        """Undo `pin` and let the mapping go; tensors handed out stay valid. Harmless when repeated."""
        for lock in self._page_locks:
            lock.release()
        self._page_locks.clear()
        self._pinned[:] = False
        self._closed = True
        self._copies = ()
        self._states = self._places = np.zeros(0, dtype=np.uint64)
        del self._view, self._bytes
        self._view = memoryview(b"")
        self._bytes = (ctypes.c_ubyte * 0)()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Attachment {self.name}, {self.nbytes:,} bytes{', closed' if self._closed else ''}>"
