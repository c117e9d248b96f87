"""Prints requirements at the lowest versions that pyproject.toml names: `python tools/floors.py > FILE`.

Each dependency of a node, and of the transfer engine's extra, is at its floor; what runs tests, and torch, at what
constraints.txt says: a test tool's floor promises users nothing, and the index may serve an older torch only with
several GB of CUDA. Everything else is what pip finds that fits. The standard library only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
AS_CONSTRAINED = ("torch",)
TEST_TOOLS = ("hypothesis", "psutil", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist")


def name_of(requirement: str) -> str:
    """As packages are compared: `posix_ipc` and `posix-ipc` are one."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]).lower()


def pins(pyproject: str, constraints: str) -> Iterator[str]:
    """One line a package, from the texts of the two files."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    pinned = {name_of(line): line for line in constraints.splitlines() if "==" in line}
    for requirement in (*project["dependencies"], *extras["cpu"]):
        name = name_of(requirement)
        yield pinned[name] if name in AS_CONSTRAINED else requirement.split(",")[0].replace(">=", "==")
    yield from (pinned[name] for name in TEST_TOOLS)


if __name__ == "__main__":
    for line in pins((ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text()):
        print(line)  # noqa: T201
