"""A whole vLLM in this process, told what to do step by step; runs where vLLM is, and not in the tests' process.

Each step prints a line of JSON, after a mark, since vLLM prints too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in this process, or in workers of it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the steps' functions go to workers
    "HF_HUB_OFFLINE": "1",
}

import in_ranks  # workers find it too, beside this script
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

MARK = "told: "
PROMPT = [5, 6, 7, 8, 9, 10]
TOKENS = 16


def start(model: str, load_format: str, *, ranks: int, has_expert_parallel: bool, extra: dict[str, Any]) -> LLM:
    """An engine whose ranks have a share of the experts each, or a part of every one."""
    return LLM(
        model=model,
        load_format=load_format,
        model_loader_extra_config=extra,
        worker_extension_cls="transfer.vllm.worker.Worker",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        dtype="bfloat16",
        enable_prefix_caching=False,
        tensor_parallel_size=ranks,
        enable_expert_parallel=has_expert_parallel,
    )


def answer(llm: LLM) -> Any:
    """Greedy tokens, and the logarithm of each one's probability."""
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    said = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)[0].outputs[0]
    tokens = list(said.token_ids)
    return tokens, [each[token].logprob for each, token in zip(said.logprobs, tokens, strict=True)]


def digests(llm: LLM) -> Any:
    """Of each rank, by name, what its parameters hold."""

    return llm.apply_model(in_ranks.digests)


def bind(llm: LLM) -> Any:
    """What a Restorer says of the engine's expert parameters as its kernels have them."""

    return llm.apply_model(partial(in_ranks.bind, url=os.environ["HOTSPARE_URL"]))


def spoil(llm: LLM, lost: list[list[int]]) -> Any:
    """Overwrite these (layer, expert) with noise; how many tensors of each rank."""

    return llm.apply_model(partial(in_ranks.spoil, lost=lost))


def reload(llm: LLM, lost: list[list[int]], *more: str) -> Any:
    """Have the workers load these (layer, expert) again: what each says."""
    try:
        return llm.collective_rpc("reload_experts", args=(lost, *more))
    except Exception as error:  # a rank's, as vLLM passes it on
        return f"{type(error).__name__}: {error}"


def vllms_own(llm: LLM) -> Any:
    """vLLM's own reload of everything, by whatever it was started with."""
    return llm.collective_rpc("reload_weights")


STEPS: dict[str, Callable[..., Any]] = {
    "answer": answer, "digests": digests, "bind": bind, "spoil": spoil, "reload": reload, "vllms-own": vllms_own,
}  # fmt: skip


def tell(step: str, said: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps([step, said])}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--unpacked", action="store_true", help="have the CPU's kernel keep weights as they are loaded")
    parser.add_argument("--extra", type=json.loads, default={})
    parser.add_argument("--steps", type=json.loads, required=True, help='[["answer"], ["spoil", [[1, 3]]], …]')
    asked = parser.parse_args()
    if asked.unpacked:
        cpu_moe.cpu_prepack_moe_weight = lambda weight, isa: weight
    began = time.monotonic()
    llm = start(
        asked.model,
        asked.load_format,
        ranks=asked.ranks,
        has_expert_parallel=asked.expert_parallel,
        extra=asked.extra,
    )
    tell("start", time.monotonic() - began)
    tell("idents", llm.apply_model(in_ranks.ident))
    for step, *arguments in asked.steps:
        tell(step, STEPS[step](llm, *arguments))


if __name__ == "__main__":
    main()
