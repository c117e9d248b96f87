"""docs/format.md is enough: a reader written from it alone, with nothing of ours, finds every byte."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import xxhash

from shm.segment import Segment

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
DTYPE_NBYTES = {"BF16": 2}


def header_offsets() -> dict[str, int]:
    """Where the document says that the named numbers of the header are."""
    rows = re.findall(r"^\| (\d+) \| 8 \| `([a-z_]+)` \|$", PAGE.read_text(), re.MULTILINE)
    return {name: int(at) for at, name in rows}


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    word = (word ^ word >> 27) * 0x94D049BB133111EB % (1 << 64)
    return word ^ word >> 31


def check(row: int, entry: bytes) -> int:
    taken = mix(row + 1)
    for word in struct.unpack("<4Q", entry):
        taken = mix(taken ^ word)
    return taken


def second(at: int, nbytes: int) -> int:
    return -(-(at + nbytes) // 4096) * 4096


def read(data: bytes) -> dict[str, bytes]:
    """Every tensor of a sealed segment by name."""
    assert data[:8] == b"HOTSPARE"
    assert struct.unpack_from("<III", data, 8) == (2, 4096, 2)
    assert struct.unpack_from("<Q", data, 4088)[0] == xxhash.xxh3_64_intdigest(data[:4088])
    assert data[4096:8192] == data[:4096]
    number = {name: struct.unpack_from("<Q", data, at)[0] for name, at in header_offsets().items()}
    manifest = data[number["manifest_offset"] : number["manifest_offset"] + number["manifest_nbytes"]]
    assert hashlib.sha256(manifest).digest() == data[112:144]
    copy = second(number["manifest_offset"], number["manifest_nbytes"])
    assert data[copy : copy + len(manifest)] == manifest
    table, nbytes = number["table_offset"], number["table_nbytes"]
    copy = second(table, nbytes)
    assert data[copy : copy + nbytes] == data[table : table + nbytes]
    head_nbytes, rows, _ = struct.unpack_from("<QQQ", manifest)
    schemas = json.loads(manifest[24 : 24 + head_nbytes])["schemas"]
    tensors = {}
    for row in range(rows):
        layer, expert, schema, _ = struct.unpack_from("<iiII", manifest, 24 + head_nbytes + 16 * row)
        entry = table + 48 * row
        at, block_nbytes = struct.unpack_from("<QQ", data, entry)
        assert struct.unpack_from("<Q", data, entry + 40)[0] == check(row, data[entry : entry + 32])
        if struct.unpack_from("<I", data, entry + 32)[0] != 0x0F0F0F0F:
            continue
        assert xxhash.xxh3_128_digest(data[at : at + block_nbytes]) == data[entry + 16 : entry + 32]
        end = at
        for name, dtype, (height, width) in schemas[schema]:
            start = at + -(-(end - at) // 64) * 64
            end = start + DTYPE_NBYTES[dtype] * height * width
            tensors[name.replace("{layer}", str(layer)).replace("{expert}", str(expert))] = data[start:end]
        assert end == at + block_nbytes
    return tensors


def test_a_reader_that_knows_only_the_document_finds_every_byte(
    sealed: Callable[..., Segment], content: Callable[..., bytes]
) -> None:
    segment = sealed(rows=[0, 3, 4, 8])
    segment.quarantine(4)
    tensors = read(Path("/dev/shm", segment.name.object_name).read_bytes())
    assert len(tensors) == 3 * 3
    for row in (0, 3, 8):
        block, key = segment.manifest.block(row), segment.manifest.keys[row]
        whole = content(row, block.nbytes)
        for tensor in block.tensors:
            assert f"layers.{key.layer}." in tensor.name
            assert tensors[tensor.name] == whole[tensor.offset : tensor.offset + tensor.nbytes]


def test_the_document_names_every_number_of_the_header() -> None:
    parts = [("manifest", "offset"), ("manifest", "nbytes"), ("table", "offset"), ("table", "nbytes")]
    parts += [("data", "offset"), ("data", "nbytes"), ("total", "nbytes")]
    assert list(header_offsets()) == ["_".join(part) for part in parts]
