"""vLLM finds the load format by the package's entry point, and our lines in its log; with vLLM: tests/engines/vllm."""

from __future__ import annotations

import logging
import sys
import tomllib
import types
from collections.abc import Iterator

import pytest

from tests.processes import ROOT
from transfer.vllm import plugin
from transfer.vllm.model_loader import FromMemory


class Theirs:
    """vLLM's default loader."""


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """The load formats of a vLLM, which is a stand-in; our loggers are afterwards as they were."""
    known: dict[str, type] = {}

    def register_model_loader(load_format: str) -> object:
        return lambda loader: known.setdefault(load_format, loader)

    module = types.ModuleType(plugin.LOADERS)
    module.__dict__.update(DefaultModelLoader=Theirs, register_model_loader=register_model_loader)
    monkeypatch.setitem(sys.modules, plugin.LOADERS, module)
    ours = logging.getLogger("hotspare")
    before = list(ours.handlers), ours.level, ours.propagate
    yield known
    ours.handlers, ours.propagate = before[0], before[2]
    ours.setLevel(before[1])


def test_the_entry_point_makes_the_load_format_known(loaders: dict[str, type]) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["vllm.general_plugins"] == {"hotspare": f"{plugin.__name__}:{plugin.register.__name__}"}
    plugin.register()
    assert issubclass(loaders["hotspare"], FromMemory)
    assert issubclass(loaders["hotspare"], Theirs)


def test_what_we_say_stands_in_vllms_log_however_late_that_is_configured(
    loaders: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    plugin.register()
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "level", logging.INFO)
    logging.getLogger("hotspare.loader").info("loaded %d tensors", 7)
    logging.getLogger("hotspare.loader").debug("and more")
    assert said == ["loaded 7 tensors"]


def test_loggers_that_somebody_configured_are_left_alone(loaders: dict[str, type]) -> None:
    ours = logging.getLogger("hotspare")
    ours.setLevel(logging.ERROR)
    plugin.register()
    assert (ours.handlers, ours.level) == ([], logging.ERROR)
