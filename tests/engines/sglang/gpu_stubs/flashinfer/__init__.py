"""Stands for flashinfer where it is not installed: every name and module of it may be imported, and none is called."""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

__version__ = "0.0"


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"flashinfer's {name} has no stand-in")

    return type(name, (), {"__init__": call}) if name[:1].isupper() else call


class _Everything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.startswith("flashinfer."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = _missing  # type: ignore[method-assign]


sys.meta_path.append(_Everything())
__getattr__ = _missing
