"""What a backup client needs of an engine's process, and SGLang's. Imports nothing of SGLang until it is asked.

Facts of SGLang that are relied on are here and in `kernels` beside it, and nowhere else. Read in releases 0.5.12 to
0.5.23, and tried against the last of them by `make sglang`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from shm.errors import InvalidInput
from transfer.errors import RestoreError

EXPERT_LOCATION = "sglang.srt.eplb.expert_location"
RUNTIME_CONTEXT = "sglang.srt.runtime_context"  # from 0.5.18 on
NO_WEIGHT_CACHE = "off"  # of --weight-cache-mode, 0.5.23

NameFilter = Callable[[str], bool]
"""Whether a tensor of this checkpoint name is wanted."""


class Engine(Protocol):
    """What is asked of SGLang's process."""

    @property
    def ep_rank(self) -> int: ...
    @property
    def ep_size(self) -> int: ...
    @property
    def logical_count(self) -> int:
        """Logical experts of a layer."""
        ...

    @property
    def physical_count(self) -> int:
        """Physical experts of a layer, over all ranks."""
        ...

    @property
    def has_shared_weights(self) -> bool:
        """Whether its parameters lie in memory of another process, which others read too: they are not ours to fill."""
        ...

    def parameters(self) -> Mapping[str, Any]:
        """The model's parameters by name; others than experts' are passed over."""
        ...

    def modules(self) -> Iterable[Any]:
        """The fused expert modules."""
        ...

    def physical_of(self, layer: int, expert: int) -> Sequence[int]:
        """Every physical copy of a logical expert, as placed now."""
        ...

    def checkpoint(self) -> Path | None:
        """The directory of the model's files on this host, if there is one."""
        ...

    def reload(self, name_filter: NameFilter) -> None:
        """Have the engine load the checkpoint tensors that the filter wants itself. Raises for what goes wrong."""
        ...


class SGLangEngine:
    """A scheduler process of SGLang, found through what it constructs its own backup client with.

    That is `(server_args, model_runner)` up to 0.5.15; by keyword a `model_config`, a `get_model` and the rank and size
    in 0.5.18 and 0.5.20; and only the first two of these in 0.5.22 and 0.5.23, where the process knows its rank.
    """

    def __init__(
        self,
        server_args: Any = None,
        model_runner: Any = None,
        *,
        model_config: Any = None,
        get_model: Callable[[], Any] | None = None,
        moe_ep_size: int | None = None,
        moe_ep_rank: int | None = None,
    ) -> None:
        """Raises InvalidInput for other arguments than those."""
        self._runner = runner = model_runner if model_runner is not None else _owner_of(get_model)
        self._server_args = server_args
        self._model_config = model_config if model_config is not None else getattr(runner, "model_config", None)
        if get_model is None and runner is None:
            raise InvalidInput("SGLang gave neither a model_runner nor a get_model: this revision is not known")
        self._get_model: Callable[[], Any] = get_model if get_model is not None else lambda: runner.model
        if moe_ep_size is None or moe_ep_rank is None:
            state = runner if model_runner is not None else importlib.import_module(RUNTIME_CONTEXT).get_parallel()
            moe_ep_size, moe_ep_rank = state.moe_ep_size, state.moe_ep_rank
        self.ep_rank, self.ep_size = int(moe_ep_rank), int(moe_ep_size)

    @property
    def logical_count(self) -> int:
        return int(self._placement().num_logical_experts)

    @property
    def physical_count(self) -> int:
        return int(self._placement().num_physical_experts)

    @property
    def has_shared_weights(self) -> bool:
        source = self._server_args
        if source is None:
            with suppress(ImportError):  # releases without it have no weight cache either
                source = importlib.import_module(RUNTIME_CONTEXT).get_model()
        return getattr(source, "weight_cache_mode", NO_WEIGHT_CACHE) not in (NO_WEIGHT_CACHE, None)

    def parameters(self) -> Mapping[str, Any]:
        return dict(self._get_model().named_parameters())

    def modules(self) -> Iterable[Any]:
        return [m for m in self._get_model().modules() if getattr(m, "w13_weight", None) is not None]

    def physical_of(self, layer: int, expert: int) -> Sequence[int]:
        return [int(p) for p in self._placement().logical_to_all_physical(layer, expert)]

    def checkpoint(self) -> Path | None:
        path = getattr(self._model_config, "model_path", None)
        if not isinstance(path, str | Path):
            return None
        if Path(path).is_dir():
            return Path(path)
        try:  # a name of the Hugging Face hub: what was downloaded lies in its cache
            hub = importlib.import_module("huggingface_hub")
            revision = getattr(self._model_config, "revision", None)
            return Path(hub.snapshot_download(str(path), revision=revision, local_files_only=True))
        except Exception:  # whatever is wrong with it, it has no files for us
            return None

    def reload(self, name_filter: NameFilter) -> None:
        updater = getattr(self._runner, "weight_updater", self._runner)
        if updater is None:
            raise RestoreError("SGLang's model runner was not found, so it cannot be asked to reload")
        source = self._server_args
        if source is None:
            source = importlib.import_module(RUNTIME_CONTEXT).get_model()
        answer = updater.update_weights_from_disk(source.model_path, source.load_format, weight_name_filter=name_filter)
        if isinstance(answer, tuple) and not answer[0]:
            raise RestoreError(str(answer[1]))

    @staticmethod
    def _placement() -> Any:
        metadata = importlib.import_module(EXPERT_LOCATION).get_global_expert_location_metadata()
        if metadata is None:
            raise InvalidInput("SGLang has no expert placement yet: the client is asked again later")
        return metadata


def _owner_of(get_model: Callable[[], Any] | None) -> Any:
    """The model runner that `get_model` closes over: from 0.5.18 on SGLang names it nowhere else. None if unknown."""
    if not inspect.isfunction(get_model):
        return None
    return inspect.getclosurevars(get_model).nonlocals.get("self")
