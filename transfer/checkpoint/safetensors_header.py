"""The header of one safetensors file, read and checked. No weight byte is read.

    0            length of the header, u64 little-endian
    8            the header: JSON, padded with spaces
    8 + length   the tensors' bytes, without holes or overlaps, up to the end of the file

The library opens the file too, so that nothing passes here that an engine would refuse; what is checked before that
gets a message that names the tensor.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import safetensors
import xxhash

from shm.block import NBYTES_MAX, tensor_nbytes
from shm.errors import ManifestError
from shm.manifest import TENSOR_NAME_CHARS_MAX
from transfer.errors import CheckpointError

LENGTH_NBYTES = 8
HEADER_NBYTES_MAX = 100_000_000  # the safetensors library's own limit
RANK_MAX = 32
NAME_FORBIDDEN = frozenset("{}[]")  # they mark numbers and shares in a manifest's names

_AGAIN = "download the file again, or convert the checkpoint anew"


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: `file` is the file's number, `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class FileHeader(NamedTuple):
    """One file: its name, size in bytes, xxh3-128 of length and header (hex), and tensors in order of offset."""

    name: str
    nbytes: int
    digest: str
    tensors: tuple[StoredTensor, ...]


class RawHeader(NamedTuple):
    """A file's length and header as they lie in it, and the file's size in bytes."""

    path: Path
    raw: bytes
    size: int

    @property
    def digest(self) -> str:
        """xxh3-128 of length and header, hex."""
        return xxhash.xxh3_128_hexdigest(self.raw)


def read_header(path: Path) -> RawHeader:
    """Read the header of `path`; raises CheckpointError. Waits for the file system only, so threads help."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
            raise CheckpointError(f"{path} is not a regular file: {_AGAIN}")
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = _read_raw(path, stream, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {_AGAIN}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return RawHeader(path, raw, size)


def parse_header(header: RawHeader, file: int) -> FileHeader:
    """Check what `read_header` read; the file gets the number `file` in its checkpoint.

    Raises CheckpointError, naming file, tensor and reason, for anything that is not a whole safetensors file.
    """
    path, raw, size = header
    tensors = _parse(path, raw, file, size)
    _check_cover(path, tensors, len(raw), size)
    return FileHeader(path.name, size, header.digest, tensors)


def parse_json(text: bytes, what: str) -> Any:
    """JSON whose objects have each key once; raises CheckpointError. `what` names the text in messages."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{what} has {double!r} twice: {_AGAIN}")
        return members

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}): {_AGAIN}") from error


def _read_raw(path: Path, stream: BinaryIO | Any, size: int) -> bytes:
    """The length and the header, as they lie in the file."""
    prefix = stream.read(LENGTH_NBYTES)
    if len(prefix) < LENGTH_NBYTES:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors header: {_AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_NBYTES_MAX:
        raise CheckpointError(
            f"{path} says its header has {length:,} bytes, the limit is {HEADER_NBYTES_MAX:,}: "
            f"not a safetensors file, or a damaged one; {_AGAIN}"
        )
    if length > size - LENGTH_NBYTES:
        raise CheckpointError(f"{path}: its header of {length:,} bytes is longer than the file ({size:,}): {_AGAIN}")
    raw = bytearray(prefix)
    while len(raw) < LENGTH_NBYTES + length:
        part = stream.read(LENGTH_NBYTES + length - len(raw))
        if not part:
            raise CheckpointError(f"{path} became shorter while it was read: wait for its download to end")
        raw += part
    return bytes(raw)


def _parse(path: Path, raw: bytes, file: int, size: int) -> tuple[StoredTensor, ...]:
    header = parse_json(raw[LENGTH_NBYTES:], f"the header of {path}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object: {_AGAIN}")
    header.pop("__metadata__", None)  # the library checks that it maps text to text
    tensors = [_parse_tensor(path, name, entry, file, len(raw), size) for name, entry in header.items()]
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)))


def _parse_tensor(path: Path, name: str, entry: Any, file: int, data_start: int, size: int) -> StoredTensor:
    if not _is_name(name):
        raise CheckpointError(
            f"{path}: tensor {name[:200]!r}: a tensor's name has 1 to {TENSOR_NAME_CHARS_MAX} printable characters, "
            f"none of {''.join(sorted(NAME_FORBIDDEN))}, and something between dots: rename it in the checkpoint"
        )
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets: {_AGAIN}") from None
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {name!r}: dtype, shape or data_offsets are not text and whole numbers: {_AGAIN}"
        )
    begin, end = offsets
    try:
        expected = tensor_nbytes(dtype, shape)
    except ManifestError as error:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {error}; upgrade Hotspare if the dtype is new, else {_AGAIN}"
        ) from None
    if not 0 <= end - begin == expected or end > size - data_start:
        _refuse_range(f"{path}: tensor {name!r}", entry, expected, size - data_start)
    return StoredTensor(name, dtype, tuple(shape), file, data_start + begin, expected)


def _is_name(name: str) -> bool:
    if not name.isprintable() or not 0 < len(name) <= TENSOR_NAME_CHARS_MAX:
        return False
    return NAME_FORBIDDEN.isdisjoint(name) and ".." not in f".{name}."


def _refuse_range(where: str, entry: dict[str, Any], expected: int, data_nbytes: int) -> NoReturn:
    begin, end = entry["data_offsets"]
    if begin > end:
        raise CheckpointError(f"{where} ends at {end}, before it begins at {begin}: {_AGAIN}")
    if end > data_nbytes:
        raise CheckpointError(f"{where} ends at {end:,}, the file's data has {data_nbytes:,} bytes: {_AGAIN}")
    raise CheckpointError(
        f"{where}: {entry['dtype']} {entry['shape']} takes {expected:,} bytes, its range has {end - begin:,}: {_AGAIN}"
    )


def _are_sizes(numbers: Any) -> bool:
    if not isinstance(numbers, list) or len(numbers) > RANK_MAX:
        return False
    return all(type(n) is int and 0 <= n <= NBYTES_MAX for n in numbers)  # `type`: True is no number here


def _check_cover(path: Path, tensors: Sequence[StoredTensor], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlap" if tensor.offset < end else "leave a hole"
            raise CheckpointError(f"{path}: {before} and tensor {tensor.name!r} {what} at byte {end:,}: {_AGAIN}")
        end, before = tensor.offset + tensor.nbytes, f"tensor {tensor.name!r}"
    if end != size:
        raise CheckpointError(f"{path}: {size - end:,} bytes after {before} belong to no tensor: {_AGAIN}")


def check_with_library(path: Path) -> None:
    """Have the safetensors library open the file, which maps it and reads its header; raises CheckpointError."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is refused by the safetensors library ({error}): {_AGAIN}") from error
