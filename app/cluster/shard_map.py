"""Which block is where: this node's own, or the cluster's as this node knows it. No HTTP words here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from app.cluster.cluster import Cluster
from shm.block import DENSE
from shm.errors import BlockUnavailable
from shm.manifest import Manifest


def select(manifest: Manifest, layer: int | None, expert: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Manifest rows of one layer, one expert number, or both. Raises BlockUnavailable if there are none."""
    chosen = np.ones(len(manifest), dtype=bool)
    for column, value in (("layer", layer), ("expert", expert)):
        if value is not None:
            chosen &= manifest.rows[column] == value
    if not chosen.any():
        asked = " ".join(f"{n} {v}" for n, v in (("layer", layer), ("expert", expert)) if v is not None)
        raise BlockUnavailable(f"{manifest.model} keeps no block of {asked}")
    return np.flatnonzero(chosen)


def cluster_replicas(cluster: Cluster) -> Iterator[dict[int, tuple[str, dict[str, Any]]]]:
    """The same of every peer that is not unreachable."""
    for node_id, held in cluster.holdings().items():
        yield {
            row: (checksum.hex(), {"node_id": node_id, "session_id": held.session_id, "address": address})
            for row, (address, checksum) in held.blocks.items()
        }


def entries(
    manifest: Manifest, rows: Iterable[int], replicas: Iterable[Mapping[int, tuple[str, dict[str, Any]]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The map's `experts` and `dense`; a block that nobody has published is left out.

    A replica whose checksum is not that of the first is left out too: it is of other content.
    """
    experts, dense = [], []
    sources = list(replicas)
    for row in rows:
        found = [block for source in sources if (block := source.get(row)) is not None]
        if not found:
            continue
        layer, expert = manifest.keys[row]
        entry = {
            "nbytes": int(manifest.nbytes[row]),
            "checksum": found[0][0],
            "replicas": [where for checksum, where in found if checksum == found[0][0]],
        }
        if expert == DENSE:
            dense.append({"layer": None if layer == DENSE else layer, **entry})
        else:
            experts.append({"layer": layer, "expert": expert, **entry})
    return experts, dense
