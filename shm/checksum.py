"""xxh3-128 over block bytes: 16 bytes, big-endian, as `xxh128sum` prints them."""

from __future__ import annotations

import xxhash

CHECKSUM_NBYTES = 16


def checksum(data: bytes | memoryview) -> bytes:
    """The checksum of a whole block. Releases the GIL on large buffers."""
    return xxhash.xxh3_128_digest(data)
