"""Other weights under the same name: nodes start, stop and start again with one of three contents, while files are
exchanged and overwritten under them.

A and B have the same headers and other bytes; of U only the up_proj tensors are not A's. Each node has a directory of
its own, whose files are changed one after the other, at any moment of a fill. Every sealed segment must be, as a whole,
what some directory was at some moment, and its content digest must say which. At the end all have one content.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tests.processes import Daemon, wait_until
from tests.soak.ground import MODEL, Field, Ground
from tests.soak.images import Image, expected_blocks, look
from tests.soak.tally import Tally
from transfer.checkpoint import read_checkpoint
from transfer.checkpoint.content import read_content

NODES = ("n0", "n1", "n2")
CONTENTS = "ABU"
SCALE = 0.12
FILE_NBYTES = (1 << 30, 12_345_678)  # all in one file, or in several
ACTS = 14  # of a round
SETTLE_WITHIN_S = 120.0
STIR_S_MAX = 0.6  # between starting a node and changing its files: a fill takes about as long
CHUNK_NBYTES = 1 << 20

State = tuple[str, ...]
"""Of each file of a directory, in order of their names, whose bytes it has."""


class Truth:
    """The three contents, and what each mixture of their files would look like."""

    def __init__(self, ground: Ground, chance: random.Random, directory: Path) -> None:
        nbytes = chance.choice(FILE_NBYTES)
        self.of = {
            name: ground.checkpoint(seed, scale=SCALE, file_nbytes=nbytes) for name, seed in (("A", 31), ("B", 32))
        }
        self.of["U"] = directory / "u"
        _write_up(self.of["A"], self.of["B"], self.of["U"])
        self.files = sorted(path.name for path in self.of["A"].glob("*.safetensors"))
        self._directory = directory
        self._known: dict[State, tuple[bytes, list[bytes]]] = {}

    def pure(self, name: str) -> State:
        return (name,) * len(self.files)

    def seen(self, state: State) -> tuple[bytes, list[bytes]]:
        """The content digest of a directory in that state, and its blocks."""
        if state not in self._known:
            mixture = self._directory / f"mixture-{len(self._known)}"
            shutil.copytree(self.of["A"], mixture, copy_function=os.link)
            for file, name in zip(self.files, state, strict=True):
                (mixture / file).unlink()
                os.link(self.of[name] / file, mixture / file)
            read = read_content(read_checkpoint(mixture, MODEL))
            self._known[state] = read.digest, expected_blocks(mixture)
        return self._known[state]


def _write_up(a: Path, b: Path, to: Path) -> None:
    """A's files with B's up_proj tensors."""
    shutil.copytree(a, to)
    for path in to.glob("*.safetensors"):
        whole = bytearray((a / path.name).read_bytes())
        other = (b / path.name).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for name, entry in json.loads(whole[8:start]).items():
            if ".up_proj." in name:
                begin, end = (start + at for at in entry["data_offsets"])
                whole[begin:end] = other[begin:end]
        path.write_bytes(whole)


class Directory:
    """A node's checkpoint directory. `was` is every state that it was ever in."""

    def __init__(self, path: Path, truth: Truth, name: str) -> None:
        self.path, self._truth = path, truth
        shutil.copytree(truth.of[name], path)
        self._state = list(truth.pure(name))
        self.was = {tuple(self._state)}

    def change(self, number: int, name: str, *, in_place: bool) -> None:
        """Give one file another content."""
        file = self._truth.files[number]
        source = self._truth.of[name] / file
        if in_place:
            _overwrite(source, self.path / file)
        else:
            shutil.copy(source, self.path / ".new")
            (self.path / ".new").rename(self.path / file)
        self._state[number] = name
        self.was.add(tuple(self._state))


def _overwrite(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("r+b") as write:
        while chunk := read.read(CHUNK_NBYTES):
            write.write(chunk)


class Scene:
    """One round."""

    def __init__(self, ground: Ground, field: Field, chance: random.Random, tally: Tally) -> None:
        self._field, self._chance, self._tally = field, chance, tally
        self._truth = Truth(ground, chance, field.directory)
        self._directories = {
            node: Directory(field.directory / node, self._truth, chance.choice(CONTENTS)) for node in NODES
        }
        self._nodes: dict[str, Daemon] = {}

    def run(self) -> None:
        for _ in range(ACTS):
            self._chance.choice((self._start, self._start, self._stop, self._change, self._change))()
            time.sleep(self._chance.uniform(0, STIR_S_MAX))
            self._look()
        self._settle()

    # -- what happens ----------------------------------------------------------------------------------------

    def _start(self, node: str = "", fill: str = "") -> None:
        """A node, after it was stopped, killed or emptied."""
        node = node or self._chance.choice(NODES)
        if node in self._nodes:
            self._stop(node)
        is_poor = not fill and self._chance.random() < 0.2 and len(self._nodes) > 0
        fill = fill or self._chance.choice(("auto", "peer") if is_poor else ("auto", "auto", "disk", "peer"))
        checkpoint = None if is_poor else self._directories[node].path
        self._nodes[node] = self._field.serve(node, NODES, checkpoint=checkpoint, replicas=2, fill=fill)
        self._tally.note(f"starts {node} to fill {fill}{' without a checkpoint' if is_poor else ''}")

    def _stop(self, node: str = "") -> None:
        if not self._nodes:
            return
        node = node or self._chance.choice(sorted(self._nodes))
        how = self._chance.choice(("stops", "kills"))
        daemon = self._nodes.pop(node)
        if how == "stops" and daemon.process.poll() is None:
            daemon.stop()
        else:
            daemon.kill()
        is_lost = self._chance.random() < 0.3
        if is_lost:
            self._field.segment(node).unlink(missing_ok=True)
        self._tally.note(f"{how} {node}{' and loses its memory' if is_lost else ''}")

    def _change(self) -> None:
        """All files of a directory, one after the other, or only some of them."""
        node, name = self._chance.choice(NODES), self._chance.choice(CONTENTS)
        in_place = self._chance.random() < 0.5
        numbers = list(range(len(self._truth.files)))
        self._chance.shuffle(numbers)
        some = numbers[: self._chance.choice((len(numbers), len(numbers), self._chance.randint(1, len(numbers))))]
        how = "overwrites" if in_place else "exchanges"
        self._tally.note(f"{how} {len(some)} of {len(numbers)} files of {node} by {name}'s")
        for number in some:
            self._directories[node].change(number, name, in_place=in_place)
            time.sleep(self._chance.choice((0, 0, self._chance.uniform(0, 0.2))))

    # -- what is seen ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        for node in NODES:
            here = look(self._field.namespace, node)
            if here is not None and here.is_sealed:
                self._judge(node, here, set().union(*(each.was for each in self._directories.values())))

    def _judge(self, node: str, here: Image, states: set[State]) -> None:
        """Whether it is one content as a whole, and says which."""
        rows = here.published()
        self._tally.compare("sealed segments")
        self._tally.compare("blocks", len(rows))
        told = here.header.content_digest
        for state in states:
            digest, blocks = self._truth.seen(state)
            if digest == told and not here.wrong(blocks):
                return
        named = ["".join(state) for state in states if self._truth.seen(state)[0] == told]
        mixed = {key: self._origins(here, row) for row, key in enumerate(here.manifest.keys) if row in set(rows)}
        kinds = {kind: sum(1 for each in mixed.values() if each == kind) for kind in set(mixed.values())}
        self._tally.violation(
            f"{node} sealed {kinds} as content {told.hex()[:12]} (of {named or 'nothing ever there'})"
        )

    def _origins(self, here: Image, row: int) -> str:
        """Which of the three contents the block is of, tensor by tensor."""
        block, found = here.block(row), set()
        for tensor in here.manifest.block(row).tensors:
            part = slice(tensor.offset, tensor.offset + tensor.nbytes)
            found.add(
                "".join(n for n in CONTENTS if self._truth.seen(self._truth.pure(n))[1][row][part] == block[part])
            )
        return "+".join(sorted(each or "?" for each in found))

    def _settle(self) -> None:
        """Every directory has one content in the end, and every node that is started with it takes it."""
        name = self._chance.choice(CONTENTS)
        for node in sorted(self._nodes):
            self._stop(node)
        for node in NODES:
            for number in range(len(self._truth.files)):
                self._directories[node].change(number, name, in_place=False)
            self._start(node, "auto")
        digest, blocks = self._truth.seen(self._truth.pure(name))
        for node in NODES:
            wait_until(lambda node=node: self._has(node, digest), f"{node} has {name}", SETTLE_WITHIN_S)
            here = look(self._field.namespace, node)
            if here is None or not here.is_sealed or here.wrong(blocks):
                self._tally.violation(f"{node} is ready, and not all of {name}")
        self._look()

    def _has(self, node: str, digest: bytes) -> bool:
        daemon = self._nodes[node]
        assert daemon.process.poll() is None, f"{node} ended with {daemon.process.returncode}: {daemon.said()[-300:]}"
        with suppress(Exception):
            is_ready = daemon.ask("GET", "/readyz").status_code == 200
            return is_ready and daemon.get("/v1/node")["content_digest"] == digest.hex()
        return False


def run_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    with ground.field(keep) as field:
        Scene(ground, field, chance, tally).run()
