"""A Hugging Face checkpoint directory: its headers, and no weight byte, become a Manifest.

`files` says which files count. Each file's header says what is in it: a tensor the index forgot is taken, one that two
files have is an error. An index that names a tensor which is not there, or elsewhere, is an error where it is an
expert's; else it is noted, since engines take of an index no more than the files' names. The manifest lists every one
of these files, also those with dense tensors only: a checkpoint one of whose headers changed is another checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shm.errors import ManifestError
from shm.manifest import FileSpec, Manifest, check_name
from transfer.checkpoint.config import CONFIG_NAME, PARAMS_NAME, Shape, read_config
from transfer.checkpoint.families import Include, group_tensors
from transfer.checkpoint.files import Chosen, choose_files
from transfer.checkpoint.names import split_name
from transfer.checkpoint.safetensors_header import (
    FileHeader,
    StoredTensor,
    check_with_library,
    parse_header,
    read_header,
)
from transfer.errors import CheckpointError

READ_THREADS = 8  # headers are small: what is waited for is the file system, often a remote one
NOTED_NAMES = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory and what it holds. File numbers are those of `manifest.files`."""

    directory: Path
    manifest: Manifest
    shape: Shape = field(default_factory=Shape)
    """What its configuration tells."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files that are no part of it, and why."""
    notes: tuple[str, ...] = ()
    """What else is out of the ordinary."""

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
    shape = _shape(directory, present, CONFIG_NAME)
    chosen = choose_files(directory, present, shape)
    if chosen.is_consolidated and PARAMS_NAME in present:
        shape = _shape(directory, present, PARAMS_NAME)
    headers = _read_headers(directory, chosen.files)
    try:
        tensors, notes = _merge(headers, chosen)
        grouping = group_tensors(tensors.values(), chosen.files, include, shape.zero_experts)
        shape.check(grouping)
        specs = [FileSpec(header.name, header.nbytes, header.digest) for header in headers]
        manifest = Manifest.build(model, grouping.family, include, specs, grouping.blocks)
    except (CheckpointError, ManifestError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return Checkpoint(directory, manifest, shape, chosen.left_out, (*notes, *grouping.notes))


def changed_files(directory: Path | str, manifest: Manifest) -> tuple[str, ...]:
    """Files whose size or header is not what `manifest` says. Headers are read, not parsed: quick enough for a restart.

    Raises CheckpointError if a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        headers = pool.map(read_header, [Path(directory) / file.name for file in manifest.files])
        now = [FileSpec(header.path.name, header.size, header.digest) for header in headers]
    return tuple(file.name for file, seen in zip(manifest.files, now, strict=True) if file != seen)


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


def _shape(directory: Path, present: Sequence[str], name: str) -> Shape:
    return read_config(directory / name) if name in present else Shape()


def _read_headers(directory: Path, files: Sequence[str]) -> list[FileHeader]:
    with ThreadPoolExecutor(min(READ_THREADS, len(files))) as pool:
        paths = [directory / name for name in files]
        headers = [parse_header(header, file) for file, header in enumerate(pool.map(read_header, paths))]
        list(pool.map(check_with_library, paths))  # last: its messages do not name tensors
        return headers


def _merge(headers: Sequence[FileHeader], chosen: Chosen) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor by name, each in one file; and what the index has wrong of them."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for tensor in header.tensors:
            twin = tensors.setdefault(tensor.name, tensor)
            if twin is not tensor:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in two files, {headers[twin.file].name} and {header.name}, and nothing "
                    "says which counts: remove what is not the model's; files cut for several ranks must be merged"
                )
    absent, elsewhere = [], []
    for name, file in chosen.listed.items():
        found = tensors.get(name)
        if found is None:
            _refuse_experts(name, f"{file} has no tensor {name!r}, though {chosen.index} puts it there")
            absent.append(name)
        elif headers[found.file].name != file:
            _refuse_experts(name, f"tensor {name!r} is in {headers[found.file].name}, {chosen.index} puts it in {file}")
            elsewhere.append(name)
    notes = [
        f"{chosen.index} names {len(names)} tensors that {what}: {', '.join(names[:NOTED_NAMES])}"
        f"{', …' if names[NOTED_NAMES:] else ''}"
        for names, what in ((absent, "are not there"), (elsewhere, "are in another file"))
        if names
    ]
    return tensors, notes


def _refuse_experts(name: str, what: str) -> None:
    if split_name(name) is not None:
        raise CheckpointError(f"{what}: index and files are not of one download; download both again")
