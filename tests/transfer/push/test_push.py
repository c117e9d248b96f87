"""Writing blocks into another engine's memory: what a table may say, what arrives, and what if it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shm.block import ExpertKey, TensorEntry
from shm.errors import BlockUnavailable, InvalidInput
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment
from tests.processes import processor_time
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import pin
from transfer.engine import Copy, MooncakeEngine, TransferEngine
from transfer.errors import TransferFailed
from transfer.memory import view
from transfer.plan import Batch, Want
from transfer.push import writer as writer_module
from transfer.push.destination import CHANGED_MEANWHILE, NOT_SENT, ConsumerDestination
from transfer.push.table import FormCopy, PushTable, SlotBases, consumer_document
from transfer.push.writer import Health, WriteFailed, Writer, buffer
from transfer.slots import Slots
from transfer.sources import Disk, HostMemory, PeerMemory, reading

ROWS, COLS = 11, 13  # of the tiny manifest's matrices; a block is three of them in BF16, each aligned to 64 bytes
NBYTES = ROWS * COLS * 2


@pytest.fixture(scope="module")
def engines() -> tuple[MooncakeEngine, MooncakeEngine]:
    """A holder's and a consumer's."""
    return MooncakeEngine("127.0.0.1"), MooncakeEngine("127.0.0.1")


@pytest.fixture
def holder(
    sealed: Callable[..., Segment], engines: tuple[MooncakeEngine, MooncakeEngine]
) -> Iterator[tuple[Segment, MooncakeEngine]]:
    """A sealed segment of 2 layers by 5 experts, registered."""
    segment, engine = sealed(), engines[0]
    engine.register(segment.data_ranges())
    yield segment, engine
    engine.unregister(segment.data_ranges())


class Consumer:
    """Slots in registered CPU tensors, and the table that says where they are."""

    def __init__(self, engine: MooncakeEngine, manifest: Manifest, **options: Any) -> None:
        self.engine = engine
        tp_size = options.get("tp_size", 1)
        inner = ROWS // tp_size  # the intermediate side, cut among ranks
        slots = len(options["physical_to_logical"][0])
        shapes = {"w13_weight": (slots, 2 * inner, COLS), "w2_weight": (slots, COLS, inner)}
        self.tensors = {
            f"model.layers.{layer}.mlp.experts.{part}": torch.full(shape, 7, dtype=torch.bfloat16)
            for layer in range(2)
            for part, shape in shapes.items()
        }
        self.slots = Slots.fused(self.tensors, **options)
        engine.register([(r.address, r.nbytes) for r in self.slots.ranges])
        self.document = consumer_document(self.slots, manifest, engine.session_id, 60)

    def close(self) -> None:
        self.engine.unregister([(r.address, r.nbytes) for r in self.slots.ranges])


@pytest.fixture
def consumer(engines: tuple[MooncakeEngine, MooncakeEngine]) -> Iterator[Callable[..., Consumer]]:
    made: list[Consumer] = []

    def make(manifest: Manifest, **options: Any) -> Consumer:
        made.append(Consumer(engines[1], manifest, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@dataclass
class Outcome:
    """What became of the blocks of a push, by manifest row."""

    pushed: Mapping[int, bytes]
    failed: dict[int, str]
    corrupt: list[int]


def push(
    segment: Segment,
    engine: TransferEngine,
    table: PushTable,
    wanted: Mapping[int, bytes | None],
    *,
    read_back: bool = False,
) -> Outcome:
    """Send blocks of a segment, as a node does: row → the checksum it must have, None for the one on record."""
    corrupt: list[int] = []
    destination = ConsumerDestination(Writer(engine, table, read_back=read_back), engine, report_corrupt=corrupt.extend)
    source = HostMemory("here", segment, kept_by=segment.mappings())
    wants = tuple(Want(row, int(segment.manifest.nbytes[row]), checksum) for row, checksum in wanted.items())
    pushed = source.fetch(Batch(source, wants, (), 0), destination)
    return Outcome(pushed, {row: destination.reason(row) for row in wanted if row not in pushed}, corrupt)


def table_of(document: dict[str, Any], manifest: Manifest) -> PushTable:
    """As a node reads it: through JSON."""
    document = json.loads(json.dumps(document))
    forms = [[FormCopy(**copy) for copy in form] for form in document["forms"]]
    slots = [SlotBases(s["layer"], s["expert"], s["form"], tuple(s["bases"])) for s in document["slots"]]
    return PushTable.build(manifest, document["session_id"], document["ranges"], forms, slots)


def deep_manifest(rows: int = ROWS, cols: int = COLS, layers: int = 2, experts: int = 5) -> Manifest:
    """gate and up [rows, cols], down [cols, rows]."""
    names = {"down_proj": (cols, rows), "gate_proj": (rows, cols), "up_proj": (rows, cols)}
    blocks, at = {}, 0
    for layer in range(layers):
        for expert in range(experts):
            blocks[ExpertKey(layer, expert)] = entries = []
            for name, shape in names.items():
                template = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight"
                entries.append(TensorEntry(template, "BF16", shape, 0, at))
                at += 2 * rows * cols
    return Manifest.build("tiny", "gate_up_down", "experts", [FileSpec("a.safetensors", at, "0" * 32)], blocks)


@pytest.fixture
def deep(
    sealed: Callable[..., Segment], engines: tuple[MooncakeEngine, MooncakeEngine]
) -> Iterator[Callable[..., Segment]]:
    made: list[Segment] = []

    def make(**sizes: int) -> Segment:
        segment = sealed(manifest=deep_manifest(**sizes))
        engines[0].register(segment.data_ranges())
        made.append(segment)
        return segment

    yield make
    for segment in made:
        engines[0].unregister(segment.data_ranges())


def matrix(segment: Segment, layer: int, expert: int, part: str) -> torch.Tensor:
    """A tensor of a block, as bytes of its own: by the manifest, and by nothing that is tested here."""
    row = segment.manifest.index(layer, expert)
    tensor = next(t for t in segment.manifest.schema(row).tensors if part in t.name)
    raw = bytes(segment.block(row)[tensor.offset : tensor.offset + tensor.nbytes])
    return torch.from_numpy(np.frombuffer(raw, np.int16).copy()).view(*tensor.shape)


def check(segment: Segment, tensors: dict[str, torch.Tensor], placement: Sequence[int], tp: tuple[int, int]) -> None:
    rank, size = tp
    for layer in range(2):
        w13 = tensors[f"model.layers.{layer}.mlp.experts.w13_weight"].view(torch.int16)
        w2 = tensors[f"model.layers.{layer}.mlp.experts.w2_weight"].view(torch.int16)
        for slot, expert in enumerate(placement):
            gate, up, down = (matrix(segment, layer, expert, part) for part in ("gate", "up", "down"))
            expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
            assert torch.equal(w13[slot], expected)
            assert torch.equal(w2[slot], down.chunk(size, dim=1)[rank])


# -- what arrives ----------------------------------------------------------------------------------------------


def test_every_slot_of_an_expert_gets_its_bytes_and_no_other_slot_is_touched(
    deep: Callable[..., Segment], consumer: Callable[..., Consumer], engines: tuple[MooncakeEngine, MooncakeEngine]
) -> None:
    segment = deep()
    placement = [3, 1, 3, 0]
    rank = consumer(segment.manifest, physical_to_logical=[placement, placement])
    table = table_of(rank.document, segment.manifest)
    rows = [segment.manifest.index(0, 3), segment.manifest.index(1, 3)]
    outcome = push(segment, engines[0], table, dict.fromkeys(rows), read_back=True)
    assert outcome.pushed == {row: segment.checksum(row) for row in rows}
    for name, tensor in rank.tensors.items():
        assert (tensor[1] == 7).all(), name
        assert (tensor[3] == 7).all(), name
    push(segment, engines[0], table, dict.fromkeys(table.rows))
    check(segment, rank.tensors, placement, (0, 1))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_tensor_parallel_rank_gets_its_rows_and_columns(
    deep: Callable[..., Segment],
    consumer: Callable[..., Consumer],
    engines: tuple[MooncakeEngine, MooncakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    monkeypatch.setitem(globals(), "ROWS", 33)
    segment = deep(rows=33)
    placement = [4, 2]
    part = consumer(segment.manifest, physical_to_logical=[placement] * 2, tp_rank=rank, tp_size=3)
    table = table_of(part.document, segment.manifest)
    outcome = push(segment, engines[0], table, dict.fromkeys(table.rows), read_back=True)
    assert (len(outcome.pushed), outcome.failed) == (4, {})
    check(segment, part.tensors, placement, (rank, 3))


def test_deepseeks_count_of_experts_makes_a_small_document_that_is_quickly_checked() -> None:
    manifest = deep_manifest(layers=58, experts=256, rows=4, cols=4)
    tensors = {}
    for layer in range(58):
        tensors[f"model.layers.{layer}.mlp.experts.w13_weight"] = torch.empty(256, 8, 4, dtype=torch.bfloat16)
        tensors[f"model.layers.{layer}.mlp.experts.w2_weight"] = torch.empty(256, 4, 4, dtype=torch.bfloat16)
    slots = Slots.fused(tensors)
    document = consumer_document(slots, manifest, "127.0.0.1:15000", 60)
    assert (len(document["slots"]), len(document["forms"])) == (14848, 1)
    assert len(json.dumps(document)) < 2 << 20
    table = table_of(document, manifest)
    written_and_read = processor_time(lambda: json.loads(json.dumps(document)), 3)
    assert processor_time(lambda: table_of(document, manifest), 3) < 20 * written_and_read
    assert (len(table.rows), table.nbytes) == (14848, 14848 * 3 * 32)
    part = table.part(table.rows[:3])
    assert (len(part["slots"]), len(part["ranges"])) == (3, 2)
    assert table_of(part, manifest).rows == table.rows[:3]


# -- what is not sent ------------------------------------------------------------------------------------------


def test_a_block_is_verified_before_it_is_sent(holder: tuple[Segment, MooncakeEngine], plain_table: PlainTable) -> None:
    segment, engine = holder
    table, memory = plain_table(segment.manifest)
    bad, withdrawn, other, good = table.rows[:4]
    segment.block(bad)[5] ^= 1
    segment.quarantine(withdrawn)
    wanted = {bad: None, withdrawn: None, other: bytes(16), good: segment.checksum(good)}
    outcome = push(segment, engine, table, wanted)
    assert list(outcome.pushed) == [good]
    assert outcome.corrupt == [bad]
    assert outcome.failed == {
        bad: "its bytes do not match its checksum at the source: restore that node to mend it",
        withdrawn: NOT_SENT,
        other: f"it has checksum {segment.checksum(other).hex()} on record, not {'00' * 16}: it is of other content",
    }
    assert memory[good].any()
    assert not memory[[bad, withdrawn, other]].any()


PlainTable = Callable[[Manifest], tuple[PushTable, "np.ndarray[Any, np.dtype[np.uint8]]"]]


@pytest.fixture
def plain_table(engines: tuple[MooncakeEngine, MooncakeEngine]) -> Iterator[PlainTable]:
    """`plain_table(manifest)` → a table with one whole block a row of an array of the consumer's, and the array."""
    registered = []

    def make(manifest: Manifest) -> tuple[PushTable, Any]:
        nbytes = int(manifest.nbytes[0])
        memory = np.zeros((len(manifest), nbytes), np.uint8)
        base, whole = memory.ctypes.data, (memory.ctypes.data, memory.nbytes)
        engines[1].register([whole])
        registered.append(whole)
        form = [FormCopy(0, 0, 0, 1, nbytes, nbytes, nbytes)]
        slots = [SlotBases(*key, 0, (base + row * nbytes,)) for row, key in enumerate(manifest.keys)]
        return PushTable.build(manifest, engines[1].session_id, [whole], [form], slots), memory

    yield make
    engines[1].unregister(registered)


class Meddler:
    """An engine that breaks what a real one cannot be made to break on demand."""

    def __init__(self, engine: MooncakeEngine) -> None:
        self._engine = engine
        self.session_id = engine.session_id
        self.registered = 0
        self.before_write: Callable[[Sequence[Copy]], None] = lambda copies: None
        self.after_write: Callable[[Sequence[Copy]], None] = lambda copies: None
        self.error: TransferFailed | None = None

    def register(self, ranges: Any) -> None:
        self.registered += 1
        self._engine.register(ranges)

    def unregister(self, ranges: Any) -> None:
        self.registered -= 1
        self._engine.unregister(ranges)

    def read(self, session_id: str, copies: Sequence[Copy]) -> None:
        self._engine.read(session_id, copies)

    def write(self, session_id: str, copies: Sequence[Copy], within_s: float | None = None) -> None:
        if self.error is not None:
            raise self.error
        self.before_write(copies)
        self._engine.write(session_id, copies)
        self.after_write(copies)


@pytest.mark.parametrize("blocks_at_once", [1, 3, 1000])
def test_reading_back_finds_a_byte_that_did_not_arrive(
    holder: tuple[Segment, MooncakeEngine],
    plain_table: PlainTable,
    monkeypatch: pytest.MonkeyPatch,
    blocks_at_once: int,
) -> None:
    segment, engine = holder
    monkeypatch.setattr(writer_module, "READ_BACK_NBYTES", blocks_at_once * int(segment.manifest.nbytes.max()))
    table, memory = plain_table(segment.manifest)
    meddler = Meddler(engine)

    def spoil(copies: Sequence[Copy]) -> None:
        memory[2, -1] ^= 1

    meddler.after_write = spoil
    wanted = dict.fromkeys(table.rows)
    assert push(segment, meddler, table, wanted).failed == {}
    outcome = push(segment, meddler, table, wanted, read_back=True)
    assert outcome.failed == {2: "it differs when read back"}
    assert meddler.registered == 0  # every buffer was given back


@pytest.mark.parametrize("read_back", [False, True])
def test_a_block_that_rots_between_its_verification_and_its_sending_is_not_reported(
    holder: tuple[Segment, MooncakeEngine], plain_table: PlainTable, read_back: bool
) -> None:
    """As in a node that is stopped in between: reading back compares with what was sent, which is the wrong bytes."""
    segment, engine = holder
    table, _ = plain_table(segment.manifest)
    rotten = table.rows[1]
    meddler = Meddler(engine)

    def rot(copies: Sequence[Copy]) -> None:
        segment.block(rotten)[3] ^= 1

    meddler.before_write = rot
    outcome = push(segment, meddler, table, dict.fromkeys(table.rows), read_back=read_back)
    assert sorted({*table.rows} - {*outcome.pushed}) == [rotten]
    assert outcome.failed == {rotten: CHANGED_MEANWHILE}
    assert outcome.corrupt == [rotten]


@pytest.mark.parametrize("is_unsettled", [False, True])
def test_a_segment_that_is_renewed_during_a_push_stays_mapped_while_it_may_be_read(
    holder: tuple[Segment, MooncakeEngine],
    plain_table: PlainTable,
    monkeypatch: pytest.MonkeyPatch,
    is_unsettled: bool,
) -> None:
    segment, engine = holder
    table, memory = plain_table(segment.manifest)
    monkeypatch.setattr(writer_module, "_still_read", kept := {})
    meddler = Meddler(engine)
    address, nbytes = segment.data_ranges()[0]
    before = bytes(segment.block(1))

    def withdraw(copies: Sequence[Copy]) -> None:
        engine.unregister([(address, nbytes)])
        segment.renew().unlink()
        segment.close()  # nobody has it any more but the push
        assert is_mapped(address)
        if is_unsettled:
            raise TransferFailed("late", timed_out=True)

    meddler.after_write = withdraw
    if is_unsettled:
        with pytest.raises(WriteFailed):
            push(segment, meddler, table, {1: None})
        assert is_mapped(address)
        kept.clear()
    else:
        assert push(segment, meddler, table, {1: None}).failed == {1: NOT_SENT}
    assert not is_mapped(address)
    assert memory[1].tobytes() == before


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_a_consumer_that_fails_twice_is_given_up_unless_something_went_well_between(
    holder: tuple[Segment, MooncakeEngine], plain_table: PlainTable
) -> None:
    segment, engine = holder
    table, _ = plain_table(segment.manifest)
    meddler = Meddler(engine)
    destination = ConsumerDestination(Writer(meddler, table, read_back=False), meddler)
    source = HostMemory("here", segment)
    batch = Batch(source, (Want(1, int(segment.manifest.nbytes[1]), segment.checksum(1)),), (), 0)
    failure = TransferFailed("1 copies failed")

    def fetch(error: TransferFailed | None) -> None:
        meddler.error = error
        source.fetch(batch, destination)

    for error in (failure, None, failure, failure):
        if error is None:
            fetch(None)
        else:
            with pytest.raises(WriteFailed, match=r"^write to .* is the process alive"):
                fetch(error)
    with pytest.raises(TransferFailed, match="given up") as gone:
        fetch(None)
    assert gone.value.is_destination_gone
    assert destination.health.error is None  # something was written to it


def test_a_consumer_to_which_nothing_could_be_written_is_told_from_one_that_was_never_tried() -> None:
    health = Health()
    assert health.error is None
    health.note(WriteFailed("gone"))
    assert health.error == "gone"


# -- disk ------------------------------------------------------------------------------------------------------


def test_blocks_of_the_checkpoint_go_through_a_buffer_and_wrong_ones_are_not_sent(
    moe_checkpoint: Path,
    expected_blocks: Callable[..., dict[ExpertKey, bytes]],
    engines: tuple[MooncakeEngine, MooncakeEngine],
    plain_table: PlainTable,
) -> None:
    checkpoint, engine = read_checkpoint(moe_checkpoint, "moe"), engines[0]
    manifest = checkpoint.manifest
    table, memory = plain_table(manifest)
    meddler = Meddler(engine)
    destination = ConsumerDestination(Writer(meddler, table, read_back=True), meddler)
    source = Disk("disk", partial(pin, checkpoint))
    wants = [Want(row, int(manifest.nbytes[row]), None) for row in range(len(manifest))]
    wants[7] = Want(7, int(manifest.nbytes[7]), bytes(16))
    pushed = source.fetch(Batch(source, tuple(wants), (), 0), destination)
    source.close()
    assert len(pushed) == len(manifest) - 1
    with pytest.raises(BlockUnavailable, match="at its source: its file"):
        destination.checksum(wants[7])
    assert meddler.registered == 0
    blocks = expected_blocks(moe_checkpoint)
    for row, key in enumerate(manifest.keys):
        assert bytes(memory[row]) == (bytes(len(blocks[key])) if row == 7 else blocks[key])


def test_a_buffer_that_rots_while_it_is_sent_is_not_reported(
    moe_checkpoint: Path, engines: tuple[MooncakeEngine, MooncakeEngine], plain_table: PlainTable
) -> None:
    checkpoint = read_checkpoint(moe_checkpoint, "moe")
    table, _ = plain_table(checkpoint.manifest)
    meddler = Meddler(engines[0])

    def rot(copies: Sequence[Copy]) -> None:
        view(copies[0].source, 1)[0] ^= 1

    meddler.before_write = rot
    destination = ConsumerDestination(Writer(meddler, table, read_back=False), meddler)
    source = Disk("disk", partial(pin, checkpoint))
    wants = tuple(Want(row, int(checkpoint.manifest.nbytes[row]), None) for row in (3, 7))
    pushed = source.fetch(Batch(source, wants, (), 0), destination)
    source.close()
    assert list(pushed) == [7]
    assert destination.reason(3) == CHANGED_MEANWHILE


def test_a_buffer_of_a_transfer_that_timed_out_is_never_used_again_and_their_number_has_a_limit(
    engines: tuple[MooncakeEngine, MooncakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_lost", lost := [])
    engine = Meddler(engines[0])
    for is_unsettled in (False, True) * writer_module.BUFFERS_LOST_MAX:
        with pytest.raises(WriteFailed), buffer(engine, 3333):
            raise WriteFailed("late", is_unsettled=is_unsettled)
    assert len(lost) == engine.registered == writer_module.BUFFERS_LOST_MAX
    with pytest.raises(TransferFailed, match="restart this node"), buffer(engine, 3333):
        pass
    engine.unregister([(np.frombuffer(memory, np.uint8).ctypes.data, 3333) for memory in lost])


# -- peers -----------------------------------------------------------------------------------------------------


def test_blocks_of_a_peer_may_also_be_read_and_written_on(
    holder: tuple[Segment, MooncakeEngine],
    engines: tuple[MooncakeEngine, MooncakeEngine],
    plain_table: PlainTable,
) -> None:
    segment, between = holder[0], MooncakeEngine("127.0.0.1")
    table, memory = plain_table(segment.manifest)
    destination = ConsumerDestination(Writer(between, table, read_back=True), between)
    peer = PeerMemory("peer", reading(between, holder[1].session_id))
    rows = range(len(segment.manifest))
    wants = tuple(Want(row, int(segment.manifest.nbytes[row]), segment.checksum(row)) for row in rows)
    wants = (*wants[:3], wants[3]._replace(checksum=bytes(16)), *wants[4:])
    pushed = peer.fetch(Batch(peer, wants, tuple(map(segment.address, rows)), 0), destination)
    assert pushed == {row: segment.checksum(row) for row in rows if row != 3}
    for row in rows:
        assert memory[row].tobytes() == (bytes(len(memory[row])) if row == 3 else bytes(segment.block(row)))


def test_late_bytes_of_a_peer_land_in_a_buffer_that_is_never_used_again(
    engines: tuple[MooncakeEngine, MooncakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_lost", lost := [])
    with pytest.raises(TransferFailed, match="gave up") as failed, buffer(engines[0], 3333):
        raise TransferFailed("gave up", timed_out=True)
    assert len(lost) == 1
    assert not failed.value.timed_out, "nothing late reaches the consumer"
    engines[0].unregister([(np.frombuffer(lost[0], np.uint8).ctypes.data, 3333)])


# -- what a table may not say ----------------------------------------------------------------------------------

BASE = 1 << 20
GOOD_COPY = FormCopy(0, 0, 0, 1, 100, 100, 100)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ranges": []}, "0 ranges"),
        ({"ranges": [(0, 100)]}, "out of its limits"),
        ({"ranges": [(BASE, 0)]}, "out of its limits"),
        ({"ranges": [(1 << 70, 100)]}, "out of its limits"),
        ({"ranges": [(BASE, 100), (BASE + 99, 1)]}, "ranges overlap"),
        ({"ranges": [(BASE, 99)]}, "not within one of the ranges"),
        ({"ranges": [(BASE + 1, 100)]}, "not within one of the ranges"),
        ({"ranges": [(BASE, 50), (BASE + 50, 50)]}, "not within one of the ranges"),
        ({"forms": []}, "0 forms"),
        ({"forms": [[]]}, "0 copies in form 0"),
        ({"forms": [[GOOD_COPY._replace(run_nbytes=0)]]}, "copies nothing"),
        ({"forms": [[GOOD_COPY._replace(rows=0)]]}, "copies nothing"),
        ({"forms": [[GOOD_COPY._replace(offset=-1)]]}, "out of its limits"),
        ({"forms": [[GOOD_COPY._replace(block_offset=-1)]]}, "out of its limits"),
        ({"forms": [[GOOD_COPY._replace(base=-1)]]}, "out of its limits"),
        ({"forms": [[GOOD_COPY._replace(rows=2, pitch=99)]]}, "rows of .* overlap"),
        ({"forms": [[GOOD_COPY._replace(rows=1 << 18, pitch=1 << 40)]]}, "larger than any block"),
        ({"forms": [[GOOD_COPY, *[GOOD_COPY._replace(rows=1 << 17)] * 2]]}, "runs in form 0"),
        ({"forms": [[GOOD_COPY._replace(block_offset=900)]]}, "takes byte 1,000 of a block of"),
        ({"forms": [[GOOD_COPY._replace(rows=9, pitch=100, block_pitch=111)]]}, "takes byte 988 of a block of"),
        ({"forms": [[GOOD_COPY, GOOD_COPY._replace(offset=99)]]}, "not within|overlap"),
        ({"ranges": [(BASE, 200)], "forms": [[GOOD_COPY, GOOD_COPY._replace(offset=99)]]}, "two copies overlap"),
        ({"slots": []}, "0 slots"),
        ({"slots": [SlotBases(0, 0, 1, (BASE,))]}, "no form 1"),
        ({"slots": [SlotBases(0, 0, 0, (BASE, BASE))]}, "2 bases"),
        ({"slots": [SlotBases(0, 0, 0, (0,))]}, "no address"),
        ({"slots": [SlotBases(0, 0, 0, (BASE,)), SlotBases(0, 1, 0, (BASE,))]}, "two copies overlap"),
    ],
)
def test_a_table_is_refused_that(make_manifest: Callable[..., Manifest], changes: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {
        "ranges": [(BASE, 100)], "forms": [[GOOD_COPY]], "slots": [SlotBases(0, 0, 0, (BASE,))],
    }  # fmt: skip
    manifest = make_manifest()
    assert manifest.nbytes[0] < 988
    PushTable.build(manifest, "127.0.0.1:9", **good)
    with pytest.raises(InvalidInput, match=says):
        PushTable.build(manifest, "127.0.0.1:9", **(good | changes))


def test_a_table_of_experts_that_the_model_lacks_is_refused(make_manifest: Callable[..., Manifest]) -> None:
    with pytest.raises(BlockUnavailable, match="no expert 99"):
        PushTable.build(make_manifest(), "h:1", [(BASE, 100)], [[GOOD_COPY]], [SlotBases(0, 99, 0, (BASE,))])
