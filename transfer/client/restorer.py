"""An engine's side: refill its expert slots in place, from the nearest memory that has them.

The ladder, for each expert: the attached segment of this host, needing no daemon; the least loaded replica in another
node's memory; the next replica; the checkpoint on disk. What could not be had is listed in the report.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shm.block import ExpertKey
from shm.errors import InvalidInput
from transfer.client.borrowed import borrowed
from transfer.client.bound_slots import CPU, BoundSlots, check_not_moved, device_of
from transfer.client.control_plane import ControlPlane
from transfer.client.engine_lease import EngineLease
from transfer.client.evidence import UNPROVED, Evidence, HowMuch, Lost
from transfer.client.ladder import Ladder, Reach
from transfer.client.last_resort import LastResort
from transfer.client.local_segment import LocalSegment
from transfer.client.registration import Registration
from transfer.client.report import FailedExpert, Progress, ProofReport, SlotReport, Tally
from transfer.client.surroundings import Surroundings
from transfer.engine import DisposableEngine
from transfer.errors import EngineError, RestoreError
from transfer.push.table import consumer_document
from transfer.slots import Slots
from transfer.slots.mismatch import Reference

CONSUMER_TTL_S = 300.0

_log = logging.getLogger("hotspare.restorer")


class Restorer:
    """Fills the slots of one rank. Thread-safe: one restore at a time, the others wait.

        restorer = Restorer("http://127.0.0.1:8470")
        restorer.bind(Slots.fused(dict(model.named_parameters()), ep_rank=3, ep_size=8))
        report = restorer.restore()

    No restore raises for what a node, a segment, a peer or a disk does: what is missing is in the report.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        namespace: str = "default",
        node: str | None = None,
        checkpoint: str | Path | None = None,
        engine: Any = None,
        engine_host: str | None = None,
        transport: str = "tcp",
        straight: bool | None = None,
    ) -> None:
        """`url` is this host's node, which need not be up yet: it says what `model`, `namespace` and `node` are; give
        them where restores must work before it was ever seen alive. `token` is what the nodes want to be shown: that of
        HOTSPARE_TOKEN by default. `checkpoint` is the directory of last resort.

        `engine` is a transfer engine that this process has already: Mooncake's, or ours; without one a MooncakeEngine
        is started at the first `bind`, reachable at `engine_host`, over `transport`. `straight` is whether peers' bytes
        go straight into slots, and not through host buffers: by default with an engine of our own, which is thrown away
        when a peer timed out, so that nothing can arrive in a slot later; into GPU slots over rdma, since over tcp host
        buffers are six times as fast, and only where the engine can register their memory.
        """
        self._control = ControlPlane(url, token)
        self._disk = LastResort(checkpoint)
        self._around = Surroundings(self._control, self._disk, model, namespace, node)
        self._lease = EngineLease(engine, engine_host, transport, self._control.address)
        self._straight = straight
        self._slots: Slots | None = None
        self._bound: BoundSlots | None = None
        self._evidence = Evidence()
        self._registration: Registration | None = None
        self._inbox: DisposableEngine | None = None
        """What nodes write through while the slots are registered: of its own, so that it can be thrown away."""
        self._lock = threading.RLock()

    # -- binding ---------------------------------------------------------------------------------------------

    def bind(self, slots: Slots, *, lost: Lost = (), proof: HowMuch = "whole") -> ProofReport:
        """Take these slots for the rank's, in place of any others: whatever can be done before a failure is done now.

        The manifest is compared, the slots are registered with the engine, this host's segment is attached and, for
        slots in GPU memory, page-locked (about 0.05 s a GB), and host buffers are made.

        Then the bytes in the slots are compared with what the nodes keep, which is the proof that a restore would put
        the right bytes at the right places; nothing may write to them meanwhile. `lost` are those that do not hold
        their bytes now, and are not looked at: (layer, expert) as the manifest counts, or a predicate of checkpoint
        names, or "all". A layer is restored if one of its experts was proved, now or when these parameters were bound
        before. With proof="sample" a few experts of each layer are looked at, with "none" you vouch for the layout.
        Where no node answers and none left a segment, it is done at the first restore.

        Raises SlotMismatch for slots that the model's blocks do not fit, and, naming expert and tensor, for slots that
        hold something else; EngineError for a device that cannot be used. A node that is not there yet is no error.
        """
        with self._lock:
            device_of(slots)
            check_not_moved(slots)
            self._evidence.begin(lost, proof)
            self._release()
            self._slots = slots
            self._around.forget_content()
            tally = Tally()
            self._ask_node(tally)
            try:
                bound = self._find(tally)
                report = self._examine(bound, tally)
            except BaseException:
                self._release()
                raise
            self._open_engine(tally)
            if bound is not None and bound.device != CPU and not self._is_straight:
                tally.attempt(bound.staging.prepare, self._lease.engine)
            for note in tally.notes:
                _log.info("bound, but: %s", note)
            return replace(report, notes=tuple(tally.notes))

    @property
    def content_digest(self) -> str | None:
        """Which content the slots are bound to, in hex; None while that is not known."""
        return self._around.content.digest

    @property
    def session_id(self) -> str | None:
        """What peers call this process's engine; None before `bind`, or where no engine could be started."""
        return None if self._lease.engine is None else self._lease.engine.session_id

    def close(self) -> None:
        """Let slots, segment and engine go. A caller's engine goes on; memory registered with it is unregistered."""
        with self._lock:
            self._release()
            self._segment.close()
            self._lease.drop()
            self._control.close()

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _release(self) -> None:
        self.unregister()
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.close(is_engine_gone=False)
        self._lease.unregister()
        self._slots = None

    @property
    def _segment(self) -> LocalSegment:
        return self._around.segment

    @property
    def _is_straight(self) -> bool:
        """Whether peers' bytes may go straight into slots; see `__init__`."""
        assert self._slots is not None
        if self._straight is None:
            return self._lease.is_ours and (device_of(self._slots) == CPU or self._lease.transport == "rdma")
        return self._straight

    def _open_engine(self, tally: Tally) -> None:
        """Start the engine if it is ours to start, and open the slots to it. Notes what fails."""
        assert self._slots is not None
        tally.attempt(self._lease.start)
        if device_of(self._slots) == CPU or self._is_straight:
            tally.attempt(self._lease.register, [(r.address, r.nbytes) for r in self._slots.ranges])

    # -- being restored --------------------------------------------------------------------------------------

    def register(self, consumer_id: str, *, ttl_s: float = CONSUMER_TTL_S) -> None:
        """Let others have these slots filled, with no code of this process running: `POST /v1/restores` to any node.

        The slots are opened to the transfer engine, those in GPU memory too, and the registration is renewed in the
        background, also with a node that was restarted, until `unregister`, `bind` or `close`, or until somebody else
        has it removed; it outlives a process that dies by `ttl_s` at most. Nothing in flight may use the slots while
        they are filled.

        Raises InvalidInput before `bind`, RestoreError without a manifest, EngineError for memory that the engine does
        not take, NodeUnreachable or NodeRefused where the node does not take the registration.
        """
        with self._lock:
            self.unregister()
            if self._slots is None:
                raise InvalidInput("no slots are bound: call bind(slots) first")
            check_not_moved(self._slots)
            tally = Tally()
            bound = self._prepare(tally)
            if bound is None:
                raise RestoreError(f"the model's manifest could not be had: {'; '.join(tally.notes)}")
            inbox = self._lease.another()
            inbox.register([(r.address, r.nbytes) for r in self._slots.ranges])
            document = consumer_document(
                self._slots, bound.manifest, inbox.session_id, ttl_s, self._around.content.digest
            )
            self._registration = Registration(self._control, consumer_id, document, inbox.drop)
            self._inbox = inbox

    def unregister(self) -> None:
        """End what `register` began. Once it returns no byte of the slots is written any more, whatever a node that was
        paused does when it wakes: the transfer engine that took the writes is thrown away. Harmless without a
        registration; raises TransferFailed where that engine is held by somebody.
        """
        with self._lock:
            registration, self._registration = self._registration, None
            inbox, self._inbox = self._inbox, None
            if registration is not None:
                registration.end()
            if inbox is not None:
                inbox.drop()

    # -- restoring -------------------------------------------------------------------------------------------

    def restore(
        self,
        experts: Iterable[tuple[int, int]] | None = None,
        *,
        predicate: Callable[[str], bool] | None = None,
        progress: Progress | None = None,
    ) -> SlotReport:
        """Fill the slots of these (layer, expert), of those with a tensor whose checkpoint name the predicate wants,
        or of all. Whole experts are brought, each once, and copied to every slot that holds them.

        `progress` is called with a SlotReport now and then, from any thread, and at the end. Nothing in flight may
        use the slots meanwhile. Raises SlotMismatch, before a byte moves, if a parameter has moved, the model's blocks
        do not fit, or a proof that could not be made at `bind` fails now; InvalidInput for an expert without a slot
        here, or before `bind`.
        """
        with self._lock:
            if self._slots is None:
                raise InvalidInput("no slots are bound: call bind(slots) first")
            check_not_moved(self._slots)
            asked = None if experts is None else sorted({ExpertKey(*key) for key in experts})
            return self._restore(self._slots, asked, predicate, progress)

    def _restore(
        self,
        slots: Slots,
        asked: Sequence[ExpertKey] | None,
        predicate: Callable[[str], bool] | None,
        progress: Progress | None,
    ) -> SlotReport:
        tally = Tally(progress)
        try:
            bound, why_not = self._find(tally), "the model's manifest could not be had"
        except EngineError as error:  # a device without memory to spare, say
            bound, why_not = None, str(error)
        slots = slots if bound is None else bound.slots
        if strangers := set(asked or ()) - set(slots.keys):
            layer, expert = min(strangers)
            raise InvalidInput(f"expert {expert} of layer {layer} has no slot on this rank: ask for those it holds")
        if bound is None:
            keys = slots.keys if asked is None else asked
            tally.expect(len(keys), 0)
            return tally.finish(_failures(slots, {key: [why_not] for key in keys}))
        rows = bound.table.rows if asked is None else [bound.manifest.index(*key) for key in asked]
        if predicate is not None:
            rows = [row for row in rows if any(map(predicate, bound.manifest.tensor_names(row)))]
        tally.expect(len(rows), int(bound.manifest.nbytes[rows].sum()))
        barred = self._barred(bound, rows, tally)
        ladder = Ladder(bound, [row for row in rows if row not in barred], tally)
        tally.attempt(self._climb, ladder, bound, tally)
        self._around.tell_who_was_wrong(bound.manifest, ladder.wrong)
        ladder.missing.update(barred)
        missing = {bound.manifest.keys[row]: reasons for row, reasons in ladder.missing.items()}
        return tally.finish(_failures(slots, missing))

    def _climb(self, ladder: Ladder, bound: BoundSlots, tally: Tally) -> None:
        attachment = self._segment.attachment
        held = self._segment.held(ladder.missing)
        bound.memory.follow(wait=self._is_straight)
        if attachment is not None:
            ladder.climb_local(attachment, held)
        checkpoint = partial(self._disk.of, bound.manifest, self._around.content) if self._disk.is_given else None
        ladder.climb_all(partial(self._around.find, held, tally), partial(self._reach, tally), checkpoint)

    def _reach(self, tally: Tally) -> Reach:
        self._open_engine(tally)
        return Reach(self._lease.engine, self._lease.fence, self._is_straight and self._lease.has_registered)

    # -- what speaks for the slots ---------------------------------------------------------------------------

    def _examine(self, bound: BoundSlots | None, tally: Tally) -> ProofReport:
        """Look at the slots, once at bind."""
        assert self._slots is not None
        if bound is None:
            self._evidence.forget()
            return ProofReport.of_nothing(self._slots.keys)
        references = partial(self._around.references, bound.table, tally)
        borrow = partial(self._borrow, bound, tally)
        return self._evidence.examine(bound, references, lambda: self._around.content.digest, borrow)

    def _borrow(self, bound: BoundSlots, tally: Tally, rows: Sequence[int]) -> Iterator[tuple[int, Reference]]:
        """Blocks of peers, to compare parts with; none where no engine can be started."""
        tally.attempt(self._lease.start)
        if self._lease.engine is not None:
            found = self._around.locate(bound.manifest, rows, tally)
            yield from borrowed(self._lease.engine, bound.staging, bound.manifest, found, tally.note)

    def _barred(self, bound: BoundSlots, rows: Sequence[int], tally: Tally) -> dict[int, list[str]]:
        """Rows that may not be filled, and why. Raises SlotMismatch."""
        references, borrow = partial(self._around.references, bound.table, tally), partial(self._borrow, bound, tally)
        try:
            lacking = self._evidence.lacking(bound, rows, references, rows, borrow)
        except EngineError as error:
            return {row: [f"its slots could not be looked at: {error}"] for row in rows}
        return {row: [UNPROVED] for row in lacking}

    def _prepare(self, tally: Tally) -> BoundSlots | None:
        """What others may write to; None while no manifest can be had. Raises RestoreError for slots not proved."""
        bound = self._find(tally)
        if bound is not None:
            references = partial(self._around.references, bound.table, tally)
            borrow = partial(self._borrow, bound, tally)
            if self._evidence.lacking(bound, bound.table.rows, references, borrow=borrow):
                raise RestoreError(UNPROVED)
        return bound

    # -- finding things out ----------------------------------------------------------------------------------

    def _find(self, tally: Tally) -> BoundSlots | None:
        """Attach, and compare the slots with the manifest if that is new; None while no manifest can be had."""
        assert self._slots is not None
        if not self._around.is_named:
            self._ask_node(tally)
        manifest = None if self._bound is None else self._bound.manifest
        attachment = self._around.attach(manifest, tally)
        if manifest is None:
            manifest = attachment.manifest if attachment is not None else self._around.manifest(tally)
        if manifest is None:
            return None
        if self._bound is not None and self._bound.staging.is_spent:
            self._bound.close(is_engine_gone=False)
            self._bound = None
        if self._bound is None:
            self._bound = BoundSlots(self._slots, manifest)
        if attachment is not None:
            tally.attempt(self._bound.page_lock, attachment)
        return self._bound

    def _ask_node(self, tally: Tally) -> None:
        if host := self._around.ask_node(tally):
            self._lease.suggest_host(host)


def _failures(slots: Slots, missing: Mapping[ExpertKey, Sequence[str]]) -> tuple[FailedExpert, ...]:
    nobody = "no source that could be reached has it"
    return tuple(FailedExpert(key, slots.refs(key), "; ".join(reasons) or nobody) for key, reasons in missing.items())
