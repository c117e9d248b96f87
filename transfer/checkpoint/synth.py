"""Checkpoints with a real model's tensor names, dtypes and file layout, and seeded random content.

The bytes are streamed: memory stays at a few MiB whatever the size. Every tensor has its own random stream, so content
depends on model, tensor name and seed, not on how tensors spread over files. Floats are finite and below 2 in
magnitude, so that tensors equal themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from shm.block import tensor_nbytes
from shm.errors import InvalidInput
from shm.manifest import BLOCKS_MAX
from transfer.checkpoint.config import CONFIG_NAME
from transfer.checkpoint.families import EXPERTS_MAX, LAYERS_MAX
from transfer.checkpoint.files import INDEX_NAME, SINGLE_NAME
from transfer.checkpoint.recipes import FAMILIES, Recipe, Tensor
from transfer.checkpoint.safetensors_header import LENGTH_NBYTES
from transfer.errors import CheckpointError

__all__ = ["FAMILIES", "FILE_NBYTES", "SynthFile", "SynthPlan", "plan_checkpoint", "write_checkpoint"]

FILE_NBYTES = 256 << 20  # a file's tensors; the real ones have 4 to 10 GB
CHUNK_WORDS = 1 << 17  # 1 MiB at a time
SEED_MAX = (1 << 63) - 1
SPARE_NBYTES = 64 << 20  # left free on the disk

# Within a file the safetensors library writes wide dtypes first, in its own order, then by name.
_DTYPE_ORDER = ("F32", "I32", "BF16", "F8_E4M3", "U8")
_MASKS: dict[str, int] = {  # 64 bits, by dtype: the top exponent bit of every float is cleared
    "F8_E4M3": 0xBFBFBFBFBFBFBFBF,
    "BF16": 0xBFFFBFFFBFFFBFFF,
    "F32": 0xBFFFFFFFBFFFFFFF,
}


@dataclass(frozen=True, slots=True)
class SynthFile:
    """A file to write: its tensors in order, and its length and header as bytes. `nbytes` is the whole file."""

    name: str
    tensors: tuple[Tensor, ...]
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class SynthPlan:
    """What `write_checkpoint` would write. `index` is None for a single file."""

    like: str
    files: tuple[SynthFile, ...]
    config: dict[str, Any]
    index: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without config and index."""
        return sum(file.nbytes for file in self.files)


def plan_checkpoint(
    like: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    scale: float = 1.0,
    file_nbytes: int = FILE_NBYTES,
) -> SynthPlan:
    """Lay a checkpoint out; nothing is written. The arguments are `write_checkpoint`'s."""
    recipe = _recipe(like, layers, experts, scale)
    if file_nbytes < 1:
        raise InvalidInput(f"files of {file_nbytes} bytes: give 1 or more")
    shards = list(_shards(recipe, file_nbytes))
    if len(shards) == 1:
        return SynthPlan(like, (_file(SINGLE_NAME, shards[0]),), recipe.config(), None)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = tuple(_file(name, shard) for name, shard in zip(names, shards, strict=True))
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard)
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return SynthPlan(like, files, recipe.config(), index)


def write_checkpoint(
    directory: Path | str,
    like: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
    file_nbytes: int = FILE_NBYTES,
) -> SynthPlan:
    """Write a checkpoint like the model `like`, one of FAMILIES, into an empty or new directory.

    `layers` is the total number of decoder layers: the model's first dense ones count, and are cut first when so few
    are asked for that none would have experts. `scale`, up to 1, shrinks every side of the matrices (and the vocabulary
    and number of attention heads) to multiples of 32. `file_nbytes` is the most a file's tensors take together, if
    they are more than one. The index is written last: a directory without one, but with several files, is unfinished.

    Raises InvalidInput for arguments out of range and CheckpointError if the disk lacks the space.
    """
    directory = Path(directory)
    if not 0 <= seed <= SEED_MAX:
        raise InvalidInput(f"seed {seed}: give 0 to {SEED_MAX}")
    plan = plan_checkpoint(like, layers=layers, experts=experts, scale=scale, file_nbytes=file_nbytes)
    _check_directory(directory)
    _check_space(directory, plan.nbytes)
    was_there = directory.exists()
    _make(directory)
    try:
        _write_all(directory, plan, seed)
    except BaseException as error:  # an interrupt too leaves nothing that looks like a checkpoint
        _remove(directory, plan, was_there)
        if isinstance(error, OSError):
            raise CheckpointError(f"{directory} cannot be written: {error}; choose another directory") from error
        raise
    return plan


# -- layout ----------------------------------------------------------------------------------------------------


def _recipe(like: str, layers: int | None, experts: int | None, scale: float) -> Recipe:
    if like not in FAMILIES:
        raise InvalidInput(f"no model called {like!r}: choose one of {', '.join(FAMILIES)}")
    for what, number, most in (("layers", layers, LAYERS_MAX), ("experts", experts, EXPERTS_MAX)):
        if number is not None and not 1 <= number <= most:
            raise InvalidInput(f"{number} {what}: give 1 to {most}")
    if not 0 < scale <= 1:
        raise InvalidInput(f"scale {scale}: give more than 0 and at most 1")
    recipe = FAMILIES[like].sized(layers, experts, scale)
    if recipe.layers * recipe.experts > BLOCKS_MAX:
        raise InvalidInput(f"{recipe.layers} layers of {recipe.experts} experts: at most {BLOCKS_MAX} experts in all")
    if not any(map(recipe.has_experts, range(recipe.layers))):
        raise InvalidInput(f"{like} has experts in every layer number {recipe.moe_every} only: give that many layers")
    return recipe


def _nbytes(tensor: Tensor) -> int:
    return tensor_nbytes(tensor.dtype, tensor.shape)


def _shards(recipe: Recipe, file_nbytes: int) -> Iterator[list[Tensor]]:
    """Tensors in order, a new file when the next one does not fit: as the transformers library does it."""
    shard: list[Tensor] = []
    used = 0
    for tensor in recipe.tensors():
        nbytes = _nbytes(tensor)
        if shard and used + nbytes > file_nbytes:
            yield shard
            shard, used = [], 0
        shard.append(tensor)
        used += nbytes
    yield shard


def _file(name: str, shard: list[Tensor]) -> SynthFile:
    tensors = tuple(sorted(shard, key=lambda tensor: (_DTYPE_ORDER.index(tensor.dtype), tensor.name)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _nbytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return SynthFile(name, tensors, len(text).to_bytes(LENGTH_NBYTES, "little") + text, LENGTH_NBYTES + len(text) + end)


# -- writing ---------------------------------------------------------------------------------------------------


def _check_directory(directory: Path) -> None:
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InvalidInput(f"{directory} is there and not an empty directory: choose another, or empty it")
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{str(directory)!r} cannot be used ({error}): choose another directory") from error


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be made ({error}): choose another directory") from error


def _check_space(directory: Path, nbytes: int) -> None:
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes + SPARE_NBYTES:
        raise CheckpointError(
            f"{there} has {free:,} bytes free, the checkpoint takes {nbytes:,} and {SPARE_NBYTES:,} are kept free: "
            "ask for fewer layers or experts, a smaller scale, or another disk"
        )


def _partial(directory: Path, name: str) -> Path:
    return directory / f".{name}.part"


def _write_all(directory: Path, plan: SynthPlan, seed: int) -> None:
    """Every file under a temporary name, then each under its own, the index last."""
    for file in plan.files:
        with _partial(directory, file.name).open("wb") as stream:
            stream.write(file.header)
            for tensor in file.tensors:
                _write_tensor(stream, tensor, plan.like, seed)
    documents = {CONFIG_NAME: plan.config, INDEX_NAME: plan.index}
    for name, document in documents.items():
        if document is not None:
            _partial(directory, name).write_text(json.dumps(document, indent=2) + "\n")
    for name in _names(plan):
        _partial(directory, name).rename(directory / name)


def _names(plan: SynthPlan) -> list[str]:
    return [*(file.name for file in plan.files), CONFIG_NAME, *([INDEX_NAME] if plan.index is not None else [])]


def _remove(directory: Path, plan: SynthPlan, was_there: bool) -> None:
    for name in reversed(_names(plan)):
        (directory / name).unlink(missing_ok=True)
        _partial(directory, name).unlink(missing_ok=True)
    if not was_there and directory.is_dir():
        directory.rmdir()


def _write_tensor(stream: BinaryIO, tensor: Tensor, like: str, seed: int) -> None:
    if tensor.content is not None:
        stream.write(tensor.content)
        return
    source = np.random.SFC64([seed, xxhash.xxh3_64_intdigest(f"{like}/{tensor.name}".encode())])
    left = _nbytes(tensor)
    mask = np.uint64(_MASKS[tensor.dtype]) if tensor.dtype in _MASKS else None
    is_first = True
    while left:
        words: npt.NDArray[np.uint64] = source.random_raw(min(CHUNK_WORDS, -(-left // 8)))
        if mask is not None:
            words &= mask
        if is_first:
            words[0] |= np.uint64(1)  # a tensor of one element is not zero either
            is_first = False
        part = words.data.cast("B")[:left]
        stream.write(part)
        left -= len(part)
