"""What is Mooncake's own: how it starts, what it answers, what it lacks. What every engine does: test_conformance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from transfer.engine import Copy, MooncakeEngine
from transfer.engine import mooncake as mooncake_module
from transfer.errors import EngineMissing, EngineRefused, TransferFailed

ROOT = Path(__file__).parents[3]


class Failing:
    """Mooncake as it answers when it fails in ways that loopback cannot show: it will not start, or gives up late."""

    TransferEngine = property(lambda self: lambda: self)

    def initialize(self, *_: object) -> int:
        return -7

    def get_rpc_port(self) -> int:
        return 15_333

    def __init__(self, status: int = -1) -> None:
        self._status = status

    def batch_transfer_async_read(self, *_: object) -> int:
        return 33

    def transfer_check_status(self, batch: int) -> int:
        return self._status


def test_an_engine_that_does_not_start_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_module, "_mooncake", Failing)
    with pytest.raises(EngineRefused, match=r"192\.0\.2\.33 over rdma \(code -7\)"):
        MooncakeEngine("192.0.2.33", "rdma")


@pytest.mark.parametrize(
    ("status", "timed_out"), [(0, True), (-2, True), (-1, False)], ids=["under way", "given up", "failed"]
)
def test_a_copy_that_has_not_ended_in_time_warns_of_late_bytes(
    monkeypatch: pytest.MonkeyPatch, status: int, timed_out: bool
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "0.033")
    with pytest.raises(TransferFailed) as failed:
        MooncakeEngine.wrap(Failing(status), "127.0.0.1").read("127.0.0.1:33", [Copy(1, 1, 33)])
    assert failed.value.timed_out is timed_out


# -- without Mooncake ----------------------------------------------------------------------------------------


def without(statement: str) -> str:
    """What a fresh process says of an engine after `statement`."""
    script = f"""
import sys
{statement}
from transfer.engine import MooncakeEngine
try:
    MooncakeEngine("127.0.0.1")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_wheel_says_what_to_install() -> None:
    hide = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mooncake":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
    said = without(hide)
    assert said.startswith(EngineMissing.__name__)
    assert "hotspare[cpu]" in said
    assert "[cuda12]" in said


def test_a_wheel_that_does_not_load_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    (tmp_path / "mooncake" / "engine.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    said = without(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert said.startswith(EngineMissing.__name__)
    assert "libcudart.so.12" in said
    assert "libibverbs1" in said
