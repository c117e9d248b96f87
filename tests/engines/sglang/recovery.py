"""A rank is lost in a server that serves, and SGLang recovers it: what came of that, and how long each part took."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.engines.sglang import tiny
from tests.engines.sglang.server import PROMPTS, Answer, Server
from tests.processes import wait_until

BOUND = "experts come back from Hotspare's memory"
REFUSED = "lost experts will be loaded by SGLang"
DEADLINE_S = 300.0
SUMMED_OTHERWISE = 0.05
"""Of logprobs in bf16, at most: other ranks add up other experts' shares. Slots are compared to the byte."""

TWICE = json.dumps({"physical_to_logical_map": [[e for e in range(tiny.EXPERTS) for _ in range(2)]] * tiny.LAYERS})
ELASTIC = (
    *("--tp", "2", "--ep-size", "2", "--enable-eplb", "--elastic-ep-backend", "nixl", "--moe-runner-backend", "triton"),
    *("--ep-num-redundant-experts", str(tiny.EXPERTS), "--init-expert-location", TWICE),
    *("--eplb-rebalance-num-iterations", "100000", "--ep-dispatch-algorithm", "dynamic"),
)
"""Every expert twice, both times on the same rank: who loses a rank has its experts nowhere else."""


class Recovery:
    def __init__(self, server: Server, orders: Path) -> None:
        self._server = server
        self._orders = orders
        self._answered_s = 0.0

    def wait_bound(self, *, is_refused: bool) -> None:
        """Until both ranks know whether their slots can be filled."""
        said = REFUSED if is_refused else BOUND
        wait_until(lambda: len(self._server.lines(said)) == 2, said, DEADLINE_S)

    def lose(self, rank: int) -> Answer:
        """Have a rank die in the next forward pass; the answer to the request that meets it."""
        self._orders.with_suffix(".new").write_text(json.dumps({"dead": rank}))
        self._orders.with_suffix(".new").rename(self._orders)
        began_s = time.monotonic()
        answer = self._server.ask(PROMPTS[0])
        self._answered_s = time.monotonic() - began_s
        return answer

    def wrong_slots(self) -> int:
        """Of both ranks, after the last placement."""
        found = self._server.lines(r"rank (\d): (\d+) slots of parameters hold the checkpoint's bytes, (\d+) do not")
        last = {match[1]: int(match[3]) for match in found}
        assert len(found) > len(last) == 2, "each looked before and after"
        return last["0"]  # the rank that is declared dead is brought nothing, and asked nothing

    def report(self) -> str:
        """Detection, rebalance, weights, first answer: what each part took, in seconds."""
        weights = [match[1] for match in self._server.lines(r"\d+ of \d+ experts in ([\d.]+) s, bytes")]
        again = [match[1] for match in self._server.lines(r"loaded \d+ tensors in ([\d.]+) s")][2:]
        rebalance = [match[1] for match in self._server.lines(r"rebalance end time=([\d.]+)s")]
        return (
            f"weights {', '.join(weights or again)} s, rebalance with them {', '.join(rebalance)} s, "
            f"answer after {self._answered_s:.2f} s"
        )
