"""When a restore into a consumer's memory is over: not before nothing of it is under way any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cluster.peers import PeerClient
from app.restores.pushes import ConsumerPush
from transfer.engine import MooncakeEngine
from transfer.progress import Progress, RestoreState
from transfer.push.table import FormCopy, PushTable, SlotBases
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
        store = live.context.consumers
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
