"""A rank of an engine: fused slots in its own memory, registered with its node. It does as it is told, and looks.

    python -m tests.soak.rank CHECKPOINT URL

Answers a line on stdin with a line on stdout. Slots are told as a string, one character each, in order of layer and
place: "1" holds its expert to the bit.
"""

# ruff: noqa: T201 - what it prints is its answer
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.processes import Child
from tests.soak.ground import MODEL
from transfer import Restorer
from transfer.checkpoint import read_checkpoint
from transfer.engine import MooncakeEngine
from transfer.push.table import consumer_document
from transfer.slots import Slots

NAME = "rank-0"
TTL_S = 60.0
REDUNDANT = 3  # experts of each layer that have a second slot
PARTS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
HALVES = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
ANSWER_WITHIN_S = 180.0  # it may be paused, and wait for nodes that are


class Rank:
    """The process's side."""

    def __init__(self, checkpoint: Path, url: str) -> None:
        self._manifest = read_checkpoint(checkpoint, MODEL).manifest
        self._layers = sorted({key.layer for key in self._manifest.keys})
        experts = sorted({key.expert for key in self._manifest.keys})
        placement = [*experts, *experts[:REDUNDANT]]
        self.slots = [(layer, expert) for layer in self._layers for expert in placement]
        self._right = _right(checkpoint, self._layers, placement)
        held = {name: tensor.clone() for name, tensor in self._right.items()}
        self._slots = Slots.fused(held, physical_to_logical=dict.fromkeys(self._layers, placement))
        self._bytes = {name: _rows(tensor) for name, tensor in held.items()}
        self._restorer = Restorer(url)
        self._restorer.bind(self._slots)
        self._inbox: MooncakeEngine | None = None

    def wipe(self) -> str:
        """Fill the slots with noise."""
        for held in self._bytes.values():
            held.random_(0, 256)
        return "wiped"

    def check(self) -> str:
        is_right = []
        for layer in self._layers:
            names = [_parameter(layer, part) for part in PARTS]
            differs = [(self._bytes[name] != _rows(self._right[name])).any(dim=1) for name in names]
            is_right += ["0" if wrong else "1" for wrong in torch.stack(differs).any(dim=0).tolist()]
        return "".join(is_right)

    def pattern(self, value: str) -> str:
        """Use the memory for something else: the same byte all over."""
        for held in self._bytes.values():
            held.fill_(int(value))
        return "filled"

    def intact(self, value: str) -> str:
        """How many bytes are not of that pattern, and in which slots."""
        slots, count = [], 0
        for name, held in self._bytes.items():
            wrong = (held != int(value)).sum(dim=1)
            count += int(wrong.sum())
            slots += [f"{name}[{slot}]" for slot in torch.nonzero(wrong).flatten().tolist()]
        return f"{count} {' '.join(slots[:3])}"

    def restore(self) -> str:
        """By its own doing; the experts that it did not get."""
        report = self._restorer.restore()
        return json.dumps([[failed.layer, failed.expert] for failed in report.failed])

    def register(self) -> str:
        self._restorer.register(NAME, ttl_s=TTL_S)
        return "registered"

    def unregister(self) -> str:
        self._restorer.unregister()
        return "unregistered"

    def document(self) -> str:
        """What it sends to register by hand, with an engine that it never ends."""
        if self._inbox is None:
            self._inbox = MooncakeEngine("127.0.0.1")
            self._inbox.register([(each.address, each.nbytes) for each in self._slots.ranges])
        return json.dumps(consumer_document(self._slots, self._manifest, self._inbox.session_id, TTL_S))


def _parameter(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{part}"


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, a row a slot."""
    return tensor.view(torch.uint8).view(len(tensor), -1)


def _right(checkpoint: Path, layers: list[int], placement: list[int]) -> dict[str, torch.Tensor]:
    """The parameters as the checkpoint has them."""
    stored = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= {name: tensor for name, tensor in load_file(file).items() if ".experts." in name}

    def wanted(layer: int, expert: int, part: str) -> torch.Tensor:
        which, kind = part.split("_", 1)
        stem = f"model.layers.{layer}.mlp.experts.{expert}"
        return torch.cat([stored[f"{stem}.{half}.{kind}"] for half in HALVES[which]])

    return {
        _parameter(layer, part): torch.stack([wanted(layer, expert, part) for expert in placement])
        for layer in layers
        for part in PARTS
    }


class RankProcess:
    """The same from outside. Raises AssertionError where it does not answer."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.slots: list[tuple[int, int]] = [(layer, expert) for layer, expert in json.loads(child.expect("slots"))]

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, *words: object) -> str:
        """Its answer; one that begins with "error" where it raised."""
        self._child.tell(" ".join(map(str, words)))
        return self._child.expect("answer", ANSWER_WITHIN_S)


def main() -> None:
    rank = Rank(Path(sys.argv[1]), sys.argv[2])
    verbs: dict[str, Callable[..., str]] = {
        verb.__name__: verb
        for verb in (
            rank.wipe, rank.check, rank.pattern, rank.intact, rank.restore, rank.register, rank.unregister,
            rank.document,
        )
    }  # fmt: skip
    print("slots", json.dumps(rank.slots), flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        try:
            answer = verbs[verb](*words)
        except Exception as error:
            answer = f"error {type(error).__name__}: {' '.join(str(error).split())}"
        print("answer", answer, flush=True)


if __name__ == "__main__":
    main()
