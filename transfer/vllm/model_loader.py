"""`--load-format hotspare`: vLLM's own default loader, handed the tensors of memory in place of those of files.

All else is vLLM's: what becomes of a tensor once it is handed out, what a kernel makes of weights, and whether some
were missing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfer.checkpoint.hub import hub_directory
from transfer.client.bound_slots import CPU
from transfer.client.loader import Named, Wanted
from transfer.slots.layouts import expert_of
from transfer.vllm.experts import expert_modules, is_balanced, is_of_all_ranks, part_of, slots_of
from transfer.vllm.weights import Pass, Settings, weights

PLATFORMS = "vllm.platforms"
CONTENT = "hotspare_content"  # on the model: the digest of what was loaded, None where that is not known
READ_AS = "auto"  # the load format by which vLLM reads what memory does not have


class FromMemory:
    """What our loader does otherwise than vLLM's: mixed into that by `model_loader`.

    `model_loader_extra_config` may have our `OPTIONS` beside those of vLLM's default loader.
    """

    def __init__(self, load_config: Any) -> None:
        self._settings, rest = Settings.take(load_config.model_loader_extra_config)
        theirs = copy.copy(load_config)
        theirs.load_format, theirs.model_loader_extra_config = READ_AS, rest
        above: Any = super()
        above.__init__(theirs)
        self._primary: str | None = None
        self._model: Any = None
        self._device = CPU
        self._mine: frozenset[int] | None = None
        """The experts that this rank has one of in some layer; None where it may take any."""

    def download_model(self, model_config: Any) -> None:
        """Nothing ahead: what memory has needs no download, and what it lacks is downloaded as it is read."""

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Named]:
        """As vLLM's: the model's own checkpoint, and whatever others the model names, which no node of ours keeps."""
        self._primary, self._model = model_config.model, model
        modules = list(expert_modules(model).values())
        self._device = device_for(any(part_of(module)[1] > 1 for module in modules))
        is_fixed = bool(modules) and not any(map(is_balanced, modules))
        self._mine = frozenset().union(*map(slots_of, modules)) if is_fixed else None
        above: Any = super()
        yield from above.get_all_weights(model_config, model)

    def _get_weights_iterator(self, source: Any) -> Iterator[Named]:
        """The tensors of one source, their names with its prefix before them."""
        above: Any = super()
        if source.model_or_path != self._primary or source.subfolder or source.allow_patterns_overrides:
            yield from above._get_weights_iterator(source)
            return
        prefix = source.prefix

        def otherwise() -> Iterator[Named]:
            for name, tensor in above._get_weights_iterator(source):
                yield name.removeprefix(prefix), tensor

        directory = directory_of(source.model_or_path, source.revision)
        passes = passes_for(self._mine, getattr(source, "is_unused_weight", None), self._device)  # 0.32 has it
        for name, tensor in weights(self._settings, directory, passes, otherwise, self._tell_content):
            yield prefix + name, tensor

    def _tell_content(self, digest: str | None) -> None:
        setattr(self._model, CONTENT, digest)


def passes_for(mine: frozenset[int] | None, is_unused: Wanted | None, device: str) -> list[Pass]:
    """What is to be brought, and where: of a rank's tensors all, but for experts that only others have.

    vLLM has a filter of its own (`--enable-ep-weight-filter`), which reads the placement off its options. Here the
    modules say what was placed. Of other ranks' experts it keeps every scale, ours those that can be used: each of
    them has its block come along, so they are looked up in host memory, where that costs no copy.
    """

    def is_foreign(name: str) -> bool:
        return mine is not None and (key := expert_of(name)) is not None and key[1] not in mine

    def is_wanted(name: str) -> bool:
        return not (is_foreign(name) or (is_unused is not None and is_unused(name)))

    def is_shared(name: str) -> bool:
        return is_foreign(name) and is_of_all_ranks(name)

    if mine is None and is_unused is None:
        return [Pass(device)]
    if device == CPU:
        return [Pass(CPU, lambda name: is_wanted(name) or is_shared(name))]
    return [Pass(device, is_wanted), Pass(CPU, is_shared)]


def device_for(has_slices: bool) -> str:
    """Where tensors are handed out: on the rank's GPU; in host memory where a rank takes but a slice of each."""
    import torch

    if has_slices or not importlib.import_module(PLATFORMS).current_platform.is_cuda():
        return CPU
    return f"cuda:{torch.cuda.current_device()}"


def model_loader(base: Any) -> Any:
    """The class of our loader, on vLLM's default one."""
    return type("HotspareModelLoader", (FromMemory, base), {"__module__": __name__})


def directory_of(model: str, revision: str | None) -> Path | None:
    """Where the files of a model would be on this host, if a directory is there at all; none is downloaded."""
    path = Path(model)
    return path if path.is_dir() else hub_directory(model, revision)
