"""What Mooncake is told through the environment, and that a process finds its own as it left it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from transfer.engine.environment import defaults, engine_environment

ROOT = Path(__file__).parents[3]
START = """
import json, os, sys
os.environ["MC_TCP_LANES_PER_PEER"] = "3"
before = dict(os.environ)
from transfer.engine import MooncakeEngine
engine = MooncakeEngine(sys.argv[1])
another = MooncakeEngine(sys.argv[1])
print(json.dumps({"same": dict(os.environ) == before, "session": engine.session_id}), flush=True)
os._exit(0)
"""


def test_what_the_user_set_stays_and_the_rest_is_gone_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in defaults("tcp", "127.0.0.1"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "33")
    before = dict(os.environ)
    with engine_environment("rdma", "127.0.0.1"):
        assert os.environ["MC_TRANSFER_TIMEOUT"] == "33"
        assert os.environ["MC_TCP_ENABLE_CONNECTION_POOL"] == "1"
        assert "MC_FORCE_TCP" not in os.environ
    with suppress(ZeroDivisionError), engine_environment("tcp", "127.0.0.1"):
        assert os.environ["MC_FORCE_TCP"] == "1"
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_only_an_ipv6_address_asks_for_ipv6() -> None:
    assert "MC_USE_IPV6" not in defaults("tcp", "127.0.0.1")
    assert defaults("tcp", "fd91::1")["MC_USE_IPV6"] == "1"


@pytest.mark.parametrize(("host", "session"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_a_process_that_starts_engines_keeps_its_environment(host: str, session: str) -> None:
    done = subprocess.run([sys.executable, "-c", START, host], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["same"]
    assert said["session"].startswith(session)
