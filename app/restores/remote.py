"""A restore that another node does: it is sent there, and asked for there whenever somebody asks here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.cluster.membership import Peer
from app.cluster.peers import PeerClient, parsed
from app.documents import RestoreDocument, RestoreRequest
from app.errors import Conflict, LimitReached, NotFound, PeerFailed, Unavailable
from shm.errors import HotspareError, InvalidInput
from transfer.client.http import NodeRefused, NodeUnreachable
from transfer.progress import RestoreState

RETRY_AFTER_S = 5

_REFUSALS: Mapping[int, type[HotspareError]] = {404: NotFound, 409: Conflict, 422: InvalidInput, 503: Unavailable}


@dataclass(slots=True)
class RemoteRestore:
    """What its node last said is kept, for when it does not answer."""

    id: str
    url: str
    client: PeerClient
    last: RestoreDocument
    answers: bool = True
    """Whether its node did when it was last asked."""

    @classmethod
    def send(cls, client: PeerClient, peer: Peer, request: RestoreRequest, key: str | None) -> RemoteRestore:
        """Start it there. Raises Unavailable if the node does not answer, else what it refused, as our own refusal."""
        if peer.report is not None and peer.report.node_id != peer.node_id:  # it would send it on, maybe back to us
            raise Unavailable(f"node {peer.node_id} cannot be asked: {peer.conflict}")
        headers = {} if key is None else {"Idempotency-Key": key}
        body = request.model_dump(mode="json")
        try:
            answer = client.request("POST", f"{peer.url}/v1/restores", json=body, headers=headers)
            document = parsed(RestoreDocument, answer)
        except NodeUnreachable as error:
            raise Unavailable(f"node {peer.node_id} does not answer: {error}", retry_after_s=RETRY_AFTER_S) from error
        except NodeRefused as error:
            raise _as_said(error) from error
        return cls(document.id, peer.url, client, document)

    @property
    def is_over(self) -> bool:
        return self.last.state.is_final

    def document(self) -> RestoreDocument:
        """What its node says now; where it does not, what it last said, and why there is no news."""
        if self.is_over:
            return self.last
        try:
            self._ask("GET")
        except NodeRefused as error:
            if error.status != 404:
                return self._without_news(error)
            self.answers = True  # what it says of its others is news
            ended = {"state": RestoreState.FAILED, "error": "its node knows it no longer: it was restarted meanwhile"}
            self.last = self.last.model_copy(update=ended)
        except (NodeUnreachable, PeerFailed) as error:
            return self._without_news(error)
        return self.last

    def cancel(self) -> None:
        """Raises Unavailable if its node does not answer, PeerFailed if it refuses."""
        if self.is_over:
            return
        try:
            self._ask("POST", "/cancel")
        except NodeUnreachable as error:
            raise Unavailable(str(error), retry_after_s=RETRY_AFTER_S) from error
        except NodeRefused as error:
            raise PeerFailed(str(error)) from error

    def _ask(self, method: str, suffix: str = "") -> None:
        self.answers = False
        answer = self.client.request(method, f"{self.url}/v1/restores/{self.id}{suffix}")
        self.last = parsed(RestoreDocument, answer)
        self.answers = True

    def _without_news(self, error: Exception) -> RestoreDocument:
        return self.last.model_copy(update={"error": f"the node that does it does not answer now: {error}"})


def _as_said(error: NodeRefused) -> HotspareError:
    """The peer's own refusal, in our words where it is the caller's mistake."""
    detail = str(error.problem.get("detail") or error)
    if error.status == 429:
        return LimitReached(detail, retry_after_s=RETRY_AFTER_S)
    return _REFUSALS.get(error.status, PeerFailed)(detail)
