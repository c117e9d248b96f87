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
from transfer.checkpoint.hub import hub_directory
from transfer.errors import RestoreError

EXPERT_LOCATION = "sglang.srt.eplb.expert_location"
RUNTIME_CONTEXT = "sglang.srt.runtime_context"  # from 0.5.18 on
STORAGE_RANK = "_expert_storage_rank"  # of a module: which share of the physical experts it has, 0.5.23
NO_WEIGHT_CACHE = "off"  # of --weight-cache-mode, 0.5.23

NameFilter = Callable[[str], bool]
"""Whether a tensor of this checkpoint name is wanted."""


class Engine(Protocol):
    """What is asked of SGLang's process."""

    @property
    def ep_rank(self) -> int:
        """Which share of the physical experts lies here, as of now: ranks join and leave."""
        ...

    @property
    def ep_size(self) -> int:
        """Among how many ranks the physical experts are divided, as of now."""
        ...

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

    @property
    def can_reload(self) -> bool:
        """Whether `reload` reaches anything."""
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
        self._launched = int(moe_ep_rank), int(moe_ep_size)

    @property
    def ep_rank(self) -> int:
        """Whose slots these are. A rank that joined later has one that its own launch does not know: its modules do."""
        ranks = {int(getattr(module, STORAGE_RANK, self._launched[0])) for module in self.modules()}
        return ranks.pop() if len(ranks) == 1 else self._launched[0]

    @property
    def ep_size(self) -> int:
        return int(getattr(self._placement(), "ep_size", self._launched[1]))

    @property
    def logical_count(self) -> int:
        return int(self._placement().num_logical_experts)

    @property
    def physical_count(self) -> int:
        return int(self._placement().num_physical_experts)

    @property
    def has_shared_weights(self) -> bool:
        return shares_weights(self._server_args if self._server_args is not None else model_settings())

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
        return hub_directory(str(path), getattr(self._model_config, "revision", None))

    @property
    def can_reload(self) -> bool:
        return self._runner is not None

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


def model_settings() -> Any:
    """What SGLang was told of its model. None in releases before 0.5.18, which tell it nowhere."""
    with suppress(ImportError):
        return importlib.import_module(RUNTIME_CONTEXT).get_model()
    return None


def shares_weights(settings: Any) -> bool:
    """Whether the weight cache is on, in such settings or in server arguments. Releases without one have none."""
    return getattr(settings, "weight_cache_mode", NO_WEIGHT_CACHE) not in (NO_WEIGHT_CACHE, None)


def _owner_of(get_model: Callable[[], Any] | None) -> Any:
    """The model runner that `get_model` closes over: from 0.5.18 on SGLang names it nowhere else. None if unknown."""
    if not inspect.isfunction(get_model):
        return None
    return inspect.getclosurevars(get_model).nonlocals.get("self")
