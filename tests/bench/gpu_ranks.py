"""Ranks of one host that take their shares of one segment at once: `python tests/bench/gpu_ranks.py --ranks 2`.

A process and a GPU each, as many as `--ranks`, expert parallel. One after the other, but all ranks together, they bind,
restore, copy the same pages bare, and load. The figure is what all of them move in the time that the last of them
takes, against the same of the bare copies, in turns. Every slot is compared with the files. Needs as many CUDA devices
and, in host memory, three times `--gb`.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_restore
import torch
from gpu_restore import SHAPES, bare_copy, differing, load_with_safetensors, parameters, poison, write_checkpoint
from workbench import Daemon, bench

from transfer import Loader, Restorer
from transfer.slots import Slots

ROUNDS = 5
RATIO_MIN = 0.9


# -- a rank ----------------------------------------------------------------------------------------------------


class Rank:
    """One process: what it does when it is told, by the word."""

    def __init__(self, number: int, ranks: int, url: str, directory: Path, shape: str) -> None:
        gpu_restore.DEVICE = self._device = f"cuda:{number}"
        torch.cuda.set_device(number)
        hidden, inner, has_scales, experts = SHAPES[shape]
        self._first = number * experts // ranks
        SHAPES[shape] = hidden, inner, has_scales, experts // ranks
        self._directory, self._shape = directory, shape
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        self._layers = 1 + max(int(name.split(".")[2]) for name in index)
        self._experts = {f".experts.{self._first + n}." for n in range(experts // ranks)}
        self._held = parameters(shape, self._layers)
        self._slots = Slots.fused(self._held, ep_rank=number, ep_size=ranks)
        self._restorer = Restorer(url)
        self._loader = Loader(url, checkpoint=directory)
        self.nbytes = sum(tensor.nbytes for tensor in self._held.values())

    def bind(self) -> None:
        self._restorer.bind(self._slots, proof="none")
        attachment = self._restorer._segment.attachment
        assert attachment is not None
        self._bare = bare_copy(attachment, [attachment.manifest.index(*key) for key in self._slots.keys], self._device)

    def restore(self) -> None:
        report = self._restorer.restore()
        assert report.ok, report.failed[:1]
        assert report.bytes_by_source["local"] == report.bytes_total == self.nbytes, report

    def bare(self) -> None:
        self._bare()

    def one(self) -> None:
        assert self._restorer.restore([self._slots.keys[0]]).ok

    def load(self) -> None:
        loaded = self._loader.load(lambda name: any(each in name for each in self._experts), device=self._device)
        assert sum(tensor.nbytes for tensor in loaded.values()) == self.nbytes

    def poison(self) -> None:
        poison(self._held)

    def compare(self) -> None:
        """Raises AssertionError for a slot that is not the files'."""
        right = {}
        for file in sorted(self._directory.glob("*.safetensors")):
            for name, tensor in load_with_safetensors([file], 1)[0].items():
                layer, expert = (int(name.split(".")[at]) for at in (2, 5))
                if f".experts.{expert}." in self._experts:
                    kept = name.replace(f".experts.{expert}.", f".experts.{expert - self._first}.")
                    right[kept] = tensor
                assert layer < self._layers
        assert differing(self._held, right, self._layers, self._shape) == 0

    def run(self) -> None:
        """Do what each line says, and answer with the seconds that it took."""
        print(self.nbytes, flush=True)
        for line in sys.stdin:
            torch.cuda.synchronize()
            started = time.perf_counter()
            getattr(self, line.strip())()
            torch.cuda.synchronize()
            print(time.perf_counter() - started, flush=True)


# -- all of them -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ranks_of(count: int, url: str, directory: Path, shape: str) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, __file__, "--role"]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(number), str(count), url, str(directory), shape],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(count)
        ]


def answers(ranks: Sequence[subprocess.Popen[str]]) -> list[float]:
    """A number of each. Lines that are none are of libraries."""
    said = []
    for rank in ranks:
        assert rank.stdout is not None
        for line in rank.stdout:
            with contextlib.suppress(ValueError):
                said.append(float(line))
                break
        else:
            raise SystemExit(f"a rank ended with {rank.wait()}")
    return said


def together(ranks: Sequence[subprocess.Popen[str]], word: str) -> float:
    """Have all do it at once: the seconds of the last."""
    for rank in ranks:
        assert rank.stdin is not None
        print(word, file=rank.stdin, flush=True)
    return max(answers(ranks))


def measure(count: int, shape: str, nbytes: int) -> dict[str, Any]:
    with bench() as made, contextlib.ExitStack() as stack:
        directory = made.directory / shape
        write_checkpoint(directory, shape, nbytes)
        node = stack.enter_context(Daemon(made, "node-0", "--checkpoint", str(directory), "--fill", "disk"))
        node.wait_until_ready()
        ranks = stack.enter_context(ranks_of(count, node.url, directory, shape))
        total = sum(answers(ranks))
        middle: Callable[[list[float]], float] = lambda seconds: sorted(seconds)[len(seconds) // 2]  # noqa: E731
        bind = together(ranks, "bind")
        together(ranks, "poison")
        first = together(ranks, "restore")
        together(ranks, "compare")
        together(ranks, "bare")
        together(ranks, "load")
        rounds = [{word: together(ranks, word) for word in ("bare", "restore", "load", "one")} for _ in range(ROUNDS)]
        ratios = {word: middle([each["bare"] / each[word] for each in rounds]) for word in ("restore", "load")}
        print(f"\n== {shape}, {count} ranks, {total / 1e9:.2f} GB together; every slot is the files'")
        rate = total / count / bind / 1e9
        print(f"{'bind: attach, page-lock, all ranks together':<56} {bind:8.2f} s, {rate:.1f} GB/s a rank")
        print(f"{'the first restore':<56} {total / first / 1e9:8.2f} GB/s")
        for word in ("bare", "restore", "load"):
            print(f"{word:<56} {total / middle([each[word] for each in rounds]) / 1e9:8.2f} GB/s")
        print(f"{'one expert each, at once':<56} {middle([each['one'] for each in rounds]) * 1e3:8.2f} ms")
        for word, ratio in ratios.items():
            verdict = "met" if ratio >= RATIO_MIN else "MISSED"
            print(f"{word + ' / bare copies, all at once':<56} {ratio:8.3f}  target {RATIO_MIN}: {verdict}", flush=True)
        for rank in ranks:
            rank.kill()
        return {"total": total, "bind_s": bind, "first_s": first, "rounds": rounds, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--gb", type=float, default=20.0, help="experts of all ranks together")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--role", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        number, ranks, url, directory, shape = given.role
        Rank(int(number), int(ranks), url, Path(directory), shape).run()
        return
    if given.ranks < 1 or given.ranks > torch.cuda.device_count():
        raise SystemExit(f"{given.ranks} ranks want as many GPUs, and this host has {torch.cuda.device_count()}")
    print(f"{given.ranks} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    figures = {shape: measure(given.ranks, shape, int(given.gb * 1e9)) for shape in given.shape or SHAPES}
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
