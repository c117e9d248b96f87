"""A rank's slots in a campaign of pauses: pushed into, restored, given back and taken again, and looked at."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.processes import Daemon
from tests.soak.rank import NAME, RankProcess
from tests.soak.tally import Tally

REGISTER_WITHIN_S = 40.0  # a registration is taken back only after what is under way

Key = tuple[int, int]


@dataclass
class Push:
    """A restore into the slots, whose end was not seen yet."""

    at: Daemon
    path: str
    experts: set[Key]
    epoch: int


class SlotsScene:
    """What is known of the slots. `word` is how they are given back: "unregister", "DELETE", or None for never."""

    def __init__(self, rank: RankProcess, keys: Sequence[Key], word: str | None, tally: Tally) -> None:
        self.rank = rank
        self._keys, self._word, self._tally = keys, word, tally
        self._pushes: list[Push] = []
        self._good: set[Key] = set()
        """Experts that a restore reported good since the slots last were given other content."""
        self._epoch = 0
        """Of the slots' content: another one whenever it is given up."""
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

    def _renounce(self) -> None:
        self._epoch += 1
        self._good.clear()

    # -- restoring -------------------------------------------------------------------------------------------

    def push(self, at: Daemon, body: dict[str, Any], experts: set[Key], within_s: float) -> None:
        """Have nodes write the slots."""
        answer = _ask(at, "POST", "/v1/restores", within_s, json=body | {"target": {"consumer_id": NAME}})
        if answer is not None and answer.status_code == 202:
            self._pushes.append(Push(at, answer.headers["location"], experts, self._epoch))
        elif answer is not None and answer.status_code == 404:
            self.is_registered = False
        self._tally.note(f"pushes by {at.node_id}: {answer and answer.status_code}")

    def restore(self) -> None:
        """By the rank itself."""
        said = self.rank.ask("restore")
        self._tally.note(f"restores-itself, the rank: {said[:80]}")
        if not said.startswith("error"):
            self._good |= set(self._keys) - {(layer, expert) for layer, expert in json.loads(said)}

    def collect(self, within_s: float) -> None:
        """Note what those pushes came to that have ended."""
        waiting, self._pushes = self._pushes, []
        for push in waiting:
            if push.at.process.poll() is None and not self._note_end(push, within_s):
                self._pushes.append(push)

    def _note_end(self, push: Push, within_s: float) -> bool:
        answer = _ask(push.at, "GET", push.path, within_s)
        if answer is None:
            return False
        document = answer.json() if answer.status_code == 200 else {"state": "forgotten"}
        if document["state"] in ("pending", "running"):
            return False
        self._tally.did(f"pushes that ended {document['state']}")
        if push.epoch == self._epoch:
            self._good |= _reported(push, document)
        return True

    # -- looking ---------------------------------------------------------------------------------------------

    def look(self) -> None:
        """At what a restore reported good."""
        if self.pattern is not None or not self._good:
            return
        for key, is_right in zip(self.rank.slots, self.rank.ask("check"), strict=True):
            if key in self._good:
                self._tally.compare("slots reported good")
                if is_right != "1":
                    self._tally.violation(f"a slot of {key} was reported good, and is wrong")
                    self._good.discard(key)

    def look_at_pattern(self) -> None:
        if self.pattern is None:
            return
        count, *slots = self.rank.ask("intact", self.pattern).split()
        self._tally.compare("looks at memory given back")
        if count != "0":
            self._tally.violation(f"{count} bytes of given-back memory were written after the word: {slots}")
            self.rank.ask("pattern", self.pattern)


def _reported(push: Push, document: dict[str, Any]) -> set[Key]:
    """The experts that a restore says are in place."""
    failed = {(each["layer"], each["expert"]) for each in document.get("failed", ())}
    if document["state"] == "succeeded":
        return push.experts
    is_told = document["state"] == "failed" and document["blocks_total"] == len(push.experts)
    is_told = is_told and document["blocks_done"] + len(failed) == len(push.experts)
    return push.experts - failed if is_told else set()


def _ask(node: Daemon, method: str, path: str, within_s: float, **options: Any) -> httpx.Response | None:
    """Its answer; None where it gave none: it is paused, or was killed."""
    try:
        return node.ask(method, path, timeout=within_s, **options)
    except httpx.HTTPError:
        return None


def some_of(keys: Sequence[Key], chance: random.Random) -> set[Key]:
    """All of them, or some."""
    return set(keys) if chance.random() < 0.5 else set(chance.sample(keys, chance.choice((1, 5, 17))))
