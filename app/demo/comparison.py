"""Compares segments with the checkpoint, byte for byte, in a process of its own: attached by name, as an engine is.

`python -m app.demo.comparison DIRECTORY MODEL NAMESPACE NODE...` prints one JSON document. What the checkpoint has, the
safetensors library says, so that no code of ours vouches for itself.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from safetensors import safe_open

from shm.attachment import Attachment, attach

if TYPE_CHECKING:
    import torch

EXPERT_MARK = ".mlp.experts."


@dataclass
class Comparison:
    """What was found. A tensor on two nodes is compared twice; bytes are those compared."""

    tensors: int = 0
    compared: int = 0
    nbytes: int = 0
    replicas_min: int | None = None
    differing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.tensors) and not self.differing and not self.unexpected and bool(self.replicas_min)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte are the same."""
    import torch

    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def compare(directory: Path, nodes: dict[str, Attachment]) -> Comparison:
    """Hold every expert tensor of the checkpoint against each node that has it, and look for tensors of no expert."""
    found = Comparison()
    names = {node: set(weights) for node, weights in nodes.items()}
    expected: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in filter(lambda each: EXPERT_MARK in each, file.keys()):
                expected.add(name)
                _compare_one(name, file.get_tensor(name), nodes, names, found)
    found.unexpected = sorted(set().union(*names.values()) - expected)
    return found


def _compare_one(
    name: str,
    tensor: torch.Tensor,
    nodes: dict[str, Attachment],
    names: dict[str, set[str]],
    found: Comparison,
) -> None:
    holders = [node for node in nodes if name in names[node]]
    found.tensors += 1
    found.compared += len(holders)
    found.nbytes += tensor.nbytes * len(holders)
    found.replicas_min = len(holders) if found.replicas_min is None else min(found.replicas_min, len(holders))
    found.differing += [f"{name} on {node}" for node in holders if not same(nodes[node][name], tensor)]


def main() -> None:
    directory, model, namespace, *node_ids = sys.argv[1:]
    with ExitStack() as stack:
        nodes = {node: stack.enter_context(attach(model, namespace=namespace, node=node)) for node in node_ids}
        found = compare(Path(directory), nodes)
        sys.stdout.write(orjson.dumps(asdict(found) | {"ok": found.ok}).decode() + "\n")


if __name__ == "__main__":
    main()
