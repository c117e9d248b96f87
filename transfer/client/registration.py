"""An engine's slots as a consumer of its node: registered, and kept so for as long as they are bound.

put ──▶ renewed every third of its time ──▶ put again where the node forgot it ──▶ end: taken back
                        └──▶ removed, by whoever may: it stays so

A node that was started again has forgotten it, and so has one that did not hear of us for as long as it keeps it. One
that has done neither was told to remove it: who was told that nothing writes any more is not to be made a liar.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from shm.errors import HotspareError
from transfer.client.control_plane import ControlPlane
from transfer.client.http import NodeRefused, NodeUnreachable
from transfer.loop import Loop

RENEWALS_PER_TTL = 3  # so that two may be lost
RENEW_INTERVAL_S_MAX = 60.0
NOT_FOUND = 404

_log = logging.getLogger("hotspare.restorer")


class Registration:
    """One registration, renewed by a thread of its own until `end`."""

    def __init__(
        self,
        control: ControlPlane,
        consumer_id: str,
        document: Mapping[str, Any],
        on_removed: Callable[[], None] = lambda: None,
    ) -> None:
        """`document` is the body of the PUT; `on_removed` is called where somebody else had it removed.

        Raises NodeUnreachable or NodeRefused, and is then not there.
        """
        self.consumer_id = consumer_id
        self.ttl_s = float(document["ttl_s"])
        self._control = control
        self._document = document
        self._interval_s = min(self.ttl_s / RENEWALS_PER_TTL, RENEW_INTERVAL_S_MAX)
        self._last_said: str | None = None
        self._on_removed = on_removed
        self._put()
        self._loop = Loop("hotspare-consumer", self._keep, first_after_s=self._interval_s)
        self._loop.start()

    def end(self) -> None:
        """Take it back: once this returns, no new write begins. Raises nothing: a node that is gone writes no more."""
        self._loop.stop()
        try:
            self._control.remove_consumer(self.consumer_id)
        except NodeRefused as error:
            if error.status != NOT_FOUND:
                _log.warning("consumer %s: %s", self.consumer_id, error)
        except NodeUnreachable as error:
            _log.warning("consumer %s is left to expire: %s", self.consumer_id, error)

    def _put(self) -> None:
        self._control.put_consumer(self.consumer_id, self._document)
        self._renewed_at_s = boot_time_s()
        try:
            self._start = self._start_of_node()
        except NodeUnreachable:  # it has just answered; if it is not known, it counts as another one
            self._start = ("", "")

    def _start_of_node(self) -> tuple[str, str]:
        """Another one after each start of the node."""
        said = self._control.node(self._control.urls[0])
        return said.session_id, said.started_at

    def _keep(self) -> float | None:
        said = None
        try:
            if self._is_removed():
                _log.warning("consumer %s was removed by somebody else, and is not registered again", self.consumer_id)
                self._on_removed()
                return None
        except HotspareError as error:
            said = str(error)
        if said is not None and said != self._last_said:
            _log.warning("consumer %s is not renewed: %s", self.consumer_id, said)
        self._last_said = said
        return self._interval_s

    def _is_removed(self) -> bool:
        """Renew it, or put it again where its node forgot it; whether it was neither, since it had been removed."""
        try:
            self._control.renew_consumer(self.consumer_id)
            self._renewed_at_s = boot_time_s()
        except NodeRefused as error:
            if error.status != NOT_FOUND:
                raise
            if self._start_of_node() == self._start and boot_time_s() - self._renewed_at_s < self.ttl_s:
                return True
            self._put()
            _log.info("consumer %s is registered again", self.consumer_id)
        return False


def boot_time_s() -> float:
    """Runs on while this process is stopped, and while the machine is suspended: so does the node's time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
