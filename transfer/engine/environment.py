"""What Mooncake reads of the environment, put in order while an engine starts, and as it was found after that.

Mooncake has no other way to be told. It reads most variables when an engine starts and a few when its module is loaded
(0.3.13, seen with a `getenv` that tells), none later. A process that is not ours has engines of its own: with
MC_FORCE_TCP left in its environment, they would lose RDMA.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transfer.engine.protocol import TRANSFER_TIMEOUT_S

TCP_IO_THREADS_MAX = 8  # 16 cores: 22 GB/s with 8, 12 with 4, 3 by default
TCP_LANES_PER_PEER = 8

_one_at_a_time = threading.Lock()


def defaults(transport: str, host: str) -> dict[str, str]:
    """Mooncake's variables for an engine at `host`, an IP address, over `transport`; what the user has set wins."""
    threads = str(max(1, min(TCP_IO_THREADS_MAX, (os.cpu_count() or 2) // 2)))
    wanted = {
        "MC_LOG_LEVEL": "ERROR",
        "MC_TRANSFER_TIMEOUT": str(TRANSFER_TIMEOUT_S),
        "MC_NUM_TCP_IO_THREADS": threads,
        "MC_TCP_ENABLE_CONNECTION_POOL": "1",
        "MC_TCP_LANES_PER_PEER": str(TCP_LANES_PER_PEER),
    }
    if transport == "tcp":
        wanted["MC_FORCE_TCP"] = "1"  # with RDMA cards present, "tcp" alone still picks RDMA
    if ":" in host:
        wanted["MC_USE_IPV6"] = "1"  # read when the module is loaded; then no engine of the process speaks IPv4
    return wanted


@contextmanager
def engine_environment(transport: str, host: str) -> Iterator[None]:
    """The environment for an engine that is started, and the module loaded, within. Only one at a time."""
    with _one_at_a_time:
        ours = {name: value for name, value in defaults(transport, host).items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)
