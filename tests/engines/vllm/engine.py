"""A whole vLLM in this process: `engine.py --model DIR --load-format F STEP…`; runs where vLLM is, and not the tests.

Each step prints a line of JSON, after a mark, since vLLM prints too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in this process, or in workers of it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, SamplingParams

from shm.errors import HotspareError
from transfer import Restorer
from transfer.slots import Slots

MARK = "told: "
PROMPT = [5, 6, 7, 8, 9, 10]
TOKENS = 16


def start(model: str, load_format: str, ranks: int, extra: dict[str, Any]) -> LLM:
    """An engine whose ranks have a share of the experts each."""
    several = {"tensor_parallel_size": ranks, "enable_expert_parallel": True} if ranks > 1 else {}
    return LLM(
        model=model,
        load_format=load_format,
        model_loader_extra_config=extra,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        dtype="bfloat16",
        enable_prefix_caching=False,
        **several,
    )


def answer(llm: LLM) -> Any:
    """Greedy tokens, and the logarithm of each one's probability."""
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    said = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)[0].outputs[0]
    return list(said.token_ids), [each[token].logprob for each, token in zip(said.logprobs, said.token_ids, strict=True)]


def bind(llm: LLM) -> Any:
    """What a Restorer says of the engine's expert parameters as its kernels have them."""

    def look(model: torch.nn.Module) -> str:
        with Restorer(os.environ["HOTSPARE_URL"]) as restorer:
            try:
                return f"bound: {restorer.bind(Slots.fused(dict(model.named_parameters())))}"
            except HotspareError as error:
                return f"{type(error).__name__}: {error}"

    return llm.apply_model(look)


STEPS: dict[str, Callable[[LLM], Any]] = {"answer": answer, "bind": bind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--extra", type=json.loads, default={})
    parser.add_argument("steps", nargs="+", choices=STEPS)
    asked = parser.parse_args()
    began = time.monotonic()
    llm = start(asked.model, asked.load_format, asked.ranks, asked.extra)
    print(MARK + json.dumps(["start", time.monotonic() - began]), flush=True)
    for step in asked.steps:
        print(MARK + json.dumps([step, STEPS[step](llm)]), flush=True)


if __name__ == "__main__":
    main()
