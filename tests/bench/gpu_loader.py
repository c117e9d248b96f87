"""Loading a whole model onto a GPU, against a bare copy and safetensors: `python tests/bench/gpu_loader.py`.

Needs a CUDA device with room for `--gb` twice, and host memory for three times that. A real node keeps the checkpoint;
what lies on the device in the end is compared with the files, tensor by tensor.
"""

# ruff: noqa: T201 - what it prints is what it is for
from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from gpu_restore import (
    LOADER_THREADS,
    SHAPES,
    Figures,
    best,
    in_turn,
    load_with_safetensors,
    write_checkpoint,
)
from workbench import Bench, Daemon, bench

from transfer import Loader

DEVICE = "cuda:0"
LOAD = "Loader, local segment, verified"
STREAM = "Loader.tensors, each copied once more on the device"
BARE = "bare copy of torch's page-locked memory"


def stream(loader: Loader) -> None:
    """As an engine does: each tensor is copied to its place, and dropped."""
    for _, tensor in loader.tensors(device=DEVICE):
        tensor.clone()


def drop() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure(made: Bench, shape: str, nbytes: int) -> dict[str, float]:
    directory = made.directory / shape
    write_checkpoint(directory, shape, nbytes)
    files = sorted(directory.glob("*.safetensors"))
    with Daemon(made, "node-0", "--checkpoint", str(directory), "--fill", "disk") as node:
        print(f"node ready after {node.wait_until_ready():.1f} s", flush=True)
        with Loader(node.url, checkpoint=directory) as loader:
            started = time.perf_counter()
            loaded = loader.load(device=DEVICE)
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            figures = Figures(shape, loader.report.bytes_total)
            figures.add("first load: look, page-lock, compile, copy, verify", [first])
            assert loader.report.bytes_by_source["local"] == figures.nbytes, loader.report
            wrong = sum(
                not torch.equal(tensor.view(torch.uint8), loaded[name].view(torch.uint8))
                for part in load_with_safetensors(files, 8)
                for name, tensor in part.items()
            )
            print(f"{'tensors that differ from the files':<56} {wrong:8d}", flush=True)
            assert not wrong
            loaded.clear()
            drop()
            pinned = torch.empty(figures.nbytes, dtype=torch.uint8, pin_memory=True).fill_(1)
            to = torch.empty(figures.nbytes, dtype=torch.uint8, device=DEVICE)
            figures.add_all(in_turn({BARE: partial(to.copy_, pinned, True), LOAD: partial(loader.load, device=DEVICE)}))
            del pinned, to
            drop()
            figures.add(STREAM, best(partial(stream, loader)))
    for threads in LOADER_THREADS:
        taken = best(lambda threads=threads: load_with_safetensors(files, threads), 2)
        figures.add(f"safetensors load_file, warm, {threads} threads", taken)
    for file in directory.iterdir():
        file.unlink()
    loads = [f"safetensors load_file, warm, {threads} threads" for threads in LOADER_THREADS]
    figures.rates["best"] = max(figures.rates[load] for load in loads)
    figures.ratio("loader / bare page-locked copy", LOAD, BARE, 0.9)
    figures.ratio("loader / best safetensors", LOAD, "best", 1.2)
    figures.ratio("loader / safetensors, 1 thread", LOAD, loads[0], 5)
    return figures.rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10.5, help="experts of each shape")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(0), f"torch {torch.__version__}", flush=True)
    with bench() as made:
        all_figures = {shape: measure(made, shape, int(given.gb * 1e9)) for shape in given.shape or SHAPES}
    if given.json:
        given.json.write_text(json.dumps(all_figures, indent=1))


if __name__ == "__main__":
    main()
