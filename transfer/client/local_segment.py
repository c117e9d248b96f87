"""This host's segment as an engine holds it: attached while it is the one that its name leads to."""

from __future__ import annotations

from collections.abc import Iterable

from shm.attachment import Attachment, attach
from shm.block import HeldBlock
from shm.errors import HotspareError, SegmentError
from shm.layout import SegmentState
from shm.lookup import open_header


class LocalSegment:
    """Attaches, page-locks if asked, and attaches anew when the segment was replaced or extended. Not thread-safe."""

    def __init__(self) -> None:
        self._attachment: Attachment | None = None

    @property
    def attachment(self) -> Attachment | None:
        """What `open` attached last; None where it failed."""
        return self._attachment

    def open(self, model: str, namespace: str, node: str | None) -> Attachment:
        """The attachment, as current as can be. Raises the SegmentError that says why there is none."""
        if self._attachment is not None and not self._is_current(self._attachment):
            self.close()
        if self._attachment is None:
            try:
                self._attachment = attach(model, namespace=namespace, node=node)
            except (OSError, ValueError) as error:  # it was cut short between its header and the mapping
                raise SegmentError(f"the segment of {model} cannot be mapped: {error}") from error
        return self._attachment

    def held(self, rows: Iterable[int]) -> dict[int, HeldBlock]:
        """Of these manifest rows those that are published here."""
        return {} if self._attachment is None else self._attachment.held(rows)

    @staticmethod
    def _is_current(attachment: Attachment) -> bool:
        try:
            header = open_header(attachment.name.object_name)
        except HotspareError:
            return False
        return (header.generation, header.total_nbytes, header.state) == (
            attachment.generation,
            attachment.nbytes,
            SegmentState.SEALED,
        )

    def close(self) -> None:
        """Undo the page-locking, and let the mapping go."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.close()
