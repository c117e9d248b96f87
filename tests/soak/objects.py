"""What others do in /dev/shm: to a node's object, or in its place, under a living node and between two lives.

Objects are unlinked, cut short, overwritten with noise and zeros, also where one section is damaged in both copies;
FIFOs, directories, links, junk, forged segments of other users and of later formats take their place. A node that
lives stays alive, says that it is not READY while nobody could attach, and has everything again in the end, to the
byte; one that is started over such an object does as well, or refuses with what to do, in a line.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import xxhash

from shm import attach, inventory
from shm.errors import HotspareError
from shm.layout import HEADER_NBYTES, MAGIC, VERSION
from tests.processes import Daemon, wait_until
from tests.soak.ground import MODEL, Field, Ground
from tests.soak.images import Image, expected_blocks, look
from tests.soak.tally import Tally

SUBJECT, HELPER = "n0", "n1"
STRANGER = 54_321  # a user
MENDED_WITHIN_S = 120.0  # what could not be mended at once is tried again after 30
TOLD_WITHIN_S = 30.0
ACTS_PER_S = 0.25
REMEDY = re.compile(r"`(hotspare )?rm`")


class Scene:
    """Two nodes that have everything; one of them is what things are done to."""

    def __init__(self, ground: Ground, field: Field, chance: random.Random, tally: Tally) -> None:
        self._field, self._chance, self._tally = field, chance, tally
        self._checkpoint = ground.checkpoint(chance.randrange(5))
        self._expected = expected_blocks(self._checkpoint)
        self._path = field.segment(SUBJECT)
        self._helper = field.serve(HELPER, (SUBJECT,), checkpoint=self._checkpoint, replicas=2).wait_ready()
        self._is_poor = chance.random() < 0.5
        self._subject = self._start().wait_ready()
        strangers = {"fifo": self._fifo, "directory": self._directory, "link": self._link, "junk": self._junk}
        if os.geteuid() == 0:
            strangers |= {"forged": self._forged, "another user's": self._another_users, "open": self._open}
        self._strangers: Mapping[str, Callable[[Path, bytes], None]] = strangers
        self._damages: Mapping[str, Callable[[Path], None]] = {
            "cuts": self._cut, "noise": self._noise, "zeros": self._zeros, "both-copies": self._both_copies,
            "unlinks": Path.unlink,
        }  # fmt: skip

    def _start(self) -> Daemon:
        checkpoint = None if self._is_poor else self._checkpoint
        return self._field.serve(SUBJECT, (HELPER,), checkpoint=checkpoint, replicas=2, scrub_rate="1GB")

    def run(self, acts: int) -> None:
        for _ in range(acts):
            self._chance.choice((self._damage, self._damage, self._displace, self._damage_at_rest, self._replace))()
        if self._subject.stop() != 0:
            self._tally.violation(f"{SUBJECT} stopped with {self._subject.process.returncode}")

    # -- under a living node ---------------------------------------------------------------------------------

    def _damage(self) -> None:
        name = self._chance.choice(sorted(self._damages))
        with self._reading(is_cut=name != "unlinks"):
            self._damages[name](self._path)
            self._tally.note(f"{name} under a node")
            self._wait_whole(f"{name} under a node")

    @contextmanager
    def _reading(self, *, is_cut: bool) -> Iterator[None]:
        """Somebody has it attached meanwhile, and keeps what he has; but who touches what was cut off dies of it."""
        if is_cut:
            yield
            return
        with attach(MODEL, namespace=self._field.namespace, node=SUBJECT) as weights:
            yield
            if [bytes(weights.block(row)) for row in weights.rows().tolist()] != self._expected:
                self._tally.violation("a reader lost bytes as the name was lost")

    def _displace(self) -> None:
        """Something else has the name for a while."""
        whole = self._path.read_bytes()
        self._path.unlink()
        what = self._chance.choice(sorted(self._strangers))
        try:
            self._strangers[what](self._path, whole)
        except FileExistsError:  # its owner was quicker
            self._wait_whole("an unlinked name")
            return
        self._tally.note(f"displaced by: {what}")
        wait_until(lambda: not self._is_ready() or self._is_ours(), f"that {what} is told", TOLD_WITHIN_S)
        self._list(what)
        self._remove(self._path)
        self._wait_whole(f"displaced by {what}")

    def _is_ours(self) -> bool:
        """Whether the node had taken its name again before the stranger came, and lost nothing."""
        return self._image() is not None

    # -- between two lives -----------------------------------------------------------------------------------

    def _damage_at_rest(self) -> None:
        self._stop()
        for name in self._chance.sample(sorted(self._damages), self._chance.choice((1, 1, 2))):
            with suppress(FileNotFoundError):
                self._damages[name](self._path)
                self._tally.note(f"{name} at rest")
        self._read_at_rest()
        self._start_over("a damaged object")

    def _replace(self) -> None:
        """A node is started over a stranger: it refuses and says why, or takes the name; then the stranger is gone."""
        self._stop()
        whole = self._path.read_bytes()
        self._path.unlink()
        what = self._chance.choice([*sorted(self._strangers), "too new"])
        (self._too_new if what == "too new" else self._strangers[what])(self._path, whole)
        self._tally.note(f"replaced by: {what}")
        self._read_at_rest()
        self._list(what)
        self._start_over(what)

    def _start_over(self, what: str) -> None:
        """Start the node over what is there; where it refuses, and says why, remove that, and start it again."""
        self._subject = self._start()
        wait_until(lambda: self._subject.process.poll() is not None or self._is_ready(), what, MENDED_WITHIN_S)
        if (status := self._subject.process.poll()) is not None:
            said = self._subject.said().splitlines()[-1]
            self._tally.did("refusals to start")
            if status != 1 or not said.startswith("hotspare: ") or not REMEDY.search(said):
                self._tally.violation(f"over {what} it ended with {status}, saying {said}")
            self._remove(self._path)
            self._subject = self._start()
        self._wait_whole(f"started over {what}")

    def _stop(self) -> None:
        if self._subject.stop() != 0:
            self._tally.violation(f"{SUBJECT} stopped with {self._subject.process.returncode}")

    def _read_at_rest(self) -> None:
        """Whoever attaches gets right bytes, is told which are wrong, or is refused."""
        try:
            with attach(MODEL, namespace=self._field.namespace, node=SUBJECT) as weights:
                told = {weights.manifest.index(*key) for key in weights.verify()}
                here = weights.rows().tolist()
                wrong = {row for row in here if bytes(weights.block(row)) != self._expected[row]}
        except HotspareError as error:
            self._tally.did(f"refusals: {type(error).__name__}")
            return
        self._tally.compare("blocks", len(here))
        if untold := (wrong | (set(range(len(self._expected))) - set(here))) - told:
            self._tally.violation(f"attached, and blocks {sorted(untold)} are wrong or missing, and untold")

    # -- damages ---------------------------------------------------------------------------------------------

    def _cut(self, path: Path) -> None:
        nbytes = path.stat().st_size
        os.truncate(path, self._chance.choice((0, self._chance.randrange(nbytes), self._chance.randrange(nbytes))))

    def _noise(self, path: Path) -> None:
        """Over any part, from a byte to all of it."""
        self._overwrite(path, *self._part(path), self._chance.randbytes)

    def _zeros(self, path: Path) -> None:
        self._overwrite(path, *self._part(path), bytes)

    def _both_copies(self, path: Path) -> None:
        """Some bytes of one section, at the same place in both."""
        here = self._image()
        if here is None:
            return
        name = self._chance.choice(("header", "manifest", "table"))
        (first, nbytes), (second, _) = here.sections()[name], here.sections()[f"second {name}"]
        del here
        at = self._chance.randrange(nbytes)
        for offset in (first, second):
            size = min(nbytes - at, self._chance.choice((1, 16, 4096)))
            self._overwrite(path, offset + at, size, self._chance.randbytes)
        self._tally.note(f"damages both copies of the {name} at {at}")

    def _part(self, path: Path) -> tuple[int, int]:
        nbytes = path.stat().st_size
        size = min(nbytes, self._chance.choice((1, 8, 4096, 3 * HEADER_NBYTES, 1 << 20, nbytes)))
        return self._chance.randrange(nbytes - size + 1) if nbytes else 0, size

    @staticmethod
    def _overwrite(path: Path, offset: int, nbytes: int, make: Callable[[int], bytes]) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(make(nbytes))

    # -- strangers -------------------------------------------------------------------------------------------

    def _fifo(self, path: Path, whole: bytes) -> None:
        os.mkfifo(path)

    def _directory(self, path: Path, whole: bytes) -> None:
        path.mkdir()

    def _link(self, path: Path, whole: bytes) -> None:
        path.symlink_to("/etc/hostname")

    def _junk(self, path: Path, whole: bytes) -> None:
        self._write(path, self._chance.randbytes(len(whole)))

    def _another_users(self, path: Path, whole: bytes) -> None:
        self._write(path, b"", STRANGER)

    def _forged(self, path: Path, whole: bytes) -> None:
        """A sealed segment with a right header, by another user, who might go on writing to it."""
        self._write(path, whole, STRANGER)

    def _open(self, path: Path, whole: bytes) -> None:
        """Ours, but everybody may write to it."""
        self._write(path, whole)
        path.chmod(0o666)

    def _too_new(self, path: Path, whole: bytes) -> None:
        page = bytearray(whole[: HEADER_NBYTES - 8])
        page[len(MAGIC) : len(MAGIC) + 4] = (VERSION + 1).to_bytes(4, "little")
        header = bytes(page) + xxhash.xxh3_64_intdigest(page).to_bytes(8, "little")
        self._write(path, header + header + whole[2 * HEADER_NBYTES :])

    @staticmethod
    def _write(path: Path, content: bytes, user: int | None = None) -> None:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "wb") as file:
            if user is not None:
                os.chown(fd, user, user)
            file.write(content)

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _list(self, what: str) -> None:
        """`hotspare ls` lists whatever it is."""
        names = {info.object_name for info in inventory.list_segments()}
        if not {self._path.name, self._field.segment(HELPER).name} <= names:
            self._tally.violation(f"beside {what} not all segments are listed")

    # -- what is seen ----------------------------------------------------------------------------------------

    def _image(self) -> Image | None:
        with suppress(HotspareError):
            return look(self._field.namespace, SUBJECT)
        return None

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return self._subject.ask("GET", "/readyz").status_code == 200
        return False

    def _wait_whole(self, what: str) -> None:
        """All is there, right, twice where it should be, and told to be."""
        try:
            wait_until(self._is_whole, what, MENDED_WITHIN_S)
        except AssertionError:
            assert self._subject.process.poll() is None, f"{what}: it ended with {self._subject.process.returncode}"
            self._tally.violation(f"{what}: not whole after {MENDED_WITHIN_S:.0f} s: {self._state()}")
            raise
        if self._helper.ask("GET", "/readyz").status_code != 200:
            self._tally.violation(f"{what}: {HELPER} is not ready")

    def _state(self) -> str:
        here = self._image()
        if here is None:
            return f"readyz {self._subject.ask('GET', '/readyz').text}"
        missing = set(range(len(self._expected))) - set(here.published())
        return f"missing {sorted(missing)}, wrong {here.wrong(self._expected)}, unlike {here.unlike()}"

    def _is_whole(self) -> bool:
        assert self._subject.process.poll() is None, f"it ended: {self._subject.said()[-300:]}"
        here = self._image()
        if here is None or not here.is_sealed or not self._is_ready():
            return False
        self._tally.compare("blocks", len(self._expected))
        is_all = here.published() == list(range(len(self._expected)))
        return is_all and not here.wrong(self._expected) and not here.unlike()


def run_round(ground: Ground, chance: random.Random, tally: Tally, seconds: float, keep: Path | None) -> None:
    with ground.field(keep) as field:
        scene = Scene(ground, field, chance, tally)
        scene.run(max(2, int(seconds * ACTS_PER_S)))
