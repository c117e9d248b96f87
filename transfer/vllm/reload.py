"""Experts of a vLLM that is up, loaded again from memory.

Where kernels keep weights as the checkpoint has them, slots are filled, and nothing else is read: what was not lost
shows whether they do. Where they rewrite them, as vLLM's CPU kernels and many of its GPU kernels do, what was lost has
to be loaded and rewritten anew, through vLLM's own weight loaders. It can do that a layer at a time, so of each layer
that lost experts all the rank's experts are read.

That it does that right, nobody is asked. Experts of the layer that were not lost are loaded again with the others: they
have to come out as they were, to the byte. If one does not, everything is put back, and it is an error.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from shm.errors import HotspareError, InvalidInput
from transfer.client.loader import Loader, Named
from transfer.client.restorer import Restorer
from transfer.errors import RestoreError
from transfer.slots import Slots
from transfer.slots.layouts import NO_EXPERT, expert_of, fused_name
from transfer.vllm.experts import (
    expert_modules,
    has_other_memory,
    is_balanced,
    is_of_all_ranks,
    layer_of,
    part_of,
    slots_of,
)

if TYPE_CHECKING:
    import torch

SHOWN_MAX = 5  # experts in a message

Key = tuple[int, int]
Rewrite = Callable[[Any, list[Named]], None]
"""Has an expert module take these tensors of its layer, as at the start of the engine."""

_log = logging.getLogger("hotspare.vllm")


class Reloaded(NamedTuple):
    """What was done on one rank. Experts are logical ones."""

    experts: int
    """Of those asked for, the ones that this rank has: all are good now."""
    read: int
    """How many had to be read for that."""
    witnesses: int
    """How many that were not asked for showed that it is right: they hold their bytes, or came out as they had been."""
    bytes_by_source: Mapping[str, int]
    seconds: float


def fill(
    modules: Mapping[int, Any], asked: Iterable[Key], restorer: Restorer, content: str | None = None
) -> Reloaded | None:
    """Fill the slots of these (layer, expert), those of other ranks left aside; modules are a rank's by layer.

    `content` is the digest of what the engine was started with, where that is known: nothing else is put there.

    None where that cannot be done, or not be shown to be right, or did not bring them all: load them again then.
    Raises InvalidInput for a layer without experts.
    """
    began = time.monotonic()
    by_layer = here(modules, asked)
    if not by_layer:
        return Reloaded(0, 0, 0, {}, 0.0)
    if any(has_other_memory(modules[layer]) for layer in by_layer):
        return None
    lost = [(layer, expert) for layer, experts in by_layer.items() for expert in experts]
    try:
        proof = restorer.bind(slots_in({layer: modules[layer] for layer in by_layer}), lost=lost, proof="sample")
        if not proof.ok or is_other(content, restorer.content_digest):
            return None
        report = restorer.restore(lost)
    except HotspareError as error:
        _log.info("experts are loaded again, and their slots not filled: %s", error)
        return None
    if not report.ok:
        return None
    return Reloaded(len(lost), len(lost), proof.experts_proved, dict(report.bytes_by_source), time.monotonic() - began)


def slots_in(modules: Mapping[int, Any]) -> Slots:
    """Where a rank has the experts of these layers. Raises SlotMismatch and InvalidInput as `Slots.fused`."""
    maps: dict[int, list[int]] = {}
    parameters: dict[str, Any] = {}
    for layer, module in modules.items():
        slots = slots_of(module)
        maps[layer] = [NO_EXPERT] * module.w13_weight.shape[0]
        for expert, slot in slots.items():
            maps[layer][slot] = expert
        parameters |= {f"layers.{layer}.experts.{name}": p for name, p in module.named_parameters()}
    tp_rank, tp_size = part_of(next(iter(modules.values())))
    return Slots.fused(parameters, physical_to_logical=maps, tp_rank=tp_rank, tp_size=tp_size)


def here(modules: Mapping[int, Any], asked: Iterable[Key]) -> dict[int, set[int]]:
    """What this rank has of these (layer, expert). Raises InvalidInput for a layer without experts."""
    by_layer: dict[int, set[int]] = {}
    for layer, expert in sorted({(int(layer), int(expert)) for layer, expert in asked}):
        if layer not in modules:
            raise InvalidInput(f"layer {layer} has no experts: those are layers {_some(sorted(modules))}")
        if expert in slots_of(modules[layer]):
            by_layer.setdefault(layer, set()).add(expert)
    return by_layer


class Reload:
    """Of one rank: its expert modules by layer, and how vLLM loads them; and `content` as for `fill`."""

    def __init__(
        self, modules: Mapping[int, Any], rewrite: Rewrite, loader: Loader, content: str | None = None
    ) -> None:
        self._modules = modules
        self._content = content
        self._rewrite = rewrite
        self._loader = loader
        self._bytes: Counter[str] = Counter()
        self._read = self._witnesses = 0

    def run(self, asked: Iterable[Key], *, is_vouched: bool = False) -> Reloaded:
        """Load these (layer, expert) again, those of other ranks left aside.

        Where nothing of any layer is left that could show whether vLLM's reload is right, nothing is done, unless
        `is_vouched`. Raises InvalidInput for a layer without experts, and RestoreError: then the layer that it names,
        and those after it, are as they were.
        """
        began = time.monotonic()
        by_layer = here(self._modules, asked)
        witnessed: dict[int, set[int]] = {n: lost for n, lost in by_layer.items() if lost < self._local(n)}
        if by_layer and not witnessed and not is_vouched:
            witnessed = {self._bystander(by_layer): set()}
        for layer, lost in {**witnessed, **by_layer}.items():  # those first that show whether it is right
            self._load(layer, lost)
        count = sum(map(len, by_layer.values()))
        return Reloaded(count, self._read, self._witnesses, dict(self._bytes), time.monotonic() - began)

    def _local(self, layer: int) -> set[int]:
        return set(slots_of(self._modules[layer]))

    def _bystander(self, lost: Collection[int]) -> int:
        """A layer that lost nothing."""
        if (layer := next((layer for layer in self._modules if layer not in lost), None)) is not None:
            return layer
        raise RestoreError(
            "every expert of every layer is asked for, so nothing can show whether vLLM's reload is right with this "
            "kernel: start the engine anew, or vouch for it with proof='none'"
        )

    def _load(self, layer: int, lost: Collection[int]) -> None:
        module = self._modules[layer]
        tensors = list(self._loader.load(lambda name: _is_wanted(name, layer, self._local(layer))).items())
        if is_other(self._content, self._loader.content_digest):
            raise RestoreError(
                "the nodes keep other weights than the engine was started with: start it anew, or load experts again "
                "beside the checkpoint's files"
            )
        if not tensors:
            raise RestoreError(f"layer {layer}: the checkpoint has no tensor of its experts: load the model anew")
        kept = Kept(module, lost)
        try:
            self._rewrite(module, tensors)
        except Exception:
            kept.put_back()
            raise
        if changed := kept.changed():
            kept.put_back()
            raise RestoreError(
                f"layer {layer}: expert {_some(changed)}, not asked for, came out of vLLM's reload otherwise than it "
                "was: if it was lost too, ask for it; else vLLM does not load this kernel's weights again as it "
                "loads them first, so start the engine anew. This layer is as it was"
            )
        self._bytes.update(self._loader.report.bytes_by_source)
        self._read += len(self._local(layer))
        self._witnesses += len(self._local(layer) - set(lost))


class Kept:
    """An expert module's memory as it was, but for experts that were lost: those may change, and nothing else."""

    def __init__(self, module: Any, lost: Collection[int]) -> None:
        self._module = module
        self._slots = slots_of(module)
        self._lost = frozenset(lost)
        self._parameters: dict[str, torch.nn.Parameter] = dict(module._parameters)
        self._before = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    def changed(self) -> list[int]:
        """Experts that were not lost and are not as they were; all, where parameters are not those that were there."""
        held = self._module._parameters
        if held.keys() != self._before.keys() or any(held[n] is not p for n, p in self._parameters.items()):
            return sorted(self._slots)
        return sorted(set().union(*(self._changed_in(name) for name in self._before)))

    def _changed_in(self, name: str) -> set[int]:
        before, after = _rows(self._before[name]), _rows(self._parameters[name].detach().cpu())
        if len(before) != len(self._slots):  # one for all experts
            return set() if before.equal(after) else set(self._slots)
        kept = {expert: slot for expert, slot in self._slots.items() if expert not in self._lost}
        return {expert for expert, slot in kept.items() if not before[slot].equal(after[slot])}

    def put_back(self) -> None:
        """Have the module as it was, its lost experts too."""
        self._module._parameters.clear()
        self._module._parameters.update(self._parameters)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._before[name])


def modules_by_layer(model: Any) -> dict[int, Any]:
    """Layer → its expert module. Raises RestoreError where that cannot be told, or experts are placed anew."""
    modules: dict[int, Any] = {}
    for name, module in expert_modules(model).items():
        layer = layer_of(name)
        if layer is None or layer in modules:
            raise RestoreError(f"the layer of {name} cannot be told, or has two such modules: start the engine anew")
        if is_balanced(module):
            raise RestoreError("vLLM's weight loaders do not know where its load balancer (EPLB) has put experts")
        modules[layer] = module
    return dict(sorted(modules.items()))


def is_other(content: str | None, found: str | None) -> bool:
    """Whether two contents are known to differ."""
    return None not in (content, found) and content != found


def _is_wanted(name: str, layer: int, local: Collection[int]) -> bool:
    if (key := expert_of(name)) is not None:
        return key[0] == layer and (key[1] in local or is_of_all_ranks(name))
    found = fused_name(name)
    return found is not None and found.layer == layer


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_MAX]))
    return shown if len(numbers) <= SHOWN_MAX else f"{shown}, … ({len(numbers)})"


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, uint8 [first axis, rest]."""
    import torch

    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1).contiguous().view(torch.uint8)
