"""What a tensor's name says: its stack and layer, which expert it belongs to, or that it belongs to none.

Experts lie under `experts`, one by one (`….experts.7.up_proj.weight`) or fused, all in one tensor whose first axis is
the expert (`….experts.down_proj`). Two families keep fused ones elsewhere: Granite (`….block_sparse_moe.input_linear`)
and Step-3 (`….moe.gate_proj`). Not all that lies under `experts` is an expert's: routers and norms are found there too.
Nothing is guessed: a matrix there that is known as neither is refused, since left out in silence it would be missing.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from transfer.checkpoint.safetensors_header import StoredTensor

_EXPERTS = re.compile(r"(?:^|\.)experts\.")  # not shared_experts
_ELSEWHERE = re.compile(r"(?:^|\.)(?:block_sparse_moe\.(?=(?:input|output)_linear\.)|moe\.(?=(?:gate|up|down)_proj\.))")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_LAYER_WORDS = frozenset({"layers", "layer", "blocks", "block", "h"})
_FUSED = re.compile(
    r"(?:gate_up_proj|gate_and_up_projs|gate_proj|up_proj|down_projs?|w13|w1|w2|w3|fc1|fc2|input_linear|output_linear)"
    r"(?:[._].+)?"
)
_BESIDE = re.compile(r"(?:router|gate|act_fn|\w*norm|\w*correction_bias)(?:\..+)?")
_BESIDE_RANK_MAX = 2  # a router's weight is [experts, hidden]
_VALUES_RANK_MAX = 1

_REFUSED = (
    (re.compile(r"att(?:entio)?n\.experts\."), "experts of attention, as in JetMoE"),
    (re.compile(r"(?:^|\.)experts\.expert_[0-9]+\."), "the naming of Switch and NLLB"),
    (re.compile(r"(?:^|\.)experts\.mlp\.[wv][0-9]$"), "DBRX's matrices, with the experts one below the other"),
)


class LayerName(NamedTuple):
    """`<stack>.<number>.<rest>`; a stack without a number has one layer, 0."""

    stack: str
    number: int
    rest: str
    is_numbered: bool = True

    def template(self, tail: str, layer: str) -> str:
        """The name of what lies at `tail` in the layer, with `layer` in place of its number."""
        parts = (self.stack, layer if self.is_numbered else "", self.rest, tail)
        return ".".join(part for part in parts if part)


class AmongExperts(NamedTuple):
    """A name among a layer's experts: `<head>.[experts.][<expert>.]<rest>`; `expert` is None where there is none."""

    head: LayerName
    expert: int | None
    rest: str
    is_under_experts: bool = True

    @property
    def tail(self) -> str:
        """What follows the head, `{expert}` for the number."""
        number = "" if self.expert is None else "{expert}"
        return ".".join(part for part in ("experts" if self.is_under_experts else "", number, self.rest) if part)

    def is_experts(self, tensor: StoredTensor) -> bool | None:
        """Whether such a tensor belongs to experts; None if that cannot be told."""
        if self.expert is not None or _FUSED.fullmatch(self.rest):
            return True
        rank = len(tensor.shape)
        is_beside = rank <= _VALUES_RANK_MAX or (rank <= _BESIDE_RANK_MAX and _BESIDE.fullmatch(self.rest))
        return False if is_beside else None


@lru_cache(maxsize=1 << 12)
def _split_head(head: str) -> LayerName:
    parts = head.split(".") if head else []
    numbers = [i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)]
    if not numbers:
        return LayerName(head, 0, "", is_numbered=False)
    after_word = [i for i in numbers if i and parts[i - 1] in _LAYER_WORDS]
    at = after_word[-1] if after_word else numbers[0]
    return LayerName(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def split_name(name: str) -> AmongExperts | None:
    """Take a name apart; None for one that is not among experts."""
    if (match := _EXPERTS.search(name)) is not None:
        head, tail = _split_head(name[: match.start()]), name[match.end() :]
        number, _, rest = tail.partition(".")
        if _NUMBER.fullmatch(number):
            return AmongExperts(head, int(number), rest)
        return AmongExperts(head, None, tail)
    if (match := _ELSEWHERE.search(name)) is not None:
        return AmongExperts(_split_head(name[: match.end() - 1]), None, name[match.end() :], is_under_experts=False)
    return None


def dense_layer(name: str, stack: str) -> LayerName | None:
    """The layer of `stack` that a dense tensor of this name lies in; None if it lies in none."""
    if stack and not name.startswith(stack + "."):
        return None
    number, _, rest = name[len(stack) + bool(stack) :].partition(".")
    return LayerName(stack, int(number), rest) if _NUMBER.fullmatch(number) else None


def refused_as(name: str) -> str | None:
    """What naming this is, where it is one that is known and not read."""
    return next((what for pattern, what in _REFUSED if pattern.search(name)), None)


def pattern_of(name: str) -> str:
    """The name with N for every number between dots or underscores: what layers and experts have in common."""
    return re.sub(r"(?<![^._])[0-9]+(?![^.])", "N", name)
