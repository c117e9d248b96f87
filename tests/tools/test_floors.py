"""What pins an environment to the floors."""

from __future__ import annotations

from tools.floors import name_of, pins

PYPROJECT = """
[project]
dependencies = ["fastapi>=0.115", "posix-ipc>=1.2", "torch>=2.6", "typer>=0.19,!=0.20.0"]
[project.optional-dependencies]
cpu = ["mooncake-transfer-engine-non-cuda>=0.3.13"]
"""
CONSTRAINTS = """\
# a comment
fastapi==0.165.0
hypothesis==6.1
psutil==7.2
pytest-asyncio==1.5.0
pytest-timeout==2.4.0
pytest-xdist==3.8.0
pytest==9.2.0
torch==2.13.0
"""


def test_dependencies_are_at_their_floors_and_torch_and_test_tools_as_pinned() -> None:
    lines = set(pins(PYPROJECT, CONSTRAINTS))
    assert lines >= {"fastapi==0.115", "posix-ipc==1.2", "typer==0.19", "mooncake-transfer-engine-non-cuda==0.3.13"}
    assert lines >= {"torch==2.13.0", "pytest==9.2.0"}, "never an older torch, which may bring CUDA"
    assert all("==" in line for line in lines)


def test_names_are_compared_as_packages_are() -> None:
    assert name_of("posix_ipc==1.3") == name_of("Posix-IPC>=1.2") == "posix-ipc"
