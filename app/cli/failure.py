"""How a command ends that failed: a line or several on stderr and an exit code, and no traceback unless asked for."""

from __future__ import annotations

import os

from app.terminal.streams import say
from shm.errors import HotspareError, InvalidInput

FAILED = 1
WRONG_USE = 2
DEBUG_VARIABLE = "HOTSPARE_DEBUG"


def tell(error: Exception) -> int:
    """Say on stderr what went wrong; the exit code. Raises the error itself where HOTSPARE_DEBUG asks for that."""
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    for line in _explain(error).splitlines():
        say(f"hotspare: {line}", err=True)
    return WRONG_USE if isinstance(error, InvalidInput) else FAILED


def _explain(error: Exception) -> str:
    if isinstance(error, HotspareError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; {DEBUG_VARIABLE}=1 shows where"
