"""What an engine's parameters look like: names, element types, strides, and signs that a kernel rewrote them.

Only plain layouts are described. A parameter is plain if its bytes are those of the checkpoint, expert by expert:
rows in ascending order, elements side by side in a row. A weight that was tiled, shuffled, packed, transposed or
quantised again has the wrong bytes for a raw copy, even where its shape is right; it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shm.block import DTYPE_BITS
from transfer.errors import RestoreError

if TYPE_CHECKING:
    import torch

NO_EXPERT = -1
"""In a map of slots to logical experts: a slot that holds none, and is left alone."""

# The order of the halves of w13, and whether a raw copy can make it.
LAYOUTS = ("gate_first", "up_first")
REWRITTEN: Mapping[str, str] = {
    "marlin": "Marlin packs weights and scales into tiles",
    "aiter": "aiter shuffles weights in 16 by 16 tiles, in place",
    "amx": "the AMX kernels pack weights for VNNI",
    "flashinfer_trtllm": "the TensorRT-LLM kernels interleave and shuffle rows, and store weights in blocks",
    "flashinfer_cutedsl": "the CuTe DSL kernels interleave the halves of w13 in chunks of rows",
    "triton_kernels": "these kernels hold weights transposed, and scales swizzled",
    "deep_gemm_ue8m0": "weights are quantised again, and scales packed as powers of two",
}

# Attributes that SGLang 0.5 sets on a parameter that it has rewritten in place, shape and dtype kept.
REWRITE_MARKS: Mapping[str, str] = {
    "is_shuffled": REWRITTEN["aiter"],
    "format_ue8m0": REWRITTEN["deep_gemm_ue8m0"],
    "is_transposed": "it is held transposed",
    "_xpu_weights_transposed": "it is held transposed",
}

DTYPES: Mapping[str, str] = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.float4_e2m1fn_x2": "U8",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.uint16": "U16", "torch.int16": "I16", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.uint32": "U32", "torch.int32": "I32", "torch.float32": "F32",
    "torch.uint64": "U64", "torch.int64": "I64", "torch.float64": "F64", "torch.complex64": "C64",
}  # fmt: skip
"""torch's dtypes by the names of the safetensors format; what is packed in bytes, by the bytes."""
_BITS = frozenset({"U8", "I8", "F8_E8M0", "U16", "I16", "U32", "I32", "U64", "I64"})
_NUMBERS = frozenset({"F16", "BF16", "F32", "F64", "C64", "BOOL"})


def may_be_same_bits(one: str, other: str) -> bool:
    """Whether two dtypes can be two names for the same bits.

    Engines and checkpoints call packed weights and small scales U8, I8, I32 or what they please. Numbers of another
    format were converted.
    """
    is_named_twice = DTYPE_BITS[one] == DTYPE_BITS[other] and not _BITS.isdisjoint((one, other))
    return one == other or (is_named_twice and _NUMBERS.isdisjoint((one, other)))


_PARTS: Mapping[str, str] = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
    "gate_up_proj": "gate_up", "w13": "gate_up", "input_linear": "gate_up", "output_linear": "down",
}  # fmt: skip
_KINDS: Mapping[str, str] = {"": "weight", "weight_bias": "bias", "scale_inv": "weight_scale_inv"}
_PROJECTION = (
    r"(?P<part>gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3|input_linear|output_linear)(?:[._](?P<kind>\w+))?"
)
_CHECKPOINT_NAME = re.compile(rf"(?:.*\.)?{_PROJECTION}(?:\[[^\]]*\])?")
_EXPERT_NAME = re.compile(
    r"(?P<stack>(?:.*\.)?)layers\.(?P<layer>\d+)\.(?:.*\.)?"
    r"(?:experts\.(?P<expert>\d+)\..+|(?:experts|moe|block_sparse_moe)\..+\[\*?(?P<share>\d+)\])"
)
_EXPERTS_PARAMETER = re.compile(
    r"(?:.*\.)?experts\.(?:\d+\.)?(?:[a-z_]+\.)?(?:w13|w1|w2|w3|gate_up_proj|gate_proj|up_proj|down_proj)(?:[._].*)?"
)
_FUSED_NAME = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts\.(?:[a-z_]+\.)?"
    r"(?P<part>w13|w2|gate_up_proj|down_proj)(?:[._](?P<kind>\w+))?"
)


class SlotMismatch(RestoreError):
    """A slot that a raw copy of the checkpoint's bytes cannot fill. The message names it and the reason."""


class Role(NamedTuple):
    """What a tensor is to its expert. `part`: gate, up, down or gate_up; `kind`: weight, weight_scale_inv, bias, …"""

    part: str
    kind: str


def _role(found: re.Match[str]) -> Role:
    kind = found["kind"] or ""
    return Role(_PARTS[found["part"]], _KINDS.get(kind, kind))


def checkpoint_role(name: str) -> Role:
    """The role of a checkpoint tensor, or of its name template; raises SlotMismatch for a name that is unknown."""
    if (found := _CHECKPOINT_NAME.fullmatch(name)) is None:
        raise SlotMismatch(
            f"{name} is not a gate, up or down projection (gate_proj, up_proj, down_proj, w1, w2, w3, gate_up_proj, "
            "input_linear or output_linear): its place in an engine is not known, so reload this model from disk"
        )
    return _role(found)


class ExpertName(NamedTuple):
    """What the name of one expert's tensor says. `stack` is what stands before the layers: `model.`, or `mtp.`"""

    stack: str
    layer: int
    expert: int


def expert_name(name: str) -> ExpertName | None:
    """Read the name of one expert's tensor, or of a fused one's share; None for other names."""
    if (found := _EXPERT_NAME.fullmatch(name)) is None:
        return None
    return ExpertName(found["stack"], int(found["layer"]), int(found["expert"] or found["share"]))


def expert_of(name: str) -> tuple[int, int] | None:
    """(layer, expert) in such a name; None for other names."""
    return None if (found := expert_name(name)) is None else (found.layer, found.expert)


class FusedName(NamedTuple):
    """What the name of a parameter says that holds a layer's experts along its first axis."""

    layer: int
    part: str
    role: Role


def fused_name(name: str) -> FusedName | None:
    """Read the name of a layer's w13, w2, gate_up_proj or down_proj parameter; None for other names."""
    if (found := _FUSED_NAME.fullmatch(name)) is None:
        return None
    return FusedName(int(found["layer"]), found["part"], _role(found))


def is_experts(name: str) -> bool:
    """Whether a parameter holds weights of experts, to go by its name; shared experts are none."""
    return _EXPERTS_PARAMETER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, eq=False)
class SlotTensor:
    """A parameter to be written, kept alive by `tensor`. `nbytes` spans its first byte to its last."""

    name: str
    address: int
    nbytes: int
    device: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    tensor: torch.Tensor


def describe(name: str, tensor: torch.Tensor) -> SlotTensor:
    """Describe a parameter; `strides` are in bytes. Raises SlotMismatch if it is not plain."""
    dtype = DTYPES.get(str(tensor.dtype))
    if dtype is None:
        raise SlotMismatch(f"{name} has dtype {tensor.dtype}, which no checkpoint tensor has: reload from disk")
    if not str(tensor.layout).endswith("strided") or tensor.numel() == 0 or tensor.data_ptr() == 0:
        raise SlotMismatch(f"{name} has no memory of its own ({tensor.device}, {tuple(tensor.shape)}): bind it later")
    for mark, why in REWRITE_MARKS.items():
        if getattr(tensor, mark, False):
            raise SlotMismatch(f"{name} was rewritten after loading ({mark}: {why}): reload it from disk")
    shape, size = tuple(tensor.shape), tensor.element_size()
    strides = _plain_strides(name, shape, tuple(tensor.stride()), size)
    span = size + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return SlotTensor(name, tensor.data_ptr(), span, str(tensor.device), dtype, size, shape, strides, tensor)


def _plain_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Strides in bytes, those of sides of 1 made canonical; rows may be padded, elements may not."""
    plain: list[int] = []
    inner = 1  # elements that one step of the axis outside must at least skip
    for axis in reversed(range(len(shape))):
        stride = inner if shape[axis] == 1 else strides[axis]
        if stride < inner or (axis == len(shape) - 1 and stride != 1):
            raise SlotMismatch(
                f"{name} {list(shape)} has strides {list(strides)}: it is transposed or shuffled in memory, "
                "and a raw copy would scramble it; reload it from disk, or give a contiguous tensor"
            )
        plain.append(stride * size)
        inner = stride * shape[axis]
    return tuple(reversed(plain))


class Home(NamedTuple):
    """Where a role's tensor lies in one slot: which of the form's parameters, and from which byte on.

    `shape` is what the slot holds of it, `pitch` the bytes from one row to the next.
    """

    parameter: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    pitch: int


class Form(NamedTuple):
    """What slots that look alike share: where each role goes, and the bytes that a slot has in each parameter."""

    homes: tuple[tuple[Role, Home], ...]
    nbytes: tuple[int, ...]
    tp_rank: int
    tp_size: int


def home_in(parameter: int, tensor: SlotTensor, axes: int) -> Home:
    """The home of a whole role, past the leading `axes` of `tensor`: 1 where that axis counts slots, else 0."""
    shape, strides = tensor.shape[axes:] or (1,), tensor.strides[axes:] or (tensor.itemsize,)
    for axis in range(1, len(shape)):
        if strides[axis] != tensor.itemsize * math.prod(shape[axis + 1 :]):
            raise SlotMismatch(f"{tensor.name} {list(tensor.shape)} is padded inside a row: give a contiguous tensor")
    return Home(parameter, 0, tensor.dtype, shape, strides[0])


def halves(home: Home) -> tuple[Home, Home]:
    """The first and the second half of a home's rows: gate and up, or up and gate."""
    rows = home.shape[0] // 2
    first = home._replace(shape=(rows, *home.shape[1:]))
    return first, first._replace(offset=rows * home.pitch)
