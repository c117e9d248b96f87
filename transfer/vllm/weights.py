"""What vLLM's loader is handed: the tensors of a checkpoint by their names, from memory first.

A start never fails for a node's sake, so there is a last resort behind the Loader's own: vLLM's reading of the files,
in whatever formats and from wherever it reads them. It gives what was not handed out until then, whatever went wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shm.errors import InvalidInput
from transfer.client.bound_slots import CPU
from transfer.client.loader import EXPERTS_ALONE, Loader, Named, Wanted
from transfer.client.restorer import Restorer
from transfer.errors import RestoreError, told

DEFAULT_URL = "http://127.0.0.1:8470"
OPTIONS = ("url", "model", "namespace", "node")

_log = logging.getLogger("hotspare.vllm")


class Pass(NamedTuple):
    """What to bring to a device: all by default."""

    device: str
    wanted: Wanted | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the weights are: as for a Loader. The token is that of HOTSPARE_TOKEN."""

    url: str
    model: str | None
    namespace: str
    node: str | None
    transport: str

    @classmethod
    def take(cls, extra: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """Ours of `--model-loader-extra-config`, or of the environment; and what is left for vLLM's own loader.

        Raises InvalidInput for one of ours that is no text.
        """
        ours = {name: extra[name] for name in OPTIONS if extra.get(name) is not None}
        for name, value in ours.items():
            if not isinstance(value, str):
                raise InvalidInput(f'model loader extra config: {name} is {value!r}: give text, as {{"{name}": "…"}}')
        settings = cls(
            url=ours.get("url") or os.environ.get("HOTSPARE_URL") or DEFAULT_URL,
            model=ours.get("model"),
            namespace=ours.get("namespace", "default"),
            node=ours.get("node"),
            transport=os.environ.get("HOTSPARE_TRANSPORT") or "tcp",
        )
        return settings, {name: value for name, value in extra.items() if name not in OPTIONS}

    def loader(self, checkpoint: Path | None) -> Loader:
        """A Loader of the checkpoint in that directory."""
        return Loader(self.url, checkpoint=checkpoint, **self._around())

    def restorer(self, checkpoint: Path | None) -> Restorer:
        """A Restorer, with that directory as the last resort."""
        return Restorer(self.url, checkpoint=checkpoint, **self._around())

    def _around(self) -> dict[str, Any]:
        names = {"model": self.model, "namespace": self.namespace, "node": self.node}
        return {**names, "transport": self.transport}


def weights(
    settings: Settings,
    checkpoint: Path | None,
    passes: Sequence[Pass],
    otherwise: Callable[[], Iterator[Named]],
    tell_content: Callable[[str | None], None],
) -> Iterator[Named]:
    """Every tensor that is wanted, one pass after the other, each once; `tell_content` is told of which content.

    What could not be had is taken of `otherwise`, which is vLLM's own reading, and begun only then; it raises what
    vLLM raises where it finds no files either.
    """
    given: set[str] = set()
    try:
        with settings.loader(checkpoint) as loader:
            for each in passes:
                for name, tensor in _brought(loader, each, given):
                    given.add(name)
                    yield name, tensor
                if not loader.report.is_whole:
                    raise RestoreError(EXPERTS_ALONE)
            tell_content(loader.content_digest)
        return
    except Exception as error:  # whatever is wrong here, an engine must start
        why = f"Hotspare gave {len(given)} tensors, and not the others: {told(error)}"
    _log.warning("%s; vLLM reads what is left itself", why)
    try:
        for name, tensor in otherwise():
            if name not in given:
                yield name, tensor
    except Exception as error:
        error.add_note(why)
        raise


def _brought(loader: Loader, brought: Pass, given: Collection[str]) -> Iterator[Named]:
    """One pass; what its device cannot take in host memory, for want of memory, say."""
    if brought.device != CPU:
        try:
            yield from loader.tensors(brought.wanted, device=brought.device)
            return
        except Exception as error:
            _log.warning("what is left is handed out in host memory, since on %s: %s", brought.device, told(error))
    for name, tensor in loader.tensors(brought.wanted, device=CPU):
        if name not in given:
            yield name, tensor
