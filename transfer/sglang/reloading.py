"""Having SGLang load lost experts again, where slots cannot be filled: what that does to all others is looked at.

SGLang processes every weight of a model after a load, also those that the load did not touch. Most kernels' processing
changes nothing the second time; some rearranges once more what it had rearranged, and an engine goes on with garbage.
So some bytes of everything that was not loaded are compared, and where they differ the whole model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from transfer.sglang.engine import Engine, NameFilter
from transfer.slots.layouts import expert_of, fused_name

if TYPE_CHECKING:
    import torch

SAMPLED = 257  # elements of a parameter, or of a slot: what is rearranged leaves hardly any where it was

_log = logging.getLogger("hotspare.sglang")


class _Sample(NamedTuple):
    layer: int | None
    """Of experts: then there is a row a slot, else one row."""
    rows: torch.Tensor
    """uint8 [rows, bytes], on the parameter's device."""


def reload_experts(engine: Engine, wanted: NameFilter) -> None:
    """Have the engine load the tensors that are wanted, or all if that changed others. Raises what it raises."""
    loaded: set[tuple[int, int] | None] = set()

    def noted(name: str) -> bool:
        if not wanted(name):
            return False
        loaded.add(expert_of(name))
        return True

    before = dict(_samples(engine))
    engine.reload(noted)
    if None in loaded:  # more than experts: what else may have changed is not known
        return
    changed = _changed(before, dict(_samples(engine)), _slots_of(engine, {key for key in loaded if key is not None}))
    if changed is not None:
        _log.warning("processing after the load changed %s, which was not loaded: everything is loaded again", changed)
        engine.reload(lambda name: True)


def _samples(engine: Engine) -> Iterator[tuple[str, _Sample]]:
    import torch

    for name, parameter in engine.parameters().items():
        found = fused_name(name)
        count = 1 if found is None else len(parameter)
        flat = parameter.detach().reshape(count, -1)
        step = max(1, flat.shape[1] // SAMPLED)
        yield (
            name,
            _Sample(None if found is None else found.layer, flat[:, ::step].contiguous().view(torch.uint8).clone()),
        )


def _slots_of(engine: Engine, keys: Collection[tuple[int, int]]) -> dict[int, set[int]]:
    """Layer → this rank's slots that hold one of these (layer, expert)."""
    share, rank = engine.physical_count // engine.ep_size, engine.ep_rank
    slots: dict[int, set[int]] = {}
    for layer, expert in keys:
        here = [at % share for at in engine.physical_of(layer, expert) if at // share == rank]
        slots.setdefault(layer, set()).update(here)
    return slots


def _changed(before: dict[str, _Sample], after: dict[str, _Sample], loaded: dict[int, set[int]]) -> str | None:
    """The first parameter that is not as it was, but for the slots that were loaded."""
    import torch

    for name, (layer, rows) in before.items():
        now = after[name].rows if name in after else None
        if now is None or now.shape != rows.shape:
            return name
        kept = [row for row in range(len(rows)) if layer is None or row not in loaded.get(layer, ())]
        if not torch.equal(now[kept], rows[kept]):
            return name
    return None
