"""An expert block: the tensors of one (layer, expert), one behind the other. What a manifest is made of.

Blocks of one layer are alike: a *schema* says what tensors they have and where, with names that leave the numbers open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shm.errors import ManifestError

TENSOR_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype or vector copy asks for
NBYTES_MAX = 1 << 48

DENSE = -1
"""The `expert` of a block that holds a layer's dense tensors, and the `layer` of those outside any layer."""

SHARE = "[{expert}]"
"""What the name of one expert's share of a fused tensor ends with."""

COMMON = "[*{expert}]"
"""What the name of a tensor ends with that all experts of a layer have in common: each one's block has all of it."""

# Bits an element, by the dtype names of the safetensors format.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class ExpertKey(NamedTuple):
    """A logical expert of the checkpoint. `expert` is DENSE for the dense tensors of `layer`."""

    layer: int
    expert: int

    @property
    def is_expert(self) -> bool:
        return self.expert != DENSE


class HeldBlock(NamedTuple):
    """Where a published block lies in this process's memory, and the xxh3-128 recorded for it."""

    address: int
    checksum: bytes


class TensorSpec(NamedTuple):
    """One tensor of a block: where it lies in the block and where in the checkpoint. Units: bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: int
    file_offset: int


class TensorEntry(NamedTuple):
    """What a checkpoint reader says of one tensor; `template` has `{layer}` and `{expert}` for the key's numbers."""

    template: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    file_offset: int


@dataclass(frozen=True, slots=True)
class TensorTemplate:
    """A tensor of every block of a schema. `offset` and `nbytes` in bytes, within the block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockSchema:
    """The tensors that blocks of one kind consist of; `nbytes` spans the first byte to the last."""

    tensors: tuple[TensorTemplate, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """One row of the manifest, spelled out."""

    index: int
    key: ExpertKey
    nbytes: int
    tensors: tuple[TensorSpec, ...]


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor; raises ManifestError for an unknown dtype or a size that is not whole bytes."""
    bits_each = DTYPE_BITS.get(dtype)
    if bits_each is None:
        raise ManifestError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BITS)}")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ManifestError(f"shape {list(shape)} has a side that is not a whole number of 0 or more")
    bits = bits_each * math.prod(shape)
    if bits % 8 or bits // 8 > NBYTES_MAX:
        raise ManifestError(f"{dtype} {list(shape)} is {bits} bits: not whole bytes, or beyond {NBYTES_MAX} bytes")
    return bits // 8


def fill_template(template: str, key: ExpertKey) -> str:
    """The tensor's name in the block of `key`."""
    return template.replace("{layer}", str(key.layer)).replace("{expert}", str(key.expert))


def whole_name(template: str) -> str:
    """The name that the checkpoint has for what a block has all of, or a share of."""
    return template.removesuffix(SHARE).removesuffix(COMMON)


def schema_of(entries: Sequence[TensorEntry]) -> BlockSchema:
    """Lay tensors out one behind the other, each aligned. Raises ManifestError."""
    tensors, end = [], 0
    for entry in entries:
        offset = -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        nbytes = tensor_nbytes(entry.dtype, entry.shape)
        tensors.append(TensorTemplate(entry.template, entry.dtype, tuple(entry.shape), offset, nbytes))
        end = offset + nbytes
    return BlockSchema(tuple(tensors), end)
