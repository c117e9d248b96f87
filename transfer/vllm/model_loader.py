"""`--load-format hotspare`: vLLM's own default loader, handed the tensors of memory in place of those of files.

All else is vLLM's: which experts are this rank's, what becomes of a tensor once it is handed out, what a kernel makes
of weights, and whether some were missing. Facts of vLLM that are relied on are here, in `reload` and in `plugin`
beside it, and nowhere else. Read and tried in release 0.32.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transfer.client.bound_slots import CPU
from transfer.client.loader import Wanted
from transfer.vllm.weights import Named, Settings, weights

FILTER = "vllm.model_executor.model_loader.ep_weight_filter"
CONFIG = "vllm.config"
PLATFORMS = "vllm.platforms"
READ_AS = "auto"  # the load format by which vLLM reads what memory does not have
OF_ALL_RANKS = "input_scale"  # of an expert's tensors the only ones that a rank without it may use: their largest


class FromMemory:
    """What our loader does otherwise than vLLM's: mixed into that by `model_loader`.

    `model_loader_extra_config` may have our `OPTIONS` beside those of vLLM's default loader.
    """

    local_expert_ids: set[int] | None

    def __init__(self, load_config: Any) -> None:
        self._settings, rest = Settings.take(load_config.model_loader_extra_config)
        theirs = copy.copy(load_config)
        theirs.load_format, theirs.model_loader_extra_config = READ_AS, rest
        self._primary: str | None = None
        self._is_sliced = False
        above: Any = super()
        above.__init__(theirs)

    def download_model(self, model_config: Any) -> None:
        """Nothing ahead: what memory has needs no download, and what it lacks is downloaded as it is read."""

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Named]:
        """As vLLM's: the model's own checkpoint, and whatever others the model names, which no node of ours keeps."""
        self._primary = model_config.model
        above: Any = super()
        yield from above.get_all_weights(model_config, model)

    def _init_ep_weight_filter(self, model_config: Any) -> None:
        """vLLM's filter of other ranks' experts, which is on by default here: they need not move at all."""
        parallel = importlib.import_module(CONFIG).get_current_vllm_config().parallel_config
        self._is_sliced = parallel.tensor_parallel_size > 1 and not parallel.enable_expert_parallel
        told, parallel.enable_ep_weight_filter = parallel.enable_ep_weight_filter, True
        try:
            above: Any = super()
            above._init_ep_weight_filter(model_config)
        finally:
            parallel.enable_ep_weight_filter = told

    def _get_weights_iterator(self, source: Any) -> Iterator[Named]:
        """The tensors of one source, their names with its prefix before them."""
        above: Any = super()
        if source.model_or_path != self._primary or source.subfolder or source.allow_patterns_overrides:
            yield from above._get_weights_iterator(source)
            return
        unprefixed = source.prefix

        def otherwise() -> Iterator[Named]:
            for name, tensor in above._get_weights_iterator(source):
                yield name.removeprefix(unprefixed), tensor

        passes = self._passes(source.is_unused_weight)
        for name, tensor in weights(self._settings, directory_of(source), passes, otherwise):
            yield unprefixed + name, tensor

    def _passes(self, is_unused: Wanted | None) -> Mapping[str, Wanted | None]:
        """By device what is to be brought there: all by default, of an expert-parallel rank its own."""
        device, mine = self._device(), self.local_expert_ids
        if mine is None and is_unused is None:
            return {device: None}
        expert_of = importlib.import_module(FILTER).parse_expert_id

        def is_used(name: str) -> bool:
            return is_unused is None or not is_unused(name)

        def is_foreign(name: str) -> bool:
            return mine is not None and (expert := expert_of(name)) is not None and expert not in mine

        def is_shared(name: str) -> bool:
            return is_foreign(name) and OF_ALL_RANKS in name

        if device == CPU:  # where what is handed out does not move
            return {CPU: lambda name: is_used(name) and (not is_foreign(name) or is_shared(name))}
        ours: Wanted = lambda name: is_used(name) and not is_foreign(name)  # noqa: E731 - as the other two are
        return {device: ours, CPU: lambda name: is_used(name) and is_shared(name)}

    def _device(self) -> str:
        """Where tensors are handed out: on the rank's GPU; in host memory where a rank takes but a slice of each."""
        import torch

        if self._is_sliced or not importlib.import_module(PLATFORMS).current_platform.is_cuda():
            return CPU
        return f"cuda:{torch.cuda.current_device()}"


def model_loader(base: Any) -> Any:
    """The class of our loader, on vLLM's default one."""
    return type("HotspareModelLoader", (FromMemory, base), {})


def directory_of(source: Any) -> Path | None:
    """Where the source's files would be on this host, if a directory is there at all; none is downloaded."""
    path = Path(source.model_or_path)
    if path.is_dir():
        return path
    try:  # a name of the Hugging Face hub: what was downloaded lies in its cache
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(source.model_or_path, revision=source.revision, local_files_only=True))
    except Exception:  # whatever is wrong with it, it has no files for us
        return None
