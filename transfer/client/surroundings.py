"""What a rank finds around it: its node, the segment that the node left on this host, other nodes, files on disk.

All of them are asked for one model, and for one content of it once slots were bound to one: others are left aside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from shm.attachment import Attachment
from shm.errors import HotspareError
from shm.manifest import Manifest
from transfer.client.control_plane import ControlPlane
from transfer.client.ladder import Ladder
from transfer.client.last_resort import LastResort
from transfer.client.local_segment import LocalSegment
from transfer.client.pinned_content import PinnedContent
from transfer.client.report import Tally
from transfer.client.whereabouts import URLS_ASKED_MAX, Search, recorded
from transfer.engine import session_host
from transfer.errors import RestoreError
from transfer.shard_map import Mapped
from transfer.slots.mismatch import Reference
from transfer.slots.table import SlotTable


class Surroundings:
    """Of one rank. What cannot be had is noted, and never raised. Not thread-safe."""

    def __init__(
        self, control: ControlPlane, disk: LastResort, model: str | None, namespace: str, node: str | None
    ) -> None:
        """`model` and `node` are None until the node has said what they are."""
        self.segment = LocalSegment()
        self.content = PinnedContent()
        self.node = node
        self._control = control
        self._disk = disk
        self._model, self._namespace = model, namespace

    @property
    def is_named(self) -> bool:
        """Whether it is known which model this is about."""
        return self._model is not None

    def forget_content(self) -> None:
        """Other slots are about to be bound."""
        self.content = PinnedContent()

    def ask_node(self, tally: Tally) -> str | None:
        """Learn from this host's node what it is, and which others there are; the address that it is reached at."""
        url = self._control.urls[0]
        try:
            said = self._control.node(url)
            self._control.learn(url)
        except HotspareError as error:
            tally.note(str(error))
            return None
        if self._model in (None, said.model):
            self._model, self._namespace, self.node = said.model, said.namespace, said.node_id
        else:
            tally.note(f"{url} serves {said.model}, not {self._model}")
        return session_host(said.session_id)

    def attach(self, wanted: Manifest | None, tally: Tally) -> Attachment | None:
        """This host's segment, as current as can be; of another manifest than is wanted, or other content, none."""
        if self._model is None:
            tally.note("no segment was looked for: the node never answered, and no model was named")
            return None
        attachment = tally.attempt(self.segment.open, self._model, self._namespace, self.node)
        if attachment is None:
            return None
        try:
            if wanted is not None and attachment.manifest != wanted:
                raise RestoreError(f"{attachment.name} is of another checkpoint than these slots: bind again to use it")
            self.content.agree(attachment.content_digest, str(attachment.name))
        except RestoreError as error:
            tally.note(str(error))
            self.segment.close()
            return None
        return attachment

    def manifest(self, tally: Tally) -> Manifest | None:
        """Of the model, without a segment: as a node tells it, else as the files do."""
        if (manifest := self.told_manifest(tally)) is not None:
            return manifest
        checkpoint = tally.attempt(self._disk.named, self._model)
        return None if checkpoint is None else checkpoint.manifest

    def told_manifest(self, tally: Tally) -> Manifest | None:
        """Of the model, as a node tells it."""
        for url in self._control.urls[:URLS_ASKED_MAX]:
            if (manifest := tally.attempt(self._control.manifest, url)) is not None:
                return manifest
        return None

    def find(self, bad: Collection[int], tally: Tally, ladder: Ladder) -> dict[int, Mapped]:
        """Where what a ladder misses is worth reading; `bad` are rows that were wrong in this host's memory."""
        search = Search(
            self._control,
            ladder.manifest,
            self.content,
            own=self.node,
            bad=bad,
            tried=ladder.tried,
            note=tally.note,
        )
        return search.run(ladder.missing)

    def locate(self, manifest: Manifest, rows: Iterable[int], tally: Tally) -> dict[int, Mapped]:
        """Where blocks of this content are worth reading, whoever has them."""
        return Search(self._control, manifest, self.content, note=tally.note).run(rows)

    def tell_who_was_wrong(self, manifest: Manifest, wrong: Mapping[str | None, Iterable[int]]) -> None:
        """Tell each node, by its id, None for this host's, which rows were read wrong there: it looks, and mends."""
        for node, rows in wrong.items():
            if self.content.digest is not None:
                self._control.doubt(node, self.content.digest, [manifest.keys[row] for row in rows])

    def references(self, table: SlotTable, tally: Tally) -> dict[int, Reference]:
        """Blocks as they should be: where they lie in this host's segment, else what nodes have on record of them."""
        held = self.segment.held(range(len(table.manifest)))
        found = {row: Reference(block.checksum, block.address) for row, block in held.items()}
        elsewhere = set(table.rows) - found.keys()
        told = recorded(self._control, table.manifest, self.content, elsewhere, tally.note)
        return {row: Reference(checksum) for row, checksum in told.items()} | found
