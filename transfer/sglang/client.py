"""A backup client for SGLang's elastic expert parallelism, in place of its own: same calls, Hotspare's memory.

SGLang asks `use_backup` when experts were lost, then either calls `update_weights` or reloads from disk itself. Here
`use_backup` is true while the rank's slots are bound and the model's manifest is known. What memory does not have is
read from the checkpoint, those experts and no others; what that does not have either, SGLang is asked to reload, so
that `update_weights` returns with every slot good. It raises RuntimeError, as SGLang's own client does, only when that
failed too: a slot would hold another expert. Where slots cannot be filled at all `use_backup` is true as well, and
SGLang is always asked to reload: its weights come from memory then, too (`weights`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from shm.errors import HotspareError
from transfer.client.evidence import HowMuch, Lost
from transfer.client.restorer import Restorer
from transfer.errors import told
from transfer.sglang.engine import Engine, NameFilter, SGLangEngine
from transfer.sglang.kernels import sglang_layout
from transfer.sglang.reloading import reload_experts
from transfer.slots import Slots
from transfer.slots.layouts import NO_EXPERT, SlotMismatch, expert_of, fused_name

DEFAULT_URL = "http://127.0.0.1:8470"
RETRY_INTERVAL_S = 5.0  # while no node of the model answers and none left a segment
MISMATCHES_MAX = 3  # in a row: experts that are being moved while they are looked at differ, but not for so long
STOP_WAIT_S = 10.0
FAILED_SHOWN_MAX = 10  # in the log, of one restore

Key = tuple[int, int]


class SharedWeights(HotspareError):
    """The engine's slots are not its own."""

    def __init__(self) -> None:
        super().__init__(
            "SGLang's weight cache is on (--weight-cache-mode): its daemon owns the slots, and others read them. "
            "Restart SGLang with --weight-cache-mode off to have lost experts come from memory"
        )


_log = logging.getLogger("hotspare.sglang")


class HotspareBackupClient:
    """Takes the place of SGLang's `ExpertBackupClient`, whatever that is constructed with; see `SGLangEngine`.

    The node is at HOTSPARE_URL, with HOTSPARE_TOKEN where it has one; HOTSPARE_TRANSPORT is tcp or rdma. The slots are
    bound in the background once the model is loaded, which is when SGLang constructs this: every byte of them is then
    compared with what the nodes keep. They are bound again when experts were placed anew; what is lost then is what
    SGLang asks for.
    """

    def __init__(
        self, *arguments: Any, engine: Engine | None = None, restorer: Restorer | None = None, **keywords: Any
    ) -> None:
        """`engine` and `restorer` are for engines that are not quite SGLang; all else goes to `SGLangEngine`."""
        self.use_backup = False
        self._restorer = restorer
        self._bound: Any = None
        self._refused: str | None = None
        """Why no slot can be filled, ever: SGLang loads again what is lost."""
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._preparing: threading.Thread | None = None
        try:
            self._engine: Engine | None = engine or SGLangEngine(*arguments, **keywords)
            if self._engine.has_shared_weights:
                raise SharedWeights
            self._restorer = restorer or Restorer(
                os.environ.get("HOTSPARE_URL") or DEFAULT_URL,
                transport=os.environ.get("HOTSPARE_TRANSPORT") or "tcp",
                checkpoint=self._engine.checkpoint(),
            )
        except Exception as error:
            self._engine = None
            _log.warning("experts will be reloaded from disk: %s", told(error))
            return
        self._prepare_in_background()

    def update_weights(self, weight_name_filter: NameFilter | None = None) -> None:
        """Fill the slots of every expert that has a tensor whose checkpoint name the filter wants; of all with None.

        Returns with each of them good. Raises RuntimeError if neither memory nor SGLang's own reload could bring them.
        """
        with self._lock:
            missing = self._restore(weight_name_filter) if self._refused is None else None
            if missing is None or missing:
                self._reload(weight_name_filter, missing)

    def close(self) -> None:
        """Stop preparing, and let slots and engine go."""
        self._stopped.set()
        if self._preparing is not None:
            self._preparing.join(STOP_WAIT_S)
        with self._lock:
            self.use_backup = False
            if self._restorer is not None:
                self._restorer.close()

    # -- binding ---------------------------------------------------------------------------------------------

    def _prepare_in_background(self) -> None:
        if not (self._preparing and self._preparing.is_alive()):
            self._preparing = threading.Thread(target=self._prepare, name="hotspare-bind", daemon=True)
            self._preparing.start()

    def _prepare(self) -> None:
        """Bind, and try again while nobody has the model; give up for good where the slots do not hold its bytes."""
        last, mismatches = None, 0
        while not self._stopped.is_set():
            try:
                with self._lock:
                    reason = self._bind()
                    self.use_backup = reason is None
            except SlotMismatch as error:
                reason, mismatches = str(error), mismatches + 1
                if mismatches == MISMATCHES_MAX:
                    self._refuse(str(error))
                    return
            except Exception as error:
                reason = told(error)
            if reason is None:
                _log.info("experts come back from Hotspare's memory")
                return
            if reason != last:
                _log.warning("until that is mended, experts are reloaded from disk: %s", reason)
            last = reason
            self._stopped.wait(RETRY_INTERVAL_S)

    def _refuse(self, reason: str) -> None:
        """Never fill a slot. SGLang loads what is lost, and is asked to by us: of a failure it says nothing itself."""
        assert self._engine is not None
        self._refused = reason
        self.use_backup = self._engine.can_reload
        _log.warning("lost experts will be loaded by SGLang, from memory where it has them: %s", reason)

    def _bind(self, lost: Lost = (), proof: HowMuch = "whole") -> str | None:
        """Bind the slots as they are placed now, if they are not; why no expert of it can be had, or None."""
        engine, restorer = self._engine, self._restorer
        assert engine is not None
        assert restorer is not None
        parameters = {name: p for name, p in engine.parameters().items() if fused_name(name) is not None}
        _check_all_named(engine, parameters)
        placement = _placement(engine, parameters)
        layout, tp_rank, tp_size = kernels = _kernels(engine)
        slots = Slots.fused(
            parameters,
            physical_to_logical=placement,
            ep_rank=engine.ep_rank,
            ep_size=engine.ep_size,
            tp_rank=tp_rank,
            tp_size=tp_size,
            layout=layout,
        )
        state = (placement, engine.ep_rank, kernels, [(tensor.name, tensor.address) for tensor in slots.tensors])
        if state == self._bound:
            return None
        self._bound = None
        report = restorer.bind(slots, lost=lost, proof=proof)
        if report.experts_proved or report.ok:
            self._bound = state
            _log.info("%d of %d experts proved in %.2f s", report.experts_proved, report.experts_total, report.seconds)
        if report.ok or lost:
            return None
        return "; ".join(report.notes) or f"nobody has the blocks to prove layers {report.unproved_layers} with"

    # -- restoring -------------------------------------------------------------------------------------------

    def _restore(self, name_filter: NameFilter | None) -> set[Key] | None:
        """The experts that could not be had; None if nothing at all could be tried."""
        if self._engine is None or self._restorer is None:
            return None
        try:
            reason = self._bind("all" if name_filter is None else name_filter, "sample")
            if reason is None:
                report = self._restorer.restore(predicate=name_filter)
                done, total, seconds = report.experts_done, report.experts_total, report.seconds
                _log.info("%d of %d experts in %.2f s, bytes %s", done, total, seconds, dict(report.bytes_by_source))
                for failed in report.failed[:FAILED_SHOWN_MAX]:
                    _log.warning("layer %d, expert %d: %s", *failed.key, failed.reason)
                if report.experts_done or not report.failed:
                    return {(failed.key.layer, failed.key.expert) for failed in report.failed}
                reason = report.failed[0].reason
        except Exception as error:  # an engine must survive whatever is wrong here
            reason = told(error)
        _log.warning("experts are reloaded from disk: %s", reason)
        self.use_backup = False
        self._prepare_in_background()
        return None

    def _reload(self, name_filter: NameFilter | None, missing: set[Key] | None) -> None:
        """Have SGLang load what could not be filled in, by way of `weights`. Raises RuntimeError."""
        asked = "all experts" if name_filter is None else "the experts that were asked for"
        what = asked if missing is None else f"{len(missing)} experts, first {min(missing)}"
        if self._engine is None:
            raise RuntimeError(f"{what} could not be restored: use_backup is False, reload them from disk")

        def wanted(name: str) -> bool:
            if name_filter is not None and not name_filter(name):
                return False
            if missing is None:
                return True
            key = expert_of(name)
            return key in missing if key is not None else ".experts." in name  # one tensor for all experts

        _log.warning("%s are loaded by SGLang", what)
        try:
            reload_experts(self._engine, wanted)
        except Exception as error:
            raise RuntimeError(f"{what} could be had neither from memory nor from disk: {told(error)}") from error


def run_expert_backup_manager(server_args: Any, port_args: Any) -> None:
    """Takes the place of SGLang's function of that name, and starts nothing: the nodes keep the backup."""
    _log.info("expert weights are kept by Hotspare's nodes: no backup process is started")


def _check_all_named(engine: Engine, parameters: Mapping[str, Any]) -> None:
    """Raises SlotMismatch for expert modules whose layer cannot be told, and which would be left as they are."""
    known = {id(parameter) for parameter in parameters.values()}
    strangers = sum(id(module.w13_weight) not in known for module in engine.modules())
    if strangers:
        raise SlotMismatch(
            f"{strangers} expert modules have parameters not named like …layers.3.mlp.experts.w13_weight: their layer "
            "is not known, so reload from disk"
        )


def _placement(engine: Engine, parameters: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Per layer the logical expert of every slot of every rank; those of other ranks are not looked at.

    Slots past a rank's share of the physical experts hold shared experts, and are left alone.
    """
    share, left = divmod(engine.physical_count, engine.ep_size)
    if left or not share:
        raise SlotMismatch(f"{engine.physical_count} physical experts do not divide among {engine.ep_size} ranks")
    logical = engine.logical_count
    maps: dict[int, tuple[int, ...]] = {}
    for name, parameter in parameters.items():
        found = fused_name(name)
        assert found is not None
        if found.layer in maps:
            continue
        slots = int(parameter.shape[0])
        if slots < share:
            raise SlotMismatch(f"{name} has {slots} slots, and a rank's share of the physical experts is {share}")
        row = [NO_EXPERT] * (slots * engine.ep_size)
        for expert in range(logical):
            for physical in engine.physical_of(found.layer, expert):
                rank, slot = divmod(physical, share)
                row[rank * slots + slot] = expert
        maps[found.layer] = tuple(row)
    return maps


def _kernels(engine: Engine) -> tuple[str, int, int]:
    """Layout, tensor-parallel rank and size of all expert modules. Raises SlotMismatch if they are not alike."""
    modules = list(engine.modules())
    if not modules:
        raise SlotMismatch("the model has no fused expert modules (none has a w13_weight): reload from disk")
    seen = {(sglang_layout(m), int(getattr(m, "moe_tp_rank", 0)), int(getattr(m, "moe_tp_size", 1))) for m in modules}
    if len(seen) != 1:
        raise SlotMismatch(
            f"expert modules differ in layout or tensor-parallel rank ({sorted(seen)}): reload from disk"
        )
    return seen.pop()
