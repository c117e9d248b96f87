"""SGLang's expert backup, replaced: `plugin` is found by SGLang, and puts the client here in place of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfer.sglang.client import HotspareBackupClient, run_expert_backup_manager

__all__ = ["HotspareBackupClient", "run_expert_backup_manager"]


def __getattr__(name: str) -> Any:
    """The client's, imported when first asked for: every process of SGLang imports the plugin, few need the client."""
    if name in __all__:
        from transfer.sglang import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
