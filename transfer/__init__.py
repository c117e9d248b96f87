"""Moving bytes: from memory, peers and disk into segments and engines' own tensors.

from transfer import Restorer
restorer = Restorer("http://127.0.0.1:8470")
restorer.bind(slots)
report = restorer.restore()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.client.restorer import Restorer

__all__ = ["Restorer"]


def __getattr__(name: str) -> Any:
    """`Restorer`, imported when it is first asked for: a node never needs its HTTP client."""
    if name == "Restorer":
        from transfer.client.restorer import Restorer

        return Restorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
