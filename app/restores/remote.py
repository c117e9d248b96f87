"""A restore that another node does: it is sent there, and asked for there whenever somebody asks here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from app.cluster.membership import Peer
from app.cluster.peers import PeerClient, parsed
from app.documents import RestoreDocument, RestoreRequest
from app.errors import Conflict, LimitReached, NotFound, PeerFailed, Unavailable
from shm.errors import HotspareError, InvalidInput
from transfer.client.http import NodeRefused, NodeUnreachable, quoted
from transfer.progress import RestoreState

RETRY_AFTER_S = 5
DOCUMENT_NBYTES_MAX = 1 << 20  # with 1,000 failed blocks and what each source said of them

_REFUSALS: Mapping[int, type[HotspareError]] = {404: NotFound, 409: Conflict, 422: InvalidInput, 503: Unavailable}


@dataclass(slots=True)
class RemoteRestore:
    """What its node last said is kept, for when it does not answer."""

    id: str
    url: str
    client: PeerClient
    last: RestoreDocument
    silence: str | None = None
    """Why its node did not answer when it was last asked; None if it did."""

    @classmethod
    def send(cls, client: PeerClient, peer: Peer, request: RestoreRequest, key: str | None) -> RemoteRestore:
        """Start it there. Raises Unavailable if the node does not answer, else what it refused, as our own refusal."""
        url = f"{peer.url}/v1/restores"
        if peer.report is not None and peer.report.node_id != peer.node_id:  # it would send it on, maybe back to us
            raise Unavailable(f"node {peer.node_id} cannot be asked: {peer.conflict}")
        headers = {} if key is None else {"Idempotency-Key": key}
        body = request.model_dump(mode="json")
        try:
            answer = client.request("POST", url, json=body, headers=headers, nbytes_max=DOCUMENT_NBYTES_MAX)
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
        self.refresh()
        return self.told()

    def told(self) -> RestoreDocument:
        """What its node last said."""
        if self.silence is None:
            return self.last
        return self.last.model_copy(update={"error": f"the node that does it does not answer now: {self.silence}"})

    def refresh(self) -> None:
        """Ask its node how far it is, if it was not over the last time."""
        if self.is_over:
            return
        try:
            self._ask("GET")
        except NodeRefused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                self.silence = str(error)
                return
            ended = {"state": RestoreState.FAILED, "error": "its node knows it no longer: it was restarted meanwhile"}
            self.last = self.last.model_copy(update=ended)
            self.silence = None  # what it says of its others is news
        except (NodeUnreachable, PeerFailed) as error:
            self.silence = str(error)

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
        url = f"{self.url}/v1/restores/{quoted(self.id)}{suffix}"
        document = parsed(RestoreDocument, self.client.request(method, url, nbytes_max=DOCUMENT_NBYTES_MAX))
        if document.id != self.id:
            raise PeerFailed(f"{url} answers with restore {document.id!r}: is it of another version?")
        self.last, self.silence = document, None


def _as_said(error: NodeRefused) -> HotspareError:
    """The peer's own refusal, in our words where it is the caller's mistake."""
    detail = str(error.problem.get("detail") or error)
    if error.status == 429:
        return LimitReached(detail, retry_after_s=RETRY_AFTER_S)
    return _REFUSALS.get(error.status, PeerFailed)(detail)
