"""Restoring into GPU tensors, against a bare copy, safetensors and a bare read: `python tests/bench/gpu_restore.py`.

Needs a CUDA device, a Mooncake wheel for CUDA, and host memory for four times `--gb`. The checkpoint is in the page
cache, the nodes are real ones on this machine, and what lies on the device in the end is compared with the files.
`--variants` also tries other ways and sizes than the defaults, `--profile` says where the time of a local restore goes,
`--local` leaves out all but that.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workbench
from safetensors.torch import load_file, save_file
from timeline import Timeline, tell
from workbench import Bench, Daemon, bench

from shm.attachment import Attachment
from shm.block import ExpertKey
from shm.errors import SegmentError
from shm.layout import BLOCK_ALIGNMENT
from transfer import Restorer, plan, sources
from transfer.client import ladder
from transfer.cuda import checksum as device_checksum
from transfer.cuda import slots as device_slots
from transfer.engine import Copy, DisposableEngine, MooncakeEngine
from transfer.engine.protocol import within_pieces
from transfer.slots import Slots, staging

DEVICE = "cuda:0"
HOST = "127.0.0.1"
FILES = 16
REPEATS = 5
ROUNDS = 7
LOADER_THREADS = (1, 8, 16)
READER_THREADS = (1, 2, 3, 4)
ITEM_NBYTES = 8 << 20
CALL_NBYTES = 128 << 20
ONE_CALL_ITEMS_MIB = (14, 40)
LOCAL = "restore, local shared memory, verified"
REMOTE = "restore, a peer over TCP, verified"
BARE_COPY = "bare page-locked copy of the segment"
LOCAL_RATIO = "local restore / bare page-locked copy"
LOCAL_RATIO_MIN = 0.95
BARE_READ = "bare tuned read"
POLLED_READ = "bare tuned read, asked now and then"
ELSEWHERE = "elsewhere"  # a model name that finds no segment on this host, so that peers serve
DEFAULT_NBYTES = 2 << 30  # moved with the engine's default settings
# name → (H, I, has scales, experts a layer)
SHAPES = {"fp8": (7168, 2048, True, 32), "bf16": (4096, 1536, False, 32)}  # DeepSeek-V3's, Qwen3-235B-A22B's
ENGINE_SETTINGS = ("MC_NUM_TCP_IO_THREADS", "MC_TCP_ENABLE_CONNECTION_POOL", "MC_TCP_LANES_PER_PEER")

Experts = dict[str, torch.Tensor]


def best(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of each run, ascending; one before them is not counted."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])


def in_turn(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each run, round by round; a round before them is not counted. A busy moment hits all alike so."""
    taken: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(rounds + 1):
        for what, run in runs.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            taken[what].append(time.perf_counter() - started)
    return {what: seconds[1:] for what, seconds in taken.items()}


# -- checkpoint and slots --------------------------------------------------------------------------------------


def random_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    nbytes = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=DEVICE)
    return raw.cpu().view(dtype).view(*shape)


def write_checkpoint(directory: Path, shape: str, nbytes: int) -> int:
    """Experts alone, in FILES files; the number of layers."""
    hidden, inner, has_scales, experts = SHAPES[shape]
    dtype = torch.float8_e4m3fn if has_scales else torch.bfloat16
    block = 3 * hidden * inner * dtype.itemsize
    layers = max(1, round(nbytes / block / experts))
    keys = [ExpertKey(layer, expert) for layer in range(layers) for expert in range(experts)]
    directory.mkdir()
    for file in range(FILES):
        content: Experts = {}
        for layer, expert in keys[file::FILES]:
            for part, sides in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                content[name] = random_tensor(sides, dtype)
                if has_scales:
                    scale = tuple(-(-side // 128) for side in sides)
                    content[f"{name}_scale_inv"] = random_tensor(scale, torch.float32)
        save_file(content, directory / f"model-{file + 1:05d}-of-{FILES:05d}.safetensors")
    names: dict[str, str] = {}
    for file in range(FILES):
        path = f"model-{file + 1:05d}-of-{FILES:05d}.safetensors"
        header = (directory / path).open("rb")
        with header:
            size = int.from_bytes(header.read(8), "little")
            names |= {name: path for name in json.loads(header.read(size)) if name != "__metadata__"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return layers


def parameters(shape: str, layers: int, tp: int = 1) -> Experts:
    """What a rank with every expert has: fused, and full of other bytes."""
    hidden, inner, has_scales, experts = SHAPES[shape]
    inner //= tp
    dtype = torch.float8_e4m3fn if has_scales else torch.bfloat16
    held: Experts = {}
    for layer in range(layers):
        for part, sides in {"w13": (2 * inner, hidden), "w2": (hidden, inner)}.items():
            name = f"model.layers.{layer}.mlp.experts.{part}_weight"
            held[name] = torch.zeros((experts, *sides), dtype=dtype, device=DEVICE)
            if has_scales:
                scale = (experts, -(-sides[0] // 128), -(-sides[1] // 128))
                held[f"{name}_scale_inv"] = torch.zeros(scale, dtype=torch.float32, device=DEVICE)
    return held


def poison(held: Experts) -> None:
    for tensor in held.values():
        tensor.view(torch.uint8).fill_(0xA5)


def differing(held: Experts, right: Experts, layers: int, shape: str) -> int:
    """How many of the slots' tensors are not the files'."""
    wrong = 0
    for layer in range(layers):
        stem = f"model.layers.{layer}.mlp.experts."
        for expert in range(SHAPES[shape][3]):
            for kind in ("weight", "weight_scale_inv") if SHAPES[shape][2] else ("weight",):
                gate, up, down = (
                    right[f"{stem}{expert}.{part}_proj.{kind}"].view(torch.uint8) for part in ("gate", "up", "down")
                )
                w13 = held[f"{stem}w13_{kind}"][expert].view(torch.uint8)
                w2 = held[f"{stem}w2_{kind}"][expert].view(torch.uint8)
                wrong += not torch.equal(w13[: len(gate)], gate)
                wrong += not torch.equal(w13[len(gate) :], up)
                wrong += not torch.equal(w2, down)
    return wrong


# -- what it is compared with ----------------------------------------------------------------------------------


def load_with_safetensors(files: Sequence[Path], threads: int) -> list[Experts]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda file: load_file(file, device=DEVICE), files))


def bare_copy(attachment: Attachment, rows: Iterable[int], device: str = DEVICE) -> Callable[[], object]:
    """The same bytes from the same page-locked pages, in as few copies as CUDA takes: one for each run in one piece."""
    held = sorted(attachment.held(rows).items(), key=lambda item: item[1].address)
    sizes = attachment.manifest.nbytes.tolist()
    spans: list[list[int]] = []
    edges = attachment.pinned_edges()
    for row, block in held:
        end = spans[-1][1] if spans else -BLOCK_ALIGNMENT
        if block.address - end < BLOCK_ALIGNMENT and not ((edges >= end) & (edges <= block.address)).any():
            spans[-1][1] = block.address + sizes[row]
        else:
            spans.append([block.address, block.address + sizes[row]])
    copies = []
    for start, end in spans:
        source = (ctypes.c_ubyte * (end - start)).from_address(start)
        host = torch.frombuffer(source, dtype=torch.uint8)
        copies.append((torch.empty(end - start, dtype=torch.uint8, device=device), host))

    def run() -> None:
        for to, host in copies:
            to.copy_(host, non_blocking=True)

    return run


def torch_pinned_copy(nbytes: int) -> list[float]:
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    host.fill_(1)
    to = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    return best(lambda: to.copy_(host, non_blocking=True))


def in_items(
    copies: Sequence[Copy], item_nbytes: int = ITEM_NBYTES, call_nbytes: int = CALL_NBYTES
) -> list[list[Copy]]:
    """Calls of at most `call_nbytes`, of items of at most `item_nbytes`."""
    calls: list[list[Copy]] = [[]]
    nbytes = 0
    for to, source, size in copies:
        for at in range(0, size, item_nbytes):
            item = Copy(to + at, source + at, min(item_nbytes, size - at))
            if nbytes + item.nbytes > call_nbytes:
                calls.append([])
                nbytes = 0
            calls[-1].append(item)
            nbytes += item.nbytes
    return calls


def bare_read(
    read: Callable[[str, Sequence[Copy]], None], session_id: str, calls: Sequence[Sequence[Copy]], threads: int
) -> Callable[[], object]:
    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda call: read(session_id, call), calls))

    return run


def waiting_read(engine: MooncakeEngine) -> Callable[[str, Sequence[Copy]], None]:
    """The call that waits by itself, with the same engine."""

    def read(session_id: str, call: Sequence[Copy]) -> None:
        to, source, sizes = map(list, zip(*within_pieces(call), strict=True))
        assert engine._engine.batch_transfer_sync_read(session_id, to, source, sizes) == 0

    return read


def serve_default() -> None:
    """A process with the engine's default settings, and memory to read: says where, and waits for its end."""
    memory = torch.ones(DEFAULT_NBYTES, dtype=torch.uint8)
    engine = bare_engine()
    assert engine.batch_register_memory([memory.data_ptr()], [DEFAULT_NBYTES]) == 0
    print(f"{HOST}:{engine.get_rpc_port()} {memory.data_ptr()}", flush=True)
    sys.stdin.read()


def bare_engine() -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    return engine


def read_default(session_id: str, address: int) -> None:
    """Read all of it in one thread, with the engine's default settings; prints bytes a second."""
    into = torch.ones(DEFAULT_NBYTES, dtype=torch.uint8)
    engine = bare_engine()
    assert engine.batch_register_memory([into.data_ptr()], [DEFAULT_NBYTES]) == 0
    calls = in_items([Copy(into.data_ptr(), address, DEFAULT_NBYTES)])
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        for call in calls:
            to, source, sizes = map(list, zip(*call, strict=True))
            assert engine.batch_transfer_sync_read(session_id, to, source, sizes) == 0
        taken.append(time.perf_counter() - started)
    print(DEFAULT_NBYTES / min(taken[1:]), flush=True)


def default_rate() -> float:
    """Bytes a second of a bare read, with no setting of the engine's set, on either side."""
    environment = {name: value for name, value in os.environ.items() if name not in ENGINE_SETTINGS}
    command = [sys.executable, __file__, "--role"]
    quiet: dict[str, Any] = {"env": environment, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [*command, "serve-default"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **quiet
    ) as server:
        assert server.stdout is not None
        session_id, address = server.stdout.readline().split()
        answer = subprocess.run(
            [*command, "read-default", session_id, address], stdout=subprocess.PIPE, check=True, text=True, **quiet
        )
        server.kill()
    return float(answer.stdout.split()[-1])


# -- the figures -----------------------------------------------------------------------------------------------


class Figures:
    """Rates of one shape, in GB/s, as they are measured; printed at once."""

    def __init__(self, shape: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.rates: dict[str, float] = {}
        self.rounds: dict[str, list[float]] = {}
        print(f"\n== {shape}: {nbytes / 1e9:.2f} GB", flush=True)

    def add(self, what: str, seconds: Sequence[float], nbytes: int | None = None) -> float:
        middle = seconds[len(seconds) // 2]
        rate = self.rates[what] = (nbytes or self.nbytes) / middle / 1e9
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        print(f"{what:<56} {rate:8.2f} GB/s  ({middle * 1e3:.0f} ms, {spread})", flush=True)
        return rate

    def add_all(self, taken: dict[str, list[float]]) -> None:
        """Of runs that took turns."""
        for what, seconds in taken.items():
            self.rounds[what] = seconds
            self.add(what, sorted(seconds))

    def ratio(self, what: str, over: str, under: str, target: float | None = None) -> None:
        """Of two rates; where they took turns, the median of the rounds' ratios."""
        value, spread = self.rates[over] / self.rates[under], ""
        if over in self.rounds and under in self.rounds:
            pairs = zip(self.rounds[under], self.rounds[over], strict=True)
            ratios = sorted(below / above for below, above in pairs)
            value, spread = ratios[len(ratios) // 2], f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        self.rates[what] = value
        verdict = "" if target is None else f"  target {target}: {'met' if value >= target else 'MISSED'}"
        print(f"{what:<56} {value:8.3f}{spread}{verdict}", flush=True)

    def best_of(self, prefix: str) -> str:
        """The fastest of `prefix`, N threads or calls."""
        return max(
            (what for what in self.rates if what.startswith(f"{prefix}, ") and what[len(prefix) + 2].isdigit()),
            key=self.rates.__getitem__,
        )


def restored(restorer: Restorer, held: Experts, source: str) -> list[float]:
    poison(held)
    report = restorer.restore()
    assert report.ok, report.failed[:1]
    assert report.bytes_by_source[source] == report.bytes_total, report
    return best(restorer.restore)


@contextlib.contextmanager
def constant(module: Any, name: str, value: object) -> Iterator[None]:
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


def refuse_pin(_: Attachment) -> None:
    raise SegmentError("left unpinned on purpose")


def local_figures(
    figures: Figures, url: str, held: Experts, right: Experts, layers: int, shape: str, *, profile: bool
) -> None:
    slots = Slots.fused(held)
    with Restorer(url) as restorer:
        started = time.perf_counter()
        restorer.bind(slots, proof="none")
        figures.add("bind: attach, page-lock, host buffers (once)", [time.perf_counter() - started])
        attachment = restorer._segment.attachment
        assert attachment is not None
        assert attachment.is_pinned()
        restored(restorer, held, "local")
        figures.add_all(
            in_turn({BARE_COPY: bare_copy(attachment, attachment.rows().tolist()), LOCAL: restorer.restore})
        )
        if profile:
            bare_ms = figures.nbytes / figures.rates[BARE_COPY] / 1e6
            print(tell([Timeline().of(restorer.restore) for _ in range(ROUNDS)], bare_ms), flush=True)
        poison(held)
        restorer.restore()
        wrong = differing(held, right, layers, shape)
        print(f"{'tensors that differ from the files':<56} {wrong:8d}", flush=True)
        assert not wrong
        proofs = [restorer.bind(slots) for _ in range(REPEATS)]
        assert all(proof.experts_proved == proof.experts_total for proof in proofs)
        figures.add("proof of all slots by the GPU, at bind", sorted(proof.seconds for proof in proofs))
        sampled = restorer.bind(slots, proof="sample")
        figures.add("proof of a sample of each layer, at bind", [sampled.seconds], sampled.bytes_proved)


def local_variants(figures: Figures, url: str, held: Experts, layers: int, shape: str) -> None:
    slots = Slots.fused(held)
    for lanes, size in ((2, 256), (4, 256), (3, 128), (6, 128), (3, 512)):
        with (
            constant(device_slots, "LANES", lanes),
            constant(sources, "LOCAL_BATCH_NBYTES_MAX", size << 20),
            Restorer(url) as restorer,
        ):
            restorer.bind(slots, proof="none")
            taken = restored(restorer, held, "local")
            figures.add(f"  variant: {lanes} lanes, batches up to {size} MiB", taken)
    with constant(device_checksum, "can_take", lambda _: False), Restorer(url) as restorer:
        restorer.bind(slots, proof="none")
        figures.add("  variant: checksums by the processor", restored(restorer, held, "local"))
    with constant(Attachment, "pin", refuse_pin), Restorer(url) as restorer:
        restorer.bind(slots, proof="none")
        figures.add("  variant: not page-locked, through host buffers", restored(restorer, held, "local"))


def parts_figure(figures: Figures, url: str, layers: int, shape: str) -> None:
    held = parameters(shape, layers, tp=4)
    with Restorer(url) as restorer:
        restorer.bind(Slots.fused(held, tp_rank=1, tp_size=4), proof="none")
        figures.add("restore of a quarter of each block (tp 4), by block", restored(restorer, held, "local"))
        seconds = restorer.bind(Slots.fused(held, tp_rank=1, tp_size=4)).seconds
        figures.add("proof of a quarter of each block, by block, at bind", [seconds])


def remote_figures(
    figures: Figures, url: str, held: Experts, right: Experts, layers: int, shape: str, more: bool
) -> None:
    """From the other node's memory."""
    slots = Slots.fused(held)
    with Restorer(url, model=ELSEWHERE) as restorer:
        restorer.bind(slots, proof="none")
        restored(restorer, held, "peer")
        wrong = differing(held, right, layers, shape)
        print(f"{'tensors that differ from the files':<56} {wrong:8d}", flush=True)
        assert not wrong
        bound, disposable = restorer._bound, restorer._lease.engine
        assert bound is not None
        assert isinstance(disposable, DisposableEngine)
        engine = disposable._engine  # what reads for the restorer, until it is thrown away
        assert isinstance(engine, MooncakeEngine)
        _, found = restorer._control.shard_map(
            url, bound.manifest, restorer._around.content, range(len(bound.manifest))
        )
        replicas = {row: next(r for r in mapped.replicas if r.node_id == "node-1") for row, mapped in found.items()}
        session_id = replicas[0].session_id
        into = torch.ones(figures.nbytes + (64 << 20), dtype=torch.uint8)
        ranges = [(into.data_ptr(), into.nbytes)]
        engine.register(ranges)
        copies, at = [], into.data_ptr()
        for row, replica in replicas.items():
            copies.append(Copy(at, replica.address, int(bound.manifest.nbytes[row])))
            at += copies[-1].nbytes
        runs: dict[str, Callable[[], object]] = {REMOTE: restorer.restore}
        for threads in READER_THREADS:
            for verb, read in {BARE_READ: waiting_read(engine), POLLED_READ: engine.read}.items():
                runs[f"{verb}, {threads} threads"] = bare_read(read, session_id, in_items(copies), threads)
        for mib in ONE_CALL_ITEMS_MIB:
            calls = in_items(copies, mib << 20, figures.nbytes)
            runs[f"{BARE_READ}, 1 call, items of {mib} MiB"] = bare_read(waiting_read(engine), session_id, calls, 1)
        figures.add_all(in_turn(runs, REPEATS))
        engine.unregister(ranges)
    if more:
        remote_variants(figures, url, held, slots)


def remote_variants(figures: Figures, url: str, held: Experts, slots: Slots) -> None:
    with Restorer(url, model=ELSEWHERE, straight=True) as restorer:
        restorer.bind(slots, proof="none")
        poison(held)
        started = time.perf_counter()
        assert restorer.restore().ok
        figures.add("  variant: straight into GPU memory, read back", [time.perf_counter() - started])
    for lanes, item, size in ((4, 8, 96), (6, 16, 96), (6, 8, 48), (8, 8, 48), (6, 4, 48)):
        with (
            constant(sources, "PEER_LANES_MAX", lanes),
            constant(plan, "ITEM_NBYTES_MAX", item << 20),
            constant(staging, "BUFFER_NBYTES", size << 20),
            constant(ladder, "PEER_BATCH_NBYTES", size << 20),
            Restorer(url, model=ELSEWHERE) as restorer,
        ):
            restorer.bind(slots, proof="none")
            taken = restored(restorer, held, "peer")
            figures.add(f"  variant: {lanes} lanes, items of {item} MiB, buffers of {size} MiB", taken)
    with constant(device_checksum, "can_take", lambda _: False), Restorer(url, model=ELSEWHERE) as restorer:
        restorer.bind(slots, proof="none")
        figures.add("  variant: checksums by the processor", restored(restorer, held, "peer"))


def measure(made: Bench, shape: str, given: argparse.Namespace, default: float | None) -> dict[str, float]:
    """Without a `default` rate: the local figures alone."""
    directory = made.directory / shape
    layers = write_checkpoint(directory, shape, int(given.gb * 1e9))
    files = sorted(directory.glob("*.safetensors"))
    ports = [workbench.free_port() for _ in range(1 if default is None else 2)]
    options = ["--checkpoint", str(directory), "--fill", "disk", "--replicas", str(len(ports))]
    with contextlib.ExitStack() as stack:
        nodes = []
        for number, port in enumerate(ports):
            peers = [f"--peer=node-{n}=http://{HOST}:{other}" for n, other in enumerate(ports) if n != number]
            with constant(workbench, "free_port", partial(int, port)):
                nodes.append(stack.enter_context(Daemon(made, f"node-{number}", *options, *peers)))
        for node in nodes:
            print(f"node ready after {node.wait_until_ready():.1f} s", flush=True)
        loaded = load_with_safetensors(files, 8)
        right = {name: tensor for part in loaded for name, tensor in part.items()}
        del loaded
        figures = Figures(shape, sum(tensor.nbytes for tensor in right.values()))
        held = parameters(shape, layers)
        local_figures(figures, nodes[0].url, held, right, layers, shape, profile=given.profile)
        if given.variants:
            local_variants(figures, nodes[0].url, held, layers, shape)
            if shape == "bf16":
                parts_figure(figures, nodes[0].url, layers, shape)
        if default is None:
            figures.ratio(LOCAL_RATIO, LOCAL, BARE_COPY, LOCAL_RATIO_MIN)
            return figures.rates
        nodes[0].end(9)
        Path("/dev/shm", made.name("node-0").object_name).unlink()
        remote_figures(figures, nodes[1].url, held, right, layers, shape, given.variants)
        del right, held
    torch.cuda.empty_cache()
    figures.add("torch's page-locked memory to the device", torch_pinned_copy(4 << 30), 4 << 30)
    for threads in LOADER_THREADS:
        taken = best(partial(load_with_safetensors, files, threads), 2)
        figures.add(f"safetensors load_file, warm, {threads} threads", taken)
    for file in directory.iterdir():
        file.unlink()
    return conclude(figures, default)


def conclude(figures: Figures, default: float) -> dict[str, float]:
    rates = figures.rates
    rates["bare read, default settings"] = default / 1e9
    loaded, one = (f"safetensors load_file, warm, {n} threads" for n in ("best", 1))
    rates[loaded] = max(rates[f"safetensors load_file, warm, {n} threads"] for n in LOADER_THREADS)
    bare, polled = figures.best_of(BARE_READ), figures.best_of(POLLED_READ)
    figures.ratio(LOCAL_RATIO, LOCAL, BARE_COPY, LOCAL_RATIO_MIN)
    figures.ratio("local restore / best safetensors", LOCAL, loaded, 1.3)
    figures.ratio("local restore / safetensors, 1 thread", LOCAL, one, 7)
    figures.ratio("remote restore / best bare tuned read", REMOTE, bare, 0.9)
    figures.ratio("remote restore / best bare read through our engine", REMOTE, polled)
    figures.ratio("best bare tuned read / default settings", bare, "bare read, default settings", 4)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10.5, help="experts of each shape")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--variants", action="store_true", help="also try other ways and sizes")
    parser.add_argument("--local", action="store_true", help="leave out what needs a second node, and the loaders")
    parser.add_argument("--profile", action="store_true", help="also say where the milliseconds of a local restore go")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        return serve_default() if given.role[0] == "serve-default" else read_default(given.role[1], int(given.role[2]))
    print(torch.cuda.get_device_name(0), f"{os.cpu_count()} cores, torch {torch.__version__}", flush=True)
    default = None if given.local else default_rate()
    if default is not None:
        print(f"bare read, default settings: {default / 1e9:.2f} GB/s", flush=True)
    all_figures = {}
    with bench() as made:
        for shape in given.shape or SHAPES:
            all_figures[shape] = measure(made, shape, given, default)
            if given.json:
                given.json.write_text(json.dumps(all_figures, indent=1))
    return None


if __name__ == "__main__":
    main()
