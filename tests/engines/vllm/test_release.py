"""A whole vLLM started from memory, and experts of it loaded again: `make engines-vllm` installs one and runs this.

Nodes are the tests' own, and an engine is a process of an environment of its own (`engine.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from shm.layout import SHM_DIRECTORY
from tests.engines.vllm.models import write_model
from tests.processes import ROOT, die_with_parent

PYTHON = os.environ.get("ENGINES_VLLM")
TIMEOUT_S = 600
MARK = "told: "
FAMILIES = ("qwen3_moe", "deepseek_v3")
LOST = [[1, 3], [2, 0], [2, 7]]
LAYER_1 = [[1, expert] for expert in range(8)]
EVERYTHING = [[layer, expert] for layer in range(3) for expert in range(8)]
LARGEST_DIFFERENCE = 1e-3  # between logarithms of probabilities, from one start to the next on another machine load

pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="`make engines-vllm` brings vLLM"),
    pytest.mark.timeout(3 * TIMEOUT_S),
]


class Told:
    """What an engine said: `answer` and so on by step, several times where a step was; and its log."""

    def __init__(self, log: str) -> None:
        lines = [json.loads(line.removeprefix(MARK)) for line in log.splitlines() if line.startswith(MARK)]
        self.log = log
        self._steps = lines

    def __getitem__(self, step: str) -> list[Any]:
        return [said for each, said in self._steps if each == step]

    @property
    def loaded(self) -> list[str]:
        """The lines that say what came from where."""
        return [line.partition("] ")[2] for line in self.log.splitlines() if "] loaded " in line]


def run(model: Path, steps: list[list[Any]], *options: str, url: str | None = None) -> Told:
    """An engine of that directory, taken through these steps to its end."""
    asked = ["--model", str(model), "--load-format", "auto" if url is None else "hotspare", *options]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HOTSPARE_", "MC_", "VLLM_"))}
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("engine.py")), *asked, "--steps", json.dumps(steps)],
        env={**own, "PYTHONPATH": str(ROOT), **({} if url is None else {"HOTSPARE_URL": url})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        preexec_fn=die_with_parent,
    )
    told = Told(done.stdout)
    remove_what_is_left(told)
    assert done.returncode == 0, done.stdout[-6000:]
    return told


def remove_what_is_left(told: Told) -> None:
    """Memory that vLLM's ranks on a CPU share, and leave behind when several of them end."""
    for ident in chain.from_iterable(told["idents"]):
        if ident.startswith("vllm_dist_"):
            for left in Path(SHM_DIRECTORY).glob(f"{ident}*"):
                left.unlink()


def is_same(one: Any, other: Any) -> bool:
    """Whether two answers have the same tokens, with the same probabilities."""
    return one[0] == other[0] and max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) < LARGEST_DIFFERENCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model(family)` → its directory, written once."""
    return cache(lambda family: write_model(tmp_path_factory.mktemp("models") / family, family))


@pytest.fixture
def bare(model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """`bare(family)` → a directory with its config.json, and no weights."""

    def make(family: str) -> Path:
        directory = tmp_path / f"bare-{family}"
        directory.mkdir()
        shutil.copy(model(family) / "config.json", directory)
        return directory

    return make


@pytest.fixture(scope="module")
def from_disk(model: Callable[[str], Path]) -> Callable[..., Told]:
    """`from_disk(family, option…)` → the answer and the digests of an engine that vLLM started itself, run once."""
    return cache(lambda family, *options: run(model(family), [["digests"], ["answer"]], *options))


@pytest.fixture
def node(
    serve: Callable[..., Any], free_port: Callable[[], int], model: Callable[[str], Path]
) -> Callable[[str, str], Any]:
    """`node(family, include)` → a ready node that keeps the model."""

    def start(family: str, include: str = "all") -> Any:
        options = {"checkpoint": model(family), "model": family, "include": include}
        return serve("n0", {"n0": free_port()}, **options).wait_ready()

    return start


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_starts_from_memory_with_its_files_away_and_answers_as_from_disk(
    family: str, node: Callable[..., Any], bare: Callable[[str], Path], from_disk: Callable[..., Told]
) -> None:
    right = from_disk(family)
    told = run(bare(family), [["digests"], ["answer"], ["bind"]], url=node(family).url)
    assert told["digests"] == right["digests"]
    assert is_same(told["answer"][0], right["answer"][0])
    assert len(told.loaded) == 1
    assert "0 GB from peer, 0 GB from disk" in told.loaded[0]
    [refusal] = told["bind"][0]  # the CPU's kernels have packed the experts in place
    assert refusal.startswith("SlotMismatch")
    assert ".mlp.experts.routed_experts.w" in refusal
    assert "_proj.weight" in refusal
    assert "same bytes in another order" in refusal


def test_lost_experts_are_loaded_again_and_a_reload_that_would_do_harm_is_undone(
    node: Callable[..., Any], bare: Callable[[str], Path], from_disk: Callable[..., Told]
) -> None:
    right, url = from_disk("qwen3_moe"), node("qwen3_moe").url
    steps = [
        [["spoil", LOST], ["answer"], ["digests"]],
        [["reload", LOST[1:2]], ["digests"]],  # the other one of that layer was lost as well, and is not named
        [["reload", LOST], ["digests"], ["answer"]],
        [["spoil", LAYER_1], ["reload", LAYER_1], ["digests"]],
        [["spoil", EVERYTHING], ["reload", EVERYTHING], ["reload", EVERYTHING, "none"], ["digests"], ["answer"]],
        [["reload", [[3, 0]]], ["vllms-own"], ["answer"]],
    ]
    told = run(bare("qwen3_moe"), list(chain.from_iterable(steps)), url=url)
    spoiled, undone, *mended = told["digests"]
    assert spoiled == undone != right["digests"][0]
    assert mended == right["digests"] * 3
    is_right = [is_same(each, right["answer"][0]) for each in told["answer"]]
    assert is_right[:3] == [False, True, True]
    harmful, mending, layer, everything, vouched, stranger = told["reload"]
    assert "layer 2: expert 7, not asked for" in harmful
    assert (mending[0]["experts"], mending[0]["read"], mending[0]["witnesses"]) == (3, 16, 13)
    assert (layer[0]["experts"], layer[0]["read"], layer[0]["witnesses"]) == (8, 16, 8)  # of a layer beside it
    assert "nothing can show" in everything
    assert vouched[0]["experts"] == 24
    assert mending[0]["bytes_by_source"]["disk"] == 0 < mending[0]["bytes_by_source"]["local"]
    assert "layer 3 has no experts" in stranger
    # What `_as_at_start` is for. If this fails, vLLM packs weights for CPUs again in its own reload: take that out.
    assert not is_right[3]


def test_where_the_kernel_keeps_weights_as_they_are_only_lost_experts_are_read(
    node: Callable[..., Any], bare: Callable[[str], Path]
) -> None:
    """As kernels for GPUs do that leave bf16 alone: here the CPU's is kept from packing, so it would speak garbage."""
    steps = [["digests"], ["bind"], ["spoil", LOST], ["digests"], ["reload", LOST], ["digests"]]
    told = run(bare("qwen3_moe"), steps, "--unpacked", url=node("qwen3_moe").url)
    assert "experts_proved=24" in told["bind"][0][0]
    assert told["digests"][0] == told["digests"][2] != told["digests"][1]
    [done] = told["reload"][0]
    assert (done["experts"], done["read"]) == (3, 3)
    assert done["bytes_by_source"]["local"] == 3 * 3 * 256 * 128 * 2


def test_expert_parallel_ranks_take_their_own_experts_alone(
    node: Callable[..., Any], bare: Callable[[str], Path], model: Callable[[str], Path]
) -> None:
    """Digests, and no answers: the CPU's kernel takes no map of experts, and dies of it, from disk just as well."""
    options = ("--ranks", "2", "--expert-parallel")
    [right] = run(model("qwen3_moe"), [["digests"]], *options)["digests"]
    steps = [["digests"], ["spoil", LOST], ["digests"], ["reload", LOST], ["digests"]]
    told = run(bare("qwen3_moe"), steps, *options, url=node("qwen3_moe").url)
    assert right[0] != right[1]
    assert told["digests"][0] == told["digests"][2] == right != told["digests"][1]
    tensors = 102 - 24 * 3 // 2  # of 24 experts with 3 tensors each
    assert [line.split(" in ")[0] for line in told.loaded[:2]] == [f"loaded {tensors} tensors"] * 2
    assert [each["experts"] for each in told["reload"][0]] == [2, 1]


def test_ranks_with_a_part_of_every_expert_answer_as_from_disk(
    node: Callable[..., Any], bare: Callable[[str], Path], from_disk: Callable[..., Told]
) -> None:
    right = from_disk("qwen3_moe", "--ranks", "2")
    steps = [["digests"], ["spoil", LOST], ["reload", LOST], ["digests"], ["answer"]]
    told = run(bare("qwen3_moe"), steps, "--ranks", "2", url=node("qwen3_moe").url)
    assert told["digests"] == right["digests"] * 2
    assert is_same(told["answer"][0], right["answer"][0])


def test_an_engine_starts_without_a_node_and_beside_one_that_keeps_experts_alone(
    node: Callable[..., Any], model: Callable[[str], Path], from_disk: Callable[..., Told]
) -> None:
    right, directory = from_disk("qwen3_moe"), model("qwen3_moe")
    told = run(directory, [["digests"]], url="http://127.0.0.1:9")
    assert told["digests"] == right["digests"]
    assert "0 GB from local, 0 GB from peer" in told.loaded[0]
    extra = json.dumps({"url": node("qwen3_moe", "experts").url})
    told = run(directory, [["digests"]], "--extra", extra, url="http://127.0.0.1:9")
    assert told["digests"] == right["digests"]
    assert "0.00472 GB from local, 0 GB from peer, 0.00224 GB from disk" in told.loaded[0]
