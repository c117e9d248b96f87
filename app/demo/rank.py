"""A rank of an engine, in a process of its own: fused parameters as SGLang has them, some experts in two slots.

`python -m app.demo.rank DIRECTORY MODEL NAMESPACE NODE URL` takes a command a line, and answers each with a JSON line:

- `restore`: fill the slots with noise, then restore them;
- `wait`: fill them with noise, and register as the consumer CONSUMER_ID;
- `compare`: hold every slot against the checkpoint, as the safetensors library reads it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from safetensors import safe_open

from app.demo.comparison import EXPERT_MARK, same
from transfer import Restorer
from transfer.slots import Slots

if TYPE_CHECKING:
    import torch

CONSUMER_ID = "demo-rank"
EP_RANK, EP_SIZE = 1, 2
REDUNDANT_MIN = 2  # experts that have a second slot
KINDS = ("weight", "weight_scale_inv")


class Checkpoint:
    """The expert tensors of DeepSeek-V3's naming, read anew each time: no copy of them is kept."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._file_of: dict[str, Any] = {}
        self.experts: dict[str, int] = defaultdict(int)
        """Stem of a layer's names → its number of experts."""
        for path in sorted(directory.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in filter(lambda each: EXPERT_MARK in each, file.keys()):
                self._file_of[name] = file
                stem, _, rest = name.partition(EXPERT_MARK)
                stem += EXPERT_MARK
                self.experts[stem] = max(self.experts[stem], int(rest.split(".")[0]) + 1)

    def tensor(self, stem: str, expert: int, part: str, kind: str) -> torch.Tensor:
        name = f"{stem}{expert}.{part}_proj.{kind}"
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor


def layer_of(stem: str) -> int:
    return int(stem.split(".layers.")[1].split(".")[0])


def physical_to_logical(count: int) -> list[int]:
    """A layer's experts, and its first ones once more: as many in all as the ranks divide."""
    return [*range(count), *range(REDUNDANT_MIN + (count + REDUNDANT_MIN) % EP_SIZE)]


class Rank:
    """The slots, and what should be in them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        self._checkpoint = checkpoint
        self.held: dict[str, torch.Tensor] = {}
        self.maps = {stem: physical_to_logical(count) for stem, count in checkpoint.experts.items()}
        for stem, experts in self.maps.items():
            slots = len(experts) // EP_SIZE
            for kind in KINDS:
                gate, down = (checkpoint.tensor(stem, 0, part, kind) for part in ("gate", "down"))
                self.held[f"{stem}w13_{kind}"] = torch.empty((slots, 2 * len(gate), *gate.shape[1:]), dtype=gate.dtype)
                self.held[f"{stem}w2_{kind}"] = torch.empty((slots, *down.shape), dtype=down.dtype)
        by_layer = {layer_of(stem): experts for stem, experts in self.maps.items()}
        self.slots = Slots.fused(self.held, physical_to_logical=by_layer, ep_rank=EP_RANK, ep_size=EP_SIZE)

    def load(self) -> None:
        """What an engine does when it starts: every slot from the files."""
        for _, found, right in self._pairs():
            found.copy_(right)

    def spoil(self) -> None:
        """Noise over every byte."""
        import torch

        for tensor in self.held.values():
            tensor.view(torch.uint8).random_(0, 256)

    def compare(self) -> dict[str, Any]:
        """Every tensor of every slot with the checkpoint's."""
        tensors = nbytes = 0
        differing: list[str] = []
        for name, found, right in self._pairs():
            tensors += 1
            nbytes += right.nbytes
            if not same(found, right):
                differing.append(name)
        return {"tensors": tensors, "nbytes": nbytes, "differing": differing, "ok": bool(tensors) and not differing}

    def _pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for stem, experts in self.maps.items():
            share = len(experts) // EP_SIZE
            for slot, expert in enumerate(experts[EP_RANK * share : (EP_RANK + 1) * share]):
                for kind in KINDS:
                    w13, w2 = self.held[f"{stem}w13_{kind}"][slot], self.held[f"{stem}w2_{kind}"][slot]
                    half = len(w13) // 2
                    for part, found in (("gate", w13[:half]), ("up", w13[half:]), ("down", w2)):
                        right = self._checkpoint.tensor(stem, expert, part, kind)
                        yield f"{stem}{expert}.{part}_proj.{kind} in slot {slot}", found, right


def restore(rank: Rank, restorer: Restorer) -> dict[str, Any]:
    rank.spoil()
    report = restorer.restore()
    return {
        "blocks_done": report.experts_done,
        "bytes_by_source": dict(report.bytes_by_source),
        "seconds": report.seconds,
        "failed": [f"{failed.key}: {failed.reason}" for failed in report.failed],
    }


def wait(rank: Rank, restorer: Restorer) -> dict[str, Any]:
    rank.spoil()
    restorer.register(CONSUMER_ID)
    return {"consumer_id": CONSUMER_ID}


COMMANDS: Mapping[str, Callable[[Rank, Restorer], dict[str, Any]]] = {
    "restore": restore,
    "wait": wait,
    "compare": lambda rank, _: rank.compare(),
}


def main() -> None:
    directory, model, namespace, node, url = sys.argv[1:]
    with ExitStack() as stack:
        rank = Rank(Checkpoint(Path(directory), stack))
        restorer = stack.enter_context(Restorer(url, model=model, namespace=namespace, node=node))
        rank.load()
        restorer.bind(rank.slots)
        for line in sys.stdin:
            sys.stdout.buffer.write(orjson.dumps(COMMANDS[line.strip()](rank, restorer)) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
