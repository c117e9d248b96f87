"""A rank's slots in a campaign of pauses: pushed into, restored, given back and taken again, and looked at."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from app.restores.lease import LEASE_S, MARGIN_S
from tests.processes import Daemon
from tests.soak.rank import NAME, RankProcess
from tests.soak.tally import Tally

REGISTER_WITHIN_S = 40.0  # a registration is taken back only after what is under way
LIST_WITHIN_S = 3.0

Key = tuple[int, int]


Document = dict[str, Any]


@dataclass(frozen=True)
class Push:
    """A restore into the slots that was asked for: of which experts, and what of."""

    experts: frozenset[Key]
    epoch: int


class SlotsScene:
    """What is known of the slots. `word` is how they are given back: "unregister", "DELETE", or None for never."""

    def __init__(self, rank: RankProcess, keys: Sequence[Key], word: str | None, tally: Tally) -> None:
        self.rank = rank
        self._keys, self._word, self._tally = keys, word, tally
        self._pushes: dict[str, Push] = {}
        """By the restore's id; those whose end was not seen yet."""
        self._ended: set[str] = set()
        self._good: set[Key] = set()
        """Experts that a restore reported good since the slots last were given other content."""
        self._epoch = 0
        """Of the slots' content: another one whenever it is given up."""
        self._still_from_s = 0.0
        """Until then nodes may write for a life of the rank's node that is over."""
        self.pattern: int | None = None
        """What fills the memory while it is given back."""
        self.is_registered = False

    # -- registering, giving back ----------------------------------------------------------------------------

    def register(self, home: Daemon) -> None:
        if self._word == "DELETE":
            document = json.loads(self.rank.ask("document"))
            answer = _ask(home, "PUT", f"/v1/consumers/{NAME}", REGISTER_WITHIN_S, json=document)
            self.is_registered = answer is not None and answer.is_success
        else:
            self.is_registered = self.rank.ask("register") == "registered"
        self._tally.did("registrations" if self.is_registered else "registrations refused")

    def give_back(self, home: Daemon, value: int) -> None:
        """Take the registration back, and use the memory for something else from the moment that the word is given."""
        if self._word == "DELETE":
            answer = _ask(home, "DELETE", f"/v1/consumers/{NAME}", REGISTER_WITHIN_S)
            is_given = answer is not None and answer.status_code == 204
            self.is_registered = not (is_given or (answer is not None and answer.status_code == 404))
        else:
            is_given, self.is_registered = self.rank.ask("unregister") == "unregistered", False
        if is_given:
            self._renounce()
            self.rank.ask("pattern", value)
            self.pattern = value
            self._tally.note(f"gives-back memory, and fills it with {value}")

    def take(self, home: Daemon) -> None:
        """Register the memory again."""
        self.look_at_pattern()
        self.pattern = None
        self.register(home)
        self._tally.note("takes memory again")

    def wipe(self) -> None:
        self._renounce()
        self.rank.ask("wipe")

    def home_is_restarted(self) -> None:
        """It knows no restore any more, and those that were under way may have left anything."""
        self._renounce()
        self._pushes.clear()
        self._still_from_s = time.monotonic() + LEASE_S + MARGIN_S

    def _renounce(self) -> None:
        self._epoch += 1
        self._good.clear()

    @property
    def _is_still(self) -> bool:
        return time.monotonic() > self._still_from_s

    # -- restoring -------------------------------------------------------------------------------------------

    def push(self, at: Daemon, body: dict[str, Any], experts: set[Key], within_s: float) -> None:
        """Have nodes write the slots."""
        answer = _ask(at, "POST", "/v1/restores", within_s, json=body | {"target": {"consumer_id": NAME}})
        if answer is not None and answer.status_code == 202:
            self._pushes[answer.json()["id"]] = Push(frozenset(experts), self._epoch if self._is_still else -1)
        elif answer is not None and answer.status_code == 404:
            self.is_registered = False
        self._tally.note(f"pushes by {at.node_id}: {answer and answer.status_code}")

    def restore(self) -> None:
        """By the rank itself."""
        is_still, said = self._is_still, self.rank.ask("restore")
        self._tally.note(f"restores-itself, the rank: {said[:80]}")
        if not said.startswith("error") and is_still:
            self._good |= set(self._keys) - {(layer, expert) for layer, expert in json.loads(said)}

    # -- looking ---------------------------------------------------------------------------------------------

    def look(self, home: Daemon) -> None:
        """At what a restore reported good, and no restore that is under way may be writing.

        What it writes is right but for a block that rots while it is sent; that is found, reported, and brought again.
        Restores whose request was not answered are in the node's list, too.
        """
        if self.pattern is not None or (before := self._listed(home)) is None:
            return
        self._note_ends(before)
        is_right = self.rank.ask("check")
        if (after := self._listed(home)) is None:
            return
        known = {document["id"] for document in before}
        busy = self._experts(before, "pending", "running")
        busy |= self._experts([document for document in after if document["id"] not in known])
        for key, right in zip(self.rank.slots, is_right, strict=True):
            if key in self._good - busy:
                self._tally.compare("slots reported good")
                if right != "1":
                    self._tally.violation(f"a slot of {key} was reported good, and is wrong")
                    self._good.discard(key)

    def _listed(self, home: Daemon) -> list[Document] | None:
        """Restores into the slots, the newest first, as the node tells that does them one after the other."""
        answer = _ask(home, "GET", "/v1/restores", LIST_WITHIN_S)
        if answer is None or answer.status_code != 200:
            return None
        return [each for each in answer.json()["restores"] if each["target"].get("consumer_id") == NAME]

    def _experts(self, documents: Iterable[Document], *states: str) -> set[Key]:
        """Of restores in these states, or in any; all, where nobody told which a restore is of."""
        everything = Push(frozenset(self._keys), 0)
        chosen = [document for document in documents if not states or document["state"] in states]
        return set().union(*(self._pushes.get(document["id"], everything).experts for document in chosen))

    def _note_ends(self, newest_first: Sequence[Document]) -> None:
        """Note what those came to that have ended."""
        for document in reversed(newest_first):
            if document["state"] in ("pending", "running") or document["id"] in self._ended:
                continue
            experts = self._experts([document])
            push = self._pushes.pop(document["id"], None)
            self._ended.add(document["id"])
            self._tally.did(f"pushes that ended {document['state']}")
            good = _reported(experts, document)
            self._good -= experts - good
            if push is not None and push.epoch == self._epoch:
                self._good |= good

    def look_at_pattern(self) -> None:
        if self.pattern is None:
            return
        count, *slots = self.rank.ask("intact", self.pattern).split()
        self._tally.compare("looks at memory given back")
        if count != "0":
            self._tally.violation(f"{count} bytes of given-back memory were written after the word: {slots}")
            self.rank.ask("pattern", self.pattern)


def _reported(experts: set[Key], document: Document) -> set[Key]:
    """The experts that a restore says are in place."""
    failed = {(each["layer"], each["expert"]) for each in document.get("failed", ())}
    if document["state"] == "succeeded":
        return experts
    is_told = document["state"] == "failed" and document["blocks_total"] == len(experts)
    is_told = is_told and document["blocks_done"] + len(failed) == len(experts)
    return experts - failed if is_told else set()


def _ask(node: Daemon, method: str, path: str, within_s: float, **options: Any) -> httpx.Response | None:
    """Its answer; None where it gave none: it is paused, or was killed."""
    try:
        return node.ask(method, path, timeout=within_s, **options)
    except httpx.HTTPError:
        return None


def some_of(keys: Sequence[Key], chance: random.Random) -> set[Key]:
    """All of them, or some."""
    return set(keys) if chance.random() < 0.5 else set(chance.sample(keys, chance.choice((1, 5, 17))))
