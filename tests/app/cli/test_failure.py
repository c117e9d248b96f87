"""How a failed command ends, whatever its stderr is."""

from __future__ import annotations

import pytest

from app.cli import failure
from shm.errors import HotspareError, InvalidInput


def test_wrong_use_and_failures_differ_in_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.tell(InvalidInput("bad\nand worse")) == 2
    assert failure.tell(HotspareError("gone")) == 1
    assert capsys.readouterr().err == "hotspare: bad\nhotspare: and worse\nhotspare: gone\n"


def test_who_asks_for_a_traceback_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSPARE_DEBUG", "1")
    with pytest.raises(HotspareError, match="gone"):
        failure.tell(HotspareError("gone"))
