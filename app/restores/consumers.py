"""The consumers of this node: engine processes that said where their expert slots lie in their own memory.

    put ──▶ CURRENT ──▶ expired, removed, or replaced by another put: over

A push holds its consumer, and only a current one can be held. A peer that pushes has a lease besides, which outlives
the answer that we wait for (`app.restores.lease`). Taking a registration back waits for the pushes under way and for
the leases, so that an engine may use its memory for something else once DELETE, or the next PUT, has answered.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.errors import Conflict, LimitReached, NotFound, Unavailable
from app.restores.lease import LEASE_S, MARGIN_S, Grants, boot_time
from transfer.push.table import PushTable

CONSUMERS_MAX = 128  # a node has some 8 GPUs, and a rank of each at a time
QUIET_WAIT_S = 30.0  # for pushes under way and leases; a consumer that stopped answering holds a push for 10
RETRY_AFTER_S = 5


@dataclass(slots=True, eq=False)
class Consumer:
    """One registration. `error` says why its memory last could not be written; None if it could, or was not tried."""

    id: str
    epoch: int
    """Another one for each registration: it rises, also from one life of the node to the next."""
    table: PushTable
    manifest_digest: str
    content_digest: str
    """Of the weights that its slots hold: of no others a byte is written."""
    ttl_s: float
    expires_s: float
    registered_at: float = field(default_factory=time.time)
    error: str | None = None
    pushes: int = 0
    grants: Grants = field(default_factory=Grants)
    is_over: bool = False


class ConsumerStore:
    """Every registration that has not expired. Thread-safe. `clock` counts seconds, from anywhere."""

    def __init__(self, clock: Callable[[], float] = boot_time, *, earlier_leases_s: float = LEASE_S + MARGIN_S) -> None:
        """`earlier_leases_s` is for how long from now peers may write by leave of an earlier life of this node, which
        may have ended a moment ago, and of which nothing is known any more."""
        self._clock = clock
        self._earlier_until_s = clock() + earlier_leases_s
        self._epochs = itertools.count(time.time_ns())
        self._consumers: dict[str, Consumer] = {}
        self._changed = threading.Condition()
        self._is_stopping = False

    def stop(self) -> None:
        """Wait for no push any more: who waits is told that it may still be written to."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def put(
        self, consumer_id: str, table: PushTable, manifest_digest: str, content_digest: str, ttl_s: float
    ) -> tuple[Consumer, bool]:
        """Register it, in place of an earlier registration of that id; whether there was none.

        Raises LimitReached, or Unavailable while the earlier one is being written to.
        """
        epoch = next(self._epochs)
        expires_s = self._clock() + ttl_s
        consumer = Consumer(consumer_id, epoch, table, manifest_digest, content_digest, ttl_s, expires_s)
        with self._changed:
            self._forget_expired()
            if is_new := consumer_id not in self._consumers:
                self._check_room()
            earlier = None
            while self._consumers.get(consumer_id) is not earlier:  # waiting lets others in
                earlier = self._consumers[consumer_id]
                self._end(earlier)
            self._consumers[consumer_id] = consumer
        return consumer, is_new

    def _check_room(self) -> None:
        if len(self._consumers) >= CONSUMERS_MAX:
            raise LimitReached(
                f"{CONSUMERS_MAX} consumers are registered here: remove one, or wait until one expires",
                retry_after_s=RETRY_AFTER_S,
            )

    def get(self, consumer_id: str) -> Consumer:
        """A current registration. Raises NotFound."""
        with self._changed:
            self._forget_expired()
            consumer = self._consumers.get(consumer_id)
        if consumer is None or consumer.is_over or not self.seconds_left(consumer):
            raise NotFound(
                f"no consumer {consumer_id!r} is registered with this node, or it expired: its engine registers it "
                f"with PUT /v1/consumers/{consumer_id}; ask the node that it did so with"
            )
        return consumer

    def renew(self, consumer_id: str) -> Consumer:
        """Let it live for its `ttl_s` from now. Raises NotFound."""
        consumer = self.get(consumer_id)
        consumer.expires_s = self._clock() + consumer.ttl_s
        return consumer

    def remove(self, consumer_id: str) -> None:
        """End it. Raises NotFound, or Unavailable while it is being written to; it is then over all the same."""
        with self._changed:
            self._forget_expired()
            consumer = self._consumers.get(consumer_id)
            if consumer is None:
                raise NotFound(f"no consumer {consumer_id!r} is registered with this node: there is nothing to remove")
            self._end(consumer)
            if self._consumers.get(consumer_id) is consumer:
                del self._consumers[consumer_id]

    def all(self) -> list[Consumer]:
        """The current ones, by id."""
        with self._changed:
            self._forget_expired()
            return [consumer for _, consumer in sorted(self._consumers.items()) if not consumer.is_over]

    def seconds_left(self, consumer: Consumer) -> float:
        return max(0.0, consumer.expires_s - self._clock())

    @contextmanager
    def hold(self, consumer: Consumer) -> Iterator[None]:
        """Keep a registration from being taken back for as long as a push lasts. Raises Conflict if it is over."""
        with self._changed:
            if consumer.is_over or self.seconds_left(consumer) <= 0:
                raise Conflict(f"the registration of consumer {consumer.id!r} has ended: nothing more is written to it")
            consumer.pushes += 1
        try:
            yield
        finally:
            with self._changed:
                consumer.pushes -= 1
                self._changed.notify_all()

    def lease(self, consumer_id: str, epoch: int, push_id: str) -> float:
        """Let a push of a peer's write to it: for how many seconds from now. Asked again, for as many more.

        Raises NotFound where it is not registered, Conflict where it was registered anew, or is being taken back, or
        the push was recalled.
        """
        with self._changed:
            consumer = self.get(consumer_id)
            if consumer.epoch != epoch:
                raise Conflict(
                    f"consumer {consumer_id!r} was registered anew since: nothing is written for the old one"
                )
            seconds = min(LEASE_S, self.seconds_left(consumer))
            consumer.grants.give(push_id, seconds, self._clock())
            return seconds

    def end_lease(self, consumer: Consumer, push_id: str) -> None:
        """A peer's push has said that it ended."""
        with self._changed:
            consumer.grants.end(push_id)
            self._changed.notify_all()

    def withdraw_lease(self, consumer: Consumer, push_id: str) -> None:
        """A peer's push is wanted no longer: it begins nothing more once the time is over that it was given."""
        with self._changed:
            consumer.grants.withdraw(push_id)

    def _forget_expired(self) -> None:
        for consumer in list(self._consumers.values()):
            if self.seconds_left(consumer) <= 0 and self._is_quiet(consumer):
                consumer.is_over = True
                del self._consumers[consumer.id]

    def _is_quiet(self, consumer: Consumer) -> bool:
        """Whether nobody writes to it any more."""
        return not consumer.pushes and not self._leases_left_s(consumer)

    def _leases_left_s(self, consumer: Consumer) -> float:
        """Seconds until every lease to write to it has run out or was ended."""
        now = self._clock()
        return max(consumer.grants.left_s(now), self._earlier_until_s - now, 0.0)

    def _end(self, consumer: Consumer) -> None:
        """Let no push begin, and wait for those under way, and for leases to end or to run out."""
        consumer.is_over = True
        give_up_at = self._clock() + QUIET_WAIT_S
        while not self._is_quiet(consumer) and not self._is_stopping and (left_s := give_up_at - self._clock()) > 0:
            self._changed.wait(min(left_s, self._leases_left_s(consumer) or left_s))
        if not self._is_quiet(consumer):
            raise Unavailable(
                f"consumer {consumer.id!r} is still being written to: no new push begins; ask again before its memory "
                "is used for something else",
                retry_after_s=RETRY_AFTER_S,
            )
