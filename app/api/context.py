"""What the routes of one daemon share: made once, before it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app.cluster.cluster import Cluster
from app.cluster.membership import Membership
from app.cluster.namesakes import Asker, Namesakes
from app.cluster.peers import PeerClient
from app.cluster.prober import Prober
from app.data_address import data_host, warnings
from app.node.caretaker import Caretaker
from app.node.guard import Guard
from app.node.node import Node
from app.node.scrubber import Scrubber
from app.restores.consumers import ConsumerStore
from app.restores.pushes import PushDesk
from app.restores.store import RestoreStore
from app.settings import Settings
from transfer.engine import MooncakeEngine, TransferEngine
from transfer.loop import Loop

_log = logging.getLogger("hotspare.node")


def _engine_starter(settings: Settings) -> Callable[[], TransferEngine]:
    """Starts Mooncake's engine. Raises InvalidInput for an address that peers cannot reach; warns of doubtful ones."""
    host = data_host(settings)
    for warning in warnings(settings, host):
        _log.warning("%s", warning)
    return lambda: MooncakeEngine(host, settings.transport)


@dataclass(frozen=True)
class Context:
    """The parts of a running node, from the segment up."""

    node: Node
    cluster: Cluster
    prober: Prober
    restores: RestoreStore
    caretaker: Caretaker
    scrubber: Scrubber
    guard: Guard
    client: PeerClient
    consumers: ConsumerStore
    pushes: PushDesk
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def open(cls, settings: Settings, start_engine: Callable[[], TransferEngine] | None = None) -> Context:
        """Open the node: claim, adopt or allocate. Blocks; raises what `Node.open` raises, and leaves nothing then.

        `start_engine` starts a transfer engine: Mooncake's by default.
        """
        start = start_engine or _engine_starter(settings)
        namesakes = Namesakes(settings.node_id, settings.peers)
        token = settings.token.get_secret_value() if settings.token else None
        client = PeerClient(token, Asker(settings.node_id, namesakes.own_start))
        membership = Membership(settings.peers, model=settings.require_model(), namespace=settings.namespace)
        cluster = Cluster(membership, namesakes=namesakes)
        prober = Prober(cluster, client)
        node = Node(settings, cluster, prober, start)
        try:
            node.open()
        except BaseException:
            client.close()
            raise
        consumers = ConsumerStore()
        store = RestoreStore(node, client, consumers)
        caretaker = Caretaker(node, prober, store.start_local)
        scrubber = Scrubber(node, store.mend)
        return cls(
            node,
            cluster,
            prober,
            store,
            caretaker,
            scrubber,
            Guard(node),
            client,
            consumers,
            PushDesk(node, client, consumers, store.mend),
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Every thread that must live for as long as the daemon does."""
        workers = (worker.loop for worker in self.restores.workers.values())
        return (self.prober.loop, self.caretaker.loop, self.scrubber.loop, self.guard.loop, *workers)

    def start(self) -> None:
        """Begin to ask the peers, to restore and to bring what is missing, each in a thread."""
        self.restores.start()
        self.prober.start()
        self.caretaker.start()
        self.scrubber.loop.start()
        self.guard.loop.start()

    def hurry(self) -> None:
        """The node is about to be stopped: have what waits for others end, so that it waits for nobody."""
        self.restores.cancel()
        self.consumers.stop()
        self.prober.loop.stop(0)
        self.caretaker.loop.stop(0)
        self.client.close()

    def stop(self) -> None:
        """End every thread, then let the segment go: sealed, it stays for the next daemon. Blocks."""
        self.hurry()
        self.guard.loop.stop()
        self.scrubber.loop.stop()
        self.caretaker.stop()
        self.restores.stop()
        self.prober.stop()
        self.node.close()
        self.client.close()
