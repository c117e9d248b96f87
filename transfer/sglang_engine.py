"""What a backup client needs of an engine's process, and SGLang 0.5.23's. Imports nothing of SGLang until it is asked.

Facts of SGLang that are relied on are here and in `transfer.slot_kernels`, and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from shm.errors import InvalidInput
from transfer.slot_layouts import SlotMismatch

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
EXPERT_LOCATION = "sglang.srt.eplb.expert_location"

NameFilter = Callable[[str], bool]
"""Whether a tensor of this checkpoint name is wanted."""


class Engine(Protocol):
    """What is asked of SGLang's process."""

    @property
    def ep_rank(self) -> int: ...
    @property
    def ep_size(self) -> int: ...
    @property
    def physical_count(self) -> int:
        """Physical experts of a layer, over all ranks."""
        ...

    def parameters(self) -> Mapping[str, Any]:
        """The model's parameters by name; others than experts' are passed over."""
        ...

    def modules(self) -> Iterable[Any]:
        """The fused expert modules, whose kernels say whether their weights are plain."""
        ...

    def is_rocm(self) -> bool: ...

    def physical_of(self, layer: int, expert: int) -> Sequence[int]:
        """Every physical copy of a logical expert, as placed now."""
        ...

    def logical_count(self) -> int: ...

    def reload(self, name_filter: NameFilter) -> None:
        """Load the checkpoint tensors that the filter wants from disk. Raises for what goes wrong."""
        ...


class SGLangEngine:
    """An SGLang 0.5.23 `ModelRunner` and its server arguments."""

    def __init__(self, server_args: Any, model_runner: Any) -> None:
        self._server_args = server_args
        self._runner = model_runner
        state = model_runner if hasattr(model_runner, "moe_ep_rank") else model_runner.ps
        self.ep_rank: int = int(state.moe_ep_rank)
        self.ep_size: int = int(state.moe_ep_size)

    @property
    def physical_count(self) -> int:
        return self.logical_count() + int(self._server_args.ep_num_redundant_experts or 0)

    def parameters(self) -> Mapping[str, Any]:
        return dict(self._runner.model.named_parameters())

    def modules(self) -> Iterable[Any]:
        return [m for m in self._runner.model.modules() if getattr(m, "w13_weight", None) is not None]

    def is_rocm(self) -> bool:
        import torch

        return torch.version.hip is not None

    def physical_of(self, layer: int, expert: int) -> Sequence[int]:
        metadata = importlib.import_module(EXPERT_LOCATION).get_global_expert_location_metadata()
        if metadata is None:
            raise InvalidInput("SGLang has no expert placement yet: the client is asked again later")
        return [int(p) for p in metadata.logical_to_all_physical(layer, expert)]

    def logical_count(self) -> int:
        config = self._runner.model_config.hf_config
        for holder in (config, getattr(config, "text_config", None)):
            for name in EXPERT_COUNTS:
                if isinstance(count := getattr(holder, name, None), int):
                    return count
        raise SlotMismatch(f"the model's configuration has none of {', '.join(EXPERT_COUNTS)}: reload from disk")

    def reload(self, name_filter: NameFilter) -> None:
        updater = getattr(self._runner, "weight_updater", self._runner)
        answer = updater.update_weights_from_disk(
            self._server_args.model_path, self._server_args.load_format, weight_name_filter=name_filter
        )
        if isinstance(answer, tuple) and not answer[0]:
            raise RuntimeError(str(answer[1]))
