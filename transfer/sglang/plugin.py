"""SGLang's plugin of Hotspare: where this package is installed, SGLang 0.5.12 and later find it by its entry point.

Each of SGLang's processes calls `register` before it does anything else. Without HOTSPARE_URL nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

HOOK_REGISTRY = "sglang.srt.plugins.hook_registry"
CLIENT = "sglang.srt.elastic_ep.expert_backup_client.ExpertBackupClient"
MANAGER = "sglang.srt.elastic_ep.expert_backup_manager.run_expert_backup_manager"
WEIGHTS = "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator"
ALL_WEIGHTS = "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"  # what updated weights in releases without an updater


def register() -> None:
    """Have SGLang construct `HotspareBackupClient` as its backup client, start no backup process, and load weights from
    memory.
    """
    if not os.environ.get("HOTSPARE_URL"):
        return
    from transfer.sglang.client import HotspareBackupClient, run_expert_backup_manager
    from transfer.sglang.weights import load_from_memory, reload_from_memory, remember_model

    hooks = importlib.import_module(HOOK_REGISTRY)
    hooks.HookRegistry.register(CLIENT, HotspareBackupClient, hooks.HookType.REPLACE)
    hooks.HookRegistry.register(MANAGER, run_expert_backup_manager, hooks.HookType.REPLACE)
    hooks.HookRegistry.register(WEIGHTS, load_from_memory, hooks.HookType.AROUND)
    hooks.HookRegistry.register(ALL_WEIGHTS, remember_model, hooks.HookType.AROUND)
    updater = f"{UPDATER}.WeightUpdater" if _is_there(UPDATER) else RUNNER
    hooks.HookRegistry.register(f"{updater}.update_weights_from_disk", reload_from_memory, hooks.HookType.AROUND)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # nor is the package that it would be in
        return False
