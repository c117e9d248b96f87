"""Which block is where: this node's own, or the cluster's as this node knows it. No HTTP words here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from app.cluster.cluster import Cluster
from shm.block import DENSE, ExpertKey
from shm.errors import BlockUnavailable
from shm.manifest import Manifest


def select(
    manifest: Manifest, layer: int | None = None, expert: int | None = None, blocks: Sequence[ExpertKey] = ()
) -> list[int]:
    """Manifest rows of one layer, of one expert number, or of these blocks: of what all of these agree on, ascending.

    Raises BlockUnavailable if there are none, or the model lacks one of `blocks`.
    """
    named = [manifest.index(*key) for key in blocks]
    chosen = np.ones(len(manifest), dtype=bool)
    if named:
        chosen[:] = False
        chosen[named] = True
    for column, value in (("layer", layer), ("expert", expert)):
        if value is not None:
            chosen &= manifest.rows[column] == value
    if not chosen.any():
        asked = " ".join(f"{n} {v}" for n, v in (("layer", layer), ("expert", expert)) if v is not None)
        raise BlockUnavailable(f"{manifest.model} keeps no block of {asked}")
    rows: list[int] = np.flatnonzero(chosen).tolist()
    return rows


class Holder(NamedTuple):
    """A node, the session that its memory is read in, and what it has: manifest row → (address there, xxh3-128)."""

    node_id: str
    session_id: str
    blocks: Mapping[int, tuple[int, bytes]]


def holders(cluster: Cluster) -> list[Holder]:
    """Every peer that is not unreachable."""
    return [Holder(node_id, held.session_id, held.blocks) for node_id, held in cluster.holdings().items()]


def entries(
    manifest: Manifest, rows: Iterable[int], held_by: Sequence[Holder]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The map's `experts` and `dense`; a block that nobody has published is left out.

    A replica whose checksum is not that of the first is left out too: it is of other content.
    """
    experts, dense = [], []
    for row in rows:
        found = [(holder, *holder.blocks[row]) for holder in held_by if row in holder.blocks]
        if not found:
            continue
        layer, expert = manifest.keys[row]
        right = found[0][2]
        entry = {
            "nbytes": int(manifest.nbytes[row]),
            "checksum": right.hex(),
            "replicas": [
                {"node_id": holder.node_id, "session_id": holder.session_id, "address": address}
                for holder, address, checksum in found
                if checksum == right
            ],
        }
        if expert == DENSE:
            dense.append({"layer": None if layer == DENSE else layer, **entry})
        else:
            experts.append({"layer": layer, "expert": expert, **entry})
    return experts, dense
