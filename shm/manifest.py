"""The manifest: every expert block of a model, its tensors, and where in the checkpoint they lie.

Blocks of one layer are alike, so a block is a *schema* (its tensors: name template, dtype, shape, offset)
and a row of numbers. DeepSeek-V3's 14,848 blocks of 6 tensors are one schema and two numpy tables of under
2 MB, which an attaching process maps instead of parsing.

A manifest says nothing of content: block checksums are taken when bytes leave the disk and live in the segment.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shm.block import (
    DENSE,
    NBYTES_MAX,
    Block,
    BlockSchema,
    ExpertKey,
    TensorEntry,
    TensorSpec,
    TensorTemplate,
    fill_template,
    schema_of,
)
from shm.errors import BlockUnavailable, InvalidInput, ManifestError

BLOCKS_MAX = 1 << 20
SCHEMAS_MAX = 1 << 16
TENSORS_PER_BLOCK_MAX = 1 << 16
FILES_MAX = 1 << 16
NAME_CHARS_MAX = 200  # a model, node or namespace name; Hugging Face allows 96
TENSOR_NAME_CHARS_MAX = 1024

_ROW = np.dtype([("layer", "<i4"), ("expert", "<i4"), ("schema", "<u4"), ("first_range", "<u4")])
_RANGE = np.dtype([("offset", "<u8"), ("file", "<u4"), ("reserved", "<u4")])
_PREFIX = struct.Struct("<QQQ")  # bytes of the JSON head, rows, ranges


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A checkpoint file: relative name, size in bytes, and xxh3-128 of its header (hex)."""

    name: str
    nbytes: int
    header_digest: str


def check_name(what: str, name: str) -> str:
    """Return a model, node or namespace name that is within limits, else raise InvalidInput."""
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            f"{what} name {name[:40]!r}{'…' if len(name) > 40 else ''} has {len(name)} characters: "
            f"give 1 to {NAME_CHARS_MAX} printable ones, without spaces at the ends"
        )
    return name


@dataclass(frozen=True, eq=False)
class Manifest:
    """Every block of one model. Build with `Manifest.build`; blocks are in ascending order of key."""

    model: str
    family: str
    include: str
    files: tuple[FileSpec, ...]
    schemas: tuple[BlockSchema, ...]
    rows: npt.NDArray[np.void] = field(repr=False)
    ranges: npt.NDArray[np.void] = field(repr=False)

    @classmethod
    def build(
        cls,
        model: str,
        family: str,
        include: str,
        files: Sequence[FileSpec],
        blocks: Mapping[ExpertKey, Iterable[TensorEntry]],
    ) -> Manifest:
        """Lay every block's tensors out in order of name, aligned to TENSOR_ALIGNMENT."""
        schema_ids: dict[tuple[tuple[str, str, tuple[int, ...]], ...], int] = {}
        schemas: list[BlockSchema] = []
        rows: list[tuple[int, int, int, int]] = []
        ranges: list[tuple[int, int, int]] = []
        for key in sorted(blocks):
            entries = sorted(blocks[key])
            shape_of_block = tuple((e.template, e.dtype, tuple(e.shape)) for e in entries)
            schema = schema_ids.setdefault(shape_of_block, len(schemas))
            if schema == len(schemas):
                schemas.append(schema_of(entries))
            rows.append((key.layer, key.expert, schema, len(ranges)))
            ranges.extend((e.file_offset, e.file, 0) for e in entries)
        manifest = cls(
            check_name("model", model), family, include, tuple(files), tuple(schemas),
            np.array(rows, dtype=_ROW), np.array(ranges, dtype=_RANGE),
        )  # fmt: skip
        manifest._validate()
        return manifest

    # -- reading ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The key of every block, ascending."""
        return tuple(map(ExpertKey, self.rows["layer"].tolist(), self.rows["expert"].tolist()))

    @cached_property
    def nbytes(self) -> npt.NDArray[np.int64]:
        """Bytes of every block, in order of `keys`."""
        by_schema = np.array([s.nbytes for s in self.schemas], dtype=np.int64)
        sizes: npt.NDArray[np.int64] = by_schema[self.rows["schema"]]
        return sizes

    @cached_property
    def _index(self) -> dict[tuple[int, int], int]:
        """Rows by key, which a bare pair equals: attaching is quicker without an object a block."""
        pairs = zip(self.rows["layer"].tolist(), self.rows["expert"].tolist(), strict=True)
        return dict(zip(pairs, range(len(self.rows)), strict=True))

    def index(self, layer: int, expert: int) -> int:
        """The block's row; raises BlockUnavailable if the model has no such expert."""
        i = self._index.get(ExpertKey(layer, expert))
        if i is None:
            raise BlockUnavailable(f"{self.model} has no expert {expert} in layer {layer}")
        return i

    def schema(self, index: int) -> BlockSchema:
        return self.schemas[int(self.rows["schema"][index])]

    def block(self, index: int) -> Block:
        """The block of row `index`, its tensors in order of offset."""
        key, schema = self.keys[index], self.schema(index)
        first = int(self.rows["first_range"][index])
        ranges = self.ranges[first : first + len(schema.tensors)]
        tensors = tuple(
            TensorSpec(fill_template(t.name, key), t.dtype, t.shape, t.offset, t.nbytes, file, offset)
            for t, file, offset in zip(schema.tensors, ranges["file"].tolist(), ranges["offset"].tolist(), strict=True)
        )
        return Block(index, key, schema.nbytes, tensors)

    def tensor_names(self, index: int) -> Iterator[str]:
        key = self.keys[index]
        return (fill_template(t.name, key) for t in self.schema(index).tensors)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        names = dict.fromkeys(t.name for s in self.schemas for t in s.tensors if "{layer}" in t.name)
        return tuple(
            re.compile(
                re.escape(name)
                .replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d*)", 1)
                .replace(r"\{expert\}", r"(?P<expert>0|[1-9]\d*)", 1)
            )
            for name in names
        )

    @cached_property
    def _irregular(self) -> dict[str, int]:
        """Rows by tensor name, where the name does not carry the key's layer: dense ones, appended stacks."""
        return {
            fill_template(t.name, self.keys[i]): i
            for i, schema in enumerate(self.rows["schema"].tolist())
            for t in self.schemas[schema].tensors
            if "{layer}" not in t.name
        }

    def _candidates(self, name: str) -> Iterator[tuple[int, ExpertKey]]:
        for pattern in self._patterns:
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                key = ExpertKey(int(numbers["layer"]), int(numbers.get("expert", DENSE)))
                if key in self._index:
                    yield self._index[key], key
        if name in self._irregular:
            yield self._irregular[name], self.keys[self._irregular[name]]

    def find(self, name: str) -> tuple[int, TensorTemplate]:
        """The block row and the tensor called `name`; raises BlockUnavailable if the model has no such tensor."""
        for index, key in self._candidates(name):
            for tensor in self.schema(index).tensors:
                if fill_template(tensor.name, key) == name:
                    return index, tensor
        raise BlockUnavailable(f"{self.model} has no tensor {name!r} among those kept ({self.include})")

    # -- writing and checking --------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """sha256 of `to_bytes()`, hex: what peers compare before a byte moves."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def _head(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "family": self.family,
            "include": self.include,
            "files": [[f.name, f.nbytes, f.header_digest] for f in self.files],
            "schemas": [[[t.name, t.dtype, list(t.shape)] for t in s.tensors] for s in self.schemas],
        }

    def to_bytes(self) -> bytes:
        """The canonical binary form: lengths, a JSON head, then the two tables as they lie in memory."""
        return self._front() + self.rows.tobytes() + self.ranges.tobytes()

    def _front(self) -> bytes:
        """What stands before the tables."""
        head = json.dumps(self._head(), separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-(len(head) + _PREFIX.size) % 16)
        return _PREFIX.pack(len(head), len(self.rows), len(self.ranges)) + head

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, digest: str | None = None) -> Manifest:
        """Read `to_bytes()` back without copying the tables. With `digest`, the bytes must have it.

        Raises ManifestError for anything that `build` would not have written: a digest says who wrote the bytes, and
        not that they make sense.
        """
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise ManifestError("the manifest does not match its digest")
        try:
            head_nbytes, n_rows, n_ranges = _PREFIX.unpack_from(data)
            start = _PREFIX.size + head_nbytes
            head = json.loads(bytes(data[_PREFIX.size : start]))
            rows = np.frombuffer(data, _ROW, n_rows, start)
            ranges = np.frombuffer(data, _RANGE, n_ranges, start + rows.nbytes)
        except (struct.error, ValueError, OverflowError, RecursionError) as error:
            raise ManifestError(f"not a manifest: {error}") from error
        manifest = cls._assemble(head, rows, ranges)
        manifest._validate()
        front = manifest._front()
        if data[: len(front)] != front or len(data) != len(front) + rows.nbytes + ranges.nbytes:
            raise ManifestError("not a manifest: it says the same as one, but not in the same bytes")
        return manifest

    @classmethod
    def _assemble(cls, head: Mapping[str, Any], rows: npt.NDArray[np.void], ranges: npt.NDArray[np.void]) -> Manifest:
        try:
            files = tuple(FileSpec(str(n), int(size), str(d)) for n, size, d in head["files"])
            schemas = tuple(
                schema_of([TensorEntry(str(n), str(d), tuple(shape), 0, 0) for n, d, shape in tensors])
                for tensors in head["schemas"]
            )
            model, family, include = check_name("model", str(head["model"])), str(head["family"]), str(head["include"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"not a manifest: {error!r}") from error
        return cls(model, family, include, files, schemas, rows, ranges)

    def to_json(self) -> dict[str, Any]:
        """For people and peers: the head, and per block its key, schema and [file, offset] a tensor."""
        pairs = np.stack([self.ranges["file"].astype(np.int64), self.ranges["offset"].astype(np.int64)], 1)
        flat = pairs.tolist()
        counts = [len(s.tensors) for s in self.schemas]
        blocks = [
            {"layer": layer, "expert": expert, "schema": schema, "ranges": flat[first : first + counts[schema]]}
            for layer, expert, schema, first in self.rows.tolist()
        ]
        schemas = [
            {
                "nbytes": s.nbytes,
                "tensors": [
                    {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset, "nbytes": t.nbytes}
                    for t in s.tensors
                ],
            }
            for s in self.schemas
        ]
        files = [{"name": f.name, "nbytes": f.nbytes, "header_digest": f.header_digest} for f in self.files]
        return {
            "model": self.model, "family": self.family, "include": self.include, "digest": self.digest,
            "files": files, "schemas": schemas, "blocks": blocks,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """Read `to_json()` back; raises ManifestError if it is malformed or its digest is not its own."""
        try:
            head = {
                "model": document["model"],
                "family": document["family"],
                "include": document["include"],
                "files": [[f["name"], f["nbytes"], f["header_digest"]] for f in document["files"]],
                "schemas": [[[t["name"], t["dtype"], t["shape"]] for t in s["tensors"]] for s in document["schemas"]],
            }
            rows: list[tuple[int, int, int, int]] = []
            ranges: list[tuple[int, int, int]] = []
            for block in document["blocks"]:
                rows.append((block["layer"], block["expert"], block["schema"], len(ranges)))
                ranges.extend((offset, file, 0) for file, offset in block["ranges"])
            manifest = cls._assemble(head, np.array(rows, dtype=_ROW), np.array(ranges, dtype=_RANGE))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"not a manifest: {error!r}") from error
        manifest._validate()
        if manifest.digest != document.get("digest"):
            raise ManifestError("the manifest does not match its digest")
        return manifest

    def _validate(self) -> None:
        for what, count, most in (
            ("blocks", len(self.rows), BLOCKS_MAX),
            ("schemas", len(self.schemas), SCHEMAS_MAX),
            ("files", len(self.files), FILES_MAX),
        ):
            if not 0 < count <= most:
                raise ManifestError(f"{count} {what}: a manifest has 1 to {most}")
        for file in self.files:
            if not 0 <= file.nbytes <= NBYTES_MAX:
                raise ManifestError(f"file {file.name!r} of {file.nbytes} bytes: it has 0 to {NBYTES_MAX}")
        for schema in self.schemas:
            self._validate_schema(schema)
        self._validate_rows()

    @staticmethod
    def _validate_schema(schema: BlockSchema) -> None:
        names = [t.name for t in schema.tensors]
        if not 0 < len(names) <= TENSORS_PER_BLOCK_MAX:
            raise ManifestError(f"a block of {len(names)} tensors: it has 1 to {TENSORS_PER_BLOCK_MAX}")
        if names != sorted(set(names)):
            raise ManifestError("a block's tensors are not in ascending order of name, each once")
        too_long = max(names, key=len)
        if len(too_long) > TENSOR_NAME_CHARS_MAX:
            raise ManifestError(f"tensor name {too_long[:60]!r}… is longer than {TENSOR_NAME_CHARS_MAX} characters")

    def _validate_rows(self) -> None:
        layer, expert = self.rows["layer"].astype(np.int64), self.rows["expert"].astype(np.int64)
        order = (layer << 32) + expert
        if (np.diff(order) <= 0).any() or layer.min() < DENSE or expert.min() < DENSE:
            raise ManifestError("blocks are not in ascending order of (layer, expert), each once")
        schema = self.rows["schema"].astype(np.int64)
        if int(schema.max()) >= len(self.schemas):
            raise ManifestError("a block names a schema that is not there")
        counts = np.array([len(s.tensors) for s in self.schemas])
        firsts = np.cumsum(counts[schema]) - counts[schema]
        if (firsts != self.rows["first_range"]).any() or counts[schema].sum() != len(self.ranges):
            raise ManifestError("blocks and file ranges do not add up")
        if self.ranges["reserved"].any():
            raise ManifestError("reserved bytes of a file range are not zero")
        if int(self.ranges["file"].max()) >= len(self.files):
            raise ManifestError("a tensor lies in a file that is not there")
        sizes = np.array([t.nbytes for s in self.schemas for t in s.tensors], dtype=np.int64)
        # Of each range, its tensor's place among those of all schemas.
        tensor = np.repeat((np.cumsum(counts) - counts)[schema] - firsts, counts[schema])
        tensor += np.arange(len(tensor))
        last = np.array([f.nbytes for f in self.files], dtype=np.int64)[self.ranges["file"]]
        last -= sizes[tensor]
        offsets = self.ranges["offset"].astype(np.int64)  # one of 2^63 and more is negative then
        if int(offsets.min()) < 0 or (offsets > last).any():
            raise ManifestError("a tensor reaches past the end of its file")
