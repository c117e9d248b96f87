"""SGLang's plugin of Hotspare: where this package is installed, SGLang 0.5.12 and later find it by its entry point.

Each of SGLang's processes calls `register` before it does anything else. Without HOTSPARE_URL nothing is changed.
"""

from __future__ import annotations

import importlib
import os

HOOK_REGISTRY = "sglang.srt.plugins.hook_registry"
CLIENT = "sglang.srt.elastic_ep.expert_backup_client.ExpertBackupClient"
MANAGER = "sglang.srt.elastic_ep.expert_backup_manager.run_expert_backup_manager"


def register() -> None:
    """Have SGLang construct `HotspareBackupClient` as its backup client, and start no backup process."""
    if not os.environ.get("HOTSPARE_URL"):
        return
    from transfer.sglang.client import HotspareBackupClient, run_expert_backup_manager

    hooks = importlib.import_module(HOOK_REGISTRY)
    hooks.HookRegistry.register(CLIENT, HotspareBackupClient, hooks.HookType.REPLACE)
    hooks.HookRegistry.register(MANAGER, run_expert_backup_manager, hooks.HookType.REPLACE)
