"""vLLM's plugin of Hotspare: where this package is installed, vLLM finds it by its entry point in all its processes.

It makes `--load-format hotspare` known, and changes nothing for whoever does not ask for that.
"""

from __future__ import annotations

import importlib
import logging

LOAD_FORMAT = "hotspare"
LOADERS = "vllm.model_executor.model_loader"


def register() -> None:
    """Have vLLM load with our loader where that format is asked for, and let our log lines stand beside its own."""
    from transfer.vllm.model_loader import model_loader

    loaders = importlib.import_module(LOADERS)
    loaders.register_model_loader(LOAD_FORMAT)(model_loader(loaders.DefaultModelLoader))
    _share_log()


class _ToVllm(logging.Handler):
    """Hands what our loggers say to vLLM's, however and whenever that is configured: it configures no other."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _share_log() -> None:
    """Have our loggers speak where vLLM's do, unless somebody has configured them."""
    ours = logging.getLogger("hotspare")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.addHandler(_ToVllm())
        ours.setLevel(logging.DEBUG)  # vLLM's own level is what counts
        ours.propagate = False
