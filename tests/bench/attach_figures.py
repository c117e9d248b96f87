"""Attaching to a segment with DeepSeek-V3's number of blocks, and what eight attached processes cost.

    python tests/bench/attach_figures.py [--layers 58] [--experts 256] [--readers 8] [--rounds 5]

The segment has 58 x 256 blocks of six tensors, each tensor tiny. Time to the first tensor: in a fresh process that has
imported torch and shm, from before `shm.attach` to the tensor in hand, its first element read. The baseline for a whole
process is one that only imports torch.

Memory: a real `hotspare serve` adopts the segment, eight processes attach and read every page of it. The figure is the
sum over the nine of the mapping's proportional set size in /proc/PID/smaps, over the segment's size: 1 is one copy.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from workbench import MODEL, ROOT, Bench, Daemon, Figure, arguments, bench, tell

from shm.block import ExpertKey, TensorEntry
from shm.checksum import checksum
from shm.manifest import FileSpec, Manifest
from shm.segment import Segment

FIRST_TENSOR_MS_MAX = 150
PSS_SHARE_MAX = 1.02
NODE = "reader-bench"
PROJECTIONS = {"down_proj": ((48, 32), (3, 2)), "gate_proj": ((32, 48), (2, 3)), "up_proj": ((32, 48), (2, 3))}

TORCH_ALONE = "import torch"
FIRST_TENSOR = """
import json, sys, time
import torch, shm
started = time.perf_counter()
weights = shm.attach(sys.argv[1], namespace=sys.argv[2])
tensor = weights[sys.argv[3]]
first = tensor.reshape(-1)[:1].view(torch.uint8).tolist()
print(json.dumps(time.perf_counter() - started))
"""
READER = """
import sys
import numpy, shm
with shm.attach(sys.argv[1], namespace=sys.argv[2]) as weights:
    whole = numpy.frombuffer(weights._view, numpy.uint8)
    int(whole[::4096].sum(dtype=numpy.int64))
    print("ready", flush=True)
    sys.stdin.read()
"""


def tiny_manifest(layers: int, experts: int) -> Manifest:
    """Blocks of six tensors under DeepSeek-V3's names and dtypes."""
    entries, at = [], 0
    for projection, (weight, scale) in PROJECTIONS.items():
        prefix = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{projection}"
        for suffix, dtype, shape in (("weight", "F8_E4M3", weight), ("weight_scale_inv", "F32", scale)):
            entries.append(TensorEntry(f"{prefix}.{suffix}", dtype, shape, 0, at))
            at += 8192
    keys = [ExpertKey(layer, expert) for layer in range(3, 3 + layers) for expert in range(experts)]
    return Manifest.build(MODEL, "deepseek", "experts", [FileSpec("f", at, "")], dict.fromkeys(keys, entries))


def seal_tiny(made: Bench, layers: int, experts: int) -> int:
    """Leave a sealed segment without an owner; its size in bytes."""
    manifest = tiny_manifest(layers, experts)
    segment = Segment.claim(made.name(NODE))
    segment.allocate(manifest, range(len(manifest)))
    for row in range(len(manifest)):
        block = segment.block(row)
        block[:] = row.to_bytes(4, "little") * (len(block) // 4) + bytes(len(block) % 4)
        segment.publish(row, checksum(block))
        block.release()
    segment.seal()
    nbytes = segment.nbytes
    segment.close()
    return nbytes


def run_python(code: str, *argv: str) -> tuple[float, str]:
    """Seconds of a fresh interpreter that runs the code, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def pss_nbytes(pid: int, object_name: str) -> int:
    """Proportional set size of the process's mappings of the object."""
    total, is_ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            is_ours = line.endswith("/" + object_name)
        elif is_ours and field == "Pss:":
            total += int(rest.split()[0]) * 1024
    return total


def shared_pages(made: Bench, readers: int) -> int:
    """The sum of proportional set sizes, in bytes, over a daemon and its readers."""
    object_name = made.name(NODE).object_name
    with Daemon(made, NODE) as daemon:
        daemon.wait_until_ready()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", READER, MODEL, made.namespace],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for _ in range(readers)
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n", "a reader could not attach"
            return sum(pss_nbytes(pid, object_name) for pid in [daemon.process.pid, *(p.pid for p in processes)])
        finally:
            for process in processes:
                process.communicate()


def main() -> None:
    options = arguments(
        __doc__,
        layers=(58, "layers of experts"),
        experts=(256, "experts a layer"),
        readers=(8, "attached processes besides the daemon"),
        rounds=(5, "fresh processes that attach"),
    )
    with bench() as made:
        nbytes = seal_tiny(made, options.layers, options.experts)
        last = f"model.layers.{2 + options.layers}.mlp.experts.{options.experts - 1}.up_proj.weight"
        first_s, whole_s, torch_s = [], [], []
        for _ in range(options.rounds):
            seconds, printed = run_python(FIRST_TENSOR, MODEL, made.namespace, last)
            whole_s.append(seconds)
            first_s.append(json.loads(printed))
            torch_s.append(run_python(TORCH_ALONE)[0])
        share = shared_pages(made, options.readers) / nbytes
    first_ms = statistics.median(first_s) * 1000
    blocks = options.layers * options.experts
    figures = [
        Figure(
            f"attach to the first tensor, {blocks:,} blocks", f"{first_ms:.0f} ms", f"at most {FIRST_TENSOR_MS_MAX} ms",
            first_ms <= FIRST_TENSOR_MS_MAX, f"{min(first_s) * 1000:.0f} to {max(first_s) * 1000:.0f}",
        ),
        Figure(
            "a fresh process to its first tensor", f"{statistics.median(whole_s):.2f} s",
            note=f"importing torch alone {statistics.median(torch_s):.2f} s",
        ),
        Figure(
            f"memory of the daemon and {options.readers} processes, of one copy", f"{share:.4f}",
            f"at most {PSS_SHARE_MAX}", share <= PSS_SHARE_MAX,
        ),
    ]  # fmt: skip
    document = {"first_tensor_s": first_s, "fresh_process_s": whole_s, "torch_alone_s": torch_s, "pss_share": share}
    tell(figures, document, as_json=options.json)


if __name__ == "__main__":
    main()
