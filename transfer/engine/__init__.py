"""The only way to peers' memory: what is needed of a transfer engine (`protocol`), Mooncake's (`mooncake`), one that
can be thrown away (`disposable`), and a double for tests and simulations (`double`).
"""

from transfer.engine.disposable import DisposableEngine
from transfer.engine.mooncake import MooncakeEngine
from transfer.engine.protocol import BATCH_NBYTES_MAX, ITEMS_PER_BATCH_MAX, Copy, TransferEngine, Watch, session_host

__all__ = [
    "BATCH_NBYTES_MAX",
    "ITEMS_PER_BATCH_MAX",
    "Copy",
    "DisposableEngine",
    "MooncakeEngine",
    "TransferEngine",
    "Watch",
    "session_host",
]
