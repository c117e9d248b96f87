"""What a node tells Prometheus. Everything is derived when it is scraped: no counter is kept twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.api.context import Context
from app.cluster.membership import PeerState
from app.node.holding import Holding, proofs_of
from app.node.node import NodeState
from app.restores.local import LocalRestore
from transfer.progress import RestoreState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeCollector:
    """Collects one node's metrics."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        node = self._context.node
        holding = node.holding
        published, missing = (holding.published(), holding.missing()) if holding else ((), ())
        yield GaugeMetricFamily("hotspare_blocks", "Blocks published on this node.", value=len(published))
        nbytes = int(holding.manifest.nbytes[published].sum()) if holding else 0
        yield GaugeMetricFamily("hotspare_bytes", "Bytes of the published blocks.", value=nbytes)
        yield GaugeMetricFamily("hotspare_blocks_missing", "Blocks placed here, not published.", value=len(missing))
        yield self._by_label("hotspare_state", "1 for the state the node is in.", "state", {
            state.value: int(state is node.state) for state in NodeState
        })  # fmt: skip
        peers = Counter(peer.state for peer in self._context.cluster.peers())
        yield self._by_label("hotspare_peers", "Peers by what this node thinks of them.", "state", {
            state.value: peers[state] for state in PeerState
        })  # fmt: skip
        yield from self._proofs(holding)
        failures = CounterMetricFamily(
            "hotspare_thread_failures",
            "Turns of a thread that must live that ended in an unforeseen error, after which it went on.",
            labels=["thread"],
        )
        for loop in self._context.loops:
            failures.add_metric([loop.name], loop.failures)
        yield failures
        yield from self._restores()

    def _proofs(self, holding: Holding | None) -> Iterator[Metric]:
        scrubber = self._context.scrubber
        proved = CounterMetricFamily(
            "hotspare_scrubbed_blocks", "Blocks proved in the background, by what was found.", labels=["found"]
        )
        proved.add_metric(["right"], scrubber.proved)
        proved.add_metric(["wrong"], scrubber.rotten)
        yield proved
        yield CounterMetricFamily(
            "hotspare_mended_entries",
            "Headers, manifests and entries of the block table that were found damaged and written anew.",
            value=self._context.guard.mended,
        )
        unproved, oldest = proofs_of(holding)
        yield GaugeMetricFamily("hotspare_blocks_unproved", "Published blocks never proved yet.", value=unproved)
        if oldest is not None:
            age_s = (datetime.now(UTC) - oldest).total_seconds()
            yield GaugeMetricFamily("hotspare_proof_age_seconds", "Age of the oldest proof of a block.", value=age_s)

    def _restores(self) -> Iterator[Metric]:
        restores = self._context.restores
        local = [restore for restore in restores.all() if isinstance(restore, LocalRestore)]
        states = Counter(restore.progress.state for restore in local)
        yield self._by_label(
            "hotspare_restores",
            "Restores that this node does, or did and remembers, into its segment and into its consumers' memory. "
            "Those it asked other nodes to do are counted there.",
            "state",
            {state.value: states[state] for state in RestoreState},
        )
        moved = CounterMetricFamily(
            "hotspare_restored_bytes",
            "Bytes that restores into its segment and its consumers' memory brought since it started, by source.",
            labels=["source"],
        )
        for source, nbytes in sorted(restores.bytes_by_source().items()):
            moved.add_metric([source], nbytes)
        yield moved

    @staticmethod
    def _by_label(name: str, documentation: str, label: str, values: dict[str, int]) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=[label])
        for value, number in values.items():
            family.add_metric([value], number)
        return family


def render(context: Context) -> tuple[bytes, str]:
    """The text format, and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(context))
    return generate_latest(registry), CONTENT_TYPE
