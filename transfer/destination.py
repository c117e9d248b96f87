"""Where blocks go, as sources see it: a source has bytes, and a destination says where they belong.

Bytes come in two ways. What lies in this host's memory is *taken*: the destination copies it, writes it on, or sees
that it is in place already. For what lies elsewhere the destination makes a *landing*: addresses for whoever brings it,
and afterwards a settling, in which a buffer is copied on, or a slot's siblings are filled. So a source knows no layout,
and there is one class of source a kind of place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from transfer.plan import Piece, Want


class Resident(NamedTuple):
    """A whole block in this process's memory, and the checksum on record for it."""

    want: Want
    address: int
    checksum: bytes
    kept_by: tuple[memoryview, ...]
    """Views that keep it mapped."""


class Landing(NamedTuple):
    """Places for some of the blocks of a batch, by manifest row, good until their `with` block ends.

    Once the bytes are there `settle` is called, with the checksums that were taken on the way, if any, and the rows of
    those that did not come, which it leaves as they are. It returns the checksums of the blocks that are where they
    belong; one that came and that it leaves out is asked for with `Destination.checksum`.
    """

    pieces: Mapping[int, tuple[Piece, ...]]
    settle: Callable[[Mapping[int, bytes], Collection[int]], Mapping[int, bytes]]


class Destination(Protocol):
    """Where the blocks of a restore go. Called from several threads, for different blocks."""

    def take(self, blocks: Sequence[Resident]) -> Mapping[int, bytes]:
        """Bring in blocks that lie in this process's memory; returns what a settling does. Raises HotspareError."""
        ...

    def landings(self, wants: Sequence[Want], *, in_one_run: bool) -> Iterable[AbstractContextManager[Landing]]:
        """Places for these blocks, one landing after the other, each of which hides its blocks first.

        With `in_one_run` every block gets one run of host memory; without, pieces that a transfer engine can write to.
        """
        ...

    def checksum(self, want: Want) -> bytes:
        """The xxh3-128 of a block as it lies at the destination; hides it if that is not the one wanted.

        Raises HotspareError where it cannot be told.
        """
        ...

    def publish(self, want: Want, checksum: bytes) -> None:
        """The block is right: let it be found."""
        ...
