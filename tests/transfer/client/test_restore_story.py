"""Real models, real nodes: noise over the experts, a restore, and the same logits to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from transfer import Restorer
from transfer.slots import Slots

pytestmark = pytest.mark.usefixtures("kept_engines")
WORDS = torch.arange(1, 12)[None]
FAMILIES = {"qwen3_moe": 15, "mixtral": 15, "deepseek_v3": 12}  # experts, over all layers


class Engine:
    """A model with plain parameters, as a rank holds it; `logits` is what clients would see."""

    def __init__(self, directory: Path) -> None:
        self.model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        self.model.set_experts_implementation("eager")  # the grouped kernels ask for sides that are multiples of 8
        self.slots = Slots.stacked(dict(self.model.named_parameters()))
        self.before = self.logits()

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(WORDS).logits

    def break_experts(self) -> None:
        with torch.no_grad():
            for tensor in self.slots.tensors:
                tensor.tensor.normal_()
        assert not torch.equal(self.logits(), self.before)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_come_back_to_the_bit_from_each_source(
    family: str, tiny_checkpoint: Callable[..., Path], cluster: Callable[..., Any]
) -> None:
    directory = tiny_checkpoint(family)
    nodes = cluster(family, directory)
    engine = Engine(directory)
    experts = FAMILIES[family]
    with Restorer(nodes.urls[0]) as restorer:
        restorer.bind(engine.slots)

        engine.break_experts()
        report = restorer.restore()
        assert report.ok
        assert report.experts_done == experts
        assert report.bytes_by_source["local"] > 0
        assert report.bytes_by_source["peer"] > 0, "with three nodes and two replicas, some experts are elsewhere"
        assert torch.equal(engine.logits(), engine.before)
        local = report.bytes_by_source["local"]

        nodes.kill(0)  # attaching needs no daemon, and the peers were told of before
        engine.break_experts()
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source["local"] == local
        assert torch.equal(engine.logits(), engine.before)

        Path(nodes.segment(0)).unlink()
        engine.break_experts()
        report = restorer.restore()
        assert report.ok, report
        assert report.bytes_by_source == {"local": 0, "peer": report.bytes_total, "disk": 0}
        assert torch.equal(engine.logits(), engine.before)
