"""An engine's side of a restore: `restorer` is what it uses, `ladder` the order in which sources are tried.

The only part of `transfer` that speaks HTTP (`control_plane`).
"""

from transfer.client.restorer import Restorer

__all__ = ["Restorer"]
