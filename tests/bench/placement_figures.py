"""Balance and movement of `app.cluster.placement`, as Markdown.

    python tests/bench/placement_figures.py [--layers 58] [--experts 256] [--clusters 8]

Every figure is the worst of several clusters with other node names.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import workbench  # noqa: F401 - it makes the packages found

from app.cluster.placement import Placement
from shm.block import ExpertKey, TensorEntry
from shm.manifest import FileSpec, Manifest

DEEPSEEK_V3 = (58, 256)  # layers with experts, experts a layer
EXPERT_NBYTES = 44_050_944
STEPS = ((3, 4), (8, 9), (8, 7), (16, 15), (32, 33), (63, 64))
REPLICAS = (1, 2, 3)


def manifest_of(layers: int, experts: int, nbytes: int) -> Manifest:
    entry = [TensorEntry("l.{layer}.e.{expert}.weight", "U8", (nbytes,), 0, 0)]
    keys = [ExpertKey(layer, expert) for layer in range(3, 3 + layers) for expert in range(experts)]
    return Manifest.build("figures", "", "experts", [FileSpec("f", nbytes, "")], dict.fromkeys(keys, entry))


def names(cluster: int, before: int, after: int) -> tuple[list[str], list[str]]:
    """Two node lists that differ by one node; it leaves, or joins, somewhere in the middle."""
    larger = [f"host-{cluster}-{i}" for i in range(max(before, after))]
    odd = cluster * 5 % len(larger)
    smaller = larger[:odd] + larger[odd + 1 :]
    return (smaller, larger) if before < after else (larger, smaller)


def placed_nbytes(manifest: Manifest, placement: Placement) -> np.ndarray:
    return np.array([manifest.nbytes[placement.rows_of(node)].sum() for node in placement.nodes])


def uneven(manifest: Manifest, placement: Placement) -> float:
    """The largest distance of a node's bytes from even, as a fraction of even."""
    load = placed_nbytes(manifest, placement)
    return float(np.abs(load / load.mean() - 1).max())


def moved(manifest: Manifest, old: Placement, new: Placement) -> float:
    """Bytes that nodes of `new` must fetch, as a multiple of the least any even placement would."""
    fetched = 0
    for node in new.nodes:
        had = old.rows_of(node) if node in old.nodes else np.empty(0, np.int64)
        fetched += int(manifest.nbytes[np.setdiff1d(new.rows_of(node), had)].sum())
    least = int(manifest.nbytes.sum()) * new.replicas / max(len(old.nodes), len(new.nodes))
    return fetched / least


def spread(manifest: Manifest, placement: Placement) -> float:
    """When a node dies: the largest share of its bytes that one survivor holds alone or first, in even shares."""
    dead, counts = placement.nodes[0], dict.fromkeys(placement.nodes[1:], 0)
    for row in placement.rows_of(dead).tolist():
        counts[next(node for node in placement.nodes_of(row) if node != dead)] += int(manifest.nbytes[row])
    return max(counts.values()) * len(counts) / sum(counts.values())


def step_row(manifest: Manifest, before: int, after: int, replicas: int, clusters: int) -> Sequence[str]:
    worst_uneven = worst_moved = worst_spread = worst_ms = 0.0
    for cluster in range(clusters):
        start = time.perf_counter()
        old, new = (Placement.compute(manifest, nodes, replicas) for nodes in names(cluster, before, after))
        worst_ms = max(worst_ms, (time.perf_counter() - start) * 500)
        worst_uneven = max(worst_uneven, uneven(manifest, old), uneven(manifest, new))
        worst_moved = max(worst_moved, moved(manifest, old, new))
        worst_spread = max(worst_spread, spread(manifest, old)) if replicas > 1 else 0.0
    return (
        f"{before} → {after}", str(replicas), f"{worst_uneven:.2%}", f"{worst_moved:.2f}",
        f"{worst_spread:.2f}" if replicas > 1 else "-", f"{worst_ms:.0f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in zip(("layers", "experts", "clusters"), (*DEEPSEEK_V3, 8), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[default: {default}]")
    given = parser.parse_args()
    manifest = manifest_of(given.layers, given.experts, EXPERT_NBYTES)
    manifest.digest  # noqa: B018 - computed once for a model, so not part of the times below
    print("| nodes | replicas | bytes a node, from even | moved, times the least | one survivor, times even | ms |")
    print("|---|---|---|---|---|---|")
    for before, after in STEPS:
        for replicas in REPLICAS:
            print("|", " | ".join(step_row(manifest, before, after, replicas, given.clusters)), "|", flush=True)


if __name__ == "__main__":
    main()
