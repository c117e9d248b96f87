"""Moving bytes: from memory, peers and disk into segments and engines' own tensors.

from transfer import Restorer
restorer = Restorer("http://127.0.0.1:8470")
restorer.bind(slots)
report = restorer.restore()

from transfer import Loader
tensors = Loader("http://127.0.0.1:8470", checkpoint=directory).load(device="cuda:0")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.client.loader import Loader
    from transfer.client.restorer import Restorer

__all__ = ["Loader", "Restorer"]


def __getattr__(name: str) -> Any:
    """`Restorer` and `Loader`, imported when they are first asked for: a node never needs their HTTP client."""
    if name == "Restorer":
        from transfer.client.restorer import Restorer

        return Restorer
    if name == "Loader":
        from transfer.client.loader import Loader

        return Loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
