"""Reading a header while its owner writes it: what is torn is read again, and what stays torn is corrupt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from shm.errors import SegmentCorrupt
from shm.header import Header
from shm.layout import HEADER_NBYTES
from shm.lookup import HEADER_READS_MAX, open_header, read_header
from shm.segment import Segment


@pytest.fixture
def torn(sealed: Callable[..., Segment]) -> Iterator[tuple[int, Header, bytes]]:
    """An open object whose header pages are both half old and half new, that header, and its page once it is whole."""
    segment = sealed()
    fd = os.open(f"/dev/shm/{segment.name.object_name}", os.O_RDWR)
    segment.record_origin(bytes(range(16)))
    page = segment.header.pack()
    for at in (0, HEADER_NBYTES):
        os.pwrite(fd, page[128:256][::-1], at + 128)
    yield fd, segment.header, page
    os.close(fd)


@pytest.mark.parametrize("looks", [1, HEADER_READS_MAX - 1])
def test_a_header_is_read_again_while_its_owner_is_in_the_middle_of_it(
    torn: tuple[int, Header, bytes], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, header, page = torn
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == looks:
            os.pwrite(fd, page, HEADER_NBYTES)  # the owner has ended

    monkeypatch.setattr("shm.lookup.time.sleep", wait)
    assert read_header(fd, header.name.object_name) == header
    assert len(waits) == looks
    assert min(waits) > 0


def test_a_header_that_stays_torn_is_corrupt_after_a_few_looks(
    torn: tuple[int, Header, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, header, _ = torn
    waits: list[float] = []
    monkeypatch.setattr("shm.lookup.time.sleep", waits.append)
    with pytest.raises(SegmentCorrupt, match="does not match its checksum"):
        open_header(header.name.object_name)
    assert len(waits) == HEADER_READS_MAX - 1
