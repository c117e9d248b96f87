"""One bit flips anywhere in a sealed segment: in a header, a manifest, a block table, a block; alive or at rest.

At rest, whoever attaches finds every block as it was, or is told of it; a daemon that adopts it has all of it right in
the end. Under a living daemon the same, and the object is what it was, to the byte, after a while.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from shm import attach
from shm.errors import HotspareError
from shm.layout import SegmentName
from shm.segment import Segment
from tests.processes import Daemon, wait_until
from tests.soak.ground import MODEL, Field, Ground
from tests.soak.images import Image, expected_blocks, flip, look
from tests.soak.tally import Tally

NODES = ("n0", "n1")
SUBJECT = "n0"
AT_REST_PER_S = 10  # flips with no daemon there, for each second of flips under one, of which each takes some
ADOPTIONS = 2  # of a round, by a daemon
MENDED_WITHIN_S = 90.0  # what could not be mended at once is tried again after 30


class Scene:
    """Two nodes that have everything, and one of them is what bits flip in."""

    def __init__(self, ground: Ground, field: Field, chance: random.Random, tally: Tally) -> None:
        self._field, self._chance, self._tally = field, chance, tally
        self._checkpoint = ground.checkpoint(chance.randrange(5))
        self._expected = expected_blocks(self._checkpoint)
        self._nodes = {node: self._start(node) for node in NODES}
        for node in self._nodes.values():
            node.wait_ready()
        self._rows = list(range(len(self._expected)))

    def _start(self, node: str) -> Daemon:
        return self._field.serve(node, NODES, checkpoint=self._checkpoint, replicas=2, scrub_rate="1GB")

    def run(self, seconds: float) -> None:
        """Flips under a daemon for so long, then at rest."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._flip_alive()
        self._nodes[SUBJECT].stop()
        for _ in range(int(AT_REST_PER_S * seconds)):
            self._flip_at_rest()
        for _ in range(ADOPTIONS):
            self._flip_and_adopt()

    # -- flipping --------------------------------------------------------------------------------------------

    def _image(self) -> Image:
        here = look(self._field.namespace, SUBJECT)
        assert here is not None
        return here

    def _flip(self, where: str) -> str:
        """Flip a bit of a section, each as likely as any other; which, for a violation."""
        sections = self._image().sections()
        block = self._chance.choice([name for name in sections if name.startswith("block")])
        name = self._chance.choice([block, *(name for name in sections if not name.startswith("block"))])
        offset, nbytes = sections[name]
        bit = self._chance.randrange(8 * nbytes)
        flip(self._field.namespace, SUBJECT, 8 * offset + bit)
        self._tally.did(f"flips {where}")
        self._tally.note(f"flips bit {bit} of the {name} {where}")
        return f"bit {bit} of the {name} {where}"

    def _flip_at_rest(self) -> None:
        """Looked at by a reader and by the next owner; then all is put back."""
        whole = self._bytes()
        what = self._flip("at rest")
        self._read(what)
        segment = Segment.claim(SegmentName(self._field.namespace, MODEL, SUBJECT))
        kept = segment.published().tolist() if segment.is_allocated else []
        segment.close()
        if kept == self._rows:
            self._read(f"{what}, adopted")
        else:
            self._tally.violation(f"{what}: adopted with {len(kept)} of {len(self._rows)} blocks")
        self._field.segment(SUBJECT).write_bytes(whole)

    def _bytes(self) -> bytes:
        return self._field.segment(SUBJECT).read_bytes()

    def _read(self, what: str) -> None:
        """Attach, and compare: what is wrong or missing must be told, and nothing else."""
        try:
            with attach(MODEL, namespace=self._field.namespace, node=SUBJECT) as weights:
                told = {weights.manifest.index(*key) for key in weights.verify()}
                here = set(weights.rows().tolist())
                wrong = {row for row in here if bytes(weights.block(row)) != self._expected[row]}
        except HotspareError as error:
            self._tally.violation(f"{what}: it cannot be attached: {error}")
            return
        self._tally.compare("blocks", len(self._rows))
        bad = wrong | (set(self._rows) - here)
        if bad != told:
            self._tally.violation(
                f"{what}: {sorted(bad - told)} are bad and untold, {sorted(told - bad)} told and good"
            )

    # -- with a daemon ---------------------------------------------------------------------------------------

    def _flip_alive(self) -> None:
        whole = self._bytes()
        what = self._flip("under a daemon")
        self._wait_mended(what)
        try:
            wait_until(lambda: self._bytes() == whole, what, MENDED_WITHIN_S)
        except AssertionError:
            now = self._bytes()
            at = [place for place in range(len(whole)) if now[place] != whole[place]]
            self._tally.violation(f"{what}: not as it was after {MENDED_WITHIN_S:.0f} s, at bytes {at[:5]}")

    def _flip_and_adopt(self) -> None:
        what = self._flip("before an adoption")
        before = self._field.segment(SUBJECT).stat().st_ino
        self._nodes[SUBJECT] = self._start(SUBJECT).wait_ready()
        self._wait_mended(what)
        if self._field.segment(SUBJECT).stat().st_ino != before:
            self._tally.violation(f"{what}: the segment was given up for one bit")
        self._nodes[SUBJECT].stop()

    def _wait_mended(self, what: str) -> None:
        try:
            wait_until(self._is_whole, what, MENDED_WITHIN_S)
        except AssertionError:
            self._tally.violation(f"{what}: blocks still are wrong or missing after {MENDED_WITHIN_S:.0f} s")

    def _is_whole(self) -> bool:
        here = self._image()
        self._tally.compare("blocks", len(self._rows))
        return here.published() == self._rows and not here.wrong(self._expected)


def run_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    with ground.field(keep) as field:
        Scene(ground, field, chance, tally).run(seconds)
