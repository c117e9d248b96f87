"""Coverage: how many living nodes have each block, and which blocks none has. Pure.

Counted from what nodes have *published*, not from where blocks are placed: it is proof, not hope.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shm.block import ExpertKey
from shm.errors import InvalidInput
from shm.manifest import Manifest


@dataclass(frozen=True, slots=True)
class CoverageCount:
    """Some blocks, by the number of living nodes that have them."""

    blocks: int
    by_replicas: Mapping[int, int]
    """Number of nodes → number of blocks, from 0 to the number wanted or found, without gaps."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What would be left. `layers` is by layer, ascending; DENSE as a layer is the tensors outside any."""

    total: CoverageCount
    layers: Mapping[int, CoverageCount]
    lost: tuple[ExpertKey, ...]
    """Blocks that no living node has: only the checkpoint can bring them back. Ascending."""
    under_replicated: tuple[ExpertKey, ...]
    """Blocks that a living node has, but fewer nodes than wanted. Ascending."""


def _replicas_of_rows(blocks: int, held: Mapping[str, Iterable[int]]) -> npt.NDArray[np.int64]:
    """[blocks]: how many nodes hold each row. A row named twice by one node counts once."""
    counts = np.zeros(blocks, dtype=np.int64)
    for node, rows in held.items():
        wanted = rows if isinstance(rows, np.ndarray) else np.fromiter(rows, dtype=np.int64)
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < blocks:
            raise InvalidInput(
                f"{node} says it has rows {wanted.min()} to {wanted.max()} of a manifest of {blocks}: "
                "count only nodes whose manifest digest is ours"
            )
        has = np.zeros(blocks, dtype=np.bool_)
        has[wanted] = True
        counts += has
    return counts


def _count(histogram: npt.NDArray[np.int64]) -> CoverageCount:
    return CoverageCount(int(histogram.sum()), dict(enumerate(histogram.tolist())))


def cover(manifest: Manifest, held: Mapping[str, Iterable[int]], replicas: int) -> Coverage:
    """Count the blocks of `manifest` that nodes hold, against the `replicas` wanted.

    `held` has the published manifest rows of every *living* node, this one among them, by node id: leave out those
    that are given up. Raises InvalidInput for rows that the manifest has not.
    """
    counts = _replicas_of_rows(len(manifest), held)
    layers, layer_of_row = np.unique(manifest.rows["layer"], return_inverse=True)
    width = max(replicas, int(counts.max())) + 1
    table = np.bincount(layer_of_row * width + counts, minlength=len(layers) * width).reshape(len(layers), width)
    return Coverage(
        total=_count(table.sum(axis=0)),
        layers={layer: _count(row) for layer, row in zip(layers.tolist(), table, strict=True)},
        lost=tuple(manifest.keys[row] for row in np.flatnonzero(counts == 0).tolist()),
        under_replicated=tuple(
            manifest.keys[row] for row in np.flatnonzero((counts > 0) & (counts < replicas)).tolist()
        ),
    )
