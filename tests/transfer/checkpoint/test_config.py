"""What a configuration tells of layers and experts, wherever it tells it, is what the names have to agree with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transfer.checkpoint.config import Shape, read_config
from transfer.checkpoint.families import Grouping
from transfer.errors import CheckpointError


def read(path: Path, config: dict[str, Any]) -> Shape:
    (path / "config.json").write_text(json.dumps(config))
    return read_config(path / "config.json")


def grouping(n_experts: dict[int, int], n_layers: int = 3) -> Grouping:
    return Grouping("fused", {}, n_layers, n_experts)


@pytest.mark.parametrize(
    ("config", "counts", "layers"),
    [
        ({"num_hidden_layers": 3, "num_experts": 5}, (5,), 3),
        ({"text_config": {"num_hidden_layers": 3, "n_routed_experts": 5}}, (5,), 3),
        ({"n_layers": 3, "moe": {"num_experts": 5}}, (5,), 3),
        ({"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_layer": [5, 1, 3]}, (5, 1, 3), 3),
        ({"num_hidden_layers": 3, "moe_num_experts": [5, 4]}, (5, 4), 3),
        ({"num_hidden_layers": 3, "blocks": [{"moe": {"num_local_experts": 5}}, {"mlp": 7}]}, (5,), 3),
        ({"num_hidden_layers": 3, "num_experts": 1}, (), 0),
        ({"num_hidden_layers": 3, "num_experts": [True, "5"]}, (), 0),
        ({"architectures": 7, "model_type": None}, (), 0),
    ],
)
def test_numbers_are_found_where_a_configuration_has_them(
    tmp_path: Path, config: dict[str, Any], counts: tuple[int, ...], layers: int
) -> None:
    shape = read(tmp_path, config)
    assert (shape.n_experts, shape.n_layers) == (counts, layers)


@pytest.mark.parametrize(
    ("config", "right", "wrong"),
    [
        ({"num_experts": [5, 0, 3]}, {0: 5, 2: 3}, {0: 3, 2: 5}),
        ({"num_experts": 5}, {0: 5, 2: 5}, {0: 5, 2: 4}),
        ({"num_experts": 5, "zero_expert_num": 2}, {0: 7, 1: 5}, {0: 6}),
        ({"moe_num_experts": 4, "moe_intermediate_size": [3, 1]}, {0: 8, 1: 4}, {0: 6}),
        ({"moe_num_experts": [4, 2], "moe_intermediate_size": [3, 1]}, {0: 6, 1: 4}, {0: 5}),
    ],
)
def test_a_layer_has_as_many_experts_as_is_told_of_it(
    tmp_path: Path, config: dict[str, Any], right: dict[int, int], wrong: dict[int, int]
) -> None:
    shape = read(tmp_path, {"num_hidden_layers": 3, **config})
    shape.check(grouping(right))
    with pytest.raises(CheckpointError, match="experts"):
        shape.check(grouping(wrong))


def test_layers_beyond_those_told_are_fine_and_fewer_are_not() -> None:
    shape = Shape(3, (5,), "num_hidden_layers", "num_experts")
    shape.check(grouping({3: 5}, 4))
    with pytest.raises(CheckpointError, match=r"says 3 layers .* end with layer 1: finish the download"):
        shape.check(grouping({1: 5}, 2))


def test_the_architecture_is_told_by_either_name(tmp_path: Path) -> None:
    assert read(tmp_path, {"architectures": ["Glm4MoeForCausalLM"]}).architecture == "Glm4MoeForCausalLM"
    assert read(tmp_path, {"model_type": "glm4_moe"}).architecture == "glm4_moe"
