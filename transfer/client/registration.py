"""An engine's slots as a consumer of its node: registered, and kept so for as long as they are bound.

put ──▶ renewed every third of its time ──▶ put again where the node forgot it ──▶ end: taken back
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
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

    def __init__(self, control: ControlPlane, consumer_id: str, document: Mapping[str, Any]) -> None:
        """`document` is the body of the PUT. Raises NodeUnreachable or NodeRefused, and is then not there."""
        self.consumer_id = consumer_id
        self.ttl_s = float(document["ttl_s"])
        self._control = control
        self._document = document
        self._interval_s = min(self.ttl_s / RENEWALS_PER_TTL, RENEW_INTERVAL_S_MAX)
        self._last_said: str | None = None
        control.put_consumer(consumer_id, document)
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

    def _keep(self) -> float:
        said = None
        try:
            self._renew()
        except HotspareError as error:
            said = str(error)
        if said is not None and said != self._last_said:
            _log.warning("consumer %s is not renewed: %s", self.consumer_id, said)
        self._last_said = said
        return self._interval_s

    def _renew(self) -> None:
        try:
            self._control.renew_consumer(self.consumer_id)
        except NodeRefused as error:
            if error.status != NOT_FOUND:
                raise
            self._control.put_consumer(self.consumer_id, self._document)  # its node was restarted, and remembers none
            _log.info("consumer %s is registered again", self.consumer_id)
