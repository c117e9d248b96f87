"""A Hugging Face checkpoint directory: its headers, and no weight byte, become a Manifest.

Which files count: those that `model.safetensors.index.json` names; without it `model.safetensors`, or the only
`*.safetensors` there. Other files are left alone, as engines do, unless they belong to the index's own series. A file's
header says what is in it: a tensor the index forgot is taken, one that the index puts elsewhere, or that two files
have, is an error. The manifest lists every one of these files, also those with dense tensors only: a checkpoint one
of whose headers changed is another checkpoint.

`config.json` may be absent. Where it is there, the number of layers and experts it tells must agree with the names.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shm.errors import ManifestError
from shm.manifest import FILES_MAX, FileSpec, Manifest, check_name
from transfer.checkpoint.families import Grouping, Include, group_tensors
from transfer.checkpoint.safetensors_header import (
    FileHeader,
    StoredTensor,
    check_with_library,
    parse_header,
    parse_json,
    read_header,
)
from transfer.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SUFFIX = ".safetensors"
JSON_NBYTES_MAX = 100_000_000  # of the index and the config; DeepSeek-V3's index has 9 MB
READ_THREADS = 8  # headers are small: what is waited for is the file system, often a remote one
CONFIG_DEPTH_MAX = 8

_EXPERT_COUNTS = (
    "n_routed_experts", "num_experts", "num_local_experts", "num_routed_experts", "moe_num_experts", "n_experts",
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers")
_SERIES = re.compile(r"(.+)-[0-9]+-of-([0-9]+)\.safetensors")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory and what it holds. File numbers are those of `manifest.files`."""

    directory: Path
    manifest: Manifest

    def path(self, file: int) -> Path:
        """Where file number `file` lies."""
        return self.directory / self.manifest.files[file].name


def read_checkpoint(directory: Path | str, model: str, include: Include = "experts") -> Checkpoint:
    """Read and check the headers of a checkpoint; `model` names it in the manifest.

    With "all" the dense tensors are kept too. Raises CheckpointError, naming file, tensor and reason, if the
    checkpoint cannot be used, and InvalidInput for a model name that cannot be.
    """
    check_name("model", model)
    directory = Path(directory)
    present = _list(directory)
    files, listed = _find_files(directory, present)
    counts = _read_config(directory / CONFIG_NAME) if CONFIG_NAME in present else _Counts()
    headers = _read_headers(directory, files)
    try:
        grouping = group_tensors(_merge(headers, listed).values(), files, include)
        _check_config(grouping, counts)
        specs = [FileSpec(header.name, header.nbytes, header.digest) for header in headers]
        manifest = Manifest.build(model, grouping.family, include, specs, grouping.blocks)
    except (CheckpointError, ManifestError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return Checkpoint(directory, manifest)


def changed_files(directory: Path | str, manifest: Manifest) -> tuple[str, ...]:
    """Files whose size or header is not what `manifest` says. Headers are read, not parsed: quick enough for a restart.

    Raises CheckpointError if a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        headers = pool.map(read_header, [Path(directory) / file.name for file in manifest.files])
        now = [FileSpec(header.path.name, header.size, header.digest) for header in headers]
    return tuple(file.name for file, seen in zip(manifest.files, now, strict=True) if file != seen)


# -- files -----------------------------------------------------------------------------------------------------


def _list(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} does not exist: give the directory that a checkpoint lies in") from None
    except NotADirectoryError:
        raise CheckpointError(f"{directory} is no directory: give the one that the checkpoint lies in") from None
    except ValueError:
        raise CheckpointError(f"{str(directory)!r} is no name of a directory: give the one of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}; mend its permissions") from error


def _find_files(directory: Path, present: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the checkpoint's files, sorted, and where the index says each tensor lies (empty without one)."""
    if INDEX_NAME in present:
        listed = _read_index(directory / INDEX_NAME)
        files = sorted(set(listed.values()))
        _check_presence(directory, files, present, listed)
        return files, listed
    found = [name for name in present if name.endswith(SUFFIX)]
    if SINGLE_NAME in found or len(found) == 1:
        return ([SINGLE_NAME] if SINGLE_NAME in found else found), {}
    if not found:
        raise CheckpointError(
            f"{directory} has no *{SUFFIX} file: give the directory of a safetensors checkpoint, or convert this one"
        )
    raise CheckpointError(
        f"{directory} has {len(found)} {SUFFIX} files ({found[0]}, …) but no {INDEX_NAME}, so nothing says which "
        "belong together: download the index too"
    )


def _read_index(path: Path) -> dict[str, str]:
    document = _read_json(path)
    listed = document.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map that names tensors: {_AGAIN}")
    for tensor, file in listed.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX) or not file.isprintable() or set(file) & set("/\\"):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to lie in {file!r}: a file of the same directory, called "
                f"….safetensors, is wanted; {_AGAIN}"
            )
    return listed


def _check_presence(directory: Path, files: Sequence[str], present: Sequence[str], listed: Mapping[str, str]) -> None:
    if len(files) > FILES_MAX:
        raise CheckpointError(f"{directory / INDEX_NAME} names {len(files):,} files, the limit is {FILES_MAX:,}")
    missing = sorted(set(files) - set(present))
    if missing:
        tensor = next(name for name, file in listed.items() if file == missing[0])
        others = f" and {len(missing) - 1} more files" if missing[1:] else ""
        raise CheckpointError(
            f"{directory} lacks {missing[0]}{others}, where its index puts tensor {tensor!r}: finish the download"
        )
    series = {match.groups() for file in files if (match := _SERIES.fullmatch(file))}
    for name in sorted(set(present) - set(files)):
        if (match := _SERIES.fullmatch(name)) and match.groups() in series:
            raise CheckpointError(
                f"{directory / name} belongs to the index's files by its name, but the index does not name it: "
                "download the index again, or remove the file"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
            raise CheckpointError(f"{path} is not a regular file: {_AGAIN}")
        if (size := path.stat().st_size) > JSON_NBYTES_MAX:
            raise CheckpointError(f"{path} has {size:,} bytes, the limit is {JSON_NBYTES_MAX:,}: {_AGAIN}")
        document = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; mend its permissions, or download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object: {_AGAIN}")
    return document


def _read_headers(directory: Path, files: Sequence[str]) -> list[FileHeader]:
    with ThreadPoolExecutor(min(READ_THREADS, len(files))) as pool:
        paths = [directory / name for name in files]
        headers = [parse_header(header, file) for file, header in enumerate(pool.map(read_header, paths))]
        list(pool.map(check_with_library, paths))  # last: its messages do not name tensors
        return headers


def _merge(headers: Sequence[FileHeader], listed: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Every tensor by name, each in one file, and where the index says."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for tensor in header.tensors:
            twin = tensors.setdefault(tensor.name, tensor)
            if twin is not tensor:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in two files, {headers[twin.file].name} and {header.name}: {_AGAIN}"
                )
    for name, file in listed.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(f"{file} has no tensor {name!r}, though the index puts it there: {_AGAIN}")
        if headers[found.file].name != file:
            raise CheckpointError(
                f"tensor {name!r} is in {headers[found.file].name}, the index puts it in {file}: {_AGAIN}"
            )
    return tensors


# -- config ----------------------------------------------------------------------------------------------------


class _Counts(NamedTuple):
    """What config.json tells, and under which names; 0 where it does not."""

    n_layers: int = 0
    n_experts: int = 0
    layers_key: str = ""
    experts_key: str = ""


def _read_config(path: Path) -> _Counts:
    """The counts of the largest stack that has experts, wherever config.json nests it."""
    return max(_counts_in(_read_json(path)), key=lambda counts: counts.n_layers, default=_Counts())


def _counts_in(config: Mapping[str, Any], depth: int = 0) -> Iterator[_Counts]:
    experts = next((key for key in _EXPERT_COUNTS if _is_count(config.get(key))), "")
    layers = next((key for key in _LAYER_COUNTS if _is_count(config.get(key))), "")
    if experts:
        yield _Counts(config[layers] if layers else 0, config[experts], layers, experts)
    for value in config.values():
        if isinstance(value, dict) and depth < CONFIG_DEPTH_MAX:
            yield from _counts_in(value, depth + 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 1  # dense relatives of a family say 0 or 1 experts


def _check_config(grouping: Grouping, counts: _Counts) -> None:
    """Layers beyond the config's are fine: they predict tokens ahead (MTP)."""
    if grouping.n_layers < counts.n_layers:
        raise CheckpointError(
            f"{CONFIG_NAME} says {counts.n_layers} layers ({counts.layers_key}), the tensors end with layer "
            f"{grouping.n_layers - 1}: finish the download"
        )
    for layer, n_experts in grouping.n_experts.items():
        if counts.n_experts and n_experts != counts.n_experts:
            raise CheckpointError(
                f"{CONFIG_NAME} says {counts.n_experts} experts ({counts.experts_key}), layer {layer} has {n_experts}: "
                f"{_AGAIN}, or put its own {CONFIG_NAME} there"
            )
