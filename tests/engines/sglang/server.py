"""A whole SGLang as a process: started, asked, read the log of, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.processes import ROOT, die_with_parent

START_DEADLINE_S = 600.0  # some 60 s on an idle machine with two cores
ANSWER_DEADLINE_S = 300.0
PROMPTS = ([5, 6, 7, 8, 9, 10], [100, 200, 300, 400], [*[17] * 12, 3])
TOKENS = 16
PLUGIN = Path(__file__).with_name("plugin")


class Device(NamedTuple):
    """Where a server runs: its arguments, its variables, and where stand-ins lie for what is not installed there."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    paths: Sequence[Path]


CPU = Device(
    ("--device", "cpu", "--attention-backend", "torch_native"),
    {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    (ROOT / "tests/sglang/stubs",),
)
GPU = Device(
    (
        *("--device", "cuda", "--attention-backend", "triton", "--sampling-backend", "pytorch"),
        *("--moe-runner-backend", "triton", "--grammar-backend", "none"),
        *("--disable-cuda-graph", "--disable-custom-all-reduce", "--disable-overlap-schedule"),
    ),
    {
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    },
    (),
)
"""An H100: nothing of flashinfer is needed so, nor of what captures graphs."""
SMALL = (
    *("--skip-tokenizer-init", "--disable-radix-cache", "--max-total-tokens", "2048"),
    *("--mem-fraction-static", "0.3", "--host", "127.0.0.1"),
)


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


class Server:
    """`python -m sglang.launch_server`, killed with its children by `close`."""

    def __init__(
        self, model: Path, port: int, log: Path, *more: str, environment: Mapping[str, str], device: Device = CPU
    ) -> None:
        self.log = log
        self._url = f"http://127.0.0.1:{port}"
        self._began_s = time.monotonic()
        surroundings = {**os.environ, **device.environment, "SGLANG_HOST_IP": "127.0.0.1", "MC_FORCE_TCP": "1"}
        paths = [str(PLUGIN), *map(str, device.paths), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [*command, *device.arguments, *SMALL, *more],
                env={**surroundings, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_ready(self) -> float:
        """Seconds from its start until it is healthy."""
        while time.monotonic() < self._began_s + START_DEADLINE_S:
            assert self._process.poll() is None, f"it ended: {self.said()[-4000:]}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._url}/health", timeout=5).status_code == 200:
                    return time.monotonic() - self._began_s
            time.sleep(0.2)
        raise AssertionError(f"not ready within {START_DEADLINE_S:.0f} s: {self.said()[-4000:]}")

    def ask(self, prompt: Sequence[int]) -> Answer:
        """The greedy answer."""
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        said = self.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
        logprobs = [
            round(each[0], 4) if each[0] is not None else None for each in said["meta_info"]["output_token_logprobs"]
        ]
        return Answer(said["output_ids"], logprobs)

    def ask_all(self) -> list[Answer]:
        return [self.ask(prompt) for prompt in PROMPTS]

    def post(self, path: str, document: Any) -> Any:
        answer = httpx.post(f"{self._url}{path}", json=document, timeout=ANSWER_DEADLINE_S)
        assert answer.status_code in (200, 400), answer.text
        return answer.json()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, pattern: str) -> list[re.Match[str]]:
        """What its log says that is like this."""
        return list(re.finditer(pattern, self.said()))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
