"""A transfer engine that can be thrown away in the middle: the only recall that a one-sided transfer has.

A read that was given up on completes when its peer wakes, minutes later, into whatever lies at that address then; a
write that a peer had begun goes on to its end, although the memory was unregistered meanwhile (both measured, 0.3.13
over TCP). Both end with the connections of the engine on our side, if these throw away what they have not sent
(`unsent`). So whoever reads from others, or lets others write, and has to say one day that nothing arrives any more,
does it through an engine of its own, and drops that.

Dropping takes most of a second of the process (Mooncake holds the GIL while it ends), and so does the next start.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from transfer.engine.protocol import Copy, TransferEngine, Watch
from transfer.engine.unsent import discarding
from transfer.errors import TransferFailed

DROP_WAIT_S = 60.0  # for calls under way, each of which the engine gives up by itself


class DisposableEngine:
    """See `transfer.engine.protocol.TransferEngine`. Starts an engine when one is needed; after `drop`, another one."""

    def __init__(self, start: Callable[[], TransferEngine]) -> None:
        """`start` raises EngineError where it cannot."""
        self._start = start
        self._engine: TransferEngine | None = None
        self._opened: list[tuple[int, int]] = []
        self._gone: list[weakref.ref[TransferEngine]] = []
        self._is_tainted = False
        self._is_dropping = False
        self._users = 0
        self._changed = threading.Condition()

    @contextmanager
    def _use(self) -> Iterator[TransferEngine]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_dropping)  # which ends: after DROP_WAIT_S at most
            if self._engine is None:
                self._engine = self._start()
                self._engine.register(self._opened)
            engine = self._engine
            self._users += 1
        try:
            yield engine
        except TransferFailed as error:
            self._is_tainted |= error.timed_out
            raise
        finally:
            del engine
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @property
    def session_id(self) -> str:
        """Of the engine that there is now: another one after `drop`."""
        with self._use() as engine:
            return engine.session_id

    @property
    def is_running(self) -> bool:
        """Whether an engine was started that was not dropped."""
        return self._engine is not None

    def register(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Open ranges, also to the engines that take this one's place."""
        wanted = list(ranges)
        with self._use() as engine:
            engine.register(wanted)
            self._opened += wanted

    def unregister(self, ranges: Iterable[tuple[int, int]]) -> None:
        wanted = set(ranges)
        with self._use() as engine:
            self._opened = [each for each in self._opened if each not in wanted]
            engine.unregister(wanted)

    def read(self, session_id: str, copies: Sequence[Copy], watch: Watch | None = None) -> None:
        with self._use() as engine:
            engine.read(session_id, copies, watch)

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        with self._use() as engine:
            engine.write(session_id, copies, within_s)

    def fence(self) -> None:
        """Drop the engine if a transfer with it was given up on, which might still arrive. Raises as `drop` does."""
        if self._is_tainted:
            self.drop()

    def drop(self) -> None:
        """Once this returns, nothing of what was asked of the engine, or of others by its leave, arrives any more.

        Waits for calls under way, and lets others that come meanwhile wait. Raises TransferFailed where one does not
        end, or somebody else has the engine still: then nothing is known, and it is to be called again.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_dropping)
            self._is_dropping = True
        try:
            self._drop()
        finally:
            with self._changed:
                self._is_dropping = False
                self._changed.notify_all()

    def _drop(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._users, DROP_WAIT_S):
                raise TransferFailed(f"a transfer has not ended within {DROP_WAIT_S:.0f} s", timed_out=True)
            engine, self._engine = self._engine, None
            if engine is not None:
                self._gone.append(weakref.ref(engine))
        with discarding() if self._is_tainted else nullcontext():
            del engine
            if self._are_alive():  # in a circle, or in the frames of an error that somebody keeps
                gc.collect()
        if self._are_alive():
            raise TransferFailed("the transfer engine is held by somebody, and what it had under way may still arrive")
        self._is_tainted = False

    def _are_alive(self) -> bool:
        """Whether one that was dropped, now or before, still is there."""
        self._gone = [ref for ref in self._gone if ref() is not None]
        return bool(self._gone)
