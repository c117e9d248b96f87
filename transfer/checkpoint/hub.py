"""Models by their name on the Hugging Face hub: engines are told such names, and what was downloaded is on this host.

The library that keeps that cache is the engine's. It is asked where the files are, and never to download any.
"""

from __future__ import annotations

import importlib
from pathlib import Path


def hub_directory(name: str, revision: str | None) -> Path | None:
    """What was downloaded of a model of the Hugging Face hub, in its cache on this host; None without any."""
    try:
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # whatever is wrong with it, it has no files for us
        return None
