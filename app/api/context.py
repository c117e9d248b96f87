"""What the routes of one daemon share: made once, before it serves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app.cluster.cluster import Cluster
from app.cluster.membership import Membership
from app.cluster.peers import PeerClient
from app.node.caretaker import Filler
from app.node.node import Node
from app.restores.consumers import ConsumerStore
from app.restores.pushes import PushDesk
from app.restores.store import RestoreStore
from app.settings import Settings

_log = logging.getLogger("hotspare.node")


@dataclass(frozen=True)
class Context:
    """The parts of a running node, from the segment up."""

    node: Node
    cluster: Cluster
    restores: RestoreStore
    filler: Filler
    client: PeerClient
    consumers: ConsumerStore
    pushes: PushDesk
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def open(cls, settings: Settings) -> Context:
        """Open the node: claim, adopt or allocate. Blocks; raises what `Node.open` raises, and leaves nothing then."""
        client = PeerClient(settings.token.get_secret_value() if settings.token else None)
        membership = Membership(settings.peers, model=settings.require_model(), namespace=settings.namespace)
        cluster = Cluster(membership, client)
        node = Node(settings, cluster)
        try:
            node.open()
        except BaseException:
            client.close()
            raise
        consumers = ConsumerStore()
        store = RestoreStore(node, client, consumers)
        return cls(node, cluster, store, Filler(node, store.start_local), client, consumers, PushDesk(node, store.mend))

    def start(self) -> None:
        """Begin to poll, to restore and to fill, each in a thread."""
        self.restores.start()
        self.cluster.start()
        self.filler.start()

    def stop(self) -> None:
        """End every thread, then let the segment go: sealed, it stays for the next daemon. Blocks."""
        self.restores.stop()
        self.filler.stop()
        self.cluster.stop()
        self.node.close()
        self.client.close()
