"""Which files of a directory are the checkpoint, and why the others are left out.

With an index, those that it names: `model.safetensors.index.json`, else `consolidated.safetensors.index.json`, which
Mistral's own layout has, else the only one there. Beside it `mtp.safetensors`, where SGLang reads it too: GLM-4's
checkpoints may have their predicting layers in it, and an index that forgot them. A file of the index's own series that
it does not name means that the index is another's, unless the file is empty.

Without an index, `model.safetensors`, else the series `model-…-of-…`, and other files as far as their tensors are new.
If there is neither, all files, whose tensors must differ. `consolidated…` counts only where nothing else is there: it
is the same model once more. Each series has to be whole. Adapters are none of the model's tensors.

What is left out is told, with the reason: nobody should look for a layer in memory that nobody read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shm.manifest import FILES_MAX
from transfer.checkpoint.config import Shape, read_json
from transfer.checkpoint.safetensors_header import parse_header, read_header
from transfer.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model.safetensors.index.json"
CONSOLIDATED = "consolidated"
CONSOLIDATED_INDEX_NAME = f"{CONSOLIDATED}{INDEX_SUFFIX}"
MAIN = "model"
SINGLE_NAME = f"{MAIN}{SUFFIX}"
ADAPTER = "adapter_"
MTP_NAME = "mtp.safetensors"
MTP_ARCHITECTURES = "Glm4Moe"  # what their names begin with; `maybe_add_mtp_safetensors` in SGLang 0.5.23
SHOWN = 4  # names in a message

_SERIES = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_FORMATS = (".gguf", ".distcp", ".npz", ".msgpack", ".h5")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of a checkpoint, sorted; where its index says each tensor lies; and files left out, with the reason."""

    files: tuple[str, ...]
    index: str = ""
    listed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_consolidated(self) -> bool:
        """Whether it is Mistral's own layout, which brings its own configuration."""
        return all(name.startswith(CONSOLIDATED) for name in self.files)


def choose_files(directory: Path, present: Sequence[str], shape: Shape) -> Chosen:
    """Say which of the names `present` in `directory` are the checkpoint. Raises CheckpointError."""
    found = [name for name in present if name.endswith(SUFFIX)]
    index = _index_name(directory, present)
    if not found and index is None:
        raise CheckpointError(_no_file(directory, present))
    return _without_index(directory, found) if index is None else _with_index(directory, index, found, shape)


def _no_file(directory: Path, present: Sequence[str]) -> str:
    for suffixes, what in (
        (_PICKLES, "pickles, which are never read, since they can run code"),
        (_OTHER_FORMATS, "another format"),
    ):
        others = [name for name in present if name.endswith(suffixes)]
        if others:
            seen = ", ".join(others[:SHOWN]) + (", …" if others[SHOWN:] else "")
            return f"{directory} has no *{SUFFIX} file, only {seen}: {what}; convert the checkpoint to safetensors"
    return f"{directory} has no *{SUFFIX} file: give the directory of a safetensors checkpoint, or convert this one"


# -- with an index ---------------------------------------------------------------------------------------------


def _index_name(directory: Path, present: Sequence[str]) -> str | None:
    indexes = [name for name in present if name.endswith(INDEX_SUFFIX)]
    for name in (INDEX_NAME, CONSOLIDATED_INDEX_NAME):
        if name in indexes:
            is_other_layout = name == CONSOLIDATED_INDEX_NAME and any(map(_is_main, present))
            return None if is_other_layout else name
    if len(indexes) > 1:
        raise CheckpointError(
            f"{directory} has {len(indexes)} indexes ({', '.join(indexes[:SHOWN])}), none called {INDEX_NAME}: leave "
            "the one that counts, under that name"
        )
    return indexes[0] if indexes else None


def _with_index(directory: Path, index: str, found: Sequence[str], shape: Shape) -> Chosen:
    listed = _read_index(directory / index)
    files = set(listed.values())
    if len(files) > FILES_MAX:
        raise CheckpointError(f"{directory / index} names {len(files):,} files, the limit is {FILES_MAX:,}")
    _check_presence(directory, files, found, listed)
    series = {(match[1], match[3]) for file in files if (match := _SERIES.fullmatch(file))}
    left_out = {}
    for name in sorted(set(found) - files):
        match = _SERIES.fullmatch(name)
        if name == MTP_NAME and shape.architecture.startswith(MTP_ARCHITECTURES) and shape.n_predicting:
            files.add(name)
        elif match and (match[1], match[3]) in series and _names_in(directory / name):
            raise CheckpointError(
                f"{directory / name} belongs to the index's files by its name, but the index does not name it: "
                "download the index again, or remove the file"
            )
        else:
            left_out[name] = f"{index} does not name it"
    return Chosen(tuple(sorted(files)), index, listed, left_out)


def _read_index(path: Path) -> dict[str, str]:
    document = read_json(path)
    listed = document.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map that names tensors: download it again")
    for tensor, file in listed.items():
        if not isinstance(file, str) or not file.endswith(SUFFIX) or not file.isprintable() or set(file) & set("/\\"):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to lie in {file!r}: a file of the same directory, called "
                "….safetensors, is wanted; put the index of these files there"
            )
    return listed


def _check_presence(directory: Path, files: set[str], found: Sequence[str], listed: Mapping[str, str]) -> None:
    missing = sorted(files - set(found))
    if missing:
        tensor = next(name for name, file in listed.items() if file == missing[0])
        others = f" and {len(missing) - 1} more files" if missing[1:] else ""
        raise CheckpointError(
            f"{directory} lacks {missing[0]}{others}, where its index puts tensor {tensor!r}: finish the download"
        )


# -- without one -----------------------------------------------------------------------------------------------


def _without_index(directory: Path, found: Sequence[str]) -> Chosen:
    left_out = {name: "an adapter is no part of the model" for name in found if name.startswith(ADAPTER)}
    runs = _runs([name for name in found if name not in left_out] or found)
    main = [files for files in runs if files == [SINGLE_NAME]] or [files for files in runs if _is_main(files[0])]
    consolidated = [files for files in runs if files[0].startswith(CONSOLIDATED)]
    others = [files for files in runs if files not in main and files not in consolidated]
    if main or others:
        left_out |= {name: "the model once more, in Mistral's layout" for files in consolidated for name in files}
    first = main or others or consolidated
    chosen = [name for files in first for name in files]
    for files in first:
        _check_whole(directory, files)
    if main and others:
        seen = {tensor for name in chosen for tensor in _names_in(directory / name)}
        for files in others:
            if (why := _why_not(directory, files, seen)) is not None:
                left_out |= dict.fromkeys(files, why)
            else:
                chosen += files
    if len(chosen) > FILES_MAX:
        raise CheckpointError(f"{directory} has {len(chosen):,} files, the limit is {FILES_MAX:,}")
    return Chosen(tuple(sorted(chosen)), left_out=left_out)


def _runs(names: Sequence[str]) -> list[list[str]]:
    """Files that belong together: each series, and every other file alone."""
    runs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        match = _SERIES.fullmatch(name)
        runs[(match[1], match[3]) if match else (name, "")].append(name)
    return list(runs.values())


def _is_main(name: str) -> bool:
    match = _SERIES.fullmatch(name)
    return (match[1] if match else name.removesuffix(SUFFIX)) == MAIN and name.endswith(SUFFIX)


def _check_whole(directory: Path, files: Sequence[str]) -> None:
    """A series counts from 0 or 1, and has as many files as it says."""
    matches = [match for name in files if (match := _SERIES.fullmatch(name))]
    if not matches:
        return
    numbers, count = {int(match[2]) for match in matches}, int(matches[0][3])
    begin = min(1, min(numbers))
    if missing := sorted(set(range(begin, begin + min(count, FILES_MAX))) - numbers):
        stem, width = matches[0][1], len(matches[0][2])
        raise CheckpointError(
            f"{directory} lacks {stem}-{missing[0]:0{width}}-of-{matches[0][3]}{SUFFIX}"
            f"{f' and {len(missing) - 1} more files' if missing[1:] else ''}, and has no index: finish the download"
        )


def _why_not(directory: Path, files: Sequence[str], seen: set[str]) -> str | None:
    """Why these are not read beside those of the main series, whose tensors are `seen`; None, and seen, if they are."""
    try:
        _check_whole(directory, files)
        names = {tensor for name in files for tensor in _names_in(directory / name)}
    except CheckpointError as error:
        return f"it is not whole, and nothing says that it is wanted ({error})"
    if twins := seen & names:
        return f"{min(twins)!r} is in the {MAIN}'s own files too"
    seen |= names
    return None


def _names_in(path: Path) -> set[str]:
    return {tensor.name for tensor in parse_header(read_header(path), 0).tensors}
