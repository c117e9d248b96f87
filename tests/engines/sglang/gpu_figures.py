"""A whole SGLang on GPUs: a start from memory beside one from disk, and with two of them a rank that is lost.

    tests/engines/sglang/pack.sh OUT     # where there is a network; unpack OUT/site.tar.xz where the GPUs are
    PYTHONPATH=SITE:. python3 -m tests.engines.sglang.gpu_figures --gb 4

The checkpoint's file is away in every start from memory, and the node is dead when the rank is lost. A rank counts as
lost when a plugin of the tests says so and fills its slots with noise; all that follows is SGLang's own recovery.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from tests.engines.sglang import tiny
from tests.engines.sglang.recovery import ELASTIC, Recovery
from tests.engines.sglang.restart_figures import EXPERTS, PORT, node, read_into_cache, start, width_of
from tests.engines.sglang.server import GPU, Answer, Server

FILE = "model.safetensors"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def start_both_ways(scratch: Path, out: Path, gigabytes: float) -> None:
    model = tiny.write(scratch / "restart", "qwen3", experts=EXPERTS, width=width_of(gigabytes))
    with node(model) as kept:
        read_into_cache(model)
        start(model, out / "first.log", {}, GPU)  # kernels are compiled once
        ways: dict[str, dict[str, str]] = {"disk": {}, "memory": {"HOTSPARE_URL": kept.url}}
        for name, environment in ways.items():
            if name == "memory":
                (model / FILE).unlink()
            first_s, weights_s, answer = start(model, out / f"{name}.log", environment, GPU)
            say(f"{name}: first answer {first_s:.1f} s, of which weights {weights_s:.2f} s, tokens {answer.tokens[:5]}")


def lose_a_rank(scratch: Path, out: Path) -> None:
    model = tiny.write(scratch / "lost", "qwen3")
    orders, right = scratch / "orders.json", scratch / "right.safetensors"
    shutil.copy(model / FILE, right)
    with node(model) as kept:
        (model / FILE).unlink()
        environment = {"HOTSPARE_URL": kept.url, "HOTSPARE_FAULTS": str(orders), "HOTSPARE_FAULTS_RIGHT": str(right)}
        arguments = (*ELASTIC, "--enable-elastic-expert-backup")
        server = Server(model, PORT + 2, out / "lost.log", *arguments, environment=environment, device=GPU)
        try:
            say(f"two ranks ready after {server.wait_ready():.1f} s, from memory")
            recovery = Recovery(server, orders)
            before = server.ask_all()
            say(f"answers are the same again: {server.ask_all() == before}")
            recovery.wait_bound(is_refused=False)
            kept.process.kill()
            after = [recovery.lose(rank=1), *server.ask_all()]
        finally:
            server.close()
    pairs = list(zip(after, [before[0], *before], strict=True))
    say(f"tokens as before: {[one.tokens == other.tokens for one, other in pairs]}")
    say(f"logprobs differ by {max(_difference(*pair) for pair in pairs):.4f}; wrong slots: {recovery.wrong_slots()}")
    say(recovery.report())


def _difference(one: Answer, other: Answer) -> float:
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=4.0, help="of the model that is started both ways; 0: none")
    parser.add_argument("--out", type=Path, default=Path("."), help="for logs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if torch.cuda.device_count() > 1:
            lose_a_rank(Path(scratch), options.out)
        if options.gb:
            start_both_ways(Path(scratch), options.out, options.gb)


if __name__ == "__main__":
    main()
