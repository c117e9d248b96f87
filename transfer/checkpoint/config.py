"""What a checkpoint's configuration tells of its shape: `config.json`, or `params.json` in Mistral's own layout.

It may be absent, and says less than the tensors' names do; where it tells a number of layers or experts, the names have
to agree. Numbers of experts that differ from layer to layer are lists, or stand in a list of layers' own parts.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfer.checkpoint.families import Grouping
from transfer.checkpoint.safetensors_header import parse_json
from transfer.errors import CheckpointError

CONFIG_NAME = "config.json"
PARAMS_NAME = "params.json"
JSON_NBYTES_MAX = 100_000_000  # of the index and the config; DeepSeek-V3's index has 9 MB
DEPTH_MAX = 8

EXPERT_COUNTS = (
    "n_routed_experts", "num_experts", "num_local_experts", "num_routed_experts", "moe_num_experts", "n_experts",
    "num_experts_per_layer",
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers")
_ZERO_EXPERTS = "zero_expert_num"  # LongCat's: experts that hand on what they get
_WIDTHS = "moe_intermediate_size"  # a list where a layer has experts of several kinds
_PREDICTING = "num_nextn_predict_layers"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the configuration tells, and under which names; 0 or empty where it does not."""

    n_layers: int = 0
    n_experts: tuple[int, ...] = ()
    """One number for all layers, one a layer, or one a kind."""
    layers_key: str = ""
    experts_key: str = ""
    kinds: int = 1
    """Of experts in a layer, each as many: numbered one after the other, or at two places of the layer (ERNIE)."""
    zero_experts: int = 0
    n_predicting: int = 0
    architecture: str = ""
    source: str = CONFIG_NAME

    def check(self, grouping: Grouping) -> None:
        """Raise CheckpointError where names tell other numbers. Layers beyond ours are fine: they predict ahead."""
        if grouping.n_layers < self.n_layers:
            raise CheckpointError(
                f"{self.source} says {self.n_layers} layers ({self.layers_key}), the tensors end with layer "
                f"{grouping.n_layers - 1}: finish the download"
            )
        for layer, n_experts in grouping.n_experts.items():
            if self.n_experts and n_experts not in self._counts(layer):
                says = ", ".join(map(str, sorted(set(self.n_experts))))
                raise CheckpointError(
                    f"{self.source} says {says} experts ({self.experts_key}), layer {layer} has {n_experts}: finish "
                    f"the download if files are missing, else put the checkpoint's own {self.source} there"
                )

    def _counts(self, layer: int) -> set[int]:
        """How many experts the layer may have."""
        if len(self.n_experts) == self.n_layers and layer < self.n_layers > 1:
            return {self.n_experts[layer]}
        counts = {*self.n_experts, *(count * self.kinds for count in self.n_experts)}
        if len(self.n_experts) == self.kinds:
            counts.add(sum(self.n_experts))
        return counts | {count + self.zero_experts for count in counts}


def read_config(path: Path) -> Shape:
    """The shape of the largest stack that has experts, wherever the configuration nests it. Raises CheckpointError."""
    config = read_json(path)
    largest = max(_shapes(config, config), key=lambda shape: shape.n_layers, default=Shape())
    largest = replace(largest, source=path.name)
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else config.get("model_type")
    return replace(largest, architecture=first) if isinstance(first, str) else largest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of bounded size. Raises CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
            raise CheckpointError(f"{path} is not a regular file: put the checkpoint's own there")
        if (size := path.stat().st_size) > JSON_NBYTES_MAX:
            raise CheckpointError(
                f"{path} has {size:,} bytes, the limit is {JSON_NBYTES_MAX:,}: put the checkpoint's own there"
            )
        document = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; mend its permissions, or download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return document


def _shapes(config: Mapping[str, Any], outer: Mapping[str, Any], depth: int = 0) -> Iterator[Shape]:
    """Every part that tells numbers of experts. What it does not tell of layers, the part around it may."""
    layers, n_layers = _layers(config, outer)
    experts, n_experts = _experts(config)
    if n_experts:
        widths = config.get(_WIDTHS)
        kinds = len(widths) if isinstance(widths, list) and widths else 1
        zero, ahead = _number(config.get(_ZERO_EXPERTS)), _number(config.get(_PREDICTING))
        yield Shape(n_layers, n_experts, layers, experts, kinds, zero, ahead)
    for value in config.values():
        if depth >= DEPTH_MAX:
            return
        if isinstance(value, dict):
            yield from _shapes(value, config, depth + 1)


def _layers(config: Mapping[str, Any], outer: Mapping[str, Any]) -> tuple[str, int]:
    for part in (config, outer):
        for key in _LAYER_COUNTS:
            if _is_count(part.get(key)):
                return key, part[key]
    return "", 0


def _experts(config: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The numbers of experts in one part, and their key: one number, a list of them, or those in a list of layers."""
    for key in EXPERT_COUNTS:
        if counts := _counts(config.get(key)):
            return key, counts
    for key in EXPERT_COUNTS:
        if _is_count(config.get(key)):
            return key, (config[key],)
    for key, value in config.items():
        parts = value if isinstance(value, list) else []
        if nested := tuple(count for part in parts if isinstance(part, dict) for count in _nested(part)):
            return key, nested
    return "", ()


def _nested(part: Mapping[str, Any], depth: int = 0) -> Iterator[int]:
    for key, value in part.items():
        if key in EXPERT_COUNTS and _is_count(value):
            yield value
        elif isinstance(value, dict) and depth < DEPTH_MAX:
            yield from _nested(value, depth + 1)


def _counts(numbers: Any) -> tuple[int, ...]:
    """The numbers of a list, if it is one; dense layers' say 0 or 1."""
    are_numbers = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
    return tuple(numbers) if are_numbers and any(map(_is_count, numbers)) else ()


def _number(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 1  # dense relatives of a family say 0 or 1 experts
