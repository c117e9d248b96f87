"""One expert of a large model, from a peer over loopback, call to verified slots.

    python tests/bench/expert_figures.py [--layers 61] [--experts 256] [--rounds 25]

The model has as many blocks as DeepSeek-V3, each small, so that what is timed is not bytes but asking who has the
block, planning, and the way there. The baseline is what an engine did before it could ask for a block by name: it
fetches and reads the whole cluster's map, and moves nothing.
"""

from __future__ import annotations

import statistics
import time

from workbench import MODEL, Daemon, Figure, arguments, bench, tell

from app.cli.daemon import silence_native_output
from shm.attachment import attach
from transfer import Restorer
from transfer.client.control_plane import ControlPlane
from transfer.client.pinned_content import PinnedContent
from transfer.slots import Slots

RESTORE_MS_MAX = 20
ELSEWHERE = "elsewhere"  # a model name that finds no segment on this host, so that the peer's memory serves


def main() -> None:
    options = arguments(__doc__, layers=(61, "layers"), experts=(256, "experts a layer"), rounds=(25, "restores"))
    restores, maps = [], []
    with bench() as made:
        directory = made.checkpoint(
            "checkpoint", {"layers": options.layers, "experts": options.experts, "scale": 1 / 64}
        )
        with Daemon(made, "peer", "--checkpoint", str(directory), "--fill", "disk") as daemon:
            daemon.wait_until_ready()
            with attach(MODEL, namespace=made.namespace) as weights:
                manifest = weights.manifest
                key = manifest.keys[len(manifest) // 2]
                slots = Slots.plain({name: tensor.clone() for name, tensor in weights.expert(*key).items()})
            control = ControlPlane(daemon.url, None)
            with silence_native_output(), Restorer(daemon.url, model=ELSEWHERE) as restorer:
                restorer.bind(slots, proof="none")
                for number in range(options.rounds + 1):
                    started = time.perf_counter()
                    report = restorer.restore([key])
                    restored = time.perf_counter()
                    control.shard_map(daemon.url, manifest, PinnedContent(), range(len(manifest)))
                    asked = time.perf_counter()
                    assert report.ok, report.failed
                    assert report.bytes_by_source["peer"] == report.bytes_total
                    if number:  # the first one makes contact
                        restores.append((restored - started) * 1e3)
                        maps.append((asked - restored) * 1e3)
            control.close()
    middle, whole = statistics.median(restores), statistics.median(maps)
    figures = [
        Figure(
            f"one expert from a peer, of {len(manifest):,} blocks", f"{middle:.1f} ms", f"at most {RESTORE_MS_MAX}",
            middle <= RESTORE_MS_MAX, f"{min(restores):.1f} to {max(restores):.1f}",
        ),
        Figure("the same, of the time that the whole map takes", f"{middle / whole:.3f}", note=f"map {whole:.0f} ms"),
    ]  # fmt: skip
    tell(figures, {"restores_ms": restores, "maps_ms": maps}, as_json=options.json)


if __name__ == "__main__":
    main()
