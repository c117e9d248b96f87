"""What SGLang loads, from memory: every load of a checkpoint goes through one iterator, and this takes its place.

That is a start, a rank that rejoins, `update_weights_from_disk`, and the experts that a rebalance found on no rank.
SGLang puts the tensors into its parameters itself and processes them after that, so every quantisation and every kernel
is served. Where the files that it was told to load are not what the nodes keep, where it has a loader of its own for
them, or where nothing can be had from memory, its own iterator does the work, as it does without a plugin: a start does
not fail for a node's sake.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shm.manifest import Manifest
from transfer.checkpoint.config import EXPERT_COUNTS
from transfer.checkpoint.hub import hub_directory
from transfer.client.bound_slots import CPU
from transfer.client.loader import EVERYTHING, WINDOW_NBYTES, Loader, Named
from transfer.errors import RestoreError, told
from transfer.sglang.engine import NameFilter, model_settings, shares_weights
from transfer.sglang.share import of_rank

Original = Callable[..., Iterator[Named]]

FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor")
"""Of SGLang's `--load-format`, those that read all *.safetensors files of a directory."""
FILES = "*.safetensors"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
RELOAD_WINDOW_NBYTES = 128 << 20  # beside an engine that serves, which has taken the GPU's memory
RELOAD_DEADLINE_S = 120.0
"""For experts that were lost. The other ranks wait for them in a collective, which SGLang gives 300 s by default."""
MODEL = "_hotspare_model"  # the attribute of SGLang's loader that tells us what it loads into

_log = logging.getLogger("hotspare.sglang")


@dataclass(frozen=True, slots=True)
class Reload:
    """A load into a model that has been serving."""

    model: Any
    wanted: NameFilter | None
    deadline_s: float | None
    """On the monotonic clock."""


_reload: ContextVar[Reload | None] = ContextVar("hotspare_reload", default=None)


# -- hooks: what SGLang's registry calls with the original and its arguments ------------------------------------------


def remember_model(original: Original, loader: Any, model_config: Any, model: Any) -> Iterator[Named]:
    """Around `DefaultModelLoader._get_all_weights`."""
    setattr(loader, MODEL, weakref.ref(model))
    return original(loader, model_config, model)


def reload_from_memory(original: Callable[..., Any], updater: Any, *arguments: Any, **keywords: Any) -> Any:
    """Around `WeightUpdater.update_weights_from_disk`: only what is wanted is read, and experts within a deadline."""
    wanted = keywords.get("weight_name_filter", arguments[2] if len(arguments) > 2 else None)
    deadline_s = None if wanted is None else time.monotonic() + RELOAD_DEADLINE_S
    token = _reload.set(Reload(_model_of(updater), wanted, deadline_s))
    try:
        return original(updater, *arguments, **keywords)
    finally:
        _reload.reset(token)


def load_from_memory(original: Original, loader: Any, source: Any, **options: Any) -> Iterator[Named]:
    """Around `DefaultModelLoader._get_weights_iterator`: the same tensors under the same names, in another order."""
    reload = _reload.get()
    model = reload.model if reload is not None else _remembered(loader)
    tensors = _from_memory(loader, source, model, reload, lambda: original(loader, source, **options))
    if tensors is None:
        tensors = original(loader, source, **options)
    elif (draft := getattr(loader.load_config, "draft_model_idx", None)) is not None:
        tensors = loader._filter_mtp_weights(tensors, source.prefix, draft)
    elif source.prefix:
        tensors = ((source.prefix + name, tensor) for name, tensor in tensors)
    return tensors if reload is None or reload.deadline_s is None else _until(reload.deadline_s, tensors)


def _remembered(loader: Any) -> Any:
    found = getattr(loader, MODEL, None)
    return None if found is None else found()


def _model_of(updater: Any) -> Any:
    """The model of a weight updater, or of the model runner that was one in earlier releases."""
    return updater.get_model() if hasattr(updater, "get_model") else getattr(updater, "model", None)


def _until(deadline_s: float, tensors: Iterator[Named]) -> Iterator[Named]:
    for count, named in enumerate(tensors):
        if time.monotonic() > deadline_s:
            raise RestoreError(
                f"lost experts were not loaded within {RELOAD_DEADLINE_S:.0f} s, only {count} of their tensors: this "
                "rank gives up, so that the others need not wait for it. Look at the nodes, or at the disk"
            )
        yield named


# -- whether memory has what SGLang was told to load -------------------------------------------------------------------


def _from_memory(
    loader: Any, source: Any, model: Any, reload: Reload | None, original: Callable[[], Iterator[Named]]
) -> Iterator[Named] | None:
    """The tensors, from memory where they are there; None to leave all to SGLang. Never raises."""
    try:
        directory = _directory(loader, source)
        if directory is None:
            return None
        ours = Loader(
            os.environ["HOTSPARE_URL"],
            checkpoint=directory,
            transport=os.environ.get("HOTSPARE_TRANSPORT") or "tcp",
        )
        manifest = ours.find()
        reason = "; ".join(ours.report.notes) if manifest is None else None
        if manifest is not None and not any(directory.glob(FILES)):
            reason = _why_not(manifest, source.model_config, reload)
        if reason is not None:
            ours.close()
            _log.warning("loaded from disk: %s", reason)
            return None
    except Exception as error:  # whatever is wrong here, a start goes on
        _log.warning("loaded from disk: %s", told(error))
        return None
    filters = [of_rank(model), *([reload.wanted] if reload is not None and reload.wanted is not None else [])]
    return _handed_out(ours, filters, _devices(model), reload is not None, original)


def _directory(loader: Any, source: Any) -> Path | None:
    """The directory whose files the iterator would read, if we know what it would make of them."""
    settings = model_settings()
    if shares_weights(settings) or getattr(settings, "model_checksum", None) is not None:
        return None  # the cache's daemon has its own way, and files that are to be proved are to be read
    load_format = loader.load_config.load_format
    is_known = getattr(load_format, "value", load_format) in FORMATS
    if not is_known or source.model_config is None or getattr(source, "allow_patterns_overrides", None) is not None:
        return None  # an adapter has no configuration of its own
    directory = Path(source.model_or_path)
    is_local = directory.is_dir()
    if not is_local:
        found = hub_directory(source.model_or_path, source.revision)
        if found is None:
            return None
        directory = found
    if any(directory.glob(FILES)):
        return directory
    is_bare = not any(any(directory.glob(pattern)) for pattern in OTHER_WEIGHTS)
    return directory if is_local and is_bare else None  # of the hub's, what is not there is yet to be downloaded


def _why_not(manifest: Manifest, model_config: Any, reload: Reload | None) -> str | None:
    """Why a model is not to be loaded from memory alone. Files would prove which it is; a bare directory cannot."""
    config = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    wanted = {count for name in EXPERT_COUNTS if isinstance(count := getattr(config, name, None), int)}
    experts = max((key.expert + 1 for key in manifest.keys), default=0)
    if wanted and experts not in wanted:
        return f"the nodes keep a model of {experts} experts a layer, and this one has {max(wanted)}"
    if manifest.include != EVERYTHING and (reload is None or reload.wanted is None):
        return "the nodes keep its experts alone: start them with --include all, or put the files back"
    return None


# -- handing out ------------------------------------------------------------------------------------------------------


def _devices(model: Any) -> tuple[str, ...]:
    """Where to bring tensors to, best first: to the GPU at the bus's speed, else through the processor's memory."""
    parameter = None if model is None else next(iter(model.parameters()), None)
    return (CPU,) if parameter is None or parameter.device.type != "cuda" else (str(parameter.device), CPU)


def _handed_out(
    loader: Loader,
    filters: Sequence[NameFilter],
    devices: Sequence[str],
    is_serving: bool,
    original: Callable[[], Iterator[Named]],
) -> Iterator[Named]:
    """Each tensor once, from memory; what cannot be had so is left to SGLang's own iterator."""
    handed: set[str] = set()

    def is_left(name: str) -> bool:
        return name not in handed and all(wanted(name) for wanted in filters)

    window_nbytes = RELOAD_WINDOW_NBYTES if is_serving else WINDOW_NBYTES
    failed: Exception | None = None
    with loader:
        for device in devices:
            try:
                for name, tensor in loader.tensors(is_left, device=device, window_nbytes=window_nbytes):
                    handed.add(name)
                    # Some models change what they are given in place, and on the segment's pages that would end them.
                    yield name, tensor.clone() if device == CPU else tensor
                return
            except Exception as error:  # no room on the GPU, a node or a file that is gone, a fault of ours
                failed = error
                _log.warning("after %d tensors loading from memory failed: %s", len(handed), told(error))
    try:
        tensors = original()
    except Exception as error:
        raise error from failed
    yield from ((name, tensor) for name, tensor in tensors if name not in handed)
