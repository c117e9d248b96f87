"""Which content a rank's slots hold: whoever is heard first settles it, and of others nothing is taken from then on.

Fine-tunes of one model share names, shapes and headers. Their blocks do not mix in one rank: a node that went on to
other weights stays out until the engine, which then has them too, binds again.
"""

from __future__ import annotations

from transfer.errors import RestoreError

SHOWN_CHARS = 12  # of a digest, in messages


class PinnedContent:
    """A content digest, once one is known. Not thread-safe."""

    def __init__(self) -> None:
        self.digest: str | None = None

    def agree(self, said: str | None, who: str) -> None:
        """Raises RestoreError where that party has another content, or does not know which while we do."""
        if self.digest is None:
            self.digest = said
        elif said != self.digest:
            has = f"content {said[:SHOWN_CHARS]}…" if said else "content of no known identity"
            raise RestoreError(
                f"{who} has {has}, and these slots were bound to {self.digest[:SHOWN_CHARS]}…: nothing is taken of it; "
                "bind again once the engine has its weights"
            )
