"""Stands for SGLang's kernels where there is no GPU: all may be imported, and none of them is called on a CPU."""

from collections.abc import Callable
from typing import Any

__version__ = "0.4.10"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    return call
