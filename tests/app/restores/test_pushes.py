"""When a restore into a consumer's memory is over: not before nothing of it is under way any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cluster.peers import PeerClient
from app.errors import Conflict
from app.restores.pushes import Asking, ConsumerPush
from tests.liars import lying, silent
from tests.processes import DEADLINE_S
from transfer.client.http import NodeUnreachable
from transfer.engine import MooncakeEngine
from transfer.plan import Batch, Want
from transfer.progress import Progress, RestoreState
from transfer.push.destination import ConsumerDestination
from transfer.push.table import FormCopy, PushTable, SlotBases
from transfer.push.writer import Writer
from transfer.sources import SourceKind


@pytest.fixture
def live(live_node: Callable[..., Any], moe_checkpoint: Path, wait_until: Callable[..., Any]) -> Any:
    made = live_node(checkpoint=moe_checkpoint, fill="disk")
    wait_until(lambda: made.ask("GET", "/readyz").status_code == 200, "it is filled")
    return made


class Deed:
    """A push of every block into an array of this process, and in which state it was when what happened."""

    def __init__(self, live: Any) -> None:
        self.node, self.progress, self.happened = live.context.node, Progress(), list[tuple[str, RestoreState]]()
        manifest = self.node.holding.manifest
        nbytes = int(manifest.nbytes[0])
        self._memory = np.zeros((len(manifest), nbytes), np.uint8)
        base, self._engine = self._memory.ctypes.data, MooncakeEngine("127.0.0.1")
        self._engine.register([(base, self._memory.nbytes)])
        form = [FormCopy(0, 0, 0, 1, nbytes, nbytes, nbytes)]
        slots = [SlotBases(*key, 0, (base + row * nbytes,)) for row, key in enumerate(manifest.keys)]
        table = PushTable.build(manifest, self._engine.session_id, [(base, self._memory.nbytes)], [form], slots)
        self.store = store = live.context.consumers
        consumer, _ = store.put("rank", table, manifest.digest, self.node.holding.content_digest, 60.0)
        self.push = ConsumerPush(
            self.node,
            PeerClient(),
            consumer,
            partial(self._held, store, consumer),
            lambda push_id: self.note("ended"),
            partial(store.withdraw_lease, consumer),
            lambda keys: None,
            False,
        )

    @contextmanager
    def _held(self, store: Any, consumer: Any) -> Iterator[None]:
        with store.hold(consumer):
            try:
                yield
            finally:
                self.note("let go")

    def note(self, what: str) -> None:
        self.happened.append((what, self.progress.state))


@pytest.fixture
def deed(live: Any, monkeypatch: pytest.MonkeyPatch) -> Deed:
    made = Deed(live)
    monkeypatch.setattr(made.node.writer, "fence", lambda: made.note("fenced"))
    return made


def test_a_push_is_not_over_before_what_it_gave_up_on_has_ended(deed: Deed) -> None:
    deed.push.run(deed.push.plan_restore(None, [SourceKind.LOCAL], deed.progress))
    assert deed.progress.state is RestoreState.SUCCEEDED
    assert ("fenced", RestoreState.RUNNING) in deed.happened
    assert deed.happened[-1] == ("let go", RestoreState.SUCCEEDED)


def test_a_push_that_ends_in_an_unforeseen_way_is_fenced_before_its_consumer_is_let_go(
    deed: Deed, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = deed.push.plan_restore(None, [SourceKind.LOCAL], deed.progress)

    def break_down() -> None:
        deed.note("broke down")
        raise ZeroDivisionError

    monkeypatch.setattr(restore, "run", break_down)
    with pytest.raises(ZeroDivisionError):
        deed.push.run(restore)
    assert [what for what, _ in deed.happened][-3:] == ["broke down", "fenced", "let go"]


def test_a_push_by_a_peer_that_says_nothing_ends_when_it_is_recalled_and_the_peer_gets_no_more_time(
    deed: Deed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was waited for to its end, for half a minute, whoever had cancelled the restore."""
    monkeypatch.setattr("app.restores.pushes.PUSH_TIMEOUT_S", 10 * DEADLINE_S)
    holding, consumer = deed.node.holding, deed.push.consumer
    batch = Batch("peer", (Want(0, int(holding.manifest.nbytes[0]), bytes(16)),), (0,), 1)
    destination = ConsumerDestination(Writer(deed.node.writer, consumer.table, read_back=False), deed.node.writer)
    asked, said = threading.Event(), list[str]()

    def lie(connection: Any) -> None:
        asked.set()
        silent(connection)

    def move(asking: Asking) -> None:
        try:
            asking.move(destination, batch, destination)
        except NodeUnreachable as error:
            said.append(str(error))

    given: list[str] = []
    withdraw = deed.push.withdraw_lease
    deed.push.withdraw_lease = lambda push_id: given.append(push_id) or withdraw(push_id)  # type: ignore[func-returns-value]
    with lying(lie) as url:
        moving = threading.Thread(target=move, args=(Asking(url, deed.push, holding),))
        moving.start()
        assert asked.wait(DEADLINE_S)
        batch.watch.is_recalled = True
        moving.join(DEADLINE_S)
        assert not moving.is_alive()
    assert "recalled" in said[0]
    with pytest.raises(Conflict, match="was recalled"):
        deed.store.lease(consumer.id, consumer.epoch, given[0])
    assert deed.store.lease(consumer.id, consumer.epoch, "another") > 0
    assert ("ended", RestoreState.PENDING) not in deed.happened, "it may be writing still"
